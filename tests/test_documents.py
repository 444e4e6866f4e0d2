"""Documents are read from files of many kinds, whatever their lines hold; downloads are whole."""
import bz2
import dataclasses
import gzip
import http.server
import io
import itertools
import json
import lzma
import os
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings, strategies as st

from conftest import ROOT, need_gpt2, run
from folio.configurator import UserError
from folio.data import Dataset
from folio.download import download
from hub import Hub
from model import GPT, GPTConfig
from prepare import documents
import folio.checkpoint
import folio.tokenizer

FINEWEB = 'prepare/fineweb/prepare.py'
TEXTS = ['He said "hi"\nand left.', 'plain text, two lines\nhere', 'naïve 漢字 🙂', 'last']


def rows_of(texts):
    """Return the rows of a .jsonl of these texts."""
    return [{'text': text} for text in texts]


def lines(rows):
    """Return the contents of a .jsonl of these rows."""
    return ''.join(json.dumps(row) + '\n' for row in rows)


def parquet(path, texts, row_group_size=5):
    """Write a .parquet of texts, or of a pyarrow.Table."""
    table = texts if isinstance(texts, pyarrow.Table) else pyarrow.table({'text': texts})
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size, compression='none',
                                use_dictionary=False)


def read(path, column='text', **options):
    """Return the documents of a file."""
    texts = []
    for _, more in documents.read_chunks(str(path), column, **options):
        texts += more
    return texts


def prepared(folder, *args, **options):
    """Prepare a data set in a folder; return (its text, what was printed)."""
    out, err = run(FINEWEB, *args, '--val_tokens=4', cwd=folder, **options)
    data = Dataset(str(folder / 'data' / 'fineweb'))
    ids = np.concatenate([data.tokens('val'), data.tokens('train')]).tolist()
    return folio.tokenizer.load('gpt2').decode(ids), out + err


def as_stream(texts):
    return ''.join('<|endoftext|>' + text for text in texts)


# ---- Lines of JSON -------------------------------------------------------------------------------
def test_a_line_that_holds_no_text_is_named_and_what_came_before_is_kept(tmp_path):
    need_gpt2()
    rows = rows_of(TEXTS * 20)
    rows.insert(70, {'text': 12345})
    (tmp_path / 'mixed.jsonl').write_text(lines(rows))
    _, err = run(FINEWEB, '--source=mixed.jsonl', '--val_tokens=4', cwd=tmp_path, status=2)
    last = err.splitlines()[-1]
    assert last.startswith('error: ')
    assert 'line 71: text is int, not text' in last
    assert '--skip_bad=True' in last

    log = next(tmp_path.glob('data/fineweb/parts/*.jsonl')).read_text().splitlines()
    assert json.loads(log[-1])['position'][:2] == [0, 70]

    # The same command with skip_bad goes on from there.
    text, said = prepared(tmp_path, '--source=mixed.jsonl', '--skip_bad=True')
    assert text == as_stream(TEXTS * 20)
    assert '1 rows that hold no text were left out' in said


@pytest.mark.parametrize('line, says', [
    ('{"text": "a\x01b"}', 'Invalid control character at character 12'),
    ('{"text": "torn', 'Invalid control character'),
    ('{"txt": "a", "id": 1}', 'it has no text; it has txt, id'),
    ('["text"]', 'it is list, not an object'),
    ('{"text": ["a"]}', 'text is list, not text'),
    ('{"text": true}', 'text is bool, not text'),
    ('[' * 100_000, 'nested too deeply'),
    (b'{"text": "\xff"}', "can't decode byte 0xff"),
], ids=['control', 'torn', 'column', 'row', 'list', 'bool', 'deep', 'bytes'])
def test_a_broken_line_is_named_by_its_number(tmp_path, line, says):
    line = line if isinstance(line, bytes) else line.encode()
    path = tmp_path / 'a.jsonl'
    path.write_bytes(lines(rows_of(TEXTS)).encode() + b'\n' + line + b'\n' + b'{"text": "after"}')
    found = []
    with pytest.raises(UserError, match=r'line 6: ') as error:
        for _, texts in documents.read_chunks(str(path), 'text'):
            found += texts
    assert says in str(error.value)
    assert found == TEXTS
    assert read(path, skip_bad=True) == [*TEXTS, 'after']


