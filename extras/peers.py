"""
Measure the same work done by folio and by what one would use instead, in turn in one process.
    python extras/peers.py config/train_fineweb.py --which=training --batch_size=4 --block_size=256
    python extras/peers.py --which=tokenizing --texts='my/*.parquet'
    python extras/peers.py --which=race

Prints a table of ratios: above 1, folio is the faster one. It takes train.py's config files and
settings, as bench.py does. A peer that is not installed is left out, and so is work for which no
data is given (--texts, --hellaswag_source). The race is between two training runs, each in a
process of its own: the seconds until they reach a loss.

Needs model.py, train.py, bench.py, hellaswag.py, folio/ and prepare/documents.py; transformers,
tokenizers and rustbpe to compare with.
"""
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

sys.path.insert(0, os.path.abspath(__file__ + '/../..'))  # the root of the checkout
import folio  # first: it sets what torch reads when it is loaded
import numpy as np
import tiktoken
import torch
import torch.nn.functional as F

import folio.tokenizer
import hellaswag
from bench import TRAIN, one_process, read_settings, set_up, show, write_metrics
from folio import engine, fast
from folio.configurator import UserError
from folio.hugging_face import to_hugging_face
from folio.optim import make_optimizers
from model import GPT
from prepare import documents

# ---- Settings: these and train.py's --------------------------------------------------------------
which = 'all'  # some of training,decoding,muon,tokenizing,hellaswag,race; all: all but the race
steps = 20  # training steps to time
new_tokens = 64  # decoding: tokens to generate, at most 100
texts = ''  # tokenizing: documents, a pattern like 'my/*.parquet'
hellaswag_source = ''  # hellaswag: a file of items in its format
rounds = 3  # of all work but training
# The race: arguments of train.py
race_ours = ('config/train_book.py --n_head=2 --block_size=64 --batch_size=16 '
             '--learning_rate=12e-3 --muon_learning_rate=0.03 --warmup_iters=10 --max_iters=210 '
             '--lr_decay_iters=210 --cooldown_iters=168 --eval_interval=210')
race_theirs = 'config/train_book_nanogpt.py --eval_interval=2000'
race_loss = 1.575  # validation loss to reach
json = ''  # write the measurements to this file as well

COMPARISONS = ('training', 'decoding', 'muon', 'tokenizing', 'hellaswag')
BPE_SIZE = 32000  # tokens of the BPE that is learned
N_ITEMS = 100  # of HellaSwag, the first ones


# ---- Timing --------------------------------------------------------------------------------------
def time_in_turn(wait, times, *functions):
    """Return the median seconds of each function.

    They are called in turn, so that whatever slows the machine down slows all of them. wait() waits
    for the device.
    """
    taken = [[] for _ in functions]
    for _ in range(times):
        for function, results in zip(functions, taken):
            wait()
            start = time.perf_counter()
            function()
            wait()
            results.append(time.perf_counter() - start)
    return [statistics.median(results) for results in taken]


def no_wait():
    """Return at once: what runs on the CPU is done when its call returns."""


def ratio(name, ours, theirs, unit, peer):
    """Return a row of the table, (name, value, unit, comment), for two speeds in the same unit."""
    return name, ours / theirs, 'x', f'{ours:,.4g} {unit}; {peer} {theirs:,.4g}'


def in_transformers(model):
    """Return the same model, with the same weights, in transformers."""
    import transformers
    hf, tensors = to_hugging_face(model.config, model.state_dict(), None)
    config = transformers.AutoConfig.for_model(**hf)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    # A tied head is not among the tensors: transformers ties it itself.
    missing, unexpected = theirs.load_state_dict(tensors, strict=False)
    assert set(missing) <= {'lm_head.weight'} and not unexpected, 'all weights have a place there'
    return theirs.to(model.lm_head.weight.device).eval()


