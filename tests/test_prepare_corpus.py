import gzip
import hashlib
import io
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import folio.tokenizer
from conftest import ROOT, need_gpt2, run, shared
from folio.data import Dataset
from hub import Hub
from folio.log import only_one

HARD = ['plain', ' \n\n  spaces \t\n', '<|endoftext|>', 'a<|endoftext|>b', '<|endoftext|',
        '🙂‍↔️ naïve Ünïcode 漢字',
        "it's '''", '1234 5678', 'x' * 5000, '\u200bﷺ', ' ' * 300, '\r\n\r', 'a\x00b']
FINEWEB = 'prepare/fineweb/prepare.py'


def parquet(texts):
    """Return the bytes of a .parquet file with these documents."""
    columns = {'text': pyarrow.array(texts, pyarrow.string()), 'id': list(range(len(texts)))}
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer, row_group_size=5)
    return buffer.getvalue()


def jsonl(texts):
    """Return a .jsonl file with these documents."""
    return ''.join(json.dumps({'text': text}) + '\n' for text in texts)


def tokens_of(texts, tokenizer=None):
    """Return the tokens of documents, made the plain way: each follows an end-of-text token."""
    tokenizer = tokenizer or folio.tokenizer.load('gpt2')
    ids = []
    for text in texts:
        if text:
            ids += [tokenizer.eot] + tokenizer.encode(text)
    return ids


def result(folder, name='fineweb'):
    """Return {file: SHA-256} of a data set, which must be complete and have left nothing else."""
    files = sorted((folder / 'data' / name).iterdir())
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert list(hashes) == ['meta.json', 'tokenizer.json', 'train.bin', 'val.bin']
    return hashes


def stream_of(folder, name='fineweb'):
    """Return the tokens of val.bin and train.bin, one after the other, and the data set."""
    data = Dataset(str(folder / 'data' / name))
    return np.concatenate([data.tokens('val'), data.tokens('train')]).tolist(), data


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """The textbooks, prepared in one go: every other way must give the same bytes."""
    folder = tmp_path_factory.mktemp('undisturbed')
    run(FINEWEB, f'--source={shared("textbooks")}/*.parquet', cwd=folder)
    return folder


@pytest.mark.slow
def test_workers_make_the_parts_that_a_last_run_joins(undisturbed, tmp_path):
    source = f'--source={shared("textbooks")}/*.parquet'
    workers = []
    for i in range(2):
        command = [sys.executable, str(ROOT / FINEWEB), source, f'--worker={i}/2']
        workers.append(subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True))
    for i, process in enumerate(workers):
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert f'worker {i}/2' in out
        assert not (tmp_path / 'data/fineweb/train.bin').exists()
    assert len(list((tmp_path / 'data/fineweb/parts').glob('*.bin'))) == 2
    run(FINEWEB, source, cwd=tmp_path)
    assert result(tmp_path) == result(undisturbed)


def test_a_finished_set_is_made_again_only_if_it_is_broken(tmp_path):
    path = tmp_path / 'data/fineweb/train.bin'
    file = tmp_path / 'a [1].jsonl'  # a name that would be a pattern if it were not escaped
    source = '--source=a*.jsonl'
    file.write_text(jsonl(['some text'] + [f'text {i}' for i in range(90)]))
    (tmp_path / 'a [2].jsonl').write_text('')
    run(FINEWEB, source, cwd=tmp_path)
    first = result(tmp_path)
    before = path.stat().st_mtime_ns

    out, _ = run(FINEWEB, source, cwd=tmp_path)
    assert 'is there already' in out
    assert path.stat().st_mtime_ns == before

    path.write_bytes(path.read_bytes()[:-2])
    run(FINEWEB, source, cwd=tmp_path)
    assert result(tmp_path) == first

    file.write_text(file.read_text().replace('some', 'any'))
    for args in ([source], [source, '--val_tokens=20']):
        _, error = run(FINEWEB, *args, cwd=tmp_path, status=2)
        assert 'is there already, of other settings or files' in error
        assert result(tmp_path) == first


def test_two_runs_do_not_work_on_one_set(tmp_path):
    (tmp_path / 'data/fineweb/parts').mkdir(parents=True)
    (tmp_path / 'a.parquet').write_bytes(parquet(['some text'] * 20))
    with only_one(str(tmp_path / 'data/fineweb/parts/join.lock')):
        _, error = run(FINEWEB, '--source=*.parquet', cwd=tmp_path, status=2)
    assert 'another run is at work' in error
    assert not list(tmp_path.rglob('train.bin'))
    run(FINEWEB, '--source=*.parquet', cwd=tmp_path)


