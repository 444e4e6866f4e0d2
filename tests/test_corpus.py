"""A corpus is made once, from the files there at first, no matter how often it is interrupted."""
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from conftest import ROOT, need_gpt2, run
from folio.configurator import UserError
from folio.data import Dataset
from hub import COMMIT, Hub
from prepare import corpus
from prepare.documents import Mark
import folio.tokenizer

FINEWEB = 'prepare/fineweb/prepare.py'


class Tokenizer:
    """Stand in for a tokenizer where a test makes the tokens itself."""
    spec = {'kind': 'gpt2'}
    n_vocab = 70001
    eot = 70000

    def decode_bytes(self, ids):
        return b'abc'


def lines(texts):
    """Return the contents of a .jsonl of these texts."""
    return ''.join(json.dumps({'text': text}) + '\n' for text in texts)


def texts_of(name, n=60):
    return [f'{name}, document {i}: ' + ' '.join(map(str, range(i))) for i in range(n)]


def decoded(folder, name='fineweb'):
    """Return the text of a data set."""
    data = Dataset(str(folder / 'data' / name))
    ids = np.concatenate([data.tokens('val'), data.tokens('train')]).tolist()
    return folio.tokenizer.load('gpt2').decode(ids)


def as_stream(texts):
    return ''.join('<|endoftext|>' + text for text in texts)


def chunks_of(arrays, chunk=100, log=None):
    """Return a to_tokens that yields `chunk` tokens at a time, and logs (file, row) of its start.

    arrays: {file: its tokens}. A row is a token.
    """
    def to_tokens(file, row, offset):
        if log is not None:
            log.append((file, row))
        tokens = arrays[file]
        for start in range(row, len(tokens), chunk):
            end = min(len(tokens), start + chunk)
            yield Mark(row=end, offset=end, share=end / len(tokens)), tokens[start:end]
    return to_tokens


def stream_in(folder):
    """Return all tokens of a data set, val.bin before train.bin."""
    return np.concatenate([np.fromfile(folder / 'val.bin', '<u4'),
                           np.fromfile(folder / 'train.bin', '<u4')])


# ---- Workers -------------------------------------------------------------------------------------
def test_a_file_that_arrives_between_two_workers_is_neither_lost_nor_doubled(tmp_path):
    need_gpt2()
    src = tmp_path / 'src'
    src.mkdir()
    for name in 'bd':
        (src / f'{name}.jsonl').write_text(lines(texts_of(name)))
    command = ['--source=src/*', '--val_tokens=100']
    run(FINEWEB, *command, '--worker=0/2', cwd=tmp_path)
    (src / 'a.jsonl').write_text(lines(texts_of('a')))
    for args in (['--worker=1/2'], []):
        _, err = run(FINEWEB, *command, *args, cwd=tmp_path, status=2)
        assert 'unfinished run with other settings or files' in err.splitlines()[-1]

    # Without the new file, the first request goes on, and has nothing of the new file.
    (src / 'a.jsonl').unlink()
    run(FINEWEB, *command, '--worker=1/2', cwd=tmp_path)
    run(FINEWEB, *command, cwd=tmp_path)
    assert decoded(tmp_path) == as_stream(texts_of('b') + texts_of('d'))


def test_pieces_of_other_settings_are_never_joined(tmp_path):
    """Not even if they appear after the other run has checked what is there."""
    old = {'b': np.arange(500, dtype=np.uint32), 'd': np.arange(500, 900, dtype=np.uint32)}
    new = {'a': np.arange(1000, 1300, dtype=np.uint32)} | old
    folder = str(tmp_path / 'set')

    def disturbed(file, row, offset):
        if file == 'a':  # while we read a, an earlier worker on b and d finishes its pieces
            parts = os.path.join(folder, 'parts')
            meta = corpus.new_meta(Tokenizer(), source={'files': list(old)})
            with corpus.Pieces(parts, meta, '0of1', start=corpus.Position()) as pieces:
                corpus.advance(pieces, list(old), chunks_of(old), share=range(2))
        yield from chunks_of(new)(file, row, offset)
    corpus.write_corpus(folder, Tokenizer(), list(new), disturbed, val_tokens=10)
    assert np.array_equal(stream_in(tmp_path / 'set'), np.concatenate([*new.values()]))


