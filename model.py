"""
The model: GPT-2 and its modern successor in one file, with a key-value cache, sampling and checkpoints.
    python -c "from model import *; print(GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128)))"

Letters in names: B batch, T time, C channels, H heads, D head size, V vocabulary. The residual stream is x_BTC, called x.
Papers: GPT-2 (Radford et al. 2019); rotary positions (Su et al. 2021); ReLU squared (So et al. 2021); QK-norm (Henry et
al. 2020). arch='modern' is transformers' NanoChatForCausalLM.
"""
import dataclasses
import functools
import glob
import json
import math
import os
import pickle
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError

FORMAT = 1  # of our checkpoints; nanoGPT's have none
OPENAI = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
LOGIT_CAP = 15.0  # modern: logits stay within ±15
PEAK_TFLOPS = {'H200': 989, 'H100': 989, 'A100': 312, 'B200': 2250, 'L40S': 362, 'RTX 4090': 165, 'L4': 121}  # dense bf16


@dataclass
class GPTConfig:
    block_size: int = 1024  # context length in tokens
    vocab_size: int = 50257  # tokens that exist; the matrices have padded_vocab_size rows
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
        for name, allowed in {'arch': ('gpt2', 'modern'), 'gelu': ('tanh', 'none')}.items():
            if getattr(self, name) not in allowed:
                raise UserError(f'{name} is {getattr(self, name)!r}; choose from {", ".join(allowed)}')
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise UserError(f'{name} is {getattr(self, name)}; it must be at least 1')
        if self.n_embd % self.n_head:
            raise UserError(f'n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head}); '
                            f'try --n_embd={math.ceil(self.n_embd / self.n_head) * self.n_head}')
        if self.arch == 'modern' and self.n_embd // self.n_head % 2:
            raise UserError(f'rotary positions need an even head size; n_embd / n_head is {self.n_embd // self.n_head}')
        if not 0 <= self.dropout < 1 or self.window < 0:
            raise UserError(f'dropout ({self.dropout}) must be in [0, 1) and window ({self.window}) at least 0')

    @property
    def padded_vocab_size(self):
        """A multiple of 64, which matrix kernels like; the padding's logits are cut off, so it is never sampled."""
        return math.ceil(self.vocab_size / 64) * 64


# ---- Blocks ----------------------------------------------------------------------------------------------------------

def rms_norm(x):
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def make_norm(config):
    return nn.LayerNorm(config.n_embd, bias=config.bias) if config.arch == 'gpt2' else nn.RMSNorm(
        config.n_embd, eps=1e-6, elementwise_affine=False)


