"""
Documents to token files: a few, held in memory, or a corpus larger than that, tokenized by all cores as it streams in.
    python prepare/fineweb/prepare.py --source='my/*.parquet' --dataset=mine

A corpus goes through data/<name>/parts/, one part for each source file. A run that was killed goes on with the source
file that it was at, and its result is the same to the byte as that of an undisturbed one.
"""
import collections
import concurrent.futures
import glob
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time

import numpy as np
from tqdm import tqdm

import tokenizer as tokenizers
from configurator import UserError
from tokenizer import EOT

KINDS = {'parquet': 'parquet', 'jsonl': 'json', 'json': 'json', 'txt': 'text'}  # names that datasets has for them
COMPRESSED = ('.gz', '.zst', '.xz', '.bz2')
CHUNK = 1_000_000  # characters that a process tokenizes at a time


# ---- Both ends -------------------------------------------------------------------------------------------------------
def describe(tokenizer, source):
    """The meta.json of a data set, its splits still to be counted."""
    kind, dtype = tokenizer.spec['kind'], '<u2' if tokenizer.n_vocab <= 2**16 else '<u4'
    return {'tokenizer': {'kind': kind, 'file': 'tokenizer.json', 'hash': tokenizers.spec_hash(tokenizer.spec)},
            'vocab_size': tokenizer.n_vocab, 'eot': tokenizer.eot, 'dtype': dtype, 'source': source, 'splits': {}}


def write_json(path, value):
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        json.dump(value, f, indent=2)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + '.tmp', path)


def publish(folder, tokenizer, meta):
    """Put each <split>.bin.tmp in place, meta.json first, so that it shows a set of which only half was renamed."""
    tokenizers.save(tokenizer, os.path.join(folder, 'tokenizer.json.tmp'))
    for name in os.listdir(folder):
        if name.endswith('.bin') and name.removesuffix('.bin') not in meta['splits']:
            os.remove(os.path.join(folder, name))  # of the set that was here: its masks and splits are not this one's
    write_json(os.path.join(folder, 'meta.json'), meta)
    for path in (os.path.join(folder, name) for name in ['tokenizer.json'] + [f'{s}.bin' for s in meta['splits']]):
        if os.path.exists(f'{path}.tmp'):
            os.replace(f'{path}.tmp', path)


# ---- A few documents -------------------------------------------------------------------------------------------------
def write_dataset(folder, tokenizer, splits, source, words=None):
    """Tokenize and write a data set whole or not at all; returns its meta.

    splits: {'train': [document, ...], ...}; each document, a str, starts with the end-of-text token where there is one.
    source: where it came from. words: {'train': n, ...}, where a loss per word is wanted.
    """
    meta, start = describe(tokenizer, source), [] if tokenizer.eot is None else [tokenizer.eot]
    try:
        os.makedirs(folder, exist_ok=True)
        for split, documents in splits.items():
            arrays = [np.array(start + tokenizer.encode(text), dtype=meta['dtype']) for text in documents]
            np.concatenate(arrays).tofile(os.path.join(folder, f'{split}.bin.tmp'))
            meta['splits'][split] = {'tokens': sum(map(len, arrays)), 'documents': len(documents),
                                     'bytes': sum(len(text.encode('utf-8', 'surrogatepass')) for text in documents)}
            meta['splits'][split] |= {'words': words[split]} if words else {}
        publish(folder, tokenizer, meta)
    except OSError as e:
        for name in os.listdir(folder) if os.path.isdir(folder) else []:
            if name.endswith('.tmp'):
                os.remove(os.path.join(folder, name))
        raise UserError(f'could not write {folder} ({e.strerror or e}); make room and run this again') from e
    return meta


# ---- A corpus --------------------------------------------------------------------------------------------------------
def write_corpus(folder, tokenizer, files, to_tokens, source, val_tokens, max_tokens=0, worker=''):
    """Write val.bin, the first val_tokens of a stream, and train.bin, the rest up to max_tokens in all (0: no limit).

    files: the stream's source files, in order. to_tokens(file): a generator of (share of the file done, tokens), each
    document after an end-of-text token. worker: 'i/n' makes only parts i, i + n, i + 2n … of all, which a run without
    it joins later. Returns the meta, or None for a worker. Raises UserError.
    """
    parts, fresh = os.path.join(folder, 'parts'), describe(tokenizer, source) | {'parts': 0}
    fresh['splits'] = {split: {'tokens': 0, 'documents': 0, 'bytes': 0} for split in ('val', 'train')}
    done, meta = read_json(os.path.join(folder, 'meta.json')), read_json(os.path.join(parts, 'progress.json')) or fresh
    if done and not os.path.exists(parts) and all(done[k] == fresh[k] for k in ('source', 'tokenizer')):
        return done
    if any(meta[k] != fresh[k] for k in ('source', 'tokenizer')):
        raise UserError(f'{parts} is of an unfinished run with other settings or files: finish it with those, or '
                        'remove that folder to begin anew')
    os.makedirs(parts, exist_ok=True)
    write_json(os.path.join(parts, 'progress.json'), meta)
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
                    write_part(path, to_tokens(files[number]), room, meta['dtype'], show)
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
    shutil.rmtree(parts)
    return meta


