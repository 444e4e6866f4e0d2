"""
The same work by us and by what a user would pick instead, in turn in one process; bench.py prints it.
    python bench.py config/train_fineweb.py --peers=all --batch_size=4 --block_size=256 --gradient_accumulation_steps=1

A peer that is not installed is left out, and so is work for which no data is given (--texts, --hellaswag_source).
"""
import copy
import dataclasses
import functools
import importlib.util
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the root
from prepare import documents
import hellaswag
import folio.tokenizer
from folio.configurator import UserError
from folio.hugging_face import to_hugging_face
from folio import engine
from folio import fast
from folio.fast import quantize
from model import GPT
from folio.optim import make_optimizers


def in_turn(wait, times, *functions):
    """The median seconds of each function, called in turn: what slows the machine down slows all of them."""
    taken = [[] for _ in functions]
    for _ in range(times):
        for function, results in zip(functions, taken):
            wait()
            clock = time.perf_counter()
            function()
            wait()
            results.append(time.perf_counter() - clock)
    return [statistics.median(results) for results in taken]


def row(name, ours, theirs, unit, whose):
    """(name, ratio, 'x', comment) of two speeds."""
    return name, ours / theirs, 'x', f'{ours:,.4g} {unit}; {whose} {theirs:,.4g}'


def compare(s, machine, config, compiled, tokens):
    """Rows for the table, (name, ratio of speeds, 'x', comment): above 1 ours is the faster one. s: settings."""
    works = {'training': lambda: compare_training(s, machine, config, compiled, tokens),
             'decoding': lambda: compare_decoding(s, machine, config),
             'muon': lambda: compare_muon(s, machine, config),
             'tokenizing': lambda: compare_tokenizing(s.texts, s.rounds),
             'hellaswag': lambda: compare_hellaswag(s, machine, config)}
    needs = {'training': 'transformers', 'decoding': 'transformers', 'hellaswag': 'transformers'}
    asked = list(works) if s.peers == 'all' else s.peers.split(',')
    if not set(asked) <= works.keys():
        raise UserError(f'peers is {s.peers!r}; it may be all, or some of {",".join(works)}')
    for name in asked:
        if name in needs and not importlib.util.find_spec(needs[name]):
            print(f'{name} is left out: pip install {needs[name]}')
        elif name in ('tokenizing', 'hellaswag') and not (s.texts if name == 'tokenizing' else s.hellaswag_source):
            print(f"{name} is left out: give --{'texts' if name == 'tokenizing' else 'hellaswag_source'}=")
        else:
            yield from works[name]()


def in_transformers(model):
    """The same model, with the same weights, in transformers."""
    import transformers
    hf, tensors = to_hugging_face(model.config, model.state_dict(), None)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**hf))
    missing, unexpected = theirs.load_state_dict(tensors, strict=False)
    assert set(missing) <= {'lm_head.weight'} and not unexpected, 'all weights have a place there'
    return theirs.to(model.lm_head.weight.device).eval()


# ---- Models ----------------------------------------------------------------------------------------------------------
def compare_training(s, machine, config, compiled, tokens):
    """A step with AdamW: transformers' with its own loss, compiled if it can be; ours compiled if settings say so."""
    ours = fast.accelerate(GPT(dataclasses.replace(config, dropout=0.0))).to(machine.device)
    theirs = in_transformers(ours)
    B, T = s.batch_size, s.block_size
    idx_BT = torch.from_numpy(np.resize(tokens[:B * T], (B, T)).astype(np.int64)).to(machine.device)
    targets_BT = F.pad(idx_BT[:, 1:], (0, 1), value=-1)
    losses = {'ours': lambda: ours(idx_BT, targets_BT)[1],
              'theirs': lambda: theirs(idx_BT, labels=idx_BT, use_cache=False).loss}
    with torch.no_grad(), machine.autocast:
        a, b = (loss().item() for loss in losses.values())
    assert abs(a - b) < (1e-4 if machine.dtype == 'float32' else 0.02), f'not the same work: loss {a} and {b}'
    theirs_compiled = machine.can_compile()
    if compiled:
        ours.compile()
    if theirs_compiled:
        theirs.compile()
    optimizers = {'ours': torch.optim.AdamW(ours.parameters(), fused=True),
                  'theirs': torch.optim.AdamW(theirs.parameters(), fused=True)}

    def step(name):
        with machine.autocast:
            loss = losses[name]()
        loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad(set_to_none=True)
    steps = [functools.partial(step, name) for name in losses]
    in_turn(machine.wait, 2, *steps)
    a, b = in_turn(machine.wait, s.steps, *steps)
    yield row('training step' + ', compiled' * compiled, B * T / a, B * T / b, 'tokens/s',
              'transformers' + ', compiled' * theirs_compiled)


