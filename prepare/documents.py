"""
Read documents as a stream, from local files or the hub, and tokenize them on all cores.
    python -c "from prepare.documents import read_chunks; print(*read_chunks('my.txt', 'text'))"

That prints the documents in my.txt, about a million characters at a time, each time with a mark
that says how far the file has been read. A file is .parquet, .jsonl or .ndjson (one object on each
line), .json (the same, or one list of objects) or .txt (one document). All but .parquet may be
compressed: .gz, .bz2, .xz or .zst.

Reading can go on from the mark of an earlier reading. The documents before a broken row are always
handed out before the error is raised.
"""
import bz2
import codecs
import collections
import concurrent.futures.process
import contextlib
import glob
import gzip
import io
import itertools
import json
import lzma
import multiprocessing
import os
import signal
import sys
import threading
from typing import NamedTuple

from folio.configurator import UserError
from folio.download import hub_errors
from folio.tokenizer import without_surrogates

CHUNK_CHARS = 1_000_000  # characters that one core tokenizes at a time
# Fewer chunks than this are soon done without a pool of processes. Two cores of an Intel Xeon count
# the pieces of 8 chunks in 0.77 s without a pool and 0.92 s with one, of 12 in 1.2 s either way, of
# 24 in 2.3 s and 1.8 s (2026-11-26). With more cores a pool pays sooner.
FEW_CHUNKS = 8
ROWS = 64  # rows of a .parquet read at a time; few, because some documents have megabytes
BUFFER = 2**20  # bytes read at a time


# ---- Files ---------------------------------------------------------------------------------------
def source_files(pattern):
    """Return the files that match a pattern, sorted: local ones, or the hub's.

    pattern: 'my/*.parquet', or 'hf://datasets/owner/name/folder/*.parquet'. Raises UserError if the
    hub cannot be reached or nothing matches.
    """
    if is_on_hub(pattern):
        files = list_hub_files(pattern)
    else:
        files = list_local_files(os.path.expanduser(pattern))
    if not files:
        raise UserError(f'no file is called {pattern}; '
                        "--source takes a pattern, for example --source='my/*.parquet'")
    return sorted(files)


def list_local_files(pattern):
    if os.path.isfile(pattern):  # a name like 'a[1].txt' is also a pattern, which matches a1.txt
        return [pattern]
    return [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]


def list_hub_files(pattern):
    """Return the files on the hub that match a pattern 'hf://…'; raise UserError."""
    from huggingface_hub import HfFileSystem
    remedy = 'check the network, or give --source=files that you have'
    with hub_errors(f'{pattern} could not be listed', remedy):
        return ['hf://' + path for path in HfFileSystem().glob(pattern)]


def is_on_hub(file):
    return file.startswith('hf://')


def newest_revision(pattern):
    """Return the commit that a pattern 'hf://…' refers to at this moment; raise UserError."""
    from huggingface_hub import HfApi, HfFileSystem
    remedy = 'check the network, or give --source=files that you have'
    with hub_errors(f'{pattern} could not be found', remedy):
        place = HfFileSystem().resolve_path(pattern)
        info = HfApi().repo_info(place.repo_id, repo_type=place.repo_type, revision=place.revision)
    return info.sha


def at_revision(pattern, revision):
    """Return a pattern 'hf://…' that names a commit, in place of a branch or of nothing.

    'hf://datasets/owner/name/*.parquet' becomes 'hf://datasets/owner/name@<commit>/*.parquet'.
    """
    from huggingface_hub import HfFileSystem, constants
    place = HfFileSystem().resolve_path(pattern)
    kind = constants.REPO_TYPES_URL_PREFIXES.get(place.repo_type, '')
    return f'hf://{kind}{place.repo_id}@{revision}/{place.path_in_repo}'


def size_of(file):
    """Return the size in bytes of a file, local or on the hub."""
    if not is_on_hub(file):
        return os.path.getsize(file)
    from huggingface_hub import HfFileSystem
    with hub_errors(f'{file} could not be found'):
        return HfFileSystem().size(file)


