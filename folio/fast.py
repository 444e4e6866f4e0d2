"""
Compute the same numbers sooner: faster layers and loss for a model.
    model = fast.accelerate(GPT(config))    # delete this call and everything still works

Each trick is a class with the parameters of the one it replaces and another forward:
    OneDNNLinear        matrix products by oneDNN, on x86 CPUs
    FastRMSNorm         norms for training in bfloat16 on a CPU, in few operations
    FastAttention       attention in a window, at the cost of the window instead of the context;
                        to train in bfloat16 on a CPU, written out, because that is faster there
    ChunkedLossGPT      the head's loss in chunks, so that the logits are never all in memory
"""
import math
import platform

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from model import GPT, LOGIT_CAP, NORM_EPS, CausalSelfAttention, can_see


def is_intel():
    """Return whether the processor is Intel's, as far as Linux says so."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8', errors='replace') as f:
            return 'GenuineIntel' in f.read(4096)
    except OSError:
        return False


ONEDNN = torch.backends.mkldnn.is_available() and platform.machine() in ('x86_64', 'AMD64')
IS_INTEL = is_intel()
SMALL_PRODUCT = 2**19  # multiplications; MKL finishes fewer before oneDNN has begun
SHORT_CONTEXT = 256  # tokens; see FastAttention
SMALLEST_BLOCK = 64  # queries; smaller blocks waste time on many tiny products
CHUNK = 2**25  # logits at a time on a CPU, whose caches are small; eight times as many on a GPU


def accelerate(model):
    """Make a GPT faster, in place, and return it. Losses and logits stay the same to rounding.

    With targets the model then returns (None, loss): the logits are never all there.
    """
    faster = {nn.Linear: OneDNNLinear, nn.RMSNorm: FastRMSNorm, CausalSelfAttention: FastAttention,
              GPT: ChunkedLossGPT}
    for module in model.modules():
        if type(module) in faster:
            module.__class__ = faster[type(module)]  # the same parameters, another forward
    return model


# ---- Matrix products by oneDNN -------------------------------------------------------------------
# torch multiplies float32 on x86 CPUs by MKL, which leaves AVX-512 unused on AMD processors.
# oneDNN, which every such torch carries too, uses it: on two cores of an AMD EPYC 430 GFLOP/s to
# MKL's 190 (1,024 x 768 x 3,072; 2026-11-21).
# On Intel's processors MKL uses AVX-512 too. There the head and six layers of GPT-2 124M take, by
# MKL and by oneDNN, 14 and 20 ms for one row, 42 and 27 for 8 rows, 177 and 164 for 256, 450 and
# 490 for 768. For the gradients of 1,024 rows oneDNN takes 1.2 to 2.6 times as long (two cores of
# an Intel Xeon with AVX-512, 2026-11-26).
class OneDNNLinear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


def linear(x, weight, bias=None):
    """Return x weight' + bias, (..., N), as F.linear: x (..., C), weight (N, C), bias (N,)."""
    is_float32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled('cpu')
    is_large = x.numel() * weight.size(0) >= SMALL_PRODUCT
    n_rows = math.prod(x.shape[:-1])
    suits_mkl = IS_INTEL and (n_rows <= 2 or n_rows > 256)
    if ONEDNN and x.device.type == 'cpu' and is_float32 and is_large and not suits_mkl:
        return onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)


@torch.library.custom_op('folio::onednn_linear', mutates_args=())
def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')


@onednn_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.size(0))


