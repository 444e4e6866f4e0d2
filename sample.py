"""
Text from a trained model, on standard output.
    python sample.py --out_dir=out/book --strategy=nucleus
    python sample.py --init_from=gpt2 --start="Once upon a time" --num_samples=3
"""
import contextlib
import sys

import folio.checkpoint
from folio import engine
from folio import fast
from folio.configurator import UserError, configure
from folio.data import tokenizer_of
from folio.machine import Machine, default_device
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
checkpoint = folio.checkpoint.load(init_from, out_dir)
model, tokenizer = fast.accelerate(GPT.from_pretrained(checkpoint)).to(device), tokenizer_of(checkpoint)
model = fast.quantize(model) if quantize else model
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
def find_stop(row, text):
    """Return where `stop` begins in a text, or None."""
    return text.index(stop) if stop and stop in text else None


prompts = [ids] * num_samples
texts = [''] * num_samples
shown = 0  # characters of a single sample that are on the screen
if num_samples == 1:
    print(start, end='', flush=True)
with machine.autocast:
    for texts in engine.stream_text(model, tokenizer, prompts, max_new_tokens, find_end=find_stop, strategy=strategy,
                                    temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                                    repetition_penalty=repetition_penalty, seed=seed, compile=compile):
        if num_samples == 1:
            # keep back what may turn out to be the beginning of `stop`
            safe = max(shown, len(texts[0]) - max(0, len(stop) - 1))
            print(texts[0][shown:safe], end='', flush=True)
            shown = safe
if num_samples == 1:
    print(texts[0][shown:])
else:
    print('\n---------------\n'.join(start + text for text in texts))
