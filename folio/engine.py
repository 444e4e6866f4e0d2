"""
Generate text fast: with a cache of keys and values, rules for drawing a token, batches, streaming.
    python sample.py --out_dir=out/book --strategy=nucleus

`generate` continues prompts token by token, and `stream_text` turns the tokens into text.
GPT.generate in model.py does the same in a dozen plain lines, without a cache.
"""
import codecs
import copy
import math

import torch

from folio.configurator import UserError

STRATEGIES = ('greedy', 'sample', 'top_k', 'nucleus')


def send(tensor, device):
    """Return a copy on a device of a CPU tensor, without waiting for a GPU's queued work."""
    # CUDA has read an unpinned tensor when .to returns. Other devices might still be reading it
    # when the caller frees it.
    return tensor.to(device, non_blocking=torch.device(device).type == 'cuda')


# ---- The cache -----------------------------------------------------------------------------------
class KVCache:
    """Keep the keys and values of the tokens read so far.

    A forward pass calls `positions` once, then `append` in each layer. All rows have the same
    number of tokens; the first padding[b] tokens of row b are padding, which no token sees.
    """

    def __init__(self, model, batch_size, padding=None, size=None):
        """Make an empty cache.

        padding: list of batch_size numbers; None: no padding. size: tokens that fit into a row;
        None: block_size.
        """
        config = model.config
        size = size or config.block_size
        head_size = config.n_embd // config.n_head
        padding = padding or [0] * batch_size
        self.shape = (config.n_layer, 2, batch_size, config.n_head, size, head_size)
        self.kv = None  # allocated at the first append
        self.device = model.lm_head.weight.device
        self.padding_B1 = send(torch.tensor(padding), self.device)[:, None]
        self.hides_keys = max(padding) > 0
        self.length = 0  # tokens in each row, including those of the current pass
        self.begin = 0  # where the tokens of the current pass begin

    def positions(self, n_new):
        """Make room for n_new tokens in each row; return their positions, (B, T), and all keys'.

        Those of the keys are (B, S). Without padding all rows are alike, and B is 1.
        """
        self.begin = self.length
        self.length += n_new
        assert self.length <= self.shape[4], f'{self.length} tokens, but room for {self.shape[4]}'
        key_pos_BS = torch.arange(self.length, device=self.device)[None]
        if self.hides_keys:
            key_pos_BS = key_pos_BS - self.padding_B1
        return key_pos_BS[:, self.begin:], key_pos_BS

    def append(self, layer, k_BHTD, v_BHTD):
        """Store a layer's new keys and values; return all of its keys and values, (B, H, S, D)."""
        if self.kv is None:
            # Under autocast, normalised keys are float32, and attention would cast all of them
            # again for each new token. So store them in the format that attention casts them to.
            dtype = k_BHTD.dtype
            if torch.is_autocast_enabled(self.device.type):
                dtype = torch.get_autocast_dtype(self.device.type)
            # Not zeros: on a CPU, slots that are never written to then take no memory.
            self.kv = k_BHTD.new_empty(self.shape, dtype=dtype)
        keys_BHSD, values_BHSD = self.kv[layer]
        keys_BHSD[:, :, self.begin:self.length] = k_BHTD
        values_BHSD[:, :, self.begin:self.length] = v_BHTD
        return keys_BHSD[:, :, :self.length], values_BHSD[:, :, :self.length]

    def rows(self, indices):
        """Return a cache of these rows, in this order; a row may be taken several times."""
        indices_B = send(torch.tensor(indices), self.device)
        other = copy.copy(self)
        other.kv = self.kv.index_select(2, indices_B)
        other.padding_B1 = self.padding_B1[indices_B]
        return other


class StaticKVCache:
    """A KVCache of fixed shapes, for compiled steps of one token per row.

    Each query gets all slots, including those still empty, and a mask hides what it may not see.
    Call `advance` after each step, outside of what is compiled.
    """
    hides_keys = True

    def __init__(self, cache):
        """Take over the contents of a KVCache."""
        self.padding_B1 = cache.padding_B1
        self.length = torch.tensor(cache.length, device=cache.device)
        # One tensor for each layer's keys and one for its values: a compiled write into a part of a
        # larger tensor would copy all of it.
        self.kv = [[part.clone() for part in layer] for layer in cache.kv]
        for part in sum(self.kv, []):
            part[:, :, cache.length:] = 0  # hidden by the mask, but 0 times NaN is NaN
        for part in [self.length, *sum(self.kv, [])]:
            # CUDA graphs may then write into it in place, instead of into a copy.
            torch._dynamo.mark_static_address(part, guard=False)

    def positions(self, n_new):
        """Return the positions of the new tokens, (B, 1), and of all slots, (B, S)."""
        assert n_new == 1, 'compiled steps read one token per row'
        slots_S = torch.arange(self.kv[0][0].size(2), device=self.length.device)
        return self.length - self.padding_B1, slots_S - self.padding_B1

    def advance(self):
        self.length += 1

    def append(self, layer, k_BHTD, v_BHTD):
        """Store a layer's new keys and values; return all slots, each (B, H, S, D)."""
        for whole_BHSD, new_BHTD in zip(self.kv[layer], (k_BHTD, v_BHTD)):
            whole_BHSD.index_copy_(2, self.length[None], new_BHTD.type_as(whole_BHSD))
        return self.kv[layer]


