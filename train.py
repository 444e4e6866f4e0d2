"""
Train a model: from scratch, from where a run stopped, or from existing weights.
    python train.py config/train_book.py
    torchrun --nproc_per_node=8 train.py config/train_fineweb.py

Writes out_dir/ckpt.pt (the newest), best.pt (the best on validation), log.jsonl and model.py, the
code of the model. Each config file says what its recipe costs and reaches. Stop it with Ctrl-C: the
same command with --init_from=resume continues; on a CPU it ends with the same weights, bit for bit,
as a run that was not stopped.

Needs model.py and folio/; hellaswag.py where hellaswag_interval is set.
"""
import inspect
import math
import os
import shlex
import sys
import time
import warnings
from dataclasses import asdict

# OpenMP's waiting threads spin, and on a busy machine they hold up the working one. Limit how long
# they spin; the limit is read when torch is loaded.
os.environ.setdefault('GOMP_SPINCOUNT', '10000')
import torch
from torch.nn.parallel import DistributedDataParallel

import folio.checkpoint
import folio.tokenizer
from folio import engine
from folio.configurator import (UserError, configure, model_settings, notice, report,
                                require_at_least, require_choice, user_errors)
from folio.data import Dataset, evaluate, prefetch, train_batch, train_batches
from folio.log import Log, NoLog, start_wandb
from folio.machine import COMPILE_OPTIONS, Machine, catch_signals, default_device
from folio.optim import SCHEDULES, learning_rate_at, load_states, make_optimizers, momentum_at
from model import GPT, GPTConfig

# ---- Settings: nanoGPT's names and, except for device, dtype and compile, its defaults -----------
# The run
out_dir = 'out'  # where checkpoints and the log go
init_from = 'scratch'  # scratch, resume, auto (resume if possible), gpt2 …, a .pt, a folder
eval_interval = 2000  # steps between evaluations, each followed by a checkpoint
eval_iters = 200  # batches in one evaluation; 0: the whole split
eval_only = False  # print the loss on every split and stop
log_interval = 1  # steps between log lines
always_save_checkpoint = True  # False: save only when validation improves
sample_interval = 0  # steps between samples of 200 tokens; 0: none
hellaswag_interval = 0  # steps between scorings of HellaSwag; 0: none
hellaswag_source = ''  # a file in HellaSwag's format; empty: its validation split, downloaded once
patience = 0  # stop after this many evaluations without improvement; 0: never
seed = 1337  # of initialisation, batches and dropout
note = ''  # what this run is meant to find out; goes into the log
wandb_log = False  # log to Weights & Biases as well
wandb_project = 'folio'  # the project there
wandb_run_name = 'gpt2'  # the name of the run there
# Data
dataset = 'openwebtext'  # a folder under data/
gradient_accumulation_steps = 40  # micro-steps in a step, over all processes
batch_size = 12  # sequences in a micro-step
block_size = 1024  # tokens of context
# Model (the fields of GPTConfig)
arch = 'gpt2'  # gpt2 or modern
n_layer = 12  # blocks
n_head = 12  # heads of attention in a block
n_embd = 768  # channels of the residual stream
dropout = 0.0  # 0 to pre-train, 0.1 and more to fine-tune
bias = False  # gpt2: biases in Linear and LayerNorm
gelu = 'tanh'  # gpt2: tanh, the approximation that OpenAI used, or none, the exact GELU
window = 0  # each token sees this many tokens, itself included; 0: all before it
flash = True  # fused attention; False: the same written out
activation_checkpointing = False  # less memory: compute activations twice, a third more work
# Optimizer
optimizer = 'adamw'  # or muon: Muon for the matrices of the blocks, AdamW for the rest
learning_rate = 6e-4  # the peak
muon_learning_rate = 0.02  # Muon's peak; both rates rise and fall together
max_iters = 600000  # steps
weight_decay = 1e-1  # for matrices (with muon, only the blocks'), never for biases and norms
beta1 = 0.9  # AdamW: how much of the average gradient a step keeps
beta2 = 0.95  # AdamW: the same for its square
grad_clip = 1.0  # highest norm of the gradient; 0: no limit
decay_lr = True  # False: a constant learning rate
schedule = 'cosine'  # cosine or trapezoid
warmup_iters = 2000  # steps over which the learning rate rises
lr_decay_iters = 0  # the step at which it reaches min_lr; 0: max_iters
cooldown = 0.7  # trapezoid: the share of the steps over which the learning rate falls
min_lr = 6e-5  # where the learning rate ends
# Machine
backend = 'nccl'  # between GPUs; between CPUs it is always gloo
device = default_device()  # cpu, cuda, cuda:1, mps …
dtype = 'auto'  # float32, bfloat16, float16 (with loss scaling); auto: bfloat16 where that is fast
compile = 'auto'  # True, False; auto: on a GPU
config = configure(globals())
require_at_least(1, config, 'gradient_accumulation_steps', 'batch_size', 'block_size',
                 'eval_interval', 'log_interval')
