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

from conftest import ROOT, need_gpt2, run, shared
from prepare.corpus import only_one, write_corpus
from folio.data import Dataset
from hub import Hub
import folio.tokenizer

HARD = ['plain', ' \n\n  spaces \t\n', '<|endoftext|>', 'a<|endoftext|>b', '<|endoftext|', '🙂‍↔️ naïve Ünïcode 漢字',
        "it's '''", '1234 5678', 'x' * 5000, '\u200bﷺ', ' ' * 300, '\r\n\r', 'a\x00b']
FINEWEB = 'prepare/fineweb/prepare.py'


def parquet(texts):
    table = pyarrow.table({'text': pyarrow.array(texts, pyarrow.string()), 'id': list(range(len(texts)))})
    pyarrow.parquet.write_table(table, buffer := io.BytesIO(), row_group_size=5)
    return buffer.getvalue()


def tokens_of(texts):
    """The plain way: each document after an end-of-text token."""
    gpt2 = folio.tokenizer.load('gpt2')
    return [i for text in texts if text for i in [gpt2.eot] + gpt2.encode(text)]


def result(folder, name='fineweb'):
    """{file: SHA-256} of a data set, which must be complete and have left nothing else."""
    files = sorted(path.name for path in (folder / 'data' / name).iterdir())
    assert files == ['meta.json', 'tokenizer.json', 'train.bin', 'val.bin']
    return {path: hashlib.sha256((folder / 'data' / name / path).read_bytes()).hexdigest() for path in files}


def stream_of(folder, name='fineweb'):
    data = Dataset(str(folder / 'data' / name))
    return np.concatenate([data.tokens('val'), data.tokens('train')]).tolist(), data


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """The textbooks, prepared in one go: what every other way must give to the byte."""
    folder = tmp_path_factory.mktemp('undisturbed')
    run(FINEWEB, f'--source={shared("textbooks")}/*.parquet', cwd=folder)
    return folder


def test_killed_at_random_moments_it_ends_with_the_same_bytes(undisturbed, tmp_path):
    moments, at_work = random.Random(7), 0
    command = [sys.executable, str(ROOT / FINEWEB), f'--source={shared("textbooks")}/*.parquet']
    for part in (0, 0, 1, 2, 3):
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list((tmp_path / 'data').rglob(f'{part:05}.bin.*')):
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.1))
        at_work += process.poll() is None
        process.kill()
        process.wait()
    assert at_work > 1  # the last kill may come too late where a part takes a moment only
    run(FINEWEB, f'--source={shared("textbooks")}/*.parquet', cwd=tmp_path)
    assert result(tmp_path) == result(undisturbed)


def test_workers_make_the_parts_that_a_last_run_joins(undisturbed, tmp_path):
    source = f'--source={shared("textbooks")}/*.parquet'
    workers = [subprocess.Popen([sys.executable, str(ROOT / FINEWEB), source, f'--worker={i}/2'], cwd=tmp_path,
                                stdout=subprocess.PIPE, text=True) for i in range(2)]
    for i, process in enumerate(workers):
        out, _ = process.communicate(timeout=120)
        assert f'worker {i}/2' in out and process.returncode == 0 and not (tmp_path / 'data/fineweb/train.bin').exists()
    assert len(list((tmp_path / 'data/fineweb/parts').glob('*.bin'))) == 4
    run(FINEWEB, source, cwd=tmp_path)
    assert result(tmp_path) == result(undisturbed)


def test_a_finished_set_is_made_again_only_if_it_is_broken(tmp_path):
    path, (name, source) = tmp_path / 'data/fineweb/train.bin', ('a [1].jsonl', '--source=a*.jsonl')
    (tmp_path / name).write_text(json.dumps({'text': 'some text'}) * 1 + '\n' + '\n'.join(
        json.dumps({'text': f'text {i}'}) for i in range(90)))
    (tmp_path / 'a [2].jsonl').write_text('')
    run(FINEWEB, source, cwd=tmp_path)
    first, before = result(tmp_path), path.stat().st_mtime_ns
    out, _ = run(FINEWEB, source, cwd=tmp_path)
    assert 'is there already' in out and path.stat().st_mtime_ns == before
    path.write_bytes(path.read_bytes()[:-2])
    run(FINEWEB, source, cwd=tmp_path)
    assert result(tmp_path) == first
    (tmp_path / name).write_text((tmp_path / name).read_text().replace('some', 'any'))
    for args in ([source], [source, '--val_tokens=20']):
        _, error = run(FINEWEB, *args, cwd=tmp_path, status=2)
        assert 'is there already, of other settings or files' in error and result(tmp_path) == first


