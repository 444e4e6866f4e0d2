import ast
import collections
import json
import re
import shutil

import pytest

from conftest import ROOT

NOTEBOOK = ROOT / 'docs' / 'walkthrough.ipynb'
CELLS = json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']
CODE = {cell['id']: ''.join(cell['source']) for cell in CELLS if cell['cell_type'] == 'code'}
OURS = [ast.parse(path.read_text(encoding='utf-8')) for path in [*ROOT.glob('*.py'), *ROOT.glob('prepare/*/*.py')]]
OUR_LINES = {line.strip() for path in [*ROOT.glob('*.py'), *ROOT.glob('prepare/*/*.py')]
             for line in path.read_text(encoding='utf-8').splitlines()}
PICTURE = 'image/png'


def defined(tree):
    return {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def pictures(cells):
    """How many pictures each cell has in its outputs."""
    shown = [cell['id'] for cell in cells for output in cell.get('outputs', []) if PICTURE in output.get('data', {})]
    return collections.Counter(shown)


# ---- As it is stored -------------------------------------------------------------------------------------------------
def test_it_repeats_no_code_of_the_project():
    own = set().union(*(defined(ast.parse(source)) for source in CODE.values()))
    assert own and not own & set().union(*map(defined, OURS))
    lines = [line.strip() for source in CODE.values() for line in source.splitlines() if 'import ' not in line]
    assert not [line for line in lines if len(line) > 30 and line in OUR_LINES]


def test_nothing_but_pictures_is_stored_and_the_file_is_small():
    outputs = [output for cell in CELLS for output in cell.get('outputs', [])]
    assert all(list(output['data']) == [PICTURE] for output in outputs) and len(outputs) == len(pictures(CELLS)) > 9
    assert all(cell['execution_count'] is None for cell in CELLS if cell['cell_type'] == 'code')
    assert NOTEBOOK.stat().st_size < 400_000


def test_every_section_says_what_to_look_at_and_what_to_try():
    prose = '\n'.join(''.join(cell['source']) for cell in CELLS if cell['cell_type'] == 'markdown')
    sections = re.split(r'^## (?=\d)', prose, flags=re.MULTILINE)[1:]
    assert len(sections) == 11 and all('**Look at**' in s and '**Try**' in s for s in sections)


def test_cells_have_names_and_lines_of_at_most_100_columns():
    assert len({cell['id'] for cell in CELLS}) == len(CELLS)
    assert all(re.fullmatch(r'[a-z]+(-[a-z]+)*', cell['id']) for cell in CELLS)
    assert not [line for cell in CELLS for line in ''.join(cell['source']).splitlines() if len(line) > 100]


def test_away_from_the_repository_it_asks_for_the_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match='address'):
        exec(CODE['setup'], {})


# ---- What it asserts -------------------------------------------------------------------------------------------------
@pytest.fixture
def begun():
    """The names that its cells find: its imports, a text of random characters, an untrained model."""
    pytest.importorskip('matplotlib')
    import numpy as np
    names = {'V': 96, 'train': np.random.RandomState(0).randint(96, size=3000).astype(np.uint16)}
    exec(CODE['imports'], names)
    names['tokenizer'] = names['tokenizers'].CharTokenizer('\n' + ''.join(map(chr, range(32, 127))))
    names['gpt'] = names['GPT'](names['GPTConfig'](block_size=64, vocab_size=96, n_layer=2, n_head=2, n_embd=32))
    names['torch'].nn.init.normal_(names['gpt'].lm_head.weight, std=1.0)
    return names


def torch_without_a_mask(monkeypatch):
    import torch.nn.functional as F
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, 'scaled_dot_product_attention', lambda q, k, v, *rest, is_causal: attention(q, k, v))


def half_a_gradient(monkeypatch):
    from folio import fast
    backward = fast.HeadLoss.backward
    monkeypatch.setattr(fast.HeadLoss, 'backward', lambda ctx, d: (backward(ctx, d)[0] / 2, *backward(ctx, d)[1:]))


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
    (['attention-by-hand', 'model-embed', 'model-attention-open', 'model-attention-assert'], torch_without_a_mask),
    (['gradient-model-assert'], half_a_gradient),
    (['bpe-by-hand', 'bpe-assert'], merges_in_another_order),
    (['cache-assert'], weak_cache)], ids=['attention', 'model', 'gradient', 'bpe', 'cache'])
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
    spoiled = CODE['gradient-by-hand'].replace('.square().mean()', '.square().mean() + k.detach().mean()')
    assert spoiled != CODE['gradient-by-hand']
    exec(spoiled, begun)
    with pytest.raises(AssertionError):
        exec(CODE['gradient-assert'], begun)


# ---- Executed --------------------------------------------------------------------------------------------------------
def test_it_runs_from_start_to_end_and_leaves_the_users_runs_alone(tmp_path):
    for package in ('nbclient', 'ipykernel', 'matplotlib'):
        pytest.importorskip(package)
    import nbclient
    import nbformat
    folder = tmp_path / 'folio'
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns('.*', '__pycache__', 'data', 'out', 'tests'))
    mine = [folder / 'data' / 'book' / 'train.bin', folder / 'out' / 'book' / 'ckpt.pt']
    for path in mine:
        path.parent.mkdir(parents=True)
        path.write_bytes(b'mine')
    notebook = nbformat.read(folder / 'docs' / 'walkthrough.ipynb', as_version=4)
    options = {'kernel_name': 'python3', 'timeout': 300, 'resources': {'metadata': {'path': str(folder)}}}
    nbclient.NotebookClient(notebook, **options).execute()  # which raises where a cell fails
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == 'code')
    assert pictures(notebook.cells) == pictures(CELLS)
    assert [path.read_bytes() for path in mine] == [b'mine', b'mine']
    assert {path.name for name in ('data', 'out') for path in (folder / name).iterdir()} == {'book', 'walkthrough'}
