"""
Check that a device computes what it should: the checks of gpu_report.py.
    python extras/gpu_report.py --sections=float32,formats,compile,cache,runs,resume,processes

Each section of checks is a function check_…(machine) that yields lines of the report, dictionaries
{name, result, comment}: the result is pass or FAIL, the comment has the numbers. The models are
small and random, and the same each time. Runs are started as a user starts train.py, on the text of
Python's own help, a token per character.

Needs model.py, train.py, bench.py and folio/.
"""
import contextlib
import functools
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

import folio.checkpoint
from bench import TRAIN
from folio import engine, fast
from model import GPT, GPTConfig

ARCHS = ('gpt2', 'modern')
# The largest difference allowed between numbers that should be equal, relative to the largest of
# them. A bfloat16 has 8 significant bits and a float16 has 11; their errors add up over the layers.
TOLERANCES = {'float32': 1e-4, 'bfloat16': 0.05, 'float16': 0.01}


# ---- Lines of the report -------------------------------------------------------------------------
def check(name, passed, numbers):
    """Return the line of a check."""
    result = 'pass' if passed else 'FAIL'
    return {'name': name, 'result': result, 'comment': numbers}


def note(name, result, comment=''):
    """Return a line without numbers: of what FAILED, was left out, or ran out of memory."""
    return {'name': name, 'result': result, 'comment': comment}


def compare(name, ours, theirs, dtype):
    """Return the check that tensors are equal within the tolerance of a number format.

    ours, theirs: {what: tensor}. Differences are relative to the largest number in theirs.
    """
    differences = {}
    for what, expected in theirs.items():
        difference = (ours[what] - expected).abs().max() / expected.abs().max()
        differences[what] = difference.item()
    tolerance = TOLERANCES[dtype]
    passed = all(difference <= tolerance for difference in differences.values())  # a NaN fails
    numbers = ', '.join(f'{what} {value:.1e}' for what, value in differences.items())
    return check(name, passed, f'{numbers}; tolerance {tolerance:g}')


