"""folio/data.py: data sets, batches that depend on nothing but their step, the loss on a split."""
import gzip
import itertools
import json
import os
import pickle

import numpy as np
import pytest
import torch

from folio.configurator import UserError
from folio.data import (Dataset, epoch_order, eval_batches, prefetch, read_jsonl, to_batch,
                        train_batch, window_starts, write_jsonl)
from folio.tokenizer import EOT, CharTokenizer, train_bpe
from model import GPT, GPTConfig
from prepare.corpus import write_dataset


# ---- Batches -------------------------------------------------------------------------------------
def epoch_starts(n_tokens, block_size, epoch):
    n_windows = n_tokens // block_size
    return window_starts(n_tokens, block_size, seed=1, first=epoch * n_windows, count=n_windows)


@pytest.mark.parametrize('n_tokens, block_size', [(1000, 16), (1024, 16), (17, 16), (33, 16)])
def test_batches_visit_each_window_once_an_epoch(n_tokens, block_size):
    for epoch in range(3):
        starts = epoch_starts(n_tokens, block_size, epoch)
        seen = (starts[:, None] + np.arange(block_size)).ravel() % n_tokens
        assert len(np.unique(seen)) == n_tokens // block_size * block_size  # no token twice


def test_each_epoch_has_another_order():
    orders = {tuple(epoch_starts(1000, 16, epoch)) for epoch in range(3)}
    assert len(orders) == 3


def test_batches_are_the_same_however_a_step_is_split():
    tokens = np.arange(500, dtype='<u2')
    whole = train_batch(tokens, None, 8, batch_size=12, seed=1, first=36)
    parts = [train_batch(tokens, None, 8, batch_size=3, seed=1, first=36 + 3 * m) for m in range(4)]
    for i in (0, 1):
        assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))


def test_another_seed_gives_other_batches():
    tokens = np.arange(500, dtype='<u2')
    options = dict(block_size=8, batch_size=12, first=36)
    first, _ = train_batch(tokens, None, seed=1, **options)
    other, _ = train_batch(tokens, None, seed=2, **options)
    assert not torch.equal(first, other)


def test_targets_are_the_next_tokens_but_masked_ones():
    tokens = np.arange(100, dtype='<u4')
    mask = (np.arange(100) % 3 == 0).astype(np.uint8)
    idx_BT, targets_BT = train_batch(tokens, mask, 8, batch_size=4, seed=0, first=0)
    following = (idx_BT + 1) % 100
    assert torch.equal(targets_BT, torch.where(following % 3 == 0, following, -1))


@pytest.mark.parametrize('batch_size', [1, 3, 64])
@pytest.mark.parametrize('world_size', [1, 2])
@pytest.mark.parametrize('n_tokens, n_windows, n_targets', [(99, 0, 98), (99, 1, 8), (98, 0, 97)])
def test_evaluation_counts_each_token_once(batch_size, world_size, n_tokens, n_windows, n_targets):
    tokens = np.arange(n_tokens, dtype='<u2')
    found = []
    for rank in range(world_size):
        for idx_BT, targets_BT in eval_batches(tokens, None, 8, batch_size=batch_size,
                                               n_windows=n_windows, rank=rank,
                                               world_size=world_size):
            assert idx_BT.shape == (batch_size, 8)
            found += targets_BT[targets_BT != -1].tolist()
    assert sorted(found) == list(range(1, n_targets + 1))


def test_prefetched_batches_are_the_same_in_the_same_order():
    batches = ((torch.tensor([i]), torch.tensor([-i]), 1.0) for i in itertools.count())
    first = itertools.islice(prefetch(batches, pin_memory=False), 3)
    assert [idx_BT.item() for idx_BT, _, _ in first] == [0, 1, 2]


def test_an_error_in_a_prefetched_batch_is_raised_in_its_turn():
    def make():
        yield torch.tensor([0]), torch.tensor([0]), 1.0
        raise ValueError('of the batch')
    batches = prefetch(make(), pin_memory=False)
    next(batches)
    with pytest.raises(ValueError, match='of the batch'):
        next(batches)


def test_the_gradient_of_what_the_mask_hides_is_zero():
    torch.manual_seed(0)
    tokens = np.arange(12) % 5
    mask = np.array([1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1], dtype=np.uint8)
    model = GPT(GPTConfig(block_size=11, vocab_size=5, n_layer=1, n_head=1, n_embd=8))
    _, targets_BT = to_batch(tokens, mask, np.arange(12)[None])
    x = torch.zeros(1, 11, 8, requires_grad=True)  # of the residual stream, after all blocks
    gradient_T = torch.autograd.grad(model.loss(x, targets_BT), x)[0].abs().sum(dim=-1)[0]
    assert (gradient_T > 0).tolist() == (mask[1:] == 1).tolist()


