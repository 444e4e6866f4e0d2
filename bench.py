"""
Measure how fast a config trains, loads its data and generates text.
    python bench.py config/train_fineweb.py --batch_size=32
    python bench.py config/train_book.py --profile=True
    python bench.py --init_from=gpt2 --device=cpu

Prints a table: tokens a second, and on a GPU MFU and peak memory. It takes train.py's config
files, and measures one process. Without a data set that fits the model, its tokens are random.

Needs model.py and folio/.
"""
import json
import math
import os
import statistics
import time

os.environ.setdefault('GOMP_SPINCOUNT', '10000')  # see train.py
import numpy as np
import torch

import folio.checkpoint
from folio import engine
from folio.configurator import (UserError, configure, folder_of, model_settings,
                                require_at_least, require_choice, user_errors)
from folio.data import Dataset, train_batch
from folio.machine import COMPILE_OPTIONS, Machine, default_device
from folio.optim import make_optimizers
from model import GPT, GPTConfig

# ---- Settings ------------------------------------------------------------------------------------
steps = 20  # training steps to time
prompt_tokens = 256  # in each prompt to continue
new_tokens = 64  # in its continuation
decode_batch = 1  # prompts that are continued at once
profile = False  # show where the time of three steps goes, and write out_dir/trace.json
save_to = ''  # write the measurements to this file as well, as JSON
# train.py's, with its defaults; and the fields of GPTConfig
out_dir = 'out'  # where init_from=resume looks, and the trace goes
init_from = 'scratch'  # scratch, resume (give its config for its batch), gpt2 …, a .pt, a folder
seed = 1337  # of initialisation and batches
dataset = 'openwebtext'  # a folder under data/
gradient_accumulation_steps = 40  # micro-steps in a step
batch_size = 12  # sequences in a micro-step
bias = False  # gpt2: biases in Linear and LayerNorm
optimizer = 'adamw'  # or muon
learning_rate = 6e-4  # the peak
muon_learning_rate = 0.02  # Muon's peak
weight_decay = 1e-1  # of matrices
beta1 = 0.9  # of AdamW
beta2 = 0.95  # of AdamW
grad_clip = 1.0  # highest norm of the gradient; 0: no limit
device = default_device()  # cpu, cuda, cuda:1, mps …
dtype = 'auto'  # float32, bfloat16, float16; auto: bfloat16 where that is fast
compile = 'auto'  # True, False; auto: on a GPU
config = configure(globals(), strict=False)
require_at_least(1, config, 'steps', 'prompt_tokens', 'new_tokens', 'decode_batch', 'batch_size',
                 'block_size', 'gradient_accumulation_steps')
require_choice(config, 'compile', ('auto', True, False))


# ---- The table -----------------------------------------------------------------------------------
metrics = {}  # {name: value} of the rows so far


def show(name, value, unit, comment=''):
    """Print a row of the table, and keep its value for --save_to."""
    metrics[name] = value
    number = f'{value:,.4g}' if value < 100 else f'{value:,.0f}'
    print(f'{name:<34}{number:>14} {unit:<10} {comment}'.rstrip(), flush=True)


def median_seconds(function, times):
    """Return the median time of function(0), function(1) …"""
    taken = []
    for i in range(times):
        machine.synchronize()
        start = time.perf_counter()
        function(i)
        machine.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


# ---- Machine, data, model ------------------------------------------------------------------------
machine = Machine(device, dtype)
if machine.world_size > 1:
    raise UserError('speed is measured in one process, without torchrun; for several, train.py '
                    'logs their tokens/s')
if compile == 'auto':
    compile = machine.type == 'cuda'
compile = compile and machine.can_compile()
vocab_size = 50257  # GPT-2's
if init_from != 'scratch':
    checkpoint = folio.checkpoint.load(init_from, out_dir)
    vocab_size = checkpoint['model_args']['vocab_size']
data = None
if os.path.exists(os.path.join(folder_of(dataset), 'train.bin')):
    data = Dataset(dataset)
    if init_from == 'scratch':
        vocab_size = data.vocab_size
if data is not None and data.vocab_size == vocab_size:
    tokens = data.tokens('train')
    origin = data.folder
else:
    # A step takes as long with random tokens. They are too many to stay in a cache.
    n_tokens = max(2**22, 2 * config['block_size'])
    tokens = np.random.RandomState(0).randint(vocab_size, size=n_tokens).astype('<u2')
    origin = 'random tokens'
if init_from == 'scratch':
    torch.manual_seed(seed)
    with user_errors():
        model_config = GPTConfig(**model_settings(config, GPTConfig), vocab_size=vocab_size)
    model = GPT(model_config)
else:
    model = folio.checkpoint.build(GPT, checkpoint)