@pytest.mark.parametrize('early, late', [
    ({}, {'lang': 'en'}), ({'score': None}, {'score': 0.5}), ({'id': 5}, {'id': 'x13999'}),
    ({'id': 5}, {'id': 5.5}), ({'date': '2024-01-01'}, {'date': ''}),
    ({'meta': {'a': 1}}, {'meta': {'a': 1, 'b': 2}}), ({'type': 'a', 'message': 'b'}, {}),
])
def test_other_columns_may_hold_what_they_like(tmp_path, early, late):
    # Over ten megabytes: a reader that takes ten at a time, and guesses the columns' types from the
    # first, would fail at the later row.
    texts = ['word ' * 200_000] * 11 + ['end']
    rows = [{'text': text} | early for text in texts]
    rows[-1] = {'text': 'end'} | late
    (tmp_path / 'a.jsonl').write_text(lines(rows))
    assert read(tmp_path / 'a.jsonl') == texts


def test_text_may_be_null_for_many_rows_and_look_like_anything(tmp_path):
    texts = [None] * 30 + ['2024-01-01', '5', 'null', '', 'true']
    rows = [{'text': text, 'rest': 'x' * 400_000} for text in texts]
    (tmp_path / 'a.jsonl').write_text(lines(rows))
    assert read(tmp_path / 'a.jsonl') == ['2024-01-01', '5', 'null', 'true']


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"text": "a\\ud83d"}\n{"text": "\\ud83d\\ude42"}\n')
    assert read(tmp_path / 'a.jsonl') == ['a\ufffd', '🙂']


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
    path = tmp_path_factory.getbasetemp() / 'hostile.jsonl'
    path.write_bytes(b''.join(line + b'\n' for line in some))
    expected = [expected_of(line) for line in some]
    assert read(path, skip_bad=True) == [text for text in expected if text]
    assert sum(mark.n_bad for mark, _ in documents.read_chunks(
        str(path), 'text', skip_bad=True)) == expected.count(None)
    if None in expected:
        number = expected.index(None)
        before = []
        with pytest.raises(UserError, match=f': line {number + 1}: '):
            for _, texts in documents.read_chunks(str(path), 'text'):
                before += texts
        assert before == [text for text in expected[:number] if text]


