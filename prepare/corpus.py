"""
Token files, written whole or not at all: of a few documents in memory, or of a corpus larger than memory.
    python prepare/fineweb/prepare.py --source='my/*.parquet' --dataset=mine

A corpus goes through data/<name>/parts/, one part for each source file. A run that was killed goes on with the source
file that it was at, and its result is the same to the byte as that of an undisturbed one.
"""
import glob
import json
import math
import os
import platform
import shutil
import time

import numpy as np
from tqdm import tqdm

import folio.tokenizer
from folio.configurator import UserError


# ---- Both ends -------------------------------------------------------------------------------------------------------
def describe(tokenizer, source):
    """The meta.json of a data set, its splits still to be counted."""
    kind, dtype = tokenizer.spec['kind'], '<u2' if tokenizer.n_vocab <= 2**16 else '<u4'
    return {'tokenizer': {'kind': kind, 'file': 'tokenizer.json', 'hash': folio.tokenizer.spec_hash(tokenizer.spec)},
            'vocab_size': tokenizer.n_vocab, 'eot': tokenizer.eot, 'dtype': dtype, 'source': source, 'splits': {}}


def write_json(path, value):
    temporary = f'{path}.{platform.node()}.{os.getpid()}.tmp'  # of several writers each has its own
    with open(temporary, 'w', encoding='utf-8') as f:
        json.dump(value, f, indent=2)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def read_json(path):
    """The contents of a file, or None if there is no such file."""
    try:
        with open(path, encoding='utf-8') as f:
            return json.load(f)
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise UserError(f'{path} is damaged ({e}): remove {os.path.dirname(path)} to begin anew') from None


def publish(folder, tokenizer, meta):
    """Put each <split>.bin.tmp in place, meta.json first, so that it shows a set of which only half was renamed."""
    folio.tokenizer.save(tokenizer, os.path.join(folder, 'tokenizer.json.tmp'))
    write_json(os.path.join(folder, 'meta.json'), meta)
    for name in os.listdir(folder):
        if name.endswith('.bin') and name.removesuffix('.bin') not in meta['splits']:
            os.remove(os.path.join(folder, name))  # of the set that was here: its masks and splits are not this one's
    files = ['tokenizer.json'] + [f'{split}{kind}.bin' for split in meta['splits'] for kind in ('', '.mask')]
    for path in (os.path.join(folder, name) for name in files):
        if os.path.exists(f'{path}.tmp'):
            os.replace(f'{path}.tmp', path)


# ---- A few documents -------------------------------------------------------------------------------------------------
def write_dataset(folder, tokenizer, splits, source, words=None):
    """Tokenize and write a data set whole or not at all; returns its meta.

    splits: {'train': [document, ...], ...}; each document, a str, starts with the end-of-text token where there is one.
    A document may be a pair (prompt, answer): then only answers, and the token that ends them, are targets, as
    <split>.mask.bin says. source: where it came from. words: {'train': n, ...}, where a loss per word is wanted.
    """
    meta = describe(tokenizer, source)
    try:
        os.makedirs(folder, exist_ok=True)
        remove_unfinished(folder)  # a killed run's masks would be taken for ours
        for split, documents in splits.items():
            pairs = [('', d) if isinstance(d, str) else d for d in documents]
            tokens, masks = (np.concatenate(a) for a in zip(*(encode_pair(tokenizer, *pair) for pair in pairs)))
            tokens.astype(meta['dtype']).tofile(os.path.join(folder, f'{split}.bin.tmp'))
            sizes = [[len(text.encode('utf-8', 'surrogatepass')) for text in pair] for pair in pairs]
            meta['splits'][split] = {'tokens': len(tokens), 'documents': len(pairs), 'bytes': sum(map(sum, sizes))}
            if not masks.all():
                masks.tofile(os.path.join(folder, f'{split}.mask.bin.tmp'))
                counts = {'targets': int(masks[1:].sum()), 'target_bytes': sum(answer for _, answer in sizes)}
                meta['splits'][split] |= counts
            meta['splits'][split] |= {'words': words[split]} if words else {}
        publish(folder, tokenizer, meta)
    except OSError as e:
        remove_unfinished(folder)
        raise UserError(f'could not write {folder} ({e.strerror or e}); make room and run this again') from e
    return meta


