"""
One book to train.bin, val.bin and test.bin: its first 90 %, the next 5 % and the last 5 %.
    python prepare/book/prepare.py                             # the Python Language Reference, which every Python has
    python prepare/book/prepare.py --book=gutenberg:1342       # any number of Project Gutenberg
    python prepare/book/prepare.py --book=my.txt --dataset=mine --tokenizer=bpe

Prints what it wrote: characters, tokens, tokens a word (fertility) and bytes a token.
"""
import os
import re
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the root
import folio.tokenizer
from folio.configurator import UserError, configure
from prepare.corpus import write_dataset
from folio.download import download

book = 'python'  # python, gutenberg:NUMBER, https://…, or a file
dataset = 'book'  # the folder under data/ to write
encoding = 'utf-8'  # of the text
tokenizer = 'char'  # char, bpe (trained on the training part) or gpt2
vocab_size = 1024  # bpe only
mirrors = 'https://www.gutenberg.org https://gutenberg.pglaf.org https://aleph.pglaf.org'  # Gutenberg's, in order
configure(globals())


def python_reference():
    """The topics of Python's own help(), in the order of their names, without paragraphs that an earlier one has.

    A fifth of the text stands in two topics; left in, a part of what we test on would have been trained on.
    """
    from pydoc_data.topics import topics
    seen, kept = set(), []
    for name in sorted(topics):
        for paragraph in topics[name].strip('\n').split('\n\n'):
            if len(paragraph) < 40 or paragraph.strip() not in seen:
                seen.add(paragraph.strip())
                kept.append(paragraph)
    return '\n\n'.join(kept) + '\n'


def read_text(path):
    """The text of a file, with \\n for every line end."""
    try:
        with open(path, encoding=encoding) as f:
            return f.read().removeprefix('\ufeff')
    except OSError as e:
        raise UserError(f'{path} cannot be read: {e.strerror}; --book takes python, gutenberg:NUMBER, an address or a '
                        'file') from None
    except (UnicodeError, LookupError) as e:
        raise UserError(f'{path} is not {encoding} ({e}); name its encoding, for example --encoding=latin-1') from None


def without_gutenberg_licence(text):
    """What stands between Project Gutenberg's START and END lines, or all of it where there are none."""
    line = r'^\s*\*\*\* ?{} OF (?:THE|THIS) PROJECT GUTENBERG.*?\*\*\*'
    start = re.search(line.format('START'), text, re.MULTILINE | re.DOTALL | re.IGNORECASE)
    end = re.search(line.format('END'), text, re.MULTILINE | re.DOTALL | re.IGNORECASE)
    return text[start.end() if start else 0:end.start() if end else len(text)].strip() + '\n'


if book == 'python':
    text = python_reference()
elif book.startswith('gutenberg:'):
    number = book.removeprefix('gutenberg:')
    if not number.isdecimal():
        raise UserError(f'{book}: a number is needed, for example --book=gutenberg:1342')
    urls = [f'{mirror.rstrip("/")}/cache/epub/{number}/pg{number}.txt' for mirror in mirrors.split()]
    text = without_gutenberg_licence(read_text(download(urls, f'data/downloads/gutenberg-{number}.txt')))
elif book.startswith(('https://', 'http://')):
    path = 'data/downloads/' + re.sub(r'[^\w.-]+', '_', book.split('://')[1])
    text = without_gutenberg_licence(read_text(download([book], path)))
else:
    text = without_gutenberg_licence(read_text(book))

if len(text.strip()) < 200:
    raise UserError(f'{book} has {len(text.strip())} characters; a book to learn from needs at least 200')
cuts = [0, len(text) * 90 // 100, len(text) * 95 // 100, len(text)]
splits = {name: text[a:b] for name, a, b in zip(('train', 'val', 'test'), cuts, cuts[1:])}
if tokenizer == 'char':
    tok = folio.tokenizer.CharTokenizer(''.join(sorted(set(text))))
elif tokenizer == 'bpe':
    tok = folio.tokenizer.train_bpe([splits['train']], vocab_size)
elif tokenizer == 'gpt2':
    tok = folio.tokenizer.load('gpt2')
else:
    raise UserError(f'tokenizer is {tokenizer!r}; choose from char, bpe, gpt2')
folder = os.path.join('data', dataset)
meta = write_dataset(folder, tok, {name: [part] for name, part in splits.items()}, source=book)
counts = {name: split['tokens'] for name, split in meta['splits'].items()}
print(f'{folder}: {len(text):,} characters as {sum(counts.values()):,} tokens '
      f'of a {tokenizer} vocabulary of {tok.n_vocab:,}')
print('    ' + ', '.join(f'{name} {n:,}' for name, n in counts.items()) + ' tokens; '
      + folio.tokenizer.fertility(text, sum(counts.values())))
