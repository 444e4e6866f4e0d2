"""
Write data sets as token files, whole or not at all: documents in memory, or a corpus of any size.
    python prepare/fineweb/prepare.py --source='my/*.parquet' --dataset=mine

Both leave a folder with train.bin, val.bin, tokenizer.json and meta.json.

A corpus is appended to val.bin.tmp and train.bin.tmp. Every few million tokens, the run adds a line
to parts/<request>.jsonl that records how far it has come. So a run that was killed continues near
where it stopped, and ends with the same bytes as one that was not.

A worker, which does a share of the source files, writes pieces instead, of a few million tokens
each. The name of a piece tells everything about it: the request, which is a hash of the sources,
the settings and the tokenizer; where in the source files it begins and ends; and how many broken
rows were left out. The run that joins them takes a piece wherever one begins at the place it has
reached, and reads the source files everywhere else.
"""
import contextlib
import glob
import itertools
import json
import math
import os
import platform
import re
import shutil
import time
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import folio.tokenizer
from folio.configurator import UserError
from folio.log import only_one
from prepare import documents

TOKEN_FILE = re.compile(r'(train|val|test)(\.mask)?\.bin')
COMMIT_TOKENS = 2**23  # tokens between two records of progress: a second's work
BLOCK_TOKENS = 2**22  # tokens counted at a time, because counting takes eight bytes for each
BAR_FORMAT = '{desc} {percentage:3.0f}% |{bar}|{postfix}, {remaining} to go'


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


def write_json(path, value):
    """Write a JSON file whole or not at all, even if other machines write the same one."""
    # The name must be this process's own, also among the machines that share a file system.
    temporary = f'{path}.{platform.node()}.{os.getpid()}.tmp'
    try:
        with open(temporary, 'w', encoding='utf-8') as f:
            json.dump(value, f, indent=2)
            # Sync before the rename, or a power cut could leave the name without its contents.
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError:  # such as a full disk, whose last room this file should not keep
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
    sync_folder(os.path.dirname(path))


