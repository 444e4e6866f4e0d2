"""
Run a Python program in an interpreter of its own, with few rights, and say how it ended.
    python extras/confine.py  # prints this page, and whether bubblewrap works here
    python -c "from extras.confine import execute; print(execute('assert 1 + 1 == 2'))"

The second command prints how that program ended: passed.

With bubblewrap, on Linux (apt install bubblewrap), the program
- sees Python, /usr and /lib, which it cannot change, and no file of yours;
- has no network, not even 127.0.0.1, and sees no other process;
- writes into memory that is its own;
- leaves nothing behind: its files, and all that it started, end with it.

Without bubblewrap it starts in an empty folder, which is removed when it ends or its time is up,
and its process group is killed. Nothing else keeps it in. It can read, change, send away and end
whatever you can, and what it starts in another process group stays.

Either way it has Python's standard library only, no environment variable, no input and no output;
a few seconds, some hundred MiB of memory (macOS does not limit that), 64 open files of at most
16 MiB each; and no other process or thread, unless root runs it, for whom there is no such limit.

Neither way prevents everything: the program can keep a core busy until its time is up, and fill
memory with many files. It can reach what bubblewrap does not separate: your keyring in the kernel,
the host of a virtual machine (vsock). If it sets out to, it can use a hole in the kernel, and claim
to have passed. This contains accidents, not attackers: run what you distrust in a virtual machine.

Bubblewrap needs user namespaces, which many containers forbid. Where it is missing or cannot run,
a notice says so, and programs run without it.

Needs folio/configurator.py.
"""
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile

if __name__ == '__main__':
    sys.path.insert(0, os.path.abspath(__file__ + '/../..'))  # the root of the checkout
from folio.configurator import UserError, configure, notice

PYTHON = os.path.realpath(sys.executable)  # not a virtual environment's, which is hidden from it
# What runs inside: it reads the program, lowers its own limits for good, and executes the program.
DRIVER = '''
import json, os, resource, signal, sys

program, seconds, mebibytes = json.load(sys.stdin)
answer = os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
for fd in (0, 1, 2):
    os.dup2(null, fd)
limits = {'FSIZE': 16 << 20, 'NOFILE': 64, 'CORE': 0, 'NPROC': 0}
if sys.platform == 'linux':  # macOS refuses it
    limits['AS'] = mebibytes << 20
for name, limit in limits.items():
    resource.setrlimit(getattr(resource, 'RLIMIT_' + name), (limit, limit))
os.environ.clear()  # Python has set a locale in it
signal.alarm(int(seconds) + 2)  # in case whoever keeps the time has been killed
names = {}
try:
    exec(program, names)
    result = 'passed'
except BaseException as e:  # a program may raise anything, SystemExit too
    names.clear()  # after a MemoryError this makes room for the words below
    result = f'failed: {type(e).__name__}: {e}'
os.write(answer, result[:200].encode(errors='replace'))
os._exit(0)
'''


@functools.cache
def sandbox():
    """Return the command that runs another one in bubblewrap; [] where that does not work.

    Then a notice says why, once.
    """
    bwrap = shutil.which('bwrap')
    reason = 'it is not installed'
    if bwrap is not None:
        command = [bwrap, '--unshare-all', '--die-with-parent', '--new-session', '--cap-drop',
                   'ALL', '--dev', '/dev', '--tmpfs', '/tmp', '--chdir', '/tmp']
        for folder in ('/usr', '/lib', '/lib64', os.path.realpath(sys.base_prefix)):
            command += ['--ro-bind-try', folder, folder]
        # If this works, Python's library can be read, its parts in C too
        trial = subprocess.run([*command, PYTHON, '-I', '-S', '-c', 'import ctypes, typing'],
                               capture_output=True, text=True, env={})
        if trial.returncode == 0:
            return command
        reason = trial.stderr.strip()
    notice(f'bubblewrap does not work here ({reason}), so programs can do whatever you may: '
           'see python extras/confine.py')
    return []


def execute(program, timeout=3.0, memory=512):
    """Run a program and return how it ended: 'passed', 'timed out' or 'failed: …' with the reason.

    program: Python source. timeout: seconds, the start of Python included. memory: MiB.
    """
    job = json.dumps([program, timeout, memory]).encode()
    # -I ignores environment variables and the user's packages, -S the packages in site-packages
    command = [*sandbox(), PYTHON, '-I', '-S', '-c', DRIVER]
    with tempfile.TemporaryDirectory(prefix='confine-', ignore_cleanup_errors=True) as folder:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, cwd=folder, env={},
                              start_new_session=True) as process:
            try:
                answer, _ = process.communicate(job, timeout)
            except subprocess.TimeoutExpired:
                return 'timed out'
            finally:
                # End the rest of its process group. macOS forbids it for a group that has ended
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
    if not answer:
        return f'failed: ended early, with status {process.returncode}'
    return answer.decode(errors='replace')[:200]


def permit(allowed):
    """Raise UserError unless the user allows code to be run, and this system can limit it."""
    if not allowed:
        raise UserError('this runs code that a model wrote, on this machine; '
                        'python extras/confine.py says what such code can and cannot do; '
                        'to allow it, say --allow_code_execution=True')
    if os.name == 'nt':
        raise UserError('programs are run with limits on Linux and macOS only; on Windows use WSL')
    sandbox()


if __name__ == '__main__':
    configure(globals())
    print(__doc__.strip())
    if sandbox():
        print('\nHere bubblewrap works.')