def read_json(path):
    if not os.path.exists(path):
        return None
    with open(path, encoding='utf-8') as f:
        return json.load(f)


def parse_worker(worker):
    """(first part, step between parts): '1/4' is (1, 4), '' is (0, 1)."""
    i, slash, n = (worker or '0/1').partition('/')
    if not (slash and i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise UserError(f'worker is {worker!r}; for the first of four machines, give --worker=0/4')
    return int(i), int(n)


def total(meta):
    return sum(split['tokens'] for split in meta['splits'].values())


def write_part(path, chunks, room, dtype, show):
    """The tokens of one source file, at most `room` of them, whole or not at all.

    chunks: a generator of (share of the file done, tokens); show(share, tokens so far, tokens a second) hears of each.
    """
    count, clock = 0, time.perf_counter()
    with open(path + '.tmp', 'wb') as f:
        for share, tokens in chunks:
            f.write(tokens[:room - count].astype(dtype).tobytes())
            count += min(len(tokens), room - count)
            show(share, count, count / (time.perf_counter() - clock))
            if count == room:
                break
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + '.tmp', path)


def join(folder, meta, path, room, val_tokens, token_bytes):
    """Append a part to val.bin.tmp, while that is short of its tokens, and to train.bin.tmp; then forget the part.

    What a killed run had appended without recording it is cut off first.
    """
    part = np.memmap(path, dtype=meta['dtype'], mode='r')[:room] if os.path.getsize(path) else np.empty(0, np.uint16)
    cut = val_tokens - meta['splits']['val']['tokens']
    for split, tokens in (('val', part[:cut]), ('train', part[cut:])):
        counts, file = meta['splits'][split], os.path.join(folder, f'{split}.bin.tmp')
        with open(file, 'ab') as f:
            length = counts['tokens'] * part.itemsize
            if os.path.getsize(file) < length:
                raise UserError(f'{file} is damaged: remove it and {folder}/parts to begin anew')
            f.truncate(length)
            for block in np.array_split(tokens, len(tokens) // 2**24 + 1):
                f.write(block.tobytes())
                counts['tokens'] += len(block)
                counts['documents'] += int((block == meta['eot']).sum())
                counts['bytes'] += int(token_bytes[block].sum())
            f.flush()
            os.fsync(f.fileno())
    meta['parts'] += 1
    write_json(os.path.join(folder, 'parts', 'progress.json'), meta)
    del part, tokens  # Windows removes no file that is mapped
    os.remove(path)


# ---- Reading and tokenizing ------------------------------------------------------------------------------------------
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


def first_line(error):
    return f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}'


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
            size = pyarrow.parquet.ParquetFile(f).metadata.num_rows if kind == 'parquet' else f.size
        read, texts, held = 0, [], 0
        for table in load_dataset(kind, data_files=[file], split='train', streaming=True,
                                  **options).with_format('arrow').iter(batch_size=64):
            for text in filter(None, table[column].to_pylist()):
                texts, held = texts + [text], held + len(text)
                if held >= CHUNK:
                    yield min(1.0, read / max(1, size)), texts
                    texts, held = [], 0
                read += 1 if kind == 'parquet' else len(text)
        yield 1.0, texts
    except Exception as e:  # a broken file, no such column, a hub out of reach: datasets' errors have no common class
        raise UserError(f'{file} could not be read ({first_line(e)}); what was done so far is kept: the same command '
                        'goes on') from e


def start_pool(tokenizer):
    """A process for each core, ready to encode. A script that calls this does its work under __name__ == '__main__'."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    if tokenizer.eot is None:
        raise UserError('a corpus of many documents needs a tokenizer that can part them: gpt2 or a bpe')
    return concurrent.futures.ProcessPoolExecutor(cores, multiprocessing.get_context('spawn'), start_worker,
                                                  (tokenizer.spec,))


def start_worker(spec):
    global encoding
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, without which no worker shall live on
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    encoding = tokenizers.load(spec).encoding


def encode(texts):
    """The documents as one array of uint32, each after an end-of-text token; runs in a process of the pool."""
    if any(EOT in text for text in texts):  # there it is text, to be spelled
        eot = np.array([encoding.eot_token], dtype=np.uint32)
        return np.concatenate([a for t in texts for a in (eot, encoding.encode_to_numpy(t, disallowed_special=()))])
    joined = ''.join(EOT + text for text in texts)
    return encoding.encode_to_numpy(joined, allowed_special={EOT}, disallowed_special=())


def tokenize(file, pool, column='text'):
    """(share of the file done, tokens) in order, while a bounded number of chunks is with the pool."""
    pending = collections.deque()
    for share, texts in read_chunks(file, column):
        pending.append((share, pool.submit(encode, texts)))
        if len(pending) > 2 * pool._max_workers:
            share, future = pending.popleft()
            yield share, future.result()
    for share, future in pending:
        yield share, future.result()
