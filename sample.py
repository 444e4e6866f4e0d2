"""
Text from a trained model, on standard output.
    python sample.py --out_dir=out/book --strategy=nucleus
    python sample.py --init_from=gpt2 --start="Once upon a time" --num_samples=3
"""
import codecs
import contextlib
import os
import sys

import torch

import tokenizer as tokenizers
from checkpoint import load_checkpoint
from configurator import UserError, configure
from model import GPT

# ---- Settings ----------------------------------------------------------------------------------------------------------
init_from = 'resume'  # resume (out_dir/ckpt.pt), gpt2[-medium|-large|-xl], a .pt, or a Hugging Face folder
out_dir = 'out'  # of the run to sample from
start = ''  # the prompt, or FILE:path; empty begins a document
num_samples = 1  # drawn as one batch; a single one is streamed
max_new_tokens = 500  # tokens a sample
strategy = 'top_k'  # greedy, sample, top_k or nucleus
temperature = 0.8  # below 1: less random; 0: greedy
top_k = 200  # top_k: draw from so many tokens
top_p = 0.9  # nucleus: draw from the fewest tokens whose probabilities sum to this
min_p = 0.0  # rule out tokens less likely than this times the likeliest
repetition_penalty = 1.0  # above 1: what was said gets less likely
stop = ''  # end a sample before this text
seed = 1337
device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
dtype = 'auto'  # float32, bfloat16 or float16; auto: bfloat16 where a GPU has it
configure(globals())

# ---- Model and prompt --------------------------------------------------------------------------------------------------
spec = {'kind': 'gpt2'}
if init_from == 'resume' or init_from.endswith('.pt'):
    checkpoint = load_checkpoint(os.path.join(out_dir, 'ckpt.pt') if init_from == 'resume' else init_from)
    model = GPT.from_pretrained(checkpoint)
    if 'tokenizer' in checkpoint:
        spec = checkpoint['tokenizer']
    elif (data := checkpoint.get('config', {}).get('dataset')) and os.path.exists(os.path.join('data', data, 'meta.pkl')):
        from dataset import Dataset  # a nanoGPT checkpoint leaves its characters in the data folder
        spec = Dataset(data).spec
else:
    model = GPT.from_pretrained(init_from)
tokenizer = tokenizers.load(spec)
if tokenizer.n_vocab != model.config.vocab_size:
    raise UserError(f'the model has {model.config.vocab_size} tokens, its tokenizer ({spec["kind"]}) {tokenizer.n_vocab}')

if dtype not in ('auto', 'float32', 'bfloat16', 'float16'):
    raise UserError(f'dtype is {dtype!r}; choose from float32, bfloat16, float16, auto')
if num_samples < 1 or max_new_tokens < 1:
    raise UserError(f'num_samples ({num_samples}) and max_new_tokens ({max_new_tokens}) must be at least 1')
try:
    device_type = torch.device(device).type
    model.to(device).eval()
except (RuntimeError, AssertionError) as e:
    raise UserError(f'device {device} cannot be used ({str(e).splitlines()[0]}); try --device=cpu') from None
if dtype == 'auto':
    dtype = 'bfloat16' if device_type == 'cuda' and torch.cuda.is_bf16_supported(False) else 'float32'
autocast = contextlib.nullcontext() if dtype == 'float32' else torch.autocast(device_type, getattr(torch, dtype))
if start.startswith('FILE:'):
    try:
        with open(start[5:], encoding='utf-8') as f:
            start = f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'the prompt {start[5:]} cannot be read as UTF-8 text: {e}') from None
ids = tokenizer.encode(start)
if not ids:
    ids = [tokenizer.eot] if tokenizer.eot is not None else tokenizer.encode('\n' if '\n' in spec['chars'] else spec['chars'][0])
if len(ids) > model.config.block_size:
    print(f'notice: the prompt has {len(ids)} tokens, the context {model.config.block_size}: the model sees its end only',
          file=sys.stderr)

# ---- Generation --------------------------------------------------------------------------------------------------------
ends = () if tokenizer.eot is None else (tokenizer.eot,)
decoders = [codecs.getincrementaldecoder('utf-8')('replace') for _ in range(num_samples)]  # tokens may split a character
texts, open_rows = [start] * num_samples, set(range(num_samples))
if num_samples == 1:
    print(start, end='', flush=True)
shown = len(start)
with autocast:
    steps = model.generate([ids] * num_samples, max_new_tokens, strategy, temperature, top_k, top_p, min_p, repetition_penalty,
                           seed, stop=ends)
    for next_B in steps:
        for row in sorted(open_rows):
            token = next_B[row].item()
            if token in ends:
                open_rows.discard(row)
                continue
            texts[row] += decoders[row].decode(tokenizer.decode_bytes([token]))
            if stop and stop in texts[row][len(start):]:
                texts[row] = texts[row][:texts[row].index(stop, len(start))]
                open_rows.discard(row)
        if num_samples == 1:  # keep back what may turn out to be the beginning of `stop`
            safe = len(texts[0]) - (max(0, len(stop) - 1) if open_rows else 0)
            print(texts[0][shown:safe], end='', flush=True)
            shown = max(shown, safe)
        if not open_rows:
            break
if num_samples == 1:
    print(texts[0][shown:])
else:
    print('\n---------------\n'.join(texts))
