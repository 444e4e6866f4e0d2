"""
FineWeb-Edu or FineWeb, or documents of yours, to val.bin, the first 100 M tokens, and train.bin, the rest.
    python prepare/fineweb/prepare.py                                  # FineWeb-Edu sample-10BT: 10 B tokens, 20 GB
    python prepare/fineweb/prepare.py --pretokenized=True              # its tokens, downloaded ready-made
    python prepare/fineweb/prepare.py --source='my/*.parquet' --dataset=mine
    python prepare/fineweb/prepare.py --source='my/*.parquet' --dataset=mine --tokenizer=bpe --vocab_size=32000

Tokenized by all cores as it streams in. Killed at any moment, the same command goes on with the source file it was at.
Several machines on one file system share the work: --worker=0/4 on the first … --worker=3/4 on the fourth, and then
once without --worker, to join the parts. A BPE is trained once and kept in data/tokenizers/: the first does that alone.
"""
import functools
import os
import sys

import numpy as np

sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the root
from prepare import documents
import folio.tokenizer
from folio.configurator import UserError, configure
from prepare.corpus import write_corpus, write_json
from folio.download import download

edition = 'fineweb-edu'  # or fineweb
sample = 'sample-10BT'  # sample-10BT, sample-100BT, sample-350BT, or default, which is all of it
source = ''  # instead: your files, a pattern of .parquet, .jsonl or .txt (a file a document), compressed or not
column = 'text'  # the one of a .parquet or .jsonl that holds the documents
pretokenized = False  # download tokens instead of text: 10BT of either edition, or 100BT of fineweb
dataset = 'fineweb'  # the folder under data/ to write
tokenizer = 'gpt2'  # or bpe (trained on the documents), or a data folder or tokenizer.json with a BPE of yours
vocab_size = 32000  # bpe only
tokenizer_chars = 1_000_000_000  # characters, from the first document on, to train the bpe on; 0 is all
val_tokens = 0  # tokens of val.bin; 0 is 100 M, or less where there seem to be less than a billion in all
max_tokens = 0  # stop after so many tokens, val.bin included; 0 is all
worker = ''  # i/n: make only the parts of the i-th of n machines

SAMPLES = {'sample-10BT': 'sample/10BT', 'sample-100BT': 'sample/100BT', 'sample-350BT': 'sample/350BT',
           'default': 'data/*'}
SHARDS = {('fineweb-edu', 'sample-10BT'): 'kjj0/finewebedu10B-gpt2', ('fineweb', 'sample-10BT'): 'kjj0/fineweb10B-gpt2',
          ('fineweb', 'sample-100BT'): 'kjj0/fineweb100B-gpt2'}  # GPT-2 tokens as llm.c and modded-nanogpt keep them


def list_shards(repository):
    """{address: SHA-256} of a repository's shards, validation first."""
    from huggingface_hub import HfApi, hf_hub_url
    try:
        shards = {file.rfilename: file.lfs and file.lfs.sha256 for file in
                  HfApi().dataset_info(repository, files_metadata=True).siblings if file.rfilename.endswith('.bin')}
    except Exception as e:  # offline, refused, no such data set: the hub's errors have no common class
        raise UserError(f'{repository} could not be listed ({documents.first_line(e)}); check the network') from e
    names = sorted(shards, key=lambda name: ('_val_' not in name, name))
    return {hf_hub_url(repository, name, repo_type='dataset'): shards[name] for name in names}


def shard_tokens(url, shards, folder):
    """(share done, tokens) of a shard: 256 int32, the first three 20240520, 1 and the count, then tokens of uint16."""
    path = download([url], os.path.join(folder, 'parts', url.rsplit('/', 1)[-1]), sha256=shards[url])
    header, n_tokens = np.fromfile(path, '<i4', 256), (os.path.getsize(path) - 1024) // 2
    if header[:3].tolist() != [20240520, 1, n_tokens]:
        os.remove(path)
        raise UserError(f'{url} holds no GPT-2 tokens: its header says {header[:3].tolist()}, its size {n_tokens:,}')
    tokens = np.fromfile(path, '<u2', offset=1024)
    os.remove(path)
    yield 1.0, tokens


def first_documents(files, n_chars):
    """The documents of the files, one by one, until they have n_chars characters."""
    for text in (text for file in files for _, texts in documents.read_chunks(file, column) for text in texts):
        yield text[:n_chars]
        n_chars -= len(text)
        if n_chars <= 0:
            return


def trained_bpe(files):
    """A BPE of the documents of these files, trained by all cores, or else the one that an earlier run trained."""
    stamps = [[f, os.path.getsize(f), os.path.getmtime(f)] if os.path.exists(f) else f for f in files]
    path = f'data/tokenizers/{vocab_size}-{folio.tokenizer.spec_hash([stamps, column, vocab_size, tokenizer_chars])}.json'
    if not os.path.exists(path):
        print(f'training a BPE of {vocab_size:,} tokens', file=sys.stderr)
        with documents.start_pool() as pool:
            texts = first_documents(files, tokenizer_chars if tokenizer_chars > 0 else 2**62)
            tok = folio.tokenizer.train_bpe(texts, vocab_size, functools.partial(documents.in_order, pool))
        os.makedirs('data/tokenizers', exist_ok=True)
        write_json(path, tok.spec)
    return folio.tokenizer.load(path)


def main():
    folder = os.path.join('data', dataset)
    if edition not in ('fineweb-edu', 'fineweb') or sample not in SAMPLES or min(val_tokens, max_tokens) < 0:
        raise UserError('edition is fineweb-edu or fineweb, sample one of ' + ', '.join(SAMPLES) + '; val_tokens and '
                        'max_tokens are at least 0')
    if worker and max_tokens:
        raise UserError('no worker knows when all together have max_tokens: leave out --worker or --max_tokens')
    if pretokenized and (source or tokenizer != 'gpt2' or (edition, sample) not in SHARDS):
        raise UserError("of --pretokenized there are, in GPT-2's tokens, "
                        + ', '.join(f'--edition={e} --sample={s}' for e, s in SHARDS))
    if pretokenized:
        tok, shards = folio.tokenizer.load('gpt2'), list_shards(SHARDS[edition, sample])
        files, to_tokens = list(shards), functools.partial(shard_tokens, shards=shards, folder=folder)
    else:
        files = documents.source_files(source or f'hf://datasets/HuggingFaceFW/{edition}/{SAMPLES[sample]}/*.parquet')
        tok = trained_bpe(files) if tokenizer == 'bpe' else folio.tokenizer.load(tokenizer)
        to_tokens = functools.partial(documents.tokenize, tokenizer=tok, column=column)
    about = max_tokens or (sum(map(documents.size_of, files)) // 4 if source else 10**10)  # tokens, by 4 bytes a token
    meta = write_corpus(folder, tok, files, to_tokens, val_tokens or min(100_000_000, about // 10), max_tokens, worker,
                        column)
    if meta is None:
        print(f'worker {worker} has made its parts; when all have, join them by the same command without --worker')
    for split, counts in (meta or {'splits': {}})['splits'].items():
        print(f'{folder}/{split}.bin: {counts["tokens"]:,} tokens in {counts["documents"]:,} documents, '
              f'{counts["bytes"] / counts["tokens"]:.2f} bytes a token')


if __name__ == '__main__':  # each process that learns a BPE reads this file too
    configure(globals())
    main()
