"""
Write data sets as token files, whole or not at all: documents in memory, or a corpus of any size.
    python prepare/fineweb/prepare.py --source='my/*.parquet' --dataset=mine

Both leave a folder with train.bin, val.bin, tokenizer.json and meta.json.

A corpus is made in parts, one for each source file. A part is written to data/<name>/parts/, then
appended to val.bin.tmp and train.bin.tmp, and parts/progress.json records it. So a run that was
killed continues with the source file it was at, and ends with the same bytes as one that was not.
"""
import glob
import json
import math
import os
import platform
import re
import shutil
import time

import numpy as np
from tqdm import tqdm

import folio.tokenizer
from folio.configurator import UserError
from folio.lock import only_one

TOKEN_FILE = re.compile(r'(train|val|test)(\.mask)?\.bin')
JOIN_TOKENS = 2**22  # tokens held in memory while a part is appended
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
        # Little-endian on every machine, and two bytes as long as the vocabulary fits.
        'dtype': '<u2' if tokenizer.n_vocab <= 2**16 else '<u4',
        'source': source,
        'splits': {},
    }


def write_json(path, value):
    """Write a JSON file whole or not at all, even if other machines write the same one."""
    # No other writer, here or on another machine of a shared file system, has this name.
    temporary = f'{path}.{platform.node()}.{os.getpid()}.tmp'
    with open(temporary, 'w', encoding='utf-8') as f:
        json.dump(value, f, indent=2)
        # Onto the disk before the rename, or a power cut could leave the name without the contents.
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def read_json(path):
    """Return the contents of a JSON file, or None if there is no such file."""
    try:
        with open(path, encoding='utf-8') as f:
            value = json.load(f)
        from folio.data import check_meta  # here, for it loads torch, which a worker can do without
        check_meta(value)
        return value
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, RecursionError) as e:
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


def require_ours(folder):
    """Raise UserError if a folder holds other people's files, and no data set of ours.

    Of a killed run of ours there may be parts and files called .tmp.
    """
    meta = read_json(os.path.join(folder, 'meta.json')) or {}
    if not os.path.isdir(folder) or {'tokenizer', 'vocab_size', 'dtype', 'splits'} <= meta.keys():
        return
    for name in os.listdir(folder):
        if name != 'parts' and not name.endswith('.tmp'):
            raise UserError(f'{folder} holds {name}, which no preparing of ours has left there; '
                            'give another --dataset')


# ---- Documents in memory -------------------------------------------------------------------------
def write_dataset(folder, tokenizer, splits, source, words=None, template=None):
    """Tokenize documents and write them as a data set, whole or not at all; return its meta.

    splits: {'train': [document, ...], ...}. A document is a str, or a pair (prompt, answer). Of a
    pair only the answer, and the end-of-text token after it, are targets: <split>.mask.bin says so.
    Each document starts with the end-of-text token, if the tokenizer has one.
    source: where the documents came from, for meta.json.
    words: {'train': number of words, ...}, where a loss per word is wanted.
    template: how a prompt is made of what a user asks, which stands at {}; for sample.py --chat.
    Raises UserError if the disk is full or the folder cannot be written.
    """
    require_ours(folder)
    meta = new_meta(tokenizer, source)
    if template is not None:
        meta['template'] = template
    try:
        os.makedirs(folder, exist_ok=True)
        remove_unfinished(folder)  # publish would take the masks of a killed run for ours
        for split, documents in splits.items():
            counts = write_split(folder, split, documents, tokenizer, dtype=meta['dtype'])
            if words:
                counts['words'] = words[split]
            meta['splits'][split] = counts
        publish(folder, tokenizer, meta)
    except OSError as e:
        remove_unfinished(folder)
        raise UserError(f'could not write {folder} ({e.strerror or e}); '
                        'make room and run this again') from e
    return meta


def write_split(folder, split, documents, tokenizer, dtype):
    """Write <split>.bin.tmp and, if not all tokens are targets, its mask; return the counts."""
    # A plain document is an answer to an empty prompt.
    pairs = [('', d) if isinstance(d, str) else d for d in documents]
    encoded = [encode_pair(tokenizer, prompt, answer) for prompt, answer in pairs]
    tokens = np.concatenate([document_tokens for document_tokens, _ in encoded])
    mask = np.concatenate([document_mask for _, document_mask in encoded])

    prompt_bytes = sum(n_bytes(prompt) for prompt, _ in pairs)
    answer_bytes = sum(n_bytes(answer) for _, answer in pairs)
    counts = {
        'tokens': len(tokens),
        'documents': len(pairs),
        'bytes': prompt_bytes + answer_bytes,
    }
    tokens.astype(dtype).tofile(os.path.join(folder, f'{split}.bin.tmp'))
    if not mask.all():
        mask.tofile(os.path.join(folder, f'{split}.mask.bin.tmp'))
        counts['targets'] = int(mask[1:].sum())  # nothing predicts the first token
        counts['target_bytes'] = answer_bytes
    return counts


