"""The corpora that have a script: what comes from the hub, the BPE, and the settings."""
import io
import json
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import folio.tokenizer
from conftest import need_gpt2, run
from folio.data import Dataset
from hub import COMMIT, Hub

FINEWEB = 'prepare/fineweb/prepare.py'
OPENWEBTEXT = 'prepare/openwebtext/prepare.py'


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
        ids += [tokenizer.eot] + tokenizer.encode(text)
    return ids


def stream_of(folder, name='fineweb'):
    """Return the tokens of val.bin and train.bin, one after the other, and the data set."""
    data = Dataset(str(folder / 'data' / name))
    return np.concatenate([data.tokens('val'), data.tokens('train')]).tolist(), data


# ---- A BPE of the documents ----------------------------------------------------------------------
def test_a_bpe_is_trained_on_the_documents_and_once(tmp_path):
    texts = [f'document {i} of the {i % 7} documents, ' * 5 for i in range(200)]
    (tmp_path / 'a.jsonl').write_text(jsonl(texts[:150]))
    (tmp_path / 'b.jsonl').write_text(jsonl(texts[150:]))
    command = ['--source=*.jsonl', '--tokenizer=bpe', '--vocab_size=300', '--val_tokens=50']
    # A worker trains it too, and leaves what a run leaves that was killed before its end.
    _, notes = run(FINEWEB, *command, '--worker=0/1', cwd=tmp_path)
    assert 'training a BPE of 300 tokens' in notes
    assert 'counting' in notes
    for says in ('data/fineweb/val.bin: 50 tokens', 'is there already'):
        out, notes = run(FINEWEB, *command, cwd=tmp_path)
        assert says in out
        assert 'training' not in notes
    ours = folio.tokenizer.train_bpe(texts, 300)
    assert folio.tokenizer.load(str(tmp_path / 'data/fineweb')).spec == ours.spec
    stream, _ = stream_of(tmp_path)
    assert stream == tokens_of(texts, ours)

    with (tmp_path / 'a.jsonl').open('a') as f:
        f.write(jsonl(['and a zebra ' * 1000]))
    _, notes = run(FINEWEB, *command, '--dataset=more', cwd=tmp_path)
    assert 'training' in notes
    assert folio.tokenizer.load(str(tmp_path / 'data/more')).spec != ours.spec


def test_a_bpe_learns_from_the_first_characters_only(tmp_path):
    texts = [f'document {i} of the {i % 7} documents, ' * 5 for i in range(50)]
    (tmp_path / 'a.parquet').write_bytes(parquet(texts))
    run(FINEWEB, '--source=*.parquet', '--tokenizer=bpe', '--vocab_size=280',
        '--tokenizer_chars=1000', cwd=tmp_path)
    whole, rest = divmod(1000, len(texts[0]))
    ours = folio.tokenizer.train_bpe([*texts[:whole], texts[whole][:rest]], 280)
    assert folio.tokenizer.load(str(tmp_path / 'data/fineweb')).spec == ours.spec


def test_a_bpe_of_fewer_tokens_than_asked_for_is_said(tmp_path):
    (tmp_path / 'a.txt').write_text('too little ' * 30)
    _, notes = run(FINEWEB, '--source=a.txt', '--tokenizer=bpe', '--vocab_size=32000', cwd=tmp_path)
    n = folio.tokenizer.load(str(tmp_path / 'data/fineweb')).n_vocab
    assert n < 300
    assert f'the BPE has {n} tokens, not 32,000' in notes


