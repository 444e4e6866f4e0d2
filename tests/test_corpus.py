"""A corpus holds every document of its source files once, however they lie there and are read."""
import bz2
import gzip
import hashlib
import json
import lzma
import os
import pathlib
import random
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import assume, given, settings, strategies as st
from tqdm import tqdm

from conftest import ROOT, largest_file, need_gpt2, run
from folio import bpe
from folio.configurator import UserError
from folio.data import Dataset
from folio.log import only_one
from prepare import corpus
import folio.tokenizer

FINEWEB = 'prepare/fineweb/prepare.py'
TEXTS = ['He said "hi"\nand left.', 'plain text, two lines\nhere', 'naïve 漢字 🙂', 'last']
PARQUET = {'row_group_size': 5, 'compression': 'none', 'use_dictionary': False}


@pytest.fixture(scope='module')
def alphabet(tmp_path_factory):
    """The path of a tokenizer whose tokens are bytes."""
    path = tmp_path_factory.mktemp('tokenizer') / 'bytes.json'
    folio.tokenizer.save(folio.tokenizer.train_bpe([], 257), path)
    return path


@pytest.fixture
def prepare(tmp_path, alphabet, monkeypatch):
    """A function that runs prepare.py in tmp_path, where we are; it returns what was printed."""
    monkeypatch.chdir(tmp_path)

    def prepare(*args, status=0):
        out, err = run(FINEWEB, f'--tokenizer={alphabet}', *args, cwd=tmp_path, status=status)
        return out + err
    return prepare


def documents(folder='.', name='fineweb'):
    """Return the documents of a data set in the order of the stream: val.bin, then train.bin."""
    data = Dataset(str(pathlib.Path(folder) / 'data' / name))
    ids = np.concatenate([data.tokens('val'), data.tokens('train')]).tolist()
    texts = folio.tokenizer.load(data.spec).decode_bytes(ids).decode().split('<|endoftext|>')
    assert texts[0] == ''
    return texts[1:]


def lines(texts, **others):
    """Return the contents of a .jsonl of these texts."""
    return ''.join(json.dumps({'text': text} | others) + '\n' for text in texts)


def texts_of(name, n=20):
    return [f'{name}, document {i}: ' + ' '.join(map(str, range(i))) for i in range(n)]


def read(path, **form):
    """Return the documents of a file, and how many broken rows were left out."""
    texts = []
    n_bad = 0
    for chunk, n_bad_here in corpus.read(str(path), corpus.Form(**form), tqdm(disable=True)):
        texts += [text for text, _ in chunk]
        n_bad += n_bad_here
    return texts, n_bad


def hashes_of(folder):
    """Return {file: SHA-256} of data/fineweb, which must be complete and have left nothing else."""
    files = sorted((folder / 'data' / 'fineweb').iterdir())
    assert [path.name for path in files] == ['meta.json', 'tokenizer.json', 'train.bin', 'val.bin']
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- The source files ----------------------------------------------------------------------------
def write_files(*paths):
    for path in map(pathlib.Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines([str(path)]))


