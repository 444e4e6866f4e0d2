"""
Generate text fast: with a cache of keys and values, rules for drawing a token, streaming.
    python sample.py --out_dir=out/book --strategy=nucleus

`generate` continues prompts token by token, and `stream_text` turns the tokens into text.
GPT.generate in model.py is a dozen plain lines: temperature and top_k only, and no cache.
"""
import codecs
import math

import torch

from folio.configurator import UserError

STRATEGIES = ('greedy', 'sample', 'top_k', 'nucleus')
COLDEST = 1e-9  # a temperature below this is greedy: float32 cannot divide by much less


# ---- The cache -----------------------------------------------------------------------------------
class KVCache:
    """Keep the keys and values of the tokens read so far, equally many in each row.

    A forward pass reads `length`, calls `append` in each layer, and then adds to `length`.
    """

    def __init__(self, model, size):
        """Make an empty cache. size: tokens that fit into a row."""
        self.n_layer = model.config.n_layer
        self.size = size
        self.length = 0  # tokens in each row
        self.kv = None  # allocated at the first append, in the shape of its keys

    def append(self, layer, k_BHTD, v_BHTD):
        """Store a layer's new keys and values; return all of its keys and values, (B, H, S, D)."""
        B, H, T, D = k_BHTD.shape
        if self.kv is None:
            # Not zeros: on a CPU, slots that are never written to then take no memory. The values
            # decide the number format: under autocast normalised keys may be in float32.
            self.kv = v_BHTD.new_empty(self.n_layer, 2, B, H, self.size, D)
        end = self.length + T
        keys_BHSD, values_BHSD = self.kv[layer]
        keys_BHSD[:, :, self.length:end] = k_BHTD
        values_BHSD[:, :, self.length:end] = v_BHTD
        return keys_BHSD[:, :, :end], values_BHSD[:, :, :end]

    def repeat(self, n):
        """Repeat each row n times, its copies next to one another."""
        self.kv = self.kv.repeat_interleave(n, dim=2)


# ---- Drawing a token -----------------------------------------------------------------------------
def draw_token(logits_BV, strategy, temperature=1.0, top_k=50, top_p=0.9, generator=None):
    """Return a token for each row, (B,), drawn by the rules of next_token_logits.

    generator: a torch.Generator for the noise; None: torch's own. Raises UserError for a value
    outside its range.
    """
    if strategy == 'greedy' or temperature < COLDEST:
        check_sampling(strategy, temperature, top_k, top_p)
        return logits_BV.argmax(dim=-1)  # no noise is drawn
    logits_BV = next_token_logits(logits_BV, strategy, temperature, top_k, top_p)
    # If each p_i is divided by exponential noise, token i has the largest quotient with probability
    # p_i. Unlike torch.multinomial, this never makes the CPU wait for the GPU.
    noise_BV = torch.empty_like(logits_BV).exponential_(generator=generator)
    noise_BV = noise_BV.clamp(min=1e-30)  # a Mac's GPU may draw 0, and 0 / 0 would win
    return (logits_BV.softmax(dim=-1) / noise_BV).argmax(dim=-1)


def next_token_logits(logits_BV, strategy, temperature=1.0, top_k=50, top_p=0.9):
    """Return the logits (B, V) whose softmax to draw from: -inf where a token is ruled out.

    strategy: 'greedy' keeps the likeliest token, 'sample' all, 'top_k' the top_k likeliest (Fan et
    al. 2018), 'nucleus' the fewest whose probabilities sum to top_p (Holtzman et al. 2019).
    temperature: logits are divided by it; 0 is greedy. Raises UserError for a value outside its
    range.

    >>> next_token_logits(torch.tensor([[1., 2., 3.]]), 'top_k', top_k=2)
    tensor([[-inf, 2., 3.]])
    """
    check_sampling(strategy, temperature, top_k, top_p)
    if strategy == 'greedy' or temperature < COLDEST:
        likeliest_B1 = logits_BV.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits_BV, -math.inf).scatter(1, likeliest_B1, 0.0)
    logits_BV = logits_BV / temperature
    ruled_out_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
    if strategy == 'top_k':
        kept_BK = logits_BV.topk(min(top_k, logits_BV.size(1))).indices
        ruled_out_BV = torch.ones_like(ruled_out_BV).scatter(1, kept_BK, False)
    elif strategy == 'nucleus':
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        p_BV = sorted_BV.softmax(dim=-1)
        # Rule out a token if those before it already sum to top_p.
        sum_before_BV = p_BV.cumsum(dim=-1) - p_BV
        ruled_out_BV = ruled_out_BV.scatter(1, order_BV, sum_before_BV >= top_p)
    return logits_BV.masked_fill(ruled_out_BV, -math.inf)


