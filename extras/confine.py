"""
Run a Python program in an interpreter of its own, with few rights, and say how it ended.
    python extras/confine.py  # prints this page, and the level that this machine reaches
    python -c "from extras.confine import execute; print(execute('assert 1 + 1 == 2'))"

The second command prints how that program ended: passed.

There are three levels. They are tried from the highest down until one works, and if that is not
level 2, a notice says what is missing.

Level 0, on Linux and macOS. The program
- runs in a process of its own, in a fresh folder that is deleted afterwards;
- has Python's standard library and nothing else, no environment, and no input or output;
- cannot start another process or thread;
- is stopped when its time is up, or when the process that asked for it ends;
- gets little memory (on Linux; macOS has no such limit), files of at most 16 MiB, and few of them
  open at once;
- runs as the user nobody if root started it. On Linux it has no capabilities, gains no rights by
  executing a set-user-ID program, and finds an empty session keyring.

Where libseccomp is installed, as it is by default on Debian, Ubuntu and Fedora, the program also
- has no sockets: no network, no D-Bus, tmux or ssh-agent, no host of a virtual machine (vsock);
- cannot keep memory in the kernel beyond its limit, by memfd or System V shared memory;
- has no io_uring, no userfaultfd, no keyrings and no namespaces of its own.

Level 1, where Linux permits namespaces. As level 0, and the program
- has no network, not even 127.0.0.1;
- cannot signal or trace any process but its own, nor use their System V shared memory;
- leaves nothing running when it ends.

Level 2, from Linux 5.12 on. As level 1, and the program
- sees no other process: its /proc is empty;
- sees nothing of /run, /tmp and /var/tmp, and no device but null, zero and urandom: no terminal,
  no GPU, no shared memory;
- can write only to its folder, which is kept in memory: 16 MiB in 4096 files. All other files are
  read-only.

What this does NOT cover. Below level 2 the program can see your other processes, and write wherever
its user may, also to your terminal. At level 0 it can signal and trace those processes, and read
what they hold, such as the keys in their environment.

Without libseccomp the program can, at level 0, outlive its time and reach the network. At any level
it can then reach the host of a virtual machine (vsock), and programs that listen at a socket in a
folder that is not hidden from it, such as an agent's in your home folder. Such a program may do
anything on its behalf.

At any level the program can
- read every file that you may read (or nobody, if root started it), except the hidden ones;
- write into a FIFO that its user may write to, in a folder that is not hidden;
- keep a core busy until its time is up;
- use a hole in the kernel;
- claim to have passed, if it sets out to do so.

It contains accidents, not attackers: run what you distrust in a virtual machine.

Needs folio/configurator.py.
"""
import contextlib
import ctypes
import errno
import functools
import json
import os
import select
import signal
import stat
import sys

# execute() starts this same file by python -I to run a program. Then it imports only what is needed
# in there.
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
# linux/mount.h: for mount() and mount_setattr()
MS_NOSUID = 0x2  # programs there never run with the rights of their owner
MS_NODEV = 0x4  # device files there do not work
MS_BIND = 0x1000  # show a folder in a second place
MS_REC = 0x4000  # with everything that is mounted below it
MS_PRIVATE = 0x40000  # later mounts show in this namespace only
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NODEV = 0x4
AT_RECURSIVE = 0x8000  # linux/fcntl.h
AT_FDCWD = -100
SYS_MOUNT_SETATTR = 442  # the same on x86 and ARM; older C libraries have no function for it
SYS_KEYCTL = {'x86_64': 250, 'aarch64': 219}  # by os.uname().machine
KEYCTL_JOIN_SESSION_KEYRING = 1  # linux/keyctl.h
# linux/capability.h and linux/prctl.h
LINUX_CAPABILITY_VERSION_3 = 0x20080522
PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38

# Level 2 covers these by empty folders, because they hold sockets, FIFOs, terminals and devices.
HIDDEN = ('/run', '/tmp', '/var/tmp', '/dev')
DEVICES = ('/dev/null', '/dev/zero', '/dev/urandom')  # what it puts back into /dev
# System calls that these programs do not need, and with which some got further than they should
REFUSED = ('socket', 'io_uring_setup', 'userfaultfd', 'memfd_create', 'memfd_secret', 'shmget',
           'keyctl', 'add_key', 'request_key', 'unshare', 'setns')


