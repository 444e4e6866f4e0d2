"""
Runs a Python program apart, in an interpreter of its own with few rights and little room, and says how it ended.
    python -c "from extras.confine import execute; print(execute('assert 1 + 1 == 2'))"
    python confine.py      # this page, and which level this machine reaches

A program has nothing but the standard library, no environment, no further process or thread, and limits of time, memory
and file sizes; if root started it, it runs as nobody. On Linux, where namespaces are permitted, it has no network and
reaches no process but its own (level 1), sees none, and may write to nothing but an empty folder (level 2); elsewhere a
notice says what is not so (nor does macOS limit memory). What this does NOT cover: it may read every file that you (or
nobody) may, use the cores for its time, hold more memory in files that the kernel keeps there (memfd, shared memory),
talk to programs that listen at a socket in the file system, use a gap of the kernel, and, if it sets out to, claim to
have passed. It contains accidents, not attackers: run what you distrust in a virtual machine.
"""
import ctypes
import contextlib
import functools
import json
import os
import select
import signal
import sys

CONFINED = __name__ == '__main__' and sys.flags.isolated  # started by execute, for one program: it loads no more
if not CONFINED:
    import subprocess
    import tempfile
    from folio.configurator import UserError, configure


def execute(program, timeout=3.0, memory=512, level=None):
    """'passed', 'timed out' or 'failed: …' of a program in a process and an empty folder of its own.

    timeout: seconds. memory: MiB. level: 2, 1 or 0, as said above; None: the highest that works, UserError if none.
    """
    job = {'program': program, 'timeout': timeout, 'memory': memory, 'nonce': os.urandom(16).hex(),
           'level': isolation() if level is None else level}
    with tempfile.TemporaryDirectory(prefix='confine-', ignore_cleanup_errors=True) as folder:
        with subprocess.Popen([sys.executable, '-I', '-S', __file__, folder], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder, env={},
                              start_new_session=True) as process:
            try:
                answer = process.communicate(json.dumps(job).encode(), timeout + 60)[0]  # it ends by itself
            except subprocess.TimeoutExpired:
                answer = b'timed out'
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)  # what may be left of it
    return answer.decode() or 'failed: it could not be started'


@functools.cache
def isolation():
    """The highest level that works on this machine, found by trial; says what is missing. UserError if none works."""
    if not hasattr(os, 'fork'):
        raise UserError('programs can be run apart on Linux and macOS only; on Windows use WSL')
    reach = {2: '', 1: 'see your other processes', 0: 'reach the network and your other processes'}
    for level in reach:
        result = execute('import hashlib, typing\nopen("a", "w").write("b")', 30, level=level)
        if result == 'passed':
            if reach[level]:
                print(f'notice: code run here can {reach[level]}, and write where its user may', file=sys.stderr)
            return level
    raise UserError(f'no program can be run apart here ({result}); if you are root, try as another user, who may read '
                    f'{sys.executable} and its library')


def permit(allowed):
    """UserError unless the user has said yes to running code, and code can be run apart here."""
    if not allowed:
        raise UserError('this runs code that a model wrote, on this machine; python confine.py says what keeps it in, '
                        'and what does not; if that will do, say --allow_code_execution=True')
    isolation()