def open_file(file):
    """Return an open binary file, local or on the hub."""
    if is_on_hub(file):
        from huggingface_hub import HfFileSystem
        return HfFileSystem().open(file, 'rb')
    return open(file, 'rb', buffering=0)  # unpack puts a buffer on top


# ---- Compression ---------------------------------------------------------------------------------
def open_zstd(raw):
    import pyarrow
    # By pyarrow, because Python itself reads this format only from 3.14 on.
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode='r'), 'zstd')


UNPACK = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open, '.zst': open_zstd}


def unpack(raw, file):
    """Return the contents of an open file as a binary stream, unpacked if its name says so."""
    _, ending = os.path.splitext(file.lower())
    stream = UNPACK[ending](raw) if ending in UNPACK else raw
    return io.BufferedReader(stream, BUFFER)


def skip(stream, n_bytes):
    """Move a new stream n_bytes on from its beginning."""
    if stream.seekable():
        stream.seek(n_bytes)
        return
    # The unpacked bytes of a .zst can only be read and thrown away.
    n_left = n_bytes
    while n_left > 0:
        block = stream.read(min(n_left, BUFFER))
        if not block:
            break
        n_left -= len(block)


# ---- Documents -----------------------------------------------------------------------------------
class Mark(NamedTuple):
    """How far a file has been read."""
    row: int = 0  # rows or lines so far; of a .txt, which is one document, 0 or 1
    offset: int = 0  # bytes so far, unpacked; only in files of lines
    share: float = 0.0  # of the file, for a progress bar
    n_bad: int = 0  # broken rows left out since the mark before


def read_chunks(file, column, row=0, offset=0, skip_bad=False):
    """Yield (mark, list of documents, together about CHUNK_CHARS characters) to the file's end.

    column: the column of a .parquet, or the key of a .jsonl, that holds the documents. Empty ones
    are left out.
    row, offset: those of the mark where an earlier reading stopped.
    skip_bad: leave out rows that hold no text, and count them, instead of raising an error.
    Raises UserError if the file or a row of it cannot be read, after it has yielded the documents
    before that.
    """
    read_rows = reader_of(file)
    end = Mark(row, offset)  # after the last row that was read
    texts = []  # documents not yielded yet
    n_chars = 0  # characters in them
    n_bad = 0
    error = None
    try:
        with reading(file), contextlib.closing(read_rows(file, column, end)) as rows:
            for mark, text, problem in rows:
                if problem and not skip_bad:
                    raise UserError(f'{file} could not be read: {problem}; mend that, or leave '
                                    'such rows out and count them: --skip_bad=True')
                if problem:
                    n_bad += 1
                elif text:
                    texts.append(text)
                    n_chars += len(text)
                end = mark
                if n_chars >= CHUNK_CHARS:
                    yield end._replace(n_bad=n_bad), texts
                    texts = []
                    n_chars = 0
                    n_bad = 0
    except UserError as e:
        error = e
    # The last documents come with the mark of the file's end, or of the row before the error, so
    # that the caller can keep them and go on from there.
    yield end._replace(n_bad=n_bad), texts
    if error is not None:
        raise error


def reading(file):
    """Return a context that turns any error of reading a file into a UserError."""
    remedy = ''
    if is_on_hub(file):
        remedy = 'what was done so far is kept, and the same command goes on'
    return hub_errors(f'{file} could not be read', remedy)


def reader_of(file):
    """Return the reader for a file, by the ending of its name; raise UserError if there is none.

    A reader(file, column, start) yields (mark after the row, text, problem) for each row after the
    mark `start`. The problem is '', or why the row holds no text: 'line 5: text is int, not text'.
    """
    name = file.lower()
    _, ending = os.path.splitext(name)
    if ending in UNPACK:
        name = name.removesuffix(ending)
        _, ending = os.path.splitext(name)
        if ending == '.parquet':
            raise UserError(f'{file}: a .parquet is compressed inside; unpack it first')
    if ending not in READERS:
        raise UserError(f'{file} is none of {", ".join(READERS)}, compressed or not')
    return READERS[ending]


