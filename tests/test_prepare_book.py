"""prepare/book/prepare.py: a book from the web or a file, its licence, its splits and tokens."""
import os

import pytest

import folio.tokenizer
from conftest import run, shared
from folio import download
from folio.data import Dataset
from server import FileServer

BOOK = 'prepare/book/prepare.py'
BODY = 'A true story, told in full.\r\nÉmile went home.\r\n' * 400
START = '*** START OF THE PROJECT GUTENBERG EBOOK X ***'
END = '*** END OF THE PROJECT GUTENBERG EBOOK X ***'
GUTENBERG = ('\ufeffThe Project Gutenberg eBook of X\r\n\r\n' + START + '\r\n\r\n' + BODY
             + '\r\n\r\n' + END + '\r\nlicence, licence\r\n').encode()


@pytest.fixture
def server(monkeypatch):
    """A server that stands in for gutenberg.org. Nobody waits between two attempts."""
    monkeypatch.setattr(download.time, 'sleep', lambda seconds: None)
    server = FileServer(GUTENBERG)
    get = download.requests.get
    monkeypatch.setattr(download.requests, 'get', lambda url, **options: get(
        url.replace('https://www.gutenberg.org', server.url), **options))
    yield server
    server.server.shutdown()


def text_of(folder, name='book'):
    """Return the text of a prepared book: its three splits, decoded and joined."""
    data = Dataset(str(folder / 'data' / name))
    tokenizer = folio.tokenizer.load(data.spec)
    first = 0 if tokenizer.eot is None else 1
    texts = [tokenizer.decode(data.tokens(split)[first:].tolist())
             for split in ('train', 'val', 'test')]
    return ''.join(texts)


@pytest.mark.parametrize('script', [['ok'], [503, 429, 'ok'], ['cut', 'cut', 'ok'], ['gzip']],
                         ids=str)
def test_a_gutenberg_book_arrives_whole_without_its_licence(server, tmp_path, script):
    server.script = list(script)
    run(BOOK, '--book=gutenberg:99', cwd=tmp_path)
    assert text_of(tmp_path) == BODY.replace('\r\n', '\n')
    run(BOOK, '--book=gutenberg:99', cwd=tmp_path)  # from the copy that is here
    assert server.asked == ['/cache/epub/99/pg99.txt'] * len(script)
    assert os.listdir(tmp_path / 'data/downloads') == ['gutenberg-99.txt']


def test_a_book_that_cannot_be_had_is_one_line(server, tmp_path):
    server.script = [404]
    _, err = run(BOOK, '--book=gutenberg:99', cwd=tmp_path, status=2)
    assert err.startswith('error: could not download')
    assert 'HTTP 404' in err
    assert 'Traceback' not in err
    assert not (tmp_path / 'data' / 'book').exists()


def test_any_address_will_do(server, tmp_path):
    run(BOOK, f'--book={server.url}/some/book.txt', '--tokenizer=bpe', '--vocab_size=300',
        cwd=tmp_path)
    assert text_of(tmp_path) == BODY.replace('\r\n', '\n')


# ---- The licence ---------------------------------------------------------------------------------
def book_of(*parts, folder):
    """Return (the text that book/prepare.py makes of these lines, what it says)."""
    (folder / 'my.txt').write_text('\n'.join(parts))
    _, err = run(BOOK, '--book=my.txt', cwd=folder)
    return text_of(folder), err


ONE = '    One, indented.\n' + 'and more\n' * 30
TWO = 'Two.\n' + 'and the rest\n' * 30


def test_of_several_books_in_one_file_all_stay(tmp_path):
    start, end = (line.replace('THE', 'THIS').lower() for line in (START, END))
    text, said = book_of('a licence', START, '\n', ONE, END, 'and notes', start, TWO, end, 'notes',
                         folder=tmp_path)
    assert text == f'{ONE}\n\n{TWO}'.replace('\n\n\n', '\n\n')
    n_left_out = len((tmp_path / 'my.txt').read_text()) - len(text.rstrip())
    assert f'{n_left_out:,} characters' in said
    assert '2 of these pairs' in said


