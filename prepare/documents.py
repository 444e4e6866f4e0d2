"""
Documents: found here or on the hub, streamed, and tokenized by all cores.
    python -c "from prepare.documents import *; print(next(read_chunks('my.jsonl', 'text')))"
"""
import collections
import concurrent.futures.process
import glob
import multiprocessing
import os
import signal
import sys
import threading

from folio.configurator import UserError

KINDS = {'parquet': 'parquet', 'jsonl': 'json', 'json': 'json', 'txt': 'text'}  # names that datasets has for them
COMPRESSED = ('.gz', '.zst', '.xz', '.bz2')
CHUNK = 1_000_000  # characters that a core tokenizes at a time


# ---- Files -----------------------------------------------------------------------------------------------------------
def source_files(pattern):
    """The files of a pattern, sorted: local ones, or the hub's ('hf://datasets/owner/name/folder/*.parquet')."""
    if not pattern.startswith('hf://'):
        files = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    else:
        from huggingface_hub import HfFileSystem
        try:
            files = ['hf://' + path for path in sorted(HfFileSystem().glob(pattern))]
        except Exception as e:  # offline, refused, no such data set: the hub's errors have no common class
            raise UserError(f'{pattern} could not be listed ({first_line(e)}); check the network, or give --source='
                            'files that you have') from e
    if not files:
        raise UserError(f"no file is called {pattern}; --source takes a pattern, for example --source='my/*.parquet'")
    return files


def size_of(file):
    """Bytes of a file, here or on the hub."""
    import fsspec
    fs, path = fsspec.url_to_fs(file)
    return fs.size(path)


def first_line(error):
    return f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}'


# ---- Text, then tokens -----------------------------------------------------------------------------------------------
def read_chunks(file, column):
    """(share of the file read, documents of about CHUNK characters) until it ends; streamed by datasets."""
    import fsspec
    import pyarrow.parquet
    from datasets import load_dataset
    name = file
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    kind = KINDS.get(name.rpartition('.')[2])
    if kind is None:
        raise UserError(f'{file} is none of {", ".join("." + k for k in KINDS)}, compressed or not')
    options = {'parquet': {'columns': [column], 'batch_size': 64}, 'text': {'sample_by': 'document'}}.get(kind, {})
    column = 'text' if kind == 'text' else column
    try:
        with fsspec.open(file) as f:
            parquet = pyarrow.parquet.ParquetFile(f) if kind == 'parquet' else None
            size = parquet.metadata.num_rows if parquet else f.size
            if parquet and column not in parquet.schema_arrow.names:
                raise UserError(f'{file} has no column {column}; it has {", ".join(parquet.schema_arrow.names)}')
        if size == 0:
            return
        read, texts, held, path = 0, [], 0, file if file.startswith('hf://') else glob.escape(file)
        for table in load_dataset(kind, data_files=[path], split='train', streaming=True,
                                  **options).with_format('arrow').iter(batch_size=64):
            for text in filter(None, table[column].to_pylist()):
                texts.append(text)
                held += len(text)
                if held >= CHUNK:
                    yield min(1.0, read / size), texts
                    texts, held = [], 0
                read += 1 if kind == 'parquet' else len(text)
        yield 1.0, texts
    except UserError:
        raise
    except Exception as e:  # a broken file, no such column, a hub out of reach: datasets' errors have no common class
        again = '; what was done so far is kept, and the same command goes on' if file.startswith('hf://') else ''
        raise UserError(f'{file} could not be read ({first_line(e)}){again}') from e


def n_cores():
    """Those that we may use, but at most the 61 that Windows allows a pool."""
    return min(61, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())


def tokenize(file, tokenizer, column='text'):
    """(share of the file done, tokens) in order; by threads, for tiktoken runs outside of Python's lock."""
    def encode(chunk):
        share, texts = chunk
        return share, tokenizer.encode_documents(texts)

    with concurrent.futures.ThreadPoolExecutor(n_cores()) as pool:
        try:
            yield from in_order(pool, encode, read_chunks(file, column))
        except KeyboardInterrupt:
            print('\nstopped; what was finished is kept, and the same command goes on', file=sys.stderr)
            raise


def start_pool():
    """Processes, for work in Python itself; a script uses them under __name__ == '__main__', and by `with`: a pool that
    Python's exit closes can end in "Bad file descriptor" (mended by python/cpython#125492).
    """
    return concurrent.futures.ProcessPoolExecutor(n_cores(), multiprocessing.get_context('spawn'), start_process)


def start_process():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, without which no process shall live on
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def in_order(pool, function, chunks):
    """map(function, chunks) by a pool, while a bounded number of chunks is with it."""
    pending = collections.deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(function, chunk))
            if len(pending) > 2 * n_cores():
                yield pending.popleft().result()
        yield from (future.result() for future in pending)
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError('a process was killed, perhaps for want of memory; the same command goes on') from None
