"""folio/fast.py: the same numbers sooner, and weights of 8 bits."""
import copy
import dataclasses
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from folio import fast
from folio.fast import (OneDNNLinear, float32_product, head_loss, loss_and_gradients)
from model import GPT, GPTConfig, rotate

SMALL = GPTConfig(block_size=200, vocab_size=50, n_layer=2, n_head=2, n_embd=32)


# ---- An accelerated model ------------------------------------------------------------------------
@pytest.fixture(params=[('gpt2', 0), ('modern', 0), ('modern', 20)], ids=str)
def pair(request):
    """A plain model, a copy that is accelerated, and a batch for both."""
    arch, window = request.param
    torch.manual_seed(0)
    plain = GPT(dataclasses.replace(SMALL, arch=arch, window=window))
    nn.init.normal_(plain.lm_head.weight, std=0.3)
    return plain, fast.accelerate(copy.deepcopy(plain)), torch.randint(50, (3, 200))


def test_an_accelerated_model_has_the_loss_and_gradients_of_the_plain_one(pair):
    plain, faster, idx_BT = pair
    losses = [model(idx_BT, idx_BT.roll(-1, 1))[1] for model in (plain, faster)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(plain.named_parameters(), faster.parameters()):
        assert (a.grad - b.grad).abs().max() <= 1e-5 * a.grad.abs().max(), name


def test_an_accelerated_model_has_the_logits_of_the_plain_one(pair):
    plain, faster, idx_BT = pair
    torch.testing.assert_close(faster(idx_BT, all_logits=True)[0],
                               plain(idx_BT, all_logits=True)[0])


def test_an_accelerated_model_keeps_the_names_of_its_parameters(pair):
    plain, faster, _ = pair
    assert faster.state_dict().keys() == plain.state_dict().keys()


def test_an_accelerated_model_returns_no_logits_with_its_loss(pair):
    _, faster, idx_BT = pair
    assert faster(idx_BT, idx_BT)[0] is None


# ---- Products by oneDNN --------------------------------------------------------------------------
@pytest.mark.skipif(not fast.ONEDNN, reason='oneDNN is used on x86 CPUs only')
@pytest.mark.parametrize('bias', [True, False])
def test_products_by_onednn_are_float32_products(bias):
    torch.manual_seed(0)
    layer = OneDNNLinear(300, 200, bias=bias)
    x = torch.randn(4, 50, 300, requires_grad=True)
    upstream = torch.randn(4, 50, 200)
    y = layer(x)
    assert 'onednn' in str(y.grad_fn)
    exact = [t.double().detach().requires_grad_() for t in (x, *layer.parameters())]
    exact_y = F.linear(*exact)
    assert (y - exact_y).abs().max() < 1e-5
    transposed = upstream.mT.contiguous().mT
    expanded = torch.tensor(0.5).expand(4, 50, 200)
    for dy in (upstream, transposed, expanded):
        ours = torch.autograd.grad(y, [x, *layer.parameters()], dy, retain_graph=True)
        wanted = torch.autograd.grad(exact_y, exact, dy.double(), retain_graph=True)
        for a, b in zip(ours, wanted):
            assert (a - b).abs().max() < 1e-5 * b.abs().max()


def test_small_products_take_torchs_way():
    layer = OneDNNLinear(300, 200)
    assert 'Addmm' in str(layer(torch.randn(1, 300)).grad_fn)


@pytest.mark.parametrize(('n_rows', 'by_onednn'),
                         [(2, False), (3, True), (256, True), (257, False)])
def test_on_intel_onednn_takes_products_of_3_to_256_rows(n_rows, by_onednn, monkeypatch):
    monkeypatch.setattr(fast, 'ONEDNN', True)
    monkeypatch.setattr(fast, 'IS_INTEL', True)
    calls = []
    monkeypatch.setattr(fast, 'onednn_linear', lambda *tensors: calls.append(tensors))
    OneDNNLinear(1024, 256)(torch.zeros(1, n_rows, 1024))
    assert bool(calls) == by_onednn


def test_products_under_autocast_have_its_type():
    layer = OneDNNLinear(300, 200)
    with torch.autocast('cpu', torch.bfloat16):
        assert layer(torch.randn(200, 300)).dtype == torch.bfloat16


# ---- Training in bfloat16 on a CPU ---------------------------------------------------------------
def gradients(model, idx_BT, dtype):
    """Return all gradients of a model, computed in dtype, as one vector in float32."""
    with torch.autocast('cpu', dtype=dtype, enabled=dtype != torch.float32):
        loss = model(idx_BT, idx_BT.roll(-1, 1))[1]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize('arch', ['gpt2', 'modern'])
@pytest.mark.parametrize('T', [2, 33, 200])
def test_gradients_in_bfloat16_are_as_near_to_float32_as_the_plain_ones(arch, T):
    torch.manual_seed(0)
    plain = GPT(dataclasses.replace(SMALL, arch=arch))
    for p in plain.parameters():
        nn.init.normal_(p, std=0.2)  # larger than at first, so that attention looks somewhere
    faster = fast.accelerate(copy.deepcopy(plain))
    idx_BT = torch.randint(50, (4, T))
    exact = gradients(plain, idx_BT, torch.float32)
    error = (gradients(plain, idx_BT, torch.bfloat16) - exact).norm()
    assert (gradients(faster, idx_BT, torch.bfloat16) - exact).norm() < 1.3 * error


def test_attention_is_written_out_only_where_that_is_faster(monkeypatch):
    lengths = []
    fused = F.scaled_dot_product_attention

    def spy(q, *args, **kwargs):
        lengths.append(q.size(2))
        return fused(q, *args, **kwargs)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', spy)
    model = fast.accelerate(GPT(dataclasses.replace(SMALL, n_layer=1, block_size=257)))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        for T in (1, 2, 256, 257):
            model(torch.zeros(1, T, dtype=torch.long))
        assert lengths == [1, 257]
        with torch.no_grad():
            model(torch.zeros(1, 3, dtype=torch.long))
        model.config.dropout = 0.1
        model(torch.zeros(1, 4, dtype=torch.long))
        assert lengths == [1, 257, 3, 4]
        model.eval()
        model(torch.zeros(1, 5, dtype=torch.long))
    model(torch.zeros(1, 6, dtype=torch.long))  # in float32
    assert lengths == [1, 257, 3, 4, 6]


def test_the_norm_in_bfloat16_is_the_norm_and_so_is_its_gradient():
    torch.manual_seed(0)
    x = torch.randn(3, 50, 40).bfloat16().requires_grad_()
    dy = torch.randn(3, 50, 40).bfloat16()
    y = fast.BFloat16Norm.apply(x)
    dx, = torch.autograd.grad(y, x, dy)
    exact_x = x.detach().double().requires_grad_()
    exact_y = F.rms_norm(exact_x, (40,), eps=1e-6)
    exact_dx, = torch.autograd.grad(exact_y, exact_x, dy.double())
    # bfloat16 has 8 bits, and y is rounded twice, dx a few times more.
    torch.testing.assert_close(y.double(), exact_y, rtol=2 * 2**-8, atol=0)
    assert (dx.double() - exact_dx).norm() < 2**-7 * exact_dx.norm()


@pytest.mark.parametrize('options', [{'elementwise_affine': True}, {'eps': 1.0}], ids=str)
def test_a_norm_with_weights_or_another_eps_keeps_them(options):
    plain = nn.RMSNorm(8, **{'eps': 1e-6, 'elementwise_affine': False, **options}).bfloat16()
    if plain.weight is not None:
        nn.init.constant_(plain.weight, 3)
    faster = copy.deepcopy(plain)
    faster.__class__ = fast.FastRMSNorm
    x = torch.randn(2, 8).bfloat16().requires_grad_()
    assert torch.equal(faster(x), plain(x))


def test_a_rotation_in_bfloat16_is_a_rotation():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 50, 16).bfloat16()
    angle = torch.randn(2, 1, 50, 8)
    exact = rotate(x.double(), angle.cos().double(), angle.sin().double())
    ours = fast.rotate_in_bfloat16(x, angle.cos(), angle.sin())
    assert (ours.double() - exact).norm() < 2**-8 * exact.norm()