require_at_least(0, config, 'max_iters', 'eval_iters', 'warmup_iters', 'lr_decay_iters',
                 'patience', 'sample_interval', 'hellaswag_interval', 'min_lr', 'grad_clip')
require_choice(config, 'compile', ('auto', True, False))
require_choice(config, 'schedule', SCHEDULES)
if not 0 <= cooldown <= 1:
    raise UserError(f'cooldown is {cooldown}; it is a share of the steps, from 0 to 1')

# ---- Machine -------------------------------------------------------------------------------------
# Under torchrun this script runs once for each GPU, told apart by rank; rank 0 does the talking.
machine = Machine(device, dtype)
device = machine.device  # under torchrun each process has its own
rank = machine.rank
world_size = machine.world_size
print0 = machine.print0
if gradient_accumulation_steps % world_size != 0:
    raise UserError(f'gradient_accumulation_steps ({gradient_accumulation_steps}) counts the '
                    'micro-steps of all processes: make it a multiple of their number, '
                    f'{world_size}')
micro_steps = gradient_accumulation_steps // world_size  # of this process
machine.init_processes(backend)
if compile == 'auto':
    compile = machine.type == 'cuda'
compile = compile and machine.can_compile()
print0(f'{machine}, compile {compile}')

# ---- Data ----------------------------------------------------------------------------------------
data = Dataset(dataset)
train_tokens = data.tokens('train')
train_mask = data.mask('train')  # None, or which tokens are targets (instruction tuning)
if len(train_tokens) < block_size:
    raise UserError(f'block_size ({block_size}) is longer than the data ({len(train_tokens)} '
                    'tokens of training text): use at most '
                    f'--block_size={len(train_tokens)}, or more text')
windows_per_step = gradient_accumulation_steps * batch_size
tokens_per_step = windows_per_step * block_size
eval_windows = eval_iters * batch_size  # 0: the whole split

# ---- Model ---------------------------------------------------------------------------------------
ckpt_path = os.path.join(out_dir, 'ckpt.pt')
best_path = os.path.join(out_dir, 'best.pt')
if init_from == 'auto':
    init_from = 'resume' if os.path.exists(ckpt_path) else 'scratch'
    if init_from == 'scratch':
        print0(f'no {ckpt_path} yet: starting from scratch')
resumes = init_from == 'resume' and not eval_only  # --eval_only takes only the weights
model_args = model_settings(config, GPTConfig) | {'vocab_size': data.vocab_size}
with user_errors():
    model_config = GPTConfig(**model_args)
torch.manual_seed(seed)  # so that every process draws the same weights
if init_from == 'scratch':
    model = GPT(model_config)
else:
    checkpoint = folio.checkpoint.load(init_from, out_dir)
    folio.checkpoint.require_same_tokenizer(checkpoint, data)
    if resumes:
        folio.checkpoint.require_same_run(checkpoint, model_args, data, seed)
    settings = model_args
    if eval_only:  # the model as it was trained, with a shorter context if that is asked for
        settings = {'block_size': min(block_size, checkpoint['model_args']['block_size'])}
    model = folio.checkpoint.build(GPT, checkpoint, settings)