@pytest.mark.parametrize('parts', [
    [END, TWO], [ONE, START, TWO], [ONE, END, START, TWO], [START, ONE, END, TWO, END],
    [START, ONE, START, TWO, END], [START, ONE, END, START, TWO],
], ids=lambda parts: ' '.join({START: 'START', END: 'END', ONE: 'one', TWO: 'two'}[part]
                              for part in parts))
def test_nothing_is_cut_where_the_lines_do_not_make_pairs(tmp_path, parts):
    text, said = book_of(*parts, folder=tmp_path)
    assert text == '\n'.join(parts).rstrip() + '\n'
    assert 'do not make pairs' in said


def test_a_text_of_ones_own_is_kept_with_its_indentation(tmp_path):
    text, said = book_of('', ' ', ONE, TWO, '  ', folder=tmp_path)
    assert text == f'{ONE}\n{TWO}'
    assert said == ''


def test_lines_between_documents_are_said_to_be_text(tmp_path):
    text, said = book_of(ONE, '<|endoftext|>', TWO, folder=tmp_path)
    assert '<|endoftext|>' in text
    assert '--separator' in said


# ---- Splits and tokens ---------------------------------------------------------------------------
def test_parts_are_contiguous_ninety_five_five_and_reported(tmp_path):
    text = ''.join(f'line {i}\n' for i in range(1000))
    (tmp_path / 'my.txt').write_text(text, encoding='utf-8')
    out, _ = run(BOOK, '--book=my.txt', '--dataset=mine', cwd=tmp_path)
    data = Dataset(str(tmp_path / 'data' / 'mine'))
    sizes = {split: len(data.tokens(split)) for split in data.splits()}
    assert sizes['train'] == len(text) * 90 // 100
    assert abs(sizes['val'] - sizes['test']) <= 1
    assert text_of(tmp_path, 'mine') == text
    assert f'{len(text):,} characters' in out
    assert 'tokens a word' in out
    assert '1.00 bytes a token' in out


def test_bpe_is_trained_on_the_training_part_only(tmp_path):
    text = 'plain words here. ' * 500 + 'zyzzyva ' * 100
    (tmp_path / 'my.txt').write_text(text, encoding='utf-8')
    run(BOOK, '--book=my.txt', '--tokenizer=bpe', '--vocab_size=400', cwd=tmp_path)
    merges = Dataset(str(tmp_path / 'data' / 'book')).spec['merges']
    assert not any('zy' in left + right for left, right in merges)


def test_gpt2_tokens_and_other_encodings(tmp_path):
    shared('tiktoken')
    text = 'Émile rêvait, déjà.\n' * 50
    (tmp_path / 'my.txt').write_bytes(text.encode('latin-1'))
    run(BOOK, '--book=my.txt', '--encoding=latin-1', '--tokenizer=gpt2', cwd=tmp_path)
    data = Dataset(str(tmp_path / 'data' / 'book'))
    assert text_of(tmp_path) == text
    assert data.tokens('train')[0] == 50256
    assert data.vocab_size == 50257


def test_a_tokenizer_of_ones_own_serves_another_text(tmp_path):
    for name in ('one', 'two'):
        (tmp_path / f'{name}.txt').write_text(f'plain words of text {name}\n' * 50)
    run(BOOK, '--book=one.txt', '--dataset=one', '--tokenizer=bpe', '--vocab_size=280',
        cwd=tmp_path)
    for origin in ('data/one', 'data/one/tokenizer.json'):
        run(BOOK, '--book=two.txt', '--dataset=two', f'--tokenizer={origin}', cwd=tmp_path)
        assert Dataset(str(tmp_path / 'data/two')).spec == Dataset(str(tmp_path / 'data/one')).spec
        assert 'text two' in text_of(tmp_path, 'two')


def test_default_book_says_nothing_twice(tmp_path):
    """No paragraph of the test and validation parts was in the training part."""
    run(BOOK, cwd=tmp_path)
    text = text_of(tmp_path)
    paragraphs = [p.strip() for p in text.split('\n\n') if len(p) >= 40]
    assert len(text) > 350_000
    assert len(paragraphs) == len(set(paragraphs))