# ---- Other files ---------------------------------------------------------------------------------
@pytest.mark.parametrize('ending, pack', [
    ('.gz', gzip.compress), ('.bz2', bz2.compress), ('.xz', lzma.compress),
    ('.zst', lambda data: pyarrow.Codec('zstd').compress(data, asbytes=True)),
])
def test_compressed_files_are_read_and_their_share_is_known(tmp_path, monkeypatch, ending, pack):
    monkeypatch.setattr(documents, 'CHUNK_CHARS', 1)
    monkeypatch.setattr(documents, 'BUFFER', 2**10)
    rng = np.random.default_rng(0)
    texts = [''.join(map(chr, rng.integers(0x4e00, 0x9fff, 200))) for _ in range(2000)]
    path = tmp_path / f'a.jsonl{ending}'
    path.write_bytes(pack(lines(rows_of(texts)).encode()))
    marks, found = zip(*documents.read_chunks(str(path), 'text'))
    assert list(itertools.chain(*found)) == texts
    halfway = marks[len(marks) // 2]
    assert 0.2 < halfway.share < 0.9
    assert read(path, row=halfway.row, offset=halfway.offset) == texts[len(marks) // 2 + 1:]


def test_byte_order_marks_are_not_text_and_line_ends_are_newlines(tmp_path):
    (tmp_path / 'a.txt').write_bytes('\ufeffFirst word\r\nand\rmore'.encode())
    (tmp_path / 'a.jsonl').write_bytes('\ufeff{"text": "first"}\n{"text": "second"}'.encode())
    assert read(tmp_path / 'a.txt') == ['First word\nand\nmore']
    assert read(tmp_path / 'a.jsonl') == ['first', 'second']


def test_a_json_file_is_lines_or_one_list(tmp_path):
    (tmp_path / 'a.json').write_text(lines(rows_of(TEXTS)))
    (tmp_path / 'b.json').write_text(json.dumps(rows_of(TEXTS), indent=2))
    assert read(tmp_path / 'a.json') == TEXTS
    assert read(tmp_path / 'b.json') == TEXTS
    assert read(tmp_path / 'b.json', row=2) == TEXTS[2:]


def test_names_are_taken_as_they_are(tmp_path, monkeypatch):
    names = ['a [1].jsonl.gz', 'colon::x.jsonl', 'back\\slash.jsonl.gz', 'BIG.JSONL', 'b.ndjson']
    for name in names:
        data = lines(rows_of([name])).encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith('.gz') else data)
        assert read(tmp_path / name) == [name]
        if '\\' not in name:
            assert documents.source_files(str(tmp_path / name)) == [str(tmp_path / name)]
    monkeypatch.setenv('HOME', str(tmp_path))
    assert len(documents.source_files('~/*')) == len(names)


@pytest.mark.parametrize('kind', ['list', 'struct', 'binary', 'int'])
def test_a_parquet_column_that_is_not_text_gets_one_line(tmp_path, kind):
    values = {'list': [['a']], 'struct': [{'a': 'b'}], 'binary': [b'abc'], 'int': [5]}[kind]
    parquet(tmp_path / 'a.parquet', pyarrow.table({'text': values * 9, 'id': range(9)}))
    with pytest.raises(UserError, match='a.parquet: the column text holds '):
        read(tmp_path / 'a.parquet')


def test_a_parquet_row_that_is_not_utf_8_is_named(tmp_path):
    good = pyarrow.array([b'fine', b'\xff', b'more'])
    text = pyarrow.StringArray.from_buffers(3, *good.buffers()[1:])
    parquet(tmp_path / 'a.parquet', pyarrow.table({'text': text}))
    with pytest.raises(UserError, match='row 2: '):
        read(tmp_path / 'a.parquet')
    assert read(tmp_path / 'a.parquet', skip_bad=True) == ['fine', 'more']


@pytest.mark.parametrize('ending', ['parquet', 'jsonl', 'txt'])
def test_reading_goes_on_from_any_mark(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(documents, 'CHUNK_CHARS', 1)
    texts = [f'text {i}' for i in range(33)]
    path = tmp_path / f'a.{ending}'
    if ending == 'parquet':
        parquet(path, texts)
    else:
        texts = texts if ending == 'jsonl' else texts[:1]
        path.write_text(lines(rows_of(texts)) if ending == 'jsonl' else texts[0])
    found = []
    for mark, more in documents.read_chunks(str(path), 'text'):
        found += more
        assert found + read(path, row=mark.row, offset=mark.offset) == texts


# ---- The machine ---------------------------------------------------------------------------------
def test_local_files_are_read_without_a_network_or_a_home(tmp_path):
    """A network that is down and a HOME that cannot be written to change nothing."""
    (tmp_path / 'a.jsonl').write_text(lines(rows_of(TEXTS)))
    home = tmp_path / 'home'
    home.write_text('a file, so that no folder can be made in it')
    code = (
        'import socket, sys\n'
        'def refuse(*args, **options): raise SystemExit("asked the network")\n'
        'socket.getaddrinfo = socket.create_connection = refuse\n'
        'from prepare.documents import read_chunks\n'
        'print(sum(len(texts) for _, texts in read_chunks("a.jsonl", "text")))\n'
        'assert "datasets" not in sys.modules\n')
    environment = os.environ | {'HOME': str(home), 'PYTHONPATH': str(ROOT)}
    environment.pop('HF_HOME', None)
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=60)
    assert done.stdout == f'{len(TEXTS)}\n', done.stderr


def peak_of_reading(path):
    """Return the most memory, in MiB, that a process takes to read a file."""
    # Not by getrusage, whose figure begins with the memory of the process that started this one.
    code = ('import sys; from prepare.documents import read_chunks\n'
            'for chunk in read_chunks(sys.argv[1], "text"): pass\n'
            'print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])')
    done = subprocess.run([sys.executable, '-c', code, str(path)], capture_output=True, text=True,
                          env=os.environ | {'PYTHONPATH': str(ROOT)}, check=True)
    return int(done.stdout) / 1024


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.slow
@pytest.mark.parametrize('row_group_size', [200, 10**6], ids=['many groups', 'one group'])
def test_memory_does_not_grow_with_a_parquet_file(tmp_path, row_group_size):
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b'abcdefghijklmnopqrstuvwxyz     ', dtype=np.uint8)
    places = rng.integers(0, len(letters), (10_000, 20_000), dtype=np.uint8)
    texts = [row.tobytes().decode() for row in letters[places]]
    parquet(tmp_path / 'small.parquet', texts[:300], row_group_size)
    parquet(tmp_path / 'large.parquet', texts, row_group_size)
    small = peak_of_reading(tmp_path / 'small.parquet')
    large = peak_of_reading(tmp_path / 'large.parquet')
    assert large - small < 100, (small, large)


