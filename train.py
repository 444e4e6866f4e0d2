"""
Train a model: from scratch, from where a run stopped, or from weights that are there already.
    python train.py config/train_book.py
    torchrun --nproc_per_node=8 train.py config/train_fineweb.py

Writes out_dir/ckpt.pt (the newest), best.pt (the best on validation) and log.jsonl. Each config
file says what its recipe costs and reaches. A run that is killed and resumed ends with the same
weights, bit for bit, as one that is not.

Needs model.py and folio/; hellaswag.py where hellaswag_interval is set.
"""
import datetime
import inspect
import json
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import asdict

import folio  # first: it sets what torch reads when it is loaded
import torch
from torch.nn.parallel import DistributedDataParallel

import folio.checkpoint
from folio import fast
from folio.configurator import (UserError, configure, model_settings, require_at_least,
                                require_choice, user_errors)
from folio.data import Dataset, count_targets, evaluate, prefetch, train_batch
from folio.machine import Machine, default_device, recompute_blocks
from folio.optim import (SCHEDULES, Muon, first_not_finite, learning_rate_at, load_states,
                         make_optimizers, momentum_at)
from model import GPT, GPTConfig

# ---- Settings: nanoGPT's names and, but for device, dtype and compile, its defaults --------------
# The run
out_dir = 'out'  # where checkpoints and the log go
init_from = 'scratch'  # scratch, resume, auto (resume if it can), gpt2 …, a .pt, a folder
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
wandb_log = False  # log to Weights & Biases as well
wandb_project = 'folio'
wandb_run_name = 'gpt2'
note = ''  # what this run is to find out; it stands in the log
# Data
dataset = 'openwebtext'  # a folder under data/
gradient_accumulation_steps = 40  # micro-steps in a step, over all processes
batch_size = 12  # sequences in a micro-step
block_size = 1024  # tokens of context
# Model (the fields of GPTConfig)
arch = 'gpt2'  # gpt2 or modern
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # 0 to pre-train, 0.1 and more to fine-tune
bias = False  # gpt2: biases in Linear and LayerNorm
gelu = 'tanh'  # gpt2: tanh, the approximation that OpenAI used, or none, the exact GELU
window = 0  # attend only to this many previous tokens; 0: to all
flash = True  # fused attention; False: the same written out
# Optimizer
optimizer = 'adamw'  # or muon: Muon for the matrices of the blocks, AdamW for the rest
learning_rate = 6e-4  # the peak
muon_learning_rate = 0.02  # the peak of Muon's; both rise and fall together
momentum_warmup_iters = 0  # muon: steps over which its momentum rises from 0.85 to 0.95
max_iters = 600000  # steps
weight_decay = 1e-1  # of matrices, never of biases and norms
muon_weight_decay = 1e-1  # of the matrices that Muon steps, in place of weight_decay
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # highest norm of the gradient; 0: no limit
decay_lr = True  # False: a constant learning rate
schedule = 'cosine'  # cosine or trapezoid
warmup_iters = 2000
lr_decay_iters = 600000  # the step at which the learning rate has fallen to min_lr
cooldown_iters = 0  # trapezoid: the last steps, over which the learning rate falls
min_lr = 6e-5  # where the learning rate ends
# Machine
backend = 'nccl'  # of torchrun's processes; gloo on CPUs whatever this says
device = default_device()  # cpu, cuda, cuda:1, mps …
dtype = 'auto'  # float32, bfloat16, float16 (with loss scaling); auto: bfloat16 where that is fast
compile = 'auto'  # True, False; auto: on a GPU
activation_checkpointing = False  # less memory: compute activations twice, a third more work
config = configure(globals())

# ---- Machine -------------------------------------------------------------------------------------
require_at_least(1, config, 'gradient_accumulation_steps', 'batch_size', 'block_size',
                 'eval_interval', 'log_interval')
require_at_least(0, config, 'max_iters', 'eval_iters', 'warmup_iters', 'cooldown_iters',
                 'momentum_warmup_iters', 'patience', 'sample_interval', 'hellaswag_interval',
                 'min_lr', 'grad_clip')