# ---- Checks: the model ---------------------------------------------------------------------------
def make_model(arch):
    """Return a small model to check with, on the CPU, the same in each call."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=128, vocab_size=1000, n_layer=2, n_head=4, n_embd=256,
                          arch=arch))
    # modern begins with a head of zeros. Its logits and most of its gradients would be zero,
    # whatever the rest of the model computes.
    torch.nn.init.normal_(model.lm_head.weight, std=0.05)
    return model


def make_fast_model(arch, machine):
    """Return the same model in the form that train.py gives it: accelerated, on the device."""
    return fast.accelerate(make_model(arch)).to(machine.device)


def random_batch(config, batch_size, device, seed=0):
    """Return random (idx_BT, targets_BT); the last position of a row has no target."""
    # Drawn on the CPU, so that every device gets the same numbers.
    torch.manual_seed(seed)
    idx_BT = torch.randint(config.vocab_size, (batch_size, config.block_size)).to(device)
    targets_BT = F.pad(idx_BT[:, 1:], (0, 1), value=-1)
    return idx_BT, targets_BT


def autocast(machine, dtype):
    """Return the context in which matrix products are computed in a number format."""
    if dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(machine.type, getattr(torch, dtype))


def loss_and_gradients(model, context, scale=1.0):
    """Return {loss, gradients} of a model on a batch that is always the same, as CPU tensors.

    context: in which the forward pass runs. scale: multiplies the loss before the backward pass,
    and the gradients are divided by it; without one the gradients underflow in float16.
    """
    idx_BT, targets_BT = random_batch(model.config, 4, model.lm_head.weight.device)
    model.zero_grad()
    with context:
        _, loss = model(idx_BT, targets_BT)
    (scale * loss).backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()]) / scale
    return {'loss': loss.detach().cpu(), 'gradients': gradients.cpu()}


@torch.no_grad()
def logits_of(model, context):
    """Return {logits} of a model on the same batch, as a CPU tensor."""
    idx_BT, _ = random_batch(model.config, 4, model.lm_head.weight.device)
    with context:
        logits_BTV, _ = model(idx_BT, all_logits=True)
    return {'logits': logits_BTV.float().cpu()}


def check_float32(machine):
    """Yield the checks of the fast model in float32 against plain model.py on the CPU.

    gpu_report.py turns off TF32, which would be too coarse for the tolerance.
    """
    exact = contextlib.nullcontext()
    for arch in ARCHS:
        plain = make_model(arch)
        ours = make_fast_model(arch, machine)
        expected = logits_of(plain, exact) | loss_and_gradients(plain, exact)
        found = logits_of(ours, exact) | loss_and_gradients(ours, exact)
        yield compare(arch, found, expected, 'float32')


def check_formats(machine):
    """Yield the checks of the 16-bit formats against float32."""
    exact = contextlib.nullcontext()
    for arch in ARCHS:
        model = make_fast_model(arch, machine)
        expected = logits_of(model, exact) | loss_and_gradients(model, exact)
        for dtype in ('bfloat16', 'float16'):
            scale = 1024.0 if dtype == 'float16' else 1.0
            context = autocast(machine, dtype)
            found = logits_of(model, context) | loss_and_gradients(model, context, scale)
            yield compare(f'{arch}, {dtype}', found, expected, dtype)


def formats_of(machine):
    """Return a list of float32 and, if it is another, the format in which this machine trains."""
    formats = ['float32']
    if machine.dtype != 'float32':
        formats.append(machine.dtype)
    return formats


def check_compile(machine):
    """Yield the checks of the compiled model against the same model run eagerly."""
    if not machine.can_compile():
        yield note('compile', 'left out', 'it does not work here')
        return
    for arch in ARCHS:
        for dtype in formats_of(machine):
            model = make_fast_model(arch, machine)
            context = autocast(machine, dtype)
            expected = loss_and_gradients(model, context)
            model.compile()
            found = loss_and_gradients(model, context)
            yield compare(f'{arch}, {dtype}', found, expected, dtype)


# ---- Checks: decoding ----------------------------------------------------------------------------
PROMPT_LENGTHS = (5, 16, 9)  # tokens; different, so that the shorter prompts are padded in front
N_NEW = 24  # tokens to continue each prompt with


def make_prompts(model):
    """Return a list of prompts, each a list of token ids, always the same."""
    idx_BT, _ = random_batch(model.config, len(PROMPT_LENGTHS), 'cpu')
    return [row[:length].tolist() for row, length in zip(idx_BT, PROMPT_LENGTHS)]


def decode(model, prompts, compile):
    """Return (tokens_BN, logits_BNV) of greedy decoding with a cache, N = N_NEW steps."""
    tokens = []
    logits = []
    for next_B, logits_BV in engine.generate_with_logits(
            model, prompts, N_NEW, strategy='greedy', compile=compile):
        tokens.append(next_B.clone())  # a CUDA graph's next step overwrites its output
        logits.append(logits_BV.float().clone())
    return torch.stack(tokens, dim=1), torch.stack(logits, dim=1)


@torch.no_grad()
def plain_logits(model, prompts, tokens_BN):
    """Return the logits (B, N, V) that predict the tokens (B, N) after their prompts, uncached."""
    logits = []
    for prompt, tokens_N in zip(prompts, tokens_BN.tolist()):
        text = torch.tensor([prompt + tokens_N[:-1]], device=tokens_BN.device)
        logits_BTV, _ = model(text, all_logits=True)
        logits.append(logits_BTV[0, -len(tokens_N):].float())
    return torch.stack(logits)


def plain_tokens(model, prompts):
    """Return the tokens (B, N) of model.generate, greedy because of top_k=1, prompt by prompt."""
    rows = []
    for prompt in prompts:
        text = torch.tensor([prompt], device=model.lm_head.weight.device)
        rows.append(model.generate(text, N_NEW, top_k=1)[0, len(prompt):])
    return torch.stack(rows)


@torch.no_grad()
def check_cache(machine):
    """Yield the checks of decoding with a cache, eager and compiled, against the plain model.

    In float32 the tokens must be those of model.generate. In 16 bits two logits may be so close
    that rounding decides which is larger, so there only the logits are compared.
    """
    ways = {'eager': False}  # {name: whether to compile}
    if machine.can_compile():
        ways['compiled'] = True
    for arch in ARCHS:
        model = make_fast_model(arch, machine).eval()
        prompts = make_prompts(model)
        for dtype in formats_of(machine):
            for way, compile in ways.items():
                name = f'{arch}, {dtype}, {way}'
                with autocast(machine, dtype):
                    tokens_BN, logits_BNV = decode(model, prompts, compile)
                    expected_BNV = plain_logits(model, prompts, tokens_BN)
                yield compare(name, {'logits': logits_BNV}, {'logits': expected_BNV}, dtype)
                if dtype == 'float32':
                    n_equal = (tokens_BN == plain_tokens(model, prompts)).sum().item()
                    n_all = tokens_BN.numel()
                    yield check(f'{name}, greedy', n_equal == n_all,
                                f'{n_equal} of {n_all} tokens are those of model.generate')


# ---- Checks: runs of train.py --------------------------------------------------------------------
RUN = ['--dataset=tiny', '--n_layer=2', '--n_head=2', '--n_embd=64', '--block_size=64',
       '--batch_size=8', '--gradient_accumulation_steps=2', '--learning_rate=3e-3',
       '--warmup_iters=5', '--max_iters=40', '--lr_decay_iters=40', '--eval_interval=20',
       '--eval_iters=4', '--log_interval=1']
MODERN = ['--arch=modern', '--optimizer=muon']
LEAST_FALL = 0.5  # nats by which the validation loss must fall in these 40 steps
LONGEST = 240  # seconds after which a run counts as hanging, and is killed


def write_data(folder):
    """Write data/tiny into a folder: 100,000 characters of Python's help, in nanoGPT's format.

    That text comes with every Python, so the checks need no network.
    """
    from pydoc_data.topics import topics
    text = '\n\n'.join(topics[name] for name in sorted(topics))[:100_000]
    chars = sorted(set(text))
    data = os.path.join(folder, 'data', 'tiny')
    os.makedirs(data)
    with open(os.path.join(data, 'meta.pkl'), 'wb') as f:
        pickle.dump({'itos': dict(enumerate(chars))}, f)
    tokens = np.array([chars.index(c) for c in text], dtype='<u2')
    n_train = len(tokens) * 9 // 10
    tokens[:n_train].tofile(os.path.join(data, 'train.bin'))
    tokens[n_train:].tofile(os.path.join(data, 'val.bin'))


def launcher(processes):
    """Return the beginning of a command that runs a script in a number of processes."""
    if processes == 1:
        return [sys.executable]
    return [sys.executable, '-m', 'torch.distributed.run', '--standalone',
            f'--nproc_per_node={processes}']


def start_run(folder, name, *arguments, processes=1):
    """Start train.py on the data/tiny of a folder, with name as its out_dir; return the process."""
    command = [*launcher(processes), TRAIN, *RUN, f'--out_dir={name}', *arguments]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def run(folder, name, *arguments, processes=1):
    """Run train.py as start_run does, and wait. Raise RuntimeError if it fails or hangs."""
    process = start_run(folder, name, *arguments, processes=processes)
    try:
        output, _ = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        process.terminate()  # and not kill at once: torchrun can then stop its workers
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=60)
        process.kill()
        raise RuntimeError(f'train.py, run {name}, took over {LONGEST} s') from None
    require_status(0, process, name, output)


def require_status(status, process, name, output):
    """Raise RuntimeError, and show what a run printed, unless it ended with this exit status."""
    if process.returncode != status:
        print(output, file=sys.stderr)
        last_line = output.strip().rpartition('\n')[2]
        raise RuntimeError(f'train.py, run {name}, ended with status {process.returncode}, not '
                           f'{status}: {last_line}')


def run_and_kill(folder, name, *arguments):
    """Start a run and kill it after step 23. Raise RuntimeError if it ends before that.

    Its newest checkpoint is then that of step 20, so the steps since must be made again.
    """
    process = start_run(folder, name, *arguments)
    alarm = threading.Timer(LONGEST, process.kill)  # in case it hangs
    alarm.start()
    output = ''
    for line in process.stdout:
        output += line
        if line.startswith('iter 23:'):
            process.kill()
    process.wait()
    alarm.cancel()
    require_status(-signal.SIGKILL, process, name, output)


def side_by_side(*calls):
    """Call functions at the same time, each in a thread, and wait; raise the first one's error.

    A small run leaves most of a GPU idle and takes long to start, so several take little longer
    than one.
    """
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
    for future in futures:
        future.result()


def logged(folder, name, key):
    """Return what a run has logged under a key: loss, of each step, or val_loss, of evaluations."""
    entries = folio.checkpoint.read_log(os.path.join(folder, name, 'log.jsonl'))
    return [entry[key] for entry in entries if key in entry]


def check_fall(name, val_losses):
    """Return the check that a run has learned something."""
    first = val_losses[0]
    last = val_losses[-1]
    return check(name, first - last > LEAST_FALL,
                 f'validation loss {first:.3f}, then {last:.3f}; must fall by {LEAST_FALL}')


@contextlib.contextmanager
def data_folder():
    """Yield a temporary folder with data/tiny in it."""
    with tempfile.TemporaryDirectory() as folder:
        write_data(folder)
        yield folder


def check_runs(machine):
    """Yield the checks that the losses of short runs fall, in each number format."""
    kinds = [('gpt2', machine.dtype)]
    if machine.type == 'cuda':
        # float16 with both architectures, because it alone needs the loss scaled.
        kinds = [('gpt2', 'bfloat16'), ('gpt2', 'float16'), ('modern', 'float16')]
    with data_folder() as folder:
        names = []
        calls = []
        for arch, dtype in kinds:
            name = f'{arch}, {dtype}'
            names.append(name)
            arguments = [f'--device={machine.device}', f'--dtype={dtype}', f'--arch={arch}']
            calls.append(functools.partial(run, folder, name, *arguments))
        side_by_side(*calls)
        for name in names:
            yield check_fall(name, logged(folder, name, 'val_loss'))


def check_resume(machine):
    """Yield the checks that resumed runs end with the weights of an undisturbed one.

    They train modern with Muon, because with two optimizers there is the most to get wrong.
    """
    arguments = [*MODERN, f'--device={machine.device}', '--deterministic=True']
    with data_folder() as folder:
        def undisturbed():
            run(folder, 'undisturbed', *arguments)

        def resumed():
            run(folder, 'resumed', *arguments, '--max_iters=20')
            run(folder, 'resumed', *arguments, '--init_from=resume')

        def killed():
            run_and_kill(folder, 'killed', *arguments)
            run(folder, 'killed', *arguments, '--init_from=resume')

        side_by_side(undisturbed, resumed, killed)
        yield check_fall('undisturbed', logged(folder, 'undisturbed', 'val_loss'))
        for name in ('resumed', 'killed'):
            yield check_same_weights(name, folder, 'undisturbed')


def check_same_weights(name, folder, other):
    """Return the check that two runs in a folder have the same weights, bit for bit."""
    ours = folio.checkpoint.load(os.path.join(folder, name, 'ckpt.pt'))['model']
    theirs = folio.checkpoint.load(os.path.join(folder, other, 'ckpt.pt'))['model']
    n_equal = 0
    largest = 0.0
    for key, weight in theirs.items():
        n_equal += torch.equal(ours[key], weight)
        largest = max(largest, (ours[key] - weight).abs().max().item())
    return check(f'{name}, as {other}', n_equal == len(theirs),
                 f'{n_equal} of {len(theirs)} tensors are equal, the largest difference is '
                 f'{largest:.1e}')


def check_processes(machine, n=None):
    """Yield the checks that several processes have the losses of one, with DDP and with FSDP.

    n: number of processes; None: one for each GPU of this machine.
    """
    if n is None:
        n = torch.cuda.device_count()
    if n < 2:
        yield note('DDP and FSDP', 'left out', 'they need several GPUs')
        return
    tolerance = 2e-3  # nats; sums in another order are rounded differently, and products are TF32
    arguments = [*MODERN, f'--device={machine.type}', '--dtype=float32', '--max_iters=10',
                 f'--gradient_accumulation_steps={n}', '--batch_size=4']
    with data_folder() as folder:
        run(folder, 'one', *arguments)
        expected = logged(folder, 'one', 'loss')
        for name, option in (('DDP', '--fsdp=False'), ('FSDP', '--fsdp=True')):
            run(folder, name, *arguments, option, processes=n)
            pairs = zip(logged(folder, name, 'loss'), expected, strict=True)
            largest = max(abs(ours - theirs) for ours, theirs in pairs)
            yield check(f'{name}, {n} processes', largest <= tolerance,
                        f'losses of 10 steps differ by {largest:.1e} at most; '
                        f'tolerance {tolerance:g}')
