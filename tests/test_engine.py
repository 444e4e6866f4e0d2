"""folio/engine.py: how a token is drawn, the cache, and text as it comes."""
import pytest
import torch

import folio.tokenizer
from folio import engine
from folio.configurator import UserError
from folio.engine import KVCache, draw_token, next_token_logits
from model import GPT, GPTConfig


def tokens(model, prompts, n, **options):
    """Return what engine.generate yields as one tensor, (steps, B)."""
    return torch.stack(list(engine.generate(model, torch.as_tensor(prompts), n, **options)))


class FixedModel(GPT):
    """A model that gives the same logits after every text."""

    def __init__(self, logits):
        config = GPTConfig(block_size=8, vocab_size=len(logits), n_layer=1, n_head=1, n_embd=8)
        super().__init__(config)
        self.logits_V = torch.tensor(logits)

    def forward(self, idx_BT, targets_BT=None, all_logits=False, cache=None):
        return self.logits_V.expand(len(idx_BT), 1, -1), None


class RecitingModel(GPT):
    """A model that recites a list of tokens in each row: sure of the one that follows."""

    def __init__(self, rows, vocab_size):
        config = GPTConfig(block_size=max(map(len, rows)) + 1, vocab_size=vocab_size, n_layer=1,
                           n_head=1, n_embd=8)
        super().__init__(config)
        self.rows = rows

    def forward(self, idx_BT, targets_BT=None, all_logits=False, cache=None):
        B, T = idx_BT.shape
        cache.length += T
        logits_BTV = torch.zeros(B, 1, self.config.vocab_size)
        for b, ids in enumerate(self.rows):
            logits_BTV[b, 0, ids[min(cache.length, len(ids) - 1)]] = 100.0
        return logits_BTV, None


# ---- Drawing a token -----------------------------------------------------------------------------
def test_draws_follow_the_probabilities():
    p = [0.1, 0.2, 0.3, 0.4]
    model = FixedModel(torch.tensor(p).log().tolist())
    drawn = tokens(model, [[0]] * 2000, 5, seed=0).flatten()
    shares = drawn.bincount() / len(drawn)
    torch.testing.assert_close(shares, torch.tensor(p), atol=0.02, rtol=0)


FIRST = [0.5, 0.3, 0.15, 0.05]
MIRRORED = [0.05, 0.15, 0.3, 0.5]


@pytest.mark.parametrize('options, n_kept', [
    (dict(strategy='greedy'), 1),
    (dict(strategy='sample'), 4),
    (dict(strategy='sample', temperature=0.0), 1),
    (dict(strategy='sample', temperature=1e-40), 1),
    (dict(strategy='top_k', top_k=3), 3),
    (dict(strategy='top_k', top_k=9), 4),
    (dict(strategy='nucleus', top_p=0.79), 2),
    (dict(strategy='nucleus', top_p=0.81), 3),
    (dict(strategy='nucleus', top_p=1.0), 4),
], ids=str)
def test_a_strategy_keeps_the_likeliest_tokens_of_each_row(options, n_kept):
    kept_BV = next_token_logits(torch.tensor([FIRST, MIRRORED]).log(), **options).isfinite()
    first = [True] * n_kept + [False] * (4 - n_kept)
    assert kept_BV.tolist() == [first, first[::-1]]


def test_temperature_divides_the_logits():
    logits = torch.tensor([[1.0, -2.0, 3.0]])
    assert torch.equal(next_token_logits(logits, 'sample', temperature=0.5), logits * 2)


@pytest.mark.parametrize('k', range(1, 7))
def test_top_k_keeps_exactly_k_of_equals(k):
    logits = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 2.0, 3.0]])
    kept = next_token_logits(logits, 'top_k', top_k=k).isfinite()
    assert kept.sum(dim=1).tolist() == [min(k, 5)] * 2
    lowest_kept = logits.masked_fill(~kept, 9.0).amin(dim=1)
    assert (logits.masked_fill(kept, -9.0).amax(dim=1) <= lowest_kept).all()


@pytest.fixture
def no_noise(monkeypatch):
    """Noise of exactly 0, as a Mac's GPU draws now and then (pytorch#192577)."""
    monkeypatch.setattr(torch.Tensor, 'exponential_', lambda self, *args, **kw: self.zero_())


@pytest.mark.parametrize('options', [
    dict(strategy='top_k', top_k=2), dict(strategy='nucleus', top_p=0.7),
    dict(strategy='sample', temperature=1e-6)], ids=str)
def test_a_token_that_was_ruled_out_is_never_drawn(no_noise, options):
    logits_BV = torch.tensor([MIRRORED]).log()
    assert draw_token(logits_BV, **options).item() in (2, 3)


def test_the_plain_generate_draws_from_the_top_k():
    model = FixedModel(torch.tensor(MIRRORED).log().tolist())
    drawn = model.generate(torch.tensor([[0]]), 20, top_k=2)[0, 1:]
    assert set(drawn.tolist()) <= {2, 3}


def test_greedy_draws_no_noise():
    before = torch.get_rng_state()
    assert draw_token(torch.tensor([[1.0, 3.0, 2.0]]), 'greedy').tolist() == [1]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize('options', [
    dict(strategy='beam'), dict(temperature=-1.0), dict(top_k=0), dict(top_p=0.0),
    dict(top_p=1.1)], ids=str)
def test_a_sampling_setting_out_of_its_range_is_refused(model, options):
    with pytest.raises(UserError, match=next(iter(options))):
        next(engine.generate(model, torch.tensor([[1]]), 1, **options))


