"""
Train a model: from scratch, from where a run stopped, or from somebody's weights.
    python train.py config/train_book.py
    torchrun --nproc_per_node=8 train.py config/train_fineweb.py

Writes out_dir/ckpt.pt (the newest), best.pt (the best on validation) and log.jsonl. What each
recipe costs and reaches stands in its config file. A run that is killed and resumed ends with the
same weights, bit for bit, as one that is not.

Needs model.py and folio/; hellaswag.py where hellaswag_interval is set.
"""
import datetime
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
from folio.machine import Machine, default_device
from folio.optim import (SCHEDULES, first_not_finite, is_spike, learning_rate_at, load_states,
                         make_optimizers)
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
hellaswag_source = ''  # a file in its format; empty: its validation split, downloaded once
patience = 0  # stop after this many evaluations without improvement; 0: never
seed = 1337  # of initialisation, batches and dropout
wandb_log = False  # log to Weights & Biases as well
wandb_project = 'folio'
wandb_run_name = 'gpt2'
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
gelu = 'tanh'  # gpt2: tanh, as OpenAI's, or none, the exact one
window = 0  # attend only to this many previous tokens; 0: to all
flash = True  # fused attention; False: written out
# Optimizer
optimizer = 'adamw'  # or muon: Muon for the matrices of the blocks, AdamW for the rest
learning_rate = 6e-4  # the highest it gets
muon_learning_rate = 0.02  # the highest that Muon's gets; both fall together
max_iters = 600000  # steps
weight_decay = 1e-1  # of matrices
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # highest norm of the gradient; 0: no limit
skip_spikes = False  # skip a step whose gradient norm is far outside the last hundred
decay_lr = True  # False: a constant learning rate
schedule = 'cosine'  # cosine or trapezoid
warmup_iters = 2000
lr_decay_iters = 600000  # the step at which the learning rate has fallen to min_lr
cooldown_iters = 0  # trapezoid: steps that the fall takes, at the end
min_lr = 6e-5
# Machine
backend = 'nccl'  # of torchrun's processes; gloo on CPUs whatever this says
fsdp = False  # divide parameters and optimizer among the processes, for models that do not fit
device = default_device()  # cpu, cuda, cuda:1, mps …
dtype = 'auto'  # float32, bfloat16, float16 (with loss scaling); auto: bfloat16 where a GPU has it
compile = 'auto'  # True, False; auto: on a GPU
deterministic = False  # on a GPU: kernels that give the same bits each time, and are slower
config = configure(globals())

# ---- Machine -------------------------------------------------------------------------------------
require_at_least(1, config, 'gradient_accumulation_steps', 'batch_size', 'block_size',
                 'eval_interval', 'log_interval')
require_at_least(0, config, 'max_iters', 'eval_iters', 'warmup_iters', 'cooldown_iters', 'patience',
                 'sample_interval', 'hellaswag_interval', 'min_lr', 'grad_clip')
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
machine = Machine(device, dtype)
device = machine.device  # under torchrun each process has its own
rank = machine.rank
world_size = machine.world_size
print0 = machine.print0
if gradient_accumulation_steps % world_size != 0:
    raise UserError(f'gradient_accumulation_steps ({gradient_accumulation_steps}) counts those of '
                    f'all processes: make it a multiple of their number, {world_size}')
micro_steps = gradient_accumulation_steps // world_size  # of this process
fsdp = fsdp and world_size > 1
if fsdp and machine.dtype == 'float16':
    raise UserError('float16 scales the loss by what each process sees; with fsdp give '
                    '--dtype=bfloat16 or float32')
machine.init_processes(backend)
if deterministic:
    machine.make_deterministic()
# Compiling takes a minute or so, and pays on a GPU. Where it does not work, the reason is printed.
if compile == 'auto':
    compile = machine.type == 'cuda'
compile = compile and machine.can_compile()
print0(f'{machine}, compile {compile}{", sharded" if fsdp else ""}')

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