# ---- The hub -------------------------------------------------------------------------------------
def test_an_error_of_the_hub_keeps_what_came_before(tmp_path):
    texts = [f'{i} ' + os.urandom(100_000).hex() for i in range(200)]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({'text': texts}), buffer, row_group_size=20,
                                compression='none', use_dictionary=False)
    hub = Hub({'owner/name': {'a.parquet': buffer.getvalue()}})
    code = (
        'import sys; from prepare import documents; from folio.configurator import UserError\n'
        'n = 0\n'
        'try:\n'
        '    for mark, texts in documents.read_chunks(sys.argv[1], "text"):\n'
        '        n += len(texts)\n'
        'except UserError as e: print(n, mark.row, e)\n')
    # The footer and the first blocks arrive, then nothing does.
    hub.trouble = ['ok'] * 6 + [404] * 200
    done = subprocess.run(
        [sys.executable, '-c', code, 'hf://datasets/owner/name/a.parquet'], text=True,
        capture_output=True, timeout=120,
        env=os.environ | hub.environment(tmp_path / 'hub') | {'PYTHONPATH': str(ROOT)})
    hub.server.shutdown()
    n, row, says = done.stdout.split(maxsplit=2)
    assert 0 < int(n) < 200
    assert n == row
    assert 'what was done so far is kept' in says


# ---- Tokens and small sets -----------------------------------------------------------------------
def test_a_million_white_characters_in_a_row_are_refused_in_one_line():
    """tiktoken would print a Rust backtrace, and end the process."""
    need_gpt2()
    tokenizer = folio.tokenizer.load('gpt2')
    long = 'a\n' + '\n' * 1_100_000 + 'x  y\n'
    with pytest.raises(UserError, match='1,100,001 white characters in a row'):
        tokenizer.encode_documents(['short', long])
    nearly = ('\n' * 800_000 + 'x') * 2
    assert tokenizer.decode(tokenizer.encode(nearly)) == nearly


def test_half_a_surrogate_pair_does_not_stop_a_bpe(tmp_path):
    rows = [{'instruction': 'Go \ud83d.', 'response': f'Yes {i}.'} for i in range(20)]
    (tmp_path / 'sur.jsonl').write_text(lines(rows))
    run('prepare/dolly/prepare.py', '--source=sur.jsonl', '--tokenizer=bpe', '--vocab_size=300',
        cwd=tmp_path)
    data = Dataset(str(tmp_path / 'data' / 'dolly'))
    text = folio.tokenizer.load(data.spec).decode(data.tokens('train').tolist())
    assert 'Go \ufffd.' in text


def test_latest_is_not_a_test_split_and_two_files_for_one_split_are_refused(tmp_path):
    for name in ('latest', 'test', 'wiki.train', 'valid'):
        (tmp_path / f'{name}.txt').write_text(f'{name} ' * 100)
    args = ['prepare/wikitext2/prepare.py', '--source=.', '--vocab_size=260']
    _, err = run(*args, cwd=tmp_path)
    assert 'test: ./test.txt' in err
    data = Dataset(str(tmp_path / 'data' / 'wikitext2'))
    ids = data.tokens('test')[1:].tolist()
    assert folio.tokenizer.load(data.spec).decode(ids) == 'test ' * 100

    (tmp_path / 'my-test.txt').write_text('another')
    _, err = run(*args, cwd=tmp_path, status=2)
    assert 'which is the test split: ./my-test.txt or ./test.txt?' in err


