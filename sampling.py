"""
How the next token is drawn from a model's logits: strategies, temperature, min_p and the repetition penalty.
    python -c "from sampling import *; print(draw(torch.tensor([[1., 2., 3.]]), 'top_k', top_k=2))"
"""
import math

import torch

from configurator import UserError


def draw(logits_BV, strategy, temperature=1.0, top_k=50, top_p=0.9, min_p=0.0, generator=None):
    """A token for each row, (B,), by next_token_logits' rules; generator: of the noise, None takes torch's own."""
    logits_BV = next_token_logits(logits_BV, strategy, temperature, top_k, top_p, min_p)
    if strategy == 'greedy' or temperature == 0:
        return logits_BV.argmax(dim=-1)
    noise_BV = torch.empty_like(logits_BV).exponential_(generator=generator)
    return (logits_BV.softmax(dim=-1) / noise_BV).argmax(dim=-1)  # a draw that needs no host


def penalized(logits_BV, seen_BV, penalty):
    """What was seen gets less likely where penalty is above 1, as in CTRL (Keskar et al. 2019).

    >>> penalized(torch.tensor([[2., -2., 2.]]), torch.tensor([[True, True, False]]), 2.0)
    tensor([[ 1., -4.,  2.]])
    """
    if penalty == 1:
        return logits_BV
    return torch.where(seen_BV, logits_BV * torch.where(logits_BV > 0, 1 / penalty, penalty), logits_BV)


def next_token_logits(logits_BV, strategy, temperature=1.0, top_k=50, top_p=0.9, min_p=0.0):
    """Logits whose softmax is to be drawn from: scaled by 1 / temperature, -inf where a token is ruled out.

    strategy: greedy keeps the most likely token; sample all; top_k so many (Fan et al. 2018); nucleus the fewest whose
    probabilities sum to top_p (Holtzman et al. 2019). min_p, with any: only tokens at least min_p times as likely as
    the likeliest. Temperature 0 is greedy. Raises UserError for a value outside its range.

    >>> next_token_logits(torch.tensor([[1., 2., 3.]]), 'top_k', top_k=2)
    tensor([[-inf, 2., 3.]])
    """
    if strategy not in ('greedy', 'sample', 'top_k', 'nucleus'):
        raise UserError(f'strategy is {strategy!r}; choose from greedy, sample, top_k, nucleus')
    if temperature < 0 or top_k < 1 or not 0 < top_p <= 1 or not 0 <= min_p <= 1:
        raise UserError(f'temperature ({temperature}) must be at least 0, top_k ({top_k}) at least 1, '
                        f'top_p ({top_p}) in (0, 1], min_p ({min_p}) in [0, 1]')
    if strategy == 'greedy' or temperature == 0:
        return torch.full_like(logits_BV, -math.inf).scatter(1, logits_BV.argmax(dim=-1, keepdim=True), 0.0)
    logits_BV = logits_BV / temperature
    p_BV = logits_BV.softmax(dim=-1)
    out_BV = p_BV < min_p * p_BV.amax(dim=-1, keepdim=True)
    if strategy == 'top_k':  # without a sort, and of equals at the border the first
        border_B1 = logits_BV.topk(min(top_k, logits_BV.size(1))).values[:, -1:]
        above_BV, equal_BV = logits_BV > border_B1, logits_BV == border_B1
        out_BV |= ~above_BV & ~(equal_BV & (equal_BV.cumsum(dim=-1) <= top_k - above_BV.sum(dim=-1, keepdim=True)))
    elif strategy == 'nucleus':  # out: where what comes before a token already sums to top_p
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        p_BV = sorted_BV.softmax(dim=-1)
        out_BV |= torch.zeros_like(out_BV).scatter(1, order_BV, p_BV.cumsum(dim=-1) - p_BV >= top_p)
    return logits_BV.masked_fill(out_BV, -math.inf)