# ---- Model ---------------------------------------------------------------------------------------
ckpt_path = os.path.join(out_dir, 'ckpt.pt')
best_path = os.path.join(out_dir, 'best.pt')
log_path = os.path.join(out_dir, 'log.jsonl')
if init_from == 'auto':
    init_from = 'resume' if os.path.exists(ckpt_path) else 'scratch'
# torchrun has restarted this run after a worker died: go on, and not once more from the beginning.
# But if it died early, the folder still holds an older run, which is not what was asked for.
is_restart = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')) > 0
if machine.any(is_restart and folio.checkpoint.is_of_launch(out_dir, machine.launch())):
    init_from = 'resume'
model_args = model_settings(config, GPTConfig) | {'vocab_size': data.vocab_size}
with user_errors():
    model_config = GPTConfig(**model_args)

checkpoint = None
if init_from not in ('scratch', 'resume') and not eval_only:
    folio.checkpoint.require_elsewhere(init_from, out_dir)
if init_from != 'scratch':
    checkpoint = folio.checkpoint.load(init_from, out_dir)
    folio.checkpoint.require_same_tokenizer(checkpoint, init_from, data)
if init_from == 'resume':
    folio.checkpoint.require_same_shape(checkpoint, model_args, ckpt_path)
    folio.checkpoint.require_same_data(checkpoint, data, seed, ckpt_path)
elif init_from == 'scratch' and os.path.exists(ckpt_path):  # that run will be moved aside
    folio.checkpoint.require_same_shape(folio.checkpoint.load(ckpt_path), model_args, ckpt_path)

# Every process draws the same weights.
torch.manual_seed(seed)
if init_from == 'scratch':
    model = GPT(model_config)
else:
    with user_errors():
        model = GPT.from_pretrained(checkpoint, dropout=dropout, flash=flash, window=window,
                                    block_size=block_size)
model = fast.accelerate(model)  # the same numbers, sooner; without this line everything still works
if fsdp:
    machine.shard(model)  # and move each share to its device
else:
    model.to(device)
optimizers = make_optimizers(
    model, optimizer, learning_rate=learning_rate, muon_learning_rate=muon_learning_rate,
    weight_decay=weight_decay, betas=(beta1, beta2))
# Gradients in float16 underflow unless the loss is scaled up. In other formats this does nothing.
scaler = torch.amp.GradScaler(machine.type, enabled=machine.dtype == 'float16')

first_iter = 0
first_window = 0  # of the training stream, where this process begins
is_validated = False  # whether the model as it is before the next step was evaluated
best_val_loss = math.inf
evals_without_gain = 0
train_seconds = 0.0  # without validation, samples and saving
norms = []  # of the gradients of the last hundred steps, if skip_spikes
if init_from == 'resume':
    folio.checkpoint.require_training_state(checkpoint, ckpt_path)
    first_iter = checkpoint['iter_num']
    # Where the batches had another size, they were counted in windows.
    first_window = checkpoint.get('windows', first_iter * gradient_accumulation_steps * batch_size)
    is_validated = checkpoint.get('is_validated', True)
    norms = checkpoint.get('norms', [])
    best_val_loss = float(checkpoint['best_val_loss'])
    evals_without_gain = checkpoint.get('evals_without_gain', 0)
    train_seconds = checkpoint.get('train_seconds', 0.0)
    if first_iter > max_iters:
        raise UserError(f'{ckpt_path} is at step {first_iter} already; to go on, give a higher '
                        '--max_iters')
    if checkpoint['optimizer']:
        load_states(optimizers, checkpoint['optimizer'])
    else:
        print0(f'{ckpt_path} was saved without its optimizer, which starts anew')
    if checkpoint.get('scaler'):
        scaler.load_state_dict(checkpoint['scaler'])
del checkpoint  # and its memory
if machine.sum(first_iter)[0] != first_iter * world_size:
    raise UserError(f'the processes find different checkpoints in {out_dir}: it must be on a disk '
                    'that all of them see')

if compile:
    model.compile()  # in place: names in the checkpoint stay, and model.forward stays eager