def read_parquet(file, column, start):
    """Yield (mark, text, problem) of each row of a .parquet file."""
    import pyarrow.parquet
    with open_file(file) as raw:
        # Both options save memory. With pre_buffer, pyarrow keeps everything it has read until the
        # file is closed. Without buffer_size, it reads a column of a whole row group at once, and a
        # row group may be as large as the file.
        parquet = pyarrow.parquet.ParquetFile(raw, pre_buffer=False, buffer_size=BUFFER)
        require_text(file, parquet.schema_arrow, column)
        n_rows = parquet.metadata.num_rows
        # Pass over the row groups before the start: from the hub, they need not even be fetched.
        row = 0
        group = 0  # the row group to start in
        while group < parquet.num_row_groups:
            n_in_group = parquet.metadata.row_group(group).num_rows
            if row + n_in_group > start.row:
                break
            row += n_in_group
            group += 1
        groups = range(group, parquet.num_row_groups)
        for batch in parquet.iter_batches(ROWS, row_groups=groups, columns=[column]):
            for value in batch.column(0):
                row += 1
                if row <= start.row:
                    continue
                text = ''
                problem = ''
                try:
                    text = value.as_py()
                except UnicodeDecodeError as e:  # pyarrow does not check what a file calls UTF-8
                    problem = f'row {row}: {e}'
                yield Mark(row, share=row / n_rows), text, problem


def require_text(file, schema, column):
    """Raise UserError unless a file with this schema has text in the column."""
    import pyarrow
    if column not in schema.names:
        raise UserError(f'{file} has no column {column}; it has {", ".join(schema.names)}')
    kind = schema.types[schema.names.index(column)]
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    # A column of the type null has no values, so no documents; the next file's may have some.
    text_types = (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.null())
    if kind not in text_types:
        raise UserError(f'{file}: the column {column} holds {kind}, not text; '
                        'name another by --column=')


def read_lines(file, column, start):
    """Yield (mark, text, problem) of each line of a .jsonl file."""
    with open_file(file) as raw:
        size = max(1, size_of(file))
        lines = unpack(raw, file)
        skip(lines, start.offset)
        row = start.row
        offset = start.offset
        for line in lines:
            row += 1
            offset += len(line)
            text = ''
            problem = ''
            if not line.isspace():
                try:
                    text = text_of(json.loads(line), column)
                except (ValueError, RecursionError) as e:
                    problem = f'line {row}: {reason_of(e)}'
            # raw.tell() counts bytes of the file itself, which may be compressed, and is ahead of
            # the line by what is buffered: good enough for a progress bar.
            yield Mark(row, offset, share=min(1.0, raw.tell() / size)), text, problem


def read_json(file, column, start):
    """Yield (mark, text, problem) of each object in a .json: one on each line, or all in a list."""
    with open_file(file) as raw:
        contents = unpack(raw, file)
        # Neither a byte order mark nor white space tells which of the two it is.
        beginning = contents.read(100).removeprefix(codecs.BOM_UTF8).lstrip()
    if not beginning.startswith(b'['):
        yield from read_lines(file, column, start)
        return
    with open_file(file) as raw:
        rows = json.load(unpack(raw, file))
    for row, value in enumerate(rows, 1):
        if row <= start.row:
            continue
        text = ''
        problem = ''
        try:
            text = text_of(value, column)
        except ValueError as e:
            problem = f'object {row}: {e}'
        yield Mark(row, share=row / len(rows)), text, problem


def text_of(row, column):
    """Return the text in a column of a decoded row, '' for null; raise ValueError if there is none.

    Half a surrogate pair, which JSON may hold, becomes U+FFFD.
    """
    if not isinstance(row, dict):
        raise ValueError(f'it is {type(row).__name__}, not an object')
    if column not in row:
        raise ValueError(f'it has no {column}; it has {", ".join(list(row)[:20])}')
    text = row[column]
    if text is None:
        return ''
    if not isinstance(text, str):
        raise ValueError(f'{column} is {type(text).__name__}, not text')
    return without_surrogates(text)


def reason_of(error):
    """Return what is wrong with a line, for a message in which the caller names the line."""
    if isinstance(error, json.JSONDecodeError):
        message = error.msg.removesuffix(' at')  # as in 'Invalid control character at'
        return f'{message} at character {error.pos + 1}'
    if isinstance(error, RecursionError):
        return 'it is nested too deeply'
    return str(error)