def test_a_seed_repeats_its_tokens_and_another_gives_others(model):
    first = tokens(model, [[1]], 30, seed=1)
    assert torch.equal(first, tokens(model, [[1]], 30, seed=1))
    assert not torch.equal(first, tokens(model, [[1]], 30, seed=2))


# ---- The cache -----------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize('window', [0, 5])
def test_cached_equals_uncached_logits(model, window):
    """The prompts in one go, then token by token, then several at once."""
    for block in model.transformer.h:
        block.attn.window = window
    rows_BT = torch.randint(50, (3, 16))
    cache = KVCache(model, size=16)
    pieces = rows_BT.split([7, 1, 1, 1, 4, 1, 1], dim=1)
    cached_BTV = torch.cat([model(piece, all_logits=True, cache=cache)[0] for piece in pieces], 1)
    uncached_BTV, _ = model(rows_BT, all_logits=True)
    torch.testing.assert_close(cached_BTV, uncached_BTV, atol=1e-4, rtol=1e-4)


PROMPTS = [[1, 2, 3], [4, 5, 6], [7, 7, 7]]


def test_a_row_does_not_depend_on_its_neighbours(model):
    together = tokens(model, PROMPTS, 40, strategy='greedy')
    for row, prompt in enumerate(PROMPTS):
        alone = tokens(model, [prompt], 40, strategy='greedy')
        assert torch.equal(alone[:, 0], together[:, row])


def test_of_a_prompt_longer_than_the_context_the_end_counts(model):
    long = list(range(20))
    assert torch.equal(tokens(model, [long], 1, strategy='greedy'),
                       tokens(model, [long[-16:]], 1, strategy='greedy'))


def test_a_context_of_one_token_is_cut_to_the_newest():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=1, vocab_size=9, n_layer=1, n_head=1, n_embd=8))
    followers = [tokens(model, [[token]], 1, strategy='greedy').item() for token in range(9)]
    told = tokens(model, [[0]], 4, strategy='greedy').flatten().tolist()
    assert told == [followers[token] for token in [0, *told[:-1]]]


def test_a_full_context_is_cut_to_its_newer_half(model):
    ids = [7] * 16
    for next_B in engine.generate(model, torch.tensor([ids]), 40, strategy='greedy'):
        context = ids
        if len(ids) > 16:  # 17 tokens become 8, and grow to 17 again
            context = ids[-(8 + (len(ids) - 17) % 9):]
        assert next_B.item() == model(torch.tensor([context]))[0].argmax().item()
        ids.append(next_B.item())


@torch.no_grad()
@pytest.mark.parametrize('autocast', [True, False])
def test_in_16_bits_a_cache_holds_what_attention_takes(model, autocast):
    rows_BT = torch.randint(50, (3, 16))
    cache = KVCache(model, size=16)
    if not autocast:
        model.bfloat16()
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        whole_BTV, _ = model(rows_BT, all_logits=True)
        parts = [model(rows_BT[:, :9], all_logits=True, cache=cache)[0]]
        for t in range(9, 16):
            parts.append(model(rows_BT[:, t:t + 1], cache=cache)[0])
    assert cache.kv.dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat(parts, dim=1), whole_BTV, atol=0.1, rtol=0.02)


def test_a_model_that_was_training_is_left_training(model):
    model.train()
    tokens(model, [[1]], 2)
    assert model.training


# ---- Text as it comes ----------------------------------------------------------------------------
BYTES = folio.tokenizer.train_bpe([], 257)  # a token for each byte, and the end-of-text token


def recite(*texts, **options):
    """Return what stream_text yields where the model says texts of bytes, and then ends them."""
    rows = [[BYTES.eot, *BYTES.encode(text), BYTES.eot] for text in texts]
    prompts_BT = torch.full((len(texts), 1), BYTES.eot)
    return list(engine.stream_text(RecitingModel(rows, BYTES.n_vocab), BYTES, prompts_BT, 1000,
                                   strategy='greedy', **options))


def test_streamed_text_ends_at_the_end_of_text_token():
    assert recite('to be')[-1] == ['to be']


def test_streamed_text_grows_a_token_a_step():
    assert recite('abc') == [['a'], ['ab'], ['abc'], ['abc']]


def test_streamed_text_never_holds_half_a_character():
    """Every step shows a beginning of the text, though a character has up to four tokens."""
    text = 'né 日本 👩‍👩‍👧 ok'
    steps = recite(text)
    assert len(steps) == len(text.encode()) + 1
    assert all(text.startswith(step) for step, in steps)
    assert steps[-1] == [text]


def test_streamed_text_is_cut_where_find_end_says():
    steps = recite('one two three', find_end=lambda text: 4 if 'two' in text else None)
    assert steps[-1] == ['one ']
    assert len(steps) == len('one two')


def test_each_row_of_streamed_text_has_its_own_end():
    def find_end(text):
        return text.index('.') if '.' in text else None
    assert recite('ab', 'abcdef', 'a.bcdefgh', find_end=find_end)[-1] == ['ab', 'abcdef', 'a']


def test_streamed_text_ends_after_max_new_tokens(model):
    chars = folio.tokenizer.CharTokenizer(''.join(map(chr, range(50, 100))))
    steps = list(engine.stream_text(model, chars, torch.tensor([[1], [2]]), 7))
    assert len(steps) == 7
    assert [len(text) for text in steps[-1]] == [7, 7]
