"""
Turn FineWeb-Edu, FineWeb or documents of yours into val.bin, the first 100 M tokens, and train.bin.
    python prepare/fineweb/prepare.py                      # sample-10BT: 10 B tokens, 20 GB
    python prepare/fineweb/prepare.py --pretokenized=True  # its tokens, downloaded ready-made
    python prepare/fineweb/prepare.py --source='my/*.parquet' --dataset=mine
    python prepare/fineweb/prepare.py --source='my/*.parquet' --dataset=mine --tokenizer=bpe

The text is tokenized by all cores as it streams in. If it is killed, the same command continues
where it was, but for a second's work or so. Of the hub it takes the commit that was there when it
began. A row without text ends it, once what came before is kept; --skip_bad=True leaves such rows
out.

Several machines on one file system can share the work: --worker=0/4 on the first … --worker=3/4 on
the fourth, and then once without --worker, to join what they made. A BPE is trained once and kept
in data/tokenizers/: let the first machine do that alone.
"""
import functools
import os
import sys

import numpy as np
from tqdm import tqdm

sys.path[0] = os.path.abspath(__file__ + '/../../..')  # the root of the checkout
from prepare import documents
import folio.tokenizer
from folio.configurator import UserError, configure
from prepare.corpus import (
    file_stamps, find_sources, pinned_revision, write_corpus, write_json)
from folio.download import download, hub_errors

edition = 'fineweb-edu'  # or fineweb
sample = 'sample-10BT'  # sample-10BT, sample-100BT, sample-350BT, or default, which is all of it
source = ''  # instead: a pattern of your .parquet, .jsonl or .txt (each a document), or compressed
column = 'text'  # the column of a .parquet or .jsonl that holds the documents
skip_bad = False  # leave out rows that hold no text, and count them
pretokenized = False  # download tokens, not text: 10BT of either edition, or 100BT of fineweb
dataset = 'fineweb'  # the folder under data/ to write
tokenizer = 'gpt2'  # or bpe (trained on the documents), or a data folder or tokenizer.json of yours
vocab_size = 32000  # bpe only
tokenizer_chars = 1_000_000_000  # of the first documents, to train the bpe on; 0: all
val_tokens = 0  # tokens of val.bin; 0: 100 M, or a tenth of less than a billion
max_tokens = 0  # stop after this many tokens, val.bin included; 0: take all
worker = ''  # i/n: do only the share of the i-th of n machines

SAMPLES = {  # folders of the data set on the hub
    'sample-10BT': 'sample/10BT',
    'sample-100BT': 'sample/100BT',
    'sample-350BT': 'sample/350BT',
    'default': 'data/*',
}
SHARDS = {  # repositories of GPT-2 tokens, in the format of llm.c and modded-nanogpt
    ('fineweb-edu', 'sample-10BT'): 'kjj0/finewebedu10B-gpt2',
    ('fineweb', 'sample-10BT'): 'kjj0/fineweb10B-gpt2',
    ('fineweb', 'sample-100BT'): 'kjj0/fineweb100B-gpt2',
}
SHARD_MAGIC = 20240520  # the first number of a shard
SHARD_VERSION = 1  # the second
SHARD_HEADER = 256  # int32 numbers in front of the tokens


# ---- Ready-made tokens ---------------------------------------------------------------------------
def list_shards(repository, revision):
    """Return ({address: SHA-256} of a repository's shards, validation first; their commit).

    revision: a commit, or '' for the newest.
    """
    from huggingface_hub import HfApi, hf_hub_url
    with hub_errors(f'{repository} could not be listed'):
        info = HfApi().dataset_info(repository, revision=revision or None, files_metadata=True)
    hashes = {}
    for file in info.siblings:
        if file.rfilename.endswith('.bin'):
            hashes[file.rfilename] = file.lfs and file.lfs.sha256
    # False sorts before True: the shards of the validation split come first.
    names = sorted(hashes, key=lambda name: ('_val_' not in name, name))
    shards = {}
    for name in names:
        url = hf_hub_url(repository, name, repo_type='dataset', revision=info.sha)
        shards[url] = hashes[name]
    return shards, info.sha


def shard_tokens(url, shards, folder, row, offset):
    """Yield (mark, tokens) of a shard, all at once, unless that has been done: then row is 1.

    A shard is a header of 256 int32, of which the first three are 20240520, 1 and the number of
    tokens, and then the tokens, of uint16. Raises UserError for any other file. offset is not used.
    """
    if row > 0:
        return
    file_name = url.rsplit('/', 1)[-1]
    path = download([url], os.path.join(folder, 'parts', file_name), sha256=shards[url])
    header_bytes = 4 * SHARD_HEADER
    n_tokens = (os.path.getsize(path) - header_bytes) // 2
    header = np.fromfile(path, '<i4', SHARD_HEADER)[:3].tolist()
    if header != [SHARD_MAGIC, SHARD_VERSION, n_tokens]:
        os.remove(path)
        raise UserError(f'{url} holds no GPT-2 tokens: its header says {header}, '
                        f'its size {n_tokens:,}')
    tokens = np.fromfile(path, '<u2', offset=header_bytes)
    os.remove(path)
    yield documents.Mark(row=1, share=1.0), tokens


