"""
Define the model: GPT-2, and a modern successor with the same interface.
    python -c "from model import *; print(GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128)))"

arch='gpt2' is OpenAI's GPT-2 (Radford et al. 2019). arch='modern' has rotary positions (Su et al.
2021), RMSNorm (Zhang and Sennrich 2019), normalised queries and keys (Henry et al. 2020), a squared
ReLU (So et al. 2021), an untied head, and capped logits: the shape of transformers'
NanoChatForCausalLM.

Letters at the end of a name are the dimensions of a tensor:
    B batch, T time, S time of the keys, C channels, H heads, D head size, V vocabulary,
    K the k best, 1 a single one, N all tokens of a batch in one row, n some of them
The residual stream is x, (B, T, C).

Needs torch and nothing else.
"""
import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

LOGIT_CAP = 15.0  # modern: logits stay within ±15
NORM_EPS = 1e-6  # modern: keeps the norm of zeros from being 0 / 0
SMALLEST_BLOCK = 64  # queries in a block; smaller blocks waste time on many tiny products
LOSS_ROWS = 1024  # with activation_checkpointing: tokens whose logits are in memory at a time


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
    gelu: str = 'tanh'  # gpt2 only: OpenAI's approximation; 'none', torch's word: exact
    window: int = 0  # each token sees this many tokens, itself included; 0: all before it
    flash: bool = True  # False: attention written out, to read and to check against
    activation_checkpointing: bool = False  # less memory: compute activations twice

    def __post_init__(self):
        """Raise ValueError for an impossible shape."""
        if self.arch not in ('gpt2', 'modern'):
            raise ValueError(f'arch is {self.arch!r}; choose from gpt2, modern')
        if self.gelu not in ('tanh', 'none'):
            raise ValueError(f'gelu is {self.gelu!r}; choose from tanh, none')
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}; it must be at least 1')
        if self.n_embd % self.n_head != 0:
            # A multiple of twice n_head: rotary positions need an even head size.
            nearest = math.ceil(self.n_embd / self.n_head / 2) * self.n_head * 2
            raise ValueError(f'n_embd ({self.n_embd}) must be a multiple of n_head '
                             f'({self.n_head}); try --n_embd={nearest}')
        if self.arch == 'modern' and self.n_embd // self.n_head % 2 != 0:
            raise ValueError('rotary positions need an even head size; '
                             f'n_embd / n_head is {self.n_embd // self.n_head}')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout is {self.dropout}; it must be at least 0 and below 1')
        if self.window < 0:
            raise ValueError(f'window is {self.window}; it must be at least 0')
        if self.arch == 'modern':
            self.bias = False  # modern has none, whatever was asked for


def padded(vocab_size):
    """Return the rows of an embedding: vocab_size rounded up to a multiple of 64.

    Matrix kernels run faster that way. The extra rows are never sampled: their logits are cut off.

    >>> padded(50257)
    50304
    """
    return math.ceil(vocab_size / 64) * 64


