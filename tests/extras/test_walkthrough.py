"""Test the notebook: what is stored of it, that its assertions notice mistakes, that it runs."""
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
CODE = {cell['id']: ''.join(cell['source']) for cell in CELLS if cell['cell_type'] == 'code'}
PICTURE = 'image/png'


def pictures(cells):
    """Return how many pictures each cell has in its outputs."""
    counts = collections.Counter()
    for cell in cells:
        for output in cell.get('outputs', []):
            counts[cell['id']] += PICTURE in output.get('data', {})
    return +counts


# ---- As it is stored -----------------------------------------------------------------------------
def test_nothing_but_pictures_is_stored_and_the_file_is_small():
    outputs = [output for cell in CELLS for output in cell.get('outputs', [])]
    assert len(outputs) > 9
    assert all(list(output['data']) == [PICTURE] for output in outputs)
    assert all(cell['execution_count'] is None for cell in CELLS if cell['cell_type'] == 'code')
    assert NOTEBOOK.stat().st_size < 400_000


def test_every_section_says_what_to_look_at_and_what_to_try():
    prose = '\n'.join(''.join(cell['source']) for cell in CELLS if cell['cell_type'] == 'markdown')
    sections = re.split(r'^## (?=\d)', prose, flags=re.MULTILINE)[1:]
    assert len(sections) > 9
    for section in sections:
        assert '**Look at**' in section and '**Try**' in section


# ---- Where it starts -----------------------------------------------------------------------------
@pytest.mark.parametrize('folder', ['.', 'docs'])
def test_it_finds_the_checkout_from_its_root_and_from_docs(folder, monkeypatch):
    monkeypatch.chdir(ROOT / folder)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    exec(CODE['setup'], {})
    assert os.getcwd() == str(ROOT) == sys.path[0]


def test_away_from_the_repository_it_asks_for_the_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match='address'):
        exec(CODE['setup'], {})


# ---- What it asserts -----------------------------------------------------------------------------
@pytest.fixture
def begun():
    """The names its cells find: its imports, a text of random characters, an untrained model."""
    pytest.importorskip('matplotlib')
    import numpy as np
    names = {'V': 96, 'train': np.random.RandomState(0).randint(96, size=3000).astype(np.uint16)}
    exec(CODE['imports'], names)
    chars = '\n' + ''.join(map(chr, range(32, 127)))
    names['tokenizer'] = names['folio'].tokenizer.CharTokenizer(chars)
    config = names['GPTConfig'](block_size=64, vocab_size=96, n_layer=2, n_head=2, n_embd=32)
    names['gpt'] = names['GPT'](config)
    names['torch'].nn.init.normal_(names['gpt'].lm_head.weight, std=1.0)
    return names


def torch_without_a_mask(monkeypatch):
    import torch.nn.functional as F
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, 'scaled_dot_product_attention',
                        lambda q, k, v, **options: attention(q, k, v))


def half_a_gradient(monkeypatch):
    from model import GPT
    loss = GPT.loss

    def halved(*args):
        whole = loss(*args)
        return whole / 2 + whole.detach() / 2
    monkeypatch.setattr(GPT, 'loss', halved)


def merges_in_another_order(monkeypatch):
    from folio import bpe
    learn = bpe.learn_merges
    monkeypatch.setattr(bpe, 'learn_merges', lambda *args: learn(*args)[::-1])


def weak_cache(monkeypatch):
    from folio.engine import KVCache
    append = KVCache.append
    monkeypatch.setattr(KVCache, 'append', lambda *args: [part * 0.9 for part in append(*args)])


@pytest.mark.parametrize('cells, spoil', [
    (['attention-by-hand', 'attention-assert'], torch_without_a_mask),
    (['attention-by-hand', 'model-embed', 'model-attention-open', 'model-attention-assert'],
     torch_without_a_mask),
    (['gradient-model-assert'], half_a_gradient),
    (['bpe-by-hand', 'bpe-assert'], merges_in_another_order),
    (['cache-assert'], weak_cache),
], ids=['attention', 'model', 'gradient', 'bpe', 'cache'])
def test_its_assertions_hold_and_notice_what_is_wrong(cells, spoil, begun, monkeypatch):
    for name in cells:
        exec(CODE[name], begun)
    spoil(monkeypatch)
    with pytest.raises(AssertionError):
        for name in cells:
            exec(CODE[name], begun)


def test_its_gradient_check_notices_what_the_chain_rule_does_not_see(begun):
    for name in ('attention-by-hand', 'gradient-by-hand', 'gradient-assert'):
        exec(CODE[name], begun)
    mean_square = begun['mean_square']
    begun['mean_square'] = lambda k: mean_square(k) + k.detach().mean()
    with begun['torch'].no_grad():
        begun['numeric_TD'] = begun['finite_differences'](begun['mean_square'], begun['k_TD'], 1e-5)
    with pytest.raises(AssertionError):
        exec(CODE['gradient-assert'], begun)


# ---- Executed ------------------------------------------------------------------------------------
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
    client.execute()  # raises where a cell fails
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == 'code')
    assert pictures(notebook.cells) == pictures(CELLS)
    assert [path.read_bytes() for path in mine] == [b'mine', b'mine']
    written = {path.name for name in ('data', 'out') for path in (folder / name).iterdir()}
    assert written == {'book', 'walkthrough'}
