"""
Download one file, whole or not at all.
    python -c "from folio.download import *; download(['https://example.org/a'], 'data/a.txt')"

A transfer that breaks leaves data/a.txt.<number>.part, and beside it .part.version if the server
says which version of the file that is. The same command continues it, unless the file has changed
on the server meanwhile.
"""
import contextlib
import hashlib
import os
import time
import zlib

import requests
import urllib3
from tqdm import tqdm

from folio.configurator import UserError

HEADERS = {
    'User-Agent': 'folio (a language-model code base)',
    # Ask for the file's own bytes, because half of a compressed stream could not be continued.
    'Accept-Encoding': 'identity',
}


def download(urls, path, tries=4, timeout=(10, 60), sha256=None):
    """Fetch a file to path, unless it is there already, and return path.

    urls: mirrors of the file, tried in this order.
    tries: attempts at each mirror, with waits of 1, 2, 4 … seconds between them.
    timeout: (seconds to connect, seconds to wait for more bytes).
    sha256: the file's hash, in hexadecimal. A file with another hash, whether there already or just
    downloaded, is fetched again from the start.
    Raises UserError if no mirror has the file, or if it cannot be written.
    """
    if os.path.exists(path) and is_expected(path, sha256):
        return path
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    reason = ''  # why the last attempt failed
    for url in urls:
        # The address is in the name, so that parts from different mirrors are never joined.
        part = f'{path}.{zlib.crc32(url.encode())}.part'
        for attempt in range(tries):
            try:
                fetch(url, part, timeout)
                if is_expected(part, sha256):
                    os.replace(part, path)
                    remove_part(part)
                    return path
                remove_part(part)
                reason = f'{url}: what came is another file, by its SHA-256'
            except requests.RequestException as e:
                status = getattr(e.response, 'status_code', None)
                answer = type(e).__name__ if status is None else f'HTTP {status}'
                reason = f'{url}: {answer}'
                if is_final(status):
                    break
            except OSError as e:
                raise UserError(f'could not write {part}: {e.strerror}') from e
            if attempt + 1 < tries:
                time.sleep(2**attempt)
    raise UserError(f'could not download {os.path.basename(path)} ({reason}); check the address '
                    f'and the network, or save the file yourself as {path}')


def is_final(status):
    """Return whether another attempt would get the same answer, so that only a mirror can help."""
    # 408 and 429 ask us to wait. 416 says that our part is too long; fetch has removed it by now.
    return status is not None and 400 <= status < 500 and status not in (408, 416, 429)


def is_expected(path, sha256):
    """Return whether a file has this hash; for None any file will do."""
    return sha256 is None or sha256_of(path) == sha256


def sha256_of(path):
    """Return the SHA-256 of a file in hexadecimal, reading a megabyte at a time."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while chunk := f.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def fetch(url, part, timeout):
    """Make one attempt to complete the file `part`, from where the last one stopped if possible.

    Raises requests.RequestException if the server refuses or the transfer breaks.
    """
    n_there = 0
    if os.path.exists(part):
        n_there = os.path.getsize(part)
    headers = dict(HEADERS)
    version = read_version(part)
    if n_there:
        headers['Range'] = f'bytes={n_there}-'
        if version:
            headers['If-Range'] = version  # if it has changed, the server sends the whole file
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        if response.status_code == 416:  # the part is longer than the file: begin again
            os.remove(part)
        response.raise_for_status()
        encoding = response.headers.get('Content-Encoding', 'identity')
        if encoding != 'identity':
            raise requests.exceptions.ContentDecodingError(f'it came as {encoding}')

        # A server that knows no ranges sends the whole file, without Content-Range.
        content_range = response.headers.get('Content-Range', '')
        resumed = n_there > 0 and content_range.startswith(f'bytes {n_there}-')
        # Some servers know ranges but ignore If-Range.
        if resumed and version and version_of(response) not in ('', version):
            os.remove(part)
            raise requests.ConnectionError('the file has changed meanwhile')
        if not resumed:
            write_version(part, version_of(response))
        n_kept = n_there if resumed else 0
        n_coming = int(response.headers.get('Content-Length', 0))  # 0: the server does not say
        save(response, part, name=url.rsplit('/', 1)[-1], n_kept=n_kept, n_coming=n_coming)
        n_arrived = os.path.getsize(part)
        if n_coming and n_arrived != n_kept + n_coming:
            raise requests.ConnectionError(f'{n_arrived} of {n_kept + n_coming} bytes arrived')


def version_of(response):
    """Return the server's mark for this version of the file, or '' if it gives none."""
    etag = response.headers.get('ETag', '')
    if etag.startswith('W/'):  # a weak one: two files with it may differ in their bytes
        etag = ''
    return etag or response.headers.get('Last-Modified', '')


def write_version(part, version):
    """Write the version of a part into a file beside it, or remove that file for ''."""
    if version:
        with open(f'{part}.version', 'w', encoding='latin-1') as f:
            f.write(version)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.remove(f'{part}.version')


def read_version(part):
    """Return what write_version has written beside a part, or ''."""
    try:
        with open(f'{part}.version', encoding='latin-1') as f:
            return f.read()
    except OSError:
        return ''


def remove_part(part):
    """Remove a part and its version, if they are there."""
    for path in (part, f'{part}.version'):
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def save(response, part, name, n_kept, n_coming):
    """Write the response to the file `part`, after the n_kept bytes that it keeps; show a bar.

    name: what the bar is labelled. n_coming: bytes of the response; 0: unknown. Raises
    requests.ConnectionError if the transfer breaks.
    """
    total = n_kept + n_coming or None  # None: a bar without an end
    with open(part, 'ab' if n_kept else 'wb') as f, \
            tqdm(total=total, initial=n_kept, unit='B', unit_scale=True, desc=name) as bar:
        try:
            # read1 returns whatever has arrived, so all of it is kept if the transfer breaks.
            while chunk := response.raw.read1(2**16):
                f.write(chunk)
                bar.update(len(chunk))
        except urllib3.exceptions.HTTPError as e:
            raise requests.ConnectionError(str(e)) from e


@contextlib.contextmanager
def hub_errors(what, remedy='check the network'):
    """Turn any exception inside a `with` into a UserError that reads 'what (why); remedy'.

    It is for what huggingface_hub, datasets and pyarrow raise. what: a sentence such as 'FineWeb
    could not be listed'. remedy: what to do about it, or ''. A UserError passes through unchanged.
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
