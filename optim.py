"""
Optimizers and learning-rate schedules.
    python -c "from optim import *; print([round(learning_rate_at(i, 100, 1.0, 0.0, warmup=10), 2) for i in range(100)])"
"""
import math

import torch

from configurator import UserError


def parameter_groups(model, weight_decay):
    """Two groups: matrices, which decay, and vectors (biases, norms), which do not. Each parameter is in one of them."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{'params': [p for p in params if p.ndim >= 2], 'weight_decay': weight_decay},
              {'params': [p for p in params if p.ndim < 2], 'weight_decay': 0.0}]
    assert sorted(id(p) for g in groups for p in g['params']) == sorted(set(map(id, params))), 'optimized once each'
    return groups


def make_optimizer(model, learning_rate, weight_decay, betas):
    """AdamW (Loshchilov and Hutter 2017) over parameter_groups, all tensors updated by one fused kernel."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=learning_rate, betas=betas, fused=True)


def load_state(optimizer, state):
    """Restore what the optimizer has learned, not its hyper-parameters: those come from the settings of this run."""
    optimizer.load_state_dict({'state': state['state'], 'param_groups': optimizer.state_dict()['param_groups']})


def learning_rate_at(step, steps, peak, floor, warmup=0, schedule='cosine', cooldown=0):
    """The learning rate of a step: linear warm-up, then down from peak to floor, which it keeps after `steps`.

    schedule: 'cosine', half a cosine from the end of the warm-up on, or 'trapezoid', constant, then linear over the last
    `cooldown` steps (Hägele et al. 2024). Raises UserError for any other.

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