# ---- Blocks --------------------------------------------------------------------------------------
def rms_norm(x):
    """Scale the last dimension to a mean square of 1."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def make_norm(config):
    if config.arch == 'modern':
        return nn.RMSNorm(config.n_embd, eps=NORM_EPS, elementwise_affine=False)
    return nn.LayerNorm(config.n_embd, bias=config.bias)


def rotary_table(block_size, head_size):
    """Return cosine and sine, each (block_size, D), of the angles pos / 10000^(2i/D).

    Channels i and i + D/2 are a pair, with the same angle; in the second half the sine is negative.
    """
    frequency = 10000.0 ** (-torch.arange(0, head_size, 2) / head_size)
    angle = torch.arange(block_size)[:, None] * frequency
    cos = torch.cat((angle.cos(), angle.cos()), dim=1)
    sin = torch.cat((angle.sin(), -angle.sin()), dim=1)
    return cos, sin


def rotate(x_BHTD, cos_TD, sin_TD):
    """Turn each pair (i, i + D/2) of a head's channels by an angle that grows with the position."""
    # After this the product of a query and a key depends only on how far apart they are.
    swapped_BHTD = x_BHTD.roll(x_BHTD.size(-1) // 2, dims=-1)
    return x_BHTD * cos_TD + swapped_BHTD * sin_TD


def can_see(T, S, window, device):
    """Return (T, S): whether each of the last T of S tokens sees a key.

    It sees its own key and the keys before it, `window` keys in all.
    """
    pos_S = torch.arange(S, device=device)
    distance = pos_S[-T:, None] - pos_S
    return (distance >= 0) & (distance < window)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.layer = layer  # the cache keeps keys and values layer by layer
        self.window = config.window
        # Query, key and value in one product: one large matrix is faster than three small ones.
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_attn.n_matrices = 3  # for Muon, which steps each separately
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cos_sin, cache):
        B, T, C = x.shape
        H = self.config.n_head
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, H, C // H).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, H, C // H).transpose(1, 2)
        v = v.view(B, T, H, C // H).transpose(1, 2)
        if self.config.arch == 'modern':
            # Normalised queries and keys keep the scores bounded, so the softmax cannot freeze.
            q = rms_norm(rotate(q, *cos_sin))
            k = rms_norm(rotate(k, *cos_sin))
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # now for all tokens so far, (B, H, S, D)
        y = self.attend(q, k, v, self.window)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.config.dropout, self.training)

    def attend(self, q_BHTD, k_BHSD, v_BHSD, window):
        """Return softmax(q k' / sqrt(D)) v, (B, H, T, D).

        The queries belong to the last T of S tokens. Each sees its own key and the keys before it,
        `window` keys in all; 0: every key.
        """
        T = q_BHTD.size(-2)
        S = k_BHSD.size(-2)
        if window == 0:
            window = S
        if T == S and T > 2 * max(window, SMALLEST_BLOCK):
            return self.attend_in_blocks(q_BHTD, k_BHSD, v_BHSD, window)
        if T == S and T <= window and self.config.flash:
            dropout = self.config.dropout if self.training else 0.0
            return F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, dropout_p=dropout,
                                                  is_causal=True)
        # No query sees further back than the first one.
        first = max(0, S - T + 1 - window)
        k_BHSD = k_BHSD[..., first:, :]
        v_BHSD = v_BHSD[..., first:, :]
        mask_TS = None  # a single query sees all that is left
        if T > 1:
            mask_TS = can_see(T, S - first, window, q_BHTD.device)
        return self.attend_where(mask_TS, q_BHTD, k_BHSD, v_BHSD)

    def attend_where(self, mask_TS, q_BHTD, k_BHSD, v_BHSD):
        """Return what `attend` returns; mask_TS says which keys a query sees, None: all."""
        dropout = self.config.dropout if self.training else 0.0
        if self.config.flash:
            return F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, mask_TS, dropout)
        # The same, written out.
        scores_BHTS = q_BHTD / math.sqrt(q_BHTD.size(-1)) @ k_BHSD.mT
        if mask_TS is not None:
            scores_BHTS = scores_BHTS.masked_fill(~mask_TS, -math.inf)
        weights_BHTS = F.dropout(scores_BHTS.softmax(dim=-1), dropout)
        return weights_BHTS @ v_BHSD

    def attend_in_blocks(self, q_BHTD, k_BHTD, v_BHTD, window):
        """Return what `attend` returns for a whole text, at a cost of T * window.

        The text is cut into blocks at least as long as the window, so a query sees only keys of its
        own block and the block before.
        """
        B, H, T, D = q_BHTD.shape
        size = max(window, SMALLEST_BLOCK)

        def to_blocks(x_BHTD):
            """(B, H, T, D) -> (B, blocks, H, size, D)"""
            x_BHTD = F.pad(x_BHTD, (0, 0, 0, -T % size))
            return x_BHTD.view(B, H, -1, size, D).transpose(1, 2)

        q, k, v = to_blocks(q_BHTD), to_blocks(k_BHTD), to_blocks(v_BHTD)
        # No block comes before the first one.
        first = self.attend(q[:, 0], k[:, 0], v[:, 0], window)
        # The other blocks are rows of a batch.
        rest = self.attend_where(can_see(size, 2 * size, window, q.device),
                                 q[:, 1:].flatten(0, 1),
                                 torch.cat((k[:, :-1], k[:, 1:]), dim=3).flatten(0, 1),
                                 torch.cat((v[:, :-1], v[:, 1:]), dim=3).flatten(0, 1))
        y = torch.cat((first[:, None], rest.view(B, -1, H, size, D)), dim=1)
        return y.transpose(1, 2).reshape(B, H, -1, D)[:, :, :T]


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.c_fc(x)
        if self.config.arch == 'gpt2':
            x = F.gelu(x, approximate=self.config.gelu)
        else:
            x = F.relu(x).square()
        return F.dropout(self.c_proj(x), self.config.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, cos_sin, cache):
        # Only what a sublayer reads is normalised: gradients flow straight through the stream.
        x = x + self.attn(self.ln_1(x), cos_sin, cache)
        x = x + self.mlp(self.ln_2(x))
        return x


