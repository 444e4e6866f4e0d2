"""
Read documents, from here or from the hub, as a stream, and tokenize them with all cores.
    python -c "from prepare import documents; print(next(documents.read_chunks('a.jsonl', 'text')))"

That prints the share of the file read so far and the first documents of a.jsonl, about a million
characters of them. A file is .parquet, .jsonl, .json or .txt (one document), compressed or not.
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
from folio.download import hub_errors

# What the datasets library calls its reader of each kind of file.
READERS = {'parquet': 'parquet', 'jsonl': 'json', 'json': 'json', 'txt': 'text'}
COMPRESSED = ('.gz', '.zst', '.xz', '.bz2')
CHUNK_CHARS = 1_000_000  # characters that one core tokenizes at a time
ROWS = 64  # read at a time: some documents have megabytes


# ---- Files ---------------------------------------------------------------------------------------
def source_files(pattern):
    """Return the files that match a pattern, sorted: local ones, or the hub's.

    pattern: 'my/*.parquet', or 'hf://datasets/owner/name/folder/*.parquet'. Raises UserError if the
    hub cannot be reached or nothing matches.
    """
    if is_on_hub(pattern):
        files = list_hub_files(pattern)
    else:
        files = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    if not files:
        raise UserError(f'no file is called {pattern}; '
                        "--source takes a pattern, for example --source='my/*.parquet'")
    return sorted(files)


def list_hub_files(pattern):
    """Return the files of the hub that match a pattern 'hf://…'."""
    from huggingface_hub import HfFileSystem
    remedy = 'check the network, or give --source=files that you have'
    with hub_errors(f'{pattern} could not be listed', remedy):
        return ['hf://' + path for path in HfFileSystem().glob(pattern)]


def is_on_hub(file):
    return file.startswith('hf://')


def size_of(file):
    """Return the bytes of a file, here or on the hub."""
    import fsspec
    fs, path = fsspec.url_to_fs(file)
    return fs.size(path)


# ---- Text ----------------------------------------------------------------------------------------
def read_chunks(file, column):
    """Yield (share of the file read, documents of about CHUNK_CHARS characters) until it ends.

    column: where a .parquet or .jsonl file has its documents. Empty documents are left out.
    Raises UserError if the file cannot be read.
    """
    reader = reader_of(file)
    if reader == 'text':
        column = 'text'  # what datasets calls the one column of a text file
    remedy = ''
    if is_on_hub(file):
        remedy = 'what was done so far is kept, and the same command goes on'
    with hub_errors(f'{file} could not be read', remedy):
        size = measure(file, reader, column)
        if size > 0:
            yield from stream_chunks(file, reader, column, size=size)


def reader_of(file):
    """Return the reader for a file, by the ending of its name; raise UserError if there is none."""
    name = file
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    _, _, extension = name.rpartition('.')
    if extension not in READERS:
        known = ', '.join('.' + known for known in READERS)
        raise UserError(f'{file} is none of {known}, compressed or not')
    return READERS[extension]


def measure(file, reader, column):
    """Return how much there is to read: the rows of a .parquet file, the bytes of any other.

    Raises UserError if a .parquet file lacks the column.
    """
    import fsspec
    import pyarrow.parquet
    with fsspec.open(file) as f:
        if reader != 'parquet':
            return f.size
        parquet = pyarrow.parquet.ParquetFile(f)
        columns = parquet.schema_arrow.names
        if column not in columns:
            raise UserError(f'{file} has no column {column}; it has {", ".join(columns)}')
        return parquet.metadata.num_rows


def stream_chunks(file, reader, column, size):
    """Yield (share of the file read, documents); size is what measure returned."""
    from datasets import load_dataset
    options = {}
    if reader == 'parquet':
        options = {'columns': [column], 'batch_size': ROWS}
    elif reader == 'text':
        options = {'sample_by': 'document'}  # the whole file, not one row for each line
    # load_dataset takes a pattern: a local name with a bracket in it has to be escaped.
    path = file if is_on_hub(file) else glob.escape(file)
    rows = load_dataset(reader, data_files=[path], split='train', streaming=True, **options)

    texts = []  # documents not handed out yet
    n_chars = 0  # characters in them
    n_read = 0  # rows (parquet) or characters read before this document
    for table in rows.with_format('arrow').iter(batch_size=ROWS):
        for text in table[column].to_pylist():
            if not text:
                continue
            texts.append(text)
            n_chars += len(text)
            if n_chars >= CHUNK_CHARS:
                # Characters are not bytes, and those of a compressed file are more: the share of
                # anything but a parquet file is a guess.
                yield min(1.0, n_read / size), texts
                texts = []
                n_chars = 0
            n_read += 1 if reader == 'parquet' else len(text)
    yield 1.0, texts


# ---- Tokens --------------------------------------------------------------------------------------
def tokenize(file, tokenizer, column='text'):
    """Yield (share of the file done, tokens as an array of uint32), in order.

    Every document follows an end-of-text token.
    """
    def encode(chunk):
        share, texts = chunk
        return share, tokenizer.encode_documents(texts)

    # Threads are enough: tiktoken releases Python's lock while it works.
    with concurrent.futures.ThreadPoolExecutor(n_cores()) as pool:
        try:
            yield from in_order(pool, encode, read_chunks(file, column))
        except KeyboardInterrupt:
            print('\nstopped; what was finished is kept, and the same command goes on',
                  file=sys.stderr)
            raise


# ---- All cores -----------------------------------------------------------------------------------
def n_cores():
    """Return how many cores this process may use, but at most 61."""
    if hasattr(os, 'sched_getaffinity'):  # Linux: we may have been given a few of many
        n = len(os.sched_getaffinity(0))
    else:
        n = os.cpu_count()
    return min(61, n)  # Windows allows a pool no more


def start_pool():
    """Return a pool of processes, for work that holds Python's lock.

    A script may start one only under `if __name__ == '__main__':`, because each process imports the
    script. Use it in a `with`: a pool that is closed by Python's exit can end in "Bad file
    descriptor" (mended by python/cpython#125492).
    """
    context = multiprocessing.get_context('spawn')
    return concurrent.futures.ProcessPoolExecutor(n_cores(), context, initializer=start_process)


def start_process():
    """Let the parent handle Ctrl-C, and exit when it does. Each process of the pool begins so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)  # sys.exit would end this thread only


def in_order(pool, function, chunks):
    """Yield function(chunk) for each chunk, in order, computed by a pool.

    Only a few chunks are in memory at a time, so `chunks` may be a stream without end.
    Raises UserError if a process of the pool is killed.
    """
    pending = collections.deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(function, chunk))
            # Two for each core, one at work and one waiting, so that no core runs dry.
            if len(pending) > 2 * n_cores():
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError('a process was killed, perhaps for want of memory; '
                        'the same command goes on') from None
