"""The rules of the house: what may import what, and what a line may hold."""
import ast
import doctest
import functools
import importlib
import re
import subprocess
import sys

import pytest

from conftest import ROOT
from folio.configurator import UserError


def tracked(*patterns):
    """Return the paths of the files that git knows; none in an archive without git."""
    done = subprocess.run(['git', 'ls-files', *patterns], cwd=ROOT, capture_output=True, text=True)
    return [path for path in done.stdout.split('\n') if path and (ROOT / path).exists()]


FILES = tracked('*.py') or [str(path.relative_to(ROOT)) for path in ROOT.rglob('*.py')]
CODE = [path for path in FILES if not path.startswith('tests/')]
SCRIPTS = ('model.py', 'train.py', 'sample.py', 'bench.py', 'hellaswag.py')
AT_THE_TOP = {
    *SCRIPTS, 'config', 'prepare', 'folio', 'extras', 'docs', 'tests', '.ci', '.gitignore',
    'README.md', 'LICENSE', 'requirements.txt', 'requirements-dev.txt', 'ruff.toml'}
# Of a model, by assigning to it
SWAPPED = ('__class__', 'forward', 'attend', 'attend_where', 'attend_in_blocks', 'loss', 'logits')
FOLIO = {
    'configurator', 'data', 'tokenizer', 'bpe', 'optim', 'checkpoint', 'hugging_face', 'machine',
    'engine', 'download', 'log'}


@functools.cache
def parse(path):
    return ast.parse((ROOT / path).read_text(encoding='utf-8'))


def imports(tree):
    """Return {module: whether importing the file imports it always}.

    An import in a function, or under a condition, is made where it is needed.
    """
    found = {}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
            if node.module in ('folio', 'extras', 'extras.textbook', 'prepare'):
                names = [f'{node.module}.{alias.name}' for alias in node.names]
        for name in names:
            found[name] = found.get(name, False) or node in tree.body
    return found


def file_of(module):
    """Return the path of one of our modules, or None for a library."""
    path = module.replace('.', '/') + '.py'
    return path if path in CODE else None


@functools.cache
def ours(path):
    """Return {path of one of our files that it imports: whether at the top}."""
    folder = path.rpartition('/')[0]
    found = {}
    for module, at_top in imports(parse(path)).items():
        target = file_of(module) or file_of(f'{folder}/{module}'.replace('/', '.').lstrip('.'))
        if target:
            found[target] = at_top
    return found


@functools.cache
def closure(path):
    """Return our files that a file needs as soon as it is imported, itself among them."""
    needed = {path}
    todo = [path]
    while todo:
        for target, at_top in ours(todo.pop()).items():
            if at_top and target not in needed:
                needed.add(target)
                todo.append(target)
    return needed


# ---- The house -----------------------------------------------------------------------------------
def test_the_top_level_is_what_the_readme_shows():
    assert {path.split('/')[0] for path in tracked()} <= AT_THE_TOP
    assert {path for path in CODE if '/' not in path} == set(SCRIPTS)


def test_folio_has_the_files_of_the_design():
    inside = {path for path in CODE if path.startswith('folio/')}
    assert inside - {'folio/__init__.py'} == {f'folio/{name}.py' for name in FOLIO}


# ---- Imports -------------------------------------------------------------------------------------
def test_model_imports_torch_and_the_standard_library_only():
    found = {name.split('.')[0] for name in imports(parse('model.py'))}
    assert found <= sys.stdlib_module_names | {'torch'}


@pytest.mark.parametrize('path', [path for path in CODE if not path.startswith('config/')])
def test_imports_go_down(path):
    for target in ours(path):
        if target.startswith('extras/'):
            assert path.startswith('extras/'), f'{path} imports {target}'
        if target.startswith('prepare/'):
            assert path.startswith(('prepare/', 'extras/')), f'{path} imports {target}'
        if path.startswith('folio/'):
            assert target.startswith('folio/'), f'{path} imports {target}'
        if target in SCRIPTS and target != 'model.py' and not path.startswith('extras/'):
            assert (path, target) == ('train.py', 'hellaswag.py'), f'{path} imports {target}'


@pytest.mark.parametrize('path', CODE)
def test_what_is_read_in_the_model_is_what_runs(path):
    """No other code derives from its classes, swaps them or puts other functions into them."""
    classes = {node.name for node in parse('model.py').body if isinstance(node, ast.ClassDef)}
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ClassDef) and path != 'model.py':
            bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
            assert not bases & classes, f'{path}, line {node.lineno}'
        if isinstance(node, ast.Assign):
            for target in node.targets:
                is_swap = isinstance(target, ast.Attribute) and target.attr in SWAPPED
                assert not is_swap, f'{path}, line {node.lineno}'


def test_no_import_goes_in_a_circle():
    for path in CODE:
        for target, at_top in ours(path).items():
            if at_top:
                assert path not in closure(target), f'{path} and {target} import each other'


def test_a_copy_of_train_needs_at_most_eight_files_of_folio():
    needed = closure('train.py') - {'train.py', 'model.py', 'folio/__init__.py'}
    assert all(path.startswith('folio/') for path in needed)
    assert len(needed) <= 8, needed


@pytest.mark.parametrize('script', ['prepare/dolly/prepare.py', 'prepare/book/prepare.py'])
def test_a_prepare_script_needs_no_model(script):
    assert 'model.py' not in closure(script)


# ---- Lines ---------------------------------------------------------------------------------------
@pytest.mark.parametrize('path', FILES)
def test_lines_fit_in_100_columns(path):
    lines = (ROOT / path).read_text(encoding='utf-8').splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > 100] == []


CROWDED = (ast.IfExp, ast.ListComp, ast.GeneratorExp, ast.DictComp, ast.SetComp, ast.BoolOp)


@pytest.mark.parametrize('path', CODE)
def test_tuple_assignments_are_plain(path):
    crowded = []
    for node in ast.walk(parse(path)):
        is_tuple_to_tuple = isinstance(node, ast.Assign) and isinstance(
            node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
        if is_tuple_to_tuple and any(isinstance(part, CROWDED) for part in ast.walk(node.value)):
            crowded.append(node.lineno)
    assert crowded == []


# ---- Examples and pictures -----------------------------------------------------------------------
def has_examples(path):
    """Whether a docstring of a file shows an input and its output."""
    documented = (ast.Module, ast.FunctionDef, ast.ClassDef)
    nodes = [node for node in ast.walk(parse(path)) if isinstance(node, documented)]
    return any('>>> ' in (ast.get_docstring(node) or '') for node in nodes)


WITH_EXAMPLES = [path for path in CODE if has_examples(path)]


@pytest.mark.parametrize('path', WITH_EXAMPLES)
def test_examples_in_docstrings_are_true(path):
    try:
        module = importlib.import_module(path.removesuffix('.py').replace('/', '.'))
    except UserError as e:
        pytest.skip(str(e))  # a package of the extras is missing
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0


def test_readme_shows_pictures_that_are_there():
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    shown = re.findall(r'!\[.+?\]\((.+?)\)', readme)
    assert shown
    assert all((ROOT / name).read_bytes().startswith(b'\x89PNG') for name in shown)
