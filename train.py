"""
Trains a model: from scratch, from where a run stopped, or from somebody's weights.
    python train.py config/train_book.py
    torchrun --nproc_per_node=8 train.py config/train_fineweb.py

Writes out_dir/ckpt.pt (the newest), best.pt (the best on validation) and log.jsonl. What each recipe costs and reaches
stands in its config file. A run that is killed and resumed ends with the same weights, bit for bit, as one that is not.
"""
import dataclasses
import datetime
import json
import math
import os
import shlex
import sys
import time

import torch

import folio.checkpoint
from folio import engine
from folio import fast
import hellaswag
import folio.tokenizer
from folio.configurator import UserError, configure
from folio.data import Dataset, ahead, train_batch
from folio.evaluation import evaluate
from folio.hugging_face import OPENAI
from folio.machine import Machine, default_device
from model import GPT, GPTConfig
from folio.optim import learning_rate_at, load_states, make_optimizers

# ---- Settings: nanoGPT's names and, but for device, dtype and compile, its defaults ----------------------------------
# The run
out_dir = 'out'  # where checkpoints and the log go
init_from = 'scratch'  # scratch, resume, auto (resume if it can), gpt2[-medium|-large|-xl], a .pt, a folder
eval_interval = 2000  # steps between evaluations, each followed by a checkpoint
eval_iters = 200  # batches of one evaluation; 0 is the whole split
eval_only = False  # print the loss on every split and stop
log_interval = 1  # steps between log lines
always_save_checkpoint = True  # False: save only when validation improves
sample_interval = 0  # steps between samples of 200 tokens; 0 is none
hellaswag_interval = 0  # steps between scorings of HellaSwag; 0 is none
hellaswag_source = ''  # a file in its format; empty: its validation split, downloaded once
patience = 0  # stop after so many evaluations without improvement; 0 is never
seed = 1337  # of initialisation, batches and dropout
wandb_log = False  # log to Weights & Biases as well
wandb_project = 'folio'
wandb_run_name = 'gpt2'
# Data
dataset = 'openwebtext'  # a folder under data/
gradient_accumulation_steps = 40  # micro-steps a step, over all processes
batch_size = 12  # sequences a micro-step
block_size = 1024  # tokens of context
# Model (the fields of GPTConfig)
arch = 'gpt2'  # gpt2 or modern
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # 0 to pre-train, 0.1 and more to fine-tune
bias = False  # gpt2: biases in Linear and LayerNorm
gelu = 'tanh'  # gpt2: tanh, as OpenAI's, or none, the exact one
window = 0  # attend to so many tokens only; 0 is all
flash = True  # fused attention; False: written out
# Optimizer
optimizer = 'adamw'  # or muon: Muon for the matrices of the blocks, AdamW for the rest
learning_rate = 6e-4  # the highest
muon_learning_rate = 0.02  # the highest of Muon's, which falls along with it
max_iters = 600000  # steps
weight_decay = 1e-1  # of matrices
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # highest norm of the gradient; 0 is no limit
decay_lr = True  # False: a constant learning rate
schedule = 'cosine'  # cosine or trapezoid
warmup_iters = 2000
lr_decay_iters = 600000  # the step at which the learning rate has fallen to min_lr
cooldown_iters = 0  # trapezoid: the fall takes the last so many steps
min_lr = 6e-5
# Machine
backend = 'nccl'  # of torchrun's processes; gloo on CPUs whatever this says
fsdp = False  # share out parameters and optimizer over the processes, for models that do not fit
device = default_device()  # cpu, cuda, cuda:1, mps …
dtype = 'auto'  # float32, bfloat16, float16 (with loss scaling); auto: bfloat16 where a GPU has it
compile = 'auto'  # True, False; auto: on a GPU
config = configure(globals())

# ---- Machine ---------------------------------------------------------------------------------------------------------
least = dict(gradient_accumulation_steps=1, batch_size=1, block_size=1, eval_interval=1, log_interval=1, max_iters=0,
             eval_iters=0, warmup_iters=0, cooldown_iters=0, patience=0, sample_interval=0, hellaswag_interval=0)
for name in (name for name in least if config[name] < least[name]):
    raise UserError(f'{name} is {config[name]}; it must be at least {least[name]}')
if compile not in ('auto', True, False):
    raise UserError(f'compile is {compile!r}; choose from auto, True, False')
if wandb_log:
    try:
        import wandb
    except ImportError:
        raise UserError('wandb_log needs a package: pip install wandb') from None