def sync_folder(folder):
    """Sync the names of a folder's files to the disk, so that a power cut cannot undo a rename."""
    if os.name == 'nt':  # Windows cannot open a folder
        return
    number = os.open(folder or '.', os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def read_json(path):
    """Return the contents of a JSON file, or None if there is no such file."""
    try:
        with open(path, encoding='utf-8') as f:
            return json.load(f)
    except FileNotFoundError:
        return None
    except ValueError as e:
        folder = os.path.dirname(path)
        raise UserError(f'{path} is damaged ({e}): remove {folder} to begin anew') from None


def publish(folder, tokenizer, meta):
    """Write tokenizer.json and meta.json, then rename each <split>.bin.tmp to <split>.bin."""
    folio.tokenizer.save(tokenizer, os.path.join(folder, 'tokenizer.json.tmp'))
    # meta.json goes first: if we die half-way, its token counts will not match the files.
    write_json(os.path.join(folder, 'meta.json'), meta)

    # An earlier data set may have had other splits, or masks. They do not belong to this one.
    for name in os.listdir(folder):
        if TOKEN_FILE.fullmatch(name) and name.removesuffix('.bin') not in meta['splits']:
            os.remove(os.path.join(folder, name))

    names = ['tokenizer.json']
    for split in meta['splits']:
        names += [f'{split}.bin', f'{split}.mask.bin']
    for name in names:
        path = os.path.join(folder, name)
        if os.path.exists(f'{path}.tmp'):
            os.replace(f'{path}.tmp', path)
    sync_folder(folder)


def require_ours(folder):
    """Raise UserError if a folder holds files that are not from a data set of ours.

    What a killed run of ours may have left behind, which is parts/ and *.tmp, is allowed.
    """
    meta = read_json(os.path.join(folder, 'meta.json')) or {}
    if not os.path.isdir(folder) or {'tokenizer', 'vocab_size', 'dtype', 'splits'} <= meta.keys():
        return
    for name in os.listdir(folder):
        if name != 'parts' and not name.endswith('.tmp'):
            raise UserError(f'{folder} holds {name}, which no preparing of ours has left there; '
                            'give another --dataset')


# ---- Documents in memory -------------------------------------------------------------------------
def write_dataset(folder, tokenizer, splits, source, words=None, template=None, learn_end=True):
    """Tokenize documents and write them as a data set, whole or not at all; return its meta.

    splits: {'train': [document, ...], ...}. A document is a str, a pair (prompt, answer), of which
    only the answer is a target, or a list of pairs (text, whether it is a target). <split>.mask.bin
    marks the targets. Each document starts with the end-of-text token, if the tokenizer has one.
    source: where the documents came from, for meta.json.
    words: {'train': number of words, ...}, where a loss per word is wanted.
    template: the prompt around a user's question, which replaces its {}; for sample.py --chat.
    learn_end: whether the end-of-text token is a target. Where an answer is one token, half of the
    loss would be that of the end, which is easy.
    Raises UserError if the folder is someone else's, or cannot be written.
    """
    require_ours(folder)
    meta = new_meta(tokenizer, source)
    if template is not None:
        meta['template'] = template
    try:
        os.makedirs(folder, exist_ok=True)
        remove_unfinished(folder)  # else publish would rename the masks of a killed run too
        for split, documents in splits.items():
            counts = write_split(folder, split, documents, tokenizer, dtype=meta['dtype'],
                                 learn_end=learn_end)
            if words:
                counts['words'] = words[split]
            meta['splits'][split] = counts
        publish(folder, tokenizer, meta)
    except OSError as e:
        remove_unfinished(folder)
        raise UserError(f'could not write {folder} ({e.strerror or e}); '
                        'make room and run this again') from e
    return meta


def write_split(folder, split, documents, tokenizer, dtype, learn_end):
    """Write <split>.bin.tmp and, if not all tokens are targets, its mask; return the counts."""
    pieces = [pieces_of(document) for document in documents]
    encoded = [encode_pieces(tokenizer, each, learn_end) for each in pieces]
    tokens = np.concatenate([document_tokens for document_tokens, _ in encoded])
    mask = np.concatenate([document_mask for _, document_mask in encoded])

    all_bytes = 0
    target_bytes = 0
    for text, is_target in itertools.chain.from_iterable(pieces):
        all_bytes += n_bytes(text)
        if is_target:
            target_bytes += n_bytes(text)
    counts = {'tokens': len(tokens), 'documents': len(pieces), 'bytes': all_bytes}
    tokens.astype(dtype).tofile(os.path.join(folder, f'{split}.bin.tmp'))
    if not mask.all():
        mask.tofile(os.path.join(folder, f'{split}.mask.bin.tmp'))
        counts['targets'] = int(mask[1:].sum())  # nothing predicts the first token
        counts['target_bytes'] = target_bytes
    return counts


def pieces_of(document):
    """Return a document as a list of (text, whether it is a target).

    >>> pieces_of(('What is one?', 'One.'))
    [('What is one?', False), ('One.', True)]
    """
    if isinstance(document, str):
        return [(document, True)]
    if isinstance(document, tuple):
        prompt, answer = document
        return [(prompt, False), (answer, True)]
    return document


def remove_unfinished(folder):
    """Remove the token files that were never published; do nothing if there is no such folder."""
    if not os.path.isdir(folder):
        return
    for name in os.listdir(folder):
        if name.endswith('.bin.tmp'):
            os.remove(os.path.join(folder, name))


def n_bytes(text):
    """Return the length of a text in bytes of UTF-8."""
    # JSON can hold half of a surrogate pair, which plain 'utf-8' refuses.
    return len(text.encode('utf-8', 'surrogatepass'))


def encode_pieces(tokenizer, pieces, learn_end=True):
    """Return (tokens, mask) of a document, arrays of one length; the mask is 1 for targets."""
    tokens = []
    mask = []
    if tokenizer.eot is not None:
        tokens.append(tokenizer.eot)
        mask.append(learn_end)  # it ends the document before this one
    for text, is_target in pieces:
        ids = tokenizer.encode(text)
        tokens += ids
        mask += [is_target] * len(ids)
    return np.array(tokens, dtype=np.uint32), np.array(mask, dtype=np.uint8)


# ---- A corpus ------------------------------------------------------------------------------------
class Position(NamedTuple):
    """A place in the source files, between two rows."""
    file: int = 0  # number of the file
    row: int = 0  # rows of it before this place
    offset: int = 0  # bytes of it before this place, in a file of lines

    def __str__(self):
        return f'{self.file:05}.{self.row}.{self.offset}'


def write_corpus(folder, tokenizer, files, to_tokens, val_tokens, max_tokens=0, worker='',
                 column='text', pattern='', revision=''):
    """Write val.bin, the first val_tokens of a stream, and train.bin, the rest; return the meta.

    files: the source files of the stream, in order.
    to_tokens(file, row=, offset=): yields (mark, tokens) from that place in the file to its end,
    with an end-of-text token in front of each document; see documents.Mark.
    max_tokens: where to cut the stream, counting val.bin too; 0: read all files to the end.
    worker: 'i/n' writes only the pieces of the i-th of n shares of the files, and returns None. A
    run without it joins them later.
    column: the column that to_tokens reads. It is only recorded, to tell data sets apart.
    pattern, revision: the pattern of the source files, and the hub's commit that they are of; see
    find_sources.
    Raises UserError for impossible settings, for a folder that was made with other settings, and
    if the folder cannot be written.
    """
    require_possible(tokenizer, val_tokens, max_tokens)
    share = share_of(worker, len(files))
    fresh = new_meta(tokenizer, source={
        'pattern': pattern,
        'revision': revision,
        'files': file_stamps(files),
        'column': column,
        'val_tokens': val_tokens,
        'max_tokens': max_tokens,
    })
    require_ours(folder)
    parts = os.path.join(folder, 'parts')
    try:
        done = find_finished(folder, fresh)
        if done is None:
            os.makedirs(parts, exist_ok=True)
            with only_one(os.path.join(parts, f'{name_of(worker)}.lock')):
                # Ask again: another run may have finished just before we got the lock.
                done = find_finished(folder, fresh)
                if done is None and worker:
                    return make_pieces(folder, fresh, files, to_tokens, share=share, worker=worker)
                if done is None:
                    meta = join(folder, tokenizer, fresh, files, to_tokens)
            # Only now that the lock is closed: Windows cannot remove an open file. A worker that is
            # still at work may write into parts/ meanwhile, and what it leaves does no harm.
            shutil.rmtree(parts, ignore_errors=True)
    except OSError as e:
        raise UserError(f'could not write {e.filename or folder} ({e.strerror or e}); '
                        'mend that, and the same command goes on') from e
    if done is not None:
        print(f'{folder} is there already; remove it to make it anew')
        return done
    return meta


def require_possible(tokenizer, val_tokens, max_tokens):
    """Raise UserError if documents could not be told apart, or nothing were left to train on."""
    if tokenizer.eot is None:
        raise UserError('a corpus of many documents needs a tokenizer that can tell them apart: '
                        'gpt2 or a bpe')
    if 0 < max_tokens <= val_tokens:
        raise UserError(f'max_tokens ({max_tokens:,}) leaves nothing to train on '
                        f'beside val_tokens ({val_tokens:,})')


def join(folder, tokenizer, meta, files, to_tokens):
    """Write the whole corpus, from pieces where there are any, and publish it; return its meta."""
    parts = os.path.join(folder, 'parts')
    begin(parts, meta)
    with Splits(folder, tokenizer, meta) as splits:
        advance(splits, files, to_tokens, share=range(len(files)))
    if not all(counts['tokens'] >= 2 for counts in meta['splits'].values()):
        # The advice is to change a setting, which begin would refuse while this request is here.
        remove_unfinished(folder)
        shutil.rmtree(parts, ignore_errors=True)
        raise too_few(meta)
    publish(folder, tokenizer, meta)
    os.remove(splits.log_path)  # from here on find_finished counts the set as finished
    return meta


def too_few(meta):
    """Return the UserError for a stream that does not fill both splits."""
    total = sum(counts['tokens'] for counts in meta['splits'].values())
    val_tokens = meta['source']['val_tokens']
    # A split needs at least two tokens: an input and its target.
    if total < 4:
        return UserError(f'{total} tokens in all are too few for two splits: more text is needed')
    if val_tokens < 2:
        return UserError(f'{val_tokens} tokens are too few for validation: give --val_tokens=2')
    return UserError(f'{total:,} tokens in all are too few for {val_tokens:,} of validation: '
                     f'give --val_tokens={max(2, total // 10)}, or more text')


def make_pieces(folder, meta, files, to_tokens, share, worker):
    """Write the pieces of a share of the files, a range of their numbers.

    Return None, or the meta of the data set if another run has finished it meanwhile.
    """
    parts = os.path.join(folder, 'parts')
    begin(parts, meta)
    try:
        with Pieces(parts, meta, name_of(worker), start=Position(share.start)) as pieces:
            advance(pieces, files, to_tokens, share=share)
    except FileNotFoundError:  # a run that finishes the set removes parts/
        done = find_finished(folder, meta)
        if done is None:
            raise
        return done


# ---- What is there already -----------------------------------------------------------------------
def file_stamps(files):
    """Return [name, bytes, time of last change] for each local file, its name for a remote one."""
    stamps = []
    for file in files:
        if os.path.exists(file):
            stamps.append([file, os.path.getsize(file), os.path.getmtime(file)])
        else:
            stamps.append(file)
    return stamps


def request_of(meta):
    """Return what decides the tokens of a corpus: its sources, its settings and its tokenizer."""
    keys = ('files', 'column', 'val_tokens', 'max_tokens')
    source = meta.get('source')
    if not isinstance(source, dict):  # write_dataset wrote this meta, not write_corpus
        source = {}
    return [[source.get(key) for key in keys], meta.get('tokenizer')]


def request_hash(meta):
    """Return the name of a request: 16 hexadecimal digits."""
    return folio.tokenizer.spec_hash(request_of(meta))


def begin(parts, meta):
    """Record a request in parts/; raise UserError if parts/ belongs to another request."""
    request = request_hash(meta)
    for name in os.listdir(parts):
        owner = re.match(r'([0-9a-f]{16})(-.*[.]bin|[.]jsonl)$', name)
        if owner and owner[1] != request:
            raise UserError(f'{parts} is of an unfinished run with other settings or files: '
                            'finish it with those, or remove that folder to begin anew')
    path = os.path.join(parts, f'{request}.json')
    if not os.path.exists(path):
        write_json(path, meta)


def find_finished(folder, fresh):
    """Return the meta of a finished data set, or None if there is none yet.

    Raises UserError if it was made with other settings, or from other files, than those of `fresh`.
    """
    done = read_json(os.path.join(folder, 'meta.json'))
    # While there is a log in parts/, a run is not done: it may have died while publishing.
    logs = glob.glob(os.path.join(glob.escape(folder), 'parts', '*.jsonl'))
    if not done or logs or not is_whole(folder, done):
        return None
    if request_of(done) != request_of(fresh):
        raise UserError(f'{folder} is there already, of other settings or files; '
                        'remove it, or give another --dataset')
    return done


def is_whole(folder, meta):
    """Return whether the token files are there, each with as many tokens as meta.json says."""
    itemsize = np.dtype(meta['dtype']).itemsize
    for split, counts in meta['splits'].items():
        path = os.path.join(folder, f'{split}.bin')
        if not os.path.isfile(path) or os.path.getsize(path) != counts['tokens'] * itemsize:
            return False
    return True


def find_sources(pattern, folder):
    """Return (files that match a pattern, the hub's commit that they are of; '' for local files).

    The commit is the one that the first run into this folder found, so that a run that is continued
    and all workers read the same text. Raises UserError if nothing matches, or if the hub cannot be
    reached.
    """
    if not documents.is_on_hub(pattern):
        return documents.source_files(pattern), ''
    revision = pinned_revision(folder, pattern) or documents.newest_revision(pattern)
    return documents.source_files(documents.at_revision(pattern, revision)), revision


def pinned_revision(folder, pattern):
    """Return the commit that an earlier run into a folder recorded for a pattern, or ''."""
    paths = glob.glob(os.path.join(glob.escape(folder), 'parts', '*.json'))
    paths.append(os.path.join(folder, 'meta.json'))
    for path in paths:
        meta = read_json(path) or {}
        source = meta.get('source')
        if isinstance(source, dict) and source.get('pattern') == pattern:
            if source.get('revision'):
                return source['revision']
    return ''


# ---- Workers -------------------------------------------------------------------------------------
def share_of(worker, n_files):
    """Return the range of files that worker 'i/n' reads, or all of them for ''; raise UserError.

    >>> share_of('1/4', n_files=10)
    range(2, 5)
    """
    if not worker:
        return range(n_files)
    i, _, n = worker.partition('/')
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise UserError(f'worker is {worker!r}; for the first of four machines, give --worker=0/4')
    return range(int(i) * n_files // int(n), (int(i) + 1) * n_files // int(n))


def name_of(worker):
    """Return the name of a run's lock and of its unfinished piece.

    Each worker has its own name, because workers run side by side.
    """
    return worker.replace('/', 'of') or 'join'


class Piece(NamedTuple):
    """A piece of a corpus, in a file of tokens."""
    path: str
    end: Position  # where in the source files it ends
    n_bad: int  # broken rows that were left out


def find_piece(parts, request, start):
    """Return the piece that begins at a position, or None if no worker has made it."""
    prefix = f'{request}-{start}-'
    for name in os.listdir(parts):
        if name.startswith(prefix) and name.endswith('.bin'):
            end, n_bad = name.removeprefix(prefix).removesuffix('.bin').split('-')
            position = Position(*map(int, end.split('.')))
            return Piece(os.path.join(parts, name), position, int(n_bad))
    return None


class Pieces:
    """The pieces that a worker writes.

    position: how far it has come in the source files.
    n_waiting: tokens written since the last commit; they are lost if the run is killed.
    """

    def __init__(self, parts, meta, name, start):
        self.parts = parts
        self.request = request_hash(meta)
        self.dtype = meta['dtype']
        self.name = name
        self.start = start  # where the piece that is being written begins
        self.position = start
        self.n_waiting = 0
        self.n_bad = 0
        self.temporary = os.path.join(parts, f'{name}.tmp')
        self.file = open(self.temporary, 'wb')

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()
        with contextlib.suppress(OSError):
            os.remove(self.temporary)

    def fullness(self):
        """Return the share of max_tokens that is written; a worker has no such limit."""
        return 0.0

    def write(self, tokens, position, n_bad):
        self.file.write(tokens.astype(self.dtype).tobytes())
        self.n_waiting += len(tokens)
        self.n_bad += n_bad
        self.position = position

    def commit(self):
        """Give the piece its final name, and begin the next one."""
        if self.position == self.start:  # nothing was read since the last one
            return
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        name = f'{self.request}-{self.start}-{self.position}-{self.n_bad}.bin'
        os.replace(self.temporary, os.path.join(self.parts, name))
        sync_folder(self.parts)
        self.file = open(self.temporary, 'wb')
        self.start = self.position
        self.n_waiting = 0
        self.n_bad = 0

    def take(self, piece):
        """Pass over a piece that is there already."""
        self.start = piece.end
        self.position = piece.end


# ---- The splits ----------------------------------------------------------------------------------
class Splits:
    """val.bin.tmp and train.bin.tmp of a corpus, and the log of how far they have come.

    position: how far they have come in the source files.
    n_waiting: tokens written since the last commit; they are made again if the run is killed.
    """

    def __init__(self, folder, tokenizer, meta):
        """Go on where an earlier run has stopped. meta: of a new corpus; the counts go into it."""
        self.folder = folder
        self.meta = meta
        self.parts = os.path.join(folder, 'parts')
        self.request = request_hash(meta)
        self.dtype = np.dtype(meta['dtype'])
        self.name = os.path.basename(folder)
        self.token_bytes = bytes_of_tokens(tokenizer)
        self.files = {}  # {split: its open file}, from the first write on
        self.position = Position()
        self.n_waiting = 0
        meta['bad_rows'] = 0  # broken rows that were left out
        for split in ('val', 'train'):
            meta['splits'][split] = {'tokens': 0, 'documents': 0, 'bytes': 0}

        self.log_path = os.path.join(self.parts, f'{self.request}.jsonl')
        last = last_entry(self.log_path)
        if last is not None:
            self.position = Position(*last['position'])
            meta['bad_rows'] = last['bad_rows']
            meta['splits'] = last['splits']
        self.log = open(self.log_path, 'ab')

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for file in [self.log, *self.files.values()]:
            file.close()

    def total(self):
        """Return the number of tokens written, in this run and before."""
        return sum(split['tokens'] for split in self.meta['splits'].values())

    def fullness(self):
        """Return the share of max_tokens that is written, 0 if there is no limit."""
        max_tokens = self.meta['source']['max_tokens']
        return self.total() / max_tokens if max_tokens else 0.0

    def write(self, tokens, position, n_bad):
        """Append tokens to val.bin.tmp until it has its val_tokens, then to train.bin.tmp."""
        max_tokens = self.meta['source']['max_tokens']
        if max_tokens:
            tokens = tokens[:max_tokens - self.total()]
        val_missing = self.meta['source']['val_tokens'] - self.meta['splits']['val']['tokens']
        n_val = max(0, val_missing)
        self.append('val', tokens[:n_val])
        self.append('train', tokens[n_val:])
        self.meta['bad_rows'] += n_bad
        self.position = position

    def append(self, split, tokens):
        """Append tokens to <split>.bin.tmp, and count them."""
        counts = self.meta['splits'][split]
        for i in range(0, len(tokens), BLOCK_TOKENS):
            block = tokens[i:i + BLOCK_TOKENS]
            self.file_of(split).write(block.astype(self.dtype).tobytes())
            counts['tokens'] += len(block)
            counts['documents'] += int((block == self.meta['eot']).sum())
            counts['bytes'] += int(self.token_bytes[block].sum())
            self.n_waiting += len(block)

    def file_of(self, split):
        """Return the open <split>.bin.tmp, cut to the tokens that the log has recorded."""
        if split not in self.files:
            path = os.path.join(self.folder, f'{split}.bin.tmp')
            file = open(path, 'ab')
            recorded_size = self.meta['splits'][split]['tokens'] * self.dtype.itemsize
            if os.path.getsize(path) < recorded_size:
                file.close()
                raise UserError(f'{path} is damaged: remove it and {self.parts} to begin anew')
            # A killed run may have written more than it recorded. That will be written again.
            file.truncate(recorded_size)
            self.files[split] = file
        return self.files[split]

    def commit(self):
        """Sync what was written to the disk, then record the position in the log."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        entry = {
            'position': self.position,
            'bad_rows': self.meta['bad_rows'],
            'splits': self.meta['splits'],
        }
        self.log.write(json.dumps(entry).encode() + b'\n')
        self.log.flush()
        os.fsync(self.log.fileno())
        self.n_waiting = 0

    def take(self, piece):
        """Append a worker's piece, and remove its file once that is recorded."""
        self.write(np.fromfile(piece.path, self.dtype), piece.end, n_bad=piece.n_bad)
        self.commit()
        os.remove(piece.path)


def last_entry(path):
    """Return the last whole line of a log, decoded, or None; cut off a line that a kill tore."""
    try:
        with open(path, 'r+b') as f:
            contents = f.read()
            n_whole = contents.rfind(b'\n') + 1
            f.truncate(n_whole)
    except FileNotFoundError:
        return None
    lines = contents[:n_whole].splitlines()
    if not lines:
        return None
    try:
        return json.loads(lines[-1])
    except ValueError as e:
        folder = os.path.dirname(path)
        raise UserError(f'{path} is damaged ({e}): remove {folder} to begin anew') from None


def bytes_of_tokens(tokenizer):
    """Return how many bytes of text each token stands for: (vocab_size,).

    They turn tokens into the bytes of text that meta.json records, for bits per byte, also where
    only tokens are at hand, as in a worker's piece.
    """
    counts = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.n_vocab)])
    counts[tokenizer.eot] = 0  # it separates texts, and is part of none
    return counts


