"""
Write data sets as token files, whole or not at all: documents in memory, or a corpus of any size.
    python prepare/fineweb/prepare.py --source='my/*.parquet' --dataset=mine

Both leave a folder with train.bin, val.bin, tokenizer.json and meta.json.

A source file of a corpus is .parquet, .jsonl, .ndjson or .json (an object on each line) or .txt,
and may be compressed: .gz, .bz2, .xz, .zst. It becomes a part, parts/<hash>.tokens, whole or not at
all. So a run that was killed continues with the files that have no part, and several machines can
share the files. The hash covers a file's name and size, a local file's date, and all else that
decides its tokens: a part stays valid when other files come, go or are repaired. The last run joins
the parts; for a while, they and the result take twice the space.
"""
import collections
import concurrent.futures
import contextlib
import functools
import glob
import io
import itertools
import json
import os
import re
import shutil
import sys
from typing import NamedTuple

import fsspec
import numpy as np
from tqdm import tqdm

import folio.tokenizer
from folio import bpe
from folio.configurator import UserError, notice
from folio.download import hub_errors
from folio.log import only_one
from folio.tokenizer import EOT

TOKEN_FILE = re.compile(r'(train|val|test)(\.mask)?\.bin')
BUFFER = 2**20  # bytes read at a time
PACKINGS = ('gzip', 'bz2', 'xz', 'zstd')  # fsspec's names for .gz, .bz2, .xz, .zst


# ---- A folder of token files ---------------------------------------------------------------------
def new_meta(tokenizer, source):
    """Return the meta.json of a data set whose splits are still to be counted."""
    return {
        'tokenizer': {
            'kind': tokenizer.spec['kind'],
            'file': 'tokenizer.json',
            'hash': folio.tokenizer.spec_hash(tokenizer.spec),
        },
        'vocab_size': tokenizer.n_vocab,
        'eot': tokenizer.eot,
        # Little-endian on every machine; two bytes where the vocabulary fits into them.
        'dtype': '<u2' if tokenizer.n_vocab <= 2**16 else '<u4',
        'source': source,
        'splits': {},
    }


def read_meta(folder):
    """Return the meta.json of a folder, {} if there is none. Raises UserError if it is damaged."""
    path = os.path.join(folder, 'meta.json')
    try:
        with open(path, encoding='utf-8') as f:
            return json.load(f)
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise UserError(f'{path} is damaged ({e}): remove {folder} to make it again') from None


def write_json(path, value, run):
    with whole(path, run) as f:
        f.write(json.dumps(value, indent=2).encode())


@contextlib.contextmanager
def whole(path, run):
    """Open a binary file that gets its name when it is complete.

    run: a name that no other run has which writes the same file now; see `name_of_run`.
    """
    temporary = f'{path}.{run}.tmp'  # if the run is killed, the next of this name overwrites it
    try:
        with open(temporary, 'wb') as f:
            yield f
            # Sync before the rename, or a power cut could leave the name without its contents.
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:  # for example a full disk: free what this file took
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def require_ours(folder):
    """Raise UserError if a folder contains files that are not from our data sets."""
    if not os.path.isdir(folder) or {'tokenizer', 'dtype', 'splits'} <= read_meta(folder).keys():
        return
    for name in os.listdir(folder):
        # A killed run may have left these two, and a Mac its .DS_Store.
        if name not in ('parts', 'new') and not name.startswith('.'):
            raise UserError(f'{folder} contains {name}, which folio did not write; '
                            'give another --dataset')


def empty_folder(folder):
    """Return <folder>/new, made empty, in which a data set can be written; see `publish`."""
    new = os.path.join(folder, 'new')
    shutil.rmtree(new, ignore_errors=True)
    os.makedirs(new)
    return new


