"""
Show how finely tokenizers cut a text: tokens per word and per character, bytes per token.
    python extras/fertility.py my.txt gpt2 data/book
    python extras/fertility.py my.txt cl100k_base my_tokenizers

A tokenizer is gpt2 or another name of tiktoken's, a data folder, a tokenizer.json (ours or one of
Hugging Face's), or a folder of these. White space separates words: for a script without it, such as
Chinese or Thai, look at the tokens per character.

Needs folio/; the package tokenizers for kinds that folio does not read.
"""
import glob
import os
import sys

sys.path.insert(0, os.path.abspath(__file__ + '/../..'))  # the root of the checkout
import tiktoken

import folio.tokenizer
from folio.configurator import UserError, report


def expand(source):
    """Return a list: the tokenizers in a folder of several, or else the source itself."""
    if not os.path.isdir(source) or os.path.exists(os.path.join(source, 'tokenizer.json')):
        return [source]
    found = glob.glob(os.path.join(source, '*', 'tokenizer.json'))
    found += glob.glob(os.path.join(source, '*.json'))
    return sorted(path for path in found if os.path.basename(path) != 'meta.json') or [source]


def load(source):
    """Return (size of its vocabulary, function from text to tokens). Raises UserError."""
    if source != 'gpt2' and source in tiktoken.list_encoding_names():
        encoding = tiktoken.get_encoding(source)
        return encoding.n_vocab, encoding.encode_ordinary
    try:
        ours = folio.tokenizer.load(source)
        return ours.n_vocab, ours.encode
    except UserError:
        path = os.path.join(source, 'tokenizer.json') if os.path.isdir(source) else source
        if not os.path.isfile(path):
            raise
    # A kind that folio does not read
    try:
        import tokenizers
    except ImportError:
        raise UserError(f'{path} is read by a package: pip install tokenizers') from None
    try:
        theirs = tokenizers.Tokenizer.from_file(path)
    except Exception as e:  # the package raises nothing narrower
        raise UserError(f'{path} is not a tokenizer: {e}') from None
    return theirs.get_vocab_size(), lambda text: theirs.encode(text, add_special_tokens=False).ids


def main():
    if '--help' in sys.argv or '-h' in sys.argv:
        print(__doc__.strip())
        return
    if len(sys.argv) < 3:
        raise UserError('usage: python extras/fertility.py TEXT_FILE TOKENIZER [TOKENIZER …]; '
                        '--help says what a tokenizer is')
    path, *sources = sys.argv[1:]
    try:
        with open(path, encoding='utf-8') as f:
            text = f.read()
    except UnicodeDecodeError as e:
        raise UserError(f'{path} cannot be read as UTF-8 text: {e}') from None
    for source in sources:
        for name in expand(source):
            vocab_size, encode = load(name)
            try:
                n_tokens = len(encode(text))
            except UserError as e:  # a character that it lacks; the others may have it
                print(f'{name}: {e}')
                continue
            print(f'{name}: vocabulary of {vocab_size:,}, {n_tokens:,} tokens, '
                  f'{folio.tokenizer.fertility(text, n_tokens)}')


if __name__ == '__main__':
    sys.excepthook = report
    main()