def peak_memory(folder, n_texts):
    """Return the megabytes that it takes to prepare one file of n_texts long documents."""
    (folder / f'{n_texts}.jsonl').write_text(jsonl(f'{i} ' * 100000 for i in range(n_texts)))
    command = [sys.executable, str(ROOT / FINEWEB), f'--source={n_texts}.jsonl',
               f'--dataset=of{n_texts}']
    # A process of its own, because the peak is that of all children so far.
    code = (f'import resource, subprocess; subprocess.run({command!r}, check=True); '
            'print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)')
    done = subprocess.run([sys.executable, '-c', code], cwd=folder, capture_output=True, text=True,
                          check=True)
    return int(done.stdout.splitlines()[-1]) / 1024


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """170 MB more of text, in one file, take at most 60 MB more."""
    need_gpt2()
    small = peak_memory(tmp_path, n_texts=150)
    large = peak_memory(tmp_path, n_texts=600)
    assert large - small < 60, (small, large)


@pytest.mark.parametrize('ending', ['parquet', 'jsonl', 'txt', 'jsonl.gz'])
def test_tokens_are_those_of_the_documents_one_by_one(tmp_path, ending):
    texts = HARD * 3
    if ending == 'parquet':
        (tmp_path / 'a.parquet').write_bytes(parquet(texts))
    elif ending == 'jsonl':
        (tmp_path / 'a.jsonl').write_text(jsonl(texts))
    elif ending == 'jsonl.gz':
        (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(jsonl(texts).encode()))
    else:
        texts = HARD[:-2]  # text files have line ends of one kind
        for n, text in enumerate(texts):
            (tmp_path / f'{n:02}.txt').write_bytes(text.encode())
    run(FINEWEB, f'--source=*.{ending}', '--val_tokens=100', cwd=tmp_path)
    stream, data = stream_of(tmp_path)
    assert stream == tokens_of(texts)
    assert len(data.tokens('val')) == 100
    counts = data.meta['splits'].values()
    assert sum(split['documents'] for split in counts) == len(texts)
    assert sum(split['bytes'] for split in counts) == len(''.join(texts).encode())


def test_a_bpe_is_trained_on_the_documents_and_once(tmp_path):
    texts = [f'document {i} of the {i % 7} documents, ' * 5 for i in range(200)] + HARD
    (tmp_path / 'a.jsonl').write_text(jsonl(texts[:150]))
    (tmp_path / 'b.jsonl').write_text(jsonl(texts[150:]))
    command = ['--source=*.jsonl', '--tokenizer=bpe', '--vocab_size=300', '--val_tokens=50']
    # A worker trains it too, and leaves what a run leaves that was killed before its end.
    _, notes = run(FINEWEB, *command, '--worker=0/1', cwd=tmp_path)
    assert 'training a BPE of 300 tokens' in notes
    for says in ('data/fineweb/val.bin: 50 tokens', 'is there already'):
        out, notes = run(FINEWEB, *command, cwd=tmp_path)
        assert says in out
        assert 'training' not in notes
    ours = folio.tokenizer.train_bpe(texts, 300)
    assert ours.n_vocab == 300
    assert folio.tokenizer.load(str(tmp_path / 'data/fineweb')).spec == ours.spec
    stream, _ = stream_of(tmp_path)
    assert stream == tokens_of(texts, ours)

    with (tmp_path / 'a.jsonl').open('a') as f:
        f.write(jsonl(['and a zebra ' * 1000]))
    _, notes = run(FINEWEB, *command, '--dataset=more', cwd=tmp_path)
    assert 'training' in notes
    assert folio.tokenizer.load(str(tmp_path / 'data/more')).spec != ours.spec


def test_a_vocabulary_too_small_for_a_bpe_gets_one_line(tmp_path):
    (tmp_path / 'a.jsonl').write_text(jsonl(HARD))
    _, error = run(FINEWEB, '--source=*.jsonl', '--tokenizer=bpe', '--vocab_size=256', cwd=tmp_path,
                   status=2)
    assert error.splitlines()[-1].startswith('error: vocab_size is 256')
    assert 'Traceback' not in error


def test_a_bpe_learns_from_the_first_characters_only(tmp_path):
    texts = [f'document {i} of the {i % 7} documents, ' * 5 for i in range(50)]
    (tmp_path / 'a.parquet').write_bytes(parquet(texts))
    run(FINEWEB, '--source=*.parquet', '--tokenizer=bpe', '--vocab_size=300',
        '--tokenizer_chars=1000', cwd=tmp_path)
    first = []
    n_left = 1000
    for text in texts:
        first.append(text[:n_left])
        n_left -= len(first[-1])
    ours = folio.tokenizer.train_bpe([text for text in first if text], 300)
    assert folio.tokenizer.load(str(tmp_path / 'data/fineweb')).spec == ours.spec