def publish(folder, tokenizer, meta):
    """Move the token files of a data set from <folder>/new to the folder."""
    new = os.path.join(folder, 'new')
    folio.tokenizer.save(tokenizer, os.path.join(new, 'tokenizer.json'))
    write_json(os.path.join(new, 'meta.json'), meta, run='join')
    # meta.json goes first: if we die half-way, its token counts will not match the files.
    names = sorted(os.listdir(new), key=lambda name: name != 'meta.json')
    for name in os.listdir(folder):
        if TOKEN_FILE.fullmatch(name) and name not in names:  # of an earlier data set
            os.remove(os.path.join(folder, name))
    for name in names:
        os.replace(os.path.join(new, name), os.path.join(folder, name))
    os.rmdir(new)


# ---- Documents in memory -------------------------------------------------------------------------
def write_dataset(folder, tokenizer, splits, source, words=None, template=None):
    """Tokenize documents and write them as a data set, whole or not at all; return its meta.

    splits: {'train': [document, ...], ...}. A document is a str, or a pair (prompt, answer), where
    only the answer is a target, which <split>.mask.bin marks. Each document starts with the
    end-of-text token, if the tokenizer has one.
    source: where the documents came from, for meta.json.
    words: {'train': number of words, ...}, if a perplexity per word is wanted.
    template: the prompt around a user's question, which replaces its {}; for sample.py --chat.
    Raises UserError if the folder is someone else's, or cannot be written.
    """
    require_ours(folder)
    meta = new_meta(tokenizer, source)
    if template is not None:
        meta['template'] = template
    try:
        new = empty_folder(folder)
        for split, documents in splits.items():
            path = os.path.join(new, f'{split}.bin')
            counts = write_split(path, documents, tokenizer, meta['dtype'])
            if words:
                counts['words'] = words[split]
            meta['splits'][split] = counts
        publish(folder, tokenizer, meta)
    except OSError as e:
        shutil.rmtree(os.path.join(folder, 'new'), ignore_errors=True)  # make room
        raise UserError(f'could not write {folder} ({e.strerror or e}); '
                        'make room and run this again') from e
    return meta


def write_split(path, documents, tokenizer, dtype):
    """Write <split>.bin and, if not all tokens are targets, its mask; return the counts."""
    encoded = [encode_document(tokenizer, document) for document in documents]
    tokens = np.concatenate([ids for ids, _ in encoded])
    mask = np.concatenate([is_target for _, is_target in encoded])
    n_bytes = bytes_of_tokens(tokenizer)[tokens]
    tokens.astype(dtype).tofile(path)
    counts = {'tokens': len(tokens), 'documents': len(documents), 'bytes': int(n_bytes.sum())}
    if not mask.all():
        mask.tofile(path.removesuffix('.bin') + '.mask.bin')
        counts['targets'] = int(mask[1:].sum())  # nothing predicts the first token
        counts['target_bytes'] = int(n_bytes[mask == 1].sum())
    return counts


def bytes_of_tokens(tokenizer):
    """Return how many bytes of text each token stands for: (vocab_size,)."""
    n_bytes = [len(tokenizer.decode_bytes([i])) for i in range(tokenizer.n_vocab)]
    if tokenizer.eot is not None:
        n_bytes[tokenizer.eot] = 0  # it separates texts, and belongs to none
    return np.array(n_bytes)


def encode_document(tokenizer, document):
    """Return (tokens, mask) of a document, arrays of the same length; the mask is 1 for targets."""
    prompt = ''
    answer = document
    if isinstance(document, tuple):
        prompt, answer = document
    start = []
    if tokenizer.eot is not None:
        start.append(tokenizer.eot)  # a target: it ends the document before this one
    prompt_ids = tokenizer.encode(prompt)
    answer_ids = tokenizer.encode(answer)
    tokens = start + prompt_ids + answer_ids
    mask = [1] * len(start) + [0] * len(prompt_ids) + [1] * len(answer_ids)
    return np.array(tokens, dtype=np.uint32), np.array(mask, dtype=np.uint8)


def without_blank_ends(text):
    """Return a text without blank lines at its ends; the first line keeps its indentation.

    >>> without_blank_ends('\\n  if x:\\n    return 1\\n\\n')
    '  if x:\\n    return 1'
    """
    return re.sub(r'\A\s*\n', '', text).rstrip()


