"""
Check and measure all of folio on a GPU with one command, and write the results to docs/gpu/.
    python extras/gpu_report.py
    python extras/gpu_report.py --train='config/train_fineweb.py --max_iters=300' --minutes=8

The first command writes <to>/<device>-<date>.md, and the same as .json. It writes them again after
each section, so a report that is cut off has what was done so far. Checks come first, each pass or
FAIL with its numbers, then measurements. An error in a section becomes a line, FAILED, and the
other sections go on. The exit status is 1 if a check or a section fails. It needs no network and no
data. It is meant to take less than ten minutes, which has not been tried on a GPU yet. On a CPU
everything is tiny, and the speeds mean nothing.

The second command trains for some minutes, then has train.py save and stop. The same command goes
on, so a long run can be made of several short turns on a GPU. Each call draws the run's losses so
far into <to>, with those of another run if --beside= names its folder. --minutes=0 only draws.

Needs model.py, train.py, bench.py, hellaswag.py, folio/, prepare/documents.py, and beside it
gpu_checks.py, report.py, ngrams.py, plots.py and peers.py; transformers to compare with, matplotlib
to draw.
"""
import dataclasses
import functools
import gc
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
import types
import zlib
from importlib.util import find_spec

sys.path.insert(0, os.path.abspath(__file__ + '/../..'))  # the root of the checkout
import folio  # first: it sets what torch reads when it is loaded
import numpy as np
import torch

import folio.checkpoint
import folio.tokenizer
import hellaswag
from bench import TRAIN, one_process
from extras import gpu_checks, plots
from extras.gpu_checks import launcher, note, random_batch
from extras.peers import in_transformers, time_in_turn
from extras.report import COLUMNS, group_by_data, read_run, run_row, table
from folio import engine, fast
from folio.configurator import UserError, configure, require_at_least
from folio.machine import default_device
from folio.optim import make_optimizers
from model import GPT, GPTConfig, padded

# ---- Settings ------------------------------------------------------------------------------------
to = 'docs/gpu'  # the folder to write
sections = 'all'  # or some of them, as in --sections=compile,training
hellaswag_source = ''  # a file in HellaSwag's format; empty: items of random words
device = default_device()  # cpu, cuda, cuda:1, mps …
minutes = 8.0  # after which no section begins, or with --train= the run is stopped
train = ''  # arguments of train.py: instead of a report, train and draw the losses
out_dir = 'out/gpu'  # the folder of that run
beside = ''  # the folder of another run, to draw in the same picture

# What is measured on a GPU, and what stands in for it elsewhere.
LARGE = types.SimpleNamespace(
    model=GPTConfig(),  # GPT-2 124M, the model of config/train_fineweb.py
    batch_size=64,  # the largest of three: its half and its quarter are measured too
    steps=10,
    compile=True,
    decode_batches=(1, 64),
    prompt_tokens=256,
    new_tokens=128,
    n_items=1000)
SMALL = types.SimpleNamespace(
    model=GPTConfig(block_size=64, vocab_size=256, n_layer=2, n_head=2, n_embd=32),
    batch_size=4,
    steps=3,
    compile=False,
    decode_batches=(1, 4),
    prompt_tokens=16,
    new_tokens=24,
    n_items=20)
STEP_TOKENS = 524_288  # in a step of config/train_fineweb.py


# ---- A training step -----------------------------------------------------------------------------
def measured(name, value, unit, comment=''):
    """Return the line of a measurement."""
    number = f'{value:,.4g}' if value < 100 else f'{value:,.0f}'
    return {'name': name, 'result': f'{number} {unit}', 'value': value, 'unit': unit,
            'comment': comment}


def make_step(machine, model, loss_of_model, optimizers):
    """Return a function that makes a training step and returns its loss, a tensor on the device.

    The step is that of train.py, without gradient accumulation and loss scaling.
    """
    def step():
        with machine.autocast:
            loss = loss_of_model()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()
    return step


def our_optimizers(model, kind):
    """Return the optimizers that train.py would make, with plausible hyper-parameters."""
    return make_optimizers(model, kind, learning_rate=6e-4, muon_learning_rate=0.02,
                           weight_decay=0.1, betas=(0.9, 0.95))