def test_any_mix_of_workers_and_joins_stopped_anywhere_gives_the_same_tokens(
        tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, 'COMMIT_TOKENS', 300)
    rng = random.Random(5)
    arrays = {str(i): np.arange(1000 * i, 1000 * i + rng.choice([0, 70, 450, 900]), dtype=np.uint32)
              for i in range(12)}
    expected = np.concatenate([*arrays.values()])

    class Killed(BaseException):
        pass

    def killed_after(n_chunks):
        def to_tokens(file, row, offset):
            nonlocal n_chunks
            for chunk in chunks_of(arrays)(file, row, offset):
                yield chunk
                n_chunks -= 1
                if n_chunks <= 0:
                    raise Killed
        return to_tokens

    for trial in range(30):
        folder = tmp_path / str(trial)
        for _ in range(rng.randrange(12)):
            worker = rng.choice(['0/3', '1/3', '2/3', '1/2', ''])
            to_tokens = killed_after(rng.randrange(1, 40))
            try:
                corpus.write_corpus(str(folder), Tokenizer(), list(arrays), to_tokens,
                                    val_tokens=333, worker=worker)
            except Killed:
                pass
        meta = corpus.write_corpus(str(folder), Tokenizer(), list(arrays), chunks_of(arrays),
                                   val_tokens=333)
        assert np.array_equal(stream_in(folder), expected)
        assert meta['splits']['val']['tokens'] == 333
        assert sorted(os.listdir(folder)) == ['meta.json', 'tokenizer.json', 'train.bin', 'val.bin']


def test_what_workers_made_is_not_made_again(tmp_path):
    arrays = {str(i): np.arange(200, dtype=np.uint32) for i in range(7)}
    log = []
    for worker in ('0/3', '1/3', '2/3', '1/3', ''):
        corpus.write_corpus(str(tmp_path / 'set'), Tokenizer(), list(arrays),
                            chunks_of(arrays, log=log), val_tokens=10, worker=worker)
    assert sorted(log) == [(name, 0) for name in arrays]


def test_a_worker_whose_set_another_run_finishes_returns_its_meta(tmp_path):
    arrays = {str(i): np.arange(200, dtype=np.uint32) for i in range(4)}
    folder = tmp_path / 'set'

    def overtaken(file, row, offset):
        corpus.write_corpus(str(folder), Tokenizer(), list(arrays), chunks_of(arrays),
                            val_tokens=10)
        yield from chunks_of(arrays)(file, row, offset)
    meta = corpus.write_corpus(str(folder), Tokenizer(), list(arrays), overtaken, val_tokens=10,
                               worker='1/2')
    assert meta['splits']['train']['tokens'] == 790
    assert len(stream_in(folder)) == 800


# ---- Going on ------------------------------------------------------------------------------------
def test_a_single_file_goes_on_near_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, 'COMMIT_TOKENS', 1000)
    arrays = {'a': np.arange(60_000, dtype=np.uint32)}
    sizes = []

    def killed(file, row, offset):
        for mark, tokens in chunks_of(arrays)(file, row, offset):
            sizes.append(sum(path.stat().st_size for path in tmp_path.rglob('*')))
            if mark.row > 50_000:
                raise KeyboardInterrupt
            yield mark, tokens
    with pytest.raises(KeyboardInterrupt):
        corpus.write_corpus(str(tmp_path / 'set'), Tokenizer(), ['a'], killed, val_tokens=10)
    assert max(sizes) < 1.1 * 4 * 60_000  # it takes no more room than the result, 4 bytes a token

    log = []
    corpus.write_corpus(str(tmp_path / 'set'), Tokenizer(), ['a'], chunks_of(arrays, log=log),
                        val_tokens=10)
    (_, row), = log
    assert 49_000 <= row <= 50_000
    assert np.array_equal(stream_in(tmp_path / 'set'), arrays['a'])