def compare_decoding(s, machine, config):
    """Greedy decoding with a cache, the prompt not counted: 1 and 8 rows, after 16 tokens and late in the context."""
    config = dataclasses.replace(config, block_size=1024)
    ours = fast.accelerate(GPT(config)).to(machine.device).eval()
    theirs = in_transformers(ours)
    int8 = quantize(copy.deepcopy(ours)) if machine.type == 'cpu' else None
    n = s.new_tokens

    def by_us(model, idx_BT, n):
        return torch.stack(list(engine.generate(model, idx_BT, n, strategy='greedy')), dim=1)

    def by_them(idx_BT, n):
        return theirs.generate(idx_BT, attention_mask=torch.ones_like(idx_BT), max_new_tokens=n, min_new_tokens=n,
                               do_sample=False, use_cache=True, pad_token_id=0)[:, idx_BT.size(1):]
    for B, T in ((1, 16), (1, 256), (1, 900), (8, 16)):
        idx_BT = torch.randint(config.vocab_size, (B, T), device=machine.device)
        works = [functools.partial(by_us, ours, idx_BT), functools.partial(by_them, idx_BT)]
        works += [functools.partial(by_us, int8, idx_BT)] if int8 else []
        with torch.no_grad(), machine.autocast:
            times = in_turn(machine.wait, s.rounds, *(functools.partial(work, k) for work in works for k in (1, 1 + n)))
        rates = [B * n / (long - short) for short, long in zip(times[::2], times[1::2])]
        yield row(f'decoding, {B} x {T} tokens', rates[0], rates[1], 'tokens/s', 'transformers')
        if int8:
            yield row(f'decoding, {B} x {T} tokens, int8', rates[2], rates[1], 'tokens/s', 'transformers, float32')


def compare_muon(s, machine, config):
    """A step of the matrices of the blocks: of our Muon, and of torch's, which has them one after another."""
    model = GPT(config).to(machine.device)
    ours = make_optimizers(model, 'muon', 1e-3, 0.02, 0.0, (0.9, 0.95))[1]
    matrices = [p for group in ours.param_groups for p in group['params']]
    theirs = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0)
    for p in matrices:
        p.grad = torch.randn_like(p)
    a, b = in_turn(machine.wait, s.rounds, ours.step, theirs.step)
    yield row("Muon's step", 1 / a, 1 / b, 'steps/s', "torch's")


