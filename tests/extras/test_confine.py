"""Programs that set out to get out, at each level that this machine permits."""
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from conftest import ROOT
from extras import confine

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='of Linux alone')
LEVELS = pytest.mark.parametrize('level', [0, 1, 2])


def outcome(program, level, timeout=5.0):
    """Return how a program ends at a level; skip where there is none, or not with this Python."""
    works = confine.execute('import hashlib, socket', 30, level=level)
    if works != 'passed':
        pytest.skip(f'level {level} does not work here: {works}')
    return confine.execute(program, timeout, level=level)


@contextlib.contextmanager
def open_folder():
    """A folder to which also the user nobody has a way, unlike tmp_path; programs run in it."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield folder


def has_seccomp():
    try:
        confine.ctypes.CDLL('libseccomp.so.2')
    except OSError:
        return False
    return True


# ---- Sockets and the kernel ----------------------------------------------------------------------
@LEVELS
@pytest.mark.parametrize('call', [
    'socket.socket()', 'socket.socket(socket.AF_UNIX)', 'socket.socket(socket.AF_VSOCK)',
    'socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)', 'os.memfd_create("x")',
    'check(libc.syscall(425, 8, 0))',  # io_uring_setup
    'check(libc.syscall(323, 0))',  # userfaultfd
    'check(libc.shmget(0, 1 << 30, 0o1600))', 'check(libc.unshare(0x10000000))',
    'check(libc.syscall(250, 0, -3, 1))',  # keyctl
])
def test_no_socket_and_no_memory_of_the_kernel_can_be_had(level, call):
    if not has_seccomp() or os.uname().machine != 'x86_64':
        pytest.skip('needs libseccomp; the numbers are those of x86-64')
    program = ('import ctypes, os, socket\nlibc = ctypes.CDLL(None, use_errno=True)\n'
               'def check(result):\n    if result < 0: raise OSError(ctypes.get_errno(), "")\n')
    assert outcome(program + call, level).startswith('failed: PermissionError: [Errno 1]')


@LEVELS
def test_asyncio_works_as_it_needs_but_a_pair_of_streams(level):
    program = 'import asyncio\nasync def f(): return 1\nassert asyncio.run(f()) == 1'
    assert outcome(program, level) == 'passed'


def test_a_socket_in_a_folder_for_all_is_not_there():
    with open_folder() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f'{folder}/socket')
        result = outcome(f'import os; os.stat({folder + "/socket"!r})', 2)
        assert result.startswith('failed: FileNotFound')


KEYS = """
import ctypes
libc = ctypes.CDLL(None)
# keyctl(KEYCTL_SEARCH, the session's keyring, ...), and add_key to it
assert libc.syscall(250, 10, -3, b'user', b'folio-secret', 0) < 0, 'found'
assert libc.syscall(248, b'user', b'folio-left', b'x', 1, -3) < 0 or not {has_seccomp}, 'left'
"""


@LEVELS
def test_the_callers_keys_are_not_there(level):
    libc = confine.ctypes.CDLL(None)
    is_x86 = os.uname().machine == 'x86_64'
    if not is_x86 or libc.syscall(248, b'user', b'folio-secret', b'x', 1, -3) < 0:
        pytest.skip('no keyrings here, or their numbers are other ones')
    assert outcome(KEYS.format(has_seccomp=has_seccomp()), level) == 'passed'
    assert libc.syscall(250, 10, -3, b'user', b'folio-secret', 0) > 0  # it was there to be found
    assert libc.syscall(250, 10, -3, b'user', b'folio-left', 0) < 0


# ---- Files and devices ---------------------------------------------------------------------------
def test_level_2_sees_no_terminal_and_no_device_but_three():
    program = 'import os\nassert sorted(os.listdir("/dev")) == ["null", "urandom", "zero"]'
    assert outcome(program, 2) == 'passed'
    for path in ('/dev/null', '/dev/zero', '/dev/urandom'):
        assert outcome(f'open({path!r}, "r+b", buffering=0).write(b"x")', 2) == 'passed'
    assert outcome('assert open("/dev/zero", "rb").read(2) == bytes(2)', 2) == 'passed'


def test_level_2_hides_what_lies_in_the_folders_for_all():
    for folder in ('/run', '/var/tmp', '/proc'):
        assert outcome(f'import os\nassert os.listdir({folder!r}) == []', 2) == 'passed'
    with open_folder() as folder:
        os.mkfifo(f'{folder}/fifo')
        os.chmod(f'{folder}/fifo', 0o666)
        assert outcome(f'open({folder + "/fifo"!r}, "w")', 2).startswith('failed: FileNotFound')


def test_the_number_of_files_is_limited_at_level_2():
    program = 'for i in range(10**5): open(str(i), "w").close()'
    assert outcome(program, 2, 20.0).startswith('failed: OSError: [Errno 28]')


DEEP = '''
import os
for i in range(1100):  # beyond which Python 3.11 fails
    os.mkdir('d')
    os.chdir('d')
os.chmod('.', 0)
'''


@LEVELS
def test_folders_nested_deeper_than_python_can_follow_are_removed(level, monkeypatch):
    with open_folder() as folder:
        monkeypatch.setattr(tempfile, 'tempdir', folder)
        assert outcome(DEEP, level, 20.0) == 'passed'
        assert os.listdir(folder) == []


def test_what_cannot_be_removed_ends_nothing(monkeypatch):
    def fail(*args, **options):
        raise OSError('no such program')
    monkeypatch.setattr(confine.subprocess, 'run', fail)
    with open_folder() as folder:
        os.mkdir(f'{folder}/d')
        confine.remove(folder)
        assert os.listdir(folder) == ['d']


# ---- Verdicts and endings ------------------------------------------------------------------------
# The frame that runs the program has the nonce with which a verdict is told from other words.
CLAIM = r'''
import os, sys
frame = sys._getframe(1)
nonce = frame.f_locals['job']['nonce'].encode()
os.write(frame.f_locals['writer'], nonce + b' \x1b]52;c;x\x07 ' + b'y' * 3000)
os._exit(0)
'''


@LEVELS
def test_a_claimed_verdict_is_one_short_line_without_control_characters(level):
    result = outcome(CLAIM, level)
    assert 'yyy' in result and len(result) <= 200 and result.isprintable()


@pytest.mark.parametrize('level', [1, 2])
def test_the_process_that_keeps_the_time_cannot_be_reached(level):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL):
        program = f'import os, time\nos.kill(1, {int(number)})\ntime.sleep(0.2)'
        result = outcome(program, level)
        assert result == 'passed' or result.startswith('failed: PermissionError')


def test_ending_the_process_that_keeps_the_time_is_told_from_not_starting():
    if os.getuid() == 0:
        pytest.skip('root: its programs run as nobody, who may not signal that process')
    result = outcome('import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(9)', 0)
    assert result == 'failed: it ended the process that kept its time'


CALLER = '''
import sys
sys.path.insert(0, sys.argv[1])
from extras import confine
print(confine.execute('import time; time.sleep(60)', 60, level=int(sys.argv[2])))
'''


@LEVELS
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_all_processes_end_with_the_one_that_asked_for_them(level, number):
    outcome('', level)
    with open_folder() as folder:
        caller = subprocess.Popen([sys.executable, '-c', CALLER, str(ROOT), str(level)],
                                  env=os.environ | {'TMPDIR': folder})

        def n_running():
            listed = subprocess.run(['ps', 'axww'], capture_output=True, text=True)
            return listed.stdout.count(f'{folder}/confine-')
        end = time.monotonic() + 20
        while n_running() < 3 and time.monotonic() < end:
            time.sleep(0.05)
        assert n_running() == 3
        caller.send_signal(number)
        caller.wait()
        while n_running() and time.monotonic() < end:
            time.sleep(0.05)
        assert n_running() == 0
