"""Drive the page of app.py in a real Chromium without a window, as a user would."""
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
    return GPT.from_pretrained(checkpoint), folio.tokenizer.load(checkpoint['tokenizer'])


@pytest.fixture(scope='module')
def runs(book_once, tmp_path_factory):
    """Return a folder with two runs: out/chars, tiny but trained, and out/bytes, untrained.

    The tokens of out/bytes are bytes.
    """
    pytest.importorskip('gradio')
    folder = tmp_path_factory.mktemp('app') / 'work'
    shutil.copytree(book_once, folder)
    run('train.py', *TINY, '--out_dir=out/chars', '--max_iters=60', cwd=folder)

    # It is large enough that writing takes some time, and it never ends a document: after the last
    # norm channel 0 is 10, and only the end of text looks at that channel, with a weight of -10
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=257, n_layer=4, n_head=4, n_embd=128,
                          bias=True))
    with torch.no_grad():
        model.transformer.wte.weight[:, 0] = 0
        model.transformer.wte.weight[256] = -10 * torch.eye(128)[0]
        model.transformer.ln_f.weight[0] = 0
        model.transformer.ln_f.bias[0] = 10
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
               '--other=out/bytes', '--device=cpu', f'--port={port}']
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
        assert 'Traceback' not in (runs / 'app.log').read_text()
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope='module')
def chromium():
    """Yield a browser without a window, or skip, saying what is missing."""
    webdriver = pytest.importorskip('selenium.webdriver')
    names = ('chromium', 'chromium-browser', 'google-chrome')
    browser = next((path for path in map(shutil.which, names) if path), None)
    driver = shutil.which('chromedriver')
    if not browser or not driver:
        pytest.skip('needs chromium and chromedriver, as in: '
                    'apt-get install chromium chromium-driver')
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ('--headless', '--no-sandbox', '--disable-dev-shm-usage',
                     '--window-size=1400,1000'):
        options.add_argument(argument)
    options.set_capability('goog:loggingPrefs', {'performance': 'ALL'})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


class Window:
    """A window of the browser, with a fresh page in it."""

    def __init__(self, chrome, address):
        self.chrome = chrome
        chrome.switch_to.new_window('tab')
        self.handle = chrome.current_window_handle
        chrome.get(address)
        until(lambda: len(self.all('.prose.about')) == 2 and self.all('textarea'),
              'the page is there')

    def all(self, selector):
        """Return the elements that a CSS selector finds."""
        self.chrome.switch_to.window(self.handle)
        return self.chrome.find_elements('css selector', selector)

    def contents(self, selector):
        """Return the text of each, white space included, as it is in the page."""
        self.chrome.switch_to.window(self.handle)
        return self.chrome.execute_script(
            'return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)', selector)

    def texts(self):
        return self.contents('.prose.text')

    def about(self):
        return self.contents('.prose.about')

    def type(self, label, value):
        """Type into the field with that label; by script, as the driver cannot type an emoji."""
        number = f'//input[@aria-label="number input for {label}"]'
        field = '*[self::input[@type!="radio"] or self::textarea]'
        labelled = f'//label[.//span[normalize-space()="{label}"]]//{field}'
        self.chrome.switch_to.window(self.handle)
        self.chrome.execute_script("""
            arguments[0].value = arguments[1]
            for (const event of ['input', 'change', 'blur'])
                arguments[0].dispatchEvent(new Event(event))""",
            self.chrome.find_element('xpath', f'{number} | {labelled}'), value)

    def press(self, text):
        """Click the button, or the label of a choice, that says this."""
        self.chrome.switch_to.window(self.handle)
        button = f'//*[(self::button or self::label) and normalize-space()="{text}"]'
        self.chrome.find_element('xpath', button).click()

    def choose(self, side, choice):
        """Choose a model for pane 0 or 1."""
        def options():
            return [o for o in self.all('[role=option]') if o.text.strip().endswith(choice)]

        field = self.all('input[role=combobox]')[side]
        field.click()
        until(options, f'{choice} is offered')[0].click()
        until(lambda: field.get_attribute('value') == choice, f'{choice} is chosen')

    def start(self):
        """Press Write, and wait until the page has heard it."""
        before = self.about()
        self.press('Write')
        until(lambda: self.about() != before, 'it has begun')

    def are_done(self):
        # The notice of a prompt that was cut is no end, any other is
        end = 'done|ends|notice: (?!the model reads)'
        return all(re.search(end, about) for about in self.about())

    def finish(self):
        """Wait until both panes are done, and return their texts."""
        until(self.are_done, 'both are done')
        return self.texts()

    def write(self, prompt, **fields):
        """Fill in the fields, press Write, and return both texts when they are done."""
        self.chrome.switch_to.window(self.handle)
        self.type('prompt', prompt)
        for label, value in fields.items():
            self.type(label, value)
        self.start()
        return self.finish()


