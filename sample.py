"""
Write text with a trained model, to standard output.
    python sample.py --out_dir=out/book --strategy=nucleus
    python sample.py --init_from=gpt2 --start="Once upon a time" --num_samples=3
    python sample.py --out_dir=out/gpt2_dolly --chat=True

A single sample appears as it is written; several are drawn together and appear at the end. --chat
answers line after line until Ctrl-D. A tuned model sees each line in the prompt template of its
training data (see prepare/dolly); any other model continues the text.

A config file of train.py may be given too. What it says of init_from counts here as well:
--init_from=resume reads its run.

Needs model.py and folio/.
"""
import os
import sys

os.environ.setdefault('GOMP_SPINCOUNT', '10000')  # see train.py
import torch

import folio.checkpoint
from folio import engine
from folio.configurator import UserError, configure, notice, require_at_least
from folio.machine import Machine, default_device
from model import GPT

# ---- Settings ------------------------------------------------------------------------------------
init_from = 'resume'  # resume (out_dir/ckpt.pt), gpt2[-medium|-large|-xl], a .pt, or a folder
out_dir = 'out'  # the run to sample from
start = ''  # the prompt, or FILE:path; empty: begin a document
num_samples = 1  # drawn as one batch
max_new_tokens = 500  # tokens in a sample
strategy = 'top_k'  # greedy, sample, top_k or nucleus
temperature = 0.8  # below 1: less random; 0: greedy
top_k = 200  # top_k: draw from this many tokens
top_p = 0.9  # nucleus: draw from the fewest tokens whose probabilities sum to this
stop = ''  # end a sample before this text
chat = False  # talk with the model, line by line
seed = 1337  # of the draws
device = default_device()  # cpu, cuda, cuda:1, mps …
dtype = 'auto'  # float32, bfloat16, float16; auto: bfloat16 where that is fast
config = configure(globals(), strict=False)

# ---- Machine -------------------------------------------------------------------------------------
require_at_least(1, config, 'num_samples', 'max_new_tokens')
engine.check_sampling(strategy, temperature, top_k, top_p)
machine = Machine(device, dtype)

# ---- Model and prompt ----------------------------------------------------------------------------
checkpoint = folio.checkpoint.load(init_from, out_dir)
model = folio.checkpoint.build(GPT, checkpoint).eval()
model.to(machine.device, machine.torch_dtype)
tokenizer = folio.checkpoint.tokenizer_of(checkpoint)
if start.startswith('FILE:'):
    path = start.removeprefix('FILE:')
    try:
        with open(path, encoding='utf-8-sig') as f:  # Windows may add a byte order mark
            start = f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'the prompt {path} cannot be read as UTF-8 text: {e}') from None
ids = folio.checkpoint.encode_prompt(checkpoint, tokenizer, start)
if len(ids) > model.config.block_size:
    notice(f'the model sees only the end of the prompt, which has {len(ids)} tokens')


# ---- Text ----------------------------------------------------------------------------------------
def find_stop(text):
    """Return where the text `stop` begins; None if it has not come yet."""
    if stop and stop in text:
        return text.index(stop)
    return None


def continuations(prompt, n, seed):
    """Return an iterator over lists of n growing texts that continue a prompt of token ids."""
    return engine.stream_text(
        model, tokenizer, torch.tensor([prompt] * n), max_new_tokens, find_end=find_stop,
        strategy=strategy, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)


def show(steps):
    """Print a single text as it grows, and return it."""
    text = ''
    n_shown = 0  # characters on the screen
    for (text,) in steps:
        # Keep back what may turn out to be the beginning of `stop`.
        n_safe = max(n_shown, len(text) - max(0, len(stop) - 1))
        print(text[n_shown:n_safe], end='', flush=True)
        n_shown = n_safe
    print(text[n_shown:], flush=True)
    return text


def talk():
    """Read lines and answer each, until Ctrl-D."""
    template = checkpoint.get('template') or '{}'
    is_tuned = template != '{}'
    turns = []  # token ids of each question with its answer
    n_answers = 0
    while True:
        try:
            question = input('> ' if sys.stdin.isatty() else '')
        except EOFError:
            print()
            return
        try:
            turn = tokenizer.encode(template.replace('{}', question))
        except UserError as e:  # a character that a character model never saw
            notice(str(e))
            continue
        # A tuned model learned from documents of one question each. For any other model the whole
        # talk is one document.
        if is_tuned or not turns:
            turn = folio.checkpoint.beginning_of(checkpoint, tokenizer) + turn
        turns.append(turn)
        # Forget the oldest turns, to leave room for the answer: at most half of the context.
        longest_prompt = max(model.config.block_size - max_new_tokens, model.config.block_size // 2)
        while len(turns) > 1 and sum(map(len, turns)) > longest_prompt:
            del turns[0]
        n_answers += 1
        prompt = sum(turns, []) or [tokenizer.start]  # an empty line may be all that is left
        answer = show(continuations(prompt, 1, seed=seed + n_answers))
        turns[-1] = turn + tokenizer.encode(answer)


if chat:
    talk()
elif num_samples == 1:
    print(start, end='', flush=True)
    show(continuations(ids, 1, seed))
else:
    for texts in continuations(ids, num_samples, seed):
        pass  # until all of them have ended
    print('\n---------------\n'.join(start + text for text in texts))
