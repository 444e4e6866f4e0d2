"""The page of app.py: what it writes, asked as its own program would; once in a real browser."""
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch

import folio.checkpoint
import folio.tokenizer
from conftest import ROOT, TINY, run
from folio import engine
from model import GPT, GPTConfig

PATIENCE = 60  # seconds that a condition may take, on a slow machine


def until(condition, what):
    """Wait until a condition returns something true, and return that."""
    end = time.monotonic() + PATIENCE
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < end, f'{PATIENCE} seconds and still not: {what}'
        time.sleep(0.02)


def load_chars(runs):
    """Return (model, tokenizer) of the newest checkpoint of out/chars."""
    checkpoint = folio.checkpoint.load(str(runs / 'out' / 'chars' / 'ckpt.pt'))
    model = GPT.from_pretrained(checkpoint).eval()
    return model, folio.tokenizer.load(checkpoint['tokenizer'])


@pytest.fixture(scope='module')
def runs(book_once, tmp_path_factory):
    """Return a folder with two runs: out/chars, tiny but trained, and out/bytes, untrained.

    The tokens of out/bytes are bytes.
    """
    pytest.importorskip('gradio')
    folder = tmp_path_factory.mktemp('app') / 'work'
    shutil.copytree(book_once, folder)
    run('train.py', *TINY, '--out_dir=out/chars', '--max_iters=60', cwd=folder)

    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=257, n_layer=4, n_head=4, n_embd=128))
    (folder / 'out' / 'bytes').mkdir()
    folio.checkpoint.save(str(folder / 'out' / 'bytes' / 'ckpt.pt'), {
        'model': model.state_dict(),
        'model_args': vars(model.config),
        'tokenizer': folio.tokenizer.train_bpe([], 257).spec,
    })
    return folder


