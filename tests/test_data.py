import pickle

import numpy as np
import pytest
import torch

from folio.configurator import UserError
from prepare.corpus import write_dataset
from folio.data import Dataset, prefetch, eval_batches, to_batch, train_batch, window_starts
from model import GPT, GPTConfig
from folio.tokenizer import EOT, CharTokenizer, train_bpe


@pytest.mark.parametrize('n_tokens, block_size', [(1000, 16), (1024, 16), (17, 16), (33, 16)])
def test_batches_visit_each_window_once_an_epoch(n_tokens, block_size):
    n_windows = n_tokens // block_size
    orders = []
    for epoch in range(3):
        starts = window_starts(n_tokens, block_size, seed=1, first=epoch * n_windows, count=n_windows)
        seen = (starts[:, None] + np.arange(block_size)).ravel() % n_tokens
        assert len(np.unique(seen)) == n_windows * block_size  # no token twice
        orders.append(tuple(starts))
    assert n_windows == 1 or len(set(orders)) == 3  # and each epoch differs


def test_batches_do_not_depend_on_how_a_step_is_split():
    tokens = np.arange(500, dtype='<u2')
    whole = train_batch(tokens, None, 8, 12, 1, seed=1, step=3, micro_step=0)
    parts = [train_batch(tokens, None, 8, 3, 4, seed=1, step=3, micro_step=m) for m in range(4)]
    for i in (0, 1):
        assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))
    assert not torch.equal(whole[0], train_batch(tokens, None, 8, 12, 1, seed=2, step=3, micro_step=0)[0])


def test_targets_are_the_next_tokens_and_masked_ones_are_left_out():
    tokens, mask = np.arange(100, dtype='<u4'), (np.arange(100) % 3 == 0).astype(np.uint8)
    idx_BT, targets_BT = train_batch(tokens, mask, 8, 4, 1, seed=0, step=0, micro_step=0)
    following = (idx_BT + 1) % 100
    assert torch.equal(targets_BT, torch.where(following % 3 == 0, following, -1))


@pytest.mark.parametrize('batch_size', [1, 3, 64])
@pytest.mark.parametrize('world_size', [1, 2])
@pytest.mark.parametrize('n_windows', [0, 5])
def test_evaluation_counts_each_token_once_whatever_the_batch(batch_size, world_size, n_windows):
    tokens = np.arange(99, dtype='<u2')
    batches = [b for rank in range(world_size)
               for b in eval_batches(tokens, None, 8, batch_size, n_windows, rank, world_size)]
    targets = torch.cat([targets_BT.flatten() for _, targets_BT in batches])
    assert sorted(targets[targets != -1].tolist()) == list(range(1, 99 if n_windows == 0 else 41))
    assert all(idx_BT.shape == (batch_size, 8) for idx_BT, _ in batches)


def test_data_set_reads_back_what_was_written(tmp_path):
    for tokenizer in (CharTokenizer('abc d'), train_bpe(['abc abc d'] * 9, 262)):
        texts = {'train': ['abc', 'abc d'], 'val': ['d d']}
        write_dataset(tmp_path / 'set', tokenizer, texts, source='here')
        data = Dataset(str(tmp_path / 'set'))
        eot = [] if tokenizer.eot is None else [tokenizer.eot]
        assert data.tokens('train').tolist() == [i for text in texts['train'] for i in eot + tokenizer.encode(text)]
        assert data.meta['splits']['train'] == {'tokens': len(data.tokens('train')), 'documents': 2, 'bytes': 8}
        assert (data.vocab_size, data.spec, data.splits()) == (tokenizer.n_vocab, tokenizer.spec, ['train', 'val'])
        assert data.per_token('val', 'bytes') == 3 / (len(data.tokens('val')) - len(eot))


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path):
    chars = ''.join(map(chr, range(0x10000, 0x10000 + 70000)))
    write_dataset(tmp_path, CharTokenizer(chars), {'train': [chars]}, source='here')
    assert Dataset(str(tmp_path)).tokens('train')[-1] == 69999 and (tmp_path / 'train.bin').stat().st_size == 280000


def test_a_damaged_data_set_is_refused_with_the_prepare_command(tmp_path):
    write_dataset(tmp_path / 'book', CharTokenizer('ab'), {'train': ['abab'], 'val': ['ab']}, source='here')
    (tmp_path / 'book' / 'val.bin').write_bytes(b'\0')
    with pytest.raises(UserError, match='prepare/book/prepare.py'):
        Dataset(str(tmp_path / 'book')).tokens('val')
    (tmp_path / 'book' / 'meta.json').write_text('{')
    with pytest.raises(UserError, match='prepare/book/prepare.py'):
        Dataset(str(tmp_path / 'book'))


def test_pickled_meta_can_build_nothing_but_plain_values(tmp_path):
    np.arange(9, dtype='<u2').tofile(tmp_path / 'train.bin')
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'itos': print}))
    with pytest.raises(UserError, match='builtins.print'):
        Dataset(str(tmp_path))


def test_batches_made_prefetch_are_the_same_and_an_error_in_one_is_raised():
    def make(n):
        for i in range(n):
            yield torch.tensor([i]), torch.tensor([-i])
        raise ValueError('of the batch')
    taken = []
    with pytest.raises(ValueError, match='of the batch'):
        for idx, targets in prefetch(make(3), pin_memory=False):
            taken.append((idx.item(), targets.item()))
    assert taken == [(0, 0), (1, -1), (2, -2)]
    assert list(prefetch(iter([]), pin_memory=False)) == []


def test_of_a_prompt_and_its_answer_only_the_answer_and_its_end_are_targets(tmp_path):
    tokenizer = train_bpe(['what is one and one? two or so. '], 270)
    pairs = [('what is one?', ' one'), ('and two? ', 'two or so')]
    meta = write_dataset(tmp_path, tokenizer, {'train': pairs, 'val': pairs[1:]}, source='here')
    data = Dataset(tmp_path)
    tokens, mask = data.tokens('train'), data.mask('train')
    assert tokenizer.decode(tokens.tolist()) == ''.join(EOT + a + b for a, b in pairs)
    assert tokenizer.decode(tokens[mask == 1].tolist()) == ''.join(EOT + b for _, b in pairs)
    assert data.per_token('train', 'bytes') == sum(len(b) for _, b in pairs) / (mask.sum() - 1)
    assert meta['splits']['train']['bytes'] == sum(len(a + b) for a, b in pairs)
    (tmp_path / 'val.mask.bin').rename(tmp_path / 'train.mask.bin.tmp')  # as a kill may leave it
    with pytest.raises(UserError, match='val.mask.bin is missing'):
        data.mask('val')
    write_dataset(tmp_path, tokenizer, {'train': ['no prompt, no mask'], 'val': ['here']}, source='here')
    assert Dataset(tmp_path).mask('train') is None


def test_the_gradient_of_what_the_mask_hides_is_zero():
    torch.manual_seed(0)
    tokens, mask = np.arange(12) % 5, np.array([1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1], dtype=np.uint8)
    model = GPT(GPTConfig(block_size=11, vocab_size=5, n_layer=1, n_head=1, n_embd=8))
    idx_BT, targets_BT = to_batch(tokens, mask, np.arange(12)[None])
    logits_BTV = model(idx_BT, all_logits=True)[0]
    loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=-1)
    assert loss.item() == pytest.approx(model(idx_BT, targets_BT)[1].item(), rel=1e-5)
    gradient_T = torch.autograd.grad(loss, logits_BTV)[0].abs().sum(dim=-1)[0]
    assert (gradient_T > 0).tolist() == (mask[1:] == 1).tolist()