@pytest.mark.parametrize('pattern', ['d/**/**/*.jsonl', 'd/**/*.jsonl', 'd/**', '**/*.jsonl'])
def test_each_file_is_read_once_whatever_leads_to_it(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    write_files('d/a/b/c/x.jsonl', 'd/a/y.jsonl', 'd/z.jsonl')
    os.symlink('a', 'd/linked')
    os.symlink('y.jsonl', 'd/a/same.jsonl')
    os.link('d/z.jsonl', 'd/zz.jsonl')
    found = corpus.local_files(pattern)
    assert len(found) == 3
    assert sorted(read(path)[0][0] for path in found) == [
        'd/a/b/c/x.jsonl', 'd/a/y.jsonl', 'd/z.jsonl']


def test_files_behind_a_link_to_a_folder_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files('elsewhere/deep/x.jsonl', 'd/y.jsonl', 'd/.hidden.jsonl', 'd/.cache/z.jsonl')
    os.symlink('../elsewhere', 'd/linked')
    assert corpus.local_files('d/**/*.jsonl') == ['d/linked/deep/x.jsonl', 'd/y.jsonl']


@pytest.mark.parametrize('pattern', ['d/*.jsonl', 'd/1.jsonl', 'd/**/*.jsonl'])
def test_a_link_to_nothing_is_named(prepare, pattern):
    """As a download that broke off leaves it in the hub's cache."""
    write_files('blobs/0', 'd/0.jsonl')
    os.symlink('../blobs/1', 'd/1.jsonl')
    assert "No such file or directory: 'd/1.jsonl'" in prepare(f'--source={pattern}', status=2)


def test_names_are_taken_as_they_are(prepare, tmp_path, monkeypatch):
    names = ['BIG.JSONL', 'a [1].jsonl', 'b.ndjson', 'colon::x.jsonl']
    write_files(*names)
    for name in names:
        assert corpus.local_files(name) == [name]
        assert read(name)[0] == [name]
    monkeypatch.setenv('HOME', str(tmp_path))
    assert len(corpus.local_files('~/*')) == 4
    prepare('--source=*')
    assert documents() == names


@pytest.mark.parametrize('name, content, says', [
    ('z.md', b'# About these files\n', 'z.md is none of .parquet, .jsonl'),
    ('z.csv.gz', gzip.compress(b'a', mtime=0), 'none of .parquet'),
    ('z.jsonl.zip', b'PK', 'none of .parquet'),
    ('z.jsonl', b'{"content": "a"}\n', 'z.jsonl, line 1: it has no text; with --column=, name one'),
    ('z.json', b'[\n{"text": "a"}\n]', 'z.json is one list; one object a line is needed'),
    ('z.jsonl.gz', b'', 'z.jsonl.gz could not be read (ValueError: it has 0 bytes'),
    ('z.jsonl.zst', b'', 'it has 0 bytes'),
    ('z.jsonl.bz2', b'torn', 'z.jsonl.bz2 could not be read'),
    ('z.parquet', b'PAR1', 'z.parquet could not be read'),
    ('z.txt', b'version https://git-lfs.github.com/spec/v1\noid sha256:1\n', 'git lfs pull'),
    ('z.txt', 'd\xe9j\xe0 vu'.encode('latin-1'), 'z.txt could not be read (UnicodeDecodeError'),
    ('z.txt', '\ufeffd\xe9j\xe0 vu'.encode('utf-16'), "'utf-8' codec can't decode"),
])
def test_an_unreadable_file_is_named_before_the_first_token(prepare, name, content, says):
    write_files('a.jsonl')
    pathlib.Path(name).write_bytes(content)
    assert says in prepare('--source=*', status=2)
    assert not os.path.exists('data')


def test_a_parquet_without_the_column_is_named_at_once(prepare):
    pyarrow.parquet.write_table(pyarrow.table({'text': TEXTS}), 'a.parquet')
    pyarrow.parquet.write_table(pyarrow.table({'content': TEXTS, 'id': range(4)}), 'b.parquet')
    said = prepare('--source=*.parquet', '--skip_bad=True', status=2)
    assert said == 'error: b.parquet: it has no text; with --column=, name one of content, id\n'
    assert not os.path.exists('data')


def test_a_corrected_column_just_works(prepare):
    pathlib.Path('a.jsonl').write_text(lines(TEXTS).replace('text', 'content', 1).replace(
        '"text":', '"content":'))
    assert '--column=' in prepare('--source=a.jsonl', status=2)
    assert 'another --column' in prepare('--source=a.jsonl', '--skip_bad=True', status=2)
    prepare('--source=a.jsonl', '--column=content')
    assert len(documents()) == 4


# ---- Lines and tables ----------------------------------------------------------------------------
@pytest.mark.parametrize('line, says', [
    ('{"text": "a\x01b"}', 'Invalid control character'),
    ('{"text": "torn', 'Invalid control character'),
    ('{"txt": "a", "id": 1}', 'it has no text; with --column=, name one of txt, id'),
    ('["text"]', 'it is list, not an object'),
    ('"text"', 'it is str, not an object'),
    ('{"text": ["a"]}', 'text is list, not text; name another with --column='),
    ('{"text": false}', 'text is bool, not text'),
    (b'{"text": "\xff"}', "can't decode byte 0xff"),
], ids=['control', 'torn', 'column', 'rows', 'row', 'list', 'bool', 'bytes'])
def test_a_broken_line_is_named_by_its_number(tmp_path, line, says):
    line = line if isinstance(line, bytes) else line.encode()
    path = tmp_path / 'a.jsonl'
    path.write_bytes(lines(TEXTS).encode() + b'\n' + line + b'\n' + b'{"text": "after"}')
    with pytest.raises(UserError, match=r'a.jsonl, line 6: .*--skip_bad=True') as error:
        read(path)
    assert says in str(error.value)
    assert read(path, skip_bad=True) == ([*TEXTS, 'after'], 1)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5)