machine = Machine(device, dtype)
device, rank, world_size, say = machine.device, machine.rank, machine.world_size, machine.say
if gradient_accumulation_steps % world_size:
    raise UserError(f'gradient_accumulation_steps ({gradient_accumulation_steps}) counts those of all processes: '
                    f'make it a multiple of their number, {world_size}')
fsdp = fsdp and world_size > 1
if fsdp and machine.dtype == 'float16':
    raise UserError('float16 scales the loss by what each process sees; with fsdp give --dtype=bfloat16 or float32')
machine.join(backend)
compile = (machine.type == 'cuda' if compile == 'auto' else compile) and machine.can_compile()
say(f'{machine}, compile {compile}' + ', sharded' * fsdp)

# ---- Data and model --------------------------------------------------------------------------------------------------
data = Dataset(dataset)
train_tokens, train_mask, val_tokens = data.tokens('train'), data.mask('train'), data.tokens('val')
if len(train_tokens) <= block_size:
    raise UserError(f'block_size ({block_size}) is longer than the data ({len(train_tokens)} tokens of training text): '
                    f'use at most --block_size={len(train_tokens) - 1}, or more text')
ckpt_path, best_path, log_path = (os.path.join(out_dir, name) for name in ('ckpt.pt', 'best.pt', 'log.jsonl'))
if init_from == 'auto':
    init_from = 'resume' if os.path.exists(ckpt_path) else 'scratch'
torch.manual_seed(seed)
wanted = {f.name: config.get(f.name, data.vocab_size) for f in dataclasses.fields(GPTConfig)}
try:
    model_config = GPTConfig(**wanted)
except ValueError as e:
    raise UserError(e) from None
source = ckpt_path if init_from == 'resume' else init_from
checkpoint = None
if init_from != 'scratch':
    checkpoint = folio.checkpoint.load(source)
if init_from == 'resume' or init_from == 'scratch' and os.path.exists(ckpt_path):
    saved = checkpoint or folio.checkpoint.load(ckpt_path)
    there = saved['model_args'] | saved.get('config', {})
    differ = [f'{k} is {there[k]}, not {wanted[k]}' for k in wanted
              if there.get(k, wanted[k]) != wanted[k] and k not in ('dropout', 'flash', 'gelu')]  # gelu stays as it was
    del saved
    if differ:
        raise UserError(f'{ckpt_path} has another shape ({"; ".join(differ)}): give its settings, or another --out_dir')
if init_from == 'scratch':
    model = GPT(model_config)
else:
    spec = checkpoint.get('tokenizer', {'kind': 'gpt2'} if init_from in OPENAI else data.spec)
    known = checkpoint['model_args']['vocab_size']
    if known != data.vocab_size or folio.tokenizer.spec_hash(spec) != folio.tokenizer.spec_hash(data.spec):
        raise UserError(f'{data.folder} has another vocabulary ({data.spec["kind"]}, {data.vocab_size} tokens) than '
                        f'{init_from} ({spec["kind"]}, {known}): it can only go on with its own')
    try:
        model = GPT.from_pretrained(checkpoint, dropout=dropout, flash=flash, window=window, block_size=block_size)
    except ValueError as e:
        raise UserError(e) from None
model = fast.accelerate(model)  # the same numbers, sooner: without this line all still works
if fsdp:
    machine.shard(model)  # and move its shares to the device
else:
    model.to(device)
optimizers = make_optimizers(model, optimizer, learning_rate, muon_learning_rate, weight_decay, (beta1, beta2))
learning_rate_at(0, 1, 1.0, 1.0, schedule=schedule)  # refuses an unknown one before anything is written
scaler = torch.amp.GradScaler(machine.type, enabled=machine.dtype == 'float16')
first_iter, best_val_loss, evals_without_gain, train_seconds = 0, math.inf, 0, 0.0
if init_from == 'resume':
    first_iter, best_val_loss = checkpoint['iter_num'], float(checkpoint['best_val_loss'])
    evals_without_gain, train_seconds = (checkpoint.get(k, 0) for k in ('evals_without_gain', 'train_seconds'))
    if first_iter > max_iters:
        raise UserError(f'{ckpt_path} is at step {first_iter} already; to go on, give a higher --max_iters')
    load_states(optimizers, checkpoint['optimizer'])
    scaler.load_state_dict(checkpoint.get('scaler') or scaler.state_dict())
del checkpoint  # and its memory
if machine.sum(first_iter)[0] != first_iter * world_size:
    raise UserError(f'the processes find different checkpoints in {out_dir}: it must be on a disk that all of them see')
hellaswag_items = hellaswag.load(hellaswag_source, machine) if hellaswag_interval and not eval_only else []
if compile:
    model.compile()
