"""
Measure how fast a config trains, loads its data and generates text.
    python bench.py config/train_fineweb.py --batch_size=32
    python bench.py config/train_book.py --profile=True
    python bench.py --init_from=gpt2 --device=cpu

Prints a table: tokens a second, MFU where the GPU is known, peak memory. It takes train.py's config
files and settings (python train.py --help lists them), and measures one process. Where the data set
is missing, random tokens take its place.
"""
import ast
import math
import os
import statistics
import sys
import time
import types

import folio  # first: it sets what torch reads when it is loaded
import numpy as np
import torch

import folio.checkpoint
from folio import engine, fast
from folio.configurator import UserError, configure, model_settings, user_errors
from folio.data import Dataset, train_batch
from folio.machine import Machine, default_device, recompute_blocks
from folio.optim import make_optimizers
from model import GPT, GPTConfig

# ---- Settings: these and train.py's --------------------------------------------------------------
steps = 20  # training steps to time
prompt_tokens = 256  # in each prompt to continue
new_tokens = 64  # in its continuation
decode_batch = 1  # prompts that are continued at once
profile = False  # show where the time of three steps goes, and write out_dir/trace.json
json = ''  # write the measurements to this file as well

TRAIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train.py')
COUNTS = ('batch_size', 'block_size', 'gradient_accumulation_steps')  # of train.py's, needed here


def settings_of(path):
    """Return {name: value} of a script's settings: what it assigns before it calls configure.

    The script is read, not run: it would train. A value may be an expression of the settings above
    it and of the names below.
    """
    with open(path, encoding='utf-8') as f:
        statements = ast.parse(f.read()).body
    names = {'default_device': default_device, 'math': math, 'os': os, 'torch': torch}
    settings = {}
    for statement in statements:
        expression = getattr(statement, 'value', None)
        # What is assigned after this call is the script's work, not its settings.
        if isinstance(expression, ast.Call) and ast.unparse(expression.func) == 'configure':
            break
        if isinstance(statement, ast.Assign):
            settings[statement.targets[0].id] = eval(ast.unparse(expression), names, settings)
    return settings


def read_settings(namespace, counts):
    """Return a script's settings and train.py's, as attributes, with what the command line says.

    namespace: globals() of the script, which has a setting called json. counts: names of settings
    that must be at least 1. Raises UserError for a mistake in a setting.
    """
    s = types.SimpleNamespace(**configure(namespace | settings_of(TRAIN)))
    counts = (*counts, *COUNTS)
    if min(getattr(s, name) for name in counts) < 1:
        raise UserError(f'{", ".join(counts)} must be at least 1')
    if s.json and not os.path.isdir(os.path.dirname(s.json) or '.'):
        raise UserError(f'{s.json}: there is no such folder')
    return s


# ---- The table -----------------------------------------------------------------------------------
metrics = {}  # {name: value} of the rows so far


def show(name, value, unit, comment=''):
    """Print a row of the table, and keep its value for --json."""
    metrics[name] = value
    number = f'{value:,.4g}' if value < 100 else f'{value:,.0f}'
    print(f'{name:<34}{number:>14} {unit:<10} {comment}'.rstrip(), flush=True)


def write_metrics(path, machine):
    """Write the values of the table as JSON, with the machine and the date."""
    from json import dump  # not at the top, where a setting is called json
    with open(path, 'w', encoding='utf-8') as f:
        dump(metrics | {'machine': str(machine), 'date': time.strftime('%Y-%m-%d')}, f, indent=2)


def median_seconds(function, times, wait):
    """Return the median time of function(0), function(1) …; wait() waits for the device."""
    taken = []
    for i in range(times):
        wait()
        start = time.perf_counter()
        function(i)
        wait()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


# ---- What is measured ----------------------------------------------------------------------------
def one_process(s, trains=False):
    """Return the Machine of the settings. Raises UserError under torchrun."""
    machine = Machine(s.device, s.dtype, trains)
    if machine.world_size > 1:
        raise UserError('speed is measured in one process, without torchrun; for several, train.py '
                        'logs their tokens/s')
    return machine