# ---- A BPE of the documents ----------------------------------------------------------------------
def all_documents(files):
    """Yield the documents of the files, one by one."""
    for file in files:
        for _, texts in documents.read_chunks(file, column, skip_bad=skip_bad):
            yield from texts


def first_chars(texts, n_chars):
    """Yield texts until they have n_chars characters; the last one may be cut."""
    n_left = n_chars
    for text in texts:
        yield text[:n_left]
        n_left -= len(text)
        if n_left <= 0:
            return


def with_bar(texts, n_chars):
    """Yield texts, and show on a bar how many characters of n_chars, or of all, have gone by."""
    with tqdm(total=n_chars or None, desc='counting', unit=' characters', unit_scale=True) as bar:
        for text in texts:
            yield text
            bar.update(len(text))


def trained_bpe(files):
    """Return a BPE of the documents of these files, trained by all cores or by an earlier run."""
    # The name of the file says what the BPE depends on, so that another file is never taken for it.
    request = [file_stamps(files), column, vocab_size, tokenizer_chars]
    path = f'data/tokenizers/{vocab_size}-{folio.tokenizer.spec_hash(request)}.json'
    if not os.path.exists(path):
        print(f'training a BPE of {vocab_size:,} tokens', file=sys.stderr)
        texts = all_documents(files)
        if tokenizer_chars > 0:
            texts = first_chars(texts, tokenizer_chars)
        texts = with_bar(texts, tokenizer_chars)
        tok = folio.tokenizer.train_bpe(texts, vocab_size, documents.map_on_all_cores)
        os.makedirs('data/tokenizers', exist_ok=True)
        write_json(path, tok.spec)
    return folio.tokenizer.load(path)


# ---- The data set --------------------------------------------------------------------------------
def check_settings():
    """Raise UserError for settings that cannot be, alone or together."""
    known = edition in ('fineweb-edu', 'fineweb') and sample in SAMPLES
    if not known or val_tokens < 0 or max_tokens < 0:
        raise UserError(f'edition is fineweb-edu or fineweb, sample one of {", ".join(SAMPLES)}; '
                        'val_tokens and max_tokens are at least 0')
    if worker and max_tokens:
        raise UserError('no worker knows when all together have max_tokens: '
                        'leave out --worker or --max_tokens')
    if pretokenized and (source or tokenizer != 'gpt2' or (edition, sample) not in SHARDS):
        choices = ', '.join(f'--edition={e} --sample={s}' for e, s in SHARDS)
        raise UserError(f"of --pretokenized there are, in GPT-2's tokens, {choices}")


def default_val_tokens(files):
    """Return 100 M, or a tenth of all tokens where that is less, at a guess of 4 bytes each."""
    if max_tokens:
        n_tokens = max_tokens
    elif source:
        n_tokens = sum(documents.size_of(file) for file in files) // 4
    else:
        n_tokens = 10**10  # the smallest sample of FineWeb
    return min(100_000_000, n_tokens // 10)


def main():
    check_settings()
    folder = os.path.join('data', dataset)
    if pretokenized:
        tok = folio.tokenizer.load('gpt2')
        # The shard of the validation split comes first, so val.bin is made of it.
        pattern = SHARDS[edition, sample]
        shards, revision = list_shards(pattern, pinned_revision(folder, pattern))
        files = list(shards)
        to_tokens = functools.partial(shard_tokens, shards=shards, folder=folder)
    else:
        on_hub = f'hf://datasets/HuggingFaceFW/{edition}/{SAMPLES[sample]}/*.parquet'
        pattern = source or on_hub
        files, revision = find_sources(pattern, folder)
        tok = trained_bpe(files) if tokenizer == 'bpe' else folio.tokenizer.load(tokenizer)
        to_tokens = functools.partial(documents.tokenize, tokenizer=tok, column=column,
                                      skip_bad=skip_bad)

    meta = write_corpus(folder, tok, files, to_tokens, max_tokens=max_tokens,
                        val_tokens=val_tokens or default_val_tokens(files), worker=worker,
                        column=column, pattern=pattern, revision=revision)
    if meta is None:
        print(f'worker {worker} has done its share; '
              'when all have, join them by the same command without --worker')
        return
    if meta.get('bad_rows'):
        print(f'{meta["bad_rows"]:,} rows that hold no text were left out')
    for split, counts in meta['splits'].items():
        print(f'{folder}/{split}.bin: {counts["tokens"]:,} tokens '
              f'in {counts["documents"]:,} documents, '
              f'{counts["bytes"] / counts["tokens"]:.2f} bytes a token')


if __name__ == '__main__':  # each process that learns a BPE reads this file too
    configure(globals())
    main()
