"""
Download one file, whole or not at all.
    python -c "from folio.download import *; download('https://example.org/a', 'data/a.txt')"

A transfer that breaks is begun again.
"""
import contextlib
import hashlib
import os
import time

import requests
from tqdm import tqdm

from folio.configurator import UserError

TRIES = 4  # with waits of 1, 2 and 4 seconds between them
TIMEOUT = (10, 60)  # seconds to connect, and to wait for more bytes
HEADERS = {
    'User-Agent': 'folio (a language-model code base)',
    'Accept-Encoding': 'identity',  # so that the bar knows how many bytes there are
}


def download(url, path, sha256=None):
    """Fetch a file to path, unless it is there already, and return path.

    sha256: the file's hash, in hexadecimal. A file with another hash, whether there already or just
    downloaded, is fetched again.
    Raises UserError if the file cannot be fetched, or if it cannot be written.
    """
    if os.path.exists(path) and sha256 in (None, sha256_of(path)):
        return path
    part = f'{path}.{os.getpid()}.part'  # another process may want the same file
    reason = ''  # why the last attempt failed
    for attempt in range(TRIES):
        if attempt > 0:
            time.sleep(2**(attempt - 1))
        try:
            os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
            fetch(url, part)
            if sha256 in (None, sha256_of(part)):
                os.replace(part, path)
                return path
            reason = 'the file that came has another SHA-256'
        except requests.RequestException as e:
            status = getattr(e.response, 'status_code', None)
            reason = type(e).__name__ if status is None else f'HTTP {status}'
            # Another attempt would get the same answer; 408 and 429 ask us to wait.
            if status and 400 <= status < 500 and status not in (408, 429):
                break
        except OSError as e:
            raise UserError(f'could not write {part}: {e.strerror}') from e
        finally:
            with contextlib.suppress(OSError):
                os.remove(part)  # of an attempt that failed
    raise UserError(f'could not download {os.path.basename(path)} ({url}: {reason}); check the '
                    f'address and the network, or save the file yourself as {path}')


def sha256_of(path):
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def fetch(url, path):
    """Write what a server sends to a file, and show a bar.

    Raises requests.RequestException if the server refuses or the transfer breaks.
    """
    with requests.get(url, headers=HEADERS, stream=True, timeout=TIMEOUT) as response:
        response.raise_for_status()
        total = int(response.headers.get('Content-Length', 0)) or None  # None: unknown
        with open(path, 'wb') as f, tqdm(desc=os.path.basename(url), total=total, unit='B',
                                         unit_scale=True) as bar:
            for chunk in response.iter_content(2**16):
                f.write(chunk)
                bar.update(len(chunk))


@contextlib.contextmanager
def hub_errors(what, remedy='check the network'):
    """Turn any exception inside a `with` into a UserError that reads 'what (why); remedy'.

    It is for the errors of huggingface_hub, datasets and pyarrow. what: for example 'FineWeb could
    not be listed'. remedy: what to do about it, or ''. A UserError passes through unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # offline, refused, no such file, full disk: they share no class
        first_line = str(e).strip().partition('\n')[0]
        message = f'{what} ({type(e).__name__}: {first_line})'
        if remedy:
            message += f'; {remedy}'
        raise UserError(message) from e