@pytest.fixture
def window(chromium, address):
    return Window(chromium, address)


# ---- Claims --------------------------------------------------------------------------------------
def test_both_panes_stream(window):
    window.type('prompt', 'The ')
    window.type('max_new_tokens', 1500)
    window.start()
    lengths = []  # of both texts, again and again

    def seen_to_the_end():
        lengths.append([len(text) for text in window.texts()])
        return window.are_done()

    until(seen_to_the_end, 'both are done')
    for side in zip(*lengths):
        assert list(side) == sorted(side)
        assert len({length for length in side if length > len('The ')}) > 3
    assert all(re.search(r'1,500 tokens, [\d,]+ tokens/s, done', about) for about in window.about())


def test_a_text_is_what_the_model_generates(window, runs):
    model, tokenizer = load_chars(runs)
    steps = engine.generate(model, torch.tensor([tokenizer.encode('The ')]), 100, strategy='sample',
                            temperature=0.5, seed=7)
    expected = 'The ' + tokenizer.decode([token.item() for token in steps])
    window.press('sample')
    assert window.write('The ', max_new_tokens=100, temperature=0.5, seed=7)[0] == expected


def test_strategies_change_the_text_and_the_same_seed_repeats_it(window):
    texts = {}
    for strategy in ('greedy', 'sample', 'top_k', 'nucleus'):
        window.press(strategy)
        texts[strategy] = window.write('The ', max_new_tokens=40, temperature=1, top_k=3, seed=1)
    assert len({left for left, _ in texts.values()}) == 4
    assert window.write('The ', seed=2)[0] != texts['nucleus'][0]
    assert window.write('The ', seed=1) == texts['nucleus']


def test_an_emoji_is_kept_whole_or_told_to_be_unknown(window):
    """The characters of out/chars have none; to out/bytes it is four tokens."""
    left, right = window.write('so 👩‍👩‍👧 <b>{{value}}', max_new_tokens=30)
    assert left == 'so 👩‍👩‍👧 <b>{{value}}'
    assert right.startswith(left) and len(right) > len(left)
    assert 'never saw' in window.about()[0]
    assert '30 tokens' in window.about()[1]


def test_an_empty_prompt_begins_a_document(window, runs):
    model, tokenizer = load_chars(runs)
    window.press('greedy')
    left, _ = window.write('', max_new_tokens=20)
    steps = engine.generate(model, torch.tensor([[tokenizer.start]]), 20, strategy='greedy')
    assert left == tokenizer.decode([token.item() for token in steps])


def test_an_over_long_prompt_is_cut_with_a_notice(window, runs):
    window.press('greedy')
    left, _ = window.write('The ' * 50, max_new_tokens=20)
    assert left.startswith('The ' * 50) and len(left) == 220
    assert 'notice: the model reads the last 32 of 200 tokens' in window.about()[0]
    of_those_32, _ = window.write(('The ' * 50)[-32:])
    assert of_those_32[32:] == left[200:]
    assert 'notice' not in window.about()[0]


def test_two_windows_write_at_once(window, chromium, address):
    alone = window.write('The ', max_new_tokens=1000, seed=3)
    windows = [Window(chromium, address), Window(chromium, address)]
    for w in windows:
        w.type('prompt', 'The ')
        w.type('max_new_tokens', 1000)
        w.type('seed', 3)
    windows[0].start()
    windows[1].start()
    until(lambda: all(len(w.texts()[0]) > 4 for w in windows), 'both have text')
    assert not windows[0].are_done()  # so they did write at once
    assert [w.finish() for w in windows] == [alone, alone]


def test_stop_ends_it_early(window):
    window.type('max_new_tokens', 2000)
    window.start()
    until(lambda: all(len(text) > 0 for text in window.texts()), 'both have text')
    window.press('Stop')
    until(lambda: all('stopped' in about for about in window.about()), 'it says so')
    stopped = window.texts()
    assert all(len(text) < 2000 for text in stopped)
    time.sleep(1)
    assert window.texts() == stopped


