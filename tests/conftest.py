"""What the tests share: a way to run the scripts as a user does, small data, small models."""
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import pytest

from forked import Forks

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / 'shared' / 'data'
sys.path.insert(0, str(ROOT))
os.environ.setdefault('OMP_NUM_THREADS', '1')  # tests run side by side, and threads that spin slow each other down
if (SHARED / 'tiktoken').is_dir():
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', str(SHARED / 'tiktoken'))
TINY = ['--dataset=book', '--device=cpu', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32',
        '--batch_size=4', '--gradient_accumulation_steps=1', '--learning_rate=1e-3', '--warmup_iters=2',
        '--lr_decay_iters=30', '--max_iters=30', '--eval_interval=10', '--eval_iters=4', '--log_interval=5',
        '--out_dir=out']


def pytest_collection_modifyitems(items):
    """The notebook first: it takes minutes, in which a second process does the rest."""
    items.sort(key=lambda item: 'from_start_to_end' not in item.name)


def run(script, *args, cwd, status=0, **options):
    """Run a script with this Python in cwd; assert its exit status; return (standard output, standard error)."""
    command = [str(ROOT / script), *map(str, args)]
    if sys.platform == 'linux' and not options:
        with tempfile.TemporaryDirectory() as folder:
            paths = [os.path.join(folder, name) for name in ('out', 'err')]
            code = forks().run(*command[:1], command[1:], str(cwd), *paths, timeout=300)
            out, err = (pathlib.Path(path).read_text(encoding='utf-8') for path in paths)
    else:
        done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, encoding='utf-8',
                              timeout=300, **options)
        code, out, err = done.returncode, done.stdout, done.stderr
    if "GPT-2's tokenizer could not be downloaded" in err:
        need_gpt2()
    assert code == status, f'status {code}, not {status}\n{out}\n{err}'
    return out, err


@functools.cache
def gpt2_can_be_had():
    from folio import tokenizer
    try:
        return bool(tokenizer.load('gpt2'))
    except tokenizer.UserError:
        return False


def need_gpt2():
    """A skip that says so where GPT-2's tokenizer cannot be had."""
    if not gpt2_can_be_had():
        pytest.skip("needs GPT-2's tokenizer: a network, or TIKTOKEN_CACHE_DIR")


@functools.cache
def forks():
    """Of this process of pytest."""
    return Forks()


def shared(path):
    """A file of the development data, or a skip that says so."""
    if not (SHARED / path).exists():
        pytest.skip(f'needs ../shared/data/{path}, which is not here')
    return SHARED / path


@pytest.fixture(scope='session')
def book_once(tmp_path_factory):
    """A folder with data/book, 20,000 characters of the Python reference, for tests that change nothing in it."""
    from pydoc_data.topics import topics
    folder = tmp_path_factory.mktemp('book')
    (folder / 'book.txt').write_text('\n\n'.join(topics[name] for name in sorted(topics))[:20000], encoding='utf-8')
    run('prepare/book/prepare.py', '--book=book.txt', cwd=folder)
    return folder


@pytest.fixture
def book(book_once, tmp_path):
    """The same in a folder of its own: a small run takes seconds."""
    return pathlib.Path(shutil.copytree(book_once, tmp_path / 'work'))


@pytest.fixture(params=['gpt2', 'modern'])
def model(request):
    """A tiny model of each architecture, in eval mode, its weights large enough for sharp predictions."""
    import torch
    from model import GPT, GPTConfig
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32, arch=request.param)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model