def test_the_order_of_windows_is_in_64_bits():
    """Beyond 2.1 billion tokens too, whatever NumPy's integers are on a system."""
    offset, order_N = epoch_order(2**40, 2**36, seed=1, epoch=0)
    assert offset > 2**32
    assert order_N.dtype == np.int64


# ---- A data set ----------------------------------------------------------------------------------
TEXTS = {'train': ['abc', 'abc d'], 'val': ['d d']}


@pytest.fixture(params=['char', 'bpe'])
def written(request, tmp_path):
    """(a data set of TEXTS, its tokenizer)."""
    tokenizer = CharTokenizer('abc d')
    if request.param == 'bpe':
        tokenizer = train_bpe(['abc abc d'] * 9, 262)
    write_dataset(tmp_path / 'set', tokenizer, TEXTS, source='here')
    return Dataset(str(tmp_path / 'set')), tokenizer


def test_a_data_set_reads_back_the_tokens_that_were_written(written):
    data, tokenizer = written
    expected = []
    for text in TEXTS['train']:
        if tokenizer.eot is not None:
            expected.append(tokenizer.eot)
        expected += tokenizer.encode(text)
    assert data.tokens('train').tolist() == expected


def test_a_data_set_knows_its_tokenizer_and_splits(written):
    data, tokenizer = written
    assert data.vocab_size == tokenizer.n_vocab
    assert data.spec == tokenizer.spec
    assert data.splits() == ['train', 'val']


def test_a_data_set_counts_tokens_documents_and_bytes(written):
    data, tokenizer = written
    assert data.counts('train') == {'tokens': len(data.tokens('train')), 'documents': 2, 'bytes': 8}
    n_targets = len(data.tokens('val'))
    if tokenizer.eot is not None:
        n_targets -= 1
    assert data.per_token('val', 'bytes') == 3 / n_targets


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path):
    chars = ''.join(map(chr, range(0x10000, 0x10000 + 70000)))
    write_dataset(tmp_path, CharTokenizer(chars), {'train': [chars]}, source='here')
    assert Dataset(str(tmp_path)).tokens('train')[-1] == 69999
    assert (tmp_path / 'train.bin').stat().st_size == 280000


@pytest.mark.parametrize('file, content', [
    ('val.bin', b'\0\0'), ('val.bin', b'\0\0\0'), ('meta.json', b'{'),
    ('tokenizer.json', b'{"kind": "char", "chars": "a"}')])
def test_a_damaged_data_set_is_refused_with_what_to_do(tmp_path, file, content):
    texts = {'train': ['abab'], 'val': ['ab']}
    write_dataset(tmp_path / 'book', CharTokenizer('ab'), texts, source='here')
    (tmp_path / 'book' / file).write_bytes(content)
    with pytest.raises(UserError, match='run its prepare.py again'):
        Dataset(str(tmp_path / 'book')).tokens('val')


class Planted:
    """Run a command when it is unpickled, unless the reader refuses."""

    def __reduce__(self):
        return os.system, ('touch ran',)


@pytest.mark.parametrize('planted', [Planted(), {'itos': print}], ids=['command', 'function'])
def test_pickled_meta_builds_plain_values_only(tmp_path, monkeypatch, planted):
    monkeypatch.chdir(tmp_path)
    np.arange(9, dtype='<u2').tofile(tmp_path / 'train.bin')
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(planted))
    with pytest.raises(UserError, match='it asks for'):
        Dataset(str(tmp_path))
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('dtype', ['O', '|O', 'i4,O', '<f4', '>u2', 7, None], ids=str)
def test_tokens_are_of_two_types_and_no_other(tmp_path, dtype):
    """An array of objects that is read from a file is pointers from a file."""
    write_dataset(tmp_path, CharTokenizer('ab'), {'train': ['abab']}, source='here')
    meta = json.loads((tmp_path / 'meta.json').read_text())
    (tmp_path / 'meta.json').write_text(json.dumps(meta | {'dtype': dtype}))
    with pytest.raises(UserError, match='its dtype is'):
        Dataset(str(tmp_path))


@pytest.mark.parametrize('names', [['pytorch_model.bin', 'tokenizer.json'], ['notes.txt'],
                                   ['train.bin', 'val.bin', 'meta.pkl']], ids=str)
