"""
Downloads one file, whole or not at all.
    python -c "from folio.download import download; download(['https://example.org/a.txt'], 'data/downloads/a.txt')"
"""
import hashlib
import os
import time
import zlib

import requests
import urllib3
from tqdm import tqdm

from folio.configurator import UserError


def download(urls, path, tries=4, timeout=(10, 60), sha256=None):
    """Fetch the first of `urls` (mirrors of one file) that answers into path, unless it is there; returns path.

    A broken transfer goes on where it broke if the server can (HTTP ranges), else from the start; each address is tried
    `tries` times, with waits of 1, 2, 4 … seconds. timeout: seconds to connect and between bytes. sha256: of the file,
    in hexadecimal; one with another sum, there or newly come, is fetched again from the start. Raises UserError.
    """
    if os.path.exists(path) and sha256 in (None, sha256_of(path)):
        return path
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    why = ''
    for url in urls:
        part = f'{path}.{zlib.crc32(url.encode())}.part'  # parts of different mirrors are never joined
        for attempt in range(tries):
            try:
                fetch(url, part, timeout)
                if sha256 in (None, sha256_of(part)):
                    os.replace(part, path)
                    return path
                os.remove(part)
                why = f'{url}: what came is another file, by its SHA-256'
            except requests.RequestException as e:
                response = getattr(e, 'response', None)
                status = None if response is None else response.status_code
                why = f'{url}: {type(e).__name__ if status is None else "HTTP " + str(status)}'
                if status is not None and 400 <= status < 500 and status not in (408, 416, 429):
                    break  # it is not there: asking again will not help, another mirror may
            except OSError as e:
                raise UserError(f'could not write {part}: {e.strerror}') from e
            if attempt + 1 < tries:
                time.sleep(2**attempt)
    raise UserError(f'could not download {os.path.basename(path)} ({why}); check the address and the network, or '
                    f'save the file yourself as {path}')


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fetch(url, part, timeout):
    """One attempt. Appends to the part of an earlier one if the server says that it continues there."""
    have = os.path.getsize(part) if os.path.exists(part) else 0
    headers = {'User-Agent': 'folio (a language-model code base)', 'Accept-Encoding': 'identity'}
    headers |= {'Range': f'bytes={have}-'} if have else {}
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        if response.status_code == 416:  # the part is longer than the file: begin again
            os.remove(part)
        response.raise_for_status()
        resumed = have if response.headers.get('Content-Range', '').startswith(f'bytes {have}-') and have else 0
        size = int(response.headers.get('Content-Length', 0))
        with open(part, 'ab' if resumed else 'wb') as f, tqdm(total=resumed + size or None, initial=resumed, unit='B',
                                                              unit_scale=True, desc=url.rsplit('/', 1)[-1]) as bar:
            try:
                while chunk := response.raw.read1(1 << 16):  # what has come, so that a broken transfer keeps it
                    f.write(chunk)
                    bar.update(len(chunk))
            except urllib3.exceptions.HTTPError as e:
                raise requests.ConnectionError(str(e)) from e
        if size and os.path.getsize(part) != resumed + size:
            raise requests.ConnectionError(f'{os.path.getsize(part)} of {resumed + size} bytes arrived')