def warm_up(step):
    """Make two steps, and return the loss of the first, or None if they do not fit into memory.

    They compile the model and make the optimizers' state, which should not be measured.
    """
    try:
        loss = step().item()
        step()
        return loss
    except torch.OutOfMemoryError:
        return None


def free_memory(machine):
    """Drop compiled code, and give the memory that nothing uses any more back to the device."""
    torch._dynamo.reset()
    gc.collect()
    if machine.type == 'cuda':
        torch.cuda.empty_cache()


def peak_memory(model, optimizers, step):
    """Return the bytes of GPU memory that training a model takes, without those of other models."""
    # Several models are in memory at a time. So take how far a step rises above what is allocated
    # before it, and add what this model and its optimizers keep between two steps.
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    kept = [*model.parameters()]
    for optimizer in optimizers:
        for state in optimizer.state.values():
            kept += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return (torch.cuda.max_memory_allocated() - before
            + sum(tensor.numel() * tensor.element_size() for tensor in kept))


def speed(name, machine, model, n_tokens, seconds, comment=''):
    """Return the line of a training step of n_tokens, with MFU where the GPU's peak is known."""
    tokens_per_second = n_tokens / seconds
    numbers = [f'{1000 * seconds:.1f} ms']
    if machine.peak_flops:
        mfu = model.flops_per_token() * tokens_per_second / machine.peak_flops
        numbers.append(f'MFU {mfu:.1%}')
    if comment:
        numbers.append(comment)
    return measured(name, tokens_per_second, 'tokens/s', ', '.join(numbers))


def contenders(machine, size, batch_size):
    """Return {name: (model, function that returns its loss, optimizers)} of those to compare.

    They are folio, a plain loop, and transformers if it is installed, with the same weights and
    data.
    """
    config = size.model
    idx_BT, targets_BT = random_batch(config, batch_size, machine.device)
    torch.manual_seed(0)
    ours = fast.accelerate(GPT(config)).to(machine.device)

    # The loop of nanoGPT: the whole model compiled, all logits in memory. As nanoGPT does, count
    # the rows that pad the vocabulary as tokens, which saves a copy of the logits.
    plain = GPT(dataclasses.replace(config, vocab_size=padded(config.vocab_size)))
    plain.to(machine.device).load_state_dict(ours.state_dict())

    found = {
        'folio': (ours, lambda: ours(idx_BT, targets_BT)[1], our_optimizers(ours, 'adamw')),
        'plain loop': (plain, lambda: plain(idx_BT, targets_BT)[1],
                       [torch.optim.AdamW(plain.parameters(), fused=True)])}
    if find_spec('transformers') is not None:
        theirs = in_transformers(ours)
        found['transformers'] = (
            theirs, lambda: theirs(idx_BT, labels=idx_BT, use_cache=False).loss,
            [torch.optim.AdamW(theirs.parameters(), fused=True)])
    return found


def measure_training(machine, size, divisor):
    """Yield the lines of a training step with AdamW by folio and by others, measured in turn.

    divisor: of the largest batch size, for a smaller batch.
    """
    batch_size = size.batch_size // divisor
    found = contenders(machine, size, batch_size)
    if 'transformers' not in found:
        yield note('transformers', 'left out', 'pip install transformers')
    ours = found['folio'][0]
    n_tokens = batch_size * size.model.block_size
    steps = {}
    losses = {}
    peaks = {}
    for name, (model, loss_of_model, optimizers) in found.items():
        if size.compile:
            model.compile()
        step = make_step(machine, model, loss_of_model, optimizers)
        loss = warm_up(step)
        if loss is None:
            yield note(f'batch {batch_size}, {name}', 'out of memory')
            continue
        steps[name] = step
        losses[name] = loss
        peaks[name] = ''
        if machine.type == 'cuda':
            mebibytes = peak_memory(model, optimizers, step) / 2**20
            peaks[name] = f'{mebibytes:,.0f} MiB at most'

    taken = time_in_turn(machine.synchronize, size.steps, *steps.values())
    seconds = dict(zip(steps, taken))
    for name in steps:
        # Weights and data are the same. 0.02 allows for 16 bits, and for the plain loop's padding.
        difference = abs(losses[name] - next(iter(losses.values())))
        assert difference < 0.02, f'not the same work: the losses are {losses}'
        yield speed(f'batch {batch_size}, {name}', machine, ours, n_tokens, seconds[name],
                    comment=peaks[name])
    for name in steps:
        if name != 'folio' and 'folio' in steps:
            yield measured(f'batch {batch_size}, folio / {name}',
                           seconds[name] / seconds['folio'], 'x')


