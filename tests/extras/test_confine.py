"""Programs in their own processes: in bubblewrap, where that works, and under plain limits."""
import os
import socket
import subprocess
import sys
import time

import pytest

from conftest import ROOT, run
from extras import confine
from extras.confine import execute
from folio.configurator import UserError

pytestmark = pytest.mark.skipif(os.name == 'nt', reason='Windows has no limits for a process')
needs_bubblewrap = pytest.mark.skipif(not confine.sandbox(), reason='bubblewrap does not work here')
needs_linux = pytest.mark.skipif(sys.platform != 'linux', reason='only Linux limits memory')


@pytest.fixture(params=[pytest.param('bubblewrap', marks=needs_bubblewrap), 'plain'])
def mode(request, monkeypatch):
    if request.param == 'plain':
        monkeypatch.setattr(confine, 'sandbox', lambda: [])
    return request.param


# ---- Results -------------------------------------------------------------------------------------
@pytest.mark.parametrize('program, result', [
    ('assert 1 + 1 == 2', 'passed'),
    ('import asyncio, ctypes, json, math, typing', 'passed'),
    ('open("a", "w").write("b"); assert open("a").read() == "b"', 'passed'),
    ('assert 1 + 1 == 3, "three"', 'failed: AssertionError: three'),
    ('while True: pass', 'timed out'),
    ('import time; time.sleep(60)', 'timed out'),
    ('import signal, time; signal.alarm(0); time.sleep(60)', 'timed out'),
    ('open("x", "wb").write(bytes(10**8))', 'failed: OSError'),
    ('[open("x", "w") for i in range(99)]', 'failed: OSError'),
    ('import os; os._exit(0)', 'failed: ended early, with status 0'),
    ('import sys; sys.exit()', 'failed: SystemExit'),
    ('import os; os.abort()', 'failed: ended early'),
    ('import ctypes; ctypes.string_at(0)', 'failed: ended early'),
    ('raise KeyboardInterrupt', 'failed: KeyboardInterrupt'),
    ('import os; os.closerange(0, 64)', 'failed: ended early'),
    ('import os\nfor fd in range(64):\n  with __import__("contextlib").suppress(OSError):\n'
     '    os.write(fd, b"passed" * 10**6)', 'passedpassed'),
    ('for i in range(10**4): print("y" * 10**4)\nassert 0', 'failed: AssertionError'),
    ('input()', 'failed: EOFError'),
    ('import os; assert not os.environ and not os.listdir()', 'passed'),
    ('x = (', 'failed: SyntaxError'),
    ('"\0"', 'failed: '),
    ('"\udc80"', 'failed: UnicodeEncodeError'),
    ('(' * 10**5, 'failed: '),
    ('def f(): f()\nf()', 'failed: RecursionError'),
    ('class E(Exception):\n  def __str__(self): raise self\nraise E', 'failed: ended early'),
    ('raise Exception("é" * 10**6)', 'failed: Exception: éé'),
    ('import numpy', 'failed: ModuleNotFoundError'),
], ids=lambda x: ascii(x)[1:41])
def test_how_a_program_ended_is_said_in_a_few_words(mode, program, result, capfd, monkeypatch):
    monkeypatch.setenv('SECRET', 'x')
    said = execute(program, 2.0, 256)
    assert said.startswith(result) and len(said) <= 200
    assert (said == 'passed') == (result == 'passed')
    assert capfd.readouterr() == ('', '')


@needs_linux
@pytest.mark.parametrize('program', ['bytearray(10**9)', 'x = [0]\nwhile True: x += x'])
def test_memory_is_limited(mode, program):
    assert execute(program, 10.0, 256).startswith('failed: MemoryError')


@pytest.mark.skipif(os.getuid() == 0, reason='root has no limit on processes')
@pytest.mark.parametrize('program', [
    'import os; os.fork()', 'import subprocess; subprocess.run("true")',
    'import threading; threading.Thread(target=print).start()'])
def test_no_other_process_or_thread_can_be_started(mode, program):
    assert execute(program).startswith(('failed: BlockingIOError', 'failed: RuntimeError'))