def remove_unfinished(folder):
    """Remove the token files that were never published, if there is such a folder."""
    if not os.path.isdir(folder):
        return
    for name in os.listdir(folder):
        if name.endswith('.bin.tmp'):
            os.remove(os.path.join(folder, name))


def n_bytes(text):
    """Return the length of a text in UTF-8."""
    # JSON can hold half of a surrogate pair, which plain 'utf-8' refuses.
    return len(text.encode('utf-8', 'surrogatepass'))


def encode_pair(tokenizer, prompt, answer):
    """Return (tokens, mask) of a document; the mask is 0 for the prompt's tokens, else 1."""
    start = [] if tokenizer.eot is None else [tokenizer.eot]
    prompt_ids = tokenizer.encode(prompt)
    answer_ids = tokenizer.encode(answer)
    tokens = np.array(start + prompt_ids + answer_ids, dtype=np.uint32)
    # The end-of-text token in front is a target too: it is what ends the answer before.
    mask = np.ones(len(tokens), dtype=np.uint8)
    mask[len(start):len(start) + len(prompt_ids)] = 0
    return tokens, mask


# ---- A corpus ------------------------------------------------------------------------------------
def write_corpus(folder, tokenizer, files, to_tokens, val_tokens, max_tokens=0, worker='',
                 column='text'):
    """Write val.bin, the first val_tokens of a stream, and train.bin, the rest; return the meta.

    files: the source files of the stream, in order.
    to_tokens(file): yields (share of the file done, tokens), an end-of-text token in front of each
    document.
    max_tokens: where the stream ends, val.bin included; 0 is at the end of the last file.
    worker: 'i/n' makes only the parts of files i, i + n, i + 2n, … and returns None; a run without
    it joins them later.
    column: the column that to_tokens reads. It is only recorded, to tell data sets apart.
    Raises UserError for settings that cannot be, and for a folder that other settings made.
    """
    require_possible(tokenizer, val_tokens, max_tokens)
    # This is written down, so that parts of one request are never mixed with those of another.
    source = {
        'files': file_stamps(files),
        'column': column,
        'val_tokens': val_tokens,
        'max_tokens': max_tokens,
    }
    require_ours(folder)
    fresh = new_corpus_meta(tokenizer, source)
    done = find_finished(folder, fresh)
    if done is not None:
        print(f'{folder} is there already; remove it to make it anew')
        return done

    meta = find_unfinished(folder, fresh) or fresh
    numbers = part_numbers(worker, len(files))
    parts = os.path.join(folder, 'parts')
    os.makedirs(parts, exist_ok=True)
    lock = only_one(os.path.join(parts, f'{name_of(worker)}.lock'))
    if read_json(progress_path(folder)) != meta:  # else another worker has just written it
        write_json(progress_path(folder), meta)
    make_parts(folder, tokenizer, files, to_tokens, meta=meta, numbers=numbers, worker=worker)
    if worker:
        return None

    require_enough(folder, meta)
    del meta['parts']
    publish(folder, tokenizer, meta)
    lock.close()  # Windows cannot remove an open file
    shutil.rmtree(parts)
    return meta


def require_possible(tokenizer, val_tokens, max_tokens):
    """Raise UserError if there would be no telling documents apart, or nothing to train on."""
    if tokenizer.eot is None:
        raise UserError('a corpus of many documents needs a tokenizer that can tell them apart: '
                        'gpt2 or a bpe')
    if 0 < max_tokens <= val_tokens:
        raise UserError(f'max_tokens ({max_tokens:,}) leaves nothing to train on '
                        f'beside val_tokens ({val_tokens:,})')


def require_enough(folder, meta):
    """Raise UserError and remove what was written if a split has fewer than two tokens."""
    # Two are the least: an input and its target.
    if all(counts['tokens'] >= 2 for counts in meta['splits'].values()):
        return
    shutil.rmtree(os.path.join(folder, 'parts'))
    for split in meta['splits']:
        os.remove(os.path.join(folder, f'{split}.bin.tmp'))
    val_tokens = meta['source']['val_tokens']
    raise UserError(f'{total(meta):,} tokens in all are too few for {val_tokens:,} of validation: '
                    f'give --val_tokens={total(meta) // 10}, or more text')


