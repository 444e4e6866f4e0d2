"""
What the tests share: a way to run the scripts as a user does, small data, small models.
    pytest -n auto             # what a contributor runs: under two minutes on two cores
    pytest -m '' -n auto       # all, with what is slow and what lies in tests/extras/
    pytest --device=cuda       # those that a GPU can change, on a GPU
    pytest tests/test_train.py # a file or a test that is named runs whatever it is
"""
import argparse
import collections
import contextlib
import functools
import importlib
import io
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXTRAS = ROOT / 'tests' / 'extras'
SHARED = ROOT.parent / 'shared' / 'data'
sys.path.insert(0, str(ROOT))
# A shell that starts the tests in the background has them ignore Ctrl-C, and a process that a test
# starts would ignore it too.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tests run side by side, and threads that spin slow each other down.
os.environ.setdefault('OMP_NUM_THREADS', '1')
if (SHARED / 'tiktoken').is_dir():
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', str(SHARED / 'tiktoken'))
LONGEST = 900  # seconds after which a test fails: it waits for something that never comes
# In float32, whatever the processor: what should be equal is then equal to the last few digits.
TINY = ['--dataset=book', '--device=cpu', '--dtype=float32', '--n_layer=2', '--n_head=2',
        '--n_embd=32', '--block_size=32', '--batch_size=4', '--gradient_accumulation_steps=1',
        '--learning_rate=1e-3', '--warmup_iters=2', '--max_iters=30', '--eval_interval=10',
        '--eval_iters=4', '--log_interval=5', '--out_dir=out']


# ---- Which tests run -----------------------------------------------------------------------------
def pytest_addoption(parser):
    parser.addoption('--device', default='cpu', help='run the tests that take it on this device')


def pytest_configure(config):
    config.addinivalue_line('markers', "slow: runs only if it is named, or with -m ''")
    require_device(config.option.device)
    if getattr(config.option, 'dist', None) == 'load':
        config.option.dist = 'loadfile'  # what the tests of a file share is then made once
        config.option.loadscopereorder = False  # pytest_collection_modifyitems sorts them


def require_device(device):
    """Say in one line that a device is not there."""
    if device == 'cpu':
        return
    import torch
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as e:  # torch raises either
        reason = str(e).partition('\n')[0]
        raise pytest.UsageError(f'--device={device}: {reason}') from None


def paths_asked_for(config):
    """Return the files and folders that the command line names."""
    if config.args_source is not config.ArgsSource.ARGS:
        return []
    folder = config.invocation_params.dir
    return [(folder / arg.split('::')[0]).resolve() for arg in config.args]