PLAIN = st.fixed_dictionaries({'text': st.text()}, optional={'id': VALUES, 'meta': VALUES})
HOSTILE = st.one_of(
    PLAIN.map(json.dumps), PLAIN.map(lambda row: json.dumps(row, ensure_ascii=False)),
    PLAIN.map(lambda row: json.dumps(row)[:-2]), VALUES.map(json.dumps),
    st.dictionaries(st.text(), VALUES).map(json.dumps), st.text(),
).map(lambda line: line.replace('\n', ' ').encode('utf-8', 'surrogatepass')) | st.binary().map(
    lambda line: line.replace(b'\n', b''))


def expected_of(line):
    """Return the document in a line of bytes, '' if it has none, or None if the line is broken."""
    if not line.strip(b' \t\r\n\x0b\x0c'):
        return ''
    try:
        row = json.loads(line)
        text = row['text']
        if text is None:
            return ''
        assert isinstance(row, dict) and isinstance(text, str)
    except Exception:
        return None
    return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


@settings(deadline=None)
@given(st.lists(HOSTILE, max_size=30))
def test_documents_are_those_of_json_loads_or_the_line_is_named(tmp_path_factory, some):
    # hypothesis also tries the constants of our code, and such a file is refused as a whole.
    assume(not some or not some[0].startswith(b'version https://git-lfs'))
    path = tmp_path_factory.getbasetemp() / 'hostile.jsonl'
    path.write_bytes(b''.join(line + b'\n' for line in some))
    expected = [expected_of(line) for line in some]
    found = [text for text in expected if text]
    assert read(path, skip_bad=True) == (found, expected.count(None))
    if None in expected:
        with pytest.raises(UserError, match=f', line {expected.index(None) + 1}: '):
            read(path)


@pytest.mark.parametrize('early, late', [
    ({}, {'lang': 'en'}), ({'score': None}, {'score': 0.5}), ({'id': 5}, {'id': 'x13999'}),
    ({'meta': {'a': 1}}, {'meta': {'a': 1, 'b': 2}}), ({'type': 'a', 'message': 'b'}, {}),
])
def test_other_columns_may_hold_what_they_like(tmp_path, early, late):
    # Over ten megabytes: a reader that guesses the columns' types from the first would fail later.
    texts = ['word ' * 200_000] * 11
    (tmp_path / 'a.jsonl').write_text(lines(texts, **early) + lines(['end'], **late))
    assert read(tmp_path / 'a.jsonl') == ([*texts, 'end'], 0)


def test_text_may_be_null_and_look_like_anything(tmp_path):
    texts = [None] * 30 + ['2024-01-01', '5', 'null', '', 'true', 'a\ud83d', '\ud83d\ude42']
    expected = ['2024-01-01', '5', 'null', 'true', 'a\ufffd', '🙂']
    (tmp_path / 'a.jsonl').write_text(lines(texts))
    (tmp_path / 'a.json').write_text(lines(texts))
    for name in ('a.jsonl', 'a.json'):
        assert read(tmp_path / name) == (expected, 0)


@pytest.mark.parametrize('kind', [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(),
                                  pyarrow.dictionary(pyarrow.int32(), pyarrow.string())], ids=str)
def test_a_parquet_may_hold_text_in_many_ways(tmp_path, kind):
    text = pyarrow.array([*TEXTS, None, ''] * 9).cast(kind)
    table = pyarrow.table({'id': range(54), 'text': text, 'meta': [{'a': [1]}] * 54})
    pyarrow.parquet.write_table(table, tmp_path / 'a.parquet', row_group_size=5)
    assert read(tmp_path / 'a.parquet') == (TEXTS * 9, 0)