# ---- What is kept in -----------------------------------------------------------------------------
@needs_bubblewrap
def test_bubblewrap_shows_no_file_no_network_and_no_process(tmp_path):
    (tmp_path / 'secret').write_text('x')
    assert execute(f'open({str(tmp_path / "secret")!r})').startswith('failed: FileNotFoundError')
    assert execute(f'open({str(ROOT / "README.md")!r})').startswith('failed: FileNotFoundError')
    assert execute('open("/etc/passwd")').startswith('failed: FileNotFoundError')
    assert execute('open("/x", "w")') == 'passed' and not os.path.exists('/x')
    assert execute('open("/usr/x", "w")').startswith(('failed: OSError', 'failed: PermissionError'))
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
        connect = f'import socket; socket.create_connection(("127.0.0.1", {port}), 1)'
        assert execute(connect).startswith('failed: ConnectionRefusedError')
    assert execute(f'import os; os.kill({os.getpid()}, 0)').startswith('failed: ProcessLookupError')
    assert execute('import os; assert not os.path.exists("/proc/1")') == 'passed'


def test_no_file_of_a_program_stays(mode, tmp_path, monkeypatch):
    monkeypatch.setattr(confine.tempfile, 'tempdir', str(tmp_path))
    for program in ('open("a", "w")', 'import os; os.mkdir("d"); os.chmod("d", 0)',
                    'open("a", "w"); import time; time.sleep(60)'):
        execute(program, 1.0)
    assert os.listdir(tmp_path) == []


@needs_bubblewrap
@pytest.mark.skipif(os.getuid() != 0, reason='only root can start processes in there')
def test_all_that_a_program_started_ends_with_it_in_bubblewrap():
    sleep = [confine.PYTHON, '-c', 'import time; time.sleep(61.5)']
    start = f'import subprocess; subprocess.Popen({sleep}, start_new_session=True)'
    assert execute(start, 10.0) == 'passed'
    running = subprocess.run(['ps', 'axww', '-o', 'args'], capture_output=True, text=True).stdout
    assert '61.5' not in running


CALLER = '''
import sys
from extras import confine
if sys.argv[1] == 'plain':
    confine.sandbox = lambda: []
confine.sandbox()  # starts processes of its own, once
print('ready', flush=True)
confine.execute('import time; time.sleep(60)', 3.0)
'''


def descendants(pid):
    """Return the ids of the processes that a process started, and those started."""
    listed = subprocess.run(['ps', 'axo', 'pid=,ppid='], capture_output=True, text=True).stdout
    pairs = [line.split() for line in listed.splitlines()]
    children = [int(child) for child, parent in pairs if int(parent) == pid]
    return children + [each for child in children for each in descendants(child)]


def is_running(pid):
    try:
        os.kill(pid, 0)
        return True
    except ProcessLookupError:
        return False


def test_a_program_ends_in_time_after_its_caller_was_killed(mode, tmp_path):
    caller = subprocess.Popen([sys.executable, '-c', CALLER, mode], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE, env=os.environ | {'TMPDIR': str(tmp_path)})
    assert caller.stdout.readline() == 'ready\n'
    until = time.monotonic() + 20
    n_processes = {'bubblewrap': 3, 'plain': 1}[mode]
    while len(started := descendants(caller.pid)) < n_processes and time.monotonic() < until:
        time.sleep(0.05)
    caller.kill()
    caller.wait()
    while any(map(is_running, started)) and time.monotonic() < until:
        time.sleep(0.05)
    assert len(started) >= n_processes and not any(map(is_running, started))


# ---- Permission ----------------------------------------------------------------------------------
def test_the_user_is_asked_first():
    with pytest.raises(UserError, match='--allow_code_execution=True'):
        confine.permit(False)
    confine.permit(True)


@pytest.mark.parametrize('bwrap, reason', [
    ('#!/bin/sh\necho bwrap: No permissions to create new namespace >&2\nexit 1\n',
     'bwrap: No permissions to create new namespace'),
    (None, 'it is not installed')])
def test_without_bubblewrap_programs_run_and_the_reason_is_said(tmp_path, bwrap, reason):
    if bwrap:
        (tmp_path / 'bwrap').write_text(bwrap)
        (tmp_path / 'bwrap').chmod(0o755)
    command = 'from extras.confine import execute; print(execute("1"), execute("1 / 0"))'
    done = subprocess.run([sys.executable, '-c', command], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {'PATH': str(tmp_path)})
    assert done.stdout == 'passed failed: ZeroDivisionError: division by zero\n'
    assert done.stderr.count('\n') == 1 and f'does not work here ({reason})' in done.stderr


def test_the_script_says_whether_bubblewrap_works_here(tmp_path):
    out, _ = run('extras/confine.py', cwd=tmp_path)
    assert ('Here bubblewrap works.' in out) == bool(confine.sandbox())
