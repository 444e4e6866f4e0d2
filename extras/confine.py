"""
Run a Python program in an interpreter of its own, with few rights, and say how it ended.
    python extras/confine.py  # prints this page, and the level that this machine reaches
    python -c "from extras.confine import execute; print(execute('assert 1 + 1 == 2'))"

The second command prints how that program ended: passed.

There are three levels. The highest that works on a machine is found by trying them, and where that
is not level 2 a notice says what is missing.

Level 0, on Linux and macOS. The program
- runs in a process of its own, in a fresh folder that is deleted afterwards;
- has Python's standard library and nothing else, no environment, and no input or output;
- cannot start another process or thread;
- is stopped when its time is up, and gets little memory (on Linux; macOS has no such limit),
  files of at most 16 MiB, and few of them open at once;
- runs as the user nobody if root started it. On Linux it has no capabilities, and gains no rights
  by executing a set-user-ID program.

Level 1, where Linux permits namespaces. As level 0, and the program
- has no network, not even 127.0.0.1;
- cannot signal or trace any process but its own, nor use their System V shared memory;
- leaves nothing running when it ends.

Level 2, from Linux 5.12 on. As level 1, and the program
- sees no other process: its /proc is empty;
- can write only to its folder and to that /proc, which are kept in memory, 16 MiB each. All other
  files are read-only.

What this does NOT cover. Below level 1 the program can reach the network and your other processes;
below level 2 it can see those processes, and write wherever its user may. At any level it can
- read every file that you may read (or, if root started it, that nobody may);
- keep a core busy until its time is up;
- hold more memory than its limit in files that the kernel keeps there (memfd, shared memory);
- talk to programs that listen at a socket in the file system;
- use a hole in the kernel;
- claim to have passed, if it sets out to.

It contains accidents, not attackers: run what you distrust in a virtual machine.

Needs folio/configurator.py.
"""
import ctypes
import contextlib
import functools
import json
import os
import select
import signal
import stat
import sys

# execute() starts this same file, with python -I, to run one program: then it loads less
CONFINED = __name__ == '__main__' and sys.flags.isolated
if not CONFINED:
    import subprocess
    import tempfile
    if __name__ == '__main__':
        sys.path.insert(0, os.path.abspath(__file__ + '/../..'))  # the root of the checkout
    from folio.configurator import UserError, configure

MIB = 1 << 20
NOBODY = 65534  # the user and the group that own nothing

# Python has no names for these numbers of the kernel, or has them only from 3.12 on.
# linux/sched.h: what unshare() makes a process's own
CLONE_NEWNS = 0x00020000  # mounts
CLONE_NEWIPC = 0x08000000  # shared memory, semaphores and message queues
CLONE_NEWUSER = 0x10000000  # user and group ids
CLONE_NEWPID = 0x20000000  # processes
CLONE_NEWNET = 0x40000000  # network
# linux/mount.h: mount() and mount_setattr()
MS_NOSUID = 0x2  # programs there give no one the rights of their owner
MS_NODEV = 0x4  # device files there do not work
MS_BIND = 0x1000  # show a folder in a second place
MS_REC = 0x4000  # with all that is mounted below it
MS_PRIVATE = 0x40000  # later mounts show in this namespace only
MOUNT_ATTR_RDONLY = 0x1
AT_RECURSIVE = 0x8000  # linux/fcntl.h
AT_FDCWD = -100
SYS_MOUNT_SETATTR = 442  # the same on x86 and ARM; older C libraries have no function for it
# linux/capability.h and linux/prctl.h
LINUX_CAPABILITY_VERSION_3 = 0x20080522
PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38


def execute(program, timeout=3.0, memory=512, level=None):
    """Run a program and return how it ended: 'passed', 'timed out' or 'failed: …' with the reason.

    timeout is in seconds, memory in MiB. level is 2, 1 or 0, as described at the top; None takes
    the highest that works, and raises UserError if none does.
    """
    if level is None:
        level = isolation()
    # Whatever the program writes, and wherever, a line without this nonce is not our verdict
    nonce = os.urandom(16).hex()
    job = {'program': program, 'timeout': timeout, 'memory': memory, 'nonce': nonce, 'level': level}
    with tempfile.TemporaryDirectory(prefix='confine-', ignore_cleanup_errors=True) as folder:
        # -I ignores environment variables and the user's packages, -S those of site-packages.
        # Nobody reads the argument; it shows in `ps` which process belongs to which folder.
        command = [sys.executable, '-I', '-S', __file__, folder]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, cwd=folder, env={},
                              start_new_session=True) as process:
            try:
                # It keeps the time itself. The extra minute allows for a slow start.
                answer, _ = process.communicate(json.dumps(job).encode(), timeout + 60)
            except subprocess.TimeoutExpired:
                answer = b'timed out'
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)  # whatever is left of its group
    return answer.decode() or 'failed: it could not be started'