@pytest.mark.parametrize('value', [['a'], {'a': 'b'}, b'abc', 5], ids=repr)
def test_a_parquet_column_that_is_not_text_gets_one_line(tmp_path, value):
    table = pyarrow.table({'text': [value] * 9, 'id': range(9)})
    pyarrow.parquet.write_table(table, tmp_path / 'a.parquet')
    with pytest.raises(UserError, match=r'row 1: text is \w+, not text; name another with --col'):
        read(tmp_path / 'a.parquet')


def test_a_parquet_row_that_is_not_utf_8_is_named(tmp_path):
    good = pyarrow.array([b'fine', b'\xff', b'more'])
    text = pyarrow.StringArray.from_buffers(3, *good.buffers()[1:])
    pyarrow.parquet.write_table(pyarrow.table({'text': text}), tmp_path / 'a.parquet', **PARQUET)
    with pytest.raises(UserError, match='row 2: '):
        read(tmp_path / 'a.parquet')
    assert read(tmp_path / 'a.parquet', skip_bad=True) == (['fine', 'more'], 1)


# ---- Texts ---------------------------------------------------------------------------------------
def test_byte_order_marks_go_and_line_ends_become_newlines(tmp_path):
    (tmp_path / 'a.txt').write_bytes('\ufeff  First word\r\nand\rmore\r\n'.encode())
    (tmp_path / 'a.jsonl').write_bytes('\ufeff{"text": "first"}\n{"text": "second"}'.encode())
    assert read(tmp_path / 'a.txt') == (['  First word\nand\nmore\n'], 0)
    assert read(tmp_path / 'a.jsonl') == (['first', 'second'], 0)


@pytest.mark.parametrize('separator', ['<|endoftext|>', '%', '* * *'])
def test_a_line_may_separate_the_documents_of_a_text(prepare, separator):
    texts = ['Once upon a time\n\n\n', '  a 100 % sure % thing\n%%', '<|end', 'last\n']
    text = f'\n{separator}\n'.join(texts)
    pathlib.Path('a.txt').write_text(f'{separator}\n\n{separator}\n{text}')
    prepare('--source=a.txt', f'--separator={separator}', '--val_tokens=9')
    assert documents() == texts


@pytest.mark.parametrize('args', [[], ['--separator=%']], ids=['one', 'many'])
def test_a_byte_that_is_not_utf_8_never_costs_the_rest_of_a_text(prepare, args):
    document = b'a few words of English\n%\n'
    before = document * 60_000  # more than is looked at before the first token is made
    pathlib.Path('a.txt').write_bytes(before + b'\xff\n%\n' + document * 1000)
    said = prepare('--source=a.txt', '--skip_bad=True', *args, status=2)
    assert "a.txt could not be read (UnicodeDecodeError: 'utf-8' codec can't decode" in said
    assert not parts()


@pytest.mark.parametrize('text, is_said', [
    ('one\n<|endoftext|>\ntwo', True), ('one<|endoftext|>two', True), ('one\n\ntwo', False)])
def test_a_text_that_looks_like_many_documents_is_said_to_be_one(prepare, text, is_said):
    pathlib.Path('a.txt').write_text(text * 9)
    said = prepare('--source=a.txt')
    assert ("--separator='<|endoftext|>'" in said) == is_said
    meta = json.loads(pathlib.Path('data/fineweb/meta.json').read_text())
    assert meta['splits']['val']['documents'] + meta['splits']['train']['documents'] == 1


@settings(deadline=None)
@given(st.text(st.sampled_from('ab1 \n\t.\u3000é'), max_size=200))
def test_a_long_text_in_stretches_has_the_tokens_of_the_whole(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / 'long.txt'
    path.write_text(text)
    tok = folio.tokenizer.train_bpe(['a b  a  b\n\nab ab\n a1 1a . .. ' * 9], 280)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, 'CHUNK_CHARS', 7)
        stream = list(corpus.tokenize([str(path)], tqdm(disable=True), tok, corpus.Form()))
    expected = [tok.eot, *tok.encode(text)] if text else []
    assert np.concatenate([tokens for _, tokens in stream]).tolist() == expected


