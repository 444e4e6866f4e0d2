"""
Define the model: GPT-2, and a modern successor with the same interface.
    python -c "from model import *; print(GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128)))"

arch='gpt2' is OpenAI's GPT-2 (Radford et al. 2019). arch='modern' has rotary positions (Su et al.
2021), RMSNorm (Zhang and Sennrich 2019), normalised queries and keys (Henry et al. 2020), a squared
ReLU (So et al. 2021), an untied head, and capped logits: the shape of transformers'
NanoChatForCausalLM.

Letters at the end of a name are the dimensions of a tensor:
    B batch, T time, S time of the keys, C channels, H heads, D head size, V vocabulary,
    K the k best, 1 a single one
The residual stream is x, (B, T, C).

Needs torch and nothing else.
"""
import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

LOGIT_CAP = 15.0  # modern: logits stay within ±15
NORM_EPS = 1e-6  # modern: keeps the norm of zeros from being 0 / 0


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

    def __post_init__(self):
        """Raise ValueError for a shape that cannot be."""
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
            self.bias = False  # it has none, whatever was asked for


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


def rotate(x_BHTD, cos, sin):
    """Turn each pair (i, i + D/2) of a head's channels by an angle that grows with the position."""
    # After this the product of a query and a key depends only on how far apart they are.
    a, b = x_BHTD.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).type_as(x_BHTD)