def largest_batch(machine, size, config):
    """Return (model, function that returns its loss, batch size) for the largest batch that fits.

    The model is compiled, and has made two steps with Muon, which takes AdamW for the rest. Raises
    RuntimeError if not even a quarter of the largest batch fits.
    """
    for divisor in (1, 2, 4):
        batch_size = size.batch_size // divisor
        idx_BT, targets_BT = random_batch(config, batch_size, machine.device)
        model = fast.accelerate(GPT(config)).to(machine.device)
        if size.compile:
            model.compile()
        loss_of_model = functools.partial(loss_of_batch, model, idx_BT, targets_BT)
        step = make_step(machine, model, loss_of_model, our_optimizers(model, 'muon'))
        if warm_up(step) is not None:
            return model, loss_of_model, batch_size
        del model, loss_of_model, step
        free_memory(machine)
    raise RuntimeError(f'not even a batch of {batch_size} fits into memory')


def loss_of_batch(model, idx_BT, targets_BT):
    return model(idx_BT, targets_BT)[1]


def measure_kernels(machine, size):
    """Yield the lines of the ten kernels (on a CPU: operations) with the most time in a step."""
    model, loss_of_model, batch_size = largest_batch(machine, size, size.model)
    step = make_step(machine, model, loss_of_model, our_optimizers(model, 'adamw'))
    warm_up(step)
    n_steps = 3
    machine.synchronize()
    start = time.perf_counter()
    with torch.profiler.profile() as profiler:
        for _ in range(n_steps):
            step()
        machine.synchronize()
    wall = 1000 * (time.perf_counter() - start) / n_steps  # ms; the profiler adds to it

    milliseconds = {}  # in a step
    for event in profiler.key_averages():
        time_us = event.self_cpu_time_total
        if machine.type == 'cuda':
            is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
            if not is_kernel or event.is_user_annotation:
                continue
            time_us = event.self_device_time_total
        milliseconds[event.key] = time_us / 1000 / n_steps
    total = sum(milliseconds.values())
    yield measured(f'batch {batch_size}, all {len(milliseconds)} kernels', total, 'ms',
                   f'of {wall:.1f} ms that a step takes under the profiler')
    ranking = sorted(milliseconds, key=milliseconds.get, reverse=True)
    for name in ranking[:10]:
        yield measured(name[:100], milliseconds[name], 'ms', f'{milliseconds[name] / total:.1%}')


def measure_muon(machine, size):
    """Yield the lines of a training step of modern with AdamW and with Muon, and of each alone."""
    config = dataclasses.replace(size.model, arch='modern')
    model, loss_of_model, batch_size = largest_batch(machine, size, config)
    n_tokens = batch_size * config.block_size
    optimizers = {'AdamW': our_optimizers(model, 'adamw'), 'Muon': our_optimizers(model, 'muon')}

    steps = [make_step(machine, model, loss_of_model, each) for each in optimizers.values()]
    time_in_turn(machine.synchronize, 2, *steps)  # the first makes the optimizers' state
    seconds = time_in_turn(machine.synchronize, size.steps, *steps)
    for name, seconds_of_step in zip(optimizers, seconds):
        yield speed(f'batch {batch_size}, {name}', machine, model, n_tokens, seconds_of_step)

    # Now the optimizers alone. They step by the same gradients each time.
    with machine.autocast:
        loss = loss_of_model()
    loss.backward()
    calls = []
    for each in optimizers.values():
        calls.append(functools.partial(step_all, each))
    alone = time_in_turn(machine.synchronize, size.steps, *calls)
    n_micro_steps = STEP_TOKENS / n_tokens
    for name, seconds_alone, seconds_of_step in zip(optimizers, alone, seconds):
        whole_step = n_micro_steps * (seconds_of_step - seconds_alone) + seconds_alone
        yield measured(f'{name} alone', 1000 * seconds_alone, 'ms',
                       f'{seconds_alone / seconds_of_step:.1%} of the step above, '
                       f'{seconds_alone / whole_step:.1%} of one of {STEP_TOKENS:,} tokens')


def step_all(optimizers):
    for optimizer in optimizers:
        optimizer.step()


