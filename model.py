"""
The model: GPT-2 and its modern successor in one file, with a key-value cache, sampling and checkpoints.
    python -c "from model import GPT, GPTConfig; print(GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128)))"

Letters in names: B batch, T time, S keys, C channels, H heads, D head size, V vocabulary; x is the residual stream.
Papers: GPT-2 (Radford et al. 2019), rotary positions (Su et al. 2021), ReLU squared (So et al. 2021), QK-norm (Henry et
al. 2020). arch='modern' has the shape of transformers' NanoChatForCausalLM.
"""
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import load_checkpoint, padded
from configurator import UserError
from hugging_face import load_hugging_face
from linear import Linear
from loss import head_loss, soft_cap
from sampling import draw, penalized

LOGIT_CAP = 15.0  # modern: logits stay within ±15
MIN_BLOCK = 64  # a window's queries go in blocks of this many at least: smaller ones are many small products


@dataclass
class GPTConfig:
    block_size: int = 1024  # context length in tokens
    vocab_size: int = 50257  # tokens that exist
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # gpt2 only: biases in Linear and LayerNorm
    arch: str = 'gpt2'  # or 'modern'
    gelu: str = 'tanh'  # gpt2 only: OpenAI's approximation, or 'none', the exact one that nanoGPT trains with
    window: int = 0  # attend to the last so many tokens only; 0 is all
    flash: bool = True  # False: attention written out, to read and to check against

    def __post_init__(self):
        C, H = self.n_embd, self.n_head
        self.bias = self.bias and self.arch == 'gpt2'
        if self.arch not in ('gpt2', 'modern') or self.gelu not in ('tanh', 'none'):
            raise UserError(f'arch is {self.arch}, gelu {self.gelu}; choose from gpt2, modern and from tanh, none')
        if min(self.block_size, self.vocab_size, self.n_layer, H, C) < 1:
            raise UserError('block_size, vocab_size, n_layer, n_head and n_embd must be at least 1')
        if C % H:
            raise UserError(f'n_embd ({C}) is no multiple of n_head ({H}); try --n_embd={math.ceil(C / H / 2) * H * 2}')
        if self.arch == 'modern' and C // H % 2:
            raise UserError(f'rotary positions need an even head size; n_embd / n_head is {C // H}')
        if not 0 <= self.dropout < 1 or self.window < 0:
            raise UserError(f'dropout ({self.dropout}) must be in [0, 1) and window ({self.window}) at least 0')


# ---- Blocks ----------------------------------------------------------------------------------------------------------
def rms_norm(x):
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def make_norm(config):
    modern = nn.RMSNorm(config.n_embd, eps=1e-6, elementwise_affine=False)
    return modern if config.arch == 'modern' else nn.LayerNorm(config.n_embd, bias=config.bias)


def rotate(x_BHTD, cos, sin):
    """Rotary positions: turn each pair (i, i + D/2) of a head's channels by the angle that cos and sin give."""
    a, b = x_BHTD.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).type_as(x_BHTD)


