"""
Speed of what a config trains: the training step, its data, text from the model; beside its peers; to a given loss.
    python bench.py config/train_fineweb.py --batch_size=32
    python bench.py config/train_book.py --profile=True
    python bench.py config/train_fineweb.py --peers=all --batch_size=4 --block_size=256 --gradient_accumulation_steps=1
    python bench.py --race=True

Prints a table: tokens a second, MFU where the GPU is known, peak memory. It takes train.py's settings (python train.py
--help lists them) and config files, and measures one process. Where the data set is missing, random tokens do.
"""
import dataclasses
import os
import statistics
import sys
import time
import types
from json import dump

import numpy as np
import torch

import folio.checkpoint
from folio import engine
from folio import fast
from extras import peers as peer
from folio.configurator import UserError, configure
from folio.data import Dataset, eval_batches, train_batch
from folio.machine import Machine
from model import GPT, GPTConfig
from folio.optim import make_optimizers

# ---- Settings: these and train.py's ----------------------------------------------------------------------------------
steps = 20  # training steps to time
prompt_tokens = 256  # of each prompt to continue
new_tokens = 64  # of its continuation
decode_batch = 1  # prompts that are continued at once
quantize = ''  # int8: decode with weights of 8 bits (on a CPU), and say what that costs in perplexity
profile = False  # show where the time of three steps goes, and write out_dir/trace.json for a trace viewer
peers = ''  # instead: all, or some of training, decoding, muon, tokenizing, hellaswag, beside who else does it
texts = ''  # for --peers=tokenizing: documents, a pattern like 'my/*.parquet'
race = False  # instead: the seconds until a loss of two runs, each in a process of its own, in turn
race_ours = 'config/train_book.py --n_head=2 --block_size=128 --max_iters=260 --lr_decay_iters=260 --cooldown_iters=208'
race_theirs = 'config/train_book_nanogpt.py --eval_interval=2000'
race_loss = 1.575  # validation loss to reach
rounds = 3  # of the peers and the race
json = ''  # write the figures to this file as well


def read_settings():
    """The settings of train.py and these, with what the config files and the command line say."""
    own = {k: v for k, v in globals().items() if k[0].islower() and type(v) in (bool, int, float, str)}
    trainer = {}
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train.py'), encoding='utf-8') as f:
        exec(f.read().partition('\nconfig = configure(')[0], trainer)  # its imports and settings, which stand first
    trainer = {k: v for k, v in trainer.items() if type(v) in (bool, int, float, str)}
    s = types.SimpleNamespace(**configure(own | trainer | {'__doc__': __doc__, '__file__': __file__}))
    counts = ('steps', 'rounds', 'prompt_tokens', 'new_tokens', 'decode_batch', 'batch_size', 'block_size',
              'gradient_accumulation_steps')
    if min(getattr(s, name) for name in counts) < 1:
        raise UserError(f'{", ".join(counts)} must be at least 1')
    if s.quantize not in ('', 'int8'):
        raise UserError(f'quantize is {s.quantize!r}; it may be int8')
    if s.peers and s.new_tokens > 100:
        raise UserError(f'new_tokens is {s.new_tokens}; --peers decodes at most 100, after 900 of a context of 1,024')
    if s.json and not os.path.isdir(os.path.dirname(s.json) or '.'):
        raise UserError(f'{s.json}: there is no such folder')
    return s


# ---- The table -------------------------------------------------------------------------------------------------------
figures = {}


def show(name, value, unit, comment=''):
    figures[name] = value
    print(f'{name:<34}{value:>14,.4g} {unit:<10} {comment}'.rstrip() if value < 100 else
          f'{name:<34}{value:>14,.0f} {unit:<10} {comment}'.rstrip(), flush=True)


def seconds(function, times, wait):
    """The median time of a call, each waited for."""
    taken = []
    for i in range(times):
        wait()
        clock = time.perf_counter()
        function(i)
        wait()
        taken.append(time.perf_counter() - clock)
    return statistics.median(taken)


# ---- Training step ---------------------------------------------------------------------------------------------------
def measure_training(s, machine, model, tokens):
    optimizers = make_optimizers(model, s.optimizer, s.learning_rate, s.muon_learning_rate, s.weight_decay,
                                 (s.beta1, s.beta2))
    step_tokens = s.gradient_accumulation_steps * s.batch_size * s.block_size

    def batch(step, micro_step):
        return train_batch(tokens, None, s.block_size, s.batch_size, s.gradient_accumulation_steps, s.seed, step,
                           micro_step)

    def train_step(step):
        for micro_step in range(s.gradient_accumulation_steps):
            idx_BT, targets_BT = (t.to(machine.device, non_blocking=True) for t in batch(step, micro_step))
            with machine.autocast:
                _, loss = model(idx_BT, targets_BT)
            (loss / s.gradient_accumulation_steps).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip if s.grad_clip > 0 else float('inf'))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    clock = time.perf_counter()
    for i in range(3):  # the first compiles, the second meets the optimizer's new state
        train_step(i)
    machine.wait()
    show('warm-up, 3 steps', time.perf_counter() - clock, 's')
    if s.profile:
        with torch.profiler.profile() as profiler:
            for i in range(3):
                train_step(i)
            machine.wait()
        where_time_goes = f'self_{"cuda" if machine.type == "cuda" else "cpu"}_time_total'
        print(profiler.key_averages().table(sort_by=where_time_goes, row_limit=20))
        os.makedirs(s.out_dir, exist_ok=True)
        profiler.export_chrome_trace(os.path.join(s.out_dir, 'trace.json'))
    if machine.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    step_seconds = seconds(train_step, s.steps, machine.wait)
    show('training step', 1000 * step_seconds, 'ms', f'median of {s.steps}')
    show('training', step_tokens / step_seconds, 'tokens/s')
    if machine.peak_flops:
        show('training, MFU', 100 * model.flops_per_token() * step_tokens / step_seconds / machine.peak_flops, '%',
             f'of {machine.peak_flops / 1e12:.0f} TFLOP/s')
    if machine.type == 'cuda':
        show('training, peak memory', torch.cuda.max_memory_allocated() / 2**20, 'MiB', 'of the GPU')
    elif sys.platform != 'win32':
        import resource
        unit = 2**20 if sys.platform == 'darwin' else 2**10  # macOS counts bytes, Linux KiB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        show('training, peak memory', peak, 'MiB', 'of the process')
    batch_seconds = seconds(lambda i: batch(i, 0), 20, machine.wait)
    show('batches from token files', s.batch_size * s.block_size / batch_seconds, 'tokens/s',
         f'{100 * batch_seconds * s.gradient_accumulation_steps / step_seconds:.2g} % of a step')