def marks_asked_for(config):
    """Return whether the command line has -m, be it for all marks: -m ''."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('-m', action='append')
    known, _ = parser.parse_known_args(list(map(str, config.invocation_params.args)))
    return known.m is not None


def pytest_ignore_collect(collection_path, config):
    """Leave out tests/extras/ unless it, or something in it, is named."""
    if collection_path != EXTRAS or marks_asked_for(config):
        return None
    named = any(path.is_relative_to(EXTRAS) for path in paths_asked_for(config))
    return None if named else True


def pytest_collection_modifyitems(items, config):
    """Leave out what is slow unless its file, or a test of it, is named.

    On another device than the CPU leave out what does not depend on it, and nothing else.
    """
    if config.option.device != 'cpu':
        kept = [item for item in items if 'device' in item.fixturenames]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept
        return
    # First the files that take minutes, so that the other processes do the rest meanwhile. Then the
    # files with the most tests.
    longest = ('test_notebooks.py', 'test_campaign.py')
    n_tests = collections.Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in longest, -n_tests[item.path]))
    if marks_asked_for(config):
        return
    named = paths_asked_for(config)
    kept = []
    left_out = []
    for item in items:
        is_slow = item.get_closest_marker('slow') and item.path not in named
        (left_out if is_slow else kept).append(item)
    if left_out:
        items[:] = kept
        config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """End a test that takes too long."""
    def give_up(number, frame):
        raise TimeoutError(f'the test took more than {LONGEST} s')

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(LONGEST)
    try:
        return (yield)
    finally:
        signal.alarm(0)


# ---- Running a script ----------------------------------------------------------------------------
def run(script, *args, cwd, status=0, **options):
    """Run a script as `python script args` does; return (standard output, standard error).

    It runs in this process, which has imported torch already; with options of subprocess.run, such
    as env, in a process of its own; with processes=2 in two, under torchrun. Asserts the exit
    status.
    """
    if options:
        return run_process(script, *args, cwd=cwd, status=status, **options)
    out, err = io.StringIO(), io.StringIO()
    with left_as_it_was(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        os.chdir(cwd)
        sys.argv = [str(ROOT / script), *map(str, args)]
        sys.path.insert(0, str((ROOT / script).parent))
        code = exit_status(sys.argv[0])
    return checked(code, status, out.getvalue(), err.getvalue())


def run_process(script, *args, cwd, status=0, processes=1, **options):
    """Do what `run` does in a process of its own, which takes seconds to import torch."""
    done = subprocess.run(command(script, *args, processes=processes), cwd=cwd, text=True,
                          encoding='utf-8', capture_output=True, timeout=300, **options)
    return checked(done.returncode, status, done.stdout, done.stderr)


def command(script, *args, processes=1, restarts=0):
    """Return the command that starts a script, under torchrun if there are several processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ['-m', 'torch.distributed.run', '--standalone', '--monitor-interval=0.1',
                     f'--nproc_per_node={processes}', f'--max-restarts={restarts}']
    return [*launcher, str(ROOT / script), *map(str, args)]


def checked(code, status, out, err):
    """Return (out, err) of a script; assert that it ended with `status`."""
    if "GPT-2's tokenizer could not be downloaded" in err:
        need_gpt2()
    assert code == status, f'status {code}, not {status}\n{out}\n{err}'
    return out, err


def exit_status(path):
    """Run a script as the main program, and return the status that its process would end with."""
    namespace = {'__name__': '__main__', '__file__': path}
    try:
        try:
            exec(compile(pathlib.Path(path).read_text(encoding='utf-8'), path, 'exec'), namespace)
        except Exception:
            sys.excepthook(*sys.exc_info())  # the script's own, which may exit with another status
            return 1
    except SystemExit as e:
        return 0 if e.code is None else e.code
    finally:
        namespace.clear()  # with it go the lock on its out_dir and its thread
    return 0


@contextlib.contextmanager
def left_as_it_was():
    """Restore what a script changes in its process and Python, or torch, does not."""
    import torch
    folder = os.getcwd()
    argv = sys.argv
    path = list(sys.path)
    modules = set(sys.modules)
    hook = sys.excepthook
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    precision = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        os.chdir(folder)
        sys.argv = argv
        sys.path[:] = path
        forget_new_models(modules)
        sys.excepthook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_float32_matmul_precision(precision)


def forget_new_models(known):
    """Let a later script import another file under the name of one that this script imported."""
    for name in set(sys.modules) - known:
        path = getattr(sys.modules[name], '__file__', None) or ''
        if name.endswith('_model') and not path.startswith(str(ROOT)):
            del sys.modules[name]
    importlib.invalidate_caches()  # '.' is now another folder


# ---- What a run leaves ---------------------------------------------------------------------------
def log_of(folder, out_dir='out'):
    """Return the entries of the log of a run."""
    import folio.log
    return folio.log.read(str(folder / out_dir / 'log.jsonl'))


def steps_of(folder, out_dir='out'):
    """Return what a log says of steps and evaluations, without what depends on the clock."""
    return [{k: v for k, v in entry.items() if k not in ('tokens_per_second', 'train_seconds')}
            for entry in log_of(folder, out_dir) if 'iter' in entry]