require_choice(config, 'compile', ('auto', True, False))
require_choice(config, 'schedule', SCHEDULES)
if schedule == 'trapezoid' and decay_lr and cooldown_iters == 0:
    raise UserError('a trapezoid falls over its last cooldown_iters steps, which are 0: give '
                    f'--cooldown_iters={max(1, lr_decay_iters // 5)} or so, or --decay_lr=False')
if wandb_log:
    try:
        import wandb
    except ImportError:
        raise UserError('wandb_log needs a package: pip install wandb') from None

# Under torchrun this script runs once for each GPU, told apart by rank; rank 0 does the talking.
machine = Machine(device, dtype, trains=True)
device = machine.device  # under torchrun each process has its own
rank = machine.rank
world_size = machine.world_size
print0 = machine.print0
if gradient_accumulation_steps % world_size != 0:
    raise UserError(f'gradient_accumulation_steps ({gradient_accumulation_steps}) counts those of '
                    f'all processes: make it a multiple of their number, {world_size}')
micro_steps = gradient_accumulation_steps // world_size  # of this process
machine.init_processes(backend)
# Compiling takes about a minute, which pays off on a GPU. If it does not work here, can_compile
# prints the reason.
if compile == 'auto':
    compile = machine.type == 'cuda'
compile = compile and machine.can_compile()
print0(f'{machine}, compile {compile}')

# ---- Data ----------------------------------------------------------------------------------------
data = Dataset(dataset)
train_tokens = data.tokens('train')
train_mask = data.mask('train')  # None, or which tokens are targets (instruction tuning)
val_tokens = data.tokens('val')
if len(train_tokens) <= block_size:
    raise UserError(f'block_size ({block_size}) is longer than the data ({len(train_tokens)} '
                    'tokens of training text): use at most '
                    f'--block_size={len(train_tokens) - 1}, or more text')
tokens_per_step = gradient_accumulation_steps * batch_size * block_size
eval_windows = eval_iters * batch_size  # 0: the whole split

# ---- Model ---------------------------------------------------------------------------------------
ckpt_path = os.path.join(out_dir, 'ckpt.pt')
best_path = os.path.join(out_dir, 'best.pt')
log_path = os.path.join(out_dir, 'log.jsonl')
source_of_model = os.path.abspath(inspect.getsourcefile(GPT))
if os.path.abspath(out_dir) == os.path.dirname(source_of_model):
    raise UserError(f'out_dir is the folder of {source_of_model}, and a run writes a model.py into '
                    'its folder: give another --out_dir')
if init_from == 'auto':
    init_from = 'resume' if os.path.exists(ckpt_path) else 'scratch'
model_args = model_settings(config, GPTConfig) | {'vocab_size': data.vocab_size}
with user_errors():
    model_config = GPTConfig(**model_args)

checkpoint = None
if init_from not in ('scratch', 'resume') and not eval_only:
    folio.checkpoint.require_elsewhere(init_from, out_dir)
if init_from != 'scratch':
    checkpoint = folio.checkpoint.load(init_from, out_dir)
if init_from == 'resume':
    folio.checkpoint.require_same_tokenizer(checkpoint, ckpt_path, data)
    folio.checkpoint.require_same_shape(checkpoint, model_args, ckpt_path)
    folio.checkpoint.require_same_data(checkpoint, data, seed, ckpt_path)
elif init_from != 'scratch':
    folio.checkpoint.require_same_tokenizer(checkpoint, init_from, data)

torch.manual_seed(seed)  # so that every process draws the same weights
if init_from == 'scratch':
    model = GPT(model_config)
else:
    # The weights have their shape; these fields, and those that they know nothing of, are free.
    known = checkpoint['model_args'].keys() - {'dropout', 'flash', 'window', 'block_size'}
    free = {name: value for name, value in model_args.items() if name not in known}
    model = folio.checkpoint.build(GPT, checkpoint, **free)
