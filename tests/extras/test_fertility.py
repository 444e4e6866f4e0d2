"""extras/fertility.py: how finely tokenizers cut a text."""
from conftest import run


def test_a_line_tells_how_finely_a_tokenizer_cuts_a_text(book_once):
    out, _ = run('extras/fertility.py', 'book.txt', 'data/book', cwd=book_once)
    assert '20,000 tokens' in out
    assert '1.00 bytes a token' in out


def test_a_tokenizer_that_is_not_there_is_one_line(book_once):
    _, err = run('extras/fertility.py', 'book.txt', 'nowhere', cwd=book_once, status=2)
    assert err.startswith('error: no tokenizer in nowhere')
    assert err.count('\n') == 1
