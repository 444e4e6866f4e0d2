"""
The loss of a language model's head, in chunks: its logits are never all in memory, and its gradients are made at once.
    python -c "from loss import *; print(head_loss(torch.ones(2, 3), torch.zeros(5, 3), torch.tensor([1, -1]), 5))"
"""
import torch

from linear import linear

CHUNK = 2**25  # logits at a time on a CPU, whose caches are small; eight times as many elsewhere


def head_loss(x_NC, weight_VC, targets_N, vocab_size, cap=0.0):
    """The sum of -log softmax(x W')[target], in nats, over the targets that are not -1: a scalar in float32.

    vocab_size: rows of the weight beyond it are padding, out of the softmax. cap: logits go through cap tanh(· / cap);
    0 is no cap. The gradients are made in this pass, chunk by chunk, and only scaled in the backward one.
    """
    return HeadLoss.apply(x_NC, weight_VC, targets_N, vocab_size, cap, torch.is_grad_enabled())


def soft_cap(logits, cap):
    """cap tanh(logits / cap), in float32; as they are if cap is 0."""
    return (logits.float() / cap).tanh_() * cap if cap else logits.float()


class HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NC, weight_VC, targets_N, vocab_size, cap, wants_gradients):
        kind = x_NC.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_VC.dtype
        with torch.autocast(kind, enabled=False):  # it would take the gradients' products back to its own type
            return HeadLoss.in_chunks(ctx, x_NC, weight_VC, targets_N, vocab_size, cap, wants_gradients, dtype)

    @staticmethod
    def in_chunks(ctx, x_NC, weight_VC, targets_N, vocab_size, cap, wants_gradients, dtype):
        kind, x, weight = x_NC.device.type, x_NC.to(dtype), weight_VC.to(dtype)
        total, dx, dweight = torch.zeros((), device=x.device), [], 0.0
        d_dtype = torch.float32 if dtype == torch.float16 else dtype  # no scaler can keep these sums within float16
        n_chunks = max(1, -(-len(x) * len(weight) // (CHUNK if kind == 'cpu' else 8 * CHUNK)))
        for x_nC, target_n in zip(x.chunk(n_chunks), targets_N.chunk(n_chunks)):
            logits_nV = soft_cap(linear(x_nC, weight), cap)
            slope_nV = (logits_nV / cap).square_().neg_().add_(1) if cap and wants_gradients else None
            logits_nV[:, vocab_size:] = -torch.inf
            logits_nV -= logits_nV.amax(dim=1, keepdim=True)
            is_target_n1, index_n1 = (target_n != -1)[:, None], target_n.clamp(min=0)[:, None]
            at_target_n1 = logits_nV.gather(1, index_n1)
            p_nV = logits_nV.exp_()
            sum_n1 = p_nV.sum(dim=1, keepdim=True)
            total += ((sum_n1.log() - at_target_n1) * is_target_n1).sum()
            if wants_gradients:  # of the logits: p, less 1 at the target
                d_nV = p_nV.mul_(is_target_n1 / sum_n1).scatter_add_(1, index_n1, -is_target_n1.float())
                d_nV = (d_nV.mul_(slope_nV) if cap else d_nV).to(d_dtype)
                dx.append(linear(d_nV, weight.t().to(d_dtype)))
                dweight = linear(d_nV.t(), x_nC.t().to(d_dtype)).float().add_(dweight)
        if wants_gradients:
            ctx.save_for_backward(torch.cat(dx), dweight)
            ctx.dtypes = x_NC.dtype, weight_VC.dtype
        return total

    @staticmethod
    def backward(ctx, dtotal):
        dx, dweight = ctx.saved_tensors
        return (dtotal * dx).to(ctx.dtypes[0]), (dtotal * dweight).to(ctx.dtypes[1]), None, None, None, None
