"""log.py: the folder of a run, held by one process, and a log that ends no run."""
import json
import os
import sys

import pytest

from conftest import ROOT, largest_file
from folio.configurator import UserError
from folio.log import Log, cut, read, set_aside, start_wandb

MODEL = str(ROOT / 'model.py')
ENTRIES = [{'config': {}}, {'iter': 0, 'val_loss': 3.0}, {'iter': 0, 'loss': 3.0},
           {'iter': 1, 'loss': 2.5}, {'iter': 2, 'val_loss': 2.4}, {'iter': 2, 'loss': 2.3}]


@pytest.fixture
def path(tmp_path):
    """A log of the entries above."""
    path = tmp_path / 'log.jsonl'
    path.write_text(''.join(json.dumps(entry) + '\n' for entry in ENTRIES))
    return path


# ---- Reading -------------------------------------------------------------------------------------
def test_what_is_written_is_read(tmp_path):
    log = Log(str(tmp_path / 'out'), MODEL)
    for entry in ENTRIES:
        log.write(**entry)
    assert read(str(tmp_path / 'out' / 'log.jsonl')) == ENTRIES


def test_a_log_is_cut_where_its_run_continues(path):
    cut(str(path), 2)
    assert read(str(path)) == ENTRIES[:4]


def test_a_last_line_that_was_cut_short_is_left_out(path):
    path.write_text(path.read_text()[:-5])
    assert read(str(path)) == ENTRIES[:5]


def test_a_damaged_line_before_the_last_is_named(path):
    path.write_text(path.read_text().replace('"iter": 1', '"iter" 1'))
    with pytest.raises(UserError, match='line 4 is damaged'):
        read(str(path))


# ---- The folder ----------------------------------------------------------------------------------
def test_the_files_of_an_old_run_move_and_others_stay(tmp_path):
    out = tmp_path / 'out'
    (out / 'previous-1').mkdir(parents=True)
    (out / 'mine').mkdir()
    ours = ['ckpt.pt', 'best.pt', 'log.jsonl', 'model.py', 'model_until_5.py']
    theirs = ['notes.txt', 'mine/ckpt.pt', 'previous-1/ckpt.pt', 'previous-1/plan.md']
    for name in ours + theirs:
        (out / name).write_text(name)
    assert set_aside(str(out)) == str(out / 'previous-2')
    assert all((out / name).read_text() == name for name in theirs)
    assert all((out / 'previous-2' / name).read_text() == name for name in ours)
    assert set_aside(str(out)) is None


def test_a_run_that_continues_with_other_code_keeps_both(tmp_path):
    before = tmp_path / 'before.py'
    after = tmp_path / 'after.py'
    before.write_text('# before')
    after.write_text('# after')
    out = tmp_path / 'out'
    for code, resume_at in ((before, None), (before, 3), (after, 5), (after, 8)):
        Log(str(out), str(code), resume_at=resume_at).lock.release()
    assert (out / 'model.py').read_text() == '# after'
    assert (out / 'model_until_5.py').read_text() == '# before'
    assert sorted(path.name for path in out.glob('*.py')) == ['model.py', 'model_until_5.py']


def test_a_run_next_to_its_model_is_refused(tmp_path):
    (tmp_path / 'model.py').write_text('mine')
    with pytest.raises(UserError, match='give another --out_dir'):
        Log(str(tmp_path), str(tmp_path / 'model.py'))
    assert (tmp_path / 'model.py').read_text() == 'mine'


# ---- What goes wrong while a run is under way ----------------------------------------------------
def test_on_a_full_disk_the_log_keeps_whole_lines(tmp_path, capsys):
    log = Log(str(tmp_path), MODEL)
    with largest_file(40):
        for iter_num in range(3):
            log.write(iter=iter_num, loss=3.0)
    log.write(iter=3, loss=3.0)  # there is room again
    assert [entry['iter'] for entry in read(str(tmp_path / 'log.jsonl'))] == [0, 3]
    assert capsys.readouterr().err.count('the run continues without it') == 1


class NoNetwork:
    def log(self, entry, step):
        raise ConnectionError('no network')


def test_a_wandb_that_fails_is_left_alone(tmp_path, capsys):
    log = Log(str(tmp_path), MODEL, wandb_run=NoNetwork())
    for iter_num in range(3):
        log.write(iter=iter_num, loss=3.0)
    assert len(read(str(tmp_path / 'log.jsonl'))) == 3
    assert capsys.readouterr().err.count('ConnectionError: no network') == 1


def test_a_folder_named_wandb_is_not_the_package(tmp_path, monkeypatch):
    os.mkdir(tmp_path / 'wandb')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, 'wandb', None)  # as where it is not installed
    with pytest.raises(UserError, match='pip install wandb'):
        start_wandb('folio', 'run', {})