ddp_model = model
if world_size > 1 and not fsdp:
    ddp_model = DistributedDataParallel(model)
    # After its first backward pass DDP groups the gradients anew, and their sums round otherwise.
    # Let that be now: then the first step of a resumed run has the same bits as in an undisturbed.
    idx_BT = torch.zeros(batch_size, block_size, dtype=torch.long, device=device)
    with machine.autocast:
        _, loss = ddp_model(idx_BT, idx_BT)
    loss.backward()
    model.zero_grad(set_to_none=True)
n_parameters = sum(p.numel() for p in model.parameters())
n_tokens = (max_iters - first_iter) * tokens_per_step
memory = machine.expected_memory(model, optimizers, batch_size)
print0(f'{model.config.arch}, {n_parameters / 1e6:.2f} M parameters; {data.folder}, '
       f'{len(train_tokens):,} tokens')
print0(f'{max_iters - first_iter:,} steps of {tokens_per_step:,} tokens: {n_tokens:,} tokens, '
       f'{n_tokens / len(train_tokens):.2f} epochs; about {memory / 2**20:,.0f} MiB of memory '
       f'{"for each process" if world_size > 1 else "beside what torch takes"}')

if eval_only:
    for split in data.splits():
        n_windows = eval_iters * batch_size  # 0: the whole split
        if n_windows == 0 and split == 'train':
            # All of it would take hours: as much as val has.
            n_windows = math.ceil(len(val_tokens) / block_size)
        metrics = evaluate(model, data, split, block_size, batch_size=batch_size,
                           n_windows=n_windows, machine=machine)
        print0(f'{split}: ' + ', '.join(f'{key} {value:.4f}' for key, value in metrics.items()))
    sys.exit()

# What later steps need is loaded now, so that what is missing is missed before the first one.
if hellaswag_interval > 0:
    import hellaswag
    hellaswag_items = hellaswag.load(hellaswag_source, machine)
if hellaswag_interval > 0 or sample_interval > 0:
    import folio.tokenizer
    from folio import engine
    tokenizer = folio.tokenizer.load(data.spec)


# ---- Checkpoints, log, signals -------------------------------------------------------------------
fingerprint = data.fingerprint('train')  # now: the files may be made anew while we train


def save(path, iter_num):
    """Write a checkpoint of the run as it is before step iter_num, unless it has diverged."""
    stop_if_diverged(iter_num, all_finite and first_not_finite(model) is None)
    # Sharded tensors are gathered first, which takes all processes.
    states = [model.state_dict()] + [o.state_dict() for o in optimizers]
    states = machine.gather_full(states)
    if rank != 0:
        return
    folio.checkpoint.save(path, {
        'model': states[0],
        'model_args': asdict(model.config),
        'tokenizer': data.spec,
        'template': data.meta.get('template'),  # of prompts, for sample.py --chat
        'optimizer': states[1:],
        'scaler': scaler.state_dict(),
        'config': config,
        'iter_num': iter_num,
        'windows': windows_before(iter_num),
        'data': fingerprint,
        'is_validated': is_validated,
        'norms': norms,
        'best_val_loss': best_val_loss,
        'evals_without_gain': evals_without_gain,
        'train_seconds': train_seconds,
    })


def log(entry):
    """Add a line to log.jsonl, and to Weights & Biases."""
    if rank != 0:
        return
    with open(log_path, 'a', encoding='utf-8') as f:
        f.write(json.dumps(entry) + '\n')
    if wandb_log and 'iter' in entry:
        wandb.log(entry, step=entry['iter'])


def windows_before(iter_num):
    """Return how many windows of the training stream come before a step."""
    return first_window + (iter_num - first_iter) * gradient_accumulation_steps * batch_size


def sample_text():
    """Return 200 tokens of text from the beginning of a document."""
    steps = engine.generate(model, [[tokenizer.start]], 200, strategy='nucleus', seed=seed)
    with machine.autocast, machine.unsharded(model):
        return tokenizer.decode([next_B.item() for next_B in steps])