# ---- Text ----------------------------------------------------------------------------------------
def decode_seconds(machine, model, prompts, size, compile):
    """Return the seconds per step of greedy decoding, after the prompts are read and it is warm."""
    n_before = size.new_tokens // 4  # steps that are not timed: the first ones record CUDA graphs
    with machine.autocast:
        steps = engine.generate(model, prompts, size.new_tokens, strategy='greedy',
                                compile=compile)
        for n, _ in enumerate(steps, 1):
            if n == n_before:
                machine.synchronize()
                start = time.perf_counter()
    machine.synchronize()
    return (time.perf_counter() - start) / (size.new_tokens - n_before)


def measure_decoding(machine, size):
    """Yield the lines of greedy decoding, eager and compiled, for one prompt and for many."""
    torch.manual_seed(0)
    model = machine.for_inference(fast.accelerate(GPT(size.model)))
    ways = {'eager': False}
    if size.compile:
        ways['compiled'] = True
    for batch_size in size.decode_batches:
        prompts = torch.randint(size.model.vocab_size, (batch_size, size.prompt_tokens))
        taken = {name: [] for name in ways}
        for _ in range(3):
            for name, compile in ways.items():
                taken[name].append(decode_seconds(machine, model, prompts, size, compile))
        for name, seconds in taken.items():
            median = statistics.median(seconds)
            yield measured(f'batch {batch_size}, {name}', batch_size / median, 'tokens/s',
                           f'{1000 * median:.2f} ms a step')


def random_items(n):
    """Return n items in HellaSwag's form, of random words.

    A context has 20 to 120 words, and an ending 10 to 50.
    """
    random = np.random.RandomState(0)

    def words(lowest, highest):
        count = random.randint(lowest, highest + 1)
        return ' '.join(str(number) for number in random.randint(10_000, size=count))

    items = []
    for i in range(n):
        endings = [words(10, 50) for _ in range(4)]
        items.append({'ctx': words(20, 120), 'endings': endings, 'label': 0, 'where': f'item {i}'})
    return items


def word_tokenizer(vocab_size):
    """Return a tokenizer that needs no file: each word is a token, with its checksum as the id."""
    def encode(text):
        return [zlib.crc32(word.encode()) % vocab_size for word in text.split()]
    return types.SimpleNamespace(encode=encode)


def measure_hellaswag(machine, size):
    """Yield the line of scoring items of HellaSwag, or random ones, by a model that is random."""
    items = random_items(size.n_items)
    tokenizer = word_tokenizer(size.model.vocab_size)
    comment = 'random words'
    if hellaswag_source:
        items = hellaswag.load(hellaswag_source)[:size.n_items]
        tokenizer = folio.tokenizer.load('gpt2')
        comment = hellaswag_source
    torch.manual_seed(0)
    model = machine.for_inference(fast.accelerate(GPT(size.model)))

    def score():
        hellaswag.score(model, items, tokenizer, machine, batch_tokens=hellaswag.batch_tokens)

    time_in_turn(machine.synchronize, 1, score)  # not kept, because the first time is slower
    seconds, = time_in_turn(machine.synchronize, 3, score)
    yield measured(f'{len(items):,} items', len(items) / seconds, 'items/s', comment)


# ---- The report ----------------------------------------------------------------------------------
# Checks multiply float32 exactly; measurements in TF32, as train.py does: see lines_of.
CHECKS = {
    'float32': gpu_checks.check_float32,
    'formats': gpu_checks.check_formats,
    'compile': gpu_checks.check_compile,
    'cache': gpu_checks.check_cache,
    'runs': gpu_checks.check_runs,
    'resume': gpu_checks.check_resume,
    'processes': gpu_checks.check_processes,
}
MEASUREMENTS = {
    'training': functools.partial(measure_training, divisor=1),
    'kernels': measure_kernels,
    'muon': measure_muon,
    'decoding': measure_decoding,
    'hellaswag': measure_hellaswag,
    'training/2': functools.partial(measure_training, divisor=2),
    'training/4': functools.partial(measure_training, divisor=4),
}
ABOUT = {
    'float32': 'Accelerated, on the device, against plain model.py on the CPU.',
    'formats': 'Autocast against float32, both on the device.',
    'compile': 'Compiled against eager.',
    'cache': 'Decoding with a cache, of prompts of different lengths, against the plain model.',
    'runs': 'train.py on 90,000 characters, 40 steps.',
    'resume': 'modern with Muon and --deterministic=True: ended at step 20 and resumed; killed '
              'after step 23 and resumed from the checkpoint of step 20.',
    'processes': 'torchrun with a process for each GPU, against one process.',
    'training': 'A training step: forward and backward pass, clipping, AdamW. The plain loop is '
                'model.py as it stands, with the cross-entropy of torch, in the manner of nanoGPT.',
    'kernels': "The ten kernels with the most time in folio's training step.",
    'muon': 'The modern architecture with either optimizer.',
    'decoding': 'Greedy, with a cache.',
    'hellaswag': 'Items scored, four endings each.',
    'training/2': 'The same with half the batch.',
    'training/4': 'The same with a quarter of the batch.',
}


