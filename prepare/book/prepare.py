"""
Turn one book into train.bin, val.bin and test.bin: its first 90 %, the next 5 % and the last 5 %.
    python prepare/book/prepare.py                        # the Python Language Reference
    python prepare/book/prepare.py --book=gutenberg:1342  # any book of Project Gutenberg
    python prepare/book/prepare.py --book=my.txt --dataset=mine --tokenizer=bpe

The default book comes with every Python, so it needs no network. Prints what it wrote: characters,
tokens, tokens per word (fertility) and bytes per token.

Needs folio/ and prepare/corpus.py.
"""
import os
import re
import sys

sys.path[0] = os.path.abspath(__file__ + '/../../..')  # the root of the checkout
import folio.tokenizer
from folio.configurator import UserError, configure, folder_of, notice
from folio.download import download
from prepare.corpus import without_blank_ends, write_dataset

book = 'python'  # python, gutenberg:NUMBER, https://…, or a file
dataset = 'book'  # the folder under data/ to write
encoding = 'utf-8'  # of the text
tokenizer = 'char'  # char, bpe (of the training part), gpt2, or your data folder or tokenizer.json
vocab_size = 1024  # bpe only

GUTENBERG = 'https://www.gutenberg.org/cache/epub/{number}/pg{number}.txt'


# ---- The text ------------------------------------------------------------------------------------
def read_book():
    """Return the text of the setting `book`, downloaded if it has to be; raise UserError."""
    if book == 'python':
        return python_reference()
    path = book
    if book.startswith('gutenberg:'):
        number = book.removeprefix('gutenberg:')
        if not number.isdecimal():
            raise UserError(f'{book}: a number is needed, for example --book=gutenberg:1342')
        url = GUTENBERG.format(number=number)
        path = download(url, f'data/downloads/gutenberg-{number}.txt')
    elif book.startswith(('https://', 'http://')):
        file_name = re.sub(r'[^\w.-]+', '_', book.split('://')[1])
        path = download(book, f'data/downloads/{file_name}')
    text = read_text(path)
    if f'\n{folio.tokenizer.EOT}\n' in text:
        notice(f'{book} has the line {folio.tokenizer.EOT}, but stays one text; '
               'prepare/fineweb/prepare.py takes such a line as --separator')
    return without_gutenberg_licence(text)


def python_reference():
    """Return the topics of Python's own help(), sorted by name, each paragraph only once.

    A fifth of the text is in two topics. Kept twice, some of it would be trained and tested on.
    """
    from pydoc_data.topics import topics
    seen = set()
    kept = []
    for name in sorted(topics):
        for paragraph in topics[name].strip('\n').split('\n\n'):
            # Short ones are headings and the like, which the text needs where they stand.
            if len(paragraph) < 40 or paragraph.strip() not in seen:
                seen.add(paragraph.strip())
                kept.append(paragraph)
    return '\n\n'.join(kept) + '\n'


def read_text(path):
    """Return the text of a file, with \\n for every line end and without a byte-order mark."""
    try:
        with open(path, encoding=encoding) as f:
            return f.read().removeprefix('\ufeff')
    except OSError as e:
        raise UserError(f'{path} cannot be read: {e.strerror}; '
                        '--book takes python, gutenberg:NUMBER, an address or a file') from None
    except (UnicodeError, LookupError) as e:
        raise UserError(f'{path} is not {encoding} ({e}); '
                        'name its encoding, for example --encoding=latin-1') from None


def without_gutenberg_licence(text):
    """Return the books between Project Gutenberg's START and END lines; without such pairs, all."""
    # DOTALL, because a long title may continue in the next line.
    line = r'^\s*\*\*\* ?(START|END) OF (?:THE|THIS) PROJECT GUTENBERG.{0,500}?\*\*\*'
    found = list(re.finditer(line, text, re.MULTILINE | re.DOTALL | re.IGNORECASE))
    books = list(zip(found[::2], found[1::2]))
    words = [match[1].upper() for match in found]
    if words != ['START', 'END'] * len(books):
        notice(f"the START and END lines of Project Gutenberg in {book} do not make pairs: nothing "
               'is left out')
        books = []
    if books:
        n_chars = len(text)
        text = '\n\n'.join(without_blank_ends(text[start.end():end.start()])
                           for start, end in books)
        notice(f"{n_chars - len(text):,} characters outside of Project Gutenberg's START and END "
               f'lines are left out: {len(books)} of these pairs were found')
    return without_blank_ends(text) + '\n'


# ---- Tokens --------------------------------------------------------------------------------------
def make_tokenizer(text, train_text):
    """Return the tokenizer that the settings ask for."""
    if tokenizer == 'char':
        return folio.tokenizer.CharTokenizer(''.join(sorted(set(text))))
    if tokenizer == 'bpe':
        return folio.tokenizer.train_bpe([train_text], vocab_size)
    return folio.tokenizer.load(tokenizer)


def main():
    text = read_book()
    n_chars = len(text)
    if len(text.strip()) < 200:
        raise UserError(f'{book} has {len(text.strip())} characters; '
                        'a book to learn from needs at least 200')
    # Whole stretches of the book: sentences drawn at random would have neighbours in training.
    train_end = n_chars * 90 // 100
    val_end = n_chars * 95 // 100
    splits = {'train': text[:train_end], 'val': text[train_end:val_end], 'test': text[val_end:]}

    tok = make_tokenizer(text, splits['train'])
    folder = folder_of(dataset)
    documents = {name: [part] for name, part in splits.items()}  # each split is one document
    meta = write_dataset(folder, tok, documents, source=book)

    counts = {name: split['tokens'] for name, split in meta['splits'].items()}
    n_tokens = sum(counts.values())
    print(f'{folder}: {n_chars:,} characters as {n_tokens:,} tokens '
          f'of a {tokenizer} vocabulary of {tok.n_vocab:,}')
    print('    ' + ', '.join(f'{name} {n:,}' for name, n in counts.items()) + ' tokens; '
          + folio.tokenizer.fertility(text, n_tokens))


configure(globals())
main()