block_size = model.config.block_size
model.to(device)
with user_errors():
    optimizers = make_optimizers(
        model, optimizer, learning_rate=learning_rate, muon_learning_rate=muon_learning_rate,
        weight_decay=weight_decay, betas=(beta1, beta2))
# Gradients in float16 underflow unless the loss is scaled up. With other formats this is a no-op.
scaler = torch.amp.GradScaler(machine.type, enabled=machine.dtype == 'float16')

first_iter = 0
first_window = 0  # of the training stream; counted in windows, because the batch size may change
best_val_loss = math.inf
best_iter = 0  # the step of that loss
train_seconds = 0.0  # without evaluations, samples and saving
if resumes:
    first_iter = checkpoint['iter_num']
    first_window = checkpoint.get('windows', first_iter * windows_per_step)
    train_seconds = checkpoint.get('train_seconds', 0.0)
    if checkpoint.get('eval_windows', eval_windows) == eval_windows:
        best_val_loss = float(checkpoint['best_val_loss'])
        best_iter = checkpoint.get('best_iter', first_iter)
    else:
        print0('evaluations now cover other windows: the best loss starts over')
    if checkpoint['optimizer']:
        load_states(optimizers, checkpoint['optimizer'])
    else:
        print0(f'{ckpt_path} was saved without its optimizer, which starts over')
    if checkpoint.get('scaler'):
        scaler.load_state_dict(checkpoint['scaler'])
    print0(f'continuing at step {first_iter}, from {ckpt_path}')
    if first_iter >= max_iters:
        print0('all its steps are done: for more, give a higher --max_iters')
checkpoint = None  # to free its memory
mean_first_iter = machine.sum(first_iter)[0] / world_size
if mean_first_iter != first_iter:
    raise UserError(f'the processes find different checkpoints in {out_dir}: it must be on a disk '
                    'that all of them see')
n_parameters = sum(p.numel() for p in model.parameters())
print0(f'{model.config.arch}, {n_parameters / 1e6:.2f} M parameters; {data.folder}, '
       f'{len(train_tokens):,} tokens of a vocabulary of {data.vocab_size:,}')
if compile:
    # In place: parameters keep their names, and model.forward stays eager.
    model.compile(options=COMPILE_OPTIONS)


def evaluate_split(split, n_windows):
    """Return {loss, perplexity, bits_per_byte …} on the first n_windows of a split; 0: all."""
    return evaluate(model, data, split, block_size, batch_size, n_windows, machine)


def shown(metrics, prefix=''):
    """Return the metrics of an evaluation as text."""
    return ', '.join(f'{prefix}{name} {value:.4f}' for name, value in metrics.items())


if eval_only:
    if init_from == 'scratch':
        print0('these weights are untrained; to evaluate the run in out_dir: --init_from=resume')
    for split in data.splits():
        n_windows = eval_windows
        if n_windows == 0 and split == 'train':
            # The whole training split would take hours. Take as much as val has.
            n_windows = math.ceil(len(data.tokens('val')) / block_size)
        print0(f'{split}: {shown(evaluate_split(split, n_windows))}')
    machine.end_processes()
    sys.exit()

# ---- What the loop calls -------------------------------------------------------------------------
decay_iters = lr_decay_iters or max_iters
n_steps = max(0, max_iters - first_iter)
n_tokens = n_steps * tokens_per_step
print0(f'{n_steps:,} steps of {tokens_per_step:,} tokens: {n_tokens:,} tokens, '
       f'{n_tokens / len(train_tokens):.2f} epochs')
if decay_lr and min_lr > learning_rate:
    print0(f'min_lr ({min_lr:g}) is above learning_rate ({learning_rate:g}): the rate will rise')
if decay_lr and n_steps > 0 and decay_iters <= warmup_iters:
    print0(f'the schedule of the learning rate ends at step {decay_iters}, within its warm-up of '
           f'{warmup_iters} steps: give fewer --warmup_iters')
elif decay_lr and decay_iters < max_iters:
    print0(f'from step {decay_iters} (lr_decay_iters) on, the learning rate is {min_lr:g} (min_lr)')