signals = []  # (number, time) of those that came


def on_signal(number, frame):
    """Ask the loop to stop. A signal that comes 2 seconds after the first ends it at once."""
    # Sooner is no second wish: torchrun and Slurm pass the first one on twice.
    if signals and time.monotonic() > signals[0][1] + 2:
        os._exit(128 + number)
    signals.append((number, time.monotonic()))


def should_stop():
    """Return whether a signal came to any process: some may not have got it."""
    return machine.any(len(signals) > 0)


def stop_if_diverged(iter_num, is_finite):
    """Raise UserError if in any process a number was not finite: what is saved stays as it is."""
    if not machine.any(not is_finite):
        return
    remedy = 'nothing was saved yet: start anew with a lower --learning_rate'
    if os.path.exists(ckpt_path):
        remedy = f'{ckpt_path} is intact: --init_from=resume with a lower --learning_rate'
    rate = optimizers[0].param_groups[0]['lr']
    raise UserError(f'the run diverged at step {iter_num}, learning rate {rate:.2e}, gradient norm '
                    f'{norm.item()}; {first_not_finite(model) or "the loss"} is not finite; '
                    f'{remedy}')


if rank == 0:
    from folio.lock import only_one
    try:
        os.makedirs(out_dir, exist_ok=True)
        lock = only_one(os.path.join(out_dir, 'lock'))  # held until this process ends
        if init_from == 'resume':
            folio.checkpoint.truncate_log(log_path, first_iter, is_validated)
        else:
            previous = folio.checkpoint.set_aside(out_dir)
            if previous is not None:
                print0(f'the run that was in {out_dir} is now in {previous}')
    except OSError as e:
        raise UserError(f'{out_dir} cannot be written ({e.strerror}); give another '
                        '--out_dir') from None
    if wandb_log:
        wandb.init(project=wandb_project, name=wandb_run_name, config=config)
log({'config': config, 'parameters': n_parameters, 'first_iter': first_iter, 'machine': {
    'device': machine.name, 'dtype': machine.dtype, 'compile': compile, 'processes': world_size,
    'launch': machine.launch(), 'cpus': os.cpu_count(), 'torch': torch.__version__,
    'python': sys.version.split()[0], 'date': time.strftime('%Y-%m-%d %H:%M:%S')}})
for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, 'SIGHUP', signal.SIGTERM)):
    if signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored, to outlive the terminal
        signal.signal(number, on_signal)


# ---- Training ------------------------------------------------------------------------------------
def my_batches():
    """Yield this process's micro-batches. Each is a pure function of its first window."""
    for step in range(first_iter, max_iters):
        for micro_step in range(micro_steps):
            n_before = micro_step * world_size + rank  # micro-batches of this step
            yield train_batch(train_tokens, train_mask, block_size, batch_size=batch_size,
                              seed=seed, first=windows_before(step) + n_before * batch_size)


def time_to_go(iter_num, step_seconds):
    """Return how long the run takes after step iter_num, with the evaluations that are to come."""
    n_steps = max_iters - iter_num - 1
    n_evaluations = math.ceil((n_steps + 1) / eval_interval)
    seconds = n_steps * step_seconds + n_evaluations * eval_seconds
    return datetime.timedelta(seconds=int(seconds))


batches = prefetch(my_batches(), pin_memory=machine.type == 'cuda')
clock = time.perf_counter()
logged_iter = first_iter  # steps finished at the last log line
logged_seconds = train_seconds
eval_seconds = 0.0  # that the last evaluation took, with samples and saving
norm = torch.zeros(())  # of the gradient
all_finite = torch.ones((), dtype=torch.bool, device=device)
# What the log has for first_iter already. The first process says so: its log is the one.
logged_before = set()
if init_from == 'resume' and rank == 0:
    for entry in folio.checkpoint.read_log(log_path, damaged=[]):
        if entry.get('iter') == first_iter:
            logged_before |= entry.keys()
