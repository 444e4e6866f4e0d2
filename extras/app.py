"""
Serve a page to try models on: two side by side continue one prompt, token by token.
    python extras/app.py --out_dir=out/book --other=out/book_nanogpt

It prints the page's address, which this machine alone can reach unless --share=True. There one can
choose a run's newest model, its best, the same untrained, and OpenAI's GPT-2, which is downloaded.
Tokens can be coloured by probability: the model's own, before temperature and strategy. The book's
model writes 307 tokens/s on two cores of an AMD EPYC (torch 2.13, 2026-11-21).

Needs model.py, folio/ and gradio.
"""
import codecs
import functools
import html
import itertools
import os
import random
import socket
import sys
import threading
import time

sys.path.insert(0, os.path.abspath(__file__ + '/../..'))  # the root of the checkout
import torch

import folio.checkpoint
from folio import engine
from folio.configurator import UserError, configure
from folio.machine import Machine, default_device
from model import GPT, GPTConfig

# ---- Settings ------------------------------------------------------------------------------------
out_dir = 'out'  # folder of the run to show
other = ''  # folder of another run, to compare with
port = 7860  # of this machine
share = False  # True: also at a public address, for everyone who has it
device = default_device()  # cpu, cuda, cuda:1, mps …
dtype = 'auto'  # float32, bfloat16, float16; auto: bfloat16 where a GPU has it, else float16 there
configure(globals(), strict=False)

try:  # now, because loading the models takes a while
    socket.create_server(('127.0.0.1', port)).close()
except (OSError, OverflowError) as e:
    raise UserError(f'port {port} cannot be used ({e}); give another, as in --port=7861') from None
machine = Machine(device, dtype)

# ---- Models --------------------------------------------------------------------------------------
sources = {}  # {choice in the menu: checkpoint}
for run in (out_dir, other):
    if not run:
        continue
    for kind, file in (('newest', 'ckpt.pt'), ('best', 'best.pt'), ('untrained', 'ckpt.pt')):
        path = os.path.join(run, file)
        # The newest is listed even if it is missing: loading it, below, says what to do
        if os.path.exists(path) or kind == 'newest':
            sources[f'{run}: {kind}'] = path
sources["gpt2: OpenAI's"] = 'gpt2'

# One model computes at a time, so that tokens/s and torch's random state are its own
turn = threading.Lock()
TURN_SECONDS = 0.04  # after which the page shows what is new, and another model may compute

GOING_ON = ' …'  # ends the line about a text that is still being written


def load(choice):
    """Return (model, tokenizer, facts about the model in a line) as they are now."""
    path = sources[choice]
    modified = None
    if os.path.exists(path):  # of a run that is still going, the newest changes
        modified = os.path.getmtime(path)
    return load_once(choice, modified)


@functools.lru_cache(maxsize=4)
def load_once(choice, modified):
    """Return what load does; modified: the time the file changed, to load it anew after that."""
    path = sources[choice]
    untrained = choice.endswith(': untrained')
    checkpoint = folio.checkpoint.load(path)
    folio.checkpoint.refuse_other_code(checkpoint, GPT)
    with turn, torch.random.fork_rng(devices=[]):
        if untrained:
            # Drawn as train.py draws them, so these are the very weights that the run began with
            torch.manual_seed(checkpoint.get('config', {}).get('seed', 1337))
            model = GPT(GPTConfig(**checkpoint['model_args']))
        else:
            model = folio.checkpoint.build(GPT, checkpoint)
    n_parameters = sum(p.numel() for p in model.parameters())
    facts = f'{n_parameters / 1e6:,.2f} M parameters'
    if 'iter_num' in checkpoint:
        step = 0 if untrained else checkpoint['iter_num']
        facts += f', step {step:,}'
    tokenizer = folio.checkpoint.tokenizer_of(checkpoint)
    return model.to(machine.device, machine.torch_dtype).eval(), tokenizer, facts


def as_spans(tokenizer, steps):
    """Yield a token's HTML at each step, until the document ends.

    It is '' while a character isn't whole: one of several tokens comes with the last of them, and
    has the product of their probabilities. steps: those of engine.generate_with_logits.
    """
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    p = 1.0
    for token, logits_BV in steps:
        if token.item() == tokenizer.eot:
            return
        p *= logits_BV[0].softmax(dim=-1)[token].item()
        piece = decoder.decode(tokenizer.decode_bytes(token.tolist()))
        if not piece:
            yield ''
            continue
        # STYLE colours it by its probability p
        yield f'<span title="{p:.2%}" style="--p: {p:.3f}">{html.escape(piece)}</span>'
        p = 1.0


def take(items, seconds):
    """Return (what an iterator yields within that time, a list; whether it has ended)."""
    end = time.perf_counter() + seconds
    taken = []
    for item in items:
        taken.append(item)
        if time.perf_counter() >= end:
            return taken, False
    return taken, True


def write(choice, prompt, seed, max_new_tokens, *sampling):
    """Yield [line about a text, the text so far], both HTML, after every few tokens.

    sampling: strategy, temperature, top_k and top_p. What goes wrong becomes the line: a page has
    no other place for it.
    """
    text = f'<span style="opacity: 0.55">{html.escape(prompt)}</span>'
    continuation = ''
    yield ['one moment' + GOING_ON, text]
    try:
        steps = continue_prompt(choice, prompt, seed, max_new_tokens, *sampling)
        for line, continuation in steps:
            yield [line, text + continuation]
    except (UserError, OSError, torch.OutOfMemoryError) as e:
        yield [f'<b>notice: {html.escape(str(e))}</b>', text + continuation]