# ---- From the source files to the tokens ---------------------------------------------------------
def advance(writer, files, to_tokens, share):
    """Write the tokens of a share of the files, a range of their numbers.

    writer: Splits or Pieces; its position says where to go on. A piece that another run has made is
    taken instead of read again.
    """
    with tqdm(total=1.0, bar_format=BAR_FORMAT, desc=writer.name) as bar:
        clock = Clock(bar, share)
        while writer.position.file < share.stop and writer.fullness() < 1:
            piece = find_piece(writer.parts, writer.request, writer.position)
            if piece is not None:
                writer.take(piece)
                continue
            chunks = read_on(files, to_tokens, writer.position, end=share.stop)
            write_until_piece(writer, chunks, clock)


def write_until_piece(writer, chunks, clock):
    """Write chunks until they end, max_tokens are reached, or a piece of another run begins.

    chunks: what read_on yields. If they end in a UserError, what came before it is kept.
    """
    with contextlib.closing(chunks):
        while writer.fullness() < 1:
            try:
                position, mark, tokens = next(chunks)
            except StopIteration:
                break
            except UserError:
                writer.commit()
                raise
            writer.write(tokens, position, n_bad=mark.n_bad)
            clock.show(position.file + mark.share, len(tokens), writer.fullness())
            if writer.n_waiting >= COMMIT_TOKENS:
                writer.commit()
            if find_piece(writer.parts, writer.request, position) is not None:
                break
    writer.commit()


