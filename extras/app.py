"""
Serve a page to try models on: two side by side continue one prompt, token by token.
    python extras/app.py --out_dir=out/book --other=out/book_nanogpt

It prints the page's address, which this machine alone can reach unless --share=True. On the page,
choose a run's newest model, its best, its untrained one, or OpenAI's GPT-2, which is downloaded.
The redder a token, the less the model expected it: by its own probability, before temperature and
strategy.

Needs model.py, folio/ and gradio.
"""
import codecs
import functools
import itertools
import os
import sys
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
dtype = 'auto'  # float32, bfloat16, float16; auto: bfloat16 where that is fast
configure(globals(), strict=False)
machine = Machine(device, dtype)
# Gradio calls its own address, which no proxy knows; and it would send usage data to its makers
for name in ('NO_PROXY', 'no_proxy'):
    os.environ[name] = os.environ.get(name, '') + ',127.0.0.1'
os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
os.environ['GRADIO_RUN_HISTORY'] = 'False'
try:
    import gradio as gr
except ImportError:
    raise UserError('the page needs gradio: pip install gradio') from None

# ---- Models --------------------------------------------------------------------------------------
sources = {}  # {choice in the menu: checkpoint}
for run in (out_dir, other):
    if run:
        sources[f'{run}: newest'] = os.path.join(run, 'ckpt.pt')
        sources[f'{run}: untrained'] = os.path.join(run, 'ckpt.pt')
    if run and os.path.exists(os.path.join(run, 'best.pt')):
        sources[f'{run}: best'] = os.path.join(run, 'best.pt')
sources["gpt2: OpenAI's"] = 'gpt2'


@functools.lru_cache(maxsize=4)
def load(choice):
    """Return (model, its checkpoint without the tensors, facts in a line), as when first chosen."""
    checkpoint = folio.checkpoint.load(sources[choice])
    folio.checkpoint.refuse_other_code(checkpoint, GPT)
    step = checkpoint.get('iter_num')
    if choice.endswith(': untrained'):
        # Drawn as train.py draws them, so these are the very weights that the run began with
        torch.manual_seed(checkpoint.get('config', {}).get('seed', 1337))
        model = GPT(GPTConfig(**checkpoint['model_args']))
        step = 0
    else:
        model = folio.checkpoint.build(GPT, checkpoint)
    n_parameters = sum(p.numel() for p in model.parameters())
    facts = f'{n_parameters / 1e6:,.2f} M parameters'
    if step is not None:
        facts += f', step {step:,}'
    for name in ('model', 'optimizer'):  # large, and not needed again
        checkpoint.pop(name, None)
    return model.to(machine.device, machine.torch_dtype).eval(), checkpoint, facts


# ---- Texts ---------------------------------------------------------------------------------------
def pieces(tokenizer, steps):
    """Yield (text of a token, 1 - its probability) until the document ends.

    The text is '' while a character isn't whole: a character of several tokens comes with the last
    one, and has the product of their probabilities. steps: from engine.generate_with_logits.
    """
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    p = 1.0
    for token, logits_BV in steps:
        if token.item() == tokenizer.eot:
            return
        p *= logits_BV[0].softmax(dim=-1)[token].item()
        text = decoder.decode(tokenizer.decode_bytes(token.tolist()))
        yield text, 1 - p
        if text:
            p = 1.0


def write(choice, prompt, max_new_tokens, **options):
    """Yield (line about a text, its pieces so far) after each token.

    options: of engine.generate. An error becomes the line, as the page has no other place for it.
    """
    text = [(prompt, None)]  # without a colour
    yield 'one moment …', text
    try:
        model, checkpoint, facts = load(choice)
        tokenizer = folio.checkpoint.tokenizer_of(checkpoint)
        ids = folio.checkpoint.encode_prompt(checkpoint, tokenizer, prompt)
        limit = model.config.block_size
        if len(ids) > limit:
            facts += f', reads the last {limit:,} of {len(ids):,} tokens'
        new = pieces(tokenizer, engine.generate_with_logits(model, torch.tensor([ids]),
                                                            max_new_tokens, **options))
        line = facts
        seconds = 0.0  # of computing, without the other model and the page
        for n_tokens in itertools.count(1):
            start = time.perf_counter()
            piece = next(new, None)
            seconds += time.perf_counter() - start
            if piece is None:
                break
            text.append(piece)
            line = f'{facts}: {n_tokens:,} tokens, {n_tokens / seconds:,.0f} tokens/s'
            yield f'{line} …', text
        yield f'{line}, done', text
    except (UserError, OSError) as e:
        yield f'notice: {e}', text