def lines_of(name, machine, size):
    """Yield the lines of a section; an error in it becomes the last line."""
    try:
        if name in CHECKS:
            torch.set_float32_matmul_precision('highest')
            yield from CHECKS[name](machine)
        else:
            torch.set_float32_matmul_precision('high')
            yield from MEASUREMENTS[name](machine, size)
    except Exception as e:  # whatever it is, the other sections go on
        traceback.print_exc()
        reason = ' '.join(str(e).split())[:300]
        yield note(name, 'FAILED', f'{type(e).__name__}: {reason}')


def is_failure(line):
    return line['result'] in ('FAIL', 'FAILED')


def file_name(device_name):
    """Return the name of a device in a form that suits a file's name.

    >>> file_name('NVIDIA H100 80GB HBM3')
    'nvidia-h100-80gb-hbm3'
    """
    return re.sub('[^a-z0-9]+', '-', device_name.lower()).strip('-')


def commit():
    """Return the checkout's commit, marked -dirty if files have changed since; '' without git."""
    if shutil.which('git') is None:
        return ''
    done = subprocess.run(['git', 'describe', '--always', '--dirty'], text=True,
                          cwd=os.path.dirname(TRAIN), capture_output=True)
    return done.stdout.strip()


def write_report(path, facts, done, seconds):
    """Write the report so far to path.md and path.json.

    facts: {what: text} about machine and software. done: {section: its lines}. seconds: {section:
    seconds that it took}.
    """
    with open(path + '.json', 'w', encoding='utf-8') as f:
        json.dump(facts | {'sections': done, 'seconds': seconds}, f, indent=2)

    lines = [line for section in done.values() for line in section]
    n_passed = sum(line['result'] == 'pass' for line in lines)
    n_failures = sum(is_failure(line) for line in lines)
    blocks = [f'# folio on {facts["device"]}, {facts["date"]}',
              '\n'.join(f'- {what}: {text}' for what, text in facts.items()),
              f'Checks passed: {n_passed}. Failed: {n_failures}. All took '
              f'{sum(seconds.values()):.0f} s. Differences are relative to the largest number; '
              'times are medians, of functions called in turn.']
    for name, section in done.items():
        rows = [[line['name'], line['result'], line['comment']] for line in section]
        about = f'{ABOUT[name]} The section took {seconds[name]:.0f} s.'
        blocks += [f'## {name}', about, table(['what', 'result', 'numbers'], rows)]
    with open(path + '.md', 'w', encoding='utf-8') as f:
        f.write('\n\n'.join(blocks) + '\n')


def make_report(names, machine):
    """Write the report of some sections; return whether nothing failed."""
    size = LARGE if machine.type == 'cuda' else SMALL
    facts = {
        'device': machine.name,
        'date': time.strftime('%Y-%m-%d'),
        'machine': str(machine),
        'GPUs': str(torch.cuda.device_count()),
        'CUDA': str(torch.version.cuda),
        'python': sys.version.split()[0],
        'commit': commit(),
    }
    path = os.path.join(to, f'{file_name(machine.name)}-{facts["date"]}')
    start = time.monotonic()
    done = {}
    seconds = {}
    for name in names:
        print(f'---- {name}', flush=True)
        done[name] = []
        section_start = time.monotonic()
        if time.monotonic() > start + 60 * minutes:
            lines = [note(name, 'left out', f'the {minutes:g} minutes were over')]
        else:
            lines = lines_of(name, machine, size)
        for line in lines:
            print(f'{line["name"]:<34}{line["result"]:>20}   {line["comment"]}'.rstrip(),
                  flush=True)
            done[name].append(line)
        free_memory(machine)
        seconds[name] = time.monotonic() - section_start
        write_report(path, facts, done, seconds)
    failures = [line for section in done.values() for line in section if is_failure(line)]
    print(f'wrote {path}.md and .json; failures: {len(failures)}')
    return not failures