def decide_compile(s, machine):
    """Return whether to compile the model: as the setting says, where the machine can."""
    wanted = s.compile
    if wanted == 'auto':
        wanted = machine.type == 'cuda'
    return wanted and machine.can_compile()


def load_tokens(s):
    """Return (tokens, vocab_size, their origin) of the training split, or of random tokens."""
    try:
        data = Dataset(s.dataset)
        return data.tokens('train'), data.vocab_size, data.folder
    except UserError:
        # A step takes as long with random tokens; there are enough of them not to sit in a cache.
        vocab_size = 50257  # GPT-2's
        n_tokens = max(2**22, 2 * s.block_size)
        tokens = np.random.RandomState(0).randint(vocab_size, size=n_tokens).astype('<u2')
        return tokens, vocab_size, 'random tokens'


def make_model(s, vocab_size):
    """Return the model of the settings, on the CPU: a new one, or the one that init_from names."""
    if s.init_from != 'scratch':
        return folio.checkpoint.build(GPT, folio.checkpoint.load(s.init_from, s.out_dir))
    torch.manual_seed(s.seed)
    with user_errors():
        config = GPTConfig(**model_settings(vars(s), GPTConfig), vocab_size=vocab_size)
    return GPT(config)


def set_up(s, machine):
    """Print what will be measured; return (model, tokens, whether to compile the model).

    A loaded model may have a shorter context than the settings say: it then sets s.block_size.
    """
    compiled = decide_compile(s, machine)
    tokens, vocab_size, origin = load_tokens(s)
    model = make_model(s, vocab_size)
    s.block_size = min(s.block_size, model.config.block_size)
    n_parameters = sum(p.numel() for p in model.parameters())
    sizes = (s.gradient_accumulation_steps, s.batch_size, s.block_size)
    print(f'{machine}, compile {compiled}')
    print(f'{model.config.arch}, {n_parameters / 1e6:.2f} M parameters; {origin}; '
          f'{" x ".join(map(str, sizes))} = {math.prod(sizes):,} tokens a step')
    return model, tokens, compiled


# ---- Training step -------------------------------------------------------------------------------
def measure_training(s, machine, model, tokens):
    """Show the speed of a training step, its memory, and how fast its data can be had."""
    optimizers = make_optimizers(
        model, s.optimizer, learning_rate=s.learning_rate, muon_learning_rate=s.muon_learning_rate,
        weight_decay=s.weight_decay, betas=(s.beta1, s.beta2),
        muon_weight_decay=s.muon_weight_decay)
    step_tokens = s.gradient_accumulation_steps * s.batch_size * s.block_size

    def batch(step, micro_step):
        n_before = step * s.gradient_accumulation_steps + micro_step
        return train_batch(tokens, None, s.block_size, batch_size=s.batch_size, seed=s.seed,
                           first=n_before * s.batch_size)

    # The work of a step of train.py, but for its log, its checkpoints and loss scaling.
    def train_step(step):
        for micro_step in range(s.gradient_accumulation_steps):
            idx_BT, targets_BT = batch(step, micro_step)
            idx_BT = idx_BT.to(machine.device, non_blocking=True)
            targets_BT = targets_BT.to(machine.device, non_blocking=True)
            with machine.autocast:
                _, loss = model(idx_BT, targets_BT)
            (loss / s.gradient_accumulation_steps).backward()
        # Without a limit the norm is computed all the same, for train.py logs it.
        max_norm = s.grad_clip if s.grad_clip > 0 else math.inf
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    # The first step compiles, the second meets the optimizer's new state.
    start = time.perf_counter()
    for i in range(3):
        train_step(i)
    machine.synchronize()
    show('warm-up, 3 steps', time.perf_counter() - start, 's')
    if s.profile:
        profile_steps(s, machine, train_step)

    if machine.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    # The median, as a step now and then waits for something else on the machine.
    step_seconds = median_seconds(train_step, s.steps, machine.synchronize)
    show('training step', 1000 * step_seconds, 'ms', f'median of {s.steps}')
    show('training', step_tokens / step_seconds, 'tokens/s')
    if machine.peak_flops:
        flops = model.flops_per_token() * step_tokens / step_seconds
        show('training, MFU', 100 * flops / machine.peak_flops, '%',
             f'of {machine.peak_flops / 1e12:.0f} TFLOP/s')
    show_peak_memory(machine)

    batch_seconds = median_seconds(lambda i: batch(i, 0), 20, machine.synchronize)
    share = batch_seconds * s.gradient_accumulation_steps / step_seconds
    show('batches from token files', s.batch_size * s.block_size / batch_seconds, 'tokens/s',
         f'{100 * share:.2g} % of a step')


