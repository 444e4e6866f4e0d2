"""
OpenWebText, the open copy of GPT-2's training data, to val.bin, the first 5 M tokens, and train.bin, the rest.
    python prepare/openwebtext/prepare.py

From the hub's parquet copy, tokenized by all cores as it streams in: about 9 B tokens by nanoGPT's count, so 18 GB (not
measured here). Killed at any moment, the same command goes on with the source file it was at.
"""
import functools
import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the root
from prepare import documents
import folio.tokenizer
from folio.configurator import configure
from prepare.corpus import write_corpus

source = 'hf://datasets/Skylion007/openwebtext@refs/convert/parquet/plain_text/train/*.parquet'  # or files of yours
dataset = 'openwebtext'  # the folder under data/ to write
val_tokens = 5_000_000  # tokens of val.bin
max_tokens = 0  # stop after so many tokens, val.bin included; 0 is all

configure(globals())
folder, tok, files = os.path.join('data', dataset), folio.tokenizer.load('gpt2'), documents.source_files(source)
meta = write_corpus(folder, tok, files, functools.partial(documents.tokenize, tokenizer=tok), val_tokens, max_tokens)
for split, counts in meta['splits'].items():
    print(f'{folder}/{split}.bin: {counts["tokens"]:,} tokens in {counts["documents"]:,} documents')