# ---- The hub -------------------------------------------------------------------------------------
@pytest.fixture
def hub(tmp_path):
    """A hub with FineWeb-Edu and OpenWebText, both of hub.texts, and with ready-made tokens."""
    texts = [f'document {i}: ' + ' '.join(map(str, range(i))) for i in range(60)]
    fineweb = {f'sample/10BT/00{n}_00000.parquet': parquet(texts[20 * n:20 * n + 20])
               for n in range(3)}
    openwebtext = {f'plain_text/train-000{n}.parquet': parquet(texts[30 * n:30 * n + 30])
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
def test_a_download_that_fails_is_one_line_and_leaves_no_file(hub, tmp_path, trouble, says):
    hub.trouble = list(trouble)
    _, error = with_hub(hub, tmp_path, '--pretokenized=True', status=2)
    last = error.splitlines()[-1]
    assert last.startswith('error: ')
    assert says in last
    assert 'Traceback' not in error
    assert os.listdir(tmp_path / 'data/fineweb') == ['parts']
    assert not list(tmp_path.rglob('*.bin'))


@pytest.mark.slow
def test_a_header_of_another_format_is_refused(hub, tmp_path):
    shards = hub.files['kjj0/finewebedu10B-gpt2']
    for name in shards:
        shards[name] = b'\0' * 1024 + shards[name][1024:]
    _, error = with_hub(hub, tmp_path, '--pretokenized=True', status=2)
    assert 'header' in error.splitlines()[-1]


@pytest.mark.slow
def test_the_commit_of_the_first_run_is_read_by_all_that_follow(hub, tmp_path, monkeypatch):
    asked = []

    class Recording(hub.server.RequestHandlerClass):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()
        do_HEAD = do_GET
        do_POST = do_GET
    hub.server.RequestHandlerClass = Recording
    command = ['--source=hf://datasets/HuggingFaceFW/fineweb-edu/sample/*/*.parquet',
               '--val_tokens=100']
    with_hub(hub, tmp_path, *command, '--worker=0/2')

    monkeypatch.setattr('hub.COMMIT', 'd' * 40)  # somebody pushes
    asked.clear()
    with_hub(hub, tmp_path, *command)
    stream, data = stream_of(tmp_path)
    assert stream == tokens_of(hub.texts)
    contents = [path for path in asked if '/resolve/' in path]
    assert contents
    assert all(f'/resolve/{COMMIT}/' in path for path in contents)
    assert data.meta['source']['revision'] == COMMIT
    out, _ = with_hub(hub, tmp_path, *command)
    assert 'is there already' in out


def test_openwebtext_is_the_sets_own_parquet_files(hub, tmp_path):
    need_gpt2()
    with_hub(hub, tmp_path, '--val_tokens=100', script=OPENWEBTEXT)
    stream, data = stream_of(tmp_path, 'openwebtext')
    assert stream == tokens_of(hub.texts)
    assert len(data.tokens('val')) == 100


# ---- Settings ------------------------------------------------------------------------------------
@pytest.mark.parametrize('name, args', [
    ('book', ['--book=train.txt']), ('dolly', ['--source=a.jsonl']),
    ('fineweb', ['--source=a.jsonl', '--tokenizer=bpe', '--vocab_size=260']),
    ('openwebtext', ['--source=a.jsonl', '--val_tokens=50']),
    ('wikitext2', ['--source=.', '--vocab_size=260'])])
def test_a_data_set_may_be_named_with_its_folder(tmp_path, name, args):
    need_gpt2()
    row = {'text': 'some text', 'instruction': 'Go.', 'response': 'Yes.'}
    (tmp_path / 'a.jsonl').write_text((json.dumps(row) + '\n') * 50)
    for split in ('train', 'valid', 'test'):
        (tmp_path / f'{split}.txt').write_text('some text ' * 50)
    out, _ = run(f'prepare/{name}/prepare.py', '--dataset=data/mine', *args, cwd=tmp_path)
    assert 'data/mine' in out
    assert 'data/data' not in out
    assert (tmp_path / 'data/mine/train.bin').exists()


@pytest.mark.parametrize('args, says', [
    (['--source=none/*.parquet'], 'no file is called none/*.parquet'),
    (['--source=.'], "such as 'my/*.parquet'"),
    (['--source=nowhere://a/*.parquet'], 'nowhere'),
    (['--source=*.parquet', '--tokenizer=chars.json'],
     'needs a tokenizer that can tell them apart'),
    (['--source=*.parquet', '--worker=2/2'], '--worker=0/4'),
    (['--source=*.parquet', '--worker=0/2', '--max_tokens=9'], 'leave out'),
    (['--source=*.parquet', '--val_tokens=50', '--max_tokens=50'], 'leaves nothing to train on'),
    (['--source=*.parquet', '--tokenizer=bpe', '--vocab_size=256'], 'vocab_size is 256'),
    (['--pretokenized=True', '--tokenizer=data/book'], "GPT-2's tokens of these"),
    (['--sample=sample-1T'], 'sample-100BT'),
    (['--pretokenized=True', '--sample=sample-350BT'], '--edition=fineweb --sample=sample-100BT'),
])
def test_mistakes_get_one_line(tmp_path, args, says):
    (tmp_path / 'good.parquet').write_bytes(parquet(['some text'] * 20))
    (tmp_path / 'chars.json').write_text('{"kind": "char", "chars": "some text"}')
    _, error = run(FINEWEB, *args, cwd=tmp_path, status=2)
    last = error.strip().splitlines()[-1]
    assert last.startswith('error: ')
    assert says in last
    assert 'Traceback' not in error
    assert not list(tmp_path.rglob('train.bin'))