def test_a_bpe_that_learns_shows_how_far_it_is(tmp_path):
    (tmp_path / 'a.jsonl').write_text(lines(rows_of(TEXTS * 50)))
    _, err = run(FINEWEB, '--source=a.jsonl', '--tokenizer=bpe', '--vocab_size=300', cwd=tmp_path)
    assert 'counting' in err


# ---- Downloads -----------------------------------------------------------------------------------
class Server:
    """A server on 127.0.0.1 that sends `content`, the first time cut short, with its ETag."""

    def __init__(self, heeds_if_range, encoding=''):
        self.content = b'OLD ' * 5000
        self.cut = 8000
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                etag = f'"{server.content[:3].decode()}"'
                asked = self.headers.get('Range', 'bytes=0-')
                start = int(asked.removeprefix('bytes=').removesuffix('-'))
                if heeds_if_range and self.headers.get('If-Range', etag) != etag:
                    start = 0
                body = server.content[start:]
                self.send_response(206 if start else 200)
                if start:
                    n = len(server.content)
                    self.send_header('Content-Range', f'bytes {start}-{n - 1}/{n}')
                if encoding:
                    self.send_header('Content-Encoding', encoding)
                self.send_header('ETag', etag)
                self.send_header('Content-Length', str(len(body)))
                self.end_headers()
                self.wfile.write(body[:server.cut])
                if server.cut:  # from now on the server has the file `next`, and sends it whole
                    server.cut = None
                    server.content = server.next

            def log_message(self, *args):
                pass
        self.http = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.http.server_port}/a.txt'
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.mark.parametrize('heeds_if_range', [True, False])
@pytest.mark.parametrize('after', [b'NEW ' * 5000, b'OLD ' * 5000], ids=['changed', 'same'])
def test_a_file_that_changes_on_the_server_is_not_joined_to_half_of_the_old_one(
        tmp_path, monkeypatch, heeds_if_range, after):
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    server = Server(heeds_if_range)
    server.next = after
    path = download([server.url], str(tmp_path / 'a.txt'))
    server.http.shutdown()
    assert pathlib.Path(path).read_bytes() == after
    assert os.listdir(tmp_path) == ['a.txt']


def test_a_file_that_comes_compressed_unasked_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    server = Server(heeds_if_range=True, encoding='gzip')
    server.cut = None
    with pytest.raises(UserError, match='ContentDecodingError'):
        download([server.url], str(tmp_path / 'a.txt'))
    server.http.shutdown()
    assert not (tmp_path / 'a.txt').exists()


# ---- Beside the data -----------------------------------------------------------------------------
def greedy(model, ids, n):
    """Return the n tokens with which greedy decoding continues ids."""
    ids = list(ids)
    for _ in range(n):
        with torch.no_grad():
            logits, _ = model(torch.tensor([ids]))
        ids.append(logits[0, -1].argmax().item())
    return ids[-n:]


@pytest.mark.parametrize('is_run', [True, False])
def test_a_prompt_follows_the_end_of_text_token_if_documents_did(tmp_path, is_run):
    tokenizer = folio.tokenizer.train_bpe(['one two three four five six seven ' * 20], 300)
    torch.manual_seed(0)
    config = GPTConfig(block_size=64, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=2, n_embd=32)
    model = GPT(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    checkpoint = {'model_args': dataclasses.asdict(config), 'model': model.state_dict(),
                  'tokenizer': tokenizer.spec}
    if is_run:
        checkpoint['config'] = {}
    folio.checkpoint.save(str(tmp_path / 'a.pt'), checkpoint)
    out, _ = run('sample.py', '--init_from=a.pt', '--start=one two', '--strategy=greedy',
                 '--max_new_tokens=8', '--device=cpu', '--dtype=float32', cwd=tmp_path)
    start = [tokenizer.eot] if is_run else []
    new = greedy(model, start + tokenizer.encode('one two'), n=8)
    if tokenizer.eot in new:
        new = new[:new.index(tokenizer.eot)]
    expected = tokenizer.decode_bytes(new).decode('utf-8', 'replace')
    # sample.py does not show a character that is not complete yet.
    assert out.strip('\n\ufffd') == f'one two{expected}'.strip('\n\ufffd')