def test_a_million_white_characters_in_a_row_are_tokens_too():
    """tiktoken would print a Rust backtrace, and end the process."""
    need_gpt2()
    tokenizer = folio.tokenizer.load('gpt2')
    text = 'a\n' + '\n' * 2_100_000 + 'x  y\n' + ' ' * 1_000_000
    assert tokenizer.decode(tokenizer.encode(text)) == text


# ---- Memory --------------------------------------------------------------------------------------
def peak_of_reading(path):
    """Return the most memory, in MiB, that a process takes to read and to tokenize a file."""
    # Not by getrusage, whose figure begins with the memory of the process that started this one.
    code = ('import sys, folio.tokenizer; from tqdm import tqdm; from prepare import corpus\n'
            'tok = folio.tokenizer.load("gpt2")\n'
            'for _ in corpus.tokenize(sys.argv[1:], tqdm(disable=True), tok, corpus.Form()): pass\n'
            'print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])')
    done = subprocess.run([sys.executable, '-c', code, str(path)], capture_output=True, text=True,
                          env=os.environ | {'PYTHONPATH': str(ROOT)}, check=True)
    return int(done.stdout) / 1024


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.slow
@pytest.mark.parametrize('kind', ['many groups', 'one group', 'jsonl', 'txt'])
def test_memory_does_not_grow_with_a_file(tmp_path, kind):
    need_gpt2()
    words = np.array([f'word{i} ' for i in range(1000)])
    rng = np.random.default_rng(0)
    peaks = []
    for n in (3000, 6000):
        texts = [''.join(rng.choice(words, 3000)) for _ in range(n)]
        path = tmp_path / f'{n}.{kind if kind in ("jsonl", "txt") else "parquet"}'
        if kind == 'jsonl':
            path.write_text(lines(texts))
        elif kind == 'txt':
            path.write_text(''.join(texts) + '\u1234')
        else:
            n_rows = 200 if kind == 'many groups' else 10**6
            pyarrow.parquet.write_table(pyarrow.table({'text': texts}), path,
                                        **PARQUET | {'row_group_size': n_rows})
        peaks.append(peak_of_reading(path))
    assert peaks[1] - peaks[0] < 30, peaks


# ---- Packings and the stream ---------------------------------------------------------------------
def odd_texts(n):
    """Return n documents that hold what often goes wrong."""
    hard = ['\ufeffmark', ' ' * 70_000 + 'x', 'a\0b', '<|endoftext', '\u2028\u2029\x85', '1', '\n',
            'é' * 3000, '漢字' * 999, '🙂‍↔️', "it's '''", '\ufffd', '\t\tindented\n  too',
            'x' * 9000]
    rng = random.Random(1)
    blocks = [(32, 126), (160, 591), (0x370, 0x5ff), (0x900, 0xd7f), (0x4e00, 0x9fff),
              (0x1f300, 0x1faff)]
    texts = []
    for i in range(n):
        first, last = rng.choice(blocks)
        word = ''.join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 300)))
        texts.append(rng.choice(hard) + word if i % 9 else rng.choice(hard))
    return texts


def as_table(texts, kind):
    return pyarrow.table({'id': range(len(texts)), 'text': pyarrow.array(texts).cast(kind)})


PACKINGS = {
    'a.jsonl': lambda texts: lines(texts).encode(),
    'a.jsonl.gz': lambda texts: b''.join(gzip.compress(lines([text]).encode()) for text in texts),
    'a.ndjson.bz2': lambda texts: bz2.compress(lines(texts).encode()),
    'a.jsonl.xz': lambda texts: lzma.compress(lines(texts).encode()),
    'a.jsonl.zst': lambda texts: b''.join(
        pyarrow.Codec('zstd').compress(lines(half).encode(), asbytes=True)
        for half in (texts[:70], texts[70:])),
    'a.json': lambda texts: lines(texts).encode(),
}


@pytest.mark.parametrize('tokenizer, n', [
    ('bytes', 90), pytest.param('gpt2', 1500, marks=pytest.mark.slow),
    pytest.param('bpe', 1500, marks=pytest.mark.slow)])