was_scored = machine.any('hellaswag' in logged_before)
was_sampled = machine.any('sample' in logged_before)
# One turn more than there are steps: the last one only validates and saves.
for iter_num in range(first_iter, max_iters + 1):
    pause = time.perf_counter()
    train_seconds += pause - clock  # the clock stands still until the next step
    is_last = iter_num == max_iters
    is_first = iter_num == first_iter

    # Validate, unless the checkpoint that we go on from was saved after that
    stopping = should_stop()
    is_validated = is_first and is_validated
    validate = (is_last or iter_num % eval_interval == 0) and not is_validated
    metrics = None
    if validate and not stopping:
        metrics = evaluate(model, data, 'val', block_size, batch_size=batch_size,
                           n_windows=eval_iters * batch_size, machine=machine,
                           should_stop=should_stop)
        stopping = metrics is None  # it was given up
    improved = False
    if metrics is not None:
        val_loss = metrics.pop('loss')
        all_finite &= math.isfinite(val_loss)
        stop_if_diverged(iter_num, all_finite)
        is_validated = True
        improved = val_loss < best_val_loss
        if improved:
            best_val_loss = val_loss
            evals_without_gain = 0
        else:
            evals_without_gain += 1
        values = {'loss': val_loss} | metrics
        print0(f'step {iter_num}: ' + ', '.join(f'val {k} {v:.4f}' for k, v in values.items()))
        log({'iter': iter_num, 'tokens': windows_before(iter_num) * block_size,
             'train_seconds': train_seconds, 'val_loss': val_loss, **metrics})
    if patience > 0 and evals_without_gain >= patience:
        is_last = True

    # Save, best.pt first, so that a resumed run never misses its best
    if improved and iter_num > 0:
        save(best_path, iter_num)
    due = metrics is not None and iter_num > 0 and (improved or always_save_checkpoint)
    if due or stopping:
        save(ckpt_path, iter_num)

    # Look at the model: HellaSwag, a sample
    is_scored = hellaswag_interval > 0 and (is_last or iter_num % hellaswag_interval == 0)
    is_sampled = sample_interval > 0 and iter_num > 0 and iter_num % sample_interval == 0
    if is_scored and not stopping and not (is_first and was_scored):
        with machine.unsharded(model):
            metrics = hellaswag.evaluate(model, hellaswag_items, tokenizer, machine,
                                         batch_tokens=hellaswag.batch_tokens,
                                         should_stop=should_stop)
        stopping = metrics is None
        if stopping:
            save(ckpt_path, iter_num)
        else:
            accuracy = metrics.pop('acc_mean')
            print0(f'step {iter_num}: HellaSwag {accuracy:.4f} ± {metrics["acc_mean_stderr"]:.4f}')
            log({'iter': iter_num, 'hellaswag': accuracy, **metrics})
    if is_sampled and not stopping and not (is_first and was_sampled):
        text = sample_text()
        print0(f'---- sample at step {iter_num}\n{text}\n----')
        log({'iter': iter_num, 'sample': text})
    if is_last or stopping:
        break

    # Step
    clock = time.perf_counter()
    if validate:
        eval_seconds = clock - pause
    lr = learning_rate_at(iter_num, lr_decay_iters, peak=learning_rate, floor=min_lr,
                          warmup=warmup_iters, schedule=schedule, cooldown=cooldown_iters)
    share = lr / learning_rate if decay_lr else 1.0
    for o in optimizers:
        for group in o.param_groups:
            group['lr'] = group['peak_lr'] * share
    # Dropout too is a function of the step, and of the process.
    torch.manual_seed(((seed * 1_000_003 + iter_num) * world_size + rank) % 2**63)
    # Where some tokens are masked, each target counts the same, in whichever micro-batch it is.
    n_targets = count_targets(len(train_tokens), train_mask, block_size, seed=seed,
                              first=windows_before(iter_num),
                              count=gradient_accumulation_steps * batch_size)
    loss_sum = torch.zeros((), device=device)
    for micro_step in range(micro_steps):
        idx_BT, targets_BT = next(batches)
        n_targets_here = (targets_BT != -1).sum().item()
        idx_BT = idx_BT.to(device, non_blocking=True)
        targets_BT = targets_BT.to(device, non_blocking=True)
        # Gradients of all processes meet at the last micro-step only.
        sync = micro_step == micro_steps - 1
        if fsdp:
            model.set_requires_gradient_sync(sync)
        elif world_size > 1:
            ddp_model.require_backward_grad_sync = sync
        with machine.autocast:
            _, loss = ddp_model(idx_BT, targets_BT)
        loss_sum += loss.detach() * n_targets_here
        # The processes' gradients are averaged, so that 1 / world_size is in them already.
        share = n_targets_here * world_size / max(1, n_targets)
        scaler.scale(loss * share).backward()
    # The gradients that the loss itself has, not the scaled ones.
    for o in optimizers:
        scaler.unscale_(o)
    total_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    norm = total_norm.full_tensor() if fsdp else total_norm

    # A number that is not finite ends the run before it is saved. A GPU is not waited for at each
    # step, so there the run ends at the next log line.
    is_logged = iter_num % log_interval == 0
    all_finite &= loss_sum.isfinite() if machine.dtype == 'float16' else norm.isfinite()
    if is_logged or machine.type == 'cpu':
        stop_if_diverged(iter_num, all_finite)
    max_norm = grad_clip if grad_clip > 0 else math.inf
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, total_norm)
    skip = False
    if skip_spikes:
        skip = is_spike(norm.item(), norms)
        if norm.isfinite():
            norms = [*norms, norm.item()][-100:]
        if skip:
            print0(f'iter {iter_num}: skipped, for its gradient norm is {norm.item():.2f}')
            log({'iter': iter_num, 'skipped': norm.item()})
    # Under float16 a gradient may overflow: then no optimizer steps, and the scaler scales less.
    overflow = machine.dtype == 'float16' and not norm.isfinite()
    for o in optimizers:
        if not overflow and not skip:
            scaler.step(o)
        o.zero_grad(set_to_none=True)
    scaler.update()

    # Log
    is_tenth = iter_num == first_iter + 9  # soon enough to tell how long the run takes
    if is_logged or is_tenth:
        machine.synchronize()
        seconds = train_seconds + time.perf_counter() - clock
        step_seconds = (seconds - logged_seconds) / (iter_num + 1 - logged_iter)
        to_go = time_to_go(iter_num, step_seconds)
    if is_logged:
        logged_iter = iter_num + 1
        logged_seconds = seconds
        loss = machine.sum(loss_sum.item())[0] / max(1, n_targets)
        tokens_per_second = tokens_per_step / step_seconds
        entry = {'iter': iter_num, 'loss': loss, 'lr': optimizers[0].param_groups[0]['lr'],
                 'grad_norm': norm.item(), 'tokens': windows_before(iter_num + 1) * block_size,
                 'tokens_per_second': tokens_per_second, 'train_seconds': seconds}
        mfu_text = ''
        if machine.peak_flops:
            flops = model.flops_per_token() * tokens_per_second
            entry['mfu'] = flops / (machine.peak_flops * world_size)
            mfu_text = f', MFU {entry["mfu"]:.1%}'
        log(entry)
        print0(f'iter {iter_num}: loss {loss:.4f}, lr {entry["lr"]:.2e}, '
               f'norm {entry["grad_norm"]:.2f}, {tokens_per_second:,.0f} tokens/s{mfu_text}, '
               f'{to_go} to go')
    elif is_tenth:
        print0(f'ten steps done: {to_go} to go')

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
    # Another process got the signal if none came here.
    sys.exit(128 + signals[0][0] if signals else 1)
reason = ''
if iter_num < max_iters:
    reason = f', no gain in {patience} evaluations'
advice = 'nothing to save'
if os.path.exists(ckpt_path):
    advice = f'read it with: python sample.py --out_dir={out_dir}'
print0(f'done at step {iter_num}{reason}: best val loss {best_val_loss:.4f}, '
       f'{train_seconds:.0f} s of training; {advice}')