# ---- The source files of a corpus ----------------------------------------------------------------
class Form(NamedTuple):
    """How files hold their documents."""
    column: str = 'text'  # of a .parquet, or the key of a .jsonl
    separator: str = ''  # the line between the documents of a .txt; '': it is one document
    skip_bad: bool = False  # leave out rows that hold no text; a .txt has no rows


def find_sources(pattern, folder, form):
    """Return ({file: its bytes} for the files that match a pattern, the hub's commit or '').

    pattern: 'my/*.parquet', 'hf://datasets/owner/name/*.parquet', or of another fsspec store.
    Each file is listed once, whatever names it has, and its first row can be read.
    folder: of the data set. The first run into it decides the commit, so that all runs and workers
    read the same text.
    Raises UserError if nothing matches, or for a file that cannot be read.
    """
    address = pattern
    commit = ''
    with hub_errors(f'{pattern} could not be listed', 'give --source=files that can be read'):
        if pattern.startswith('hf://'):
            address, commit = at_commit(pattern, folder)
        if '://' in pattern:
            store, path = fsspec.core.url_to_fs(address)
            found = store.glob(path, detail=True)
            files = {store.unstrip_protocol(name): facts['size']
                     for name, facts in found.items() if facts['type'] == 'file'}
        else:
            files = {name: os.path.getsize(name) for name in local_files(pattern)}
    if not files:
        raise UserError(f'no file is called {pattern}; --source takes a pattern, such as '
                        "'my/*.parquet', where [[] stands for [")

    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # because a hub answers slowly
        has_eot = list(pool.map(lambda file: EOT in first_text(file, form), files))
    for file, found in zip(files, has_eot):
        if '.txt' in os.path.basename(file).lower() and found and not form.separator:
            notice(f'{file} contains {EOT}, but stays one document; if lines of it separate '
                   f"documents, give --separator='{EOT}'")
            break
    return files, commit


def local_files(pattern):
    """Return the files that match a pattern, sorted, each once, however many links lead to it."""
    pattern = os.path.expanduser(pattern).replace(os.sep, '/')
    found = [pattern]
    if not os.path.lexists(pattern):  # 'a[1].txt' is a name, and also a pattern that matches a1.txt
        found = glob.glob(pattern, recursive=True)
    files = {}
    for path in sorted(found):
        if not os.path.isdir(path):
            facts = os.stat(path)  # an error for a broken link
            files.setdefault((facts.st_dev, facts.st_ino), path)
    return list(files.values())


def at_commit(pattern, folder):
    """Return (a pattern 'hf://…' that names a commit, the commit).

    The commit is the one that an earlier run into the folder recorded, or else the newest.
    """
    from huggingface_hub import HfApi, HfFileSystem, constants
    place = HfFileSystem().resolve_path(pattern)
    commit = pinned_commit(pattern, folder)
    if not commit:
        info = HfApi().repo_info(place.repo_id, repo_type=place.repo_type, revision=place.revision)
        commit = info.sha
    kind = constants.REPO_TYPES_URL_PREFIXES.get(place.repo_type, '')
    return f'hf://{kind}{place.repo_id}@{commit}/{place.path_in_repo}', commit


def pinned_commit(pattern, folder):
    """Return the commit that an earlier run into a folder recorded for a pattern, or ''."""
    for place in (os.path.join(folder, 'parts'), folder):
        source = read_meta(place).get('source')
        if isinstance(source, dict) and source.get('pattern') == pattern:
            return source['revision']
    return ''


# ---- Reading -------------------------------------------------------------------------------------
def first_text(file, form):
    """Return the first text of a file, or ''. Raises UserError, also if all rows are broken."""
    for texts, n_bad in read(file, form, tqdm(disable=True)):
        if texts:
            return texts[0][0]
        if n_bad:
            raise UserError(f'{file}: no row holds text; is it in another --column?')
    return ''