def rotate(x_BHTD, cos, sin):
    """Rotary positions: turn each pair (i, i + D/2) of a head's channels by the angle that cos and sin give."""
    a, b = x_BHTD.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).type_as(x_BHTD)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        bias = config.bias and config.arch == 'gpt2'
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=bias)  # query, key and value in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotary, mask, append):
        B, T, C = x.shape
        q_BHTD, k_BHTD, v_BHTD = self.c_attn(x).view(B, T, 3, self.config.n_head, -1).permute(2, 0, 3, 1, 4)
        if rotary is not None:
            q_BHTD, k_BHTD = rms_norm(rotate(q_BHTD, *rotary)), rms_norm(rotate(k_BHTD, *rotary))
        if append is not None:
            k_BHTD, v_BHTD = append(k_BHTD, v_BHTD)
        y_BHTD = self.attend(q_BHTD, k_BHTD, v_BHTD, mask)
        y = y_BHTD.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))

    def attend(self, q_BHTD, k_BHTD, v_BHTD, mask):
        """softmax(q k' / sqrt(D)) v. mask: True where a query (row) may look at a key; None is plain causal."""
        dropout = self.config.dropout if self.training else 0.0
        T, S, D = q_BHTD.size(-2), k_BHTD.size(-2), q_BHTD.size(-1)
        causal = mask is None and T > 1  # a single query is the newest token: it may see every key
        if self.config.flash:
            return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, mask, dropout, is_causal=causal)
        scores_BHTS = q_BHTD @ k_BHTD.mT / math.sqrt(D)
        if causal:
            mask = torch.ones(T, S, dtype=torch.bool, device=q_BHTD.device).tril()
        if mask is not None:
            scores_BHTS = scores_BHTS.masked_fill(~mask, -math.inf)
        return F.dropout(scores_BHTS.softmax(dim=-1), dropout) @ v_BHTD


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        bias = config.bias and config.arch == 'gpt2'
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=bias)
        self.dropout = nn.Dropout(config.dropout)
        self.config = config

    def forward(self, x):
        x = self.c_fc(x)
        x = F.gelu(x, approximate=self.config.gelu) if self.config.arch == 'gpt2' else x.relu().square()
        return self.dropout(self.c_proj(x))


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

    def __init__(self, config, batch_size, device, dtype):
        shape = (config.n_layer, 2, batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * batch_size

    def append(self, layer, pos_BT, k_BHTD, v_BHTD):
        """Write one layer's new keys and values at their positions; return that layer's from the first to the last."""
        end = max(self.lengths) + k_BHTD.size(2)
        rows = torch.arange(pos_BT.size(0), device=pos_BT.device)[:, None]
        for whole_BHTD, new_BHTD in zip(self.kv[layer], (k_BHTD, v_BHTD)):
            if len(set(self.lengths)) == 1:
                whole_BHTD[:, :, end - new_BHTD.size(2):end] = new_BHTD
            else:
                whole_BHTD.transpose(1, 2)[rows, pos_BT] = new_BHTD.transpose(1, 2).to(whole_BHTD.dtype)
        return self.kv[layer, :, :, :, :end].unbind()


# ---- The model -------------------------------------------------------------------------------------------------------

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        V, C = config.padded_vocab_size, config.n_embd
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(V, C),
            wpe=nn.Embedding(config.block_size, C) if config.arch == 'gpt2' else nn.Identity(),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=make_norm(config),
        ))
        self.lm_head = nn.Linear(C, V, bias=False)
        if config.arch == 'gpt2':
            self.transformer.wte.weight = self.lm_head.weight  # tied: one matrix reads tokens and writes them
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """The GPT-2 paper's: normal 0.02, residual projections scaled down by sqrt(2 * n_layer). modern: head at zero."""
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
        if isinstance(source, dict) or source.endswith('.pt'):
            checkpoint = source if isinstance(source, dict) else load_checkpoint(source)
            config, weights = GPTConfig(**checkpoint['model_args']), checkpoint['model']
        else:
            config, weights = load_weights_of_folder(download_openai(source) if source in OPENAI else source)
        block_size = overrides.pop('block_size', config.block_size)
        if block_size > config.block_size:
            raise UserError(f'block_size ({block_size}) is longer than the context of {source} ({config.block_size})')
        model = cls(dataclasses.replace(config, **overrides))
        model.load_state_dict(weights)
        model.crop_block_size(block_size)
        return model

    def forward(self, idx_BT, targets_BT=None, all_logits=False, cache=None, lengths=None):
        """(logits, loss): the mean loss in nats over targets that are not -1, or None; logits (B, T, V) in float32.

        idx_BT: token ids; T may not exceed block_size. Without targets the logits are those of the last position, (B, 1,
        V), unless all_logits. cache: a KVCache to read and extend. lengths: of the rows, where idx_BT is padded on the
        right (prompts of several lengths); their last position is then lengths - 1.
        """
        B, T = idx_BT.shape
        past = cache.lengths if cache else [0]
        end = max(past) + T
        assert end <= self.config.block_size, f'{end} tokens do not fit in a block_size of {self.config.block_size}'
        pos_BT = torch.tensor(past, device=idx_BT.device)[:, None] + torch.arange(T, device=idx_BT.device)
        x = self.transformer.wte(idx_BT)
        if self.config.arch == 'gpt2':
            x, rotary = x + self.transformer.wpe(pos_BT), None
        else:
            x, rotary = rms_norm(x), self.rotary(pos_BT)
        x = self.transformer.drop(x)
        mask = self.attention_mask(pos_BT, end, past)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, rotary, mask, functools.partial(cache.append, layer, pos_BT) if cache else None)
        if cache:
            cache.lengths = [n + new for n, new in zip(past, lengths or [T] * B)]
        if targets_BT is None and not all_logits:
            last_B = torch.tensor(lengths or [T], device=x.device) - 1
            x = x[torch.arange(B, device=x.device), last_B][:, None]
        logits_BTV = self.lm_head(self.transformer.ln_f(x))[..., :self.config.vocab_size].float()
        if self.config.arch == 'modern':
            logits_BTV = LOGIT_CAP * torch.tanh(logits_BTV / LOGIT_CAP)
        if targets_BT is None:
            return logits_BTV, None
        total = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=-1, reduction='sum')
        return logits_BTV, total / (targets_BT != -1).sum().clamp(min=1)

    def rotary(self, pos_BT):
        """Cosine and sine, (B, 1, T, D/2), of the angles pos / 10000^(2i/D)."""
        D = self.config.n_embd // self.config.n_head
        frequency = 10000.0 ** (-torch.arange(0, D, 2, device=pos_BT.device) / D)
        angle = pos_BT[:, None, :, None] * frequency
        return angle.cos(), angle.sin()

    def attention_mask(self, pos_BT, end, past):
        """True where a query at pos_BT may look at a key of 0 … end - 1; None where plain causal attention is meant."""
        uniform = len(set(past)) == 1 and (past[0] == 0 or pos_BT.size(1) == 1)
        if uniform and not 0 < self.config.window < end:
            return None
        distance_BTS = pos_BT[..., None] - torch.arange(end, device=pos_BT.device)
        mask_BTS = distance_BTS >= 0
        if self.config.window:
            mask_BTS &= distance_BTS < self.config.window
        return mask_BTS[:, None]

    def flops_per_token(self):
        """Of a training step, forward and backward: 6 a weight in a matrix product, 12 LTC for attention (PaLM, B)."""
        lookups = [self.transformer.wpe] + ([self.transformer.wte] if self.config.arch == 'modern' else [])
        weights = sum(p.numel() for p in self.parameters()) - sum(p.numel() for m in lookups for p in m.parameters())
        span = min(self.config.window or self.config.block_size, self.config.block_size)
        return 6 * weights + 12 * self.config.n_layer * self.config.n_embd * span

    def crop_block_size(self, block_size):
        """Shorten the context, in place: the later positions are forgotten."""
        if block_size < self.config.block_size:
            self.config.block_size = block_size
            if self.config.arch == 'gpt2':
                self.transformer.wpe = nn.Embedding.from_pretrained(self.transformer.wpe.weight[:block_size], freeze=False)