def execute(program, timeout=3.0, memory=512, level=None):
    """Run a program and return how it ended: 'passed', 'timed out' or 'failed: …' with the reason.

    program: Python source. timeout: seconds. memory: MiB. level: 2, 1 or 0, as described at the
    top; None: the highest that works. Raises UserError if none does.
    """
    if level is None:
        level = isolation()
    # The program may write to any file descriptor it finds. What does not begin with this number,
    # which it does not know, is not our verdict.
    nonce = os.urandom(16).hex()
    job = {'program': program, 'timeout': timeout, 'memory': memory, 'nonce': nonce, 'level': level}
    folder = tempfile.mkdtemp(prefix='confine-')
    try:
        # -I ignores environment variables and the user's packages, -S those of site-packages.
        # The argument is there for `ps`, where it shows which process belongs to which folder.
        command = [sys.executable, '-I', '-S', __file__, folder]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, cwd=folder, env={},
                              start_new_session=True) as process:
            try:
                # It keeps the time itself. The extra minute allows for a slow start.
                answer, _ = process.communicate(json.dumps(job).encode(), timeout + 60)
            except subprocess.TimeoutExpired:
                answer = b'started\ntimed out'
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)  # whatever is left of its process group
    finally:
        remove(folder)
    started, _, verdict = answer.decode().partition('\n')
    if not started:
        return 'failed: it could not be started'
    return verdict or 'failed: it ended the process that kept its time'


def remove(folder):
    """Remove a program's folder as far as it can be removed; raise nothing."""
    with contextlib.suppress(OSError):
        os.rmdir(folder)  # at level 2 it is empty
        return
    # Not by shutil.rmtree: folders may be nested too deep for Python, or closed to their owner.
    with contextlib.suppress(OSError):
        for command in (['chmod', '-R', 'u+rwX', folder], ['rm', '-rf', folder]):
            subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@functools.cache
