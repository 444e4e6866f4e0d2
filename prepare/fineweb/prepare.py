"""
Turn FineWeb-Edu, FineWeb or your own documents into val.bin, the first 100 M tokens, and train.bin.
    python prepare/fineweb/prepare.py                      # sample-10BT: 10 B tokens, 20 GB
    python prepare/fineweb/prepare.py --pretokenized=True  # its tokens, downloaded ready-made
    python prepare/fineweb/prepare.py --source='my/*.parquet' --dataset=mine
    python prepare/fineweb/prepare.py --source='my/*.parquet' --dataset=mine --tokenizer=bpe

The text is tokenized by all cores as it streams in, each source file into a part. If the run is
killed, the same command continues with the files that have no part, at the same commit of the hub.
A row without text ends the run, until the row is fixed or --skip_bad=True leaves such rows out;
finished parts stay. A .txt has no rows: all of it has to be UTF-8.

Several machines on one file system can share the files: --worker=0/4 on the first … --worker=3/4 on
the fourth, and then once without --worker, to join their parts. A BPE is trained once and kept in
data/tokenizers/: let the first machine do that alone.

Needs folio/ and prepare/corpus.py.
"""
import functools
import os
import sys

import numpy as np
from tqdm import tqdm

sys.path[0] = os.path.abspath(__file__ + '/../../..')  # the root of the checkout
import folio.tokenizer
from folio.configurator import UserError, configure, folder_of
from folio.download import download, hub_errors
from prepare import corpus

edition = 'fineweb-edu'  # or fineweb
sample = 'sample-10BT'  # sample-10BT, sample-100BT, sample-350BT, or default, which is all of it
source = ''  # instead: a pattern of your .parquet, .jsonl or .txt (each a document), or compressed
column = 'text'  # the column of a .parquet or .jsonl that holds the documents
separator = ''  # the line between documents in a .txt, <|endoftext|> say; empty: one document
skip_bad = False  # leave out rows that hold no text, and count them; a .txt has no rows
pretokenized = False  # download tokens, not text: 10BT of either edition, or 100BT of fineweb
dataset = 'fineweb'  # the folder under data/ to write
tokenizer = 'gpt2'  # or bpe (trained on the documents), or your own data folder or tokenizer.json
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
    """Return ({address: bytes} of a repository's shards, {address: SHA-256}, their commit).

    The validation split comes first. revision: a commit, or '' for the newest.
    """
    from huggingface_hub import HfApi, hf_hub_url
    with hub_errors(f'{repository} could not be listed'):
        info = HfApi().dataset_info(repository, revision=revision or None, files_metadata=True)
    shards = [file for file in info.siblings if file.rfilename.endswith('.bin')]
    # False sorts before True.
    shards.sort(key=lambda file: ('_val_' not in file.rfilename, file.rfilename))
    sizes = {}
    hashes = {}
    for file in shards:
        url = hf_hub_url(repository, file.rfilename, repo_type='dataset', revision=info.sha)
        sizes[url] = file.size
        if file.lfs:  # a small file has no hash
            hashes[url] = file.lfs.sha256
    return sizes, hashes, info.sha


def shard_tokens(urls, bar, hashes, folder):
    """Yield (address, tokens) of each shard.

    A shard is a header of 256 int32, of which the first three are 20240520, 1 and the number of
    tokens, and then the tokens, of uint16. Raises UserError for any other file.
    """
    for url in urls:
        path = os.path.join(folder, 'parts', os.path.basename(url))
        download(url, path, sha256=hashes.get(url))
        n_bytes = os.path.getsize(path)
        n_tokens = (n_bytes - 4 * SHARD_HEADER) // 2
        header = np.fromfile(path, '<i4', SHARD_HEADER)[:3].tolist()
        tokens = np.fromfile(path, '<u2', offset=4 * SHARD_HEADER)
        os.remove(path)
        if header != [SHARD_MAGIC, SHARD_VERSION, n_tokens]:
            raise UserError(f'{url} holds no GPT-2 tokens: its header says {header}, '
                            f'its size {n_tokens:,}')
        bar.update(n_bytes)
        yield url, tokens