def test_odd_documents_survive_nine_packings(prepare, tokenizer, n):
    texts = odd_texts(n)
    for name, pack in PACKINGS.items():
        pathlib.Path(name).write_bytes(pack(texts))
    pyarrow.parquet.write_table(as_table(texts, pyarrow.string()), 'a.parquet', row_group_size=64)
    spaced = [part for text in texts for part in (text, None)]
    pyarrow.parquet.write_table(as_table(spaced, pyarrow.large_string()), 'b.parquet')
    os.mkdir('t')
    for i, text in enumerate(texts):
        pathlib.Path(f't/{i:05}.txt').write_bytes(b'\xef\xbb\xbf' + text.encode())
    args = [] if tokenizer == 'bytes' else [f'--tokenizer={tokenizer}', '--vocab_size=400']
    for name in [*PACKINGS, 'a.parquet', 'b.parquet', 't/*.txt']:
        dataset = re_name(name)
        prepare(f'--source={name}', f'--dataset={dataset}', *args)
        assert documents(name=dataset) == texts
        counts = json.loads(pathlib.Path(f'data/{dataset}/meta.json').read_text())['splits']
        assert sum(split['documents'] for split in counts.values()) == n
        n_bytes = sum(len(text.encode()) for text in texts)
        assert sum(split['bytes'] for split in counts.values()) == n_bytes


def re_name(name):
    return name.replace('/*', '').replace('.', '_')


@pytest.mark.parametrize('n_floats', [0, 384, 768])
def test_a_tenth_of_the_tokens_is_for_validation(prepare, n_floats):
    table = pyarrow.table({'text': ['word ' * 60] * 500, 'embedding': [[0.5] * n_floats] * 500})
    pyarrow.parquet.write_table(table, 'a.parquet', compression='none', use_dictionary=False)
    prepare('--source=a.parquet')
    sizes = [os.path.getsize(f'data/fineweb/{split}.bin') for split in ('val', 'train')]
    assert sizes == [2 * 15050, 2 * 135450]


@pytest.mark.parametrize('n, val_tokens, says', [
    (10, 1, 'give more text, or --val_tokens=2'), (10, 9, '--val_tokens=2'), (3, 0, 'more text'),
    (100, 99, '--val_tokens=10')])
def test_too_few_tokens_get_advice_that_helps(prepare, n, val_tokens, says):
    pathlib.Path('a.txt').write_text('x' * (n - 1))
    assert says in prepare('--source=a.txt', f'--val_tokens={val_tokens}', status=2)
    part, = pathlib.Path('data/fineweb/parts').glob('*.tokens')
    if n > 3:
        before = part.stat().st_ino
        os.link(part, 'kept')  # so that its number is not given to another file
        prepare('--source=a.txt', f'--val_tokens={max(2, n // 10)}')
        assert os.stat('kept').st_ino == before
        assert documents() == ['x' * (n - 1)]


# ---- Parts ---------------------------------------------------------------------------------------
def parts():
    """Return {file number on disk: time} of the parts that are there."""
    return {path.stat().st_ino: path.stat().st_mtime_ns
            for path in pathlib.Path('data/fineweb/parts').glob('*.tokens')}


def test_a_broken_row_is_fixed_and_what_was_done_stays_done(prepare):
    for name in 'acd':
        pathlib.Path(f'{name}.jsonl').write_text(lines(texts_of(name)))
    long = ['word ' * 300_000] * 3  # so that a's tokens are made before the row is read
    pathlib.Path('b.jsonl').write_text(lines(long) + '{"text": 5}\n')
    said = prepare('--source=*.jsonl', status=2)
    assert 'b.jsonl, line 4: text is int, not text' in said
    done = parts()
    assert len(done) == 1

    # Fixed, or skipped, or left out, while other files come and go.
    prepare('--source=[a-c].jsonl', '--worker=1/3', '--skip_bad=True')
    pathlib.Path('b.jsonl').write_text(lines(TEXTS))
    os.rename('d.jsonl', '0.jsonl')
    prepare('--source=*.jsonl', '--worker=0/1')
    assert done.items() <= parts().items()
    prepare('--source=*.jsonl')
    assert documents() == texts_of('d') + texts_of('a') + TEXTS + texts_of('c')


