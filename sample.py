"""
Text from a trained model, on standard output.
    python sample.py --out_dir=out/book --strategy=nucleus
    python sample.py --init_from=gpt2 --start="Once upon a time" --num_samples=3
"""
import codecs
import contextlib
import os
import sys

import linear
from checkpoint import load_checkpoint
from configurator import UserError, configure
from dataset import tokenizer_of
from hugging_face import load_hugging_face
from machine import Machine, default_device
from model import GPT

# ---- Settings --------------------------------------------------------------------------------------------------------
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
quantize = ''  # int8: weights of 8 bits, faster on a CPU, at a small loss of precision
device = default_device()  # cpu, cuda, cuda:1, mps …
dtype = 'auto'  # float32, bfloat16 or float16; auto: bfloat16 where a GPU has it, float16 on other GPUs
compile = False  # a small model then writes faster, after the half minute that compiling takes
configure(globals())
if num_samples < 1 or max_new_tokens < 1:
    raise UserError(f'num_samples ({num_samples}) and max_new_tokens ({max_new_tokens}) must be at least 1')
machine = Machine(device, dtype)
if quantize not in ('', 'int8') or quantize and (machine.type, machine.dtype) != ('cpu', 'float32'):
    raise UserError(f'quantize is {quantize!r}; it may be int8, with --device=cpu --dtype=float32')

# ---- Model and prompt ------------------------------------------------------------------------------------------------
source = os.path.join(out_dir, 'ckpt.pt') if init_from == 'resume' else init_from
checkpoint = load_checkpoint(source) if source.endswith('.pt') else load_hugging_face(source)
model, tokenizer = GPT.from_pretrained(checkpoint).to(device), tokenizer_of(checkpoint)
model = linear.quantize(model) if quantize else model
if start.startswith('FILE:'):
    try:
        with open(start[5:], encoding='utf-8') as f:
            start = f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'the prompt {start[5:]} cannot be read as UTF-8 text: {e}') from None
ids = tokenizer.encode(start) or [tokenizer.start]
if len(ids) > model.config.block_size:
    print(f'notice: the model sees only the end of the prompt, which has {len(ids)} tokens', file=sys.stderr)
with contextlib.redirect_stdout(sys.stderr):  # what it says is a notice
    compile = compile and machine.can_compile()

# ---- Generation ------------------------------------------------------------------------------------------------------
ends = {tokenizer.eot} - {None}
decoders = [codecs.getincrementaldecoder('utf-8')('replace') for _ in range(num_samples)]  # tokens split characters
texts, going, shown = [start] * num_samples, set(range(num_samples)), 0
with machine.autocast:
    for next_B in model.generate([ids] * num_samples, max_new_tokens, strategy, temperature, top_k, top_p, min_p,
                                 repetition_penalty, seed, stop=ends, compile=compile):
        for row, token in enumerate(next_B.tolist()):
            if row not in going or token in ends:
                going.discard(row)
                continue
            texts[row] += decoders[row].decode(tokenizer.decode_bytes([token]))
            if stop and stop in texts[row][len(start):]:
                texts[row] = texts[row][:texts[row].index(stop, len(start))]
                going.discard(row)
        if num_samples == 1:  # keep back what may turn out to be the beginning of `stop`
            safe = max(shown, len(texts[0]) - max(0, len(stop) - 1))
            print(texts[0][shown:safe], end='', flush=True)
            shown = safe
        if not going:
            break
print('\n---------------\n'.join(texts)[shown:])