# ---- What is there already -----------------------------------------------------------------------
def file_stamps(files):
    """Return [name, bytes, time of the last change] of each local file; of others just the name."""
    stamps = []
    for file in files:
        if os.path.exists(file):
            stamps.append([file, os.path.getsize(file), os.path.getmtime(file)])
        else:
            stamps.append(file)
    return stamps


def new_corpus_meta(tokenizer, source):
    """Return the progress of a run that has done nothing yet: the meta.json to be, plus 'parts'."""
    meta = new_meta(tokenizer, source)
    for split in ('val', 'train'):
        meta['splits'][split] = {'tokens': 0, 'documents': 0, 'bytes': 0}
    meta['parts'] = 0  # parts joined so far
    return meta


def progress_path(folder):
    return os.path.join(folder, 'parts', 'progress.json')


def find_finished(folder, fresh):
    """Return the meta of a finished data set, or None if it is still to be made.

    Raises UserError if it was made with other settings, or from other files, than those of `fresh`.
    """
    done = read_json(os.path.join(folder, 'meta.json'))
    # While parts/ is there, a run is not done: it may have died while it was publishing.
    at_work = read_json(progress_path(folder)) is not None
    if not done or at_work or not is_whole(folder, done):
        return None
    if not same_request(done, fresh):
        raise UserError(f'{folder} is there already, of other settings or files; '
                        'remove it, or give another --dataset')
    return done


def find_unfinished(folder, fresh):
    """Return the progress of a run that was killed, or None if there is nothing to continue.

    Raises UserError if that run had other settings, or other files, than those of `fresh`.
    """
    meta = read_json(progress_path(folder))
    if meta is None:
        return None
    made_parts = glob.glob(os.path.join(glob.escape(folder), 'parts', '*.bin'))
    if meta['parts'] == 0 and not made_parts:
        return None  # killed before its first part was done, so its settings do not matter
    if not same_request(meta, fresh):
        raise UserError(f'{folder}/parts is of an unfinished run with other settings or files: '
                        'finish it with those, or remove that folder to begin anew')
    return meta


def same_request(meta, other):
    """Return whether both are of the same files, settings and tokenizer."""
    return all(meta.get(key) == other[key] for key in ('source', 'tokenizer'))


def is_whole(folder, meta):
    """Return whether the token files are there, each with as many tokens as meta.json says."""
    itemsize = np.dtype(meta['dtype']).itemsize
    for split, counts in meta['splits'].items():
        path = os.path.join(folder, f'{split}.bin')
        if not os.path.isfile(path) or os.path.getsize(path) != counts['tokens'] * itemsize:
            return False
    return True


# ---- Workers -------------------------------------------------------------------------------------
def part_numbers(worker, n_files):
    """Return the numbers of the parts to go over: those of worker 'i/n', or all of them for ''.

    >>> list(part_numbers('1/4', n_files=10))
    [1, 5, 9]
    """
    if not worker:
        return range(n_files)
    i, _, n = worker.partition('/')
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise UserError(f'worker is {worker!r}; for the first of four machines, give --worker=0/4')
    return range(int(i), n_files, int(n))


def name_of(worker):
    """Return what a run calls its lock and its unfinished part: workers run side by side."""
    return worker.replace('/', 'of') or 'join'


# ---- Parts ---------------------------------------------------------------------------------------
def total(meta):
    """Return the number of tokens joined so far."""
    return sum(split['tokens'] for split in meta['splits'].values())


def tokens_left(meta):
    """Return how many more tokens max_tokens allows; math.inf if there is no limit."""
    max_tokens = meta['source']['max_tokens']
    if max_tokens == 0:
        return math.inf
    return max_tokens - total(meta)


def bytes_of_tokens(tokenizer):
    """Return how many bytes of text each token stands for: (vocab_size,)."""
    # With these the text is counted as its tokens go by: meta.json has bytes, for bits per byte.
    counts = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.n_vocab)])
    counts[tokenizer.eot] = 0  # it stands between texts, and for none
    return counts


