"""Test the notebooks: what is stored of them, where they start, and that they run as they are."""
import collections
import json
import os
import re
import shutil
import sys

import pytest

from conftest import ROOT

WRITES = {'walkthrough': {'data/walkthrough', 'out/walkthrough'},
          'textbook': {'out/textbook_notebook'}}
PICTURE = 'image/png'


@pytest.fixture(params=WRITES)
def name(request):
    return request.param


def cells_of(name):
    return json.loads((ROOT / 'docs' / f'{name}.ipynb').read_text(encoding='utf-8'))['cells']


def setup_of(name):
    return next(''.join(cell['source']) for cell in cells_of(name) if cell['id'] == 'setup')


def pictures(cells):
    """Return how many pictures each cell has in its outputs."""
    counts = collections.Counter()
    for cell in cells:
        for output in cell.get('outputs', []):
            counts[cell['id']] += PICTURE in output.get('data', {})
    return +counts


def test_nothing_but_pictures_is_stored_and_the_file_is_small(name):
    cells = cells_of(name)
    outputs = [output for cell in cells for output in cell.get('outputs', [])]
    assert len(outputs) > 1
    assert all(list(output['data']) == [PICTURE] for output in outputs)
    assert all(cell['execution_count'] is None for cell in cells if cell['cell_type'] == 'code')
    assert (ROOT / 'docs' / f'{name}.ipynb').stat().st_size < 400_000


def test_every_part_says_what_to_look_at_and_what_to_try(name):
    prose = [''.join(cell['source']) for cell in cells_of(name) if cell['cell_type'] == 'markdown']
    parts = re.split(r'^## (?=\d)', '\n'.join(prose), flags=re.MULTILINE)[1:]
    assert len(parts) > 4
    for part in parts:
        assert '**Look at**' in part and '**Try**' in part


@pytest.mark.parametrize('folder', ['.', 'docs'])
def test_it_finds_the_checkout_from_its_root_and_from_docs(name, folder, tmp_path, monkeypatch):
    checkout = tmp_path / 'folio'
    (checkout / 'docs').mkdir(parents=True)
    (checkout / 'model.py').touch()
    monkeypatch.chdir(checkout / folder)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    exec(setup_of(name), {})
    assert sys.path[0] == str(checkout)
    assert os.getcwd().startswith(str(checkout))


def test_away_from_the_repository_it_asks_for_the_address(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match='address'):
        exec(setup_of(name), {})


def test_it_runs_from_start_to_end_next_to_the_users_runs(name, tmp_path):
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
    notebook = nbformat.read(folder / 'docs' / f'{name}.ipynb', as_version=4)
    docs = {'metadata': {'path': str(folder / 'docs')}}
    client = nbclient.NotebookClient(notebook, kernel_name='python3', timeout=600, resources=docs)
    client.execute()  # raises where a cell fails: what a cell claims, it asserts
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == 'code')
    assert pictures(notebook.cells) == pictures(cells_of(name))
    assert [path.read_bytes() for path in mine] == [b'mine', b'mine']
    written = {f'{top}/{path.name}' for top in ('data', 'out') for path in (folder / top).iterdir()}
    assert written == WRITES[name] | {'data/book', 'out/book'}
