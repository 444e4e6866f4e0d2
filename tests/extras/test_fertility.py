"""extras/fertility.py: how finely tokenizers cut a text."""
import shutil

import pytest

from conftest import run, shared


def test_a_line_tells_how_finely_a_tokenizer_cuts_a_text(book_once):
    out, _ = run('extras/fertility.py', 'book.txt', 'data/book', cwd=book_once)
    assert '20,000 tokens' in out
    assert '1.00 a character, 1.00 bytes a token' in out


def test_a_script_without_spaces_is_measured_by_the_character(book):
    (book / 'ja.txt').write_text('吾輩は猫である。名前はまだ無い。', encoding='utf-8')
    run('prepare/book/prepare.py', '--book=book.txt', '--dataset=bytes', '--tokenizer=bpe',
        '--vocab_size=257', cwd=book)
    out, _ = run('extras/fertility.py', 'ja.txt', 'data/bytes', cwd=book)
    assert '48 tokens' in out and '3.00 a character, 1.00 bytes a token' in out


def test_a_tokenizer_that_lacks_a_character_does_not_end_the_comparison(book_once, tmp_path):
    shared('tiktoken')  # GPT-2's files
    (tmp_path / 'ja.txt').write_text('猫', encoding='utf-8')
    shutil.copytree(book_once / 'data', tmp_path / 'data')
    out, _ = run('extras/fertility.py', 'ja.txt', 'data/book', 'gpt2', cwd=tmp_path)
    characters, gpt2 = out.splitlines()
    assert characters.startswith('data/book: ') and '猫' in characters
    assert '3 tokens' in gpt2


def test_all_tokenizers_in_a_folder_are_compared(book):
    tokenizers = pytest.importorskip('tokenizers')
    theirs = tokenizers.Tokenizer(tokenizers.models.WordLevel({'?': 0}, unk_token='?'))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    (book / 'several').mkdir()
    theirs.save(str(book / 'several' / 'words.json'))
    shutil.copytree(book / 'data' / 'book', book / 'several' / 'book')
    out, _ = run('extras/fertility.py', 'book.txt', 'several', cwd=book)
    ours, words = out.splitlines()
    assert ours.startswith('several/book/tokenizer.json: ') and '20,000 tokens' in ours
    assert words.startswith('several/words.json: vocabulary of 1, ')
    assert '1.00 tokens a word' in words


def test_a_tokenizer_that_is_not_there_is_one_line(book_once):
    _, err = run('extras/fertility.py', 'book.txt', 'nowhere', cwd=book_once, status=2)
    assert err.startswith('error: no tokenizer in nowhere')
    assert err.count('\n') == 1