def read(file, form, bar):
    """Yield (documents of a file, how many broken rows were left out), at least once.

    The documents are pairs (text, whether a document begins there), for about a million characters.
    bar: a progress bar of bytes, which advances by the size of the file. Raises UserError.
    """
    before = bar.n
    texts = []
    n_chars = 0
    n_bad = 0
    with opened(file) as raw:
        after = before + raw.seek(0, os.SEEK_END)
        raw.seek(0)
        for place, get, is_new in rows_of(raw, file, form):
            try:
                text = get()
                if not isinstance(text, str | None):
                    raise ValueError(f'{form.column} is {type(text).__name__}, not text; name '
                                     'another with --column=')
            except ValueError as e:
                if not form.skip_bad:
                    raise UserError(f'{file}, {place}: {e}; or leave such rows out: '
                                    '--skip_bad=True') from None
                n_bad += 1
                continue
            if text:
                texts.append((folio.tokenizer.without_surrogates(text), is_new))
                n_chars += len(text)
            if n_chars >= bpe.CHUNK_CHARS:
                yield texts, n_bad
                texts = []
                n_chars = 0
                n_bad = 0
                bar.update(before + raw.tell() - bar.n)
        yield texts, n_bad
        bar.update(after - bar.n)


@contextlib.contextmanager
def opened(file):
    """Open a file as bytes, local or remote; whatever goes wrong with it becomes a UserError."""
    remedy = 'fetch it again, convert it to UTF-8, or leave it out'
    with hub_errors(f'{file} could not be read', remedy):
        if '://' in file:
            store, path = fsspec.core.url_to_fs(file)
            raw = store.open(path, 'rb')
        else:
            raw = open(file, 'rb', buffering=0)
        with io.BufferedReader(raw, BUFFER) as buffered:
            yield buffered


def rows_of(raw, file, form):
    """Return the rows of an open file, by the ending of its name: what one of READERS yields."""
    if raw.peek(30).startswith(b'version https://git-lfs'):
        raise UserError(f'{file} is not there yet: git lfs pull fetches it')
    name = file.lower()
    stream = raw
    packing = fsspec.utils.infer_compression(name)
    if packing in PACKINGS:  # but not zip, which may hold many files
        if not raw.peek(1):
            raise ValueError('it has 0 bytes, but even an empty text has some when compressed')
        stream = io.BufferedReader(fsspec.compression.compr[packing](raw, mode='rb'), BUFFER)
        name, _ = os.path.splitext(name)
    _, ending = os.path.splitext(name)
    if ending not in READERS:
        raise UserError(f'{file} is none of {", ".join(READERS)}, compressed or not')
    if ending == '.parquet':
        return read_parquet(stream, form, file)
    if ending == '.json' and stream.peek(1).lstrip().startswith(b'['):
        raise UserError(f'{file} is one list; one object a line is needed: jq -c ".[]" {file}')
    return READERS[ending](stream, form)


def open_zstd(raw, mode='rb'):
    import pyarrow
    # By pyarrow, because Python itself reads this format only from 3.14 on.
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode='r'), 'zstd')


fsspec.compression.register_compression('zstd', open_zstd, 'zst', force=True)


# For each row a reader yields three things: its place, for a message; a function that returns its
# text or None, or raises what is wrong with it; and whether a document begins there.

def read_parquet(stream, form, file):
    import pyarrow.parquet
    # Both options save memory. With pre_buffer, pyarrow keeps everything it has read until the file
    # is closed. Without buffer_size, it reads a column of a whole row group at once, and a row
    # group may be as large as the file.
    parquet = pyarrow.parquet.ParquetFile(stream, pre_buffer=False, buffer_size=BUFFER)
    try:
        require_column(form.column, parquet.schema_arrow.names)
    except ValueError as e:
        raise UserError(f'{file}: {e}') from None
    number = 0
    for batch in parquet.iter_batches(64, columns=[form.column]):  # few, because a row can be large
        for value in batch.column(0):
            number += 1
            yield f'row {number}', value.as_py, True


