"""folio/optim.py: which optimizer steps what, Muon, and the learning rate."""
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from folio.configurator import UserError
from folio.optim import (Muon, learning_rate_at, load_states, make_optimizers, orthogonalize,
                         product_dtype)
from model import GPT, GPTConfig

SMALL = dict(block_size=8, vocab_size=64, n_layer=2, n_head=2, n_embd=32)


def optimizers_of(model, kind, **options):
    defaults = dict(learning_rate=0.1, muon_learning_rate=0.02, weight_decay=0.1, betas=(0.9, 0.95))
    return make_optimizers(model, kind, **(defaults | options))


# ---- The learning rate ---------------------------------------------------------------------------
@pytest.mark.parametrize('step, rate', [
    (0, 1 / 11), (9, 10 / 11), (10, 1.0), (55, 0.55), (100, 0.1), (1000, 0.1)])
def test_cosine_follows_nanogpt(step, rate):
    assert learning_rate_at(step, 100, 1.0, 0.1, warmup=10) == pytest.approx(rate)


@pytest.mark.parametrize('step, rate', [(10, 1), (30, 1), (60, 1), (70, 0.75), (80, 0.5), (100, 0)])
def test_trapezoid_is_flat_then_falls_in_a_line(step, rate):
    got = learning_rate_at(step, 100, 1.0, 0.0, warmup=10, schedule='trapezoid', cooldown=0.4)
    assert got == pytest.approx(rate)


# ---- Which optimizer steps what ------------------------------------------------------------------
@pytest.fixture(params=[(arch, kind) for arch in ('gpt2', 'modern') for kind in ('adamw', 'muon')],
                ids=str)
def model_and_groups(request):
    arch, kind = request.param
    model = GPT(GPTConfig(**SMALL, arch=arch))
    groups = [group for o in optimizers_of(model, kind) for group in o.param_groups]
    return model, groups


def test_matrices_decay_and_vectors_do_not():
    for group in optimizers_of(GPT(GPTConfig(**SMALL)), 'adamw')[0].param_groups:
        for p in group['params']:
            assert group['weight_decay'] == (0.1 if p.ndim >= 2 else 0.0)


def test_next_to_muon_only_the_matrices_of_the_blocks_decay():
    adamw, muon = optimizers_of(GPT(GPTConfig(**SMALL, arch='modern')), 'muon')
    assert [group['weight_decay'] for group in adamw.param_groups] == [0.0, 0.0]
    assert muon.param_groups[0]['weight_decay'] == 0.1


def test_every_parameter_is_stepped_once(model_and_groups):
    model, groups = model_and_groups
    stepped = [id(p) for group in groups for p in group['params']]
    assert sorted(stepped) == sorted(id(p) for p in model.parameters())


def test_muon_steps_exactly_the_matrices_of_the_blocks():
    model = GPT(GPTConfig(**SMALL, arch='modern'))
    adamw, muon = optimizers_of(model, 'muon')
    stepped = {id(p) for p in muon.param_groups[0]['params']}
    for name, p in model.named_parameters():
        assert (id(p) in stepped) == name.startswith('transformer.h.'), name
    assert muon.param_groups[0]['lr'] == 0.02
    assert adamw.param_groups[0]['lr'] == 0.1


def test_states_of_another_optimizer_are_refused():
    model = GPT(GPTConfig(**SMALL))
    saved = [o.state_dict() for o in optimizers_of(model, 'muon')]
    with pytest.raises(UserError, match='give --optimizer as it was'):
        load_states(optimizers_of(model, 'adamw'), saved)


# ---- Muon ----------------------------------------------------------------------------------------
@pytest.mark.parametrize('shape', [(3, 32, 32), (2, 64, 16), (2, 16, 64)], ids=str)
def test_orthogonalize_brings_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    assert 0.3 < values.min()
    assert values.max() < 1.3


@pytest.mark.parametrize('shape', [(3, 32, 32), (2, 64, 16), (2, 16, 64)], ids=str)
def test_matrices_are_orthogonalized_together_as_one_by_one(shape):
    torch.manual_seed(0)
    G = torch.randn(shape)
    one_by_one = torch.cat([orthogonalize(g[None]) for g in G])
    torch.testing.assert_close(orthogonalize(G), one_by_one, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('shape', [(16, 16), (48, 16), (16, 64)], ids=str)
def test_muon_steps_as_torchs_does(shape):
    """torch's has the same scale if it is told to leave its learning rate alone: "original"."""
    torch.manual_seed(0)
    start = torch.randn(shape)
    gradients = torch.randn(4, *shape)
    results = []
    for make in (lambda p: Muon([p], n_matrices=[1], lr=0.1, weight_decay=0.5),
                 lambda p: torch.optim.Muon([p], lr=0.1, weight_decay=0.5, momentum=0.95,
                                            nesterov=True, adjust_lr_fn='original')):
        p = torch.nn.Parameter(start.clone())
        muon = make(p)
        for g in gradients:
            p.grad = g.clone()
            muon.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, atol=2e-2, rtol=0)  # torch's products are in bfloat16


def test_muon_treats_query_key_and_value_apart():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=16,
                          arch='modern'))
    muon = optimizers_of(model, 'muon', muon_learning_rate=1.0, weight_decay=0.0)[1]
    weight = model.transformer.h[0].attn.c_attn.weight
    before = weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    weight.grad[:16] *= 1e3  # a loud query must not drown key and value
    muon.step()
    for part in (weight - before).detach().chunk(3):
        assert torch.linalg.matrix_norm(part, 2) == pytest.approx(1.0, abs=0.35)


@pytest.mark.parametrize('is_emulated, expected', [(False, torch.bfloat16), (True, torch.float32)])
def test_muon_multiplies_in_bfloat16_on_gpus_that_have_it(monkeypatch, is_emulated, expected):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported',
                        lambda including_emulation: including_emulation or not is_emulated)
    with FakeTensorMode():
        assert product_dtype(torch.empty(2, 2, device='cuda')) == expected


def test_muon_takes_the_number_of_matrices_from_the_model():
    """An MLP three times as wide as the stream has the shape of c_attn, and is one matrix."""
    model = GPT(GPTConfig(**SMALL, arch='modern'))
    for block in model.transformer.h:
        block.mlp.c_fc = torch.nn.Linear(32, 96, bias=False)
        block.mlp.c_proj = torch.nn.Linear(96, 32, bias=False)
    group = optimizers_of(model, 'muon')[1].param_groups[0]
    n_matrices = {id(p): n for p, n in zip(group['params'], group['n_matrices'])}
    for block in model.transformer.h:
        assert n_matrices[id(block.attn.c_attn.weight)] == 3
        assert n_matrices[id(block.mlp.c_fc.weight)] == 1