def save_for_backward(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def linear_backward(ctx, dy):
    x, weight = ctx.saved_tensors
    if 0 in dy.stride():
        dy = dy.contiguous()  # the expanded gradient of a sum, say, which oneDNN cannot read
    need_x, need_weight, need_bias = ctx.needs_input_grad
    x_RC = x.flatten(0, -2)
    dy_RN = dy.flatten(0, -2)
    dx = onednn_linear(dy, weight.t(), None) if need_x else None
    dweight = onednn_linear(dy_RN.t(), x_RC.t(), None) if need_weight else None
    dbias = dy_RN.sum(0) if need_bias else None
    return dx, dweight, dbias


onednn_linear.register_autograd(linear_backward, setup_context=save_for_backward)


# ---- Training in bfloat16 on a CPU ---------------------------------------------------------------
# torch computes a norm and its gradient on a CPU in 21 operations, and model.rotate takes nine. In
# bfloat16 many of them convert to float32 and back. Here they are few. A compiler fuses the plain
# ones, so a compiled model keeps those.
def trains_in_bfloat16(x):
    """Return whether x is in bfloat16 on a CPU, and a gradient may be asked for."""
    return x.device.type == 'cpu' and x.dtype == torch.bfloat16 and torch.is_grad_enabled()


def needs_few_operations(x):
    """Return whether x trains in bfloat16 on a CPU, and no compiler will fuse its operations."""
    return trains_in_bfloat16(x) and not torch.compiler.is_compiling()


class FastRMSNorm(nn.RMSNorm):
    def forward(self, x):
        is_plain = self.weight is None and self.eps == NORM_EPS  # as model.rms_norm
        if is_plain and needs_few_operations(x):
            return BFloat16Norm.apply(x)
        return super().forward(x)


class BFloat16Norm(torch.autograd.Function):
    """The autograd function of model.rms_norm for x in bfloat16: only the sums are in float32."""

    @staticmethod
    def forward(ctx, x):
        # vector_norm sums squares in float32 without a copy of x in float32.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (length.square() / x.size(-1) + NORM_EPS).rsqrt().bfloat16()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        # However x changes, y keeps its length, so what dy has along y makes no difference.
        y, scale = ctx.saved_tensors
        along = (dy * y).mean(dim=-1, keepdim=True)
        return torch.addcmul(dy, y, along, value=-1).mul_(scale)


def rotate_in_bfloat16(x_BHTD, cos, sin):
    """Return model.rotate(x, cos, sin), (B, H, T, D), computed in bfloat16.

    cos, sin: (T, D/2).
    """
    cos = torch.cat((cos, cos), dim=-1).bfloat16()
    sin = torch.cat((sin, -sin), dim=-1).bfloat16()
    swapped = x_BHTD.roll(x_BHTD.size(-1) // 2, dims=-1)  # (a, b) becomes (b, a)
    return torch.addcmul(x_BHTD * cos, swapped, sin)


# ---- Attention -----------------------------------------------------------------------------------
class FastAttention(CausalSelfAttention):
    def rotate_and_norm(self, x_BHTD, cos, sin):
        if needs_few_operations(x_BHTD):
            return BFloat16Norm.apply(rotate_in_bfloat16(x_BHTD, cos, sin))
        return super().rotate_and_norm(x_BHTD, cos, sin)

    def attend(self, q_BHTD, k_BHSD, v_BHSD, mask):
        if mask is None and works_in_blocks(self.config, q_BHTD.size(2), k_BHSD.size(2)):
            return self.attend_in_blocks(q_BHTD, k_BHSD, v_BHSD)
        if mask is None and self.is_faster_written_out(q_BHTD):
            return self.attend_written_out(q_BHTD, k_BHSD, v_BHSD)
        return super().attend(q_BHTD, k_BHSD, v_BHSD, mask)

    def is_faster_written_out(self, q_BHTD):
        """Return whether this is training in bfloat16, on a CPU, on a short context.

        There torch's own attention takes up to eight times as long as in float32, and plain matrix
        products take less time than in float32. On a long context, moving all the scores to memory
        and back costs more than that (torch 2.13, an Intel Xeon with AMX, 2026-11-26;
        docs/notes.md).
        """
        is_short = 1 < q_BHTD.size(2) <= SHORT_CONTEXT
        # With dropout torch's attention is written out too.
        drops_out = self.training and self.config.dropout > 0
        return self.config.flash and is_short and not drops_out and trains_in_bfloat16(q_BHTD)

    def attend_written_out(self, q_BHTD, k_BHTD, v_BHTD):
        """Return what `attend` would of a whole text, causal and without dropout."""
        B, H, T, D = q_BHTD.shape
        q_BHTD = q_BHTD / math.sqrt(D)
        q, k, v = (x_BHTD.reshape(B * H, T, D) for x_BHTD in (q_BHTD, k_BHTD, v_BHTD))
        future_TT = q.new_full((T, T), -math.inf).triu(1)
        scores = torch.baddbmm(future_TT, q, k.mT)
        y = torch.bmm(scores.softmax(dim=-1), v)
        return y.view(B, H, T, D)

    def attend_in_blocks(self, q_BHTD, k_BHTD, v_BHTD):
        """Return what `attend` with the window's mask would, at a cost of T * window.

        The text is cut into blocks of at least the window's length: a query sees keys of its own
        block and of the one before, nothing else.
        """
        B, H, T, D = q_BHTD.shape
        size = max(self.config.window, SMALLEST_BLOCK)

        def to_blocks(x_BHTD):
            """(B, H, T, D) -> (B * H, blocks, size, D): blocks stand where `attend` has heads."""
            x_BHTD = F.pad(x_BHTD, (0, 0, 0, -T % size))
            return x_BHTD.reshape(B * H, -1, size, D)

        def with_the_block_before(x):
            return torch.cat((x[:, :-1], x[:, 1:]), dim=2)

        q, k, v = to_blocks(q_BHTD), to_blocks(k_BHTD), to_blocks(v_BHTD)
        pos_S = torch.arange(2 * size, device=q.device)
        mask = can_see(pos_S[size:], pos_S, self.config.window)
        # The first block has none before it.
        first = super().attend(q[:, :1], k[:, :1], v[:, :1], mask[:, size:])
        rest = super().attend(q[:, 1:], with_the_block_before(k), with_the_block_before(v), mask)
        y = torch.cat((first, rest), dim=1)
        return y.view(B, H, -1, D)[:, :, :T]


def works_in_blocks(config, T, S):
    """Return whether attention to a whole text is computed block by block."""
    is_long = S > 2 * max(config.window, SMALLEST_BLOCK)
    return config.flash and config.window > 0 and T == S and is_long


# ---- The loss in chunks --------------------------------------------------------------------------
class ChunkedLossGPT(GPT):
    def attention_mask(self, pos_T, key_pos_S, hides_keys):
        T, S = len(pos_T), len(key_pos_S)
        if works_in_blocks(self.config, T, S) and not hides_keys:
            return None  # FastAttention knows the window
        return super().attention_mask(pos_T, key_pos_S, hides_keys)

    def logits_and_loss(self, x, targets_BT):
        cap = LOGIT_CAP if self.config.arch == 'modern' else 0.0
        total = head_loss(x.flatten(0, 1), self.lm_head.weight, targets_BT.flatten(),
                          vocab_size=self.config.vocab_size, cap=cap)
        n_targets = (targets_BT != -1).sum()
        return None, total / n_targets.clamp(min=1)


def head_loss(x_NC, weight_VC, targets_N, vocab_size, cap=0.0):
    """Return the sum of -log softmax(x W')[target], in nats, over targets that are not -1.

    vocab_size: the rows of the weight from this one on are padding and left out of the softmax.
    cap: logits go through cap tanh(logits / cap); 0: they do not. The gradients are computed in the
    forward pass, chunk by chunk, while the logits are there; the backward pass only scales them.
    """
    return HeadLoss.apply(x_NC, weight_VC, targets_N, vocab_size, cap, torch.is_grad_enabled())


def soft_cap(logits, cap):
    """Return cap tanh(logits / cap) in float32; as they are where cap is 0."""
    if cap == 0:
        return logits.float()
    return (logits.float() / cap).tanh_() * cap


class HeadLoss(torch.autograd.Function):
    """The autograd function behind head_loss, which computes its gradients in the forward pass."""

    @staticmethod
    def forward(ctx, x_NC, weight_VC, targets_N, vocab_size, cap, needs_gradients):
        device_type = x_NC.device.type
        dtype = weight_VC.dtype
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        # Off, because autocast would cast the products of the gradients, which may have to be in
        # float32, back to 16 bits.
        with torch.autocast(device_type, enabled=False):
            total, dx_NC, dweight_VC = loss_and_gradients(
                x_NC.to(dtype), weight_VC.to(dtype), targets_N, vocab_size=vocab_size, cap=cap,
                needs_gradients=needs_gradients, in_place=not torch.compiler.is_compiling())
        if needs_gradients:
            ctx.save_for_backward(dx_NC, dweight_VC)
            ctx.dtypes = x_NC.dtype, weight_VC.dtype
        return total

    @staticmethod
    def backward(ctx, dtotal):
        dx_NC, dweight_VC = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        dx_NC = (dtotal * dx_NC.float()).to(x_dtype)  # rounded once, after the product
        dweight_VC = (dtotal * dweight_VC).to(weight_dtype)
        return dx_NC, dweight_VC, None, None, None, None


def loss_and_gradients(x_NC, weight_VC, targets_N, vocab_size, cap, needs_gradients, in_place):
    """Return (head_loss's sum, its gradient for x, for the weight); the gradients may be None.

    in_place: overwrite the probabilities with the gradient of the logits, which saves memory where
    nothing is compiled. Otherwise compute it in one expression, which a compiler turns into one
    kernel. The numbers are the same to rounding.
    """
    on_cpu = x_NC.device.type == 'cpu'
    n_logits = len(x_NC) * len(weight_VC)
    n_chunks = max(1, math.ceil(n_logits / (CHUNK if on_cpu else 8 * CHUNK)))
    # d, the gradient of the logits, lies between -1 and 1, and its product with the weight is at
    # most twice the largest weight: both fit into float16. Its product with x is a sum over tokens,
    # which may overflow float16, and here before the loss scaler could notice. On CUDA
    # float32_product sums it in float32; elsewhere d itself must be float32.
    d_dtype = x_NC.dtype
    if d_dtype == torch.float16 and x_NC.device.type != 'cuda':
        d_dtype = torch.float32
    total = torch.zeros((), device=x_NC.device)
    dx = []
    dweight_VC = 0.0
    for x_nC, target_n in zip(x_NC.chunk(n_chunks), targets_N.chunk(n_chunks)):
        logits_nV = soft_cap(linear(x_nC, weight_VC), cap)
        if cap and needs_gradients:
            slope_nV = (logits_nV / cap).square_().neg_().add_(1)  # the derivative of the cap
        logits_nV[:, vocab_size:] = -torch.inf
        logits_nV -= logits_nV.amax(dim=1, keepdim=True)
        is_target_n1 = (target_n != -1)[:, None]
        index_n1 = target_n.clamp(min=0)[:, None]
        at_target_n1 = logits_nV.gather(1, index_n1)
        p_nV = logits_nV.exp_()
        sum_n1 = p_nV.sum(dim=1, keepdim=True)
        total += ((sum_n1.log() - at_target_n1) * is_target_n1).sum()
        if needs_gradients:
            # The gradient of the logits is the probability, less 1 at the target.
            if in_place:
                d_nV = p_nV.mul_(is_target_n1 / sum_n1)
                d_nV = d_nV.scatter_add_(1, index_n1, -is_target_n1.float())
            else:
                # With scatter_add_ the compiler would first write the probabilities to memory, in
                # float32.
                is_index_nV = torch.arange(len(weight_VC), device=x_NC.device) == index_n1
                d_nV = (p_nV / sum_n1 - is_index_nV.float()) * is_target_n1
            if cap:
                d_nV = d_nV.mul_(slope_nV)
            d_nV = d_nV.to(d_dtype)
            dx.append(linear(d_nV, weight_VC.t().to(d_dtype)))
            dweight_VC = float32_product(d_nV.t(), x_nC.to(d_dtype)).add_(dweight_VC)
    if not needs_gradients:
        return total, None, None
    return total, torch.cat(dx), dweight_VC


def float32_product(a, b):
    """Return the matrix product a b in float32: a (m, k), b (k, n), both in the same number format.

    On CUDA its sums are never rounded to 16 bits, and cannot overflow float16. (Not run on a GPU
    yet.)
    """
    if a.device.type == 'cuda' and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return linear(a, b.t()).float()