def read_lines(lines, form):
    for number, line in enumerate(lines, 1):
        if not line.isspace():
            yield f'line {number}', functools.partial(text_in, line, form.column), True


def text_in(line, column):
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f'it is {type(row).__name__}, not an object')
    require_column(column, row)
    return row[column]


def require_column(column, names):
    if column not in names:
        raise ValueError(f'it has no {column}; with --column=, name one of {", ".join(names)}')


def read_text(stream, form):
    text = io.TextIOWrapper(stream, 'utf-8-sig')  # in which all line ends are \n
    pieces = in_stretches(text)
    if form.separator:
        pieces = between_lines(text, form.separator)
    for piece, is_new in pieces:
        yield 'text', functools.partial(str, piece), is_new


def between_lines(text, separator):
    """Yield the documents of an open text, which separator lines divide."""
    lines = []
    for line in text:
        if line.rstrip() == separator:
            # The last line end belongs to the separator, which is a line of its own.
            yield ''.join(lines).removesuffix('\n'), True
            lines = []
        else:
            lines.append(line)
    yield ''.join(lines), True


def in_stretches(text):
    """Yield an open text as one document, in stretches that give the same tokens as the whole."""
    rest = ''
    is_new = True
    while block := text.read(bpe.CHUNK_CHARS):
        *stretches, rest = bpe.stretches(rest + block)
        for stretch in stretches:
            yield stretch, is_new
            is_new = False
    yield rest, is_new


READERS = {'.parquet': read_parquet, '.jsonl': read_lines, '.ndjson': read_lines,
           '.json': read_lines, '.txt': read_text}


# ---- Tokens --------------------------------------------------------------------------------------
def tokenize(files, bar, tokenizer, form):
    """Yield (file, tokens as an array of uint32) of all files, in order, at least once for each.

    All cores share the work, in pieces of about a million characters. An end-of-text token stands
    in front of every document. Raises what `read` raises, after the tokens of what came before.
    """
    def encode(file, texts):
        ids = []
        for text, is_new in texts:
            if is_new:
                ids.append(tokenizer.eot)
            ids += tokenizer.encode(text)
        return file, np.array(ids, np.uint32)

    n_cores = os.cpu_count()
    if hasattr(os, 'sched_getaffinity'):  # Linux may have given us only some of its cores
        n_cores = len(os.sched_getaffinity(0))
    pending = collections.deque()
    # Threads are enough, because tiktoken releases Python's global lock while it works.
    with concurrent.futures.ThreadPoolExecutor(n_cores) as pool:
        try:
            for file in files:
                n_bad = 0
                for texts, n_bad_here in read(file, form, bar):
                    n_bad += n_bad_here
                    pending.append(pool.submit(encode, file, texts))
                    # Two for each core, one at work and one waiting, so that no core runs dry.
                    if len(pending) > 2 * n_cores:
                        yield pending.popleft().result()
                if n_bad:
                    bar.clear()  # the notice gets a line of its own
                    notice(f'{file}: {n_bad:,} of its rows hold no text and are left out')
        except UserError:
            while pending:
                yield pending.popleft().result()
            raise
        while pending:
            yield pending.popleft().result()