def test_the_norm_in_bfloat16_of_zeros_is_zero():
    x = torch.zeros(1, 8, dtype=torch.bfloat16, requires_grad=True)
    y = fast.BFloat16Norm.apply(x)
    y.sum().backward()
    assert y.eq(0).all() and x.grad.isfinite().all()


# ---- Attention in a window -----------------------------------------------------------------------
@pytest.mark.parametrize('window', [1, 5, 64, 100, 149, 150, 299, 300, 1000])
def test_a_window_in_blocks_equals_written_out_attention_and_so_do_its_gradients(window):
    results = []
    for flash in (True, False):
        torch.manual_seed(0)
        model = GPT(dataclasses.replace(SMALL, block_size=300, window=window, flash=flash))
        if flash:
            model = fast.accelerate(model)
        logits_BTV, _ = model(torch.randint(50, (2, 300)), all_logits=True)
        logits_BTV.square().sum().backward()
        gradients = [p.grad / p.grad.abs().max() for p in model.parameters()]
        results.append([logits_BTV, *gradients])
    for ours, written_out in zip(*results):
        torch.testing.assert_close(ours, written_out, atol=1e-5, rtol=0)


def flops_of_attention(model, T):
    """Return the FLOPs of attention to T tokens in one layer."""
    q, k, v = torch.randn(3, 1, 2, T, 16)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.transformer.h[0].attn.attend(q, k, v, None)
    return counter.get_total_flops()


def test_accelerated_attention_in_a_window_costs_the_window_not_the_context():
    model = fast.accelerate(GPT(dataclasses.replace(SMALL, window=100)))
    short = flops_of_attention(model, 1000)
    assert flops_of_attention(model, 4000) == pytest.approx(4 * short, rel=0.1)