# ---- A BPE of the documents ----------------------------------------------------------------------
def texts_to_learn(files, form):
    """Yield the texts of the files until they have tokenizer_chars; the last one may be cut."""
    n_left = tokenizer_chars or sys.maxsize
    with tqdm(desc='counting', total=sum(files.values()), unit='B', unit_scale=True) as bar:
        for file in files:
            for texts, _ in corpus.read(file, form, bar):
                for text, _ in texts:
                    yield text[:n_left]
                    n_left -= len(text)
                    if n_left <= 0:
                        return


def trained_bpe(files, form):
    """Return a BPE of the documents of these files, trained here or by an earlier run."""
    # The name of the file says what the BPE depends on, so no other BPE is taken for it.
    stamps = [corpus.stamp(*item) for item in files.items()]
    request = [stamps, form.column, form.separator, vocab_size, tokenizer_chars]
    path = f'data/tokenizers/{vocab_size}-{folio.tokenizer.spec_hash(request)}.json'
    if not os.path.exists(path):
        print(f'training a BPE of {vocab_size:,} tokens', file=sys.stderr)
        tok = folio.tokenizer.train_bpe(texts_to_learn(files, form), vocab_size)
        os.makedirs('data/tokenizers', exist_ok=True)
        # A run into another data set may write the same file.
        name = os.path.basename(folder_of(dataset))
        corpus.write_json(path, tok.spec, run=f'{name}.{corpus.name_of_run(worker)}')
    return folio.tokenizer.load(path)


# ---- The data set --------------------------------------------------------------------------------
def check_settings():
    """Raise UserError for impossible settings, alone or together."""
    known = edition in ('fineweb-edu', 'fineweb') and sample in SAMPLES
    if not known or val_tokens < 0 or max_tokens < 0:
        raise UserError(f'edition is fineweb-edu or fineweb, sample one of {", ".join(SAMPLES)}; '
                        'val_tokens and max_tokens are at least 0')
    if worker and max_tokens:
        raise UserError('no worker knows when all together have max_tokens: '
                        'leave out --worker or --max_tokens')
    if pretokenized and (source or tokenizer != 'gpt2' or (edition, sample) not in SHARDS):
        choices = ', '.join(f'--edition={e} --sample={s}' for e, s in SHARDS)
        raise UserError(f"--pretokenized has GPT-2's tokens of these only: {choices}")


def main():
    check_settings()
    folder = folder_of(dataset)
    form = corpus.Form(column, separator, skip_bad)
    if pretokenized:
        tok = folio.tokenizer.load('gpt2')
        pattern = SHARDS[edition, sample]
        # The shard of the validation split comes first, so val.bin is made of it.
        files, hashes, revision = list_shards(pattern, corpus.pinned_commit(pattern, folder))
        tokens_of = functools.partial(shard_tokens, hashes=hashes, folder=folder)
    else:
        on_hub = f'hf://datasets/HuggingFaceFW/{edition}/{SAMPLES[sample]}/*.parquet'
        pattern = source or on_hub
        files, revision = corpus.find_sources(pattern, folder, form)
        tok = trained_bpe(files, form) if tokenizer == 'bpe' else folio.tokenizer.load(tokenizer)
        tokens_of = functools.partial(corpus.tokenize, tokenizer=tok, form=form)

    origin = {'pattern': pattern, 'revision': revision, 'column': column}
    if separator:
        origin['separator'] = separator
    meta = corpus.write_corpus(folder, tok, files, tokens_of, source=origin, val_tokens=val_tokens,
                               max_tokens=max_tokens, worker=worker)
    if meta is None:
        print(f'worker {worker} has done its share; '
              'when all have, join the parts with the same command without --worker')
    else:
        corpus.report(folder, meta)


configure(globals())
main()
