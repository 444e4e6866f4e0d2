"""
Make the optimizers, AdamW and Muon, and compute each step's learning rate and momentum.
    python -c "from folio.optim import *; print(learning_rate_at(5, 100, 1.0, 0.0, warmup=10))"
"""
import math

import torch
import torch.distributed as dist

from folio.configurator import UserError
from folio.machine import CPU_HAS_BFLOAT16

OPTIMIZERS = ('adamw', 'muon')
SCHEDULES = ('cosine', 'trapezoid')


# ---- Which optimizer steps what ------------------------------------------------------------------
def make_optimizers(model, kind, learning_rate, muon_learning_rate, weight_decay, betas):
    """Return a list of optimizers that together step every parameter once.

    kind: 'adamw' is AdamW (Loshchilov and Hutter 2017) for all; 'muon' is Muon for the matrices of
    the blocks, and AdamW for embeddings, head and vectors. Vectors (biases, norms) never decay, nor
    do embeddings and head next to Muon: their rate is high, and the decay that suits the blocks
    cost 0.006 nats there (docs/log.md). Raises ValueError for a value outside its range.
    """
    if kind not in OPTIMIZERS:
        raise ValueError(f'optimizer is {kind!r}; choose from {", ".join(OPTIMIZERS)}')
    if not (learning_rate > 0 and muon_learning_rate > 0):  # so that NaN is refused too
        raise ValueError('learning_rate and muon_learning_rate must be above 0, not '
                         f'{learning_rate} and {muon_learning_rate}')
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    by_muon = {}
    if kind == 'muon':
        by_muon = {name: p for name, p in params.items() if p.ndim == 2 and '.h.' in name}
    by_adamw = [p for name, p in params.items() if name not in by_muon]

    matrices = [p for p in by_adamw if p.ndim >= 2]
    vectors = [p for p in by_adamw if p.ndim < 2]
    groups = [{'params': matrices, 'weight_decay': weight_decay if kind == 'adamw' else 0.0},
              {'params': vectors, 'weight_decay': 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=betas,
                                    weight_decay=weight_decay, fused=True)]
    if by_muon:
        n_matrices = [count_matrices(model, name, p) for name, p in by_muon.items()]
        optimizers.append(Muon(list(by_muon.values()), n_matrices, lr=muon_learning_rate,
                               weight_decay=weight_decay))

    stepped = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['peak_lr'] = group['lr']  # the schedule changes lr
            stepped += group['params']
    assert sorted(map(id, stepped)) == sorted(map(id, params.values())), 'each parameter, once'
    return optimizers


def count_matrices(model, name, p):
    """Return how many matrices of one height a parameter holds: n_matrices of its layer.

    In a layer without that attribute it is a single matrix. Raises ValueError if the parameter's
    rows cannot be divided like that.
    """
    layer = model.get_submodule(name.rpartition('.')[0])
    n = getattr(layer, 'n_matrices', 1)
    if len(p) % n != 0:
        raise ValueError(f'Muon: {name} has {len(p)} rows, not {n} matrices of one height: in the '
                         'model, set n_matrices of that layer to what it holds; matrices of other '
                         'heights need layers of their own')
    return n


def load_states(optimizers, states):
    """Restore the states of optimizers from a checkpoint; this run's hyper-parameters stay.

    states: list of state dictionaries. Raises UserError if they do not fit.
    """
    if len(states) != len(optimizers):
        raise UserError('this run was trained with another optimizer; give --optimizer as it was')
    for optimizer, state in zip(optimizers, states):
        param_groups = optimizer.state_dict()['param_groups']
        try:
            optimizer.load_state_dict({'state': state['state'], 'param_groups': param_groups})
        except Exception as e:  # torch raises several kinds if the parameters differ
            raise UserError('the state of the optimizer does not fit this model '
                            f'({type(e).__name__}: {e})') from e