# ---- In the interpreter of a program ---------------------------------------------------------------------------------
def run_confined():
    """Run the program that standard input brings in a child, and say how that ended."""
    job, scorer, null = json.load(sys.stdin.buffer), os.dup(1), os.open('/dev/null', os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    nobody = 65534 if os.getuid() == 0 else None
    enter_namespaces(job['level'], nobody)
    if os.fork():
        os.wait()
        os._exit(0)
    reader, writer = os.pipe()  # from here on we are the new namespace's first process: when it ends, all in it do
    child, write, leave = os.fork(), os.write, os._exit
    if child == 0:
        try:
            os.close(scorer)
            os.close(reader)
            give_up_rights(nobody, job['timeout'], job['memory'])
            names = {}
            try:
                exec(job['program'], names)
                verdict = 'passed'
            except BaseException as e:  # a program may raise anything
                names.clear()  # room to speak
                verdict = f'failed: {type(e).__name__}: {e}'
            write(writer, f'{job["nonce"]} {" ".join(verdict.split())[:200]}\n'.encode('utf-8', 'replace'))
        finally:
            leave(1)
    os.close(writer)
    late = not select.select([reader], [], [], job['timeout'])[0]
    answer = b'' if late else os.read(reader, 4096)  # one short write comes in one piece
    os.kill(child, signal.SIGKILL)
    status, (nonce, _, verdict) = os.waitpid(child, 0)[1], answer.decode('utf-8', 'replace').partition(' ')
    if nonce != job['nonce']:
        how = f'signal {os.WTERMSIG(status)}' if os.WIFSIGNALED(status) else f'exit status {os.WEXITSTATUS(status)}'
        verdict = 'timed out' if late else f'failed: ended by {how} before its tests did'
    os.write(scorer, verdict.strip().encode())


def enter_namespaces(level, nobody):
    """Leave behind what the level asks for; AssertionError where that is not permitted."""
    libc, uid, gid, folder = ctypes.CDLL(None), os.getuid(), os.getgid(), os.getcwd()

    def mount(source, target, kind, flags, options=''):
        assert libc.mount(*map(os.fsencode, (source, target, kind)), flags, options.encode()) == 0, 'not permitted'
    if nobody:
        os.chown(folder, nobody, nobody)
    if level > 0:  # IPC, PIDs and network of its own; to whom is not root a user namespace gives the right
        flags = 0x68000000 | (0x20000 if level > 1 else 0) | (0 if nobody else 0x10000000)
        assert libc.unshare(flags) == 0, 'not permitted'
        maps = {} if nobody else {'setgroups': 'deny', 'uid_map': f'{uid} {uid} 1', 'gid_map': f'{gid} {gid} 1'}
        for name, text in maps.items():
            with open(f'/proc/self/{name}', 'w') as f:
                f.write(text)
    if level > 1:  # mounts of its own, in the end all read-only but the folder, which is in memory
        mount('none', '/', '', 0x44000)  # what is mounted here shows nowhere else
        library = os.path.dirname(os.path.dirname(os.__file__))
        parents = ['/'.join(library.split('/')[:i]) for i in range(2, library.count('/') + 2)]
        closed = [path for path in parents if nobody and not os.stat(path).st_mode & 1][:1]
        for path in closed:  # Python is root's own, in /root say: show of that folder only the library
            mount(library, folder, '', 0x5000)
            os.chdir(folder)
            mount('none', path, 'tmpfs', 6, 'mode=755')
            os.makedirs(library)
            mount('.', library, '', 0x5000)
            os.makedirs(folder, exist_ok=True)
        assert libc.syscall(442, -100, b'/', 0x8000, (ctypes.c_uint64 * 4)(1), 32) == 0, 'needs Linux 5.12'
        for path in ('/proc', folder):
            mount('none', path, 'tmpfs', 6, 'size=16m,mode=777')
        os.chdir(folder)


def give_up_rights(nobody, timeout, memory):
    """Bind this process, for good, to the user nobody, if there is one to be, and to the limits."""
    import resource  # Windows has none
    os.setsid()
    if nobody:  # a limit of processes does not bind root
        os.setgroups([])
        os.setgid(nobody)
        os.setuid(nobody)
    if sys.platform == 'linux':  # no rights in the namespaces, none by programs that give some; die with parent
        libc = ctypes.CDLL(None)
        libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
        libc.prctl(38, 1, 0, 0, 0)
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)
    limits = {'CPU': int(timeout) + 1, 'FSIZE': 1 << 24, 'NOFILE': 64, 'CORE': 0, 'NPROC': 0}
    limits |= {'AS': memory << 20} if sys.platform == 'linux' else {}  # macOS refuses it
    for name, limit in limits.items():
        kind = getattr(resource, f'RLIMIT_{name}')
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard),) * 2)
    os.environ.clear()  # Python itself sets a locale


if CONFINED:
    run_confined()
elif __name__ == '__main__':
    configure(globals())
    print(f'{__doc__.strip()}\n\nThis machine: level {isolation()}')