# ---- Text ------------------------------------------------------------------------------------------------------------
def measure_text(s, machine, model, tokens):
    length = min(s.prompt_tokens, max(1, s.block_size - s.new_tokens))
    prompts = np.resize(tokens[:s.decode_batch * length], (s.decode_batch, length)).astype(np.int64).tolist()
    prefills, decodes = [], []
    for i in range(4):
        machine.wait()
        clock = time.perf_counter()
        with machine.autocast:
            for n, next_B in enumerate(engine.generate(model, prompts, s.new_tokens, strategy='greedy')):
                if n == 0:
                    machine.wait()
                    first = time.perf_counter() - clock
        machine.wait()
        if i > 0:  # the first run warms up
            prefills, decodes = prefills + [first], decodes + [time.perf_counter() - clock - first]
    of = f'{s.decode_batch} x {length} tokens of prompt'
    show('prefill', s.decode_batch * length / statistics.median(prefills), 'tokens/s', of)
    if s.new_tokens > 1:
        show('decoding', s.decode_batch * (s.new_tokens - 1) / statistics.median(decodes), 'tokens/s', of)


@torch.no_grad()
def perplexity(s, model, tokens):
    """Over some 8,192 tokens. From the logits: of quantized weights no loss is made."""
    total, count = 0.0, 0
    for idx_BT, targets_BT in eval_batches(tokens, None, s.block_size, 1, -(-8192 // s.block_size)):
        logits_TV, target_T = model(idx_BT, all_logits=True)[0][0], targets_BT[0]
        total += torch.nn.functional.cross_entropy(logits_TV, target_T, ignore_index=-1, reduction='sum').item()
        count += (target_T != -1).sum().item()
    return np.exp(total / count)


# ---- The script ------------------------------------------------------------------------------------------------------
def main():
    s = read_settings()
    machine = Machine(s.device, s.dtype)
    if machine.world_size > 1:
        raise UserError('bench.py measures one process: python bench.py; for several, train.py logs their tokens/s')
    if s.race:
        for row in peer.race(s):
            show(*row)
    else:
        measure(s, machine)
    if s.json:
        with open(s.json, 'w', encoding='utf-8') as f:
            dump(figures | {'machine': str(machine), 'date': time.strftime('%Y-%m-%d')}, f, indent=2)


def measure(s, machine):
    compiled = (machine.type == 'cuda' if s.compile == 'auto' else s.compile) and machine.can_compile()
    try:
        data = Dataset(s.dataset)
        tokens, vocab_size, where = data.tokens('train'), data.vocab_size, data.folder
    except UserError:
        vocab_size, where = 50257, 'random tokens'
        tokens = np.random.RandomState(0).randint(vocab_size, size=max(2**22, 2 * s.block_size)).astype('<u2')
    torch.manual_seed(s.seed)
    if s.init_from == 'scratch':
        model = GPT(GPTConfig(**{f.name: getattr(s, f.name, vocab_size) for f in dataclasses.fields(GPTConfig)}))
    else:
        model = GPT.from_pretrained(folio.checkpoint.load(s.init_from, s.out_dir))
        s.block_size = min(s.block_size, model.config.block_size)
    n_parameters, sizes = sum(p.numel() for p in model.parameters()), (s.batch_size, s.block_size)
    sizes = (s.gradient_accumulation_steps, *sizes)
    print(f'{machine}, compile {compiled}\n{model.config.arch}, {n_parameters / 1e6:.2f} M parameters; {where}; '
          f'{" x ".join(map(str, sizes))} = {np.prod(sizes):,} tokens a step')
    if s.peers:
        for row in peer.compare(s, machine, model.config, compiled, tokens):
            show(*row)
        return
    fast.accelerate(model).to(machine.device)
    if compiled:
        model.compile()
    if not s.quantize:
        measure_training(s, machine, model, tokens)
    elif machine.type != 'cpu':
        raise UserError('quantize=int8 is for CPUs, where decoding waits for memory; give --device=cpu')
    else:
        before = perplexity(s, model.eval(), tokens)
        show('perplexity, int8 weights', perplexity(s, fast.quantize(model), tokens), '', f'{before:.4f} without')
    measure_text(s, machine, model, tokens)


if __name__ == '__main__':  # processes that tokenize for the peers read this file too
    main()
