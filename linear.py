"""
Matrix products: by oneDNN on x86 CPUs, and with weights of 8 bits for decoding.
    python -c "from linear import *; print(linear(torch.ones(2, 3), torch.ones(4, 3)))"

torch's float32 products on x86 are MKL's, which on AMD processors leaves AVX-512 unused; oneDNN, which every such torch
carries too, uses it. On two cores of an AMD EPYC it does 430 GFLOP/s to MKL's 190 (1,024 x 768 x 3,072; 2026-11-21).
"""
import platform

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError

ONEDNN = torch.backends.mkldnn.is_available() and platform.machine() in ('x86_64', 'AMD64')


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


def linear(x, weight, bias=None):
    """F.linear: x (..., C) times weight (N, C) transposed, plus bias (N,) if there is one: (..., N)."""
    plain = x.device.type == 'cpu' and x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled('cpu')
    if ONEDNN and plain and x.numel() * weight.size(0) >= 2**19:  # a smaller one is done before oneDNN has begun
        return onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)


@torch.library.custom_op('folio::onednn_linear', mutates_args=())
def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')


@onednn_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.size(0))


def save_factors(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def gradients(ctx, dy):
    (x, weight), dy = ctx.saved_tensors, dy.contiguous() if 0 in dy.stride() else dy
    need_x, need_weight, need_bias = ctx.needs_input_grad
    dy_RN, x_RC = dy.flatten(0, -2), x.flatten(0, -2)
    return (onednn_linear(dy, weight.t(), None) if need_x else None,
            onednn_linear(dy_RN.t(), x_RC.t(), None) if need_weight else None,
            dy_RN.sum(0) if need_bias else None)


onednn_linear.register_autograd(gradients, setup_context=save_factors)


# ---- Weights of 8 bits -----------------------------------------------------------------------------------------------
class Int8Linear(nn.Module):
    """A Linear whose weights are integers of 8 bits times a scale for each output: a quarter of the memory to read.

    Only the weights lose precision. Products are of integers, so x is taken as two digits of 8 bits, 128 high + low, in
    a unit of its own for each row: 15 bits, which is as good as float32 beside what the weights have lost.
    """

    def __init__(self, layer):
        super().__init__()
        scale_N1 = layer.weight.detach().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        self.register_buffer('weight', (layer.weight.detach() / scale_N1).round().to(torch.int8))
        self.register_buffer('scale', scale_N1[:, 0])
        self.bias = layer.bias

    def forward(self, x):
        x_RC = x.flatten(0, -2).float()
        unit_R1 = x_RC.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / (127 * 128)
        x_RC = (x_RC / unit_R1).round()
        high_RC = (x_RC / 128).round()
        digits = torch.cat((high_RC, x_RC - 128 * high_RC)).to(torch.int8)
        high_RN, low_RN = torch._int_mm(digits, self.weight.t()).float().chunk(2)
        y_RN = torch.add(low_RN, high_RN, alpha=128) * (unit_R1 * self.scale)
        y_RN = y_RN if self.bias is None else y_RN + self.bias
        return y_RN.view(*x.shape[:-1], -1)


def quantize(model):
    """Make each Linear of a model on the CPU an Int8Linear, for inference only; embeddings stay as they are.

    Raises UserError where products of integers are not exact: without VNNI instructions oneDNN cuts sums off.
    """
    most = torch.full((256, 256), 127, dtype=torch.int8)
    if not ONEDNN or not torch._int_mm(most, most).eq(256 * 127 * 127).all():
        raise UserError('int8 weights need an x86 CPU with VNNI instructions; leave out --quantize')
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, Linear):
                setattr(module, name, Int8Linear(layer))
    return model