def continue_prompt(choice, prompt, seed, max_new_tokens, strategy, temperature, top_k, top_p):
    """Yield (line about a continuation, the continuation so far), both HTML. Raise UserError."""
    model, tokenizer, facts = load(choice)
    ids = tokenizer.encode(prompt) or [tokenizer.start]
    limit = model.config.block_size
    notice = ''
    if len(ids) > limit:
        notice = f'<b>notice: the model reads the last {limit:,} of {len(ids):,} tokens</b>'
    seed = random.getrandbits(63) if seed is None else seed % 2**63
    steps = engine.generate_with_logits(
        model, torch.tensor([ids]), int(max_new_tokens), strategy=strategy, temperature=temperature,
        top_k=int(top_k), top_p=top_p, seed=seed)
    spans = as_spans(tokenizer, steps)

    text = ''
    n_tokens = 0
    seconds = 0.0  # of computing, without waiting for a turn or for the page
    ended = False
    while not ended:
        with turn:
            began = time.perf_counter()
            new_spans, ended = take(spans, TURN_SECONDS)
            seconds += time.perf_counter() - began
        text += ''.join(new_spans)
        n_tokens += len(new_spans)
        state = GOING_ON
        if ended:
            state = ', done' if n_tokens == max_new_tokens else ', and the document ends'
        speed = n_tokens / seconds
        yield f'{facts}: {n_tokens:,} tokens, {speed:,.0f} tokens/s{state} {notice}', text


def write_both(left, right, *settings):
    """Yield what `write` does for both models, in one list, a little of each in turn."""
    shown_left = []
    shown_right = []
    both = itertools.zip_longest(write(left, *settings), write(right, *settings))
    for new_left, new_right in both:
        shown_left = new_left or shown_left  # None once it is done
        shown_right = new_right or shown_right
        yield shown_left + shown_right


# ---- The page ------------------------------------------------------------------------------------
newest = [choice for choice in sources if choice.endswith(': newest')]
if other and not os.path.exists(os.path.join(other, 'ckpt.pt')):
    raise UserError(f'no checkpoint in {other}; --other= takes the folder of a run')
for choice in newest:
    load(choice)  # raises UserError here for a checkpoint that is missing or damaged

# Gradio calls its own address, which no proxy knows, and would report to its makers
for name in ('NO_PROXY', 'no_proxy'):
    os.environ[name] = os.environ.get(name, '') + ',127.0.0.1'
os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
os.environ['GRADIO_RUN_HISTORY'] = 'False'
try:
    import gradio as gr
except ImportError:
    raise UserError('the page needs gradio: pip install gradio') from None

STYLE = """<style>
.prose.text {white-space: break-spaces; overflow-wrap: anywhere; font: 15px/1.6 var(--font-mono)}
[data-coloured=true] [title] {color: #111;
        background: color-mix(in oklab, #9ecae1 calc(var(--p) * 100%), #fdae6b)}
#scale {color: #111; background: linear-gradient(to right in oklab, #fdae6b, #9ecae1);
        display: inline-block; white-space: nowrap; padding: 4px 12px}
</style><span id="scale">improbable … certain</span>"""

# What the two panes show at first: both runs, or the one run trained and untrained
choices = list(sources)
second = newest[-1] if other else choices[-2]  # the last is OpenAI's

with gr.Blocks(title='folio') as page:
    gr.Markdown('## folio: one prompt, two models')
    prompt = gr.Textbox(label='prompt', placeholder='empty: the beginning of a document', lines=3)
    with gr.Row():
        seed = gr.Number(1337, precision=0, label='seed', placeholder='any')
        max_new_tokens = gr.Slider(1, 2000, 300, step=1, label='max_new_tokens')
        strategy = gr.Radio(['greedy', 'sample', 'top_k', 'nucleus'], value='top_k',
                            label='strategy', scale=2)
    with gr.Row():
        temperature = gr.Slider(0, 2, 0.8, step=0.05, label='temperature')
        top_k = gr.Slider(1, 500, 200, step=1, label='top_k')
        top_p = gr.Slider(0.01, 1, 0.9, step=0.01, label='top_p, of nucleus')
    with gr.Row():
        go = gr.Button('Write', variant='primary')
        stop = gr.Button('Stop')
        coloured = gr.Checkbox(label='colour tokens by probability')
        gr.HTML(STYLE)
    models = []
    panes = []  # about and text of the left, about and text of the right
    with gr.Row(elem_id='panes'):
        for choice in (newest[0], second):
            with gr.Column():
                models.append(gr.Dropdown(choices, value=choice, label='model'))
                panes.append(gr.HTML(elem_classes='about'))
                panes.append(gr.HTML(elem_classes='text'))

    settings = [prompt, seed, max_new_tokens, strategy, temperature, top_k, top_p]
    writing = go.click(write_both, inputs=models + settings, outputs=panes,
                       show_progress='hidden', concurrency_limit=8)  # windows that write at once
    abouts = panes[::2]
    stopping = stop.click(None, cancels=writing)
    stopping.then(lambda *lines: [line.replace(GOING_ON, ', stopped') for line in lines],
                  inputs=abouts, outputs=abouts)
    # In the browser alone: the page's style does the rest
    coloured.change(None, inputs=coloured,
                    js="on => {document.querySelector('#panes').dataset.coloured = on}")

if share:
    print('warning: whoever has the public address can now use these models on this machine, and '
          "what is typed and written passes through Gradio's servers; Ctrl-C ends it",
          file=sys.stderr, flush=True)
print(f'http://127.0.0.1:{port}, for this machine alone; Ctrl-C ends it', flush=True)
page.launch(server_name='127.0.0.1', server_port=port, share=share, quiet=not share)
