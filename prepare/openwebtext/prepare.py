"""
Turn OpenWebText, the open copy of GPT-2's training data, into val.bin and train.bin.
    python prepare/openwebtext/prepare.py

The first 5 M tokens are val.bin, the rest train.bin. The text is tokenized by all cores as it
streams in from the hub: about 9 B tokens by nanoGPT's count, so 18 GB (not measured here). If it is
killed, the same command continues with the file it was at.

Needs folio/ and prepare/corpus.py.
"""
import functools
import os
import sys

sys.path[0] = os.path.abspath(__file__ + '/../../..')  # the root of the checkout
import folio.tokenizer
from folio.configurator import configure, folder_of
from prepare import corpus

source = (  # the hub's files, or a pattern of your own
    'hf://datasets/Skylion007/openwebtext/plain_text/train-*.parquet')
column = 'text'  # the column that holds the documents
skip_bad = False  # leave out rows that hold no text and count them
dataset = 'openwebtext'  # the folder under data/ to write
val_tokens = 5_000_000  # tokens of val.bin
max_tokens = 0  # stop after this many tokens, val.bin included; 0: take all

configure(globals())
folder = folder_of(dataset)
form = corpus.Form(column, skip_bad=skip_bad)
tok = folio.tokenizer.load('gpt2')
files, revision = corpus.find_sources(source, folder, form)
tokens_of = functools.partial(corpus.tokenize, tokenizer=tok, form=form)
origin = {'pattern': source, 'revision': revision, 'column': column}
meta = corpus.write_corpus(folder, tok, files, tokens_of, source=origin, val_tokens=val_tokens,
                           max_tokens=max_tokens)
corpus.report(folder, meta)
