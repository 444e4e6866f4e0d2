"""
Token files, as a prepare script writes them, read as deterministic batches.
    python -c "from folio.data import Dataset; print(Dataset('book').tokens('train')[:20])"

data/<name>/ holds {train,val,test}.bin, raw little-endian uint16 or uint32 tokens, and meta.json, which describes them.
A folder without meta.json is nanoGPT's: characters if it has a meta.pkl, GPT-2's BPE if not.
"""
import concurrent.futures
import difflib
import functools
import json
import os
import pickle

import numpy as np
import torch

import folio.tokenizer
from folio.configurator import UserError


# ---- Reading ---------------------------------------------------------------------------------------------------------
class PlainUnpickler(pickle.Unpickler):
    """Unpickles dictionaries, lists, strings and numbers; anything that names a class or a function is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it asks for {module}.{name}')


class Dataset:
    def __init__(self, name):
        """name: of a folder under data/, or an absolute path. UserError, with the prepare command, if it is missing."""
        self.folder, self.meta = os.path.join('data', name), {}
        name, root = os.path.basename(os.path.normpath(name)), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        own = [n for n in (name, name.partition('_')[0]) if os.path.isdir(f'{root}/prepare/{n}')]
        script = f'{own[0]}/prepare.py' if own else f'book/prepare.py --dataset={name}'
        self.remedy = f'prepare it with: python prepare/{script}'
        if not os.path.isfile(os.path.join(self.folder, 'train.bin')):
            known = [d for folder in ('data', f'{root}/prepare') if os.path.isdir(folder) for d in os.listdir(folder)]
            near = [] if own else difflib.get_close_matches(name, known, n=1, cutoff=0.8)
            raise UserError(f'no data set in {self.folder} (no train.bin); '
                            + (f'did you mean --dataset={near[0]}?' if near else self.remedy))
        try:
            if os.path.isfile(os.path.join(self.folder, 'meta.json')):
                with open(os.path.join(self.folder, 'meta.json'), encoding='utf-8') as f:
                    self.meta = json.load(f)
                kind = self.meta['tokenizer']['kind']
                self.spec = folio.tokenizer.load('gpt2' if kind == 'gpt2' else self.folder).spec
                if folio.tokenizer.spec_hash(self.spec) != self.meta['tokenizer']['hash']:
                    raise ValueError('tokenizer.json does not belong to meta.json')
                self.vocab_size = self.meta['vocab_size']
            elif os.path.isfile(os.path.join(self.folder, 'meta.pkl')):
                with open(os.path.join(self.folder, 'meta.pkl'), 'rb') as f:
                    itos = PlainUnpickler(f).load()['itos']
                self.vocab_size = len(itos)
                self.spec = {'kind': 'char', 'chars': ''.join(itos[i] for i in range(len(itos)))}
            else:
                self.vocab_size, self.spec = 50257, {'kind': 'gpt2'}
        except (OSError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as e:
            raise UserError(f'the description of {self.folder} cannot be used ({e}); {self.remedy}') from e

    def splits(self):
        return [s for s in ('train', 'val', 'test') if os.path.isfile(os.path.join(self.folder, f'{s}.bin'))]

    def tokens(self, split):
        """The tokens of a split, a read-only array on disk (memmap)."""
        path, dtype = os.path.join(self.folder, f'{split}.bin'), np.dtype(self.meta.get('dtype', '<u2'))
        size = os.path.getsize(path) if os.path.isfile(path) else -1
        expected = self.meta.get('splits', {}).get(split, {}).get('tokens', max(0, size) // dtype.itemsize)
        if size != expected * dtype.itemsize or expected < 2:
            raise UserError(f'{path} is missing, damaged or empty; {self.remedy}')
        return np.memmap(path, dtype=dtype, mode='r')

    def mask(self, split):
        """One byte a token, 1 where the token is a target; None where all of them are."""
        path, counts = os.path.join(self.folder, f'{split}.mask.bin'), self.meta.get('splits', {}).get(split, {})
        mask = np.memmap(path, dtype=np.uint8, mode='r') if os.path.isfile(path) else None
        if (mask is None and 'targets' in counts) or (mask is not None and len(mask) != len(self.tokens(split))):
            raise UserError(f'{path} is missing or does not fit {split}.bin; {self.remedy}')
        return mask

    def per_token(self, split, what):
        """'bytes' (of UTF-8) or 'words' that a target stands for on average; None where nobody counted them."""
        counts = self.meta.get('splits', {}).get(split, {})
        targets = counts.get('targets', counts.get('tokens', 0) - (self.meta.get('eot') is not None))  # it comes first
        return counts.get(f'target_{what}', counts.get(what, 0)) / max(1, targets) or None


def tokenizer_of(checkpoint):
    """The tokenizer that a checkpoint carries; of a nanoGPT's, the one that its data folder has, or else GPT-2's."""
    spec, trained_on = checkpoint.get('tokenizer', {'kind': 'gpt2'}), checkpoint.get('config', {}).get('dataset', '')
    if 'tokenizer' not in checkpoint and os.path.exists(os.path.join('data', trained_on, 'meta.pkl')):
        spec = Dataset(trained_on).spec
    tokenizer, vocab_size = folio.tokenizer.load(spec), checkpoint['model_args']['vocab_size']
    if tokenizer.n_vocab != vocab_size:
        raise UserError(f'a model of {vocab_size} tokens cannot be read with a tokenizer ({spec["kind"]}) of '
                        f'{tokenizer.n_vocab}')
    return tokenizer


# ---- Batches ---------------------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=2)
def epoch_order(n_tokens, block_size, seed, epoch):
    """(offset, order of the windows) of one epoch, by RandomState, whose draws NumPy promises never to change."""
    rng = np.random.RandomState([seed % 2**32, epoch])
    return rng.randint(n_tokens), rng.permutation(n_tokens // block_size)


def window_starts(n_tokens, block_size, seed, first, count):
    """Where windows first … first + count - 1 of the endless training stream begin: (count,) token positions.

    The tokens, thought of as a ring, are cut into windows of block_size, from a fresh offset each epoch and visited in
    a fresh order, each once: no token is seen twice in an epoch.

    >>> window_starts(n_tokens=12, block_size=4, seed=0, first=0, count=3).tolist()  # one epoch: three starts, 4 apart
    [9, 5, 1]
    """
    n_windows = n_tokens // block_size
    starts = []
    for window in range(first, first + count):
        offset, order = epoch_order(n_tokens, block_size, seed, window // n_windows)
        starts.append((offset + order[window % n_windows] * block_size) % n_tokens)
    return np.array(starts)


def to_batch(tokens, mask, positions):
    """(idx_BT, targets_BT), int64, of the tokens at positions (B, T + 1); a target is -1 where its mask is 0."""
    window = tokens[positions].astype(np.int64)
    idx_BT, targets_BT = window[:, :-1], window[:, 1:].copy()
    if mask is not None:
        targets_BT[mask[positions[:, 1:]] == 0] = -1
    return torch.from_numpy(np.ascontiguousarray(idx_BT)), torch.from_numpy(targets_BT)


def train_batch(tokens, mask, block_size, batch_size, micro_steps, seed, step, micro_step):
    """The batch of one micro-step out of micro_steps (over all processes): a pure function, so nothing to save."""
    first = (step * micro_steps + micro_step) * batch_size
    starts = window_starts(len(tokens), block_size, seed, first, batch_size)
    return to_batch(tokens, mask, (starts[:, None] + np.arange(block_size + 1)) % len(tokens))


def ahead(batches, pin_memory):
    """The same batches, each made by a thread while the one before is in use, in pinned memory if it is for a GPU."""
    def fetch():
        batch = next(batches, None)
        return tuple(t.pin_memory() for t in batch) if batch and pin_memory else batch
    device = torch.cuda.current_device() if pin_memory else None  # a new thread would begin with the first GPU
    start = functools.partial(torch.cuda.set_device, device) if pin_memory else None
    with concurrent.futures.ThreadPoolExecutor(1, initializer=start) as thread:
        future = thread.submit(fetch)
        while batch := future.result():
            future = thread.submit(fetch)
            yield batch


def eval_batches(tokens, mask, block_size, batch_size, n_windows=0, rank=0, world_size=1):
    """The first n_windows windows of a split (0: all of it), each token a target once, as equally shaped batches.

    The last window is filled up with targets of -1, and so is the last batch. A rank takes every world_size-th batch,
    and all take equally many: a sharded model needs every process for each.
    """
    n_all = -(-(len(tokens) - 1) // block_size)
    n_windows = min(n_windows, n_all) if n_windows else n_all
    for first in range(0, n_windows, world_size * batch_size):
        windows = np.arange(first, first + batch_size)[:, None] + rank * batch_size
        positions = windows * block_size + np.arange(block_size + 1)
        real = (positions < len(tokens)) & (windows < n_windows)
        idx_BT, targets_BT = to_batch(tokens, mask, np.where(real, positions, 0))
        targets_BT[~torch.from_numpy(real[:, 1:])] = -1
        yield idx_BT, targets_BT