def test_preparing_leaves_a_folder_of_others_alone(tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes(b'weeks of work')
    with pytest.raises(UserError, match='give another --dataset'):
        write_dataset(tmp_path, CharTokenizer('abc'), {'train': ['abc']}, source='here')
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert all((tmp_path / name).read_bytes() == b'weeks of work' for name in names)


def test_preparing_again_removes_what_it_wrote_and_nothing_else(tmp_path):
    splits = {'train': [('a', 'bc')], 'val': ['abc'], 'test': ['abc']}
    write_dataset(tmp_path, CharTokenizer('abc'), splits, source='here')
    (tmp_path / 'pytorch_model.bin').write_bytes(b'weeks of work')
    write_dataset(tmp_path, CharTokenizer('abc'), {'train': ['ab'], 'val': ['abc']}, source='here')
    assert sorted(os.listdir(tmp_path)) == ['meta.json', 'pytorch_model.bin', 'tokenizer.json',
                                            'train.bin', 'val.bin']


# ---- Prompts and answers -------------------------------------------------------------------------
PAIRS = [('what is one?', ' one'), ('and two? ', 'two or so')]


@pytest.fixture
def masked(tmp_path):
    """(a data set of PAIRS, the last of which is val, and its tokenizer)."""
    tokenizer = train_bpe(['what is one and one? two or so. '], 270)
    write_dataset(tmp_path, tokenizer, {'train': PAIRS, 'val': PAIRS[1:]}, source='here')
    return Dataset(str(tmp_path)), tokenizer


def test_only_an_answer_and_its_end_are_targets(masked):
    data, tokenizer = masked
    tokens = data.tokens('train')
    mask = data.mask('train')
    assert tokenizer.decode(tokens.tolist()) == ''.join(EOT + a + b for a, b in PAIRS)
    assert tokenizer.decode(tokens[mask == 1].tolist()) == ''.join(EOT + b for _, b in PAIRS)


def test_a_folder_may_have_a_name_like_a_file(tmp_path):
    folder = tmp_path / 'my.bin.set'
    write_dataset(folder, train_bpe([], 257), {'train': PAIRS, 'val': PAIRS}, source='here')
    assert Dataset(str(folder)).mask('val').sum() > 0


def test_bytes_a_token_are_those_of_the_targets(masked):
    data, _ = masked
    n_targets = data.mask('train').sum() - 1  # nothing predicts the first token
    assert data.per_token('train', 'bytes') == sum(len(b) for _, b in PAIRS) / n_targets
    assert data.counts('train')['bytes'] == sum(len(a + b) for a, b in PAIRS)


def test_a_mask_that_was_lost_is_missed(masked, tmp_path):
    data, _ = masked
    (tmp_path / 'val.mask.bin').unlink()
    with pytest.raises(UserError, match='val.mask.bin is missing'):
        data.mask('val')


def test_a_data_set_written_again_loses_the_old_mask(masked, tmp_path):
    _, tokenizer = masked
    (tmp_path / 'val.mask.bin').rename(tmp_path / 'train.mask.bin.tmp')  # as a kill may leave it
    write_dataset(tmp_path, tokenizer, {'train': ['no prompt'], 'val': ['here']}, source='here')
    assert Dataset(str(tmp_path)).mask('train') is None


# ---- Lines of JSON -------------------------------------------------------------------------------
def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [{'text': 'né\n', 'n': 1}, {'text': ''}]
    write_jsonl(str(tmp_path / 'a.jsonl'), rows)
    assert read_jsonl(str(tmp_path / 'a.jsonl'), ['text'], hint='') == rows


def test_a_compressed_file_is_read_whatever_its_name(tmp_path):
    (tmp_path / 'a.jsonl').write_bytes(gzip.compress(json.dumps({'text': 'a'}).encode()))
    assert read_jsonl(str(tmp_path / 'a.jsonl'), ['text'], hint='') == [{'text': 'a'}]


@pytest.mark.parametrize('content, says', [
    ('{"text": "a"}\n\n{"text": 1}\n', 'line 3: .*text is not text'),
    ('{"text": "a"}\n{"txet": "a"}\n', 'line 2: .*KeyError'),
    ('[]\n', 'line 1: .*TypeError'),
    ('{\n', 'line 1: .*JSONDecodeError'),
    ('\n', 'is empty'),
    (None, 'cannot be read'),
])
def test_a_broken_line_is_named(tmp_path, content, says):
    if content is not None:
        (tmp_path / 'a.jsonl').write_text(content)
    with pytest.raises(UserError, match=f'a.jsonl.*{says}.*; try another'):
        read_jsonl(str(tmp_path / 'a.jsonl'), ['text'], hint='try another')