def check_sampling(strategy, temperature, top_k, top_p):
    """Raise UserError for a value outside its range."""
    if strategy not in STRATEGIES:
        raise UserError(f'strategy is {strategy!r}; choose from {", ".join(STRATEGIES)}')
    if temperature < 0:
        raise UserError(f'temperature is {temperature}; it must be at least 0, which is greedy')
    if top_k < 1:
        raise UserError(f'top_k is {top_k}; it must be at least 1')
    if not 0 < top_p <= 1:
        raise UserError(f'top_p is {top_p}; it must be above 0 and at most 1')


# ---- Generation ----------------------------------------------------------------------------------
def generate(model, idx_BT, max_new_tokens, **options):
    """Continue B prompts of the same length: yield one (B,) tensor of token ids per step.

    options: see generate_with_logits.
    """
    for next_B, _ in generate_with_logits(model, idx_BT, max_new_tokens, **options):
        yield next_B


@torch.no_grad()
def generate_with_logits(model, idx_BT, max_new_tokens, strategy='sample', temperature=1.0,
                         top_k=50, top_p=0.9, seed=None):
    """Continue B prompts of the same length: yield (token ids (B,), the model's logits (B, V)).

    The model sees the end of a prompt longer than its context. A full context is cut to its newer
    half. The tokens are drawn by the rules of next_token_logits. seed: of the draws; None: use
    torch's own random state. Raises UserError for a value outside its range.
    """
    limit = model.config.block_size
    device = model.lm_head.weight.device
    rng = None if seed is None else torch.Generator(device).manual_seed(seed)
    idx_BT = idx_BT.to(device)[:, -limit:]
    unread_BT = idx_BT
    cache = None

    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            if idx_BT.size(1) > limit:
                idx_BT = idx_BT[:, -max(1, limit // 2):]
                unread_BT = idx_BT
                cache = None
            if cache is None:
                cache = KVCache(model, size=limit)
            # Not model(…): it may be compiled, and prompts come in all shapes.
            logits_BTV, _ = model.forward(unread_BT, cache=cache)
            logits_BV = logits_BTV[:, -1]
            next_B = draw_token(logits_BV, strategy, temperature, top_k, top_p, generator=rng)
            unread_BT = next_B[:, None]
            idx_BT = torch.cat((idx_BT, unread_BT), dim=1)
            yield next_B, logits_BV
    finally:
        model.train(was_training)


def stream_text(model, tokenizer, idx_BT, max_new_tokens, find_end=None, **options):
    """Continue B prompts of the same length: yield the new texts so far, B strings, per step.

    A row ends at the end-of-text token, or once find_end(text) returns a position, at which its
    text is cut; None means not yet. A character of several tokens appears with the last of them.
    options: see generate_with_logits.
    """
    B = len(idx_BT)
    decoders = [codecs.getincrementaldecoder('utf-8')('replace') for _ in range(B)]
    texts = [''] * B
    unfinished = set(range(B))
    for next_B in generate(model, idx_BT, max_new_tokens, **options):
        for row, token in enumerate(next_B.tolist()):
            if row not in unfinished:
                continue
            if token == tokenizer.eot:
                unfinished.discard(row)
                continue
            texts[row] += decoders[row].decode(tokenizer.decode_bytes([token]))
            end = None if find_end is None else find_end(texts[row])
            if end is not None:
                texts[row] = texts[row][:end]
                unfinished.discard(row)
        yield list(texts)
        if not unfinished:
            return