# Load now what later steps need, so that the run stops here if something is missing.
if sample_interval > 0 or hellaswag_interval > 0:
    tokenizer = folio.tokenizer.load(data.spec)
if hellaswag_interval > 0:
    import hellaswag
    hellaswag_items = hellaswag.load(hellaswag_source, machine)
    hellaswag_rows = hellaswag.render(hellaswag_items, tokenizer, block_size)

log = NoLog()
record = folio.checkpoint.record_of(GPT)  # which code runs
if rank == 0:
    # First, because it may ask for a key
    wandb_run = start_wandb(wandb_project, wandb_run_name, config) if wandb_log else None
    log = Log(out_dir, inspect.getsourcefile(GPT), resume_at=first_iter if resumes else None,
              wandb_run=wandb_run)
    if log.previous is not None:
        print0(f'the run that was in {out_dir} is now in {log.previous}')
shape = {name: getattr(model.config, name) for name in model_args}  # a loaded model has its own
log.write(config=config | shape, record=record, parameters=n_parameters, first_iter=first_iter,
          machine={'device': machine.name, 'dtype': machine.dtype, 'compile': compile,
                   'processes': world_size, 'cpus': os.cpu_count(), 'torch': torch.__version__,
                   'python': sys.version.split()[0], 'date': time.strftime('%Y-%m-%d %H:%M:%S')})
fingerprints = {split: data.fingerprint(split) for split in ('train', 'val')}


def windows_before(iter_num):
    """Return how many windows of the training stream come before a step."""
    return first_window + (iter_num - first_iter) * windows_per_step


def require_finite(what, value, step):
    """Raise UserError if a value is NaN or infinite; the checkpoint stays as it is."""
    if not math.isfinite(value):
        remedy = 'nothing was saved yet: start again with a lower --learning_rate'
        if os.path.exists(ckpt_path):
            remedy = f'{ckpt_path} is intact: --init_from=resume with a lower --learning_rate'
        raise UserError(f'the run diverged at step {step}: {what} is {value}; {remedy}')


def save(iter_num, path):
    """Write a checkpoint of the run as it is before step iter_num."""
    # The largest weight of each parameter, in no extra memory: there may be none left.
    largest = [torch.linalg.vector_norm(p.detach(), math.inf) for p in model.parameters()]
    require_finite('the largest weight', torch.stack(largest).max().item(), iter_num)
    if rank == 0:
        folio.checkpoint.save(path, {
            'model': model.state_dict(),
            'model_args': asdict(model.config),
            'tokenizer': data.spec,
            'template': data.meta.get('template'),  # of prompts, for sample.py --chat
            'optimizer': [o.state_dict() for o in optimizers],
            'scaler': scaler.state_dict(),
            'config': config,
            'record': record,
            'iter_num': iter_num,
            'windows': windows_before(iter_num),
            'fingerprints': fingerprints,
            'eval_windows': eval_windows,
            'best_val_loss': best_val_loss,
            'best_iter': best_iter,
            'train_seconds': train_seconds,
        })


def save_first(kind, error, trace):
    """Save before an error ends the run, unless it struck while the weights were changing."""
    if iter_num > first_iter and weights_are_whole and not issubclass(kind, UserError):
        try:
            save(iter_num, ckpt_path)
            print0(f'an error ends the run; step {iter_num} is saved in {ckpt_path}')
        except Exception as e:  # no room, weights that are not finite, a GPU that has failed
            notice(f'step {iter_num} is not saved: {e}')
    report(kind, error, trace)


def is_due(interval):
    """Return whether something is due before this step: every `interval` steps and at the end."""
    return interval > 0 and (is_last or iter_num % interval == 0)


def warm_up(forward, n_rows):
    """Run a forward and backward pass that does not count."""
    idx_BT, targets_BT = train_batch(train_tokens, train_mask, block_size, n_rows, seed,
                                     first=first_window)
    with machine.autocast:
        _, loss = forward(idx_BT.to(device), targets_BT.to(device))
    loss.backward()