# ---- Training in several calls -------------------------------------------------------------------
def train_for_minutes():
    """Start or resume the run, and stop it when its minutes are over. Raise UserError if it fails.

    It is stopped by SIGTERM, so that train.py finishes its step and saves, which takes longer than
    the minutes.
    """
    processes = max(1, torch.cuda.device_count())
    command = [*launcher(processes), TRAIN, *shlex.split(train), f'--out_dir={out_dir}',
               '--init_from=auto']
    process = subprocess.Popen(command)
    try:
        status = process.wait(timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        process.wait()
        print('the minutes are over; the same command goes on', flush=True)
        return
    if status != 0:
        raise UserError(f'train.py ended with status {status}; what it says stands above')


def device_of(run):
    """Return the name of the device that a run was last started on."""
    entries = folio.checkpoint.read_log(os.path.join(run.folder, 'log.jsonl'), damaged=[])
    headers = [entry for entry in entries if 'config' in entry]
    return headers[-1]['machine']['device']


def share_of_tokens(run, other):
    """Return a sentence: with which share of another run's tokens a run reaches its last loss."""
    last = other.evals[-1]
    if last['tokens'] == 0:
        return f'{other.name} has not learned from a token yet.'
    for entry in run.evals:
        if entry['val_loss'] <= last['val_loss']:
            return (f'{run.name} has the last loss of {other.name}, '
                    f'{last["val_loss"]:.4f}, after {entry["tokens"]:,} tokens, '
                    f'{entry["tokens"] / last["tokens"]:.0%} of the {last["tokens"]:,} that '
                    f'{other.name} took.')
    return f'{run.name} does not reach the last loss of {other.name}, {last["val_loss"]:.4f}.'


def draw_runs(folders):
    """Write a page with the losses of one or two runs, and its picture; return the page's path.

    Raises UserError if they cannot share a picture.
    """
    runs = [read_run(folder) for folder in folders]
    if len(group_by_data(runs)) > 1:
        raise UserError('the runs have different data sets, or evaluations of different lengths; '
                        'leave out --beside')
    for i, each in enumerate(runs):
        each.color = f'C{i}'
    names = '-'.join(each.name for each in runs)
    path = os.path.join(to, file_name(f'{device_of(runs[0])}-{names}'))
    try:
        plots.draw_losses(path + '.png', runs[0].config['dataset'], runs, references={})
        picture = f'![losses]({os.path.basename(path)}.png)'
    except UserError as e:  # matplotlib is missing; --minutes=0 can draw later
        picture = f'No picture: {e}.'

    blocks = [f'# {names} on {device_of(runs[0])}', picture,
              table(COLUMNS, [run_row(each) for each in runs])]
    if len(runs) == 2 and all(each.evals for each in runs):
        blocks += [share_of_tokens(*runs), share_of_tokens(*reversed(runs))]
    with open(path + '.md', 'w', encoding='utf-8') as f:
        f.write('\n\n'.join(blocks) + '\n')
    return path + '.md'


# ---- The script ----------------------------------------------------------------------------------
def main():
    config = configure(globals())
    require_at_least(0, config, 'minutes')
    known = [*CHECKS, *MEASUREMENTS]
    names = known
    if sections != 'all':
        names = sections.split(',')
    if not set(names) <= set(known):
        raise UserError(f'sections is {sections!r}; it may be all, or some of {",".join(known)}')
    try:
        os.makedirs(to, exist_ok=True)
    except OSError as e:
        raise UserError(f'{to} cannot be written ({e.strerror}); give another '
                        '--to=folder') from None
    if train:
        if minutes > 0:
            train_for_minutes()
        folders = [out_dir, beside] if beside else [out_dir]
        print(f'wrote {draw_runs(folders)}')
        return
    machine = one_process(types.SimpleNamespace(device=device, dtype='auto'))
    if not make_report(names, machine):
        sys.exit(1)


if __name__ == '__main__':
    main()