ddp_model = torch.nn.parallel.DistributedDataParallel(model) if world_size > 1 and not fsdp else model
n_parameters = sum(p.numel() for p in model.parameters())
tokens_per_step = gradient_accumulation_steps * batch_size * block_size
say(f'{model.config.arch}, {n_parameters / 1e6:.2f} M parameters; {data.folder}, {len(train_tokens):,} tokens, '
    f'{tokens_per_step:,} a step, {len(train_tokens) / tokens_per_step:.1f} steps an epoch')


# ---- Checkpoints, log ------------------------------------------------------------------------------------------------
def save(path, iter_num):
    states = machine.whole([model.state_dict()] + [o.state_dict() for o in optimizers])
    if rank == 0:
        folio.checkpoint.save(path, {
            'model': states[0], 'model_args': dataclasses.asdict(model.config), 'tokenizer': data.spec,
            'optimizer': states[1:], 'scaler': scaler.state_dict(), 'config': config,
            'iter_num': iter_num, 'best_val_loss': best_val_loss, 'evals_without_gain': evals_without_gain,
            'train_seconds': train_seconds})


def log(entry):
    if rank == 0:
        with open(log_path, 'a', encoding='utf-8') as f:
            f.write(json.dumps(entry) + '\n')
        if wandb_log and 'iter' in entry:
            wandb.log(entry, step=entry['iter'])


def sample_text():
    """200 tokens from the start of a document."""
    tokenizer = folio.tokenizer.load(data.spec)
    with machine.autocast, machine.unsharded(model):
        steps = engine.generate(model, [[tokenizer.start]], 200, strategy='nucleus', seed=seed)
        return tokenizer.decode([next_B.item() for next_B in steps])