def make_parts(folder, tokenizer, files, to_tokens, meta, numbers, worker):
    """Write the parts of these numbers and, unless this is a worker, join them as they come."""
    token_bytes = bytes_of_tokens(tokenizer)
    with tqdm(total=1.0, initial=meta['parts'] / len(files), bar_format=BAR_FORMAT,
              desc=os.path.basename(folder)) as bar:
        for number in numbers:
            if number < meta['parts'] or tokens_left(meta) <= 0:
                continue  # an earlier run joined this part, or max_tokens are reached
            path = os.path.join(folder, 'parts', f'{number:05}.bin')
            # A part may be there: a worker made it, or a run that was killed before it joined it.
            if not os.path.exists(path):
                chunks = to_tokens(files[number])
                temporary = f'{path}.{name_of(worker)}.tmp'
                for progress in write_part(path, temporary, chunks, meta=meta):
                    show_progress(bar, meta, progress, number=number, step=numbers.step)
            if not worker:
                join(folder, meta, path, token_bytes=token_bytes)


def show_progress(bar, meta, progress, number, step):
    """Move the bar to what is done: of all files or of max_tokens, whichever is closer to its end.

    progress: what write_part yields. number: of the part. step: 1, or n for one of n workers.
    """
    share, n_tokens, tokens_per_second = progress
    n_files = len(meta['source']['files'])
    max_tokens = meta['source']['max_tokens'] or math.inf
    # A worker stands for all of them: number // step is how many of its own files are done.
    files_done = (number // step + share) * step / n_files
    tokens_done = (total(meta) + n_tokens) / max_tokens
    bar.set_postfix_str(f'part {number + 1} of {n_files}: {n_tokens / 1e6:,.1f} M tokens, '
                        f'{tokens_per_second / 1e6:.2f} M a second', refresh=False)
    bar.update(min(1.0, max(files_done, tokens_done)) - bar.n)


def write_part(path, temporary, chunks, meta):
    """Write the tokens of one source file, whole or not at all, while yielding the progress.

    chunks: yields (share of the file done, tokens). At most tokens_left(meta) tokens are written.
    Yields (share of the file done, tokens written, tokens per second) after each chunk; the part is
    in place when these end.
    """
    limit = tokens_left(meta)
    n_tokens = 0
    clock = time.perf_counter()
    with open(temporary, 'wb') as f:
        for share, tokens in chunks:
            n_new = min(len(tokens), limit - n_tokens)
            f.write(tokens[:n_new].astype(meta['dtype']).tobytes())
            n_tokens += n_new
            yield share, n_tokens, n_tokens / (time.perf_counter() - clock)
            if n_tokens == limit:
                break
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def join(folder, meta, path, token_bytes):
    """Append a part to val.bin.tmp until that has its tokens, and to train.bin.tmp from there on.

    Then record it in progress.json, and only then remove the part.
    """
    limit = tokens_left(meta)
    val_missing = max(0, meta['source']['val_tokens'] - meta['splits']['val']['tokens'])
    # A part may hold tokens of both splits. `part` is one open file: train goes on where val stops.
    with open(path, 'rb') as part:
        n_val = append(folder, 'val', part, meta=meta, limit=min(val_missing, limit),
                       token_bytes=token_bytes)
        append(folder, 'train', part, meta=meta, limit=limit - n_val, token_bytes=token_bytes)
    meta['parts'] += 1
    write_json(progress_path(folder), meta)
    os.remove(path)


def append(folder, split, part, meta, limit, token_bytes):
    """Append up to `limit` tokens of the open file `part` to <split>.bin.tmp; return how many.

    They are counted in meta['splits'][split], which the caller has to record.
    """
    dtype = np.dtype(meta['dtype'])
    counts = meta['splits'][split]
    path = os.path.join(folder, f'{split}.bin.tmp')
    n_appended = 0
    with open(path, 'ab') as f:
        recorded_size = counts['tokens'] * dtype.itemsize
        if os.path.getsize(path) < recorded_size:
            raise UserError(f'{path} is damaged: remove it and {folder}/parts to begin anew')
        # A run that was killed may have appended more than it recorded: that comes again now.
        f.truncate(recorded_size)
        # In blocks, because a part may be larger than memory.
        while n_appended < limit:
            block = np.fromfile(part, dtype, count=min(limit - n_appended, JOIN_TOKENS))
            if len(block) == 0:
                break  # the end of the part
            f.write(block.tobytes())
            n_appended += len(block)
            counts['tokens'] += len(block)
            counts['documents'] += int((block == meta['eot']).sum())
            counts['bytes'] += int(token_bytes[block].sum())
        f.flush()
        os.fsync(f.fileno())
    return n_appended