model = fast.accelerate(model)  # the same numbers, sooner; without this line everything still works
if activation_checkpointing:
    recompute_blocks(model)
model.to(device)
optimizers = make_optimizers(
    model, optimizer, learning_rate=learning_rate, muon_learning_rate=muon_learning_rate,
    weight_decay=weight_decay, betas=(beta1, beta2), muon_weight_decay=muon_weight_decay)
# Gradients in float16 underflow unless the loss is scaled up. With other formats this is a no-op.
scaler = torch.amp.GradScaler(machine.type, enabled=machine.dtype == 'float16')

first_iter = 0
first_window = 0  # where in the stream of training windows this run begins or goes on
is_validated = False  # whether the model has been evaluated since the last step
best_val_loss = math.inf
evals_without_gain = 0
train_seconds = 0.0  # without validation, samples and saving
if init_from == 'resume':
    folio.checkpoint.require_training_state(checkpoint, ckpt_path)
    first_iter = checkpoint['iter_num']
    # Count in windows, because the batch size may have changed.
    first_window = checkpoint.get('windows', first_iter * gradient_accumulation_steps * batch_size)
    is_validated = checkpoint.get('is_validated', True)
    best_val_loss = float(checkpoint['best_val_loss'])
    evals_without_gain = checkpoint.get('evals_without_gain', 0)
    train_seconds = checkpoint.get('train_seconds', 0.0)
    print0(f'going on at step {first_iter}, from {ckpt_path}')
    if first_iter > max_iters:
        raise UserError(f'{ckpt_path} is at step {first_iter} already; to go on, give a higher '
                        '--max_iters')
    if first_iter == max_iters and not eval_only:
        print0('all its steps are done; to go on, give a higher --max_iters')
    if checkpoint['optimizer']:
        load_states(optimizers, checkpoint['optimizer'])
    else:
        print0(f'{ckpt_path} was saved without its optimizer, which starts anew')
    if checkpoint.get('scaler'):
        scaler.load_state_dict(checkpoint['scaler'])
del checkpoint  # to free its memory
if machine.sum(first_iter)[0] != first_iter * world_size:
    raise UserError(f'the processes find different checkpoints in {out_dir}: it must be on a disk '
                    'that all of them see')

if compile:
    model.compile()  # in place: parameters keep their names, and model.forward stays eager
ddp_model = model
if world_size > 1:
    ddp_model = DistributedDataParallel(model)
    # After its first backward pass DDP groups the gradients anew, which changes how their sums are
    # rounded. So make a pass that does not count: then a resumed run has the same bits as an
    # undisturbed one from its first step on.
    idx_BT = torch.zeros(batch_size, block_size, dtype=torch.long, device=device)
    with machine.autocast:
        _, loss = ddp_model(idx_BT, idx_BT)
    loss.backward()
    model.zero_grad(set_to_none=True)
n_parameters = sum(p.numel() for p in model.parameters())
print0(f'{model.config.arch}, {n_parameters / 1e6:.2f} M parameters; {data.folder}, '
       f'{len(train_tokens):,} tokens')

if eval_only:
    for split in data.splits():
        n_windows = eval_windows
        if n_windows == 0 and split == 'train':
            # All of it would take hours. Take as much as val has.
            n_windows = math.ceil(len(val_tokens) / block_size)
        metrics = evaluate(model, data, split, block_size, batch_size=batch_size,
                           n_windows=n_windows, machine=machine)
        print0(f'{split}: ' + ', '.join(f'{key} {value:.4f}' for key, value in metrics.items()))
    sys.exit()

n_tokens = (max_iters - first_iter) * tokens_per_step
print0(f'{max_iters - first_iter:,} steps of {tokens_per_step:,} tokens: {n_tokens:,} tokens, '
       f'{n_tokens / len(train_tokens):.2f} epochs')

# Load now what later steps need, so that the run stops here if something is missing.
if hellaswag_interval > 0 or sample_interval > 0:
    import folio.tokenizer
    from folio import engine
    tokenizer = folio.tokenizer.load(data.spec)