# ---- Tokenizers ------------------------------------------------------------------------------------------------------
def compare_tokenizing(pattern, rounds):
    """Learning a BPE of 32,000 tokens, and GPT-2's tokens to disk, against a pool that gets document by document."""
    installed = [name for name in LEARNERS if importlib.util.find_spec(name)]
    for name in LEARNERS.keys() - set(installed):
        print(f'{name} is left out: pip install {name}')
    files = documents.source_files(pattern)
    texts = [text for file in files for _, some in documents.read_chunks(file, 'text') for text in some]
    size = sum(map(len, texts)) / 1e6
    a, *others = in_turn(lambda: None, rounds, lambda: folio.tokenizer.train_bpe(texts, 32000),
                         *(functools.partial(LEARNERS[name], texts) for name in installed))
    for name, b in zip(installed, others):
        yield row(f'learning a BPE of 32,000, {name}', size / a, size / b, 'M characters/s', name)
    gpt2 = folio.tokenizer.load('gpt2')
    with tempfile.TemporaryDirectory() as folder, \
            multiprocessing.get_context('spawn').Pool(documents.n_cores(), start_peer) as their_pool:
        path, counts = os.path.join(folder, 'tokens.bin'), []

        def write(chunks):
            with open(path, 'wb') as f:
                counts.append(sum(f.write(tokens.astype('<u2').tobytes()) // 2 for tokens in chunks))
        works = [lambda: write(tokens for file in files for _, tokens in documents.tokenize(file, gpt2)),
                 lambda: write(their_pool.imap(encode_document, (text for file in files for _, some in
                                                                 documents.read_chunks(file, 'text') for text in some),
                                               chunksize=16))]
        in_turn(lambda: None, 1, *works)  # the processes start
        a, b = in_turn(lambda: None, rounds, *works)
    assert len(set(counts)) == 1, f'not the same work: {counts} tokens'
    yield row('tokenizing to a file', counts[0] / a / 1e6, counts[0] / b / 1e6, 'M tokens/s', 'a document a task')


def learn_by_tokenizers(texts):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=32000, special_tokens=[folio.tokenizer.EOT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))


def learn_by_rustbpe(texts):
    import rustbpe
    rustbpe.Tokenizer().train_from_iterator(iter(texts), 31999, pattern=folio.tokenizer.SPLIT_PATTERN)


LEARNERS = {'tokenizers': learn_by_tokenizers, 'rustbpe': learn_by_rustbpe}


def start_peer():
    global encoding
    encoding = tiktoken.get_encoding('gpt2')


def encode_document(text):
    return np.array([encoding.eot_token, *encoding.encode_ordinary(text)], dtype=np.uint16)


# ---- HellaSwag -------------------------------------------------------------------------------------------------------
def compare_hellaswag(s, machine, config, limit=100):
    """Scoring items against transformers with an item, four rows, in each forward pass."""
    if config.vocab_size < 50257:
        raise UserError("hellaswag is compared with GPT-2's tokens; this vocabulary is smaller: give another config")
    items, config = hellaswag.load(s.hellaswag_source)[:limit], dataclasses.replace(config, block_size=1024)
    ours = fast.accelerate(GPT(config)).to(machine.device).eval()
    theirs, gpt2, scores = in_transformers(ours), folio.tokenizer.load('gpt2'), {}

    def by_us():
        scores['ours'] = hellaswag.score(ours, items, gpt2, machine)[0]

    @torch.no_grad()
    def by_them():
        scores['theirs'] = torch.zeros(len(items), 4, dtype=torch.float64)
        for i, item in enumerate(items):
            rows = hellaswag.render(item, gpt2, config.block_size)
            rows_B = [torch.tensor(context + ending) for context, ending in rows]
            idx_BT = torch.nn.utils.rnn.pad_sequence(rows_B, batch_first=True).to(machine.device)
            with machine.autocast:
                logits_BTV = theirs(idx_BT[:, :-1], use_cache=False).logits
            loss_N = F.cross_entropy(logits_BTV.flatten(0, 1), idx_BT[:, 1:].flatten(), reduction='none')
            loss_BT = loss_N.view(len(rows), -1)
            for choice, (context, ending) in enumerate(rows):
                scores['theirs'][i, choice] = -loss_BT[choice, len(context) - 1:][:len(ending)].sum()
    a, b = in_turn(machine.wait, s.rounds, by_us, by_them)
    name, ratio, unit, comment = row('HellaSwag', len(items) / a, len(items) / b, 'items/s', 'an item a forward pass')
    apart = (scores['ours'] - scores['theirs']).abs().max().item()
    yield name, ratio, unit, f'{comment}; the scores differ by {apart:.0e} at most'


# ---- The race --------------------------------------------------------------------------------------------------------
def seconds_to(loss, arguments, out_dir):
    """(seconds, loss reached) of a training run, from its start until it prints a validation loss of at most `loss`."""
    command = [sys.executable, '-u', os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train.py'),
               *shlex.split(arguments), f'--out_dir={out_dir}']
    clock, best = time.perf_counter(), float('inf')
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if ': val loss ' in line:
                best = min(best, float(line.partition(': val loss ')[2].partition(',')[0]))
            if best <= loss:
                taken = time.perf_counter() - clock
                process.kill()
                return taken, best
    if process.returncode:
        raise UserError(f'train.py {arguments} failed; what it says stands above')
    raise UserError(f'{arguments} ended with a loss of {best}, above {loss}: give it more steps, or raise --race_loss')


def race(s):
    """Rows for the table: the seconds that two runs take to one loss, in turn."""
    runs, taken = (s.race_ours, s.race_theirs), ([], [])
    for i in range(s.rounds):
        for number, arguments in enumerate(runs):
            result, loss = seconds_to(s.race_loss, arguments, os.path.join(s.out_dir, 'race', str(number)))
            taken[number].append(result)
            print(f'round {i + 1}: loss {loss:.4f} in {result:.1f} s: {arguments}', flush=True)
    a, b = (statistics.median(results) for results in taken)
    yield f'race to {s.race_loss}', a, 's', s.race_ours
    yield f'race to {s.race_loss}, theirs', b, 's', s.race_theirs
    yield 'race, share of the time', a / b, '', 'ours / theirs'