def read_text(file, column, start):
    """Yield (mark, text, problem) of a .txt file: one document, whose line ends become \\n."""
    if start.row > 0:
        return
    with open_file(file) as raw:
        contents = unpack(raw, file).read()
    text = ''
    problem = ''
    try:
        text = contents.decode('utf-8-sig')
    except UnicodeDecodeError as e:
        problem = f'it is not UTF-8 ({e.reason} at byte {e.start + 1:,})'
    text = text.replace('\r\n', '\n').replace('\r', '\n')
    yield Mark(row=1, share=1.0), text, problem


READERS = {
    '.parquet': read_parquet,
    '.jsonl': read_lines,
    '.ndjson': read_lines,
    '.json': read_json,
    '.txt': read_text,
}


# ---- Tokens --------------------------------------------------------------------------------------
def tokenize(file, tokenizer, column='text', row=0, offset=0, skip_bad=False):
    """Yield (mark, tokens as an array of uint32) for each chunk of read_chunks, in order.

    An end-of-text token stands in front of every document. Raises what read_chunks raises.
    """
    def encode(chunk):
        mark, texts = chunk
        return mark, tokenizer.encode_documents(texts)

    chunks = read_chunks(file, column, row=row, offset=offset, skip_bad=skip_bad)
    # Threads are enough, because tiktoken releases Python's global lock while it works.
    with concurrent.futures.ThreadPoolExecutor(n_cores()) as pool:
        try:
            yield from in_order(pool, encode, chunks)
        except KeyboardInterrupt:
            print('\nstopped; what was finished is kept, and the same command goes on',
                  file=sys.stderr)
            raise


# ---- All cores -----------------------------------------------------------------------------------
def n_cores():
    """Return how many cores this process may use, but at most 61."""
    if hasattr(os, 'sched_getaffinity'):  # Linux may have given us only some of its cores
        n = len(os.sched_getaffinity(0))
    else:
        n = os.cpu_count()
    return min(61, n)  # the most that a pool of processes may have on Windows


def start_pool():
    """Return a pool of processes, for work that holds Python's global lock.

    A script may start one only under `if __name__ == '__main__':`, because each process imports the
    script. Use it in a `with`: a pool that is still open when Python exits can end in "Bad file
    descriptor" (fixed by python/cpython#125492).
    """
    context = multiprocessing.get_context('spawn')
    return concurrent.futures.ProcessPoolExecutor(n_cores(), context, initializer=start_process)


def start_process():
    """Set up a process of the pool: leave Ctrl-C to the parent, and exit when the parent exits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)  # sys.exit would end this thread only


def map_on_all_cores(function, chunks):
    """Yield function(chunk) for each chunk, in order, by a pool of processes if there are many.

    This is for train_bpe, whose chunks have about a million characters. A script may call it where
    it may call start_pool.
    """
    # Starting the processes takes longer than working through a few chunks here.
    chunks = iter(chunks)
    first = list(itertools.islice(chunks, FEW_CHUNKS))
    if len(first) < FEW_CHUNKS or n_cores() == 1:
        yield from map(function, itertools.chain(first, chunks))
        return
    with start_pool() as pool:
        yield from in_order(pool, function, itertools.chain(first, chunks))


def in_order(pool, function, chunks):
    """Yield function(chunk) for each chunk, in order, computed by a pool.

    Only a few chunks are in memory at a time, so `chunks` may be an endless stream. If it raises a
    UserError, that is raised here after the results of the chunks before it.
    Raises UserError if a process of the pool is killed.
    """
    pending = collections.deque()
    error = None
    try:
        try:
            for chunk in chunks:
                pending.append(pool.submit(function, chunk))
                # Two for each core, one at work and one waiting, so that no core runs dry.
                if len(pending) > 2 * n_cores():
                    yield pending.popleft().result()
        except UserError as e:
            error = e
        while pending:
            yield pending.popleft().result()
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError('a process was killed, perhaps for want of memory; '
                        'the same command goes on') from None
    if error is not None:
        raise error
