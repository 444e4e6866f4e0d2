"""
Runs scripts as `python script arguments` does, in processes forked from one that has imported torch: it takes seconds.
    status = Forks().run('train.py', ['--help'], cwd='.', out='out.txt', err='err.txt', timeout=300)

For Linux; the environment is that of the first process, whose threads are few enough to fork (see OMP_NUM_THREADS).
"""
import atexit
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading


class Forks:
    """A process that forks, one script at a time."""

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.lock = threading.Lock()

    def run(self, script, arguments, cwd, out, err, timeout):
        """The exit status of a script, whose output goes to two files. subprocess.TimeoutExpired, in seconds."""
        with self.lock:
            self.process.stdin.write(json.dumps([script, *arguments, cwd, out, err]).encode() + b'\n')
            self.process.stdin.flush()
            pid = int(self.process.stdout.readline())
            late = not select.select([self.process.stdout], [], [], timeout)[0]
            if late:
                os.kill(pid, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(int(self.process.stdout.readline()))
        if late:
            raise subprocess.TimeoutExpired(script, timeout)
        return status


def serve():
    """Fork for each line of standard input; print the process's number, then how it ended."""
    import tiktoken, torch, torch._dynamo  # noqa: E401, F401  the last is what optimizers import
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            become(*json.loads(line))
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


def become(script, *rest):
    """Turn this process into that of a script; does not return."""
    *arguments, cwd, out, err = rest
    os.chdir(cwd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, (name, path) in enumerate((('stdout', out), ('stderr', err)), 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        setattr(sys, name, open(number, 'w', encoding='utf-8', errors='backslashreplace', closefd=False))
    sys.argv, sys.path[0], status = [script, *arguments], os.path.dirname(script), 0
    try:
        runpy.run_path(script, run_name='__main__')
    except SystemExit as e:
        status = status_of(e)
    except BaseException:
        try:
            status = 1
            sys.excepthook(*sys.exc_info())
        except SystemExit as e:
            status = status_of(e)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def status_of(system_exit):
    code = system_exit.code
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)
    return 1


if __name__ == '__main__':
    serve()