ddp_model = model
if world_size > 1:
    # DDP must know beforehand whether some parameters get no gradient. One row tells; it goes
    # through model.forward, because compiling must wait for DDP.
    warm_up(model.forward, n_rows=1)
    has_unused = any(p.requires_grad and p.grad is None for p in model.parameters())
    # torch 2.13 has a newer name for broadcast_buffers, torch 2.11 only this one.
    warnings.filterwarnings('ignore', '.broadcast_buffers. is deprecated')
    ddp_model = DistributedDataParallel(model, broadcast_buffers=False,
                                        gradient_as_bucket_view=True,  # no copy of the gradients
                                        find_unused_parameters=machine.any(has_unused))
    model.zero_grad(set_to_none=True)
if compile:
    print0('compiling, which may take minutes')
# After its first pass DDP regroups the gradients, and sums them in another order. Without this pass
# a resumed run would not have the same bits as an uninterrupted one.
warm_up(ddp_model, batch_size)
unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
if unused:
    print0(f'no gradient reaches {", ".join(unused)}: left as it is')
model.zero_grad(set_to_none=True)

# ---- Training ------------------------------------------------------------------------------------
signals = catch_signals()  # the signals that came so far
sys.excepthook = save_first
batches = prefetch(train_batches(train_tokens, train_mask, block_size, batch_size, micro_steps,
                                 seed, first_window, machine), pin_memory=machine.type == 'cuda')