def can_see(query_pos, key_pos, window):
    """Queries by keys: whether a key is among the last `window` tokens that a query, itself the last, may look at."""
    distance = query_pos[..., None] - key_pos
    return (distance >= 0) & (distance < window)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key, value
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, rotary, mask, append):
        B, T, C = x.shape
        q_BHTD, k_BHTD, v_BHTD = self.c_attn(x).view(B, T, 3, self.config.n_head, -1).permute(2, 0, 3, 1, 4)
        if rotary is not None:
            q_BHTD, k_BHTD = rms_norm(rotate(q_BHTD, *rotary)), rms_norm(rotate(k_BHTD, *rotary))
        if append is not None:
            k_BHTD, v_BHTD = append(k_BHTD, v_BHTD)
        y = self.attend(q_BHTD, k_BHTD, v_BHTD, mask).transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.config.dropout, self.training)

    def attend(self, q_BHTD, k_BHTD, v_BHTD, mask):
        """softmax(q k' / sqrt(D)) v. mask: True where a query (row) may look at a key; None: causal, in the window."""
        dropout, (T, D) = self.config.dropout if self.training else 0.0, q_BHTD.shape[-2:]
        causal = mask is None and T > 1  # a single query is the newest token: it may see every key
        if causal and 0 < self.config.window < T:
            return self.attend_in_blocks(q_BHTD, k_BHTD, v_BHTD)
        if self.config.flash:
            return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, mask, dropout, is_causal=causal)
        scores_BHTS = q_BHTD @ k_BHTD.mT / math.sqrt(D)
        if causal:
            mask = torch.ones(T, T, dtype=torch.bool, device=q_BHTD.device).tril()
        if mask is not None:
            scores_BHTS = scores_BHTS.masked_fill(~mask, -math.inf)
        return F.dropout(scores_BHTS.softmax(dim=-1), dropout) @ v_BHTD

    def attend_in_blocks(self, q_BHTD, k_BHTD, v_BHTD):
        """The same in a window, at a cost of T * window: blocks of queries see their own keys and the last block's."""
        (B, H, T, D), size = q_BHTD.shape, max(self.config.window, MIN_BLOCK)
        q, k, v = (F.pad(x, (0, 0, 0, -T % size)).reshape(B * H, -1, size, D) for x in (q_BHTD, k_BHTD, v_BHTD))
        pos_S = torch.arange(2 * size, device=q.device)
        mask = can_see(pos_S[size:], pos_S, self.config.window)
        first = self.attend(q[:, :1], k[:, :1], v[:, :1], mask[:, size:])  # no block is before it
        k, v = (torch.cat((x[:, :-1], x[:, 1:]), dim=2) for x in (k, v))
        return torch.cat((first, self.attend(q[:, 1:], k, v, mask)), dim=1).view(B, H, -1, D)[:, :, :T]


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.config = config

    def forward(self, x):
        x = self.c_fc(x)
        x = F.gelu(x, approximate=self.config.gelu) if self.config.arch == 'gpt2' else x.relu().square()
        return F.dropout(self.c_proj(x), self.config.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rotary, mask, append):
        x = x + self.attn(self.ln_1(x), rotary, mask, append)
        return x + self.mlp(self.ln_2(x))


