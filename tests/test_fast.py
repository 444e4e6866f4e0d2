import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from folio import engine
from folio import fast
from folio.configurator import UserError
from folio.fast import Int8Linear, OneDNNLinear, head_loss, quantize
from model import GPT, GPTConfig


@pytest.mark.skipif(not fast.ONEDNN, reason='oneDNN is used on x86 CPUs only')
@pytest.mark.parametrize('bias', [True, False])
def test_products_by_onednn_are_float32_products(bias):
    torch.manual_seed(0)
    layer, x = OneDNNLinear(300, 200, bias=bias), torch.randn(4, 50, 300, requires_grad=True)
    upstream = torch.randn(4, 50, 200)
    y = layer(x)
    assert 'onednn' in str(y.grad_fn)
    exact = [x.double().detach().requires_grad_()] + [p.double().detach().requires_grad_() for p in layer.parameters()]
    for given in (upstream, upstream.mT.contiguous().mT, torch.tensor(0.5).expand(4, 50, 200)):
        got = torch.autograd.grad(y, [x, *layer.parameters()], given, retain_graph=True)
        wanted = torch.autograd.grad(F.linear(*exact), exact, given.double())
        for a, b in zip(got, wanted):
            assert (a - b).abs().max() < 1e-5 * b.abs().max()
    assert (y - F.linear(*exact)).abs().max() < 1e-5


def test_autocast_and_small_products_take_torchs_way():
    layer = OneDNNLinear(300, 200)
    assert 'Addmm' in str(layer(torch.randn(1, 300)).grad_fn)
    with torch.autocast('cpu', torch.bfloat16):
        assert layer(torch.randn(200, 300)).dtype == torch.bfloat16


@pytest.mark.parametrize('cap', [0.0, 15.0])
@pytest.mark.parametrize('chunk', [2**25, 128 * 11])
def test_head_loss_is_the_cross_entropy(cap, chunk, monkeypatch):
    monkeypatch.setattr(fast, 'CHUNK', chunk)
    torch.manual_seed(0)
    x, weight = (torch.randn(n, 32, requires_grad=True) for n in (50, 128))
    targets = torch.randint(0, 100, (50,))
    targets[::7] = -1
    logits = (x @ weight.T)[:, :100]
    logits = cap * torch.tanh(logits / cap) if cap else logits
    expected = F.cross_entropy(logits, targets, ignore_index=-1, reduction='sum')
    total = head_loss(x, weight, targets, 100, cap)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(torch.autograd.grad(total / 3, (x, weight)), torch.autograd.grad(expected / 3, (x, weight))):
        assert (a - b).abs().max() < 1e-5
    with torch.no_grad():
        assert head_loss(x, weight, targets, 100, cap).item() == pytest.approx(expected.item(), rel=1e-6)


def test_head_loss_under_autocast_is_close_and_its_gradients_keep_their_type():
    torch.manual_seed(0)
    x, weight = (torch.randn(n, 32, requires_grad=True) for n in (50, 128))
    targets = torch.arange(50)
    exact = torch.autograd.grad(head_loss(x, weight, targets, 100), (x, weight))
    with torch.autocast('cpu', torch.bfloat16):
        total = head_loss(x, weight, targets, 100)
    assert total.dtype == torch.float32
    for a, b in zip(torch.autograd.grad(total, (x, weight)), exact):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.02 * b.norm()


def test_int8_weights_are_the_only_loss_of_precision():
    torch.manual_seed(0)
    layer, x = nn.Linear(300, 200), torch.randn(2, 5, 300) * torch.tensor([1e-3, 1.0]).view(2, 1, 1)
    x[0, 0, 0], x[1, 4] = 30.0, 0.0  # an outlier, and a row of zeros
    quantized = Int8Linear(layer)
    rounded = quantized.weight.double() * quantized.scale.double()[:, None]
    assert (rounded - layer.weight).abs().max() <= 0.501 * quantized.scale.max()
    exact, y = F.linear(x.double(), rounded, layer.bias.double()), quantized(x)
    assert y.shape == exact.shape and y.dtype == torch.float32
    assert ((y - exact).abs() <= 2e-4 * x.abs().amax(dim=-1, keepdim=True)).all()


@pytest.mark.parametrize('arch', ['gpt2', 'modern'])
def test_a_quantized_model_has_int8_layers_and_nearly_the_same_loss(arch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=50, n_layer=2, n_head=2, n_embd=32, arch=arch)).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    idx_BT = torch.randint(50, (4, 32))
    before = model(idx_BT, all_logits=True)[0]
    assert quantize(model) is model
    assert sum(isinstance(m, Int8Linear) for m in model.modules()) == 9 and not any(
        isinstance(m, nn.Linear) for m in model.modules())
    after = model(idx_BT, all_logits=True)[0]
    assert 0 < (after - before).std() < 0.02 * before.std()
    tokens = torch.stack(list(engine.generate(model, idx_BT[:, :4], 20, strategy='greedy')), dim=1)
    assert tokens.shape == (4, 20)


def test_int8_products_that_are_not_exact_are_refused(monkeypatch):
    exact = Int8Linear(nn.Linear(256, 3))
    exact.weight.fill_(127)
    assert exact(torch.full((1, 256), 2.0)).allclose(2.0 * 127 * 256 * exact.scale + exact.bias, rtol=1e-4)
    monkeypatch.setattr(torch, '_int_mm', lambda a, b: (a.int() @ b.int()).clamp(max=32640))
    with pytest.raises(UserError, match='VNNI'):
        quantize(nn.Linear(4, 4))


def test_the_loss_of_no_token_is_zero():
    assert head_loss(torch.zeros(0, 8), torch.zeros(64, 8), torch.zeros(0, dtype=torch.long), 60).item() == 0


@pytest.mark.parametrize('arch, window', [('gpt2', 0), ('modern', 0), ('modern', 20)])
def test_an_accelerated_model_has_the_loss_logits_and_gradients_of_the_plain_one(arch, window):
    torch.manual_seed(0)
    plain = GPT(GPTConfig(block_size=200, vocab_size=50, n_layer=2, n_head=2, n_embd=32, arch=arch, window=window))
    torch.nn.init.normal_(plain.lm_head.weight, std=0.3)
    faster = fast.accelerate(copy.deepcopy(plain))
    idx_BT = torch.randint(50, (3, 200))
    losses = [model(idx_BT, idx_BT.roll(-1, 1))[1] for model in (plain, faster)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    torch.testing.assert_close(plain(idx_BT, all_logits=True)[0], faster(idx_BT, all_logits=True)[0])
    for model_loss in losses:
        model_loss.backward()
    assert plain.state_dict().keys() == faster.state_dict().keys()
    for (name, a), b in zip(plain.named_parameters(), faster.parameters()):
        assert (a.grad - b.grad).abs().max() <= 1e-5 * a.grad.abs().max(), name


def test_gradients_under_float16_stay_finite_however_many_tokens_there_are():
    x, weight = torch.full((2**17, 8), 5.0), torch.zeros(64, 8, requires_grad=True)
    with torch.autocast('cpu', torch.float16):
        head_loss(x, weight, torch.zeros(2**17, dtype=torch.long), 64).div(2**17).backward()
    assert weight.grad.isfinite().all() and weight.grad[0, 0].item() == pytest.approx(-5 * 63 / 64, rel=1e-3)