@pytest.fixture(scope='module')
def address(runs):
    """Serve a page that shows the two runs, and yield its address."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    command = [sys.executable, str(ROOT / 'extras/app.py'), '--out_dir=out/chars',
               '--other=out/bytes', '--device=cpu', '--dtype=float32', f'--port={port}']
    offline = os.environ | {'HF_HUB_OFFLINE': '1', 'HF_HOME': str(runs / 'hub')}
    with open(runs / 'app.log', 'w') as log:
        server = subprocess.Popen(command, cwd=runs, env=offline, stdout=log, stderr=log)

    def is_up():
        assert server.poll() is None, (runs / 'app.log').read_text()
        with socket.socket() as s:
            return s.connect_ex(('127.0.0.1', port)) == 0

    try:
        until(is_up, 'the server is up')
        yield f'http://127.0.0.1:{port}'
        said = (runs / 'app.log').read_text()
        assert 'Traceback' not in said, said
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope='module')
def ask(address):
    """Return a function that has both models write: [(line, [(piece, surprise), …]), …]."""
    from gradio_client import Client
    client = Client(address, verbose=False)

    def ask(prompt, **settings):
        settings = {'max_new_tokens': 20, 'strategy': 'greedy', 'seed': 1} | settings
        line, text, other_line, other_text = client.predict(prompt=prompt, api_name='/write_both',
                                                            **settings)
        return [(line, [tuple(piece.values()) for piece in text]),
                (other_line, [tuple(piece.values()) for piece in other_text])]
    return ask


def joined(text):
    return ''.join(piece for piece, _ in text)


# ---- What it writes ------------------------------------------------------------------------------
def test_the_page_shows_the_models_text_and_probabilities(ask, runs):
    model, tokenizer = load_chars(runs)
    ids = tokenizer.encode('The ')
    steps = engine.generate(model, torch.tensor([ids]), 25, strategy='sample', temperature=0.5,
                            seed=7)
    ids += [token.item() for token in steps]
    (line, text), _ = ask('The ', max_new_tokens=25, strategy='sample', temperature=0.5, seed=7)
    assert joined(text) == tokenizer.decode(ids)
    assert re.search(r'step 60: 25 tokens, [\d,]+ tokens/s, done', line)
    logits_BTV, _ = model(torch.tensor([ids]), all_logits=True)
    p = logits_BTV[0].softmax(dim=-1)[range(3, 28), ids[4:]].tolist()
    assert text[0] == ('The ', None)
    assert [1 - surprise for _, surprise in text[1:]] == pytest.approx(p, abs=1e-4)


def test_an_emoji_is_kept_whole_or_told_to_be_unknown(ask):
    """The characters of out/chars have none; to out/bytes it is four tokens."""
    (line, text), (_, other_text) = ask('so 👩‍👩‍👧 <b>')
    assert 'never saw' in line and joined(text) == 'so 👩‍👩‍👧 <b>'
    assert joined(other_text).startswith('so 👩‍👩‍👧 <b>') and len(other_text) == 21


def test_an_empty_prompt_begins_a_document(ask, runs):
    model, tokenizer = load_chars(runs)
    steps = engine.generate(model, torch.tensor([[tokenizer.start]]), 20, strategy='greedy')
    expected = tokenizer.decode([token.item() for token in steps])
    assert joined(ask('')[0][1]) == expected


def test_an_over_long_prompt_is_cut_and_the_page_says_so(ask):
    (line, text), _ = ask('The ' * 50)
    assert 'reads the last 32 of 200 tokens' in line
    assert text[1:] == ask(('The ' * 50)[-32:])[0][1][1:]


def test_untrained_is_what_training_began_with(ask, runs):
    # One step, of no size: what it saves are the weights that training began with
    run('train.py', *TINY, '--out_dir=out/began', '--max_iters=1', '--eval_interval=1',
        '--decay_lr=False', '--learning_rate=1e-30', '--min_lr=0.0',
        '--always_save_checkpoint=True', cwd=runs)
    checkpoint = folio.checkpoint.load(str(runs / 'out' / 'began' / 'ckpt.pt'))
    tokenizer = folio.tokenizer.load(checkpoint['tokenizer'])
    ids = tokenizer.encode('The ')
    steps = engine.generate(GPT.from_pretrained(checkpoint), torch.tensor([ids]), 20,
                            strategy='greedy')
    (line, text), _ = ask('The ', left='out/chars: untrained')
    assert joined(text) == 'The ' + tokenizer.decode([token.item() for token in steps])
    assert 'step 0' in line


def test_a_model_that_cannot_be_downloaded_is_a_notice(ask):
    (_, text), (line, other_text) = ask('The ', right="gpt2: OpenAI's")
    assert len(text) == 21 and joined(other_text) == 'The '
    assert line.startswith('notice: could not download gpt2')


# ---- In a browser --------------------------------------------------------------------------------
@pytest.fixture
def chromium():
    """Yield a browser without a window, or skip, saying what is missing."""
    webdriver = pytest.importorskip('selenium.webdriver')
    browser = shutil.which('chromium')
    driver = shutil.which('chromedriver')
    if not browser or not driver:
        pytest.skip('needs chromium and chromedriver, as in: '
                    'apt-get install chromium chromium-driver')
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ('--headless', '--no-sandbox', '--disable-dev-shm-usage'):
        options.add_argument(argument)
    options.set_capability('goog:loggingPrefs', {'performance': 'ALL'})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def test_a_click_writes_until_stop_and_asks_this_server_alone(chromium, address):
    def texts():
        return chromium.execute_script("""
            return [...document.querySelectorAll('.textfield')].map(
                field => [...field.querySelectorAll('.text')].map(e => e.textContent).join(''))""")

    def press(button):
        chromium.find_element('xpath', f'//button[normalize-space()="{button}"]').click()

    chromium.get(address)
    until(lambda: chromium.find_elements('css selector', 'textarea'), 'the page is there')
    chromium.find_element('css selector', 'textarea').send_keys('The ')
    chromium.execute_script("""
        arguments[0].value = 2000
        arguments[0].dispatchEvent(new Event('input'))""",
        chromium.find_element('css selector', '[aria-label="number input for max_new_tokens"]'))
    press('Write')
    until(lambda: len(texts()) == 2 and min(map(len, texts())) > len('The '), 'both have text')
    seen = texts()[0]
    until(lambda: len(texts()[0]) > len(seen), 'the left one grows')
    press('Stop')
    until(lambda: texts() == (time.sleep(1), texts())[1], 'they stop')
    assert texts()[0].startswith(seen)
    lines = chromium.execute_script("""
        return [...document.querySelectorAll('#panes input, #panes textarea')].map(e => e.value)""")
    assert [line for line in lines if 'tokens/s' in line][0].endswith('tokens/s …')  # not done

    messages = '\n'.join(entry['message'] for entry in chromium.get_log('performance'))
    request = r'"Network.requestWillBeSent".*?"request":\{.*?"url":"(https?://[^"]*)"'
    asked = re.findall(request, messages)
    assert asked and all(url.startswith(address) for url in asked)


# ---- Mistakes ------------------------------------------------------------------------------------
@pytest.mark.parametrize('args, message', [
    (['--out_dir=out/nowhere'], 'no checkpoint'),
    (['--out_dir=out/chars', '--other=out/nowhere'], 'no checkpoint out/nowhere'),
    (['--outdir=out'], 'did you mean out_dir')])
def test_a_mistake_is_one_line(runs, args, message):
    _, err = run('extras/app.py', '--device=cpu', *args, cwd=runs, status=2)
    assert message in err and err.count('\n') == 1


def test_a_run_of_other_model_code_is_refused_by_name(runs):
    checkpoint = folio.checkpoint.load(str(runs / 'out' / 'chars' / 'ckpt.pt'))
    (runs / 'out' / 'edited').mkdir()
    folio.checkpoint.save(str(runs / 'out' / 'edited' / 'ckpt.pt'),
                          checkpoint | {'record': {'model': 'another'}})
    _, err = run('extras/app.py', '--device=cpu', '--out_dir=out/chars', '--other=out/edited',
                 cwd=runs, status=2)
    assert err.startswith('error: not measured: out/edited/ckpt.pt was trained with code')
    assert err.count('\n') == 1