class KVCache:
    """Keys and values of the tokens seen so far: kv is (L, 2, B, H, T, D); row b has lengths[b] of them."""

    def __init__(self, config, batch_size):
        self.shape = (config.n_layer, 2, batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.kv, self.lengths = None, [0] * batch_size

    def append(self, layer, pos_BT, end, k_BHTD, v_BHTD):
        """Write one layer's new keys and values at their positions; return that layer's from the first to the last."""
        if self.kv is None:  # now that device and type are known
            self.kv = k_BHTD.new_zeros(self.shape)
        ragged = isinstance(self.lengths, torch.Tensor) or len(set(self.lengths)) > 1
        for whole_BHTD, new_BHTD in zip(self.kv[layer], (k_BHTD, v_BHTD)):
            if ragged:
                rows_B1 = torch.arange(pos_BT.size(0), device=pos_BT.device)[:, None]
                whole_BHTD[rows_B1, :, pos_BT] = new_BHTD.transpose(1, 2)
            else:
                whole_BHTD[:, :, end - new_BHTD.size(2):end] = new_BHTD
        return [whole_BHTD[:, :, :end] for whole_BHTD in self.kv[layer]]

    def make_static(self):
        """For a compiled step, whose shapes stay: lengths is a tensor, which the caller counts up, and all is keys."""
        self.lengths = torch.tensor(self.lengths, device=self.kv.device)
        self.kv = [[part.clone() for part in layer] for layer in self.kv]  # compiled, a write copies the whole tensor
        for part in sum(self.kv, []):
            torch._dynamo.mark_static_address(part, guard=False)  # a CUDA graph writes where they are


# ---- The model -------------------------------------------------------------------------------------------------------
class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        V, C = padded(config.vocab_size), config.n_embd  # the padding's logits are cut off: it is never sampled
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(V, C),
            wpe=nn.Embedding(config.block_size, C) if config.arch == 'gpt2' else nn.Identity(),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=make_norm(config)))
        self.lm_head = Linear(C, V, bias=False)
        if config.arch == 'gpt2':
            self.transformer.wte.weight = self.lm_head.weight  # tied: one matrix reads tokens and writes them
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """The GPT-2 paper's: normal, 0.02, residual projections over sqrt(2 * n_layer). modern: the head at zero."""
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, p in self.named_parameters():
            if p.ndim == 1:
                nn.init.zeros_(p) if name.endswith('bias') else nn.init.ones_(p)
            elif name == 'lm_head.weight' and self.config.arch == 'modern':
                nn.init.zeros_(p)  # so the first prediction is uniform
            else:
                assert p.ndim == 2, f'no rule initialises {name}'
                nn.init.normal_(p, std=residual_std if name.endswith('c_proj.weight') else 0.02)
        self.transformer.wte.weight[self.config.vocab_size:] = 0

    @classmethod
    def from_pretrained(cls, source, **overrides):
        """A model from one of OpenAI's names, a Hugging Face folder, or a checkpoint (its path or its dictionary).

        overrides: GPTConfig fields that need no other weights: dropout, flash, window, and a smaller block_size.
        """
        if isinstance(source, str):
            source = load_checkpoint(source) if source.endswith('.pt') else load_hugging_face(source)
        args, weights = source['model_args'], dict(source['model'])
        config = GPTConfig(**(args | overrides))
        if config.block_size > args['block_size']:
            raise UserError(f"block_size {config.block_size} exceeds the weights': --block_size={args['block_size']}")
        if config.arch == 'gpt2':  # a shorter context forgets the later positions
            weights['transformer.wpe.weight'] = weights['transformer.wpe.weight'][:config.block_size]
        model = cls(config)
        model.load_state_dict(weights)
        return model

    def forward(self, idx_BT, targets_BT=None, all_logits=False, cache=None, lengths=None):
        """(logits, loss): (B, T, V) in float32; the mean loss in nats over targets that are not -1, or None.

        Without targets the logits are those of the last position, (B, 1, V), unless all_logits. cache: a KVCache to
        read and extend. lengths: of the rows, where prompts of several lengths are padded on the right.
        """
        (B, T), past = idx_BT.shape, cache.lengths if cache else [0]
        end = max(past) + T if isinstance(past, list) else self.config.block_size
        assert end <= self.config.block_size, f'{end} tokens do not fit in a block_size of {self.config.block_size}'
        pos_BT = torch.as_tensor(past, device=idx_BT.device)[:, None] + torch.arange(T, device=idx_BT.device)
        x = self.transformer.wte(idx_BT)
        if self.config.arch == 'gpt2':
            x, rotary = x + self.transformer.wpe(pos_BT), None
        else:
            x, rotary = rms_norm(x), self.rotary(pos_BT)
        x = F.dropout(x, self.config.dropout, self.training)
        mask = self.attention_mask(pos_BT, end, past)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, rotary, mask, functools.partial(cache.append, layer, pos_BT, end) if cache else None)
        lengths = lengths or [T] * B
        if isinstance(past, list) and cache:
            cache.lengths = [n + new for n, new in zip(past, lengths)]
        if targets_BT is None and not all_logits and T > 1:
            x = x[range(B), [n - 1 for n in lengths]][:, None]
        x, cap = self.transformer.ln_f(x), LOGIT_CAP if self.config.arch == 'modern' else 0.0
        if targets_BT is None:
            return soft_cap(self.lm_head(x), cap)[..., :self.config.vocab_size], None
        total = head_loss(x.flatten(0, 1), self.lm_head.weight, targets_BT.flatten(), self.config.vocab_size, cap)
        return None, total / (targets_BT != -1).sum().clamp(min=1)

    def rotary(self, pos_BT):
        """Cosine and sine, (B, 1, T, D/2), of the angles pos / 10000^(2i/D)."""
        D = self.config.n_embd // self.config.n_head
        frequency = 10000.0 ** (-torch.arange(0, D, 2, device=pos_BT.device) / D)
        angle = pos_BT[:, None, :, None] * frequency
        return angle.cos(), angle.sin()

    def attention_mask(self, pos_BT, end, past):
        """True where a query at pos_BT may look at a key of 0 … end - 1; None: causal, in the window."""
        T, window = pos_BT.size(1), self.config.window or end
        in_blocks = self.config.flash and T == end > 2 * max(window, MIN_BLOCK)
        if isinstance(past, list) and len(set(past)) == 1 and (T in (1, end) and window >= end or in_blocks):
            return None
        return can_see(pos_BT, torch.arange(end, device=pos_BT.device), window)[:, None]

    def flops_per_token(self):
        """Of a training step, forward and backward: 6 a weight in a matrix product, 12 LTC for attention (PaLM, B)."""
        lookups = [self.transformer.wpe] + ([self.transformer.wte] if self.config.arch == 'modern' else [])
        weights = sum(p.numel() for p in self.parameters()) - sum(p.numel() for m in lookups for p in m.parameters())
        span = min(self.config.window or self.config.block_size, self.config.block_size)
        return 6 * weights + 12 * self.config.n_layer * self.config.n_embd * span

    @torch.no_grad()
    def generate(self, idx_BT, max_new_tokens, strategy='sample', temperature=1.0, top_k=50, top_p=0.9, min_p=0.0,
                 repetition_penalty=1.0, seed=None, stop=(), use_cache=True, compile=False):
        """Continue each row: a generator of one (B,) tensor of token ids a step, drawn by sampling.py's rules.

        idx_BT: token ids, or a list of lists where prompts differ in length. A row longer than the context is cut to
        its newer half and goes on. stop: token ids that end a row, which then repeats its last id; the generator ends
        when all have. seed: of the draws; None takes torch's own random state. compile: steps of one token a row.
        """
        rows = idx_BT.tolist() if isinstance(idx_BT, torch.Tensor) else idx_BT
        if not rows or not all(rows) or repetition_penalty <= 0:
            raise UserError(f'a prompt needs a token, and repetition_penalty ({repetition_penalty}) must be above 0')
        B, limit, device = len(rows), self.config.block_size, self.lm_head.weight.device
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        stop = torch.tensor(sorted(stop), dtype=torch.long, device=device)
        next_B = torch.zeros(B, dtype=torch.long, device=device)
        ended_B = next_B.bool()
        mode = 'reduce-overhead' if device.type == 'cuda' else None
        decode = torch.compile(self.forward, dynamic=False, mode=mode) if compile else self.forward
        lengths, starts, cache = [len(row) for row in rows], [0] * B, None  # of history, the context is [start:length]
        ends_B1 = torch.tensor(lengths, device=device)[:, None]
        history_BN = torch.zeros(B, max(lengths) + max_new_tokens, dtype=torch.long, device=device)
        seen_BV = torch.zeros(B, self.config.vocab_size, dtype=torch.bool, device=device)
        for b, row in enumerate(rows):
            history_BN[b, :len(row)] = torch.tensor(row)
            seen_BV[b, row] = True
        was_training = self.training
        self.eval()
        try:
            for new in range(max_new_tokens):
                full = [n - start > limit for n, start in zip(lengths, starts)]
                if cache is None or any(full):
                    starts = [n - max(1, limit // 2) if f else start for n, start, f in zip(lengths, starts, full)]
                    contexts = [history_BN[b, starts[b]:lengths[b]] for b in range(B)]
                    cache = KVCache(self.config, B) if use_cache else None
                    idx_BT, sizes = nn.utils.rnn.pad_sequence(contexts, batch_first=True), [len(c) for c in contexts]
                    logits_BV = self.forward(idx_BT, cache=cache, lengths=sizes)[0][:, 0]
                    if cache and compile:
                        cache.make_static()
                else:
                    logits_BV = decode(next_B[:, None], cache=cache)[0][:, 0]
                    if compile:
                        cache.lengths = cache.lengths + 1
                logits_BV = penalized(logits_BV, seen_BV, repetition_penalty)
                drawn_B = draw(logits_BV, strategy, temperature, top_k, top_p, min_p, generator)
                next_B = torch.where(ended_B, next_B, drawn_B)
                history_BN.scatter_(1, ends_B1 + new, next_B[:, None])
                seen_BV.scatter_(1, next_B[:, None], True)
                lengths = [n + 1 for n in lengths]
                yield next_B
                ended_B |= torch.isin(next_B, stop)
                if len(stop) and ended_B.all():
                    return
        finally:
            self.train(was_training)