def test_accelerated_attention_in_a_window_costs_less_than_all_of_it():
    windowed = fast.accelerate(GPT(dataclasses.replace(SMALL, window=100)))
    full = fast.accelerate(GPT(SMALL))
    assert flops_of_attention(windowed, 4000) < flops_of_attention(full, 4000) / 10


# ---- The loss in chunks --------------------------------------------------------------------------
@pytest.fixture
def head():
    """(x, weight, targets) of 50 positions and a vocabulary of 100 in 128 rows."""
    torch.manual_seed(0)
    x = torch.randn(50, 32, requires_grad=True)
    weight = torch.randn(128, 32, requires_grad=True)
    targets = torch.randint(0, 100, (50,))
    targets[::7] = -1
    return x, weight, targets


def plain_head_loss(x, weight, targets, cap):
    logits = (x @ weight.T)[:, :100]
    if cap:
        logits = cap * torch.tanh(logits / cap)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction='sum')


@pytest.mark.parametrize('cap', [0.0, 15.0])
@pytest.mark.parametrize('chunk', [2**25, 128 * 11], ids=['whole', 'chunks'])
def test_head_loss_is_the_cross_entropy_and_so_are_its_gradients(head, cap, chunk, monkeypatch):
    monkeypatch.setattr(fast, 'CHUNK', chunk)
    x, weight, targets = head
    expected = plain_head_loss(x, weight, targets, cap)
    total = head_loss(x, weight, targets, 100, cap)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    ours = torch.autograd.grad(total / 3, (x, weight))
    wanted = torch.autograd.grad(expected / 3, (x, weight))
    for a, b in zip(ours, wanted):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize('cap', [0.0, 15.0])
def test_the_form_for_compilers_has_the_loss_and_gradients_of_the_one_in_place(head, cap):
    x, weight, targets = head
    with torch.no_grad():
        in_place, compilers = [
            loss_and_gradients(x, weight, targets, 100, cap, needs_gradients=True, in_place=flag)
            for flag in (True, False)]
    for a, b in zip(compilers, in_place):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()


@pytest.mark.slow
def test_a_compiled_head_loss_is_the_same_and_writes_no_float32_but_the_gradients(head):
    x, weight, targets = head
    x = x.detach().repeat(4, 1).requires_grad_()
    weight = weight.detach().repeat(2, 1).requires_grad_()  # (200, 256) logits: no other such shape
    targets = targets.repeat(4)

    def run(head_loss):
        with torch.autocast('cpu', torch.bfloat16):
            total = head_loss(x, weight, targets, 250)
        return total, *torch.autograd.grad(total, (x, weight))

    compiled = torch.compile(head_loss, fullgraph=True)
    results, sources = run_and_get_code(run, compiled)
    for a, b in zip(results, run(head_loss)):
        assert (a - b).norm() <= 0.01 * b.norm()
    buffers = re.findall(r'empty_strided_cpu\(\((\d+), (\d+)\), .*?, (torch.\w+)\)', sources[0])
    assert ('200', '256', 'torch.bfloat16') in buffers
    assert ('200', '256', 'torch.float32') not in buffers


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_products_of_16_bits_are_summed_in_float32_on_cuda(dtype):
    """Shapes, formats and operations only: nothing is computed, and no GPU is needed."""
    operations = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operations.append(function)
            return function(*args, **(kwargs or {}))

    with FakeTensorMode(), Record():
        d_nV = torch.empty(50, 128, device='cuda', dtype=dtype)
        x_nC = torch.empty(50, 32, device='cuda', dtype=dtype)
        product = float32_product(d_nV.t(), x_nC)
    assert torch.ops.aten.mm.dtype in operations
    assert product.dtype == torch.float32
    assert product.shape == (128, 32)


@torch.no_grad()
def test_head_loss_without_gradients_is_the_same(head):
    x, weight, targets = head
    expected = plain_head_loss(x, weight, targets, 15.0)
    assert head_loss(x, weight, targets, 100, 15.0).item() == pytest.approx(expected.item())


def test_head_loss_under_autocast_is_close_and_its_gradients_keep_their_type(head):
    x, weight, targets = head
    exact = torch.autograd.grad(head_loss(x, weight, targets, 100), (x, weight))
    with torch.autocast('cpu', torch.bfloat16):
        total = head_loss(x, weight, targets, 100)
    assert total.dtype == torch.float32
    for a, b in zip(torch.autograd.grad(total, (x, weight)), exact):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.02 * b.norm()


def test_the_head_loss_of_no_token_is_zero():
    none = torch.zeros(0, dtype=torch.long)
    assert head_loss(torch.zeros(0, 8), torch.zeros(64, 8), none, 60).item() == 0


def test_gradients_under_float16_stay_finite_however_many_tokens_there_are():
    n = 2**17
    x = torch.full((n, 8), 5.0)
    weight = torch.zeros(64, 8, requires_grad=True)
    with torch.autocast('cpu', torch.float16):
        total = head_loss(x, weight, torch.zeros(n, dtype=torch.long), 64)
    total.div(n).backward()
    assert weight.grad.isfinite().all()
    assert weight.grad[0, 0].item() == pytest.approx(-5 * 63 / 64, rel=1e-3)