if eval_only:
    for split in data.splits():
        n_windows = eval_iters * batch_size or (split == 'train') * -(-len(val_tokens) // block_size)  # as val's
        figures = evaluate(model, data, split, block_size, batch_size, n_windows, machine)
        say(f'{split}: ' + ', '.join(f'{k} {v:.4f}' for k, v in figures.items()))
    sys.exit()
if rank == 0:
    try:
        os.makedirs(out_dir, exist_ok=True)
        if init_from != 'resume' and folio.checkpoint.set_aside(out_dir):
            say(f'the run that was in {out_dir} is now in {out_dir}/previous')
        if init_from == 'resume':
            folio.checkpoint.forget_log_after(log_path, first_iter)
        elif os.path.exists(log_path):
            os.remove(log_path)  # of a run that never saved
    except OSError as e:
        raise UserError(f'{out_dir} cannot be written ({e.strerror}); give another --out_dir') from None
    if wandb_log:
        wandb.init(project=wandb_project, name=wandb_run_name, config=config)
log({'config': config, 'parameters': n_parameters, 'first_iter': first_iter, 'machine': {
    'device': machine.name, 'dtype': machine.dtype, 'compile': compile, 'processes': world_size, 'cpus': os.cpu_count(),
    'torch': torch.__version__, 'python': sys.version.split()[0], 'date': time.strftime('%Y-%m-%d %H:%M:%S')}})

# ---- Training --------------------------------------------------------------------------------------------------------
micro_steps = gradient_accumulation_steps // world_size
batches = ahead((train_batch(train_tokens, train_mask, block_size, batch_size, gradient_accumulation_steps, seed, step,
                             micro_step * world_size + rank)
                 for step in range(first_iter, max_iters) for micro_step in range(micro_steps)), machine.type == 'cuda')
machine.catch_signals()
clock, logged = time.perf_counter(), (first_iter, train_seconds)  # of the last log line
for iter_num in range(first_iter, max_iters + 1):  # one more than the steps: the last turn only validates and saves
    # Validate, with the clock stopped. A resumed run need not: it was saved after it had.
    train_seconds += time.perf_counter() - clock
    last, validated, improved = iter_num == max_iters, False, False
    fresh = iter_num > first_iter or init_from != 'resume'
    if fresh and (last or iter_num % eval_interval == 0):
        figures = evaluate(model, data, 'val', block_size, batch_size, eval_iters * batch_size, machine)
        validated, improved = True, figures['loss'] < best_val_loss
        best_val_loss = min(best_val_loss, figures['loss'])
        evals_without_gain = 0 if improved else evals_without_gain + 1
        say(f'step {iter_num}: ' + ', '.join(f'val {k} {v:.4f}' for k, v in figures.items()))
        log({'iter': iter_num, 'tokens': iter_num * tokens_per_step, 'train_seconds': train_seconds,
             'val_loss': figures.pop('loss'), **figures})
    last |= 0 < patience <= evals_without_gain
    if hellaswag_items and fresh and (last or iter_num % hellaswag_interval == 0):
        with machine.unsharded(model):
            figures = hellaswag.evaluate(model, hellaswag_items, folio.tokenizer.load(data.spec), machine)
        say(f'step {iter_num}: HellaSwag {figures["acc_mean"]:.4f} ± {figures["acc_mean_stderr"]:.4f}')
        log({'iter': iter_num, 'hellaswag': figures.pop('acc_mean'), **figures})
    if sample_interval and iter_num > first_iter and iter_num % sample_interval == 0:
        text = sample_text()
        say(f'---- sample at step {iter_num}\n{text}\n----')
        log({'iter': iter_num, 'sample': text})

    # Save, and stop when it is time to or somebody asked for it
    stopping = (world_size == 1 or iter_num % log_interval == 0) and machine.asked_to_stop()
    if improved and iter_num > first_iter:  # before ckpt.pt, so that a resumed run never misses its best
        save(best_path, iter_num)
    if stopping or iter_num > first_iter and validated and (improved or always_save_checkpoint):
        save(ckpt_path, iter_num)
    if last or stopping:
        break

    # Step
    clock = time.perf_counter()
    lr = learning_rate_at(iter_num, lr_decay_iters, learning_rate, min_lr, warmup_iters, schedule, cooldown_iters)
    for group in (g for o in optimizers for g in o.param_groups):
        group['lr'] = group['peak_lr'] * (lr / learning_rate if decay_lr else 1.0)
    torch.manual_seed(((seed * 1_000_003 + iter_num) * world_size + rank) % 2**63)  # dropout too depends on the step
    loss_sum = torch.zeros((), device=device)
    for micro_step in range(micro_steps):
        idx_BT, targets_BT = next(batches)
        sync = micro_step == micro_steps - 1  # the gradients of all processes meet at the last one only
        if fsdp:
            model.set_requires_gradient_sync(sync)
        elif world_size > 1:
            ddp_model.require_backward_grad_sync = sync
        with machine.autocast:
            _, loss = ddp_model(idx_BT.to(device, non_blocking=True), targets_BT.to(device, non_blocking=True))
        loss_sum += loss.detach()
        scaler.scale(loss / micro_steps).backward()
    for o in optimizers:
        scaler.unscale_(o)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip if grad_clip > 0 else math.inf)
    norm = norm.full_tensor() if fsdp else norm
    for o in optimizers:
        if machine.dtype != 'float16' or norm.isfinite():  # an overflow in one optimizer's part makes all skip
            scaler.step(o)
        o.zero_grad(set_to_none=True)
    scaler.update()

    # Log
    if iter_num % log_interval == 0:
        loss = machine.sum(loss_sum.item())[0] / gradient_accumulation_steps  # .item() waits for the device
        entry = {'iter': iter_num, 'loss': loss, 'lr': optimizers[0].param_groups[0]['lr'], 'grad_norm': norm.item(),
                 'tokens': (iter_num + 1) * tokens_per_step}
        seconds = train_seconds + time.perf_counter() - clock
        step_seconds, logged = (seconds - logged[1]) / (iter_num + 1 - logged[0]), (iter_num + 1, seconds)
        entry |= {'tokens_per_second': tokens_per_step / step_seconds, 'train_seconds': seconds}
        if machine.peak_flops:
            entry['mfu'] = model.flops_per_token() * entry['tokens_per_second'] / (machine.peak_flops * world_size)
        log(entry)
        to_go = datetime.timedelta(seconds=int(step_seconds * (max_iters - iter_num - 1)))
        say(f'iter {iter_num}: loss {entry["loss"]:.4f}, lr {entry["lr"]:.2e}, norm {entry["grad_norm"]:.2f}, '
            f'{entry["tokens_per_second"]:,.0f} tokens/s' + (f', MFU {entry["mfu"]:.1%}' if 'mfu' in entry else '') +
            f', {to_go} to go')

if stopping and not last:
    again = shlex.join([a for a in sys.argv[1:] if not a.startswith('--init_from=')] + ['--init_from=resume'])
    say(f'stopped at step {iter_num}, saved in {ckpt_path}; go on with: python train.py {again}')
    sys.exit(128 + machine.signals[0][0] if machine.signals else 1)
why = '' if iter_num == max_iters else f', no gain in {patience} evaluations'
then = f'read it with: python sample.py --out_dir={out_dir}' if os.path.exists(ckpt_path) else 'nothing to save'
say(f'done at step {iter_num}{why}: best val loss {best_val_loss:.4f}, {train_seconds:.0f} s of training; {then}')