@functools.cache
def isolation():
    """Return the highest level that works on this machine, and print a notice of what is missing.

    Raise UserError if no level works.
    """
    if not hasattr(os, 'fork'):
        raise UserError('programs can be run apart on Linux and macOS only; on Windows use WSL')
    can_reach = {2: '', 1: 'see your other processes',
                 0: 'reach the network and your other processes'}
    # Python's library must be readable, also its parts in C, and the folder writable.
    trial = 'import hashlib, typing\nopen("a", "w").write("b")'
    for level, what in can_reach.items():
        result = execute(trial, 30, level=level)
        if result == 'passed':
            if what:
                print(f'notice: code run here can {what}, and write where its user may',
                      file=sys.stderr)
            return level
    raise UserError(f'no program can be run apart here ({result}); if you are root, try as another '
                    f'user, who may read {sys.executable} and its library')


def permit(allowed):
    """Raise UserError unless the user allows code to be run, and it can be run apart here."""
    if not allowed:
        raise UserError('this runs code that a model wrote, on this machine; '
                        'python extras/confine.py says what keeps it in, and what does not; '
                        'if that will do, say --allow_code_execution=True')
    isolation()


# ---- In the interpreter of a program -------------------------------------------------------------
def run_confined():
    """Run the program that comes on standard input, and write how it ended to standard output.

    This takes three processes. This one enters the namespaces and waits. Its child is the first
    process of the new namespaces and keeps the time. The grandchild gives up its rights and becomes
    the program.
    """
    job = json.load(sys.stdin.buffer)
    scorer = os.dup(1)  # the way to execute(); the program finds nothing but /dev/null in its place
    null = os.open('/dev/null', os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    is_root = os.getuid() == 0
    enter_namespaces(job['level'], is_root)
    if os.fork():
        os.wait()
        os._exit(0)

    # From here on we are the first process of the new namespace: when it ends, the kernel ends all
    # others in it, whatever they did to get away.
    reader, writer = os.pipe()
    leave = os._exit  # kept here, because a program may replace what it finds in os
    child = os.fork()
    if child == 0:
        try:
            os.close(scorer)
            os.close(reader)
            run_program(job, writer, is_root)
        finally:
            leave(1)  # nothing that the program does may bring it back into our code
    os.close(writer)
    verdict = wait_for_verdict(child, reader, job['timeout'], job['nonce'])
    os.write(scorer, verdict.encode())


def run_program(job, writer, is_root):
    """Run the program in this process; write one line to the pipe, the nonce and how it ended."""
    write = os.write  # kept for the same reason as leave
    give_up_rights(is_root, job['timeout'], job['memory'])
    names = {}
    try:
        exec(job['program'], names)
        verdict = 'passed'
    except BaseException as e:  # a program may raise anything, SystemExit too
        names.clear()  # after a MemoryError this makes room for the words below
        verdict = f'failed: {type(e).__name__}: {e}'
    one_line = ' '.join(verdict.split())[:200]
    write(writer, f'{job["nonce"]} {one_line}\n'.encode('utf-8', 'replace'))


def wait_for_verdict(child, reader, timeout, nonce):
    """Return the verdict that the child writes in time, or else how the child ended; kill it."""
    readable, _, _ = select.select([reader], [], [], timeout)
    answer = b''
    if readable:
        answer = os.read(reader, 4096)  # a write as short as this one comes in one piece
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    first_word, _, verdict = answer.decode('utf-8', 'replace').partition(' ')
    if first_word == nonce:
        return verdict.strip()
    if not readable:
        return 'timed out'
    if os.WIFSIGNALED(status):
        how = f'signal {os.WTERMSIG(status)}'
    else:
        how = f'exit status {os.WEXITSTATUS(status)}'
    return f'failed: ended by {how} before its tests did'


# ---- Namespaces ----------------------------------------------------------------------------------
def call_c(function, *args):
    """Call a function of the C library by its name. Raise OSError where the kernel refuses."""
    if getattr(ctypes.CDLL(None), function)(*args) != 0:
        raise OSError(f'{function} is not permitted here')


def mount(source, target, filesystem, flags, options=''):
    call_c('mount', os.fsencode(source), os.fsencode(target), os.fsencode(filesystem), flags,
           options.encode())


def enter_namespaces(level, is_root):
    """Leave behind what the level takes away. Raise OSError where the kernel does not permit it."""
    folder = os.getcwd()
    if is_root:
        os.chown(folder, NOBODY, NOBODY)  # it is the program's, which will run as nobody
    if level >= 1:
        unshare(level, is_root)
    if level >= 2:
        make_read_only(folder, is_root)


def unshare(level, is_root):
    """Move into new namespaces; that of processes begins with the next child."""
    uid = os.getuid()
    gid = os.getgid()
    flags = CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    if level >= 2:
        flags |= CLONE_NEWNS
    if not is_root:
        flags |= CLONE_NEWUSER  # gives an ordinary user the right to the others
    call_c('unshare', flags)
    if not is_root:
        # Until they are mapped all ids are nobody's; map ours to themselves. The kernel accepts
        # gid_map only after setgroups has been given up (user_namespaces(7)).
        maps = {'setgroups': 'deny', 'uid_map': f'{uid} {uid} 1', 'gid_map': f'{gid} {gid} 1'}
        for name, text in maps.items():
            with open(f'/proc/self/{name}', 'w') as f:
                f.write(text)


def make_read_only(folder, is_root):
    """Make all files read-only but for two empty folders in memory, /proc and the program's."""
    mount('none', '/', '', MS_REC | MS_PRIVATE)  # first, so that nothing done below shows outside
    if is_root:
        open_way_to_library(folder)
    read_only = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY)  # struct mount_attr, its other fields 0
    call_c('syscall', SYS_MOUNT_SETATTR, AT_FDCWD, b'/', AT_RECURSIVE, read_only,
           ctypes.sizeof(read_only))
    # What is mounted after that call can be written to. An empty /proc hides all processes.
    for path in ('/proc', folder):
        mount('none', path, 'tmpfs', MS_NOSUID | MS_NODEV, 'size=16m,mode=777')
    os.chdir(folder)


