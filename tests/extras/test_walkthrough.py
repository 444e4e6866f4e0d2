"""Test the notebook: what is stored of it, where it starts, that it runs and its assertions hold."""
import collections
import json
import os
import re
import shutil
import sys

import pytest

from conftest import ROOT

NOTEBOOK = ROOT / 'docs' / 'walkthrough.ipynb'
CELLS = json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']
SETUP = next(''.join(cell['source']) for cell in CELLS if cell['id'] == 'setup')
PICTURE = 'image/png'


def pictures(cells):
    """Return how many pictures each cell has in its outputs."""
    counts = collections.Counter()
    for cell in cells:
        for output in cell.get('outputs', []):
            counts[cell['id']] += PICTURE in output.get('data', {})
    return +counts


def test_nothing_but_pictures_is_stored_and_the_file_is_small():
    outputs = [output for cell in CELLS for output in cell.get('outputs', [])]
    assert len(outputs) > 9
    assert all(list(output['data']) == [PICTURE] for output in outputs)
    assert all(cell['execution_count'] is None for cell in CELLS if cell['cell_type'] == 'code')
    assert NOTEBOOK.stat().st_size < 400_000


def test_every_part_says_what_to_look_at_and_what_to_try():
    prose = '\n'.join(''.join(cell['source']) for cell in CELLS if cell['cell_type'] == 'markdown')
    parts = re.split(r'^## (?=\d)', prose, flags=re.MULTILINE)[1:]
    assert len(parts) > 9
    for part in parts:
        assert '**Look at**' in part and '**Try**' in part


@pytest.mark.parametrize('folder', ['.', 'docs'])
def test_it_finds_the_checkout_from_its_root_and_from_docs(folder, monkeypatch):
    monkeypatch.chdir(ROOT / folder)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    exec(SETUP, {})
    assert os.getcwd() == str(ROOT) == sys.path[0]


def test_away_from_the_repository_it_asks_for_the_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match='address'):
        exec(SETUP, {})


def test_it_runs_from_start_to_end_and_leaves_the_users_runs_alone(tmp_path):
    for package in ('nbclient', 'ipykernel', 'matplotlib'):
        pytest.importorskip(package)
    import nbclient
    import nbformat
    folder = tmp_path / 'folio'
    ignored = shutil.ignore_patterns('.*', '__pycache__', 'data', 'out', 'tests')
    shutil.copytree(ROOT, folder, ignore=ignored)
    mine = [folder / 'data' / 'book' / 'train.bin', folder / 'out' / 'book' / 'ckpt.pt']
    for path in mine:
        path.parent.mkdir(parents=True)
        path.write_bytes(b'mine')
    notebook = nbformat.read(folder / 'docs' / 'walkthrough.ipynb', as_version=4)
    docs = {'metadata': {'path': str(folder / 'docs')}}
    client = nbclient.NotebookClient(notebook, kernel_name='python3', timeout=600, resources=docs)
    client.execute()  # raises where a cell fails: what a cell claims, it asserts
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == 'code')
    assert pictures(notebook.cells) == pictures(CELLS)
    assert [path.read_bytes() for path in mine] == [b'mine', b'mine']
    written = {path.name for name in ('data', 'out') for path in (folder / name).iterdir()}
    assert written == {'book', 'walkthrough'}
