"""
Read token files as deterministic batches, and measure a model's loss on them.
    python -c "from folio.data import Dataset; print(Dataset('book').tokens('train')[:20])"

data/<name>/ holds {train,val,test}.bin, raw little-endian tokens of uint16 or uint32, and
meta.json, which describes them. A folder without meta.json is nanoGPT's: characters if it has a
meta.pkl, GPT-2's tokens if not.
"""
import concurrent.futures
import functools
import gzip
import hashlib
import json
import math
import os
import pickle
import zlib

import numpy as np
import torch

import folio.tokenizer
from folio.configurator import UserError, folder_of

SPLITS = ('train', 'val', 'test')
GZIP_MAGIC = b'\x1f\x8b'  # the first bytes of every gzip file


class PlainUnpickler(pickle.Unpickler):
    """Build nothing but dictionaries, lists, strings and numbers: a pickle can run any code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it asks for {module}.{name}')


def token_dtype(meta):
    """Return the NumPy type of a data set's tokens, as its meta.json says. Raises ValueError.

    Only the two types that we write are accepted: NumPy has types that are pointers to objects, and
    a file read as one of those could run any code.
    """
    name = meta.get('dtype', '<u2')  # nanoGPT's folders have no meta.json, and uint16
    if name not in ('<u2', '<u4'):
        raise ValueError(f'its dtype is {name!r}, neither <u2 nor <u4')
    return np.dtype(name)


# ---- A data set ----------------------------------------------------------------------------------
class Dataset:
    """A folder of token files: .spec of its tokenizer, .vocab_size, .meta, tokens(split) …"""

    def __init__(self, name):
        """Open a data set. name: a folder under data/, or an absolute path.

        Raises UserError if it is missing, or if its description is damaged.
        """
        self.folder = folder_of(name)
        self.meta = {}
        self.arrays = {}  # {file: its memmap}: a run keeps the files that it began with
        if not os.path.isfile(self.path('train.bin')):
            name = name.removeprefix('data/')
            remedy = f'python prepare/{name}/prepare.py writes it'
            if not os.path.exists(f'prepare/{name}/prepare.py'):
                remedy = ('config/ says how to prepare what its files name; from your own text: '
                          f'python prepare/book/prepare.py --book=my.txt --dataset={name}')
            raise UserError(f'no data set in {self.folder} (no train.bin): {remedy}')
        try:
            if os.path.isfile(self.path('meta.json')):
                self.read_meta_json()
            elif os.path.isfile(self.path('meta.pkl')):
                self.read_meta_pkl()
            else:
                self.vocab_size = 50257
                self.spec = {'kind': 'gpt2'}
            self.dtype = token_dtype(self.meta)
            n_tokens = folio.tokenizer.vocab_size_of(self.spec)
            if self.vocab_size != n_tokens:
                raise ValueError(f'vocab_size is {self.vocab_size}, its tokenizer has {n_tokens}')
        except Exception as e:  # a damaged file may raise anything
            raise UserError(f'the description of {self.folder} cannot be used '
                            f'({type(e).__name__}: {e}); run its prepare.py again') from e

    def path(self, name):
        return os.path.join(self.folder, name)

    def read_meta_json(self):
        with open(self.path('meta.json'), encoding='utf-8') as f:
            self.meta = json.load(f)
        self.vocab_size = self.meta['vocab_size']
        self.spec = {'kind': 'gpt2'}
        if self.meta['tokenizer']['kind'] != 'gpt2':
            self.spec = folio.tokenizer.read_spec(self.path('tokenizer.json'))
        if folio.tokenizer.spec_hash(self.spec) != self.meta['tokenizer']['hash']:
            raise ValueError('tokenizer.json does not belong to meta.json')

    def read_meta_pkl(self):
        """Read nanoGPT's description of a character vocabulary."""
        with open(self.path('meta.pkl'), 'rb') as f:
            itos = PlainUnpickler(f).load()['itos']
        self.vocab_size = len(itos)
        self.spec = {'kind': 'char', 'chars': ''.join(itos[i] for i in range(len(itos)))}

    def splits(self):
        return [split for split in SPLITS if os.path.isfile(self.path(f'{split}.bin'))]

    def counts(self, split):
        """Return what meta.json counted in a split: tokens, documents, bytes …; {} if nothing."""
        return self.meta.get('splits', {}).get(split, {})

    def tokens(self, split):
        """Return the tokens of a split, a read-only array on disk (memmap). Raises UserError."""
        path = self.path(f'{split}.bin')
        if path in self.arrays:
            return self.arrays[path]
        size = os.path.getsize(path) if os.path.isfile(path) else 0
        n_tokens = self.counts(split).get('tokens', size // self.dtype.itemsize)
        if size != n_tokens * self.dtype.itemsize or n_tokens < 2:
            raise UserError(f'{path} is missing, damaged or empty; run its prepare.py again')
        tokens = np.memmap(path, dtype=self.dtype, mode='r')
        highest = tokens[:2**16].max()  # of the beginning: reading all would take minutes
        if highest >= self.vocab_size:
            raise UserError(f'{path} holds the token {highest}, but its vocabulary has '
                            f'{self.vocab_size}: is a meta.json or meta.pkl missing?')
        self.arrays[path] = tokens
        return tokens

    def mask(self, split):
        """Return an array with a byte for each token, 1 if it is a target; None if all tokens are.

        Raises UserError if the mask is missing, does not fit, or leaves no target.
        """
        path = self.path(f'{split}.mask.bin')
        if path in self.arrays:
            return self.arrays[path]
        if os.path.isfile(path):
            mask = np.memmap(path, dtype=np.uint8, mode='r')
            fits = len(mask) == len(self.tokens(split))
        else:
            mask = None
            fits = 'targets' not in self.counts(split)
        if not fits:
            raise UserError(f'{path} is missing or does not fit {split}.bin; run its prepare.py '
                            'again')
        if mask is not None and not mask.any():
            raise UserError(f'{path} leaves no target in {split}.bin; run its prepare.py again')
        self.arrays[path] = mask
        return mask

    def fingerprint(self, split):
        """Return a hash of samples of a split, to notice on resume that the data has changed.

        It covers the sizes of the token file and its mask, and 64 blocks of 4 KiB of each, spread
        from the beginning to the end: reading all of a large file would take minutes.
        """
        digest = hashlib.sha256()
        for array in (self.tokens(split), self.mask(split)):
            if array is None:
                continue
            array = array.view(np.uint8)
            digest.update(f'{len(array)} '.encode())
            for i in range(64):
                start = max(0, len(array) - 4096) * i // 63
                digest.update(array[start:start + 4096])
        return digest.hexdigest()[:16]

    def per_token(self, split, what):
        """Return the mean 'bytes' (of UTF-8) or 'words' per target; None without counts."""
        counts = self.counts(split)
        if 'targets' in counts:  # masked: only the targets' bytes count
            n_targets = counts['targets']
            total = counts.get(f'target_{what}', 0)
        else:
            n_targets = counts.get('tokens', 0)
            total = counts.get(what, 0)
            if self.meta.get('eot') is not None:
                n_targets -= 1  # nothing predicts the end-of-text token in front
        if total == 0:
            return None
        return total / max(1, n_targets)


# ---- Batches -------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=2)
def epoch_order(n_tokens, block_size, seed, epoch):
    """Return (offset, order of the windows) of one epoch."""
    # RandomState is old, but the only generator whose draws NumPy promises never to change.
    rng = np.random.RandomState([seed % 2**32, epoch])
    # 64 bits on Windows too, where NumPy's default for these is 32.
    offset = rng.randint(n_tokens, dtype=np.int64)
    order = np.arange(n_tokens // block_size, dtype=np.int64)
    return offset, rng.permutation(order)


def window_starts(n_tokens, block_size, seed, first, count):
    """Return where windows first … first + count - 1 of the training stream begin: (count,).

    The tokens, thought of as a ring, are cut into windows of block_size, from a fresh offset each
    epoch and visited in a fresh order: no token is seen twice in an epoch.

    >>> window_starts(n_tokens=12, block_size=4, seed=0, first=0, count=3).tolist()
    [9, 5, 1]
    """
    n_windows = n_tokens // block_size
    starts = []
    for window in range(first, first + count):
        offset, order = epoch_order(n_tokens, block_size, seed, epoch=window // n_windows)
        starts.append((offset + order[window % n_windows] * block_size) % n_tokens)
    return np.array(starts)


def to_batch(tokens, mask, positions):
    """Return (idx_BT, targets_BT), int64, of the tokens at positions (B, T + 1).

    A target whose mask is 0 becomes -1, which the loss leaves out.
    """
    window = tokens[positions].astype(np.int64)
    idx_BT = np.ascontiguousarray(window[:, :-1])
    targets_BT = window[:, 1:].copy()
    if mask is not None:
        targets_BT[mask[positions[:, 1:]] == 0] = -1
    return torch.from_numpy(idx_BT), torch.from_numpy(targets_BT)


def train_batch(tokens, mask, block_size, batch_size, seed, first):
    """Return (idx_BT, targets_BT) of windows first … first + batch_size - 1 of the stream.

    It is a pure function of its arguments, so the number `first` is all that a run has to save of
    its position in the data.
    """
    starts = window_starts(len(tokens), block_size, seed, first, batch_size)
    positions = starts[:, None] + np.arange(block_size + 1)
    return to_batch(tokens, mask, positions % len(tokens))


def count_targets(n_tokens, mask, block_size, seed, first, count):
    """Return how many targets windows first … first + count - 1 of the training stream hold."""
    if mask is None:
        return count * block_size
    starts = window_starts(n_tokens, block_size, seed, first, count)
    positions = starts[:, None] + np.arange(1, block_size + 1)
    return int((mask[positions % n_tokens] != 0).sum())


def train_batches(tokens, mask, block_size, batch_size, micro_steps, seed, first, machine):
    """Yield this process's micro-batches forever: (idx_BT, targets_BT, weight).

    first: the window of the stream to begin with. weight: a factor for the mean loss of the batch.
    Summed over the micro-batches of a step and averaged over the processes, the weighted losses
    give the mean over all targets of the step, however many of them a micro-batch has.
    """
    windows_per_step = micro_steps * machine.world_size * batch_size
    while True:
        n_targets = count_targets(len(tokens), mask, block_size, seed, first, windows_per_step)
        for micro_step in range(micro_steps):
            n_before = micro_step * machine.world_size + machine.rank  # micro-batches of this step
            idx_BT, targets_BT = train_batch(tokens, mask, block_size, batch_size, seed,
                                             first=first + n_before * batch_size)
            n_here = (targets_BT != -1).sum().item()
            yield idx_BT, targets_BT, n_here * machine.world_size / max(1, n_targets)
        first += windows_per_step


def prefetch(batches, pin_memory):
    """Yield the same batches, each made by a thread while the one before it is in use.

    batches: an endless stream, as from train_batches. pin_memory: pin the tokens in memory, so that
    copying them to a GPU need not wait.
    """
    def next_batch():
        idx_BT, targets_BT, weight = next(batches)
        if pin_memory:
            idx_BT = idx_BT.pin_memory()
            targets_BT = targets_BT.pin_memory()
        return idx_BT, targets_BT, weight

    start_thread = None
    if pin_memory:  # a new thread would begin on the first GPU, not on ours
        start_thread = functools.partial(torch.cuda.set_device, torch.cuda.current_device())
    with concurrent.futures.ThreadPoolExecutor(1, initializer=start_thread) as thread:
        future = thread.submit(next_batch)
        while True:
            batch = future.result()
            future = thread.submit(next_batch)
            yield batch


def eval_batches(tokens, mask, block_size, batch_size, n_windows=0, rank=0, world_size=1):
    """Yield the first n_windows windows of a split (0: all of it), each token a target once.

    All batches have the same shape: the last window and the last batch are filled up with targets
    of -1. A rank takes every world_size-th batch.
    """
    n_all = math.ceil((len(tokens) - 1) / block_size)
    n_windows = min(n_windows, n_all) if n_windows > 0 else n_all
    for first in range(rank * batch_size, n_windows, world_size * batch_size):
        windows_B1 = np.arange(batch_size)[:, None] + first
        positions = windows_B1 * block_size + np.arange(block_size + 1)
        exists = (positions < len(tokens)) & (windows_B1 < n_windows)
        idx_BT, targets_BT = to_batch(tokens, mask, np.where(exists, positions, 0))
        targets_BT[~torch.from_numpy(exists[:, 1:])] = -1
        yield idx_BT, targets_BT


# ---- The loss on a split -------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model, data, split, block_size, batch_size, n_windows, machine):
    """Return {loss, perplexity, bits_per_byte, word_perplexity} on n_windows of a split (0: all).

    data: a Dataset. The loss is in nats per token. bits_per_byte and word_perplexity need
    meta.json's counts of bytes and words, which are of the whole split even if n_windows is a part
    of it. Each process takes its share of the windows, and all return the same. Raises UserError if
    no window has a target.
    """
    was_training = model.training
    model.eval()
    losses = []
    counts = []
    batches = eval_batches(data.tokens(split), data.mask(split), block_size, batch_size,
                           n_windows=n_windows, rank=machine.rank, world_size=machine.world_size)
    for idx_BT, targets_BT in batches:
        counts.append((targets_BT != -1).sum().item())
        with machine.autocast:
            _, loss = model(idx_BT.to(machine.device), targets_BT.to(machine.device))
        losses.append(loss)
    model.train(was_training)
    nats = 0.0
    if losses:
        # Only now, because reading a number waits for the device.
        for loss, n_targets in zip(torch.stack(losses).tolist(), counts):
            nats += loss * n_targets
    nats, count = machine.sum(nats, sum(counts))
    if count == 0:
        raise UserError(f'{data.folder}/{split}.bin has no targets in the windows that are '
                        'evaluated: its mask leaves all of them out; run its prepare.py again')
    loss = nats / count
    metrics = {'loss': loss, 'perplexity': perplexity(loss)}
    bytes_per_token = data.per_token(split, 'bytes')
    if bytes_per_token is not None:
        metrics['bits_per_byte'] = loss / math.log(2) / bytes_per_token
    words_per_token = data.per_token(split, 'words')
    if words_per_token is not None:
        metrics['word_perplexity'] = perplexity(loss / words_per_token)
    return metrics


def perplexity(nats):
    return math.exp(min(nats, 700))  # beyond this a float overflows


# ---- Lines of JSON -------------------------------------------------------------------------------
def read_jsonl(path, keys, hint):
    """Return the objects of a .jsonl or .jsonl.gz file, one from each line that is not blank.

    Each must have text under all of the keys. Otherwise raises UserError, whose message ends with
    the hint.
    """
    try:
        with open(path, 'rb') as f:
            data = f.read()
        # Look at the content, not at the name: a download may have been unpacked on the way.
        if data.startswith(GZIP_MAGIC):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as e:
        reason = getattr(e, 'strerror', None) or e
        raise UserError(f'{path} cannot be read ({reason}); {hint}') from None
    rows = []
    for number, line in enumerate(data.split(b'\n'), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            for key in keys:
                if not isinstance(row[key], str):
                    raise TypeError(f'{key} is not text')
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f'{path}, line {number}: a line must be an object with the texts '
                            f'{", ".join(keys)} ({type(e).__name__}: {e}); {hint}') from None
        rows.append(row)
    if not rows:
        raise UserError(f'{path} is empty; {hint}')
    return rows


def write_jsonl(path, rows):
    """Write each row as a line of JSON; the file appears whole or not at all."""
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(row) + '\n' for row in rows)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + '.tmp', path)