# ---- The model -----------------------------------------------------------------------------------
class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        V, C = padded(config.vocab_size), config.n_embd
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(V, C),
            wpe=nn.Embedding(config.block_size, C) if config.arch == 'gpt2' else nn.Identity(),
            h=nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
            ln_f=make_norm(config)))
        self.lm_head = nn.Linear(C, V, bias=False)
        if config.arch == 'gpt2':
            # Tied: one matrix reads tokens and writes them.
            self.transformer.wte.weight = self.lm_head.weight
        else:
            cos, sin = rotary_table(config.block_size, config.n_embd // config.n_head)
            self.register_buffer('cos', cos, persistent=False)
            self.register_buffer('sin', sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Draw the weights of each Linear and Embedding, as GPT-2's paper says.

        Norms begin as torch makes them, and a parameter that you add keeps its own initial value.
        """
        # Each block adds to the residual stream twice, through its two c_proj. Scaled like this,
        # all 2 * n_layer terms add up to about the same variance, however deep the model is.
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, module in self.named_modules():
            if module is self.lm_head:
                continue
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = residual_std if name.endswith('c_proj') else 0.02
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if self.config.arch == 'modern':
            nn.init.zeros_(self.lm_head.weight)  # the first prediction is uniform
        # The rows beyond the vocabulary are never looked up, and their logits never count.
        self.transformer.wte.weight[self.config.vocab_size:] = 0

    def forward(self, idx_BT, targets_BT=None, all_logits=False, cache=None):
        """Return (logits, loss).

        With targets: the mean loss in nats over the targets that are not -1, and logits (B, T, V)
        only if all_logits. Without targets: logits of the last position, (B, 1, V), or of all
        positions if all_logits; loss is None. cache: an engine.KVCache, which is read and extended.
        """
        B, T = idx_BT.shape
        past = 0 if cache is None else cache.length  # tokens read before these
        assert past + T <= self.config.block_size, f'{past + T} tokens exceed block_size'
        pos_T = torch.arange(past, past + T, device=idx_BT.device)
        x = self.transformer.wte(idx_BT)
        cos_sin = None
        if self.config.arch == 'gpt2':
            x = x + self.transformer.wpe(pos_T)
        else:
            x = rms_norm(x)
            cos_sin = self.cos[pos_T].type_as(x), self.sin[pos_T].type_as(x)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            if self.config.activation_checkpointing and self.training:
                # Keep only the input of a block; the backward pass computes the rest again (Chen et
                # al. 2016): the same numbers, a third more arithmetic, much less memory.
                x = checkpoint(block, x, cos_sin, cache, use_reentrant=False)
            else:
                x = block(x, cos_sin, cache)
        if cache is not None:
            cache.length += T
        if targets_BT is None and not all_logits:
            x = x[:, -1:]  # enough to draw the next token, and the head is expensive
        x = self.transformer.ln_f(x)
        if targets_BT is None:
            return self.logits(x), None
        # Computed again for the caller: a compiled model that returned the logits of the loss would
        # keep 13 GB at 64 x 1,024.
        logits_BTV = self.logits(x) if all_logits else None
        return logits_BTV, self.loss(x, targets_BT)

    def logits(self, x):
        """Return float32 logits of the tokens that exist, (..., V)."""
        # float32 in every number format: a softmax over a large vocabulary needs the digits.
        logits = self.lm_head(x).float()
        if self.config.arch == 'modern':
            logits = LOGIT_CAP * torch.tanh(logits / LOGIT_CAP)
        return logits[..., :self.config.vocab_size]

    def loss(self, x, targets_BT):
        """Return the mean of -log p(target), in nats, over the targets that are not -1."""
        x_NC = x.flatten(0, 1)
        targets_N = targets_BT.flatten()
        if self.config.activation_checkpointing:
            # The logits would be the largest tensor of all. Compute them a few rows at a time, and
            # again in the backward pass.
            total = 0.0
            for x_nC, targets_n in zip(x_NC.split(LOSS_ROWS), targets_N.split(LOSS_ROWS)):
                total = total + checkpoint(self.sum_of_losses, x_nC, targets_n, use_reentrant=False)
        else:
            total = self.sum_of_losses(x_NC, targets_N)
        n_targets = (targets_N != -1).sum()
        return total / n_targets.clamp(min=1)  # without any target: 0, not NaN

    def sum_of_losses(self, x_NC, targets_N):
        return F.cross_entropy(self.logits(x_NC), targets_N, ignore_index=-1, reduction='sum')

    def flops_per_token(self):
        """Return the FLOPs of forward and backward pass for one token.

        6 for each weight in a matrix product, and 12 L T C for attention (PaLM, appendix B).
        """
        n_weights = sum(p.numel() for p in self.parameters())
        if self.config.arch == 'gpt2':
            n_weights -= self.transformer.wpe.weight.numel()  # looked up, not multiplied
        else:
            n_weights -= self.transformer.wte.weight.numel()
        # Attention reaches as far back as the window lets it.
        span = self.config.block_size
        if self.config.window > 0:
            span = min(self.config.window, span)
        return 6 * n_weights + 12 * self.config.n_layer * self.config.n_embd * span

    @classmethod
    def from_pretrained(cls, saved, **overrides):
        """Return the model in a dictionary that folio.checkpoint.load returned.

        overrides: fields of GPTConfig that fit the same weights: dropout, flash, window, a smaller
        block_size … Raises ValueError if the weights do not fit.
        """
        args = saved['model_args']
        unknown = args.keys() - {field.name for field in fields(GPTConfig)}
        if unknown:
            raise ValueError('the model was made with settings that GPTConfig lacks: '
                             f'{", ".join(sorted(unknown))}')
        config = GPTConfig(**(args | overrides))
        if config.block_size > args['block_size']:
            raise ValueError(f'block_size {config.block_size} is longer than the weights allow; '
                             f'give --block_size={args["block_size"]}')
        model = cls(config)
        weights = dict(saved['model'])
        # A shorter context drops the later positions; rotary positions are not stored.
        if 'transformer.wpe.weight' in weights:
            wpe = weights['transformer.wpe.weight']
            weights['transformer.wpe.weight'] = wpe[:config.block_size]
        # nanoGPT and transformers do not pad the vocabulary.
        for name in ('transformer.wte.weight', 'lm_head.weight'):
            if name in weights:
                missing = padded(config.vocab_size) - len(weights[name])
                weights[name] = F.pad(weights[name], (0, 0, 0, missing))
        try:
            model.load_state_dict(weights)
        except RuntimeError as e:  # it names what is missing, unknown or of another shape
            raise ValueError(' '.join(str(e).split())) from None
        return model

    @torch.no_grad()
    def generate(self, idx_BT, max_new_tokens, temperature=1.0, top_k=None):
        """Return idx_BT and max_new_tokens more, drawn one by one: (B, T + max_new_tokens).

        temperature: 0 is greedy. top_k: draw from this many of the likeliest tokens; None: all.
        Call eval() first, or dropout is active. This is the plain way, which reads the whole text
        again for each token; folio/engine.py has the fast one.
        """
        for _ in range(max_new_tokens):
            # A text longer than the context loses its beginning.
            context_BT = idx_BT[:, -self.config.block_size:]
            logits_BTV, _ = self(context_BT)
            logits_BV = logits_BTV[:, -1] / max(temperature, 1e-9)
            # Rule out tokens that are less likely than the k-th best.
            if top_k is not None:
                best_BK = logits_BV.topk(min(top_k, logits_BV.size(1))).values
                logits_BV = logits_BV.masked_fill(logits_BV < best_BK[:, -1:], -math.inf)
            p_BV = logits_BV.softmax(dim=-1).cpu()  # a Mac's GPU may draw a token of probability 0
            next_B1 = torch.multinomial(p_BV, num_samples=1)
            idx_BT = torch.cat((idx_BT, next_B1.to(idx_BT.device)), dim=1)
        return idx_BT