if hellaswag_interval > 0:
    import hellaswag
    hellaswag_items = hellaswag.load(hellaswag_source, machine)
    hellaswag_rows = hellaswag.render(hellaswag_items, tokenizer, block_size)


# ---- Checkpoints, log, signals -------------------------------------------------------------------
def windows_before(iter_num):
    """Return how many windows of the training stream come before a step."""
    return first_window + (iter_num - first_iter) * gradient_accumulation_steps * batch_size


fingerprint = data.fingerprint('train')  # taken now: the files may be replaced while we train
record = folio.checkpoint.record_of(GPT)


def save(iter_num, path, *others):
    """Write a checkpoint of the run as it is before step iter_num, unless it has diverged.

    others: further names for the same file, which is written only once.
    """
    stop_if_diverged(iter_num, all_finite and first_not_finite(model) is None)
    if rank != 0:
        return
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
        'data': fingerprint,
        'is_validated': is_validated,
        'best_val_loss': best_val_loss,
        'evals_without_gain': evals_without_gain,
        'train_seconds': train_seconds,
    })
    for other in others:
        folio.checkpoint.save_again(path, other)


def stop_if_diverged(iter_num, is_finite):
    """Raise UserError if a number was not finite in any process; what is saved stays untouched."""
    if not machine.any(not is_finite):
        return
    remedy = 'nothing was saved yet: start anew with a lower --learning_rate'
    if os.path.exists(ckpt_path):
        remedy = f'{ckpt_path} is intact: --init_from=resume with a lower --learning_rate'
    rate = optimizers[0].param_groups[0]['lr']
    raise UserError(f'the run diverged at step {iter_num}, learning rate {rate:.2e}, gradient norm '
                    f'{norm.item()}; {first_not_finite(model) or "the loss"} is not finite; '
                    f'{remedy}')


def log(entry):
    """Add a line to log.jsonl, and to Weights & Biases."""
    if rank != 0:
        return
    with open(log_path, 'a', encoding='utf-8') as f:
        f.write(json.dumps(entry) + '\n')
    if wandb_log and 'iter' in entry:
        wandb.log(entry, step=entry['iter'])