def test_a_kill_at_any_write_loses_and_repeats_nothing(tmp_path, monkeypatch):
    """Attempt n is killed at its n-th sync, rename or removal, before it if n is odd."""
    monkeypatch.setattr(corpus, 'COMMIT_TOKENS', 150)
    arrays = {name: np.arange(n, n + 400, dtype=np.uint32) for n, name in enumerate('abc')}
    folder = tmp_path / 'set'
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
            function(*args, **options)
            if writes == attempt:
                raise Killed
        return call
    for name in ('replace', 'fsync', 'remove'):
        monkeypatch.setattr(os, name, stopping(getattr(os, name)))
    while True:
        writes = 0
        attempt += 1
        try:
            if attempt < 20:  # at first, a worker leaves pieces for the run that joins
                corpus.write_corpus(str(folder), Tokenizer(), list(arrays), chunks_of(arrays),
                                    val_tokens=100, worker='1/2')
            corpus.write_corpus(str(folder), Tokenizer(), list(arrays), chunks_of(arrays),
                                val_tokens=100)
            break
        except Killed:
            pass
    assert attempt >= 8
    assert np.array_equal(stream_in(folder), np.concatenate([*arrays.values()]))
    assert sorted(os.listdir(folder)) == ['meta.json', 'tokenizer.json', 'train.bin', 'val.bin']


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path):
    need_gpt2()
    (tmp_path / 'a.jsonl').write_text(lines(texts_of('a', n=1500)))
    parquet = pyarrow.table({'text': texts_of('b', n=1500)})
    pyarrow.parquet.write_table(parquet, tmp_path / 'b.parquet', row_group_size=100)
    command = [sys.executable, '-c',
               'import sys, runpy; sys.argv[0] = sys.argv.pop(1); import prepare.corpus as c; '
               'c.COMMIT_TOKENS = 2**17; runpy.run_path(sys.argv[0], run_name="__main__")',
               str(ROOT / FINEWEB), f'--source={tmp_path}/*.*', '--val_tokens=1000']
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    hashes = []
    for folder, n_kills in ((tmp_path / 'calm', 0), (tmp_path / 'killed', 4)):
        folder.mkdir()
        for seed in range(n_kills):
            process = subprocess.Popen(command, cwd=folder, env=environment,
                                       stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            while process.poll() is None and not list(folder.rglob('*.bin.tmp')):
                time.sleep(0.01)
            time.sleep(random.Random(seed).uniform(0.1, 0.6))
            process.kill()
            process.wait()
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
        files = sorted((folder / 'data' / 'fineweb').iterdir())
        hashes.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files})
    assert hashes[0] == hashes[1]
    assert list(hashes[0]) == ['meta.json', 'tokenizer.json', 'train.bin', 'val.bin']


def test_many_files_cost_no_rewriting(tmp_path):
    """Progress is a line from time to time, however many files there are."""
    arrays = {str(i): np.arange(20, dtype=np.uint32) for i in range(3000)}
    written = []
    real_dump = json.dump

    def counting(value, file, **options):
        real_dump(value, file, **options)
        written.append(file.name)
    try:
        json.dump = counting
        corpus.write_corpus(str(tmp_path / 'set'), Tokenizer(), list(arrays), chunks_of(arrays),
                            val_tokens=10)
    finally:
        json.dump = real_dump
    assert len(written) <= 3  # the request, the tokenizer, the meta
    assert len(stream_in(tmp_path / 'set')) == 60_000


# ---- Mistakes and misfortunes --------------------------------------------------------------------
@pytest.mark.parametrize('n_tokens, val_tokens, says', [
    (10, 1, 'give --val_tokens=2'), (10, 9, 'give --val_tokens=2'), (3, 1, 'more text is needed'),
    (100, 99, 'give --val_tokens=10'),
])
def test_too_few_tokens_get_advice_that_helps(tmp_path, n_tokens, val_tokens, says):
    arrays = {'a': np.arange(n_tokens, dtype=np.uint32)}
    with pytest.raises(UserError, match=says):
        corpus.write_corpus(str(tmp_path / 'set'), Tokenizer(), ['a'], chunks_of(arrays),
                            val_tokens=val_tokens)
    assert os.listdir(tmp_path / 'set') == []