def test_max_tokens_is_exact(tmp_path):
    texts = []
    for n in range(3):
        texts_of_file = [f'text {i} of file {n}' for i in range(40)]
        (tmp_path / f'{n}.parquet').write_bytes(parquet(texts_of_file))
        texts += texts_of_file
    run(FINEWEB, '--source=*.parquet', '--val_tokens=50', '--max_tokens=333', cwd=tmp_path)
    stream, _ = stream_of(tmp_path)
    assert stream == tokens_of(texts)[:333]


@pytest.fixture
def hub(tmp_path):
    """A hub with FineWeb-Edu and OpenWebText, both of hub.texts, and with ready-made tokens."""
    texts = [f'document {i}: ' + ' '.join(map(str, range(i))) for i in range(60)]
    fineweb = {f'sample/10BT/00{n}_00000.parquet': parquet(texts[20 * n:20 * n + 20])
               for n in range(3)}
    openwebtext = {f'plain_text/train/000{n}.parquet': parquet(texts[30 * n:30 * n + 30])
                   for n in range(2)}
    shards = {}
    header = np.array([20240520, 1, 500] + [0] * 253, '<i4').tobytes()
    for n, split in enumerate(['val', 'train', 'train']):
        tokens = np.arange(500, dtype='<u2') + 1000 * n
        shards[f'finewebedu_{split}_00000{n}.bin'] = header + tokens.tobytes()
    hub = Hub({
        'HuggingFaceFW/fineweb-edu': fineweb,
        'Skylion007/openwebtext': openwebtext,
        'kjj0/finewebedu10B-gpt2': shards,
    })
    hub.texts = texts
    yield hub
    hub.server.shutdown()


def with_hub(hub, tmp_path, *args, script=FINEWEB, status=0):
    environment = os.environ | hub.environment(tmp_path / 'hub')
    return run(script, *args, cwd=tmp_path, status=status, env=environment)


@pytest.mark.parametrize('trouble', [
    [],
    pytest.param([500, 'ok', 429, 'ok', 'cut'], marks=pytest.mark.slow),
], ids=['calm', 'trouble'])
def test_fineweb_comes_from_the_hub(hub, tmp_path, trouble):
    hub.trouble = list(trouble)
    with_hub(hub, tmp_path, '--val_tokens=300')
    stream, data = stream_of(tmp_path)
    assert stream == tokens_of(hub.texts)
    assert len(data.tokens('val')) == 300
    assert not hub.trouble


@pytest.mark.parametrize('trouble', [
    [],
    pytest.param([500, 429, 'cut', 'ok', 'wrong', 'ok', 'cut', 'ok'], marks=pytest.mark.slow),
], ids=['calm', 'trouble'])
def test_ready_made_tokens_are_downloaded_checked_and_joined(hub, tmp_path, trouble):
    hub.trouble = list(trouble)
    out, _ = with_hub(hub, tmp_path, '--pretokenized=True', '--val_tokens=500')
    stream, data = stream_of(tmp_path)
    assert stream == [*range(500), *range(1000, 1500), *range(2000, 2500)]
    assert len(data.tokens('val')) == 500
    assert 'val.bin: 500 tokens' in out
    assert not hub.trouble


@pytest.mark.parametrize('trouble, says', [
    ([404] * 3, '404'),
    pytest.param(['wrong'] * 20, 'SHA-256', marks=pytest.mark.slow),
    pytest.param([500] * 20, '500', marks=pytest.mark.slow),
], ids=['404', 'wrong', '500'])
def test_a_download_that_cannot_succeed_leaves_one_line_and_nothing_half_written(
        hub, tmp_path, trouble, says):
    hub.trouble = list(trouble)
    _, error = with_hub(hub, tmp_path, '--pretokenized=True', status=2)
    last = error.splitlines()[-1]
    assert last.startswith('error: ')
    assert says in last
    assert 'Traceback' not in error
    for path in (tmp_path / 'data/fineweb').rglob('*'):
        assert path.name not in ('train.bin', 'val.bin', 'meta.json')
        assert not path.name.endswith('_000000.bin')  # the first shard


@pytest.mark.slow
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
    (['--source=*.parquet', '--tokenizer=chars.json'],
     'needs a tokenizer that can tell them apart'),
    (['--source=*.parquet', '--val_tokens=100000'],
     'are too few for 100,000 of validation: give --val_tokens='),
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
    assert last.startswith('error: ')
    assert says in last
    assert 'Traceback' not in error
    assert not list(tmp_path.rglob('train.bin'))


def test_other_settings_do_not_mix_with_an_unfinished_run(tmp_path):
    (tmp_path / 'a.parquet').write_bytes(parquet(['some text'] * 20))
    run(FINEWEB, '--source=*.parquet', '--worker=0/1', cwd=tmp_path)
    (tmp_path / 'b.parquet').write_bytes(parquet(['more text'] * 20))
    _, error = run(FINEWEB, '--source=*.parquet', cwd=tmp_path, status=2)
    assert 'unfinished run with other settings' in error