def shown(metrics):
    """Return the numbers among the metrics of an evaluation as text."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    return ', '.join(f'val {name} {value:.4f}' for name, value in numbers.items())


def log_evaluation(iter_num, metrics):
    """Print and log the loss on the validation split, and the metrics derived from it."""
    print0(f'step {iter_num}: {shown(metrics)}')
    others = {key: value for key, value in metrics.items() if key != 'loss'}
    log({'iter': iter_num, 'tokens': windows_before(iter_num) * block_size,
         'train_seconds': train_seconds, 'val_loss': metrics['loss'], **others})


def score_hellaswag(iter_num):
    """Score the model on HellaSwag and log it; return False if a signal came before the end."""
    sums, counts = hellaswag.score(model, hellaswag_rows, machine, should_stop=should_stop)
    if sums is None:
        return False
    metrics = hellaswag.accuracies(hellaswag_items, sums, counts)
    accuracy = metrics.pop('acc_mean')
    print0(f'step {iter_num}: HellaSwag {accuracy:.4f} ± {metrics["acc_mean_stderr"]:.4f}')
    log({'iter': iter_num, 'hellaswag': accuracy, **metrics})
    return True


def write_sample(iter_num):
    """Print and log 200 tokens of text from the beginning of a document."""
    with machine.autocast:
        steps = engine.generate(model, torch.tensor([[tokenizer.start]]), 200, strategy='nucleus',
                                seed=seed)
        # Decode at the end, because looking at a token waits for the device.
        text = tokenizer.decode(torch.cat(list(steps)).tolist())
    print0(f'---- sample at step {iter_num}\n{text}\n----')
    log({'iter': iter_num, 'sample': text})


def log_step(iter_num, loss, norm, step_seconds, to_go):
    """Print and log a training step."""
    tokens_per_second = tokens_per_step / step_seconds
    lr = optimizers[0].param_groups[0]['lr']
    entry = {'iter': iter_num, 'loss': loss, 'lr': lr, 'grad_norm': norm,
             'tokens': windows_before(iter_num + 1) * block_size,
             'tokens_per_second': tokens_per_second, 'train_seconds': logged_seconds}
    mfu_text = ''
    if machine.peak_flops:  # model FLOPs utilization: the share of the GPUs' peak speed
        flops = model.flops_per_token() * tokens_per_second
        entry['mfu'] = flops / (machine.peak_flops * world_size)
        mfu_text = f', MFU {entry["mfu"]:.1%}'
    log(entry)
    print0(f'iter {iter_num}: loss {loss:.4f}, lr {lr:.2e}, norm {norm:.2f}, '
           f'{tokens_per_second:,.0f} tokens/s{mfu_text}, {to_go} to go')


def time_to_go(iter_num, step_seconds):
    """Return how long the run takes after step iter_num, with the evaluations that are to come."""
    n_steps = max_iters - iter_num - 1
    n_evaluations = math.ceil((n_steps + 1) / eval_interval)
    seconds = n_steps * step_seconds + n_evaluations * eval_seconds
    return datetime.timedelta(seconds=int(seconds))


signals = []  # (number, time) of each signal that has come


def on_signal(number, frame):
    """Ask the loop to stop; end the process at once if the first signal is over 2 seconds ago."""
    # Within 2 seconds it may be the same signal again: torchrun and Slurm pass them on twice.
    if signals and time.monotonic() > signals[0][1] + 2:
        os._exit(128 + number)
    signals.append((number, time.monotonic()))


def should_stop():
    """Return whether a signal has come to any process, as not all of them may get it."""
    return machine.any(len(signals) > 0)


# ---- The folder of the run -----------------------------------------------------------------------
in_log = set()  # what a resumed run has logged at first_iter already: val_loss, hellaswag, sample
if rank == 0:
    from folio.lock import only_one
    try:
        os.makedirs(out_dir, exist_ok=True)
        lock = only_one(os.path.join(out_dir, 'lock'))  # held until this process ends
        if init_from == 'resume':
            folio.checkpoint.truncate_log(log_path, first_iter, is_validated)
            for entry in folio.checkpoint.read_log(log_path):
                if entry.get('iter') == first_iter:
                    in_log |= entry.keys()
        else:
            previous = folio.checkpoint.set_aside(out_dir)
            if previous is not None:
                print0(f'the run that was in {out_dir} is now in {previous}')
        with open(os.path.join(out_dir, 'model.py'), 'w', encoding='utf-8') as f:
            f.write(folio.checkpoint.code_of(GPT))
    except OSError as e:
        raise UserError(f'{out_dir} cannot be written ({e.strerror}); give another '
                        '--out_dir') from None
    if wandb_log:
        wandb.init(project=wandb_project, name=wandb_run_name, config=config)
in_log = {key for key in ('val_loss', 'hellaswag', 'sample') if machine.any(key in in_log)}
log({'config': config, 'record': record, 'parameters': n_parameters, 'first_iter': first_iter,
     'machine': {
         'device': machine.name, 'dtype': machine.dtype, 'compile': compile,
         'processes': world_size, 'cpus': os.cpu_count(), 'torch': torch.__version__,
         'python': sys.version.split()[0], 'date': time.strftime('%Y-%m-%d %H:%M:%S')}})
signal.signal(signal.SIGINT, on_signal)
signal.signal(signal.SIGTERM, on_signal)
# Windows has no SIGHUP. nohup sets it to be ignored, so that a run outlives its terminal: leave it.
if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    signal.signal(signal.SIGHUP, on_signal)


# ---- Training ------------------------------------------------------------------------------------
def my_batches():
    """Yield this process's micro-batches: (idx_BT, targets_BT, targets in the whole step)."""
    for step in range(first_iter, max_iters):
        first = windows_before(step)
        n_targets = count_targets(len(train_tokens), train_mask, block_size, seed=seed, first=first,
                                  count=gradient_accumulation_steps * batch_size)
        for micro_step in range(micro_steps):
            n_before = micro_step * world_size + rank  # micro-batches of this step
            idx_BT, targets_BT = train_batch(
                train_tokens, train_mask, block_size, batch_size=batch_size, seed=seed,
                first=first + n_before * batch_size)
            yield idx_BT, targets_BT, n_targets


