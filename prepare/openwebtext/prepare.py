"""
Turn OpenWebText, the open copy of GPT-2's training data, into val.bin and train.bin.
    python prepare/openwebtext/prepare.py

The first 5 M tokens are val.bin, the rest train.bin. The text comes from the hub's parquet copy and
is tokenized by all cores as it streams in: about 9 B tokens by nanoGPT's count, so 18 GB (not
measured here). If it is killed, the same command continues with the source file it was at.
"""
import functools
import os
import sys

sys.path[0] = os.path.abspath(__file__ + '/../../..')  # the root of the checkout
from prepare import documents
import folio.tokenizer
from folio.configurator import configure
from prepare.corpus import write_corpus

source = (  # the hub's parquet copy, or a pattern of your own files
    'hf://datasets/Skylion007/openwebtext@refs/convert/parquet/plain_text/train/*.parquet')
dataset = 'openwebtext'  # the folder under data/ to write
val_tokens = 5_000_000  # tokens of val.bin
max_tokens = 0  # stop after this many tokens, val.bin included; 0: take all

configure(globals())
folder = os.path.join('data', dataset)
tok = folio.tokenizer.load('gpt2')
files = documents.source_files(source)
to_tokens = functools.partial(documents.tokenize, tokenizer=tok)
meta = write_corpus(folder, tok, files, to_tokens, val_tokens=val_tokens, max_tokens=max_tokens)
for split, counts in meta['splits'].items():
    print(f'{folder}/{split}.bin: {counts["tokens"]:,} tokens in {counts["documents"]:,} documents')