def test_broken_rows_are_counted_by_the_run_that_reads_them(prepare):
    for name, n_bad in (('a', 1), ('b', 2), ('c', 0)):
        pathlib.Path(f'{name}.jsonl').write_text(lines([*texts_of(name), *[5] * n_bad]))
    args = ['--source=*.jsonl', '--skip_bad=True']
    assert 'a.jsonl: 1 of its rows hold no text' in prepare(*args, '--worker=0/3')
    assert 'b.jsonl: 2 of its rows hold no text' in prepare(*args, '--worker=1/3')
    assert 'hold no text' not in prepare(*args, '--worker=2/3')
    prepare(*args)
    assert documents() == texts_of('a') + texts_of('b') + texts_of('c')


def test_parts_of_other_settings_and_files_are_never_joined(prepare, alphabet):
    pathlib.Path('a.jsonl').write_text(lines(texts_of('a'), other='x' * 9))
    pathlib.Path('b.jsonl').write_text(lines(texts_of('b'), other='x' * 9))
    prepare('--source=*.jsonl', '--worker=0/1', '--column=other')
    prepare('--source=*.jsonl', '--worker=0/1', '--max_tokens=0')
    pathlib.Path('b.jsonl').write_text(lines(texts_of('c'), other='x' * 9))
    (pathlib.Path('data/fineweb/parts') / 'torn.tokens.0of1.tmp').write_bytes(b'torn')
    prepare('--source=*.jsonl')
    assert documents() == texts_of('a') + texts_of('c')


def test_max_tokens_is_exact(prepare):
    for name in 'abc':
        pathlib.Path(f'{name}.jsonl').write_text(lines(texts_of(name)))
    prepare('--source=*.jsonl', '--val_tokens=50', '--max_tokens=1500', '--dataset=some')
    prepare('--source=*.jsonl', '--val_tokens=50', '--dataset=all')
    found = ''.join(documents(name='all'))
    assert found.startswith(''.join(documents(name='some')))
    sizes = [os.path.getsize(f'data/some/{split}.bin') for split in ('val', 'train')]
    assert sizes == [2 * 50, 2 * 1450]


def test_a_finished_set_is_made_again_only_if_it_is_broken(prepare, tmp_path):
    path = tmp_path / 'data/fineweb/train.bin'
    pathlib.Path('a.jsonl').write_text(lines(texts_of('a')))
    prepare('--source=a.jsonl')
    first = hashes_of(tmp_path)
    before = path.stat().st_mtime_ns
    assert 'is there already' in prepare('--source=a.jsonl')
    assert path.stat().st_mtime_ns == before

    path.write_bytes(path.read_bytes()[:-2])
    prepare('--source=a.jsonl')
    assert hashes_of(tmp_path) == first
    for args in (['--val_tokens=20'], ['--source=a.json*', '--column=id']):
        pathlib.Path('a.jsonl').write_text(lines(texts_of('b'), id='x'))
        assert 'with other settings or files' in prepare('--source=a.jsonl', *args, status=2)
        assert hashes_of(tmp_path) == first


def test_a_remote_file_of_another_size_is_another_file(prepare, tmp_path):
    args = [f'--source=file://{tmp_path}/*.jsonl', '--tokenizer=bpe', '--vocab_size=270']
    for texts, args_of_run in ((TEXTS, ['--worker=0/1']), ([*TEXTS, 'more'], [])):
        pathlib.Path('a.jsonl').write_text(lines(texts))
        assert 'training a BPE' in prepare(*args, *args_of_run)
    assert documents() == [*TEXTS, 'more']
    pathlib.Path('a.jsonl').write_text(lines(TEXTS))
    assert 'with other settings or files' in prepare(*args, status=2)


def test_a_second_run_on_one_set_is_refused(prepare):
    pathlib.Path('a.jsonl').write_text(lines(texts_of('a')))
    os.makedirs('data/fineweb/parts')
    with only_one('data/fineweb/parts/join.lock'):
        assert 'another run is at work' in prepare('--source=a.jsonl', status=2)
    prepare('--source=a.jsonl')


def test_a_run_that_is_killed_often_leaves_one_temporary_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'remove', lambda path: None)  # a kill leaves no time for it
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt), corpus.whole(tmp_path / 'part', run='join'):
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ['part.join.tmp']
    with corpus.whole(tmp_path / 'part', run='join') as f:
        f.write(b'tokens')
    assert os.listdir(tmp_path) == ['part']


