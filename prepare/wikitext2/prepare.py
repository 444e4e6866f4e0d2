"""
WikiText-2 to train.bin, val.bin and test.bin, in the tokens of a BPE of 32,000 trained on its training split.
    python prepare/wikitext2/prepare.py                      # the raw text; --variant=v1 for the one with <unk>
    python prepare/wikitext2/prepare.py --source=folder      # one with train.txt, valid.txt and test.txt

Each split is one document, as the benchmark has it. Its words are counted as there, so that a perplexity per word
compares: what white space separates, and one end of line a line (of v1 217,646 in the validation split, 245,569 in the
test).
"""
import glob
import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the root
import folio.tokenizer
from folio.configurator import UserError, configure
from prepare.corpus import write_dataset
from prepare.documents import first_line

variant = 'raw'  # raw, or v1: rare words are <unk>
source = ''  # instead of the hub: a folder with train.txt, valid.txt and test.txt (or wiki.train.tokens …)
dataset = 'wikitext2'  # the folder under data/ to write
tokenizer = 'bpe'  # bpe (trained on the training split) or gpt2
vocab_size = 32000  # bpe only
configure(globals())


def from_hub(split):
    """The text of a split. The hub has it by lines, and the blank ones, ' \\n', as ''."""
    import datasets
    import huggingface_hub
    huggingface_hub.logging.set_verbosity_error()  # in place of a line for each attempt
    name = 'wikitext-2-raw-v1' if variant == 'raw' else 'wikitext-2-v1'
    try:
        lines = datasets.load_dataset('Salesforce/wikitext', name, split=split)['text']
    except Exception as e:  # offline, refused, disk full: its errors have no common class
        raise UserError(f'WikiText-2 could not be downloaded ({first_line(e)}); check the network, or give '
                        '--source=folder') from e
    return ''.join(line or ' \n' for line in lines)


def from_folder(split):
    """The text of the file in the folder `source` that has the split in its name."""
    found = [path for name in (split, split.replace('validation', 'valid'))
             for path in sorted(glob.glob(os.path.join(glob.escape(source), f'*{name}.*')))]
    if not found:
        raise UserError(f'no file in {source} is called {split.replace("validation", "valid")}.txt or the like')
    try:
        with open(found[0], encoding='utf-8') as f:
            return f.read()
    except (OSError, UnicodeError) as e:
        raise UserError(f'{found[0]} cannot be read as UTF-8 text: {e}') from None


if variant not in ('raw', 'v1') or tokenizer not in ('bpe', 'gpt2'):
    raise UserError(f'variant is {variant!r}, tokenizer {tokenizer!r}; choose from raw, v1 and from bpe, gpt2')
texts = {name: (from_folder if source else from_hub)(split)
         for name, split in (('train', 'train'), ('val', 'validation'), ('test', 'test'))}
tok = folio.tokenizer.load('gpt2') if tokenizer == 'gpt2' else folio.tokenizer.train_bpe([texts['train']], vocab_size)
words = {name: len(text.split()) + text.count('\n') for name, text in texts.items()}
meta = write_dataset(os.path.join('data', dataset), tok, {name: [text] for name, text in texts.items()},
                     source or f'Salesforce/wikitext, wikitext-2, {variant}', words)
for name, counts in meta['splits'].items():
    print(f'data/{dataset}/{name}.bin: {counts["tokens"]:,} tokens of {tok.n_vocab:,}, {counts["words"]:,} words, '
          + folio.tokenizer.fertility(texts[name], counts['tokens']))