def remove_unfinished(folder):
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if name.endswith('.bin.tmp'):
            os.remove(os.path.join(folder, name))


def encode_pair(tokenizer, prompt, answer):
    """(tokens, mask) of a document; the mask is 0 for the prompt's tokens, 1 for all others."""
    start = [] if tokenizer.eot is None else [tokenizer.eot]  # it ends the document before, so it is a target
    prompt, answer = tokenizer.encode(prompt), tokenizer.encode(answer)
    mask = np.repeat(np.array([1, 0, 1], dtype=np.uint8), [len(start), len(prompt), len(answer)])
    return np.array(start + prompt + answer, dtype=np.uint32), mask


# ---- A corpus --------------------------------------------------------------------------------------------------------
def write_corpus(folder, tokenizer, files, to_tokens, val_tokens, max_tokens=0, worker='', column='text'):
    """Write val.bin, the first val_tokens of a stream, and train.bin, the rest up to max_tokens in all (0: no limit).

    files: the stream's source files, in order. to_tokens(file): a generator of (share of the file done, tokens), each
    document after an end-of-text token. worker: 'i/n' makes only parts i, i + n, i + 2n … of all, which a run without
    it joins later. column: that to_tokens reads, to tell sets apart. Returns the meta, None for a worker. UserError.
    """
    if tokenizer.eot is None:
        raise UserError('a corpus of many documents needs a tokenizer that can part them: gpt2 or a bpe')
    if 0 < max_tokens <= val_tokens:
        raise UserError(f'max_tokens ({max_tokens:,}) leaves nothing to train on beside val_tokens ({val_tokens:,})')
    stamps = [[f, os.path.getsize(f), os.path.getmtime(f)] if os.path.exists(f) else f for f in files]
    source = {'files': stamps, 'column': column, 'val_tokens': val_tokens, 'max_tokens': max_tokens}
    parts, fresh = os.path.join(folder, 'parts'), describe(tokenizer, source) | {'parts': 0}
    fresh['splits'] = {split: {'tokens': 0, 'documents': 0, 'bytes': 0} for split in ('val', 'train')}
    progress = os.path.join(parts, 'progress.json')
    done, meta = read_json(os.path.join(folder, 'meta.json')), read_json(progress)
    if done and not meta and is_whole(folder, done):
        if any(done.get(k) != fresh[k] for k in ('source', 'tokenizer')):
            raise UserError(f'{folder} is there already, of other settings or files; remove it, or give another '
                            '--dataset')
        print(f'{folder} is there already; remove it to make it anew')
        return done
    if meta is None or meta['parts'] == 0 and not glob.glob(os.path.join(glob.escape(parts), '*.bin')):
        meta = fresh  # nothing is done yet
    if any(meta[k] != fresh[k] for k in ('source', 'tokenizer')):
        raise UserError(f'{parts} is of an unfinished run with other settings or files: finish it with those, or '
                        'remove that folder to begin anew')
    os.makedirs(parts, exist_ok=True)
    lock = only_one(os.path.join(parts, f'{worker.replace("/", "of") or "join"}.lock'))
    if read_json(progress) != meta:
        write_json(progress, meta)
    token_bytes = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.n_vocab)])
    token_bytes[tokenizer.eot] = 0  # it stands for no text
    first, step = parse_worker(worker)
    with tqdm(total=1.0, bar_format='{desc} {percentage:3.0f}% |{bar}|{postfix}, {remaining} to go',
              desc=os.path.basename(folder), initial=meta['parts'] / len(files)) as bar:
        def show(share, count, rate):
            done = max((number // step + share) * step / len(files), (total(meta) + count) / (max_tokens or math.inf))
            bar.set_postfix_str(f'part {number + 1} of {len(files)}: {count / 1e6:,.1f} M tokens, {rate / 1e6:.2f} M a '
                                'second', refresh=False)
            bar.update(min(1.0, done) - bar.n)

        for number in range(first, len(files), step):
            path, room = os.path.join(parts, f'{number:05}.bin'), max_tokens - total(meta) if max_tokens else 2**62
            if number >= meta['parts'] and room > 0:
                if not os.path.exists(path):
                    write_part(path, f'{path}.{os.path.basename(lock.name)}.tmp', to_tokens(files[number]), room,
                               meta['dtype'], show)
                if not worker:
                    join(folder, meta, path, room, val_tokens, token_bytes)
    if worker:
        return None
    if min(split['tokens'] for split in meta['splits'].values()) < 2:
        shutil.rmtree(parts)
        for split in meta['splits']:
            os.remove(os.path.join(folder, f'{split}.bin.tmp'))
        raise UserError(f'{total(meta):,} tokens in all are too few for {val_tokens:,} of validation: '
                        f'give --val_tokens={total(meta) // 10}, or more text')
    del meta['parts']
    publish(folder, tokenizer, meta)
    lock.close()  # Windows removes no open file
    shutil.rmtree(parts)
    return meta


def is_whole(folder, meta):
    """Whether the token files of a set are there, with as many bytes as its meta.json says."""
    size = np.dtype(meta['dtype']).itemsize
    paths = {os.path.join(folder, f'{split}.bin'): counts['tokens'] for split, counts in meta['splits'].items()}
    return all(os.path.isfile(path) and os.path.getsize(path) == n * size for path, n in paths.items())


def only_one(path):
    """An open file, locked until this process ends, however it does. UserError if another process holds it."""
    lock = open(path, 'w')
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f'another run is at work in {os.path.dirname(path)}; wait until it is done') from None
    except (ImportError, OSError):
        pass  # Windows, and some network file systems, have no such locks
    return lock


def parse_worker(worker):
    """(first part, step between parts): '1/4' is (1, 4), '' is (0, 1)."""
    i, slash, n = (worker or '0/1').partition('/')
    if not (slash and i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise UserError(f'worker is {worker!r}; for the first of four machines, give --worker=0/4')
    return int(i), int(n)


def total(meta):
    return sum(split['tokens'] for split in meta['splits'].values())


def write_part(path, temporary, chunks, room, dtype, show):
    """The tokens of one source file, at most `room` of them, whole or not at all.

    chunks: a generator of (share of the file done, tokens); show(share, tokens so far, tokens a second) hears of each.
    """
    count, clock = 0, time.perf_counter()
    with open(temporary, 'wb') as f:
        for share, tokens in chunks:
            f.write(tokens[:room - count].astype(dtype).tobytes())
            count += min(len(tokens), room - count)
            show(share, count, count / (time.perf_counter() - clock))
            if count == room:
                break
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def join(folder, meta, path, room, val_tokens, token_bytes):
    """Append a part to val.bin.tmp, while that is short of its tokens, and to train.bin.tmp; then forget the part.

    What a killed run had appended without recording it is cut off first.
    """
    dtype = np.dtype(meta['dtype'])
    with open(path, 'rb') as part:
        for split, limit in (('val', val_tokens - meta['splits']['val']['tokens']), ('train', room)):
            counts, file = meta['splits'][split], os.path.join(folder, f'{split}.bin.tmp')
            with open(file, 'ab') as f:
                if os.path.getsize(file) < counts['tokens'] * dtype.itemsize:
                    raise UserError(f'{file} is damaged: remove it and {folder}/parts to begin anew')
                f.truncate(counts['tokens'] * dtype.itemsize)
                while len(block := np.fromfile(part, dtype, max(0, min(limit, room, 2**22)))):
                    f.write(block.tobytes())
                    limit, room = limit - len(block), room - len(block)
                    counts['tokens'] += len(block)
                    counts['documents'] += int((block == meta['eot']).sum())
                    counts['bytes'] += int(token_bytes[block].sum())
                f.flush()
                os.fsync(f.fileno())
    meta['parts'] += 1
    write_json(os.path.join(folder, 'parts', 'progress.json'), meta)
    os.remove(path)