# ---- Generation ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, idx_BT, max_new_tokens, strategy='sample', temperature=1.0, top_k=50, top_p=0.9, min_p=0.0,
                 repetition_penalty=1.0, seed=None, stop=(), use_cache=True):
        """Continue each row: a generator of one (B,) tensor of token ids a step. Logits are shaped by `next_token_logits`.

        idx_BT: token ids, or a list of lists where prompts differ in length. A row that is longer than the context is cut
        to its newer half and goes on. stop: token ids that end a row, which then repeats its last id; when all rows have
        ended, so does the generator. seed: of the draws; None takes torch's own random state.
        """
        rows = idx_BT.tolist() if isinstance(idx_BT, torch.Tensor) else idx_BT
        if not rows or not all(rows):
            raise UserError('an empty prompt: give at least one token')
        B, device, limit = len(rows), self.lm_head.weight.device, self.config.block_size
        lengths, starts, cache = [len(row) for row in rows], [0] * len(rows), None
        history_BN = torch.zeros(B, max(lengths) + max_new_tokens, dtype=torch.long, device=device)
        seen_BV = torch.zeros(B, self.config.vocab_size, dtype=torch.bool, device=device)
        for b, row in enumerate(rows):
            history_BN[b, :len(row)] = torch.tensor(row)
            seen_BV[b, row] = True
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        every_B, ended_B = torch.arange(B, device=device), torch.zeros(B, dtype=torch.bool, device=device)
        stop = torch.tensor(sorted(stop), dtype=torch.long, device=device)
        dtype = self.lm_head.weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        was_training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                full = [n - start > limit for n, start in zip(lengths, starts)]
                if cache is None or any(full):
                    starts = [n - max(1, limit // 2) if f else start for n, start, f in zip(lengths, starts, full)]
                    contexts = [history_BN[b, start:n] for b, (start, n) in enumerate(zip(starts, lengths))]
                    cache = KVCache(self.config, B, device, dtype) if use_cache else None
                    idx_BT = nn.utils.rnn.pad_sequence(contexts, batch_first=True)
                    logits_B1V, _ = self.forward(idx_BT, cache=cache, lengths=[len(c) for c in contexts])
                else:
                    logits_B1V, _ = self.forward(next_B[:, None], cache=cache)
                logits_BV = logits_B1V[:, 0]
                if repetition_penalty != 1:  # CTRL (Keskar et al. 2019): what was seen gets less likely, whatever its sign
                    penalty = torch.where(logits_BV > 0, 1 / repetition_penalty, repetition_penalty)
                    logits_BV = torch.where(seen_BV, logits_BV * penalty, logits_BV)
                logits_BV = next_token_logits(logits_BV, strategy, temperature, top_k, top_p, min_p)
                # The largest of p / Exponential(1) is a draw from p, without a transfer to the host.
                noise_BV = torch.empty_like(logits_BV).exponential_(generator=generator)
                chosen_B = (logits_BV.softmax(dim=-1) / noise_BV).argmax(dim=-1)
                next_B = torch.where(ended_B, history_BN[every_B, [n - 1 for n in lengths]], chosen_B)
                history_BN[every_B, lengths] = next_B
                seen_BV[every_B, next_B] = True
                lengths = [n + 1 for n in lengths]
                yield next_B
                ended_B |= torch.isin(next_B, stop)
                if len(stop) and ended_B.all():
                    return
        finally:
            self.train(was_training)


def next_token_logits(logits_BV, strategy, temperature=1.0, top_k=50, top_p=0.9, min_p=0.0):
    """Logits whose softmax is to be drawn from: scaled by 1 / temperature, -inf where a token is ruled out.

    strategy: greedy keeps the most likely token; sample all; top_k so many (Fan et al. 2018); nucleus the fewest whose
    probabilities sum to top_p (Holtzman et al. 2019). min_p, with any: only tokens at least min_p times as likely as the
    likeliest. Temperature 0 is greedy. Raises UserError for a value outside its range.

    >>> next_token_logits(torch.tensor([[1., 2., 3.]]), 'top_k', top_k=2)
    tensor([[-inf, 2., 3.]])
    """
    if strategy not in ('greedy', 'sample', 'top_k', 'nucleus'):
        raise UserError(f'strategy is {strategy!r}; choose from greedy, sample, top_k, nucleus')
    if temperature < 0 or top_k < 1 or not 0 < top_p <= 1 or not 0 <= min_p <= 1:
        raise UserError(f'temperature ({temperature}) must be at least 0, top_k ({top_k}) at least 1, '
                        f'top_p ({top_p}) in (0, 1], min_p ({min_p}) in [0, 1]')
    if strategy == 'greedy' or temperature == 0:
        best_B1 = logits_BV.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits_BV, -math.inf).scatter(1, best_B1, 0.0)
    logits_BV = logits_BV / temperature
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    p_BV = sorted_BV.softmax(dim=-1)
    out_BV = p_BV < min_p * p_BV[:, :1]
    if strategy == 'top_k':
        out_BV[:, top_k:] = True
    elif strategy == 'nucleus':
        out_BV |= p_BV.cumsum(dim=-1) - p_BV >= top_p  # what comes before a token already sums to top_p
    return logits_BV.masked_fill(torch.zeros_like(out_BV).scatter(1, order_BV, out_BV), -math.inf)


def peak_flops(gpu_name):
    """The GPU's dense bfloat16 flops a second by its data sheet, or None. peak_flops('NVIDIA A100-SXM4') is 312e12."""
    return next((tflops * 1e12 for name, tflops in PEAK_TFLOPS.items() if name in gpu_name), None)


# ---- Checkpoints and other people's weights --------------------------------------------------------------------------

def save_checkpoint(path, checkpoint):
    """Write a dictionary of tensors and plain values: to path.tmp, synced, then renamed, so path is whole at any time."""
    try:
        with open(path + '.tmp', 'wb') as f:
            torch.save(checkpoint | {'format': FORMAT}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + '.tmp', path)
    except (OSError, RuntimeError) as e:  # torch wraps a failed write in a RuntimeError
        if os.path.exists(path + '.tmp'):
            os.remove(path + '.tmp')
        why = e if isinstance(e, OSError) else e.__context__
        if not isinstance(why, OSError):
            raise
        raise UserError(f'could not write {path}: {why.strerror}; what was there before is intact. Make room, '
                        'then go on with --init_from=resume') from e


def load_checkpoint(path):
    """The dictionary in a ckpt.pt of ours or of nanoGPT, on the CPU. Only tensors and plain values are ever unpickled."""
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UserError(f'no checkpoint {path}; train one first, or name its folder with --out_dir=…') from None
    except pickle.UnpicklingError as e:
        raise UserError(f'{path} is refused: it is no plain checkpoint, or holds more than tensors and plain values') from e
    except (RuntimeError, EOFError, OSError, ValueError) as e:
        raise UserError(f'{path} is damaged or cut short ({type(e).__name__}); use another copy of it') from e
    if not isinstance(checkpoint, dict) or not {'model', 'model_args'} <= checkpoint.keys():
        raise UserError(f'{path} is not a checkpoint of folio or nanoGPT: it lacks model or model_args')
    return checkpoint if 'format' in checkpoint else upgrade_nanogpt(checkpoint)


def upgrade_nanogpt(checkpoint):
    """A nanoGPT checkpoint as one of ours: exact GELU, no mask buffers or torch.compile prefix, vocabulary padded."""
    args = {'gelu': 'none'} | checkpoint['model_args']
    rows, args['vocab_size'] = args['vocab_size'], {50304: 50257}.get(args['vocab_size'], args['vocab_size'])
    config = GPTConfig(**args)

    def pad(t):
        has_vocab = isinstance(t, torch.Tensor) and t.shape == (rows, config.n_embd)
        return F.pad(t, (0, 0, 0, config.padded_vocab_size - rows)) if has_vocab else t

    weights = {k.removeprefix('_orig_mod.'): pad(v) for k, v in checkpoint['model'].items()}
    weights = {k: v for k, v in weights.items() if not k.endswith('.attn.bias')}
    upgraded = checkpoint | {'model': weights, 'model_args': args}
    for state in checkpoint.get('optimizer', {}).get('state', {}).values():
        state.update({k: pad(v) for k, v in state.items()})
    return upgraded


def load_weights_of_folder(folder):
    """(GPTConfig, state dict) of a Hugging Face folder that holds a GPT-2: config.json and *.safetensors."""
    from safetensors.torch import load_file
    try:
        with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
            hf = json.load(f)
    except (OSError, ValueError) as e:
        raise UserError(f'{folder} is no Hugging Face folder: config.json could not be read ({e})') from None
    files = sorted(glob.glob(os.path.join(glob.escape(folder), '*.safetensors')))
    if hf.get('model_type') != 'gpt2' or not files:
        raise UserError(f'{folder} holds a {hf.get("model_type")} with {len(files)} .safetensors; gpt2 and one is needed')
    config = GPTConfig(block_size=hf['n_positions'], **{k: hf[k] for k in ('vocab_size', 'n_layer', 'n_head', 'n_embd')},
                       gelu={'gelu_new': 'tanh', 'gelu': 'none'}[hf['activation_function']])
    weights = {}
    for k, v in (item for file in files for item in load_file(file).items()):
        k = 'transformer.' + k.removeprefix('transformer.') if k != 'lm_head.weight' else k
        if not k.endswith(('.attn.bias', '.attn.masked_bias', 'lm_head.weight')):
            weights[k] = v.T if k.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')) else v  # Conv1D is (in, out)
    weights['transformer.wte.weight'] = F.pad(weights['transformer.wte.weight'],
                                              (0, 0, 0, config.padded_vocab_size - config.vocab_size))
    return config, weights | {'lm_head.weight': weights['transformer.wte.weight']}


def download_openai(name):
    """The folder that one of OpenAI's four models lies in, downloaded once by huggingface_hub."""
    from huggingface_hub import hf_hub_download
    try:
        hf_hub_download(f'openai-community/{name}', 'config.json')
        return os.path.dirname(hf_hub_download(f'openai-community/{name}', 'model.safetensors'))
    except Exception as e:  # offline, no such file, disk full: the hub's errors have no common class
        raise UserError(f'could not download {name}: {str(e).splitlines()[0]}') from e