def open_way_to_library(folder):
    """Let the user nobody reach Python's library where it lies in a folder closed to him, as /root.

    An empty folder in memory covers the closed one and shows nothing of it but the library, which
    is held meanwhile by a mount on the program's own folder.
    """
    library = os.path.dirname(os.path.dirname(os.__file__))
    closed = first_closed_folder(library)
    if closed is None:
        return
    mount(library, folder, '', MS_BIND | MS_REC)
    os.chdir(folder)
    mount('none', closed, 'tmpfs', MS_NOSUID | MS_NODEV, 'mode=755')
    os.makedirs(library)
    mount('.', library, '', MS_BIND | MS_REC)
    os.makedirs(folder, exist_ok=True)  # it may have been in the closed folder too


def first_closed_folder(path):
    """Return the first folder on the way to path that is not open to all users, or None."""
    parts = path.split('/')
    for end in range(2, len(parts) + 1):
        folder = '/'.join(parts[:end])
        if not os.stat(folder).st_mode & stat.S_IXOTH:
            return folder
    return None


# ---- Rights and limits ---------------------------------------------------------------------------
def give_up_rights(is_root, timeout, memory):
    """Bind this process, for good, to the limits, and to the user nobody if it is root's."""
    import resource  # Windows does not have it
    os.setsid()
    if is_root:  # whom a limit on processes does not bind
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    if sys.platform == 'linux':
        # Drop all capabilities, never regain any (no_new_privs), and die with the parent, which
        # keeps the time.
        libc = ctypes.CDLL(None)
        this_process = (ctypes.c_uint32 * 2)(LINUX_CAPABILITY_VERSION_3, 0)
        no_capabilities = (ctypes.c_uint32 * 6)()
        libc.capset(this_process, no_capabilities)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    limits = {
        resource.RLIMIT_CPU: int(timeout) + 1,  # seconds
        resource.RLIMIT_FSIZE: 16 * MIB,
        resource.RLIMIT_NOFILE: 64,  # open at once
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,  # more than the one there is
    }
    if sys.platform == 'linux':
        limits[resource.RLIMIT_AS] = memory * MIB  # macOS refuses it
    for name, limit in limits.items():
        _, hard = resource.getrlimit(name)
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)  # a limit can be lowered only
        resource.setrlimit(name, (limit, limit))
    os.environ.clear()  # Python itself sets a locale


if CONFINED:
    run_confined()
elif __name__ == '__main__':
    configure(globals())
    print(f'{__doc__.strip()}\n\nThis machine: level {isolation()}')
