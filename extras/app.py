"""
A page to try models on: two side by side, one prompt, tokens shown as they are drawn, coloured by probability.
    python app.py --out_dir=out/book --other=out/pride

Served to this machine alone, unless --share=True. Shows a run's newest model, its best, itself untrained, and OpenAI's
GPT-2, which it downloads. Probabilities are the model's own, before temperature and strategy. The book's model writes
307 tokens/s on two cores of an AMD EPYC (torch 2.13, 2026-11-21).
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

import torch

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the root
import folio.checkpoint
from folio import engine
from folio import fast
from folio.configurator import UserError, configure
from folio.data import tokenizer_of
from folio.machine import Machine, default_device
from model import GPT, GPTConfig

# ---- Settings --------------------------------------------------------------------------------------------------------
out_dir = 'out'  # of the run to show
other = ''  # of another run, to compare with
port = 7860  # of this machine
share = False  # True: also at a public address, for everyone who has it
device = default_device()  # cpu, cuda, cuda:1, mps …
dtype = 'auto'  # float32, bfloat16 or float16; auto: bfloat16 where a GPU has it, float16 on other GPUs
configure(globals())
try:
    socket.create_server(('127.0.0.1', port)).close()
except (OSError, OverflowError) as e:
    raise UserError(f'port {port} cannot be used ({e}); give another, as in --port=7861') from None
machine = Machine(device, dtype)

# ---- Models ----------------------------------------------------------------------------------------------------------
files = {'newest': 'ckpt.pt', 'best': 'best.pt', 'untrained': 'ckpt.pt'}
sources = {f'{run}: {kind}': os.path.join(run, file) for run in (out_dir, other) if run for kind, file in files.items()}
sources = {choice: path for choice, path in sources.items() if os.path.exists(path) or choice.endswith(': newest')}
sources["gpt2: OpenAI's"] = 'gpt2'
turn = threading.Lock()  # one model computes at a time: tokens/s is then its own, and so is torch's random state


def load(choice):
    """(model, tokenizer, what to say of it) as of now: the newest of a run that goes on changes."""
    return load_once(choice, os.path.exists(sources[choice]) and os.path.getmtime(sources[choice]))


@functools.lru_cache(maxsize=4)
def load_once(choice, modified):
    path, untrained = sources[choice], choice.endswith(': untrained')
    checkpoint = folio.checkpoint.load(path)
    with turn, torch.random.fork_rng(devices=[]):
        torch.manual_seed(checkpoint.get('config', {}).get('seed', 1337))  # as train.py begins
        model = GPT(GPTConfig(**checkpoint['model_args'])) if untrained else GPT.from_pretrained(checkpoint)
        model = fast.accelerate(model)
    about = f'{sum(p.numel() for p in model.parameters()) / 1e6:,.2f} M parameters'
    about += f', step {0 if untrained else checkpoint["iter_num"]:,}' if 'iter_num' in checkpoint else ''
    return model.to(machine.device).eval(), tokenizer_of(checkpoint), about


def write(choice, prompt, seed, max_new_tokens, strategy, temperature, top_k, top_p):
    """[what to say of a text, the text], both HTML, again with every few tokens."""
    text = f'<span style="opacity: 0.55">{html.escape(prompt)}</span>'
    yield ['one moment …', text]
    try:
        model, tokenizer, about = load(choice)
        ids, limit = tokenizer.encode(prompt) or [tokenizer.start], model.config.block_size
        notice = f'<b>notice: the model reads the last {limit:,} of {len(ids):,} tokens</b>' if len(ids) > limit else ''
        steps = engine.generate_with_logits(
            model, [ids[-limit:]], int(max_new_tokens), strategy=strategy, temperature=temperature, top_k=int(top_k),
            top_p=top_p, seed=random.getrandbits(63) if seed is None else seed % 2**63)
        decoder = codecs.getincrementaldecoder('utf-8')('replace')  # tokens split characters
        n, p, seconds, end = 0, 1.0, 0.0, ' …'
        while end == ' …':
            with turn, machine.autocast:
                began = time.perf_counter()
                while time.perf_counter() < began + 0.04:  # so often a page needs another picture
                    token, logits_BV = next(steps, (None, None))
                    if token is None or token.item() == tokenizer.eot:
                        end = ', done' if token is None else ', and the document ends'
                        break
                    n, p = n + 1, p * logits_BV[0].float().softmax(dim=-1)[token].item()
                    if piece := decoder.decode(tokenizer.decode_bytes(token.tolist())):
                        text += f'<span title="{p:.2%}" style="--p: {p:.3f}">{html.escape(piece)}</span>'
                        p = 1.0  # a character of several tokens has the product of theirs
                seconds += time.perf_counter() - began
            yield [f'{about}: {n:,} tokens, {n / seconds:,.0f} tokens/s{end} {notice}', text]
    except (UserError, OSError, torch.OutOfMemoryError) as e:
        yield [f'<b>notice: {html.escape(str(e))}</b>', text]


def write_both(left, right, *settings):
    """What both models write, as `write` gives it, a little of each in turn."""
    shown = [[], []]
    for news in itertools.zip_longest(write(left, *settings), write(right, *settings)):
        shown = [new or old for new, old in zip(news, shown)]
        yield shown[0] + shown[1]


# ---- The page --------------------------------------------------------------------------------------------------------
newest = [choice for choice in sources if choice.endswith(': newest')]
if other and not os.path.exists(os.path.join(other, 'ckpt.pt')):
    raise UserError(f'no checkpoint in {other}; --other= takes the folder of a run')
for choice in newest:
    load(choice)  # what is wrong with it is said here
for name in ('NO_PROXY', 'no_proxy'):  # gradio calls itself
    os.environ[name] = os.environ.get(name, '') + ',127.0.0.1'
os.environ |= {'GRADIO_ANALYTICS_ENABLED': 'False', 'GRADIO_RUN_HISTORY': 'False'}  # it would report to its makers
try:
    import gradio as gr
except ImportError:
    raise UserError('the page needs gradio: pip install gradio') from None

STYLE = """<style>
.prose.text {white-space: break-spaces; overflow-wrap: anywhere; font: 15px/1.6 var(--font-mono)}
[data-coloured=true] [title] {color: #111; background: color-mix(in oklab, #9ecae1 calc(var(--p) * 100%), #fdae6b)}
#scale {color: #111; background: linear-gradient(to right in oklab, #fdae6b, #9ecae1);
        display: inline-block; white-space: nowrap; padding: 4px 12px}
