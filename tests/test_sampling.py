import pytest
import torch

from configurator import UserError
from model import GPT, GPTConfig
from sampling import draw, next_token_logits


def test_draws_follow_the_probabilities():
    model = GPT(GPTConfig(block_size=8, vocab_size=4, n_layer=1, n_head=1, n_embd=8, arch='modern')).eval()
    model.forward = lambda idx_BT, **options: (torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(len(idx_BT), 1, 4), None)
    drawn = torch.cat(list(model.generate([[0]] * 2000, 5, seed=0, use_cache=False)))
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


def test_top_k_of_equals_keeps_the_first():
    logits = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 2.0, 3.0]])
    for k in range(1, 7):
        order = logits.sort(descending=True, stable=True).indices[:, :k]
        kept = next_token_logits(logits, 'top_k', top_k=k).isfinite()
        assert torch.equal(kept, torch.zeros_like(kept).scatter(1, order, True))


def test_greedy_draws_no_noise():
    before = torch.get_rng_state()
    assert draw(torch.tensor([[1.0, 3.0, 2.0]]), 'greedy').tolist() == [1]
    assert torch.equal(torch.get_rng_state(), before)


def test_repetition_penalty_makes_what_was_said_less_likely():
    model = GPT(GPTConfig(block_size=8, vocab_size=3, n_layer=1, n_head=1, n_embd=8)).eval()
    for values in ([2.0, 1.9, 0.0], [-1.0, -1.1, -9.0]):  # whatever the sign
        model.forward = lambda idx_BT, **options: (torch.tensor([[values]]), None)
        ids = [n.item() for n in model.generate([[2]], 2, strategy='greedy', repetition_penalty=1.5, use_cache=False)]
        assert ids == [0, 1]


@pytest.mark.parametrize('options', [dict(strategy='beam'), dict(temperature=-1.0), dict(top_k=0), dict(top_p=0.0)])
def test_bad_sampling_settings_are_refused(model, options):
    with pytest.raises(UserError):
        next(model.generate([[1]], 1, **options))