def test_each_token_is_coloured_by_its_probability(window, runs):
    model, tokenizer = load_chars(runs)
    model.eval()
    left, _ = window.write('The ', max_new_tokens=20)
    ids = tokenizer.encode(left)
    logits_BTV, _ = model(torch.tensor([ids]), all_logits=True)
    p = logits_BTV[0].softmax(dim=-1)[range(3, 23), ids[4:]].tolist()
    tokens = window.all('.prose.text')[0].find_elements('css selector', '[title]')
    shown = [float(token.get_attribute('title').rstrip('%')) / 100 for token in tokens]
    assert shown == pytest.approx(p, abs=1e-4)

    def colours():
        return [token.value_of_css_property('background-color') for token in tokens]

    assert len(set(colours())) == 1  # none, until asked for
    window.press('colour tokens by probability')
    until(lambda: len(set(colours())) > 1, 'the tokens have colours')
    likeliest = shown.index(max(shown))
    least_likely = shown.index(min(shown))
    assert colours()[likeliest] != colours()[least_likely]


def test_untrained_is_what_training_began_with(window, runs):
    # One step, of no size: what it saves are the weights that training began with
    run('train.py', *TINY, '--out_dir=out/began', '--max_iters=1', '--eval_interval=1',
        '--decay_lr=False', '--learning_rate=1e-30', '--min_lr=0.0',
        '--always_save_checkpoint=True', cwd=runs)
    checkpoint = folio.checkpoint.load(str(runs / 'out' / 'began' / 'ckpt.pt'))
    model = GPT.from_pretrained(checkpoint)
    tokenizer = folio.tokenizer.load(checkpoint['tokenizer'])
    steps = engine.generate(model, torch.tensor([tokenizer.encode('The ')]), 50,
                            strategy='greedy')
    expected = 'The ' + tokenizer.decode([token.item() for token in steps])

    window.choose(0, 'out/chars: untrained')
    window.press('greedy')
    left, _ = window.write('The ', max_new_tokens=50)
    assert left == expected
    assert 'step 0' in window.about()[0]


def test_a_model_that_cannot_be_downloaded_is_a_notice(window):
    window.choose(1, "gpt2: OpenAI's")
    left, right = window.write('The ', max_new_tokens=20)
    assert len(left) == 24 and right == 'The '
    assert window.about()[1].startswith('notice: could not download gpt2')


def test_nothing_is_asked_of_other_servers(window, chromium, address):
    window.write('The ', max_new_tokens=20)
    messages = '\n'.join(entry['message'] for entry in chromium.get_log('performance'))
    request = r'"Network.requestWillBeSent".*?"request":\{.*?"url":"(https?://[^"]*)"'
    asked = re.findall(request, messages)
    assert asked and all(url.startswith(address) for url in asked)


@pytest.mark.parametrize('args, message', [
    (['--out_dir=out/nowhere'], 'no checkpoint'),
    (['--out_dir=out/chars', '--other=out/nowhere'], '--other= takes'),
    (['--out_dir=out/chars', '--port=99999'], 'port 99999 cannot be used'),
    (['--outdir=out'], 'did you mean out_dir')])
def test_a_mistake_is_one_line(runs, args, message):
    _, err = run('extras/app.py', '--device=cpu', *args, cwd=runs, status=2)
    assert message in err and err.count('\n') == 1


def test_a_port_that_is_taken_is_named(runs):
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
        _, err = run('extras/app.py', '--device=cpu', '--out_dir=out/chars', f'--port={port}',
                     cwd=runs, status=2)
    assert f'port {port} cannot be used' in err and err.count('\n') == 1


@pytest.mark.parametrize('args, shared', [([], False), (['--share=True'], True)])
def test_sharing_is_asked_for_and_warned_of(runs, tmp_path, args, shared):
    """A stand-in for gradio only prints how it is launched, so that no test opens this machine."""
    (tmp_path / 'gradio.py').write_text("""
import sys, unittest.mock
sys.modules['gradio'] = gradio = unittest.mock.MagicMock()
page = gradio.Blocks.return_value.__enter__.return_value
page.launch = lambda server_name, share, **options: print(server_name, share)
""")
    out, err = run('extras/app.py', '--out_dir=out/chars', '--device=cpu', *args, cwd=runs,
                   env={**os.environ, 'PYTHONPATH': str(tmp_path)})
    assert f'127.0.0.1 {shared}' in out
    assert ('warning: whoever has the public address' in err) == shared


def test_without_gradio_the_command_that_mends_it_is_said(runs, tmp_path):
    (tmp_path / 'gradio.py').write_text('raise ImportError')
    _, err = run('extras/app.py', '--out_dir=out/chars', '--device=cpu', cwd=runs, status=2,
                 env={**os.environ, 'PYTHONPATH': str(tmp_path)})
    assert err == 'error: the page needs gradio: pip install gradio\n'