# ---- Muon ----------------------------------------------------------------------------------------
class Muon(torch.optim.Optimizer):
    """Step matrices by their orthogonalised momentum (Jordan et al. 2024).

    The update of an (m, n) matrix is scaled by sqrt(max(1, m / n)). Matrices of the same shape are
    orthogonalised as one batch, whichever parameters they are in, and each process does a share.
    """

    def __init__(self, params, n_matrices, lr, weight_decay, momentum=0.95):
        """Take a list of 2-D params; n_matrices: how many matrices each holds, stacked by rows."""
        group = {'params': params, 'n_matrices': n_matrices}
        super().__init__([group], dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}  # {shape of a matrix: the parameters that hold matrices of this shape}
            for p, n in zip(group['params'], group['n_matrices']):
                if p.grad is None:
                    continue
                alike.setdefault((p.size(0) // n, p.size(1)), []).append(p)
            for (height, width), params in alike.items():
                self.step_alike(params, height, width, group)

    def step_alike(self, params, height, width, group):
        """Step parameters whose matrices, stacked by rows, all have the shape (height, width)."""
        gradients = [p.grad for p in params]
        averages = [self.average(p) for p in params]
        torch._foreach_lerp_(averages, gradients, 1 - group['momentum'])
        # Nesterov momentum: the average as it would be after the same gradient once more.
        updates = []
        for gradient, average in zip(gradients, averages):
            updates.append(gradient.lerp(average, group['momentum']))
        matrices = torch.cat(updates).view(-1, height, width)
        orthogonal = orthogonalize_shared(matrices.to(product_dtype(matrices)))
        n_rows = [p.size(0) for p in params]
        steps = orthogonal.flatten(0, 1).to(matrices.dtype).split(n_rows)
        rate = group['lr'] * max(1, height / width)**0.5
        torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])
        torch._foreach_add_(params, steps, alpha=-rate)

    def average(self, p):
        """Return the running average of a parameter's gradients, in its shape; zeros at first."""
        state = self.state[p]
        if 'momentum' not in state:
            state['momentum'] = torch.zeros_like(p)
        return state['momentum']


def orthogonalize_shared(matrices):
    """Return each of a batch of matrices (b, m, n) orthogonalised.

    Each process does its share of the batch, and all get the results of all.
    """
    if not dist.is_initialized():
        return orthogonalize(matrices)
    n_processes = dist.get_world_size()
    n_each = math.ceil(len(matrices) / n_processes)
    mine = matrices[dist.get_rank() * n_each:][:n_each]
    # all_gather wants shares of equal size, so the last ones are filled up with zeros.
    share = matrices.new_zeros(n_each, *matrices.shape[1:])
    share[:len(mine)] = mine
    share = orthogonalize(share)
    shares = [torch.empty_like(share) for _ in range(n_processes)]
    dist.all_gather(shares, share)
    return torch.cat(shares)[:len(matrices)]


def orthogonalize(G, steps=5):
    """Return approximately U V' for each matrix G = U S V' of a batch (b, m, n), in its dtype.

    The quintic Newton–Schulz iteration of Jordan et al. 2024 brings all singular values near 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # steep at zero, so that small singular values grow fast
    is_tall = G.size(1) > G.size(2)
    X = G / (G.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if is_tall:
        X = X.mT  # makes the products below smaller
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A
        X = torch.baddbmm(X, B, X, beta=a)  # a X + B X
    return X.mT if is_tall else X


def product_dtype(G):
    """Return bfloat16 if the device of G multiplies in it, float32 if it only emulates it."""
    has_bf16 = G.is_cpu and CPU_HAS_BFLOAT16
    if G.is_cuda:
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


# ---- Schedules -----------------------------------------------------------------------------------
def learning_rate_at(step, steps, peak, floor, warmup=0, schedule='cosine', cooldown=0.7):
    """Return the learning rate of a step: a linear warm-up, then from peak down to floor.

    It reaches the floor at `steps` and stays there. schedule: 'cosine', half a cosine from the end
    of the warm-up on, or 'trapezoid', constant, then linear over the last share `cooldown` of the
    steps (Hägele et al. 2024).

    >>> [learning_rate_at(i, 8, 1.0, 0.0, warmup=3, schedule='trapezoid', cooldown=0.5)
    ...  for i in range(9)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    assert schedule in SCHEDULES, schedule
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if step >= steps:
        return floor
    if schedule == 'trapezoid':
        share = (steps - step) / max(1, round(cooldown * steps))
        return floor + (peak - floor) * min(1.0, share)
    progress = (step - warmup) / (steps - warmup)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def momentum_at(step, steps):
    """Return Muon's momentum of a step: from 0.85 to 0.95 over the first fifth, at most 300 steps.

    Early gradients change fast, and an average that reaches back far lags behind. In two sweeps
    (docs/log.md) the rise was worth 0.02 nats.

    >>> [round(momentum_at(step, steps=20), 3) for step in range(6)]
    [0.85, 0.875, 0.9, 0.925, 0.95, 0.95]
    """
    warmup = min(300, steps // 5)
    if step >= warmup:
        return 0.95
    return 0.95 - 0.1 * (1 - step / warmup)