def read_on(files, to_tokens, start, end):
    """Yield (position, mark, tokens) for each chunk, from a position up to file number `end`.

    position: where the chunk ends. After each file comes an empty chunk, whose position is the
    beginning of the next file, where a piece may go on.
    """
    row = start.row
    offset = start.offset
    for number in range(start.file, end):
        with contextlib.closing(to_tokens(files[number], row=row, offset=offset)) as chunks:
            for mark, tokens in chunks:
                yield Position(number, mark.row, mark.offset), mark, tokens
        row = 0
        offset = 0
        yield Position(number + 1), documents.Mark(), np.array([], np.uint32)


class Clock:
    """Show on a progress bar how much of a share of the files is done."""

    def __init__(self, bar, share):
        self.bar = bar
        self.share = share
        self.began = time.perf_counter()
        self.n_tokens = 0

    def show(self, files_done, n_new, fullness):
        """Move the bar to the share done of the files, or of max_tokens if that is larger.

        files_done: files done, counted from the first of all, plus the share done of the current
        one. n_new: tokens since the last call. fullness: the share done of max_tokens.
        """
        self.n_tokens += n_new
        speed = self.n_tokens / (time.perf_counter() - self.began)
        done = (files_done - self.share.start) / len(self.share)
        number = min(math.floor(files_done) + 1, self.share.stop)
        self.bar.set_postfix_str(f'file {number} of {self.share.stop}: '
                                 f'{self.n_tokens / 1e6:,.1f} M tokens, '
                                 f'{speed / 1e6:.2f} M a second', refresh=False)
        self.bar.update(min(1.0, max(done, fullness)) - self.bar.n)