# ---- A corpus ------------------------------------------------------------------------------------
def write_corpus(folder, tokenizer, files, tokens_of, source, val_tokens=0, max_tokens=0,
                 worker=''):
    """Write val.bin, the first val_tokens of a stream, and train.bin, the rest; return the meta.

    files: {source file: its bytes}, in the order of the stream.
    tokens_of(files, bar): yields what `tokenize` above does, for some of the files.
    source: for meta.json: the 'pattern' of the files, their 'revision', and the form's fields.
    val_tokens: 0: a tenth of all, at most 100 M.
    max_tokens: where to cut the stream, counting val.bin too; 0: at its end.
    worker: 'i/n' makes the parts of every n-th file from the i-th on, and returns None. A run
    without it makes the missing parts, and joins all.
    Raises UserError for impossible settings, for a folder that was made with other settings, and
    if the folder cannot be written.
    """
    if tokenizer.eot is None:
        raise UserError('a corpus of many documents needs a tokenizer that can tell them apart: '
                        'gpt2 or a bpe')
    if 0 < max_tokens <= val_tokens:
        raise UserError(f'max_tokens ({max_tokens:,}) leaves nothing to train on '
                        f'next to val_tokens ({val_tokens:,})')
    share = {file: files[file] for file in share_of(worker, list(files))}
    meta = new_meta(tokenizer, source | {'files': [stamp(*item) for item in files.items()],
                                         'val_tokens': val_tokens, 'max_tokens': max_tokens})
    parts = os.path.join(folder, 'parts')
    require_ours(folder)
    done = find_finished(folder, meta)
    if done:
        print(f'{folder} is there already; remove it to make it again')
        for name in ('parts', 'new'):  # left by a run that was killed at its very end
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
        return done
    try:
        os.makedirs(parts, exist_ok=True)
        run = name_of_run(worker)
        with only_one(os.path.join(parts, f'{run}.lock')):
            write_json(os.path.join(parts, 'meta.json'), meta, run)  # for pinned_commit
            paths = make_parts(parts, share, tokens_of, meta=meta, run=run)
            if worker:
                return None
            join(folder, paths, tokenizer, meta)
    except OSError as e:
        shutil.rmtree(os.path.join(folder, 'new'), ignore_errors=True)
        raise UserError(f'could not write {e.filename or folder} ({e.strerror or e}); fix that, '
                        'and the same command continues') from e
    shutil.rmtree(parts, ignore_errors=True)  # after the lock: Windows cannot remove open files
    return meta


def share_of(worker, files):
    """Return the files of worker 'i/n', or all of them for ''. Raises UserError.

    >>> share_of('1/3', ['a', 'b', 'c', 'd', 'e'])
    ['b', 'e']
    """
    if not worker:
        return files
    i, _, n = worker.partition('/')
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise UserError(f'worker is {worker!r}; for the first of four machines, give --worker=0/4')
    return files[int(i)::int(n)]


def name_of_run(worker):
    """Return a name that no other run into a folder has at the same time: 0of4 for worker 0/4."""
    if worker:
        return worker.replace('/', 'of')
    return 'join'


def stamp(file, n_bytes):
    """Return [name, bytes] of a source file, and of a local one the time of its last change."""
    if os.path.exists(file):
        return [file, n_bytes, os.path.getmtime(file)]
    return [file, n_bytes]


def find_finished(folder, fresh):
    """Return the meta of a finished data set, {} if there is none yet.

    Raises UserError if its settings or files are not the same as in `fresh`.
    """
    done = read_meta(folder)
    total = 0
    for split, counts in done.get('splits', {}).items():
        path = os.path.join(folder, f'{split}.bin')
        n_bytes = counts['tokens'] * np.dtype(done['dtype']).itemsize
        if not os.path.exists(path) or os.path.getsize(path) != n_bytes:
            return {}
        total += counts['tokens']
    asked = fresh['source'] | {'val_tokens': fresh['source']['val_tokens'] or a_tenth(total)}
    if done and (done['source'], done['tokenizer']) != (asked, fresh['tokenizer']):
        raise UserError(f'{folder} is there already, with other settings or files; '
                        'remove it, or give another --dataset')
    return done