def test_two_runs_do_not_work_on_one_set(tmp_path):
    (tmp_path / 'data/fineweb/parts').mkdir(parents=True)
    (tmp_path / 'a.parquet').write_bytes(parquet(['some text'] * 20))
    with only_one(str(tmp_path / 'data/fineweb/parts/join.lock')):
        _, error = run(FINEWEB, '--source=*.parquet', cwd=tmp_path, status=2)
    assert 'another run is at work' in error and not list(tmp_path.rglob('train.bin'))
    run(FINEWEB, '--source=*.parquet', cwd=tmp_path)


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """170 MB more of text, in one file, take at most 60 MB more."""
    peaks = []
    for n in (150, 600):
        (tmp_path / f'{n}.jsonl').write_text('\n'.join(json.dumps({'text': f'{i} ' * 100000}) for i in range(n)))
        code = (f'import resource, subprocess, sys; subprocess.run([sys.executable, {str(ROOT / FINEWEB)!r}, '
                f"'--source={n}.jsonl', '--dataset=of{n}'], check=True); "
                'print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)')
        done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.splitlines()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 60, peaks


def test_a_large_vocabulary_and_an_empty_file_do_not_upset_the_count(tmp_path):
    class Tokenizer:
        spec, n_vocab, eot = {'kind': 'gpt2'}, 70001, 70000

        def decode_bytes(self, ids):
            return b'abc'
    arrays = {'a': np.array([70000, 1, 2, 69999] * 50, np.uint32), 'b': np.array([70000, 5] * 30, np.uint32), 'e': []}
    write_corpus(str(tmp_path / 'set'), Tokenizer(), ['a', 'e', 'b', 'e'],
                 lambda name: iter([(1.0, np.array(arrays[name], np.uint32))]), val_tokens=10)
    tokens = np.concatenate([np.fromfile(tmp_path / 'set' / f'{split}.bin', '<u4') for split in ('val', 'train')])
    assert np.array_equal(tokens, np.concatenate([arrays['a'], arrays['b']]))


@pytest.mark.parametrize('ending', ['parquet', 'jsonl', 'txt', 'jsonl.gz'])
def test_tokens_are_those_of_the_documents_one_by_one(tmp_path, ending):
    import gzip
    texts = HARD * 3 if ending != 'txt' else HARD[:-2]  # text files have line ends of one kind
    lines = ''.join(json.dumps({'text': text}) + '\n' for text in texts).encode()
    for n, part in enumerate(texts if ending == 'txt' else [texts]):
        (tmp_path / f'{n:02}.{ending}').write_bytes({
            'parquet': lambda: parquet(part), 'txt': lambda: part.encode(), 'jsonl': lambda: lines,
            'jsonl.gz': lambda: gzip.compress(lines)}[ending]())
    run(FINEWEB, f'--source=*.{ending}', '--val_tokens=100', cwd=tmp_path)
    stream, data = stream_of(tmp_path)
    assert stream == tokens_of(texts) and len(data.tokens('val')) == 100
    counts = data.meta['splits']
    assert sum(split['documents'] for split in counts.values()) == len(texts)
    assert sum(split['bytes'] for split in counts.values()) == sum(len(text.encode()) for text in texts)