# ---- Models --------------------------------------------------------------------------------------
def compare_training(s, machine, config, compiled, tokens):
    """Yield the row of a training step with AdamW, against transformers with its own loss.

    Theirs is compiled where that works, ours where the settings say so.
    """
    ours = fast.accelerate(GPT(dataclasses.replace(config, dropout=0.0))).to(machine.device)
    theirs = in_transformers(ours)
    shape = (s.batch_size, s.block_size)
    n_tokens = s.batch_size * s.block_size
    idx_BT = torch.from_numpy(np.resize(tokens[:n_tokens], shape).astype(np.int64))
    idx_BT = idx_BT.to(machine.device)
    targets_BT = F.pad(idx_BT[:, 1:], (0, 1), value=-1)

    def our_loss():
        return ours(idx_BT, targets_BT)[1]

    def their_loss():
        return theirs(idx_BT, labels=idx_BT, use_cache=False).loss

    # Equal losses show that both are given the same work.
    with torch.no_grad(), machine.autocast:
        difference = abs(our_loss().item() - their_loss().item())
    tolerance = 1e-4 if machine.dtype == 'float32' else 0.02
    assert difference < tolerance, f'not the same work: the losses differ by {difference}'

    name = 'training step'
    peer = 'transformers'
    if machine.can_compile():
        theirs.compile()
        peer += ', compiled'
    if compiled:
        ours.compile()
        name += ', compiled'

    def make_step(model, loss_of_model):
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def step():
            with machine.autocast:
                loss = loss_of_model()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return step

    our_step = make_step(ours, our_loss)
    their_step = make_step(theirs, their_loss)
    # The first steps compile, and make the optimizers' state.
    time_in_turn(machine.synchronize, 2, our_step, their_step)
    our_seconds, their_seconds = time_in_turn(machine.synchronize, s.steps, our_step, their_step)
    yield ratio(name, n_tokens / our_seconds, n_tokens / their_seconds, unit='tokens/s', peer=peer)


def compare_decoding(s, machine, config):
    """Yield the rows of greedy decoding with a cache, the prompt not counted, against transformers.

    One row and eight, after 16 tokens and late in the context.
    """
    config = dataclasses.replace(config, block_size=1024)
    ours = fast.accelerate(GPT(config)).to(machine.device).eval()
    theirs = in_transformers(ours)

    def generate_ours(idx_BT, n_tokens):
        return torch.stack(list(engine.generate(ours, idx_BT, n_tokens, strategy='greedy')), dim=1)

    def generate_theirs(idx_BT, n_tokens):
        # As many tokens as ours in any case: at least and at most n_tokens.
        return theirs.generate(
            idx_BT, attention_mask=torch.ones_like(idx_BT), max_new_tokens=n_tokens,
            min_new_tokens=n_tokens, do_sample=False, use_cache=True, pad_token_id=0)

    for B, T in ((1, 16), (1, 256), (1, 900), (8, 16)):
        idx_BT = torch.randint(config.vocab_size, (B, T), device=machine.device)
        # Each runs for 1 token and for 1 + n: the difference is n tokens without the prompt.
        calls = []
        for generate in (generate_ours, generate_theirs):
            calls.append(functools.partial(generate, idx_BT, 1))
            calls.append(functools.partial(generate, idx_BT, 1 + s.new_tokens))
        with torch.no_grad(), machine.autocast:
            times = time_in_turn(machine.synchronize, s.rounds, *calls)
        speeds = []
        for short, long in zip(times[::2], times[1::2]):
            speeds.append(B * s.new_tokens / (long - short))
        yield ratio(f'decoding, {B} x {T} tokens', *speeds, unit='tokens/s', peer='transformers')


def compare_muon(s, machine, config):
    """Yield the row of Muon's step for the matrices of the blocks, against torch's.

    On a GPU ours takes matrices of one shape together; torch's goes one after another.
    """
    model = GPT(config).to(machine.device)
    _, ours = make_optimizers(model, 'muon', learning_rate=1e-3, muon_learning_rate=0.02,
                              weight_decay=0.0, betas=(0.9, 0.95))
    matrices = [p for group in ours.param_groups for p in group['params']]
    theirs = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0)
    # A step takes as long for random gradients as for real ones.
    for p in matrices:
        p.grad = torch.randn_like(p)
    our_seconds, their_seconds = time_in_turn(machine.synchronize, s.rounds, ours.step,
                                              theirs.step)
    yield ratio("Muon's step", 1 / our_seconds, 1 / their_seconds, unit='steps/s', peer="torch's")


# ---- Tokenizers ----------------------------------------------------------------------------------
def read_texts(files):
    """Yield the documents of some files, one str each."""
    for file in files:
        for _, documents_of_chunk in documents.read_chunks(file, 'text'):
            yield from documents_of_chunk


def compare_learning(s, files):
    """Yield the rows of learning a BPE, against each of the two packages that is installed."""
    corpus = list(read_texts(files))
    n_million = sum(len(text) for text in corpus) / 1e6  # characters
    learners = {'tokenizers': learn_by_tokenizers, 'rustbpe': learn_by_rustbpe}
    for name in list(learners):
        if importlib.util.find_spec(name) is None:
            print(f'{name} is left out: pip install {name}')
            del learners[name]

    # Ours counts in this process: those of a pool would import this script, and torch with it. The
    # others take all cores that they may use; `taskset -c 0` in front compares them on one.
    calls = [functools.partial(folio.tokenizer.train_bpe, corpus, BPE_SIZE)]
    for learn in learners.values():
        calls.append(functools.partial(learn, corpus))
    our_seconds, *their_seconds = time_in_turn(no_wait, s.rounds, *calls)
    for name, seconds in zip(learners, their_seconds):
        yield ratio(f'learning a BPE of {BPE_SIZE:,}, {name}', n_million / our_seconds,
                    n_million / seconds, unit='M characters/s', peer=name)


