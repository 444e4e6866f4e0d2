import pytest
import torch

from folio.configurator import UserError
from model import GPT, GPTConfig
from folio.optim import learning_rate_at, make_optimizers, orthogonalize


def test_cosine_follows_nanogpt():
    rate = lambda step: learning_rate_at(step, 100, 1.0, 0.1, warmup=10)
    assert rate(0) == pytest.approx(1 / 11) and rate(10) == pytest.approx(1.0)
    assert rate(55) == pytest.approx(0.55) and rate(100) == rate(1000) == pytest.approx(0.1)


def test_trapezoid_is_flat_then_falls_in_a_line():
    rate = lambda step: learning_rate_at(step, 100, 1.0, 0.0, warmup=10, schedule='trapezoid', cooldown=40)
    assert [rate(s) for s in (10, 30, 60, 70, 80, 100)] == pytest.approx([1, 1, 1, 0.75, 0.5, 0])
    with pytest.raises(UserError):
        learning_rate_at(0, 1, 1.0, 0.0, schedule='linear')


@pytest.mark.parametrize('arch', ['gpt2', 'modern'])
@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_vectors_do_not_decay_and_every_parameter_is_stepped_once(arch, kind):
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=2, n_head=2, n_embd=32, arch=arch))
    groups = [g for o in make_optimizers(model, kind, 0.1, 0.02, 0.1, (0.9, 0.95)) for g in o.param_groups]
    for group in groups:
        assert all((p.ndim >= 2) == (group['weight_decay'] > 0) for p in group['params'])
    params = [p for group in groups for p in group['params']]
    assert len(params) == len(list(model.parameters())) == len({id(p) for p in params})


@pytest.mark.parametrize('shape', [(3, 32, 32), (2, 64, 16), (2, 16, 64)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    torch.manual_seed(0)
    G = torch.randn(shape)
    values = torch.linalg.svdvals(orthogonalize(G))
    assert 0.3 < values.min() and values.max() < 1.3
    one_by_one = torch.stack([orthogonalize(g) for g in G])
    torch.testing.assert_close(orthogonalize(G), one_by_one, atol=1e-4, rtol=1e-4)


def test_muon_treats_query_key_and_value_apart():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=16, arch='modern'))
    muon = make_optimizers(model, 'muon', 0.1, 1.0, 0.0, (0.9, 0.95))[1]
    weight = model.transformer.h[0].attn.c_attn.weight
    before = weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    weight.grad[:16] *= 1e3  # a loud query must not drown key and value
    muon.step()
    for part in (weight - before).detach().chunk(3):
        assert torch.linalg.matrix_norm(part, 2) == pytest.approx(1.0, abs=0.35)
