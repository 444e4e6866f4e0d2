"""
Turn WikiText-2 into train.bin, val.bin and test.bin, with a BPE trained on its training split.
    python prepare/wikitext2/prepare.py                  # the raw text; --variant=v1: with <unk>
    python prepare/wikitext2/prepare.py --source=folder  # it has train.txt, valid.txt and test.txt

Each split is one document and its words are counted as in the benchmark, so that a perplexity per
word can be compared: whatever white space separates is a word, and so is each line end. In v1 that
makes 217,646 words in the validation split and 245,569 in the test split.

Needs folio/ and prepare/corpus.py.
"""
import os
import re
import sys

sys.path[0] = os.path.abspath(__file__ + '/../../..')  # the root of the checkout
import folio.tokenizer
from folio.configurator import UserError, configure, folder_of
from folio.download import hub_errors
from prepare.corpus import write_dataset

variant = 'raw'  # raw, or v1: rare words are <unk>
source = ''  # instead of the hub: a folder of train.txt, valid.txt, test.txt or wiki.train.tokens …
dataset = 'wikitext2'  # the folder under data/ to write
tokenizer = 'bpe'  # bpe (of the training split), gpt2, or your data folder or tokenizer.json
vocab_size = 32000  # bpe only


def from_hub(split):
    """Return the text of a split of the published set."""
    import datasets
    import huggingface_hub
    huggingface_hub.logging.set_verbosity_error()  # otherwise it prints a line for each attempt
    name = 'wikitext-2-raw-v1' if variant == 'raw' else 'wikitext-2-v1'
    remedy = 'check the network, or give --source=folder'
    with hub_errors('WikiText-2 could not be downloaded', remedy):
        lines = datasets.load_dataset('Salesforce/wikitext', name, split=split)['text']
    # The hub stores lines, the blank ones, ' \n', as ''.
    return ''.join(line or ' \n' for line in lines)


def from_folder(split):
    """Return the text of the file in the folder `source` that has the split in its name."""
    # The hub says 'validation', the names of the original files 'valid'.
    short = split.replace('validation', 'valid')
    names = os.listdir(source) if os.path.isdir(source) else []
    # test.txt or wiki.test.tokens, but not latest.txt
    pattern = rf'(.*[._-])?({split}|{short})[.].*'
    found = [os.path.join(source, name) for name in sorted(names) if re.fullmatch(pattern, name)]
    if not found:
        raise UserError(f'no file in {source} is called {short}.txt or the like')
    if len(found) > 1:
        raise UserError(f'which is the {split} split: {" or ".join(found)}? Remove the others, or '
                        'give --source=a folder with one file per split')
    print(f'{split}: {found[0]}', file=sys.stderr)
    try:
        with open(found[0], encoding='utf-8-sig') as f:
            return f.read()
    except (OSError, UnicodeError) as e:
        raise UserError(f'{found[0]} cannot be read as UTF-8 text: {e}') from None


def count_words(text):
    """Return the number of words as the benchmark counts them, where a line end is one too."""
    return len(text.split()) + text.count('\n')


def main():
    if variant not in ('raw', 'v1'):
        raise UserError(f'variant is {variant!r}; choose from raw, v1')
    texts = {}
    for name, split in (('train', 'train'), ('val', 'validation'), ('test', 'test')):
        texts[name] = from_folder(split) if source else from_hub(split)

    if tokenizer == 'bpe':
        tok = folio.tokenizer.train_bpe([texts['train']], vocab_size)
    else:
        tok = folio.tokenizer.load(tokenizer)

    documents = {name: [text] for name, text in texts.items()}
    words = {name: count_words(text) for name, text in texts.items()}
    origin = source or f'Salesforce/wikitext, wikitext-2, {variant}'
    folder = folder_of(dataset)
    meta = write_dataset(folder, tok, documents, source=origin, words=words)
    for name, counts in meta['splits'].items():
        print(f'{folder}/{name}.bin: {counts["tokens"]:,} tokens of {tok.n_vocab:,}, '
              f'{counts["words"]:,} words, '
              + folio.tokenizer.fertility(texts[name], counts['tokens']))


configure(globals())
main()