def isolation():
    """Return the highest level that works on this machine, and print what is missing below level 2.

    Raises UserError if no level works.
    """
    if not hasattr(os, 'fork'):
        raise UserError('programs can be run apart on Linux and macOS only; on Windows use WSL')
    can_do = {2: '', 1: 'see your other processes, and write where its user may',
              0: 'read and end your other processes, and write where its user may'}
    # A level works if Python's library can be read, its parts in C too, and the folder written to.
    trial = 'import hashlib, typing\nopen("a", "w").write("b")'
    for level, what in can_do.items():
        result = execute(trial, 30, level=level)
        if result == 'passed':
            if what:
                print(f'notice: code run here can {what}', file=sys.stderr)
            if execute('import socket\nsocket.socket()', 30, level=level) == 'passed':
                where = 'the network and ' if level == 0 else ''
                print(f'notice: code run here can reach {where}programs that listen at a socket '
                      'in the file system; libseccomp would keep it from that', file=sys.stderr)
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
    scorer = os.dup(1)  # leads to execute(); the program finds only /dev/null in its place
    null = os.open('/dev/null', os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    is_root = os.getuid() == 0
    enter_namespaces(job['level'], is_root)
    die_with_parent()
    if os.fork():
        os.wait()
        os._exit(0)
    die_with_parent()
    # The first process of a namespace ignores signals from inside, except those that it handles.
    # Python handles only this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    # From here on we are the first process of the new namespace. When it ends, the kernel ends all
    # other processes in it, whatever they did to get away.
    os.write(scorer, b'started\n')
    reader, writer = os.pipe()
    leave = os._exit  # kept, because the program may replace what is in os
    child = os.fork()
    if child == 0:
        try:
            os.close(scorer)
            os.close(reader)
            run_program(job, writer, is_root)
        finally:
            leave(1)  # whatever the program does, it must not come back into our code
    os.close(writer)
    verdict = wait_for_verdict(child, reader, job['timeout'], job['nonce'])
    os.write(scorer, verdict.encode())


def run_program(job, writer, is_root):
    """Run the program in this process; write the nonce and how it ended to the pipe."""
    write = os.write  # kept for the same reason as leave
    give_up_rights(is_root, job['timeout'], job['memory'])
    names = {}
    try:
        exec(job['program'], names)
        verdict = 'passed'
    except BaseException as e:  # a program may raise anything, SystemExit too
        names.clear()  # after a MemoryError this makes room for the words below
        verdict = f'failed: {type(e).__name__}: {e}'
    write(writer, f'{job["nonce"]} {verdict[:1000]}'.encode('utf-8', 'replace'))


def wait_for_verdict(child, reader, timeout, nonce):
    """Return the verdict that the child writes in time, or else how the child ended; kill it."""
    readable, _, _ = select.select([reader], [], [], timeout)
    answer = b''
    if readable:
        answer = os.read(reader, 4096)  # a write as short as this one arrives in one piece
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    first_word, _, verdict = answer.decode('utf-8', 'replace').partition(' ')
    if first_word == nonce:
        one_line = ' '.join(verdict.split())[:200]
        # The program chose this text, perhaps with control characters for a terminal.
        return ''.join(c if c.isprintable() else '\ufffd' for c in one_line)
    if not readable:
        return 'timed out'
    if os.WIFSIGNALED(status):
        how = f'signal {os.WTERMSIG(status)}'
    else:
        how = f'exit status {os.WEXITSTATUS(status)}'
    return f'failed: ended by {how} before its tests did'


# ---- Namespaces ----------------------------------------------------------------------------------
def call_c(function, *args):
    """Call a function of the C library by its name. Raises OSError if the kernel refuses."""
    if getattr(ctypes.CDLL(None), function)(*args) != 0:
        raise OSError(f'{function} is not permitted here')


def mount(source, target, filesystem, flags, options=''):
    call_c('mount', os.fsencode(source), os.fsencode(target), os.fsencode(filesystem), flags,
           options.encode())


def enter_namespaces(level, is_root):
    """Enter the namespaces of a level. Raises OSError if the kernel does not permit them."""
    folder = os.getcwd()
    if is_root:
        os.chown(folder, NOBODY, NOBODY)  # because the program will run as the user nobody
    if level >= 1:
        unshare(level, is_root)
    if level >= 2:
        make_read_only(folder, is_root)


def unshare(level, is_root):
    """Move into new namespaces; into that of processes only the next child moves."""
    uid = os.getuid()
    gid = os.getgid()
    flags = CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    if level >= 2:
        flags |= CLONE_NEWNS
    if not is_root:
        flags |= CLONE_NEWUSER  # gives an ordinary user the right to the others
    call_c('unshare', flags)
    if not is_root:
        # Map our ids to themselves, because in the new namespace all ids are nobody's at first. The
        # kernel accepts gid_map only after setgroups has been given up (user_namespaces(7)).
        maps = {'setgroups': 'deny', 'uid_map': f'{uid} {uid} 1', 'gid_map': f'{gid} {gid} 1'}
        for name, text in maps.items():
            with open(f'/proc/self/{name}', 'w') as f:
                f.write(text)


def make_read_only(folder, is_root):
    """Make all files read-only except the program's folder, and hide /proc and HIDDEN."""
    mount('none', '/', '', MS_REC | MS_PRIVATE)  # first, so that what follows does not show outside
    library = os.path.dirname(os.path.dirname(os.__file__))
    hidden = list(HIDDEN)
    closed = first_closed_folder(library)
    # Python may be installed in a folder that is closed to others, such as /root. Cover that folder
    # by an open one, so that the user nobody can reach the library, which is put back below.
    if is_root and closed is not None:
        hidden.append(closed)
    kept = {path: os.open(path, os.O_PATH) for path in (library, *DEVICES)}
    for path in hidden:
        if os.path.isdir(path):
            mount('none', path, 'tmpfs', MS_NOSUID, 'mode=755')
    for path, fd in kept.items():
        if not os.path.exists(path):  # it was hidden with the rest
            os.makedirs(library if path == library else '/dev', exist_ok=True)
            if path != library:
                open(path, 'w').close()  # a file to mount the device on
            mount(f'/proc/self/fd/{fd}', path, '', MS_BIND | MS_REC)
        os.close(fd)
    os.makedirs(folder, exist_ok=True)  # it was in /tmp, which is hidden now

    mount('none', '/proc', 'tmpfs', MS_NOSUID, 'mode=755')  # an empty folder hides all processes
    set_mounts('/', AT_RECURSIVE, add=MOUNT_ATTR_RDONLY | MOUNT_ATTR_NODEV)
    for path in DEVICES:
        set_mounts(path, 0, remove=MOUNT_ATTR_NODEV)
    # Only now mount the program's folder, which stays writable because it comes after that call.
    mount('none', folder, 'tmpfs', MS_NOSUID | MS_NODEV, 'size=16m,nr_inodes=4096,mode=777')
    os.chdir(folder)


def set_mounts(path, flags, add=0, remove=0):
    """Change what may be done in the file system that is mounted at path."""
    attributes = (ctypes.c_uint64 * 4)(add, remove)  # struct mount_attr, its other fields 0
    call_c('syscall', SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, attributes,
           ctypes.sizeof(attributes))


def first_closed_folder(path):
    """Return the first folder on the way to path that other users cannot enter, or None."""
    parts = path.split('/')
    for end in range(2, len(parts) + 1):
        folder = '/'.join(parts[:end])
        if not os.stat(folder).st_mode & stat.S_IXOTH:
            return folder
    return None


# ---- Rights and limits ---------------------------------------------------------------------------
def die_with_parent():
    """Let the kernel kill this process when the one that started it ends."""
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def give_up_rights(is_root, timeout, memory):
    """Put this process under its limits for good, and make it the user nobody's if it is root's."""
    import resource  # not at the top, because Windows does not have it
    os.setsid()
    if is_root:  # root is exempt from the limit on processes
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    if sys.platform == 'linux':
        # Drop all capabilities, never regain any (no_new_privs), and leave the caller's keyring.
        libc = ctypes.CDLL(None)
        this_process = (ctypes.c_uint32 * 2)(LINUX_CAPABILITY_VERSION_3, 0)
        no_capabilities = (ctypes.c_uint32 * 6)()
        libc.capset(this_process, no_capabilities)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if os.uname().machine in SYS_KEYCTL:
            libc.syscall(SYS_KEYCTL[os.uname().machine], KEYCTL_JOIN_SESSION_KEYRING, None)
        # With the parent, which keeps the time. Only now, as a change of user would undo it.
        die_with_parent()
        refuse_system_calls()
    limits = {
        resource.RLIMIT_CPU: int(timeout) + 1,  # seconds
        resource.RLIMIT_FSIZE: 16 * MIB,
        resource.RLIMIT_NOFILE: 64,  # open at once
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,  # no process besides this one
    }
    if sys.platform == 'linux':
        limits[resource.RLIMIT_AS] = memory * MIB  # macOS refuses it
    for name, limit in limits.items():
        _, hard = resource.getrlimit(name)
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)  # limits can only be lowered
        resource.setrlimit(name, (limit, limit))
    os.environ.clear()  # Python itself has set a locale in it


