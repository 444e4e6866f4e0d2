"""
Show how finely tokenizers cut a text: its tokens, tokens per word and bytes per token.
    python extras/fertility.py my.txt gpt2 data/book

A tokenizer is gpt2 or a data folder.

Needs folio/.
"""
import os
import sys

sys.path.insert(0, os.path.abspath(__file__ + '/../..'))  # the root of the checkout
import folio.tokenizer
from folio.configurator import UserError, report


def main():
    if '--help' in sys.argv:
        print(__doc__.strip())
        return
    if len(sys.argv) < 3:
        raise UserError('usage: python extras/fertility.py TEXT_FILE TOKENIZER [TOKENIZER …]; '
                        'a tokenizer is gpt2 or a data folder')
    path, *sources = sys.argv[1:]
    try:
        with open(path, encoding='utf-8') as f:
            text = f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'{path} cannot be read as UTF-8 text: {e}') from None
    for source in sources:
        tokenizer = folio.tokenizer.load(source)
        n_tokens = len(tokenizer.encode(text))
        print(f'{source}: vocabulary of {tokenizer.n_vocab:,}, {n_tokens:,} tokens, '
              f'{folio.tokenizer.fertility(text, n_tokens)}')


if __name__ == '__main__':
    sys.excepthook = report
    main()
