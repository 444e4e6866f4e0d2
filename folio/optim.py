"""
Optimizers and learning-rate schedules.
    python -c "from folio.optim import *; print([round(learning_rate_at(i, 100, 1, 0, warmup=10), 2) for i in range(100)])"
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

from folio.configurator import UserError

CPU_HAS_BF16 = torch.cpu._is_avx512_bf16_supported()


def make_optimizers(model, kind, learning_rate, muon_learning_rate, weight_decay, betas):
    """The list of optimizers that together step every parameter once; each group carries its highest rate as `peak_lr`.

    kind: 'adamw', AdamW (Loshchilov and Hutter 2017) for all; or 'muon', Muon for the matrices of the blocks and AdamW
    for embeddings, head and vectors. Vectors (biases, norms) never decay. Raises UserError for any other kind.
    """
    if kind not in ('adamw', 'muon'):
        raise UserError(f'optimizer is {kind!r}; choose from adamw, muon')
    if weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f'weight_decay ({weight_decay}) must be at least 0, beta1 and beta2 {betas} in [0, 1)')
    if min(learning_rate, muon_learning_rate) <= 0:
        raise UserError(f'learning_rate ({learning_rate}) and muon_learning_rate ({muon_learning_rate}) must exceed 0')
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = [p for name, p in params.items() if kind == 'muon' and p.ndim == 2 and '.h.' in name]
    rest = [p for p in params.values() if not any(p is h for h in hidden)]
    groups = [{'params': [p for p in rest if p.ndim >= 2], 'weight_decay': weight_decay},
              {'params': [p for p in rest if p.ndim < 2], 'weight_decay': 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)]
    if hidden:
        optimizers.append(Muon(hidden, lr=muon_learning_rate, weight_decay=weight_decay))
    stepped = [p for o in optimizers for g in o.param_groups for p in g['params']]
    assert sorted(map(id, stepped)) == sorted(map(id, params.values())), 'every parameter is stepped exactly once'
    for group in (g for o in optimizers for g in o.param_groups):
        group['peak_lr'] = group['lr']
    return optimizers


def load_states(optimizers, states):
    """Restore what the optimizers have learned, not their hyper-parameters: those are the settings of this run."""
    if len(states) != len(optimizers):
        raise UserError('this run was trained with another optimizer; give --optimizer as it was')
    for optimizer, state in zip(optimizers, states):
        params = [p for group in optimizer.param_groups for p in group['params']]
        learned = {i: {k: shard_like(params[i], v) for k, v in values.items()} for i, values in state['state'].items()}
        optimizer.load_state_dict({'state': learned, 'param_groups': optimizer.state_dict()['param_groups']})


def shard_like(param, value):
    """Of a tensor that belongs to a sharded parameter this process's share, as a sharded tensor; any other as it is."""
    if not hasattr(param, 'full_tensor') or not isinstance(value, torch.Tensor) or value.shape != param.shape:
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.to(param.device), param.device_mesh, param.placements, src_data_rank=None)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for matrices in the middle of a network (Jordan et al. 2024).

    An update of an (m, n) matrix is scaled by sqrt(max(1, m / n)); a c_attn, (3n, n), counts as three matrices.
    Matrices of one shape are orthogonalised in one batch, of which each process takes a share.
    """

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group['params']:
                by_shape.setdefault(p.shape, []).append(p)
            for params in by_shape.values():
                matrices = []
                for p in params:
                    if 'momentum' not in self.state[p]:
                        self.state[p]['momentum'] = torch.zeros_like(p)
                    momentum = self.state[p]['momentum'].lerp_(p.grad, 1 - group['momentum'])
                    nesterov = p.grad.lerp(momentum, group['momentum'])
                    nesterov = nesterov.full_tensor() if hasattr(p, 'full_tensor') else nesterov
                    matrices += nesterov.to(product_type(p)).chunk(parts(p))
                (m, n), orthogonal = matrices[0].shape, iter(orthogonalize_shared(matrices))
                for p in params:
                    update = shard_like(p, torch.cat([next(orthogonal) for _ in range(parts(p))]).type_as(p))
                    rate = group['lr'] * max(1, m / n)**0.5
                    p.mul_(1 - group['lr'] * group['weight_decay']).add_(update, alpha=-rate)


def parts(p):
    return 3 if p.size(0) == 3 * p.size(1) else 1


def orthogonalize_shared(matrices):
    """orthogonalize of a list of matrices of one shape: each process does its share, and all get all, (len, m, n)."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size == 1:
        large = matrices[0].is_cpu and matrices[0].numel() > 2**16  # of these a CPU is faster at one after another
        return [orthogonalize(m) for m in matrices] if large else orthogonalize(torch.stack(matrices))
    n = math.ceil(len(matrices) / world_size)
    mine = matrices[dist.get_rank() * n:][:n]
    mine = orthogonalize(torch.stack(mine + [torch.zeros_like(matrices[0])] * (n - len(mine))))
    shares = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(shares, mine)
    return torch.cat(shares)[:len(matrices)]


def orthogonalize(G, steps=5):
    """About U V' for a matrix G = U S V', or each of a batch (b, m, n): its singular values are brought near 1.

    The quintic Newton–Schulz iteration of Jordan et al. 2024, in bfloat16 where that is fast.
    """
    add_product = torch.addmm if G.ndim == 2 else torch.baddbmm
    X = G.to(product_type(G))
    X = X.mT if G.size(-2) > G.size(-1) else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = F.linear(X, X) if G.ndim == 2 else X @ X.mT  # the same; of one matrix linear is twice as fast on a CPU
        B = add_product(A, A, A, beta=-4.7750, alpha=2.0315)
        X = add_product(X, B, X, beta=3.4445)
    return (X.mT if G.size(-2) > G.size(-1) else X).to(G.dtype)


def product_type(G):
    """bfloat16 on GPUs, and on CPUs that multiply it."""
    return torch.bfloat16 if G.is_cuda or G.is_cpu and CPU_HAS_BF16 else torch.float32


def learning_rate_at(step, steps, peak, floor, warmup=0, schedule='cosine', cooldown=0):
    """The learning rate of a step: linear warm-up, then down from peak to floor, which it keeps after `steps`.

    schedule: 'cosine', half a cosine from the end of the warm-up on, or 'trapezoid', constant, then linear over the
    last `cooldown` steps (Hägele et al. 2024). Raises UserError for any other.

    >>> [learning_rate_at(i, 8, 1.0, 0.0, warmup=3, schedule='trapezoid', cooldown=4) for i in range(9)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if schedule not in ('cosine', 'trapezoid'):
        raise UserError(f'schedule is {schedule!r}; choose from cosine, trapezoid')
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if step >= steps:
        return floor
    if schedule == 'trapezoid':
        return floor + (peak - floor) * min(1.0, (steps - step) / max(1, cooldown))
    progress = (step - warmup) / (steps - warmup)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