def write_both(left, right, prompt, max_new_tokens, strategy, temperature, top_k, top_p, seed):
    """Yield what `write` yields for both models, in one list, four times a second."""
    options = {'strategy': strategy, 'temperature': temperature, 'top_k': top_k, 'top_p': top_p,
               'seed': seed}
    left_panes = [None, None]
    right_panes = [None, None]
    last = 0.0
    both = (write(choice, prompt, max_new_tokens, **options) for choice in (left, right))
    for new_left, new_right in itertools.zip_longest(*both):
        if new_left is not None:  # None once it is done
            left_panes = new_left
        if new_right is not None:
            right_panes = new_right
        if time.perf_counter() > last + 0.25:  # the page takes longer to show a text than to get it
            last = time.perf_counter()
            yield [*left_panes, *right_panes]
    yield [*left_panes, *right_panes]


# ---- The page ------------------------------------------------------------------------------------
newest = [choice for choice in sources if choice.endswith(': newest')]
for choice in newest:
    load(choice)  # raises UserError here for a checkpoint that is missing or damaged

# Gradio draws each highlighted piece as a box with a space behind it. Our pieces are tokens, and
# line ends are among them.
STYLE = """
#panes .textfield {display: block; font: 15px/1.6 var(--font-mono)}
#panes .textfield span {display: inline; margin: 0; padding: 0; border-radius: 0;
        word-spacing: -1ch}
#panes .textfield .text {white-space: pre-wrap; word-spacing: normal}
"""
# What the two panes show at first: both runs, or the one run trained and untrained
second = newest[1] if other else f'{out_dir}: untrained'

with gr.Blocks(title='folio') as page:
    gr.Markdown('## folio: one prompt, two models')
    prompt = gr.Textbox(label='prompt', placeholder='empty: the beginning of a document', lines=3)
    with gr.Row():
        strategy = gr.Radio(engine.STRATEGIES, value='top_k', label='strategy', scale=2)
        max_new_tokens = gr.Slider(1, 2000, 300, step=1, label='max_new_tokens')
        seed = gr.Number(1337, precision=0, label='seed')
    with gr.Row():
        temperature = gr.Slider(0, 2, 0.8, step=0.05, label='temperature')
        top_k = gr.Slider(1, 500, 200, step=1, label='top_k')
        top_p = gr.Slider(0.01, 1, 0.9, step=0.01, label='top_p, of nucleus')
    with gr.Row():
        go = gr.Button('Write', variant='primary')
        stop = gr.Button('Stop')
    models = []
    panes = []  # line and text of the left, line and text of the right
    with gr.Row(elem_id='panes'):
        for choice in (newest[0], second):
            with gr.Column():
                models.append(gr.Dropdown(list(sources), value=choice, label='model'))
                panes.append(gr.Textbox(label='about', interactive=False))
                panes.append(gr.HighlightedText(
                    label='the redder a token, the less it was expected'))
    writing = go.click(write_both, outputs=panes, show_progress='hidden', inputs=[
        *models, prompt, max_new_tokens, strategy, temperature, top_k, top_p, seed])
    stop.click(None, cancels=writing)

print(f'http://127.0.0.1:{port} for this machine alone, unless --share=True; Ctrl-C ends it',
      flush=True)
try:
    page.launch(server_name='127.0.0.1', server_port=port, share=share, quiet=not share, css=STYLE)
except OSError:
    raise UserError(f'port {port} is in use: give another --port=') from None