intervals = {'val_loss': eval_interval, 'hellaswag': hellaswag_interval, 'sample': sample_interval}


def is_due(what):
    """Return whether 'val_loss', 'hellaswag' or 'sample' is due in this turn of the loop.

    Each is due at multiples of its interval and in the last turn, unless a resumed run has it
    already.
    """
    if intervals[what] == 0 or (iter_num == first_iter and what in in_log):
        return False
    return is_last or iter_num % intervals[what] == 0


batches = prefetch(my_batches(), pin_memory=machine.type == 'cuda')
norm = torch.zeros(())  # gradient norm of the last step, before clipping
all_finite = torch.ones((), dtype=torch.bool, device=device)  # all numbers so far
eval_seconds = 0.0  # the last evaluation's, with samples and saving
logged_iter = first_iter  # steps finished at the last log line
logged_seconds = train_seconds
machine.synchronize()  # what is queued so far is not training time
step_start = time.perf_counter()
# One turn more than there are steps: the last one only validates and saves.
for iter_num in range(first_iter, max_iters + 1):
    is_last = iter_num == max_iters
    stopping = should_stop()
    # Stop the clock until the next step. A GPU must first finish the steps that are queued, but
    # only if something is due: otherwise waiting would leave it idle.
    if stopping or any(is_due(what) for what in intervals):
        machine.synchronize()
    pause_start = time.perf_counter()
    train_seconds += pause_start - step_start

    # Validate, unless the checkpoint that we resumed from was saved after this evaluation
    metrics = None
    if not stopping and is_due('val_loss'):
        metrics = evaluate(model, data, 'val', block_size, batch_size=batch_size,
                           n_windows=eval_windows, machine=machine, should_stop=should_stop)
        stopping = metrics is None  # a signal came before the end
    is_validated = metrics is not None or (iter_num == first_iter and 'val_loss' in in_log)
    improved = False
    if metrics is not None:
        all_finite &= math.isfinite(metrics['loss'])
        stop_if_diverged(iter_num, all_finite)
        improved = metrics['loss'] < best_val_loss
        best_val_loss = min(best_val_loss, metrics['loss'])
        evals_without_gain = 0 if improved else evals_without_gain + 1
        log_evaluation(iter_num, metrics)
    if patience > 0 and evals_without_gain >= patience:
        is_last = True

    # Save, best.pt first, so that a run which is killed in between does not miss its best
    if iter_num > 0 and improved:
        save(iter_num, best_path, ckpt_path)
    elif iter_num > 0 and metrics is not None and always_save_checkpoint:
        save(iter_num, ckpt_path)

    # Score and sample, and stop at the end or if a signal has come
    if not stopping and is_due('hellaswag'):
        stopping = not score_hellaswag(iter_num)
    if not stopping and iter_num > 0 and is_due('sample'):
        write_sample(iter_num)
    if stopping:
        save(iter_num, ckpt_path)
    if is_last or stopping:
        break

    # Step
    step_start = time.perf_counter()
    if metrics is not None:
        eval_seconds = step_start - pause_start
    lr = learning_rate_at(iter_num, lr_decay_iters, peak=learning_rate, floor=min_lr,
                          warmup=warmup_iters, schedule=schedule, cooldown=cooldown_iters)
    lr_scale = lr / learning_rate if decay_lr else 1.0
    for o in optimizers:
        for group in o.param_groups:
            group['lr'] = group['peak_lr'] * lr_scale
            if isinstance(o, Muon):
                group['momentum'] = momentum_at(iter_num, momentum_warmup_iters,
                                                peak=o.defaults['momentum'])
    # Seed dropout by the step and the process, so that a resumed run draws the same.
    torch.manual_seed(((seed * 1_000_003 + iter_num) * world_size + rank) % 2**63)
    loss_sum = torch.zeros((), device=device)
    for micro_step in range(micro_steps):
        idx_BT, targets_BT, n_targets = next(batches)
        n_targets_here = (targets_BT != -1).sum().item()
        idx_BT = idx_BT.to(device, non_blocking=True)
        targets_BT = targets_BT.to(device, non_blocking=True)
        # Average the gradients of all processes in the last micro-step only.
        sync = micro_step == micro_steps - 1
        if world_size > 1:
            ddp_model.require_backward_grad_sync = sync
        with machine.autocast:
            _, loss = ddp_model(idx_BT, targets_BT)
        # Weight the loss so that every target of the step counts the same, whichever micro-batch
        # it is in. The processes' gradients are averaged, not summed: hence world_size.
        loss_weight = n_targets_here * world_size / max(1, n_targets)
        scaler.scale(loss * loss_weight).backward()
        loss_sum += loss.detach() * n_targets_here
    # Divide the gradients by the loss's scale, so that they can be measured and clipped.
    for o in optimizers:
        scaler.unscale_(o)
    trained = [p for p in model.parameters() if p.requires_grad]
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if iter_num == first_iter and any(p.grad is None for p in trained):
        unused = [name for name, p in model.named_parameters()
                  if p.requires_grad and p.grad is None]
        print0(f'no gradient reaches {", ".join(unused)}: left as it is')
    # Looking at the norm waits for the device, so on a GPU that is left to steps that log or save.
    # Under float16 only the loss shows divergence: gradients may overflow until the scale is right.
    is_logged = iter_num % log_interval == 0
    all_finite &= loss_sum.isfinite() if machine.dtype == 'float16' else norm.isfinite()
    if is_logged or machine.type == 'cpu':
        stop_if_diverged(iter_num, all_finite)
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip or math.inf, norm)
    # Skip the step if float16 has overflowed; the scaler then scales less.
    skip = machine.dtype == 'float16' and not norm.isfinite()
    for o in optimizers:
        if not skip:
            scaler.step(o)
        o.zero_grad(set_to_none=True)
    scaler.update()

    # Log
    is_tenth = iter_num == first_iter + 9  # soon enough to say how long the run takes
    if is_logged or is_tenth:
        loss = machine.sum(loss_sum.item())[0] / max(1, n_targets)  # .item() waits for the device
        seconds = train_seconds + time.perf_counter() - step_start
        step_seconds = (seconds - logged_seconds) / (iter_num + 1 - logged_iter)
        to_go = time_to_go(iter_num, step_seconds)
    if is_logged:
        logged_iter = iter_num + 1
        logged_seconds = seconds
        log_step(iter_num, loss, norm.item(), step_seconds, to_go)
    elif is_tenth:
        print0(f'iter {iter_num}: {to_go} to go')

# ---- The end -------------------------------------------------------------------------------------
if stopping:
    arguments = [arg for arg in sys.argv if not arg.startswith('--init_from=')]
    command = shlex.join(arguments + ['--init_from=resume'])
    launcher = 'python'
    if int(os.environ.get('GROUP_WORLD_SIZE', '1')) > 1:
        launcher = 'torchrun with its options, on each node:'
    elif world_size > 1:
        launcher = f'torchrun --nproc_per_node={os.environ.get("LOCAL_WORLD_SIZE", world_size)}'
    print0(f'stopped at step {iter_num}, saved in {ckpt_path}; go on with: {launcher} {command}')
    # If the signal came to another process, this one has no number to end with.
    sys.exit(128 + signals[0][0] if signals else 1)
reason = ''
if iter_num < max_iters:
    reason = f', no gain in {patience} evaluations'
advice = 'nothing to save'
if os.path.exists(ckpt_path):
    advice = f'read it with: python sample.py --out_dir={out_dir}'
print0(f'done at step {iter_num}{reason}: best val loss {best_val_loss:.4f}, '
       f'{train_seconds:.0f} s of training; {advice}')