class Comparison(ctypes.Structure):
    """libseccomp's struct scmp_arg_cmp: a condition on an argument of a system call."""
    _fields_ = [('argument', ctypes.c_uint), ('operator', ctypes.c_int),
                ('mask', ctypes.c_uint64), ('value', ctypes.c_uint64)]


def refuse_system_calls():
    """Have the kernel refuse the calls REFUSED to this process for good, if libseccomp is there."""
    try:
        seccomp = ctypes.CDLL('libseccomp.so.2')
    except OSError:
        return
    allow = 0x7fff0000  # seccomp.h: SCMP_ACT_ALLOW
    refuse = 0x00050000 | errno.EPERM  # SCMP_ACT_ERRNO
    masked_equal = 7  # SCMP_CMP_MASKED_EQ
    seccomp.seccomp_init.restype = ctypes.c_void_p
    rules = ctypes.c_void_p(seccomp.seccomp_init(allow))
    # asyncio needs socketpair for streams (type 1), which stay allowed. With datagrams and raw
    # sockets (types 2 and 3), one end can be connected to some third socket.
    no_stream = Comparison(1, masked_equal, 0b1110, 0b0010)
    # The program must not undo die_with_parent.
    no_longer_dies = Comparison(0, masked_equal, 0xffffffff, PR_SET_PDEATHSIG)
    conditions = {name: [] for name in REFUSED}
    conditions |= {'socketpair': [no_stream], 'prctl': [no_longer_dies]}
    for name, condition in conditions.items():
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        array = (Comparison * len(condition))(*condition)
        if number != -1:  # -1: this version of libseccomp does not know the call
            seccomp.seccomp_rule_add_array(rules, refuse, number, len(array), array)
    seccomp.seccomp_load(rules)


if CONFINED:
    run_confined()
elif __name__ == '__main__':
    configure(globals())
    print(f'{__doc__.strip()}\n\nThis machine: level {isolation()}')