block_size = min(config['block_size'], model.config.block_size)  # a loaded model may have less
n_parameters = sum(p.numel() for p in model.parameters())
sizes = (gradient_accumulation_steps, batch_size, block_size)
tokens_per_step = math.prod(sizes)
print(f'{machine}, compile {compile}')
print(f'{model.config.arch}, {n_parameters / 1e6:.2f} M parameters; {origin}; '
      f'{" x ".join(map(str, sizes))} = {tokens_per_step:,} tokens a step')
model.to(machine.device)
if compile:
    model.compile(options=COMPILE_OPTIONS)
with user_errors():
    optimizers = make_optimizers(
        model, optimizer, learning_rate=learning_rate, muon_learning_rate=muon_learning_rate,
        weight_decay=weight_decay, betas=(beta1, beta2))


# ---- Training ------------------------------------------------------------------------------------
def make_batch(step, micro_step):
    n_before = step * gradient_accumulation_steps + micro_step
    return train_batch(tokens, None, block_size, batch_size=batch_size, seed=seed,
                       first=n_before * batch_size)


def train_step(step):
    """Do the work of a step of train.py, except logging, checkpoints and loss scaling."""
    for micro_step in range(gradient_accumulation_steps):
        idx_BT, targets_BT = make_batch(step, micro_step)
        idx_BT = idx_BT.to(machine.device, non_blocking=True)
        targets_BT = targets_BT.to(machine.device, non_blocking=True)
        with machine.autocast:
            _, loss = model(idx_BT, targets_BT)
        (loss / gradient_accumulation_steps).backward()
    # Even without a limit the norm is computed, because train.py logs it.
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    for o in optimizers:
        o.step()
        o.zero_grad(set_to_none=True)


# The first step compiles, the second is the first that finds optimizer states.
start = time.perf_counter()
for step in range(3):
    train_step(step)
machine.synchronize()
show('warm-up, 3 steps', time.perf_counter() - start, 's')
if profile:
    with torch.profiler.profile() as profiler:
        for step in range(3):
            train_step(step)
        machine.synchronize()
    sort_by = 'self_cuda_time_total' if machine.type == 'cuda' else 'self_cpu_time_total'
    print(profiler.key_averages().table(sort_by=sort_by, row_limit=20))
    os.makedirs(out_dir, exist_ok=True)
    profiler.export_chrome_trace(os.path.join(out_dir, 'trace.json'))

if machine.type == 'cuda':
    torch.cuda.reset_peak_memory_stats()
# The median, because a step now and then waits for other work on the machine.
step_seconds = median_seconds(train_step, steps)
show('training step', 1000 * step_seconds, 'ms', f'median of {steps}')
show('training', tokens_per_step / step_seconds, 'tokens/s')
if machine.peak_flops:
    flops = model.flops_per_token() * tokens_per_step / step_seconds
    show('training, MFU', 100 * flops / machine.peak_flops, '%',
         f'of {machine.peak_flops / 1e12:.0f} TFLOP/s')
if machine.type == 'cuda':
    show('training, peak memory', torch.cuda.max_memory_allocated() / 2**20, 'MiB', 'of the GPU')

batch_seconds = median_seconds(lambda step: make_batch(step, 0), 20)
share = batch_seconds * gradient_accumulation_steps / step_seconds
show('batches from token files', batch_size * block_size / batch_seconds, 'tokens/s',
     f'{100 * share:.2g} % of a step')

# ---- Text: how fast prompts are read (prefill), and how fast tokens follow (decoding) ------------
model.to(machine.torch_dtype)  # as in sample.py
length = min(prompt_tokens, max(1, block_size - new_tokens))
shape = (decode_batch, length)
# Where there are too few tokens, np.resize repeats them.
idx_BT = torch.from_numpy(np.resize(tokens[:math.prod(shape)], shape).astype(np.int64))
prefill_seconds = []
decode_seconds = []
for i in range(4):  # the first warms up, and does not count
    machine.synchronize()
    start = time.perf_counter()
    for n, _ in enumerate(engine.generate(model, idx_BT, new_tokens, strategy='greedy')):
        # The first token comes when the whole prompt has been read.
        if n == 0:
            machine.synchronize()
            first = time.perf_counter() - start
    machine.synchronize()
    if i > 0:
        prefill_seconds.append(first)
        decode_seconds.append(time.perf_counter() - start - first)
comment = f'{decode_batch} x {length} tokens of prompt, {machine.dtype}'
show('prefill', decode_batch * length / statistics.median(prefill_seconds), 'tokens/s', comment)
if new_tokens > 1:
    # The first new token belongs to the prefill.
    decoding = decode_batch * (new_tokens - 1) / statistics.median(decode_seconds)
    show('decoding', decoding, 'tokens/s', comment)

if save_to:
    with open(save_to, 'w', encoding='utf-8') as f:
        metrics |= {'machine': str(machine), 'date': time.strftime('%Y-%m-%d')}
        json.dump(metrics, f, indent=2)