@pytest.mark.parametrize('room', [100, 1000, 2000])
def test_a_full_disk_is_named_and_the_same_command_continues(prepare, tmp_path, room):
    for name in 'ab':
        pathlib.Path(f'{name}.jsonl').write_text(lines(texts_of(name)))
    with largest_file(room):
        said = prepare('--source=*.jsonl', status=2)
    assert 'could not write' in said and 'the same command continues' in said
    assert not list(tmp_path.rglob('*.tmp'))
    prepare('--source=*.jsonl')
    assert documents() == texts_of('a') + texts_of('b')


def test_a_kill_at_any_write_loses_and_repeats_nothing(prepare, tmp_path, monkeypatch):
    """Attempt n is killed at its n-th sync, rename or removal, before it if n is odd."""
    for name in 'abc':
        pathlib.Path(f'{name}.jsonl').write_text(lines(texts_of(name)))
    writes = 0  # so far in this attempt
    attempt = 0

    class Killed(BaseException):
        pass

    def stopping(function):
        def call(*args, **options):
            nonlocal writes
            writes += 1
            if writes == attempt and attempt % 2 == 1:
                raise Killed
            result = function(*args, **options)
            if writes == attempt:
                raise Killed
            return result
        return call
    for name in ('replace', 'fsync', 'remove', 'rmdir'):
        monkeypatch.setattr(os, name, stopping(getattr(os, name)))
    while True:
        writes = 0
        attempt += 1
        try:
            prepare('--source=*.jsonl')
            break
        except Killed:
            pass
    assert attempt >= 8
    hashes_of(tmp_path)
    assert documents() == texts_of('a') + texts_of('b') + texts_of('c')


def mixed_files(folder, n):
    """Write a .parquet, a .jsonl.gz and a .txt with n documents together; return their pattern."""
    folder.mkdir()
    texts = texts_of('mixed', n)
    pyarrow.parquet.write_table(pyarrow.table({'text': texts[:n // 2]}), folder / 'a.parquet')
    (folder / 'b.jsonl.gz').write_bytes(gzip.compress(lines(texts[n // 2:]).encode()))
    (folder / 'c.txt').write_text('\n'.join(texts))
    return f'--source={folder}/*'


@pytest.mark.parametrize('tokenizer', [
    'gpt2', pytest.param('bpe', marks=pytest.mark.slow)])
def test_the_bytes_do_not_depend_on_the_workers(prepare, tmp_path, monkeypatch, tokenizer):
    source = mixed_files(tmp_path / 'src', n=200)
    args = [source, f'--tokenizer={tokenizer}', '--vocab_size=300']
    hashes = []
    for name, workers in (('one', []), ('two', ['0/2', '1/2']), ('part', ['1/2']),
                          ('seven', [f'{i}/7' for i in (3, 0, 1, 2, 6, 5, 4)])):
        folder = tmp_path / name
        folder.mkdir()
        for worker in [*map('--worker={}'.format, workers), '--worker=']:
            run(FINEWEB, *args, worker, cwd=folder)
        hashes.append(hashes_of(folder))
    assert hashes == hashes[:1] * 4


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path):
    source = mixed_files(tmp_path / 'src', n=1800)
    command = [sys.executable, str(ROOT / FINEWEB), source, '--tokenizer=bpe', '--vocab_size=300']
    hashes = []
    for name, n_kills in (('calm', 0), ('killed', 10)):
        folder = tmp_path / name
        folder.mkdir()
        rng = random.Random(1)
        for _ in range(n_kills):
            worker = rng.choice(['--worker=0/2', '--worker=1/2', '--worker='])
            process = subprocess.Popen([*command, worker], cwd=folder, stderr=subprocess.DEVNULL,
                                       stdout=subprocess.DEVNULL)
            while process.poll() is None and not list(folder.rglob('data')):
                time.sleep(0.01)
            time.sleep(rng.uniform(0.1, 3))
            process.kill()
            process.wait()
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        hashes.append(hashes_of(folder))
    assert hashes[0] == hashes[1]
