"""
Hold a folder for one process at a time.
    python -c "from folio.lock import only_one; only_one('out/book/lock'); input('locked')"
"""
import os

from folio.configurator import UserError


def only_one(path):
    """Return an open, locked file. Raises UserError if another process has it locked.

    The lock ends when the file is closed or its process ends, however it does: the system sees to
    that, so no killed run leaves one behind.
    """
    lock = open(path, 'w')
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f'another run is at work in {os.path.dirname(path)}; '
                        'wait until it is done') from None
    except (ImportError, OSError):
        pass  # Windows and some network file systems have no such locks: then we trust the user
    return lock