# ---- Drawing a token -----------------------------------------------------------------------------
def draw_token(logits_BV, strategy, temperature=1.0, top_k=50, top_p=0.9, generator=None):
    """Return a token for each row, (B,), drawn by the rules of next_token_logits.

    generator: a torch.Generator for the noise; None: torch's own. Raises UserError for a value
    outside its range.
    """
    if strategy == 'greedy' or temperature == 0:
        check_sampling(strategy, temperature, top_k, top_p)
        return logits_BV.argmax(dim=-1)  # without the logits that rule all others out
    logits_BV = next_token_logits(logits_BV, strategy, temperature, top_k, top_p)
    # If each p_i is divided by exponential noise, token i has the largest quotient with probability
    # p_i. Unlike torch.multinomial, this never makes the CPU wait for the GPU.
    noise_BV = torch.empty_like(logits_BV).exponential_(generator=generator)
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
    if strategy == 'greedy' or temperature == 0:
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
def generate(model, prompts, max_new_tokens, **options):
    """Continue each prompt: yield one (B,) tensor of token ids per step.

    prompts: token ids, a (B, T) tensor or lists of different lengths. options: those of
    generate_with_logits.
    """
    for next_B, _ in generate_with_logits(model, prompts, max_new_tokens, **options):
        yield next_B


@torch.no_grad()
def generate_with_logits(model, prompts, max_new_tokens, strategy='sample', temperature=1.0,
                         top_k=50, top_p=0.9, seed=None, stop=(), use_cache=True, compile=False):
    """Continue each prompt: yield (token ids (B,), the model's logits (B, V)) per step.

    The tokens are drawn by the rules of next_token_logits. When a row fills the context, it goes on
    with the newer half of it. stop: token ids that end a row, which then repeats its last token;
    the generator ends when all rows have ended. seed: of the draws; None: use torch's own random
    state. compile: compile the steps of one token per row. Raises UserError for an empty prompt, or
    a value outside its range.
    """
    rows = prompts.tolist() if isinstance(prompts, torch.Tensor) else prompts
    if not rows or not all(rows):
        raise UserError('a prompt must have at least one token')
    B = len(rows)
    limit = model.config.block_size
    device = model.lm_head.weight.device
    rng = None if seed is None else torch.Generator(device).manual_seed(seed)
    stop = torch.tensor(sorted(stop), dtype=torch.long, device=device)
    # Call model.forward, which stays eager after model.compile(): prompts come in all shapes.
    decode = model.forward
    if compile:
        mode = 'reduce-overhead' if device.type == 'cuda' else None
        decode = torch.compile(model.forward, dynamic=False, mode=mode)

    # All texts end in the same column, so shorter prompts begin later.
    end = max(len(row) for row in rows)  # tokens in the longest row so far
    starts = [end - len(row) for row in rows]  # the model sees history[b, starts[b]:end]
    history_BN = torch.zeros(B, end + max_new_tokens, dtype=torch.long, device=device)
    for b, row in enumerate(rows):
        history_BN[b, starts[b]:end] = torch.tensor(row)
    ended_B = torch.zeros(B, dtype=torch.bool, device=device)
    next_B = history_BN[:, end - 1]
    cache = None

    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            context_is_full = any(end - start > limit for start in starts)
            if cache is None or context_is_full:
                starts = [truncated_start(start, end, limit) for start in starts]
                logits_BV, cache = read(model, history_BN[:, :end], starts, use_cache)
                if cache is not None and compile:
                    cache = StaticKVCache(cache)
            else:
                logits_BTV, _ = decode(next_B[:, None], cache=cache)
                logits_BV = logits_BTV[:, -1]
                if compile:
                    cache.advance()
                    logits_BV = logits_BV.clone()  # a CUDA graph's next step overwrites its output
            drawn_B = draw_token(logits_BV, strategy, temperature, top_k, top_p, generator=rng)
            next_B = torch.where(ended_B, next_B, drawn_B)
            history_BN[:, end] = next_B
            end += 1
            yield next_B, logits_BV
            if len(stop) > 0:
                ended_B |= torch.isin(next_B, stop)
                if ended_B.all():
                    return
    finally:
        model.train(was_training)


def truncated_start(start, end, limit):
    """Return where a row's text begins: at start, or later if start … end exceeds the context."""
    if end - start <= limit:
        return start
    return end - max(1, limit // 2)


def read(model, history_BN, starts, use_cache):
    """Read each row's text, history[b, starts[b]:], in one pass; return (logits (B, V), cache)."""
    first = min(starts)
    idx_BT = history_BN[:, first:]
    padding = [start - first for start in starts]
    cache = KVCache(model, len(idx_BT), padding)  # needed even without use_cache, for the padding
    logits_BTV, _ = model.forward(idx_BT, cache=cache)
    return logits_BTV[:, -1], cache if use_cache else None


def stream_text(model, tokenizer, prompts, max_new_tokens, find_end=None, **options):
    """Continue each prompt: yield the new texts so far, a list of B strings, per step.

    A row ends at the end-of-text token, or once find_end(row, text) returns a position, at which
    its text is cut; None means not yet. A character of several tokens appears with the last of
    them. prompts, options: those of generate.
    """
    stop = set() if tokenizer.eot is None else {tokenizer.eot}
    decoders = [codecs.getincrementaldecoder('utf-8')('replace') for _ in prompts]
    texts = [''] * len(prompts)
    unfinished = set(range(len(prompts)))
    # Not by generate's `stop`, which would wait for a GPU once more in each step.
    for next_B in generate(model, prompts, max_new_tokens, **options):
        for row, token in enumerate(next_B.tolist()):
            if row not in unfinished:
                continue
            if token in stop:
                unfinished.discard(row)
                continue
            texts[row] += decoders[row].decode(tokenizer.decode_bytes([token]))
            end = None if find_end is None else find_end(row, texts[row])
            if end is not None:
                texts[row] = texts[row][:end]
                unfinished.discard(row)
        yield list(texts)
        if not unfinished:
            return