def assert_same(ours, theirs, where=''):
    """Assert that two checkpoints, or two parts of them, are the same to the last bit."""
    import torch
    if isinstance(ours, list):
        ours = dict(enumerate(ours))
        theirs = dict(enumerate(theirs))
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f'{where}.{key}')
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def assert_same_run(folder, ours='out', theirs='alone', name='ckpt.pt'):
    """Assert that weights, optimizers and best loss are those of another run, to the last bit."""
    from folio import checkpoint
    a = checkpoint.load(str(folder / ours / name))
    b = checkpoint.load(str(folder / theirs / name))
    for key in ('model', 'optimizer', 'scaler', 'windows', 'iter_num', 'best_val_loss',
                'best_iter'):
        assert_same(a[key], b[key], key)


# ---- Accidents -----------------------------------------------------------------------------------
MODEL_WITH_AN_ACCIDENT = '''
import os
import sys
import time

import torch

import model
from model import GPTConfig


class GPT(model.GPT):
    passes = 0  # of training, before this one: the first warms up, and number n + 1 is of step n

    def forward(self, idx_BT, targets_BT=None, all_logits=False, cache=None):
        if {when}:
            {accident}
        self.passes += self.training
        return super().forward(idx_BT, targets_BT, all_logits, cache)
'''


def plant(folder, when, accident):
    """Write a model whose forward pass has an accident, as an edit may; return its config file."""
    source = MODEL_WITH_AN_ACCIDENT.format(when=when, accident=accident)
    (folder / 'planted_model.py').write_text(source, encoding='utf-8')
    (folder / 'planted.py').write_text('from planted_model import GPT, GPTConfig\n')
    return 'planted.py'


# ---- A full disk ---------------------------------------------------------------------------------
@contextlib.contextmanager
def largest_file(n_bytes):
    """Stand in for a full disk: the system refuses to write more than n_bytes to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---- What may be missing -------------------------------------------------------------------------
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


def shared(path):
    """A file of the development data, or a skip that says so."""
    if not (SHARED / path).exists():
        pytest.skip(f'needs ../shared/data/{path}, which is not here')
    return SHARED / path


@pytest.fixture(scope='session')
def device(request):
    """The device to test: cpu, or what --device= says."""
    return request.config.option.device


# ---- Data and models -----------------------------------------------------------------------------
@pytest.fixture(scope='session')
def book_once(tmp_path_factory):
    """A folder with data/book that stays as it is."""
    return make_book(tmp_path_factory.mktemp('book'))


def make_book(folder):
    """Prepare data/book in a folder: 20,000 characters of the Python reference. Return it."""
    from pydoc_data.topics import topics
    text = '\n\n'.join(topics[name] for name in sorted(topics))
    (folder / 'book.txt').write_text(text[:20000], encoding='utf-8')
    run('prepare/book/prepare.py', '--book=book.txt', cwd=folder)
    return folder


@pytest.fixture(scope='session')
def trained_once(book_once, tmp_path_factory):
    """The same with out/, a run of TINY, that stays as it is."""
    folder = tmp_path_factory.mktemp('trained') / 'work'
    shutil.copytree(book_once, folder)
    run('train.py', *TINY, cwd=folder)
    return folder


@pytest.fixture
def book(book_once, tmp_path):
    """data/book in a folder of the test's own."""
    return pathlib.Path(shutil.copytree(book_once, tmp_path / 'work'))


@pytest.fixture
def trained(trained_once, tmp_path):
    """data/book and the run in a folder of the test's own."""
    return pathlib.Path(shutil.copytree(trained_once, tmp_path / 'work'))


@pytest.fixture(params=['gpt2', 'modern'])
def model(request):
    """A tiny model of each architecture, in eval mode, its weights large: sharp predictions."""
    import torch
    from model import GPT, GPTConfig
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32,
                          arch=request.param)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model