def test_a_full_disk_is_named_and_the_same_command_goes_on(tmp_path, monkeypatch):
    arrays = {'a': np.arange(1000, dtype=np.uint32)}

    def full(*args):
        raise OSError(28, 'No space left on device')
    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', full)
        with pytest.raises(UserError, match='could not write .*set.*No space left.*goes on'):
            corpus.write_corpus(str(tmp_path / 'set'), Tokenizer(), ['a'], chunks_of(arrays),
                                val_tokens=10)
    assert not [path for path in tmp_path.rglob('*.tmp') if 'json' in path.name]
    corpus.write_corpus(str(tmp_path / 'set'), Tokenizer(), ['a'], chunks_of(arrays), val_tokens=10)
    assert np.array_equal(stream_in(tmp_path / 'set'), arrays['a'])


# ---- The hub -------------------------------------------------------------------------------------
def parquet_bytes(texts):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({'text': texts}), buffer, row_group_size=5)
    return buffer.getvalue()


@pytest.mark.slow
def test_the_commit_of_the_first_run_is_read_by_all_that_follow(tmp_path, monkeypatch):
    need_gpt2()
    texts = texts_of('a')
    hub = Hub({'owner/name': {f'{n}.parquet': parquet_bytes(texts[20 * n:20 * n + 20])
                              for n in range(3)}})
    asked = []

    class Recording(hub.server.RequestHandlerClass):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()
        do_HEAD = do_GET
        do_POST = do_GET
    hub.server.RequestHandlerClass = Recording
    environment = os.environ | hub.environment(tmp_path / 'hub')
    command = ['--source=hf://datasets/owner/name/*.parquet', '--val_tokens=100']
    run(FINEWEB, *command, '--worker=0/2', cwd=tmp_path, env=environment)

    monkeypatch.setattr('hub.COMMIT', 'd' * 40)  # somebody pushes
    asked.clear()
    run(FINEWEB, *command, cwd=tmp_path, env=environment)
    assert decoded(tmp_path) == as_stream(texts)
    contents = [path for path in asked if '/resolve/' in path]
    assert contents
    assert all(f'/resolve/{COMMIT}/' in path for path in contents)
    meta = json.loads((tmp_path / 'data/fineweb/meta.json').read_text())
    assert meta['source']['revision'] == COMMIT

    out, _ = run(FINEWEB, *command, cwd=tmp_path, env=environment)
    assert 'is there already' in out
    hub.server.shutdown()


def test_openwebtext_is_the_sets_own_parquet_files(tmp_path):
    need_gpt2()
    texts = texts_of('a')
    files = {f'plain_text/train-0000{n}-of-00002.parquet': parquet_bytes(texts[30 * n:30 * n + 30])
             for n in range(2)}
    hub = Hub({'Skylion007/openwebtext': files})
    run('prepare/openwebtext/prepare.py', '--val_tokens=100', cwd=tmp_path,
        env=os.environ | hub.environment(tmp_path / 'hub'))
    hub.server.shutdown()
    assert decoded(tmp_path, 'openwebtext') == as_stream(texts)


def test_a_large_vocabulary_and_an_empty_file_do_not_upset_the_count(tmp_path):
    arrays = {
        'a': np.array([70000, 1, 2, 69999] * 50, np.uint32),
        'b': np.array([70000, 5] * 30, np.uint32),
        'empty': np.array([], np.uint32),
    }
    folder = tmp_path / 'set'
    corpus.write_corpus(str(folder), Tokenizer(), ['a', 'empty', 'b', 'empty'], chunks_of(arrays),
                        val_tokens=10)
    assert np.array_equal(stream_in(folder), np.concatenate([arrays['a'], arrays['b']]))