def learn_by_tokenizers(corpus):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_SIZE, special_tokens=[folio.tokenizer.EOT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(corpus, trainer)


def learn_by_rustbpe(corpus):
    import rustbpe
    vocab_size = BPE_SIZE - 1  # it has no end-of-text token
    learner = rustbpe.Tokenizer()
    learner.train_from_iterator(iter(corpus), vocab_size, pattern=folio.tokenizer.SPLIT_PATTERN)


def compare_encoding(s, files):
    """Yield the row of writing GPT-2's tokens to a file, against a pool that gets single documents.

    The pool is what nanoGPT's and build-nanogpt's prepare scripts use.
    """
    gpt2 = folio.tokenizer.load('gpt2')
    counts = []  # tokens written, by each call

    def write(path, arrays):
        n_tokens = 0
        with open(path, 'wb') as f:
            for tokens in arrays:
                f.write(tokens.astype('<u2').tobytes())
                n_tokens += len(tokens)
        counts.append(n_tokens)

    def tokenize_ours():
        for file in files:
            for _, tokens in documents.tokenize(file, gpt2):
                yield tokens

    def tokenize_theirs(pool):
        return pool.imap(encode_document, read_texts(files), chunksize=16)

    spawn = multiprocessing.get_context('spawn')
    with tempfile.TemporaryDirectory() as folder, \
            spawn.Pool(documents.n_cores(), initializer=load_encoding) as pool:
        path = os.path.join(folder, 'tokens.bin')
        calls = [lambda: write(path, tokenize_ours()), lambda: write(path, tokenize_theirs(pool))]
        time_in_turn(no_wait, 1, *calls)  # the processes start
        our_seconds, their_seconds = time_in_turn(no_wait, s.rounds, *calls)
    assert len(set(counts)) == 1, f'not the same work: {counts} tokens'
    n_million = counts[0] / 1e6
    yield ratio('tokenizing to a file', n_million / our_seconds, n_million / their_seconds,
                unit='M tokens/s', peer='a document a task')


def load_encoding():
    """Load GPT-2's tokenizer into a process of the pool, once, for all of its documents."""
    global encoding
    encoding = tiktoken.get_encoding('gpt2')


def encode_document(text):
    """Return the tokens of a document, with an end-of-text token in front."""
    return np.array([encoding.eot_token, *encoding.encode_ordinary(text)], dtype=np.uint16)


# ---- HellaSwag -----------------------------------------------------------------------------------
def compare_hellaswag(s, machine, config):
    """Yield the row of scoring items, against transformers with one item, four rows, in a pass."""
    if config.vocab_size < 50257:
        raise UserError("hellaswag is compared with GPT-2's tokens; this vocabulary is smaller: "
                        'give another config')
    items = hellaswag.load(s.hellaswag_source)[:N_ITEMS]
    config = dataclasses.replace(config, block_size=1024)
    ours = fast.accelerate(GPT(config)).to(machine.device).eval()
    theirs = in_transformers(ours)
    gpt2 = folio.tokenizer.load('gpt2')
    rows = hellaswag.render(items, gpt2, config.block_size)
    scores = {}  # the log-probability of each ending, (items, 4)

    def score_ours():
        scores['ours'], _ = hellaswag.score(ours, rows, machine)

    def score_theirs():
        scores['theirs'] = torch.zeros(len(items), 4, dtype=torch.float64)
        for i in range(len(items)):
            scores['theirs'][i] = score_rows(theirs, rows[4 * i:4 * i + 4], machine)

    our_seconds, their_seconds = time_in_turn(machine.synchronize, s.rounds, score_ours,
                                              score_theirs)
    name, value, unit, comment = ratio(
        'HellaSwag', len(items) / our_seconds, len(items) / their_seconds, unit='items/s',
        peer='an item a forward pass')
    difference = (scores['ours'] - scores['theirs']).abs().max().item()
    yield name, value, unit, f'{comment}; the scores differ by {difference:.0e} at most'


@torch.no_grad()
def score_rows(model, rows, machine):
    """Return the log-probability of each ending, (4,), by a model of transformers.

    rows: the four of an item, as hellaswag.render gives them.
    """
    ids = [torch.tensor(row.context + row.ending) for row in rows]
    idx_BT = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(machine.device)
    with machine.autocast:
        logits_BTV = model(idx_BT[:, :-1], use_cache=False).logits
    targets_N = idx_BT[:, 1:].flatten()
    loss_N = F.cross_entropy(logits_BTV.flatten(0, 1), targets_N, reduction='none')
    loss_BT = loss_N.view(len(rows), -1)
    scores = torch.zeros(len(rows), dtype=torch.float64)
    for row, loss_T in zip(rows, loss_BT):
        # The last token of the context predicts the first one of the ending.
        first = len(row.context) - 1
        scores[row.choice] = -loss_T[first:first + len(row.ending)].sum()
    return scores


# ---- The race ------------------------------------------------------------------------------------
def seconds_to(loss, arguments, out_dir):
    """Return (seconds, loss reached) of a training run that is ended once it has reached a loss.

    The clock runs from the start of its process until it prints a validation loss of at most
    `loss`. arguments: of train.py, as on a command line.
    """
    command = [sys.executable, '-u', TRAIN, *shlex.split(arguments), f'--out_dir={out_dir}']
    start = time.perf_counter()
    best = float('inf')
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if ': val loss ' in line:
                text = line.partition(': val loss ')[2].partition(',')[0]
                best = min(best, float(text))
            if best <= loss:
                seconds = time.perf_counter() - start
                process.kill()
                return seconds, best
    if process.returncode:
        raise UserError(f'train.py {arguments} failed; what it says stands above')
    raise UserError(f'{arguments} ended with a loss of {best}, above {loss}: give it more steps, '
                    'or raise --race_loss')


def race(s):
    """Yield the rows of the race: the median seconds of two runs that take turns."""
    runs = (s.race_ours, s.race_theirs)
    taken = ([], [])
    # In turn, as everywhere here: a slow minute of the machine slows both.
    for i in range(s.rounds):
        for number, arguments in enumerate(runs):
            out_dir = os.path.join(s.out_dir, 'race', str(number))
            seconds, loss = seconds_to(s.race_loss, arguments, out_dir)
            taken[number].append(seconds)
            print(f'round {i + 1}: loss {loss:.4f} in {seconds:.1f} s: {arguments}', flush=True)
    ours, theirs = (statistics.median(seconds) for seconds in taken)
    yield f'race to {s.race_loss}', ours, 's', s.race_ours
    yield f'race to {s.race_loss}, theirs', theirs, 's', s.race_theirs
    yield 'race, share of the time', ours / theirs, '', 'ours / theirs'


# ---- The script ----------------------------------------------------------------------------------
def what_is_missing(name, s):
    """Return what a comparison still needs, as a text for the user; '' if it can run."""
    uses_transformers = name in ('training', 'decoding', 'hellaswag')
    if uses_transformers and importlib.util.find_spec('transformers') is None:
        return 'pip install transformers'
    if name == 'tokenizing' and not s.texts:
        return 'give --texts='
    if name == 'hellaswag' and not s.hellaswag_source:
        return 'give --hellaswag_source='
    return ''


def compare(names, s, machine):
    """Yield the rows of some comparisons, of a model and data that the settings describe."""
    model, tokens, compiled = set_up(s, machine)
    for name in names:
        missing = what_is_missing(name, s)
        if missing:
            print(f'{name} is left out: {missing}')
        elif name == 'training':
            yield from compare_training(s, machine, model.config, compiled, tokens)
        elif name == 'decoding':
            yield from compare_decoding(s, machine, model.config)
        elif name == 'muon':
            yield from compare_muon(s, machine, model.config)
        elif name == 'tokenizing':
            files = documents.source_files(s.texts)
            yield from compare_learning(s, files)
            yield from compare_encoding(s, files)
        elif name == 'hellaswag':
            yield from compare_hellaswag(s, machine, model.config)


def main():
    s = read_settings(globals(), ('steps', 'rounds', 'new_tokens'))
    if s.new_tokens > 100:
        raise UserError(f'new_tokens is {s.new_tokens}; at most 100 are decoded, after 900 of a '
                        'context of 1,024')
    names = COMPARISONS
    if s.which != 'all':
        names = s.which.split(',')
    if not set(names) <= {*COMPARISONS, 'race'}:
        raise UserError(f'which is {s.which!r}; it may be all, or some of '
                        f'{",".join(COMPARISONS)},race')
    machine = one_process(s)
    comparisons = [name for name in names if name != 'race']
    if comparisons:
        for row in compare(comparisons, s, machine):
            show(*row)
    if 'race' in names:
        for row in race(s):
            show(*row)
    if s.json:
        write_metrics(s.json, machine)


if __name__ == '__main__':  # the processes that tokenize import this file too
    main()