</style><span id="scale">improbable … certain</span>"""
with gr.Blocks(title='folio') as page:
    gr.Markdown('## folio: one prompt, two models')
    settings = [gr.Textbox(label='prompt', placeholder='empty: the beginning of a document', lines=3)]
    with gr.Row():
        settings += [gr.Number(1337, precision=0, label='seed', placeholder='any'),
                     gr.Slider(1, 2000, 300, step=1, label='max_new_tokens'),
                     gr.Radio(['greedy', 'sample', 'top_k', 'nucleus'], value='top_k', label='strategy', scale=2)]
    with gr.Row():
        settings += [gr.Slider(0, 2, 0.8, step=0.05, label='temperature'),
                     gr.Slider(1, 500, 200, step=1, label='top_k'),
                     gr.Slider(0.01, 1, 0.9, step=0.01, label='top_p, of nucleus')]
    with gr.Row():
        go, stop = gr.Button('Write', variant='primary'), gr.Button('Stop')
        coloured = gr.Checkbox(label='colour tokens by probability')
        gr.HTML(STYLE)
    models, panes = [], []
    with gr.Row(elem_id='panes'):
        for choice in (newest[0], newest[-1] if other else list(sources)[-2]):
            with gr.Column():
                models.append(gr.Dropdown(list(sources), value=choice, label='model'))
                panes += [gr.HTML(elem_classes='about'), gr.HTML(elem_classes='text')]
    event = go.click(write_both, models + settings, panes, show_progress='hidden', concurrency_limit=8)
    stop.click(None, cancels=event).then(lambda *said: [s.replace(' …', ', stopped') for s in said],
                                         panes[::2], panes[::2])
    coloured.change(None, coloured, js="on => {document.querySelector('#panes').dataset.coloured = on}")
if share:
    print('warning: whoever has the public address can now use these models on this machine, and what is typed and '
          "written passes through Gradio's servers; Ctrl-C ends it", file=sys.stderr, flush=True)
print(f'http://127.0.0.1:{port}, for this machine alone; Ctrl-C ends it', flush=True)
page.launch(server_name='127.0.0.1', server_port=port, share=share, quiet=not share)
