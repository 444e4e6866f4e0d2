"""
Turn OpenWebText, the open copy of GPT-2's training data, into val.bin and train.bin.
    python prepare/openwebtext/prepare.py

The first 5 M tokens are val.bin, the rest train.bin. The text is tokenized by all cores as it
streams in from the hub: about 9 B tokens by nanoGPT's count, so 18 GB (not measured here). If it is
killed, the same command continues where it was.
"""
import functools
import os
import sys

sys.path[0] = os.path.abspath(__file__ + '/../../..')  # the root of the checkout
from prepare import documents
import folio.tokenizer
from folio.configurator import configure
from prepare.corpus import find_sources, write_corpus

source = (  # the hub's files, or a pattern of your own
    'hf://datasets/Skylion007/openwebtext/plain_text/train-*.parquet')
column = 'text'  # the column that holds the documents
skip_bad = False  # leave out rows that hold no text, and count them
dataset = 'openwebtext'  # the folder under data/ to write
val_tokens = 5_000_000  # tokens of val.bin
max_tokens = 0  # stop after this many tokens, val.bin included; 0: take all

configure(globals())
folder = os.path.join('data', dataset)
tok = folio.tokenizer.load('gpt2')
files, revision = find_sources(source, folder)
to_tokens = functools.partial(documents.tokenize, tokenizer=tok, column=column, skip_bad=skip_bad)
meta = write_corpus(folder, tok, files, to_tokens, val_tokens=val_tokens, max_tokens=max_tokens,
                    column=column, pattern=source, revision=revision)
if meta.get('bad_rows'):
    print(f'{meta["bad_rows"]:,} rows that hold no text were left out')
for split, counts in meta['splits'].items():
    print(f'{folder}/{split}.bin: {counts["tokens"]:,} tokens in {counts["documents"]:,} documents')