logged_iter = first_iter
logged_seconds = train_seconds
iter_num = first_iter
weights_are_whole = True  # False while the optimizers change them
machine.synchronize()
step_start = time.perf_counter()
# One turn more than there are steps: the last turn only validates and saves.
while True:
    is_last = iter_num >= max_iters
    stopping = machine.any(len(signals) > 0)  # the signal may reach only some processes
    # The clock stops until the next step. Steps still queued on the GPU are training time, so wait
    # for them, but only if something is due.
    if stopping or is_due(eval_interval) or is_due(hellaswag_interval) or is_due(sample_interval):
        machine.synchronize()
    train_seconds += time.perf_counter() - step_start

    # Validate and save
    if is_due(eval_interval) and not stopping:
        metrics = evaluate_split('val', eval_windows)
        require_finite('the validation loss', metrics['loss'], iter_num)
        print0(f'step {iter_num}: {shown(metrics, "val ")}')
        val_loss = metrics.pop('loss')
        log.write(iter=iter_num, tokens=windows_before(iter_num) * block_size,
                  train_seconds=train_seconds, val_loss=val_loss, **metrics)
        improved = val_loss < best_val_loss
        if improved:
            best_val_loss = val_loss
            best_iter = iter_num
        if iter_num > 0 and improved:
            save(iter_num, best_path)
            if rank == 0:
                folio.checkpoint.save_again(best_path, ckpt_path)
        elif iter_num > 0 and always_save_checkpoint:
            save(iter_num, ckpt_path)
        if patience > 0 and iter_num - best_iter >= patience * eval_interval:
            is_last = True
    if is_due(hellaswag_interval) and not stopping:
        scores = hellaswag.accuracies(hellaswag_items,
                                      *hellaswag.score(model, hellaswag_rows, machine))
        accuracy = scores.pop('acc_mean')
        print0(f'step {iter_num}: HellaSwag {accuracy:.4f} ± {scores["acc_mean_stderr"]:.4f}')
        log.write(iter=iter_num, hellaswag=accuracy, **scores)
    if is_due(sample_interval) and iter_num > 0 and not stopping:
        start_BT = torch.tensor([[tokenizer.start]])
        with machine.autocast:
            steps = list(engine.generate(model, start_BT, 200, strategy='nucleus', seed=seed))
        text = tokenizer.decode(torch.cat(steps).tolist())
        print0(f'---- sample at step {iter_num}\n{text}\n----')
        log.write(iter=iter_num, sample=text)
    if stopping:
        save(iter_num, ckpt_path)
    if is_last or stopping:
        break

    # Step
    step_start = time.perf_counter()
    lr = learning_rate_at(iter_num, decay_iters, peak=learning_rate, floor=min_lr,
                          warmup=warmup_iters, schedule=schedule, cooldown=cooldown)
    for o in optimizers:
        for group in o.param_groups:
            group['lr'] = group['peak_lr']
            if decay_lr:
                group['lr'] *= lr / learning_rate
            if 'momentum' in group:  # Muon's
                group['momentum'] = momentum_at(iter_num, decay_iters)
    # Seed dropout by the step and the process, so that a resumed run draws the same.
    torch.manual_seed(((seed * 1_000_003 + iter_num) * world_size + rank) % 2**63)
    loss_sum = torch.zeros((), device=device)
    for micro_step in range(micro_steps):
        stopping = machine.any(len(signals) > 0)
        if stopping:
            break
        idx_BT, targets_BT, weight = next(batches)
        idx_BT = idx_BT.to(device, non_blocking=True)
        targets_BT = targets_BT.to(device, non_blocking=True)
        # Average the gradients of all processes in the last micro-step only.
        ddp_model.require_backward_grad_sync = micro_step == micro_steps - 1
        with machine.autocast:
            _, loss = ddp_model(idx_BT, targets_BT)
        scaler.scale(loss * weight).backward()
        loss_sum += loss.detach() * weight
    if stopping:
        continue  # give up this step: the next turn saves the weights from before it, and ends
    # Divide the gradients by the loss's scale, so that they can be measured and clipped.
    for o in optimizers:
        scaler.unscale_(o)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    # If float16 has overflowed, no optimizer steps, and the scaler lowers its scale.
    overflowed = machine.dtype == 'float16' and not norm.isfinite()
    weights_are_whole = False
    for o in optimizers:
        if not overflowed:
            scaler.step(o)
        o.zero_grad(set_to_none=True)
    scaler.update()
    iter_num += 1  # at once: if the rest fails, the weights are saved with their step
    weights_are_whole = True

    # Log
    if (iter_num - 1) % log_interval == 0:
        loss = machine.sum(loss_sum.item())[0] / world_size  # .item() waits for the device
        grad_norm = norm.item()
        require_finite('the loss', loss, iter_num - 1)
        seconds = train_seconds + time.perf_counter() - step_start
        speed = (iter_num - logged_iter) * tokens_per_step / (seconds - logged_seconds)
        entry = {'iter': iter_num - 1, 'loss': loss, 'lr': optimizers[0].param_groups[0]['lr'],
                 'grad_norm': grad_norm, 'tokens': windows_before(iter_num) * block_size,
                 'tokens_per_second': speed, 'train_seconds': seconds}
        line = f'iter {iter_num - 1}: loss {loss:.4f}, lr {entry["lr"]:.2e}, norm {grad_norm:.2f}'
        line += f', {speed:,.0f} tokens/s'
        if machine.peak_flops:  # model FLOPs utilization: the share of the GPUs' peak speed
            entry['mfu'] = model.flops_per_token() * speed / (machine.peak_flops * world_size)
            line += f', MFU {entry["mfu"]:.1%}'
        log.write(**entry)
        minutes = (max_iters - iter_num) * tokens_per_step / speed / 60
        print0(f'{line}, {minutes:,.1f} min to go')
        logged_iter = iter_num
        logged_seconds = seconds

# ---- The end -------------------------------------------------------------------------------------
if stopping:
    print0(f'stopped at step {iter_num}, saved in {ckpt_path}; the same command with '
           '--init_from=resume continues')
    machine.end_processes()
    # If the signal reached only another process, this one has no number to end with.
    sys.exit(128 + signals[0] if signals else 1)
reason = ''
if iter_num < max_iters:
    reason = f', no gain in {patience} evaluations'
advice = 'nothing to save'
if os.path.exists(ckpt_path):
    command = ['python', 'sample.py']
    if GPT.__module__ != 'model':  # a config file brought the model
        command += [arg for arg in sys.argv[1:] if arg.endswith('.py')]
        command.append('--init_from=resume')  # a file may say what to start from
    advice = f'read it with: {shlex.join(command)} --out_dir={shlex.quote(out_dir)}'
print0(f'done at step {iter_num}{reason}: best val loss {best_val_loss:.4f}, '
       f'{train_seconds:.0f} s of training; {advice}')
machine.end_processes()