def a_tenth(n_tokens):
    """Return how many tokens of a stream are for validation by default."""
    return min(100_000_000, max(2, n_tokens // 10))


# ---- Parts ---------------------------------------------------------------------------------------
def make_parts(parts, files, tokens_of, meta, run):
    """Write the missing parts of these files; return the paths of the parts that are needed.

    files: {file: its bytes}. Parts are needed in this order until there are max_tokens.
    """
    source = meta['source']
    paths = {}
    for file, size in files.items():
        decides = [stamp(file, size), source['column'], source.get('separator'),
                   source['max_tokens'], meta['tokenizer']['hash']]
        paths[file] = os.path.join(parts, f'{folio.tokenizer.spec_hash(decides)}.tokens')
    missing = {file: size for file, size in files.items() if not os.path.exists(paths[file])}
    n_bytes = sum(files.values())
    limit = source['max_tokens'] or sys.maxsize
    needed = []
    n_tokens = 0
    with tqdm(desc=os.path.basename(os.path.dirname(parts)), unit='B', unit_scale=True,
              total=n_bytes, initial=n_bytes - sum(missing.values())) as bar:
        stream = with_count(tokens_of(missing, bar), bar)
        by_file = itertools.groupby(stream, key=lambda item: item[0])
        for file, path in paths.items():
            if n_tokens >= limit:
                break
            if file in missing:
                _, of_file = next(by_file)
                write_part(path, of_file, meta['dtype'], limit=limit, run=run)
            needed.append(path)
            n_tokens += tokens_in(path, meta)
    return needed


def with_count(stream, bar):
    """Yield what `tokenize` yields, and show on its bar how many tokens there are."""
    n_tokens = 0
    for file, tokens in stream:
        yield file, tokens
        n_tokens += len(tokens)
        bar.set_postfix_str(f'{n_tokens / 1e6:,.1f} M tokens', refresh=False)


def write_part(path, stream, dtype, limit, run):
    """Write the tokens of a file, but at most `limit`, whole or not at all."""
    n_tokens = 0
    with whole(path, run) as f:
        for _, tokens in stream:
            tokens = tokens[:limit - n_tokens]
            f.write(tokens.astype(dtype).tobytes())
            n_tokens += len(tokens)
            if n_tokens >= limit:
                break


def tokens_in(path, meta):
    """Return how many tokens a part has."""
    return os.path.getsize(path) // np.dtype(meta['dtype']).itemsize


def join(folder, paths, tokenizer, meta):
    """Write the parts as val.bin and train.bin, count them into the meta, and publish the set."""
    total = sum(tokens_in(path, meta) for path in paths)
    total = min(total, meta['source']['max_tokens'] or total)
    n_val = meta['source']['val_tokens'] or a_tenth(total)
    if n_val < 2 or total - n_val < 2:  # a split needs an input and its target
        remedy = 'give more text'
        if total >= 4:
            remedy += f', or --val_tokens={a_tenth(total)}'
        raise UserError(f'{total:,} tokens in all are too few for two splits, if val_tokens is '
                        f'{n_val:,}: {remedy}')
    meta['source']['val_tokens'] = n_val
    new = empty_folder(folder)
    blocks = blocks_of(paths, meta['dtype'])
    rest = np.array([], meta['dtype'])  # of a block that ends in the next split
    for split, n_missing in (('val', n_val), ('train', total - n_val)):
        counts = np.zeros(tokenizer.n_vocab, np.int64)  # of each token
        with open(os.path.join(new, f'{split}.bin'), 'wb') as f:
            while n_missing > 0:
                block = rest if len(rest) else next(blocks)
                tokens = block[:n_missing]
                rest = block[n_missing:]
                f.write(tokens.tobytes())
                counts += np.bincount(tokens, minlength=tokenizer.n_vocab)
                n_missing -= len(tokens)
            f.flush()
            os.fsync(f.fileno())
        meta['splits'][split] = {'tokens': int(counts.sum()),
                                 'documents': int(counts[tokenizer.eot]),
                                 'bytes': int(counts @ bytes_of_tokens(tokenizer))}
    publish(folder, tokenizer, meta)


def blocks_of(paths, dtype):
    """Yield the tokens of all parts, in arrays of some millions."""
    for path in tqdm(paths, desc='joining', unit=' parts', delay=2):
        with open(path, 'rb') as f:
            while block := f.read(8 * BUFFER):
                yield np.frombuffer(block, dtype)


def report(folder, meta):
    """Print what a data set contains."""
    for split, counts in meta['splits'].items():
        print(f'{folder}/{split}.bin: {counts["tokens"]:,} tokens '
              f'in {counts["documents"]:,} documents, '
              f'{counts["bytes"] / counts["tokens"]:.2f} bytes a token')
