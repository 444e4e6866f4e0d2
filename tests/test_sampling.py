import pytest
import torch

from folio import engine
from folio.configurator import UserError
from model import GPT, GPTConfig
from folio.engine import draw_token, next_token_logits


def test_draws_follow_the_probabilities():
    model = GPT(GPTConfig(block_size=8, vocab_size=4, n_layer=1, n_head=1, n_embd=8, arch='modern')).eval()
    model.forward = lambda idx_BT, **options: (torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(len(idx_BT), 1, 4), None)
    drawn = torch.cat(list(engine.generate(model, [[0]] * 2000, 5, seed=0, use_cache=False)))
    torch.testing.assert_close(drawn.bincount() / len(drawn), torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.02, rtol=0)


def test_strategies_keep_what_they_should():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]).log()
    kept = lambda **options: next_token_logits(logits, **options).isfinite().tolist()
    assert kept(strategy='greedy') == [[True, False, False, False], [False, False, False, True]]
    assert kept(strategy='sample') == [[True] * 4] * 2
    assert kept(strategy='top_k', top_k=3) == [[True, True, True, False], [False, True, True, True]]
    assert kept(strategy='nucleus', top_p=0.79) == [[True, True, False, False], [False, False, True, True]]
    assert kept(strategy='nucleus', top_p=0.81) == [[True, True, True, False], [False, True, True, True]]
    assert kept(strategy='nucleus', top_p=1.0) == [[True] * 4] * 2
    assert kept(strategy='sample', min_p=0.4) == [[True, True, False, False], [False, False, True, True]]
    assert kept(strategy='sample', temperature=0.0) == kept(strategy='greedy')
    torch.testing.assert_close(next_token_logits(logits, 'sample', temperature=0.5), logits * 2)


def test_top_k_keeps_exactly_k_of_equals():
    logits = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 2.0, 3.0]])
    for k in range(1, 7):
        kept = next_token_logits(logits, 'top_k', top_k=k).isfinite()
        assert kept.sum(dim=1).tolist() == [min(k, 5)] * 2
        lowest_kept = logits.masked_fill(~kept, 9.0).amin(dim=1)
        assert (logits.masked_fill(kept, -9.0).amax(dim=1) <= lowest_kept).all()


def test_greedy_draws_no_noise():
    before = torch.get_rng_state()
    assert draw_token(torch.tensor([[1.0, 3.0, 2.0]]), 'greedy').tolist() == [1]
    assert torch.equal(torch.get_rng_state(), before)


def test_repetition_penalty_makes_what_was_said_less_likely():
    model = GPT(GPTConfig(block_size=8, vocab_size=3, n_layer=1, n_head=1, n_embd=8)).eval()
    for values in ([2.0, 1.9, 0.0], [-1.0, -1.1, -9.0]):  # whatever the sign
        model.forward = lambda idx_BT, **options: (torch.tensor([[values]]), None)
        steps = engine.generate(model, [[2]], 2, strategy='greedy', repetition_penalty=1.5, use_cache=False)
        ids = [n.item() for n in steps]
        assert ids == [0, 1]


@pytest.mark.parametrize('options', [dict(strategy='beam'), dict(temperature=-1.0), dict(top_k=0), dict(top_p=0.0)])
def test_bad_sampling_settings_are_refused(model, options):
    with pytest.raises(UserError):
        next(engine.generate(model, [[1]], 1, **options))