def test_a_bpe_is_trained_on_the_documents_and_once(tmp_path):
    texts = [f'document {i} of the {i % 7} documents, ' * 5 for i in range(200)] + HARD
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts[:150]))
    (tmp_path / 'b.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts[150:]))
    command = ['--source=*.jsonl', '--tokenizer=bpe', '--vocab_size=300', '--val_tokens=50']
    _, notes = run(FINEWEB, *command, '--worker=0/1', cwd=tmp_path)  # like a run that was killed before its end
    assert 'training a BPE of 300 tokens' in notes
    for says in ('data/fineweb/val.bin: 50 tokens', 'is there already'):
        out, notes = run(FINEWEB, *command, cwd=tmp_path)
        assert says in out and 'training' not in notes
    ours, stream = folio.tokenizer.train_bpe(texts, 300), stream_of(tmp_path)[0]
    assert folio.tokenizer.load(str(tmp_path / 'data/fineweb')).spec == ours.spec and ours.n_vocab == 300
    assert stream == [i for text in texts for i in [ours.eot] + ours.encode(text)]
    with (tmp_path / 'a.jsonl').open('a') as f:
        f.write(json.dumps({'text': 'and a zebra ' * 1000}) + '\n')
    _, notes = run(FINEWEB, *command, '--dataset=more', cwd=tmp_path)
    assert 'training' in notes and folio.tokenizer.load(str(tmp_path / 'data/more')).spec != ours.spec
    _, error = run(FINEWEB, *command[:2], '--vocab_size=256', '--dataset=less', cwd=tmp_path, status=2)
    assert error.splitlines()[-1].startswith('error: vocab_size is 256') and 'Traceback' not in error


def test_a_bpe_learns_from_so_many_characters(tmp_path):
    texts = [f'document {i} of the {i % 7} documents, ' * 5 for i in range(50)]
    (tmp_path / 'a.parquet').write_bytes(parquet(texts))
    run(FINEWEB, '--source=*.parquet', '--tokenizer=bpe', '--vocab_size=300', '--tokenizer_chars=1000', cwd=tmp_path)
    cut = ''.join(texts)[:1000]
    ends = [sum(map(len, texts[:i])) for i in range(51) if sum(map(len, texts[:i])) < 1000] + [1000]
    first = [cut[a:b] for a, b in zip(ends, ends[1:])]
    assert folio.tokenizer.load(str(tmp_path / 'data/fineweb')).spec == folio.tokenizer.train_bpe(first, 300).spec


def test_max_tokens_is_exact(tmp_path):
    for n in range(3):
        (tmp_path / f'{n}.parquet').write_bytes(parquet([f'text {i} of file {n}' for i in range(40)]))
    run(FINEWEB, '--source=*.parquet', '--val_tokens=50', '--max_tokens=333', cwd=tmp_path)
    stream, _ = stream_of(tmp_path)
    assert stream == tokens_of(f'text {i} of file {n}' for n in range(3) for i in range(40))[:333]


def test_a_kill_at_any_write_loses_and_repeats_nothing(tmp_path, monkeypatch):
    """Attempt n is stopped just before its n-th sync or rename, or just after it, until one gets through."""
    need_gpt2()
    tokenizer, files = folio.tokenizer.load('gpt2'), ['a', 'b', 'c']
    arrays = {name: np.array(tokens_of([f'{name} {i}' for i in range(30)]), dtype=np.uint32) for name in files}
    folder, writes, limit = tmp_path / 'data' / 'set', 0, 0

    class Killed(BaseException):
        pass

    def stopping(function):
        def call(*args):
            nonlocal writes
            writes += 1
            if writes == limit and limit % 2:
                raise Killed
            function(*args)
            if writes == limit:
                raise Killed
        return call
    monkeypatch.setattr(os, 'replace', stopping(os.replace))
    monkeypatch.setattr(os, 'fsync', stopping(os.fsync))
    while True:
        writes, limit = 0, limit + 1
        try:
            write_corpus(str(folder), tokenizer, files, lambda name: iter([(0.5, arrays[name][:20]),
                         (1.0, arrays[name][20:])]), val_tokens=100)
            break
        except Killed:
            pass
    assert limit >= 8
    data = Dataset(str(folder))
    assert stream_of(tmp_path, 'set')[0] == np.concatenate([*arrays.values()]).tolist()
    assert len(data.tokens('val')) == 100 and not (folder / 'parts').exists()
    assert data.meta['splits']['train']['documents'] + data.meta['splits']['val']['documents'] == 90


@pytest.fixture
def hub(tmp_path):
    texts = [f'document {i}: ' + ' '.join(map(str, range(i))) for i in range(60)]
    header = np.array([20240520, 1, 500] + [0] * 253, '<i4').tobytes()
    shards = {f'finewebedu_{name}_00000{n}.bin': header + (np.arange(500, dtype='<u2') + 1000 * n).tobytes()
              for n, name in ((0, 'val'), (1, 'train'), (2, 'train'))}
    hub = Hub({'HuggingFaceFW/fineweb-edu': {f'sample/10BT/00{n}_00000.parquet': parquet(texts[20 * n:20 * n + 20])
                                             for n in range(3)},
               'Skylion007/openwebtext': {f'plain_text/train/000{n}.parquet': parquet(texts[30 * n:30 * n + 30])
                                          for n in range(2)},
               'kjj0/finewebedu10B-gpt2': shards})
    hub.texts = texts
    yield hub
    hub.server.shutdown()


def with_hub(hub, tmp_path, *args, script=FINEWEB, status=0):
    return run(script, *args, cwd=tmp_path, status=status, env=os.environ | hub.environment(tmp_path / 'hub'))


@pytest.mark.parametrize('trouble', [[], [500, 'ok', 429, 'ok', 'cut']], ids=['calm', 'trouble'])
def test_fineweb_comes_from_the_hub(hub, tmp_path, trouble):
    hub.trouble = list(trouble)
    with_hub(hub, tmp_path, '--val_tokens=300')
    stream, data = stream_of(tmp_path)
    assert stream == tokens_of(hub.texts) and len(data.tokens('val')) == 300 and not hub.trouble


def test_openwebtext_comes_from_the_parquet_copy(hub, tmp_path):
    with_hub(hub, tmp_path, '--val_tokens=300', script='prepare/openwebtext/prepare.py')
    assert stream_of(tmp_path, 'openwebtext')[0] == tokens_of(hub.texts)


@pytest.mark.parametrize('trouble', [[], [500, 429, 'cut', 'ok', 'wrong', 'ok', 'cut', 'ok']], ids=['calm', 'trouble'])
def test_ready_made_tokens_are_downloaded_checked_and_joined(hub, tmp_path, trouble):
    hub.trouble = list(trouble)
    out, _ = with_hub(hub, tmp_path, '--pretokenized=True', '--val_tokens=500')
    stream, data = stream_of(tmp_path)
    assert stream == [*range(500), *range(1000, 1500), *range(2000, 2500)] and len(data.tokens('val')) == 500
    assert not hub.trouble and 'val.bin: 500 tokens' in out


@pytest.mark.parametrize('trouble, says', [(['wrong'] * 20, 'SHA-256'), ([404] * 3, '404'), ([500] * 20, '500')])
def test_a_download_that_cannot_succeed_ends_in_one_line_and_leaves_nothing_half_written(hub, tmp_path, trouble, says):
    hub.trouble = list(trouble)
    _, error = with_hub(hub, tmp_path, '--pretokenized=True', status=2)
    assert says in error.splitlines()[-1] and error.splitlines()[-1].startswith('error: ') and 'Traceback' not in error
    left = [path.name for path in (tmp_path / 'data/fineweb').rglob('*') if path.is_file()]
    assert not any(name in ('train.bin', 'val.bin', 'meta.json') or name.endswith('_000000.bin') for name in left)


def test_a_header_of_another_format_is_refused(hub, tmp_path):
    shards = hub.files['kjj0/finewebedu10B-gpt2']
    for name in shards:
        shards[name] = b'\0' * 1024 + shards[name][1024:]
    _, error = with_hub(hub, tmp_path, '--pretokenized=True', status=2)
    assert 'header' in error.splitlines()[-1]


@pytest.mark.parametrize('args, says', [
    (['--source=none/*.parquet'], 'no file is called none/*.parquet'),
    (['--source=*.parquet', '--column=txet'], 'has no column txet; it has text, id'),
    (['--source=*.csv'], 'is none of .parquet'),
    (['--source=broken.*'], 'could not be read'),
    (['--source=*.parquet', '--tokenizer=chars.json'], 'needs a tokenizer that can part them'),
    (['--source=*.parquet', '--val_tokens=100000'], 'are too few for 100,000 of validation: give --val_tokens='),
    (['--source=*.parquet', '--worker=2/2'], '--worker=0/4'),
    (['--source=*.parquet', '--worker=0/2', '--max_tokens=9'], 'leave out'),
    (['--source=*.parquet', '--val_tokens=50', '--max_tokens=50'], 'leaves nothing to train on'),
    (['--pretokenized=True', '--tokenizer=data/book'], "in GPT-2's tokens"),
    (['--sample=sample-1T'], 'sample-100BT'),
    (['--pretokenized=True', '--sample=sample-350BT'], '--edition=fineweb --sample=sample-100BT'),
])
def test_mistakes_get_one_line(tmp_path, args, says):
    (tmp_path / 'good.parquet').write_bytes(parquet(['some text'] * 20))
    (tmp_path / 'chars.json').write_text('{"kind": "char", "chars": "some text"}')
    (tmp_path / 'table.csv').write_text('text\nsome\n')
    (tmp_path / 'broken.jsonl').write_text('{"text": "fine"}\n{"text": ')
    _, error = run(FINEWEB, *args, cwd=tmp_path, status=2)
    last = error.strip().splitlines()[-1]
    assert last.startswith('error: ') and says in last and 'Traceback' not in error
    assert not list(tmp_path.rglob('train.bin'))


def test_other_settings_do_not_mix_with_an_unfinished_run(tmp_path):
    (tmp_path / 'a.parquet').write_bytes(parquet(['some text'] * 20))
    run(FINEWEB, '--source=*.parquet', '--worker=0/1', cwd=tmp_path)
    (tmp_path / 'b.parquet').write_bytes(parquet(['more text'] * 20))
    _, error = run(FINEWEB, '--source=*.parquet', cwd=tmp_path, status=2)
    assert 'unfinished run with other settings' in error