def profile_steps(s, machine, train_step):
    """Print where the time of three steps goes, and write a trace of them."""
    with torch.profiler.profile() as profiler:
        for i in range(3):
            train_step(i)
        machine.synchronize()
    sort_by = 'self_cpu_time_total'
    if machine.type == 'cuda':
        sort_by = 'self_cuda_time_total'
    print(profiler.key_averages().table(sort_by=sort_by, row_limit=20))
    os.makedirs(s.out_dir, exist_ok=True)
    profiler.export_chrome_trace(os.path.join(s.out_dir, 'trace.json'))


def show_peak_memory(machine):
    """Show the most memory that was in use at any time, where the system knows."""
    if machine.type == 'cuda':
        peak = torch.cuda.max_memory_allocated()
        show('training, peak memory', peak / 2**20, 'MiB', 'of the GPU')
    elif sys.platform != 'win32':
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        unit = 2**20 if sys.platform == 'darwin' else 2**10  # macOS counts bytes, Linux KiB
        show('training, peak memory', peak / unit, 'MiB', 'of the process')


# ---- Text ----------------------------------------------------------------------------------------
def measure_text(s, machine, model, tokens):
    """Show how fast prompts are read (prefill), and how fast tokens follow (decoding)."""
    length = min(s.prompt_tokens, max(1, s.block_size - s.new_tokens))
    shape = (s.decode_batch, length)
    # Where there are too few tokens, np.resize repeats them.
    idx_BT = torch.from_numpy(np.resize(tokens[:math.prod(shape)], shape).astype(np.int64))
    prefill_seconds = []
    decode_seconds = []
    for i in range(4):  # the first warms up, and does not count
        machine.synchronize()
        start = time.perf_counter()
        with machine.autocast:
            steps = engine.generate(model, idx_BT, s.new_tokens, strategy='greedy')
            for n, _ in enumerate(steps):
                # The first token comes when the whole prompt has been read.
                if n == 0:
                    machine.synchronize()
                    first = time.perf_counter() - start
        machine.synchronize()
        if i > 0:
            prefill_seconds.append(first)
            decode_seconds.append(time.perf_counter() - start - first)
    comment = f'{s.decode_batch} x {length} tokens of prompt, {machine.dtype}'
    metrics['dtype of prefill and decoding'] = machine.dtype
    prefill = s.decode_batch * length / statistics.median(prefill_seconds)
    show('prefill', prefill, 'tokens/s', comment)
    if s.new_tokens > 1:
        # The first new token belongs to the prefill.
        decoding = s.decode_batch * (s.new_tokens - 1) / statistics.median(decode_seconds)
        show('decoding', decoding, 'tokens/s', comment)


# ---- The script ----------------------------------------------------------------------------------
def main():
    s = read_settings(globals(), ('steps', 'prompt_tokens', 'new_tokens', 'decode_batch'))
    machine = one_process(s, trains=True)
    model, tokens, compiled = set_up(s, machine)
    fast.accelerate(model).to(machine.device)
    if s.activation_checkpointing:
        recompute_blocks(model)
    if compiled:
        model.compile()
    measure_training(s, machine, model, tokens)
    # On a CPU train.py may train in bfloat16, but sample.py writes in float32.
    measure_text(s, one_process(s), model, tokens)
    if s.json:
        write_metrics(s.json, machine)


if __name__ == '__main__':
    main()