def can_see(pos_T, key_pos_S, window):
    """Return (T, S): whether a query sees a key, not a later one and fewer than window back."""
    distance = pos_T[:, None] - key_pos_S
    return (distance >= 0) & (distance < window)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.layer = layer  # the cache keeps keys and values layer by layer
        # Query, key and value in one product: one large matrix is faster than three small ones.
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_attn.n_matrices = 3  # for Muon, which steps each by itself
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cos_sin, mask, cache):
        B, T, C = x.shape
        H = self.config.n_head
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, H, C // H).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, H, C // H).transpose(1, 2)
        v = v.view(B, T, H, C // H).transpose(1, 2)
        if self.config.arch == 'modern':
            q = self.rotate_and_norm(q, *cos_sin)
            k = self.rotate_and_norm(k, *cos_sin)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # now of all tokens so far, (B, H, S, D)
        y = self.attend(q, k, v, mask)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.config.dropout, self.training)

    def rotate_and_norm(self, x_BHTD, cos, sin):
        """Return queries or keys turned by their positions, each of mean square 1, (B, H, T, D)."""
        # Queries and keys of one size keep the scores bounded, and the softmax from freezing.
        return rms_norm(rotate(x_BHTD, cos, sin))

    def attend(self, q_BHTD, k_BHSD, v_BHSD, mask):
        """Return softmax(q k' / sqrt(D)) v, (B, H, T, D).

        mask: True where a query sees a key; None: plain causal attention.
        """
        T, D = q_BHTD.shape[-2:]
        dropout = self.config.dropout if self.training else 0.0
        # A single query is the newest token, and all keys are its past. Of several queries without
        # a mask the keys are those of the same T tokens, and the future is to be hidden.
        causal = mask is None and T > 1
        if self.config.flash:
            return F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, attn_mask=mask,
                                                  dropout_p=dropout, is_causal=causal)
        # The same, written out.
        scores_BHTS = q_BHTD @ k_BHSD.mT / math.sqrt(D)
        if causal:
            mask = torch.ones(T, T, dtype=torch.bool, device=q_BHTD.device).tril()
        if mask is not None:
            scores_BHTS = scores_BHTS.masked_fill(~mask, -math.inf)
        weights_BHTS = F.dropout(scores_BHTS.softmax(dim=-1), dropout)
        return weights_BHTS @ v_BHSD


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

    def forward(self, x, cos_sin, mask, cache):
        # What is added is normalised first, the stream itself never: gradients pass straight on.
        x = x + self.attn(self.ln_1(x), cos_sin, mask, cache)
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
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Draw the weights of each Linear and Embedding, as GPT-2's paper says.

        Norms begin as torch makes them. So does what you add: a parameter keeps its own value.
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

        With targets: logits (B, T, V), and the mean loss in nats over targets that are not -1.
        Without: the logits of the last position, (B, 1, V), or of all if all_logits; loss is None.
        cache: an engine.KVCache, which is read and extended.
        """
        B, T = idx_BT.shape
        assert T <= self.config.block_size, f'{T} tokens exceed block_size {self.config.block_size}'
        if cache is None:
            pos_T = torch.arange(T, device=idx_BT.device)
            key_pos_S = pos_T
        else:
            pos_T, key_pos_S = cache.positions(T)

        x = self.transformer.wte(idx_BT)
        cos_sin = None
        if self.config.arch == 'gpt2':
            x = x + self.transformer.wpe(pos_T)
        else:
            x = rms_norm(x)
            # Under bfloat16 autocast all that the blocks add is bfloat16. If the stream is so too,
            # half as many bytes are moved. In float16 it could overflow.
            device = x.device.type
            if torch.is_autocast_enabled(device):
                if torch.get_autocast_dtype(device) == torch.bfloat16:
                    x = x.bfloat16()
            cos_sin = self.rotary_angles(pos_T)
        x = F.dropout(x, self.config.dropout, self.training)
        hides_keys = cache is not None and cache.hides_keys
        mask = self.attention_mask(pos_T, key_pos_S, hides_keys)
        for block in self.transformer.h:
            x = block(x, cos_sin, mask, cache)
        # To draw the next token the last position is enough, and the head is expensive.
        if targets_BT is None and not all_logits:
            x = x[:, -1:]
        x = self.transformer.ln_f(x)
        if targets_BT is None:
            return self.logits(x), None
        return self.logits_and_loss(x, targets_BT)

    def rotary_angles(self, pos_T):
        """Return cosine and sine, each (T, D/2), of the angles pos / 10000^(2i/D)."""
        D = self.config.n_embd // self.config.n_head
        frequency = 10000.0 ** (-torch.arange(0, D, 2, device=pos_T.device) / D)
        angle = pos_T[:, None] * frequency
        return angle.cos(), angle.sin()

    def attention_mask(self, pos_T, key_pos_S, hides_keys):
        """Return (T, S), True where a query sees a key, or None: plain causal attention.

        hides_keys: whether there are keys that no query may see, the empty slots of a cache.
        """
        T, S = len(pos_T), len(key_pos_S)
        window = self.config.window or S
        whole_text = T == S
        newest_token = T == 1
        if (whole_text or newest_token) and window >= S and not hides_keys:
            return None  # attend() hides the future by itself
        return can_see(pos_T, key_pos_S, window)

    def logits(self, x):
        """Return float32 logits of the tokens that exist, (B, T, V)."""
        # float32 even under autocast: a softmax over a large vocabulary needs the digits.
        logits_BTV = self.lm_head(x).float()
        if self.config.arch == 'modern':
            logits_BTV = LOGIT_CAP * torch.tanh(logits_BTV / LOGIT_CAP)
        return logits_BTV[..., :self.config.vocab_size]

    def logits_and_loss(self, x, targets_BT):
        """Return the logits and their mean loss over the targets that are not -1, in nats."""
        logits_BTV = self.logits(x)
        total = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=-1,
                                reduction='sum')
        n_targets = (targets_BT != -1).sum()
        return logits_BTV, total / n_targets.clamp(min=1)  # without any target: 0, not NaN

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
    def from_pretrained(cls, checkpoint, **overrides):
        """Return the model in a dictionary that folio.checkpoint.load has returned.

        overrides: fields of GPTConfig that fit the same weights, such as dropout, flash, window and
        a smaller block_size. Raises ValueError where the weights cannot be such a model.
        """
        args = checkpoint['model_args']
        unknown = args.keys() - {field.name for field in fields(GPTConfig)}
        if unknown:
            raise ValueError('the model was made with settings that GPTConfig lacks: '
                             f'{", ".join(sorted(unknown))}')
        config = GPTConfig(**(args | overrides))
        if config.block_size > args['block_size']:
            raise ValueError(f'block_size {config.block_size} is longer than that of the weights, '
                             f'{args["block_size"]}')
        model = cls(config)
        weights = dict(checkpoint['model'])
        # A shorter context has no use for the later positions; rotary ones are not stored.
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

        top_k: draw from this many of the likeliest tokens; None: from all. Call eval() first, or
        dropout is at work. This is the plain way, which reads the whole text again for each token;
        folio/engine.py has the fast one.
        """
        for _ in range(max_new_tokens):
            # A text longer than the context loses its beginning.
            context_BT = idx_BT[:, -self.config.block_size:]
            logits_BTV, _ = self(context_BT)
            logits_BV = logits_BTV[:, -1] / temperature
            # Rule out what is less likely than the k-th best.
            if top_k is not None:
                best_BK = logits_BV.topk(min(top_k, logits_BV.size(1))).values
                logits_BV = logits_BV.masked_fill(logits_BV < best_BK[:, -1:], -math.inf)
            next_B1 = torch.multinomial(logits_BV.softmax(dim=-1), num_samples=1)
            idx_BT = torch.cat((idx_BT, next_B1), dim=1)
        return idx_BT
