import doctest
import importlib
import re
import subprocess

import pytest

from conftest import ROOT

BUDGET = {'model.py': 330, 'optim.py': 150, 'tokenizer.py': 220, 'dataset.py': 170, 'configurator.py': 80,
          'train.py': 330, 'sample.py': 90, 'download.py': 80, 'machine.py': 145, 'checkpoint.py': 120,
          'hellaswag.py': 180, 'hugging_face.py': 155, 'export.py': 160, 'bench.py': 250, 'corpus.py': 250,
          'documents.py': 140, 'linear.py': 100, 'bpe.py': 100, 'loss.py': 70, 'peers.py': 280, 'sampling.py': 60,
          'humaneval.py': 255, 'confine.py': 180, 'textbook.py': 120, 'evaluation.py': 45,
          'report.py': 285, 'ngrams.py': 105, 'plots.py': 120, 'app.py': 165,
          'prepare/textbook/prepare.py': 280, 'prepare/textbook/generator.py': 240, 'prepare/textbook/teacher.py': 370}
FILES = subprocess.run(['git', 'ls-files', '*.py'], cwd=ROOT, capture_output=True, text=True).stdout.split()
FILES = FILES or [str(path.relative_to(ROOT)) for path in ROOT.rglob('*.py')]  # an archive without git


def budget(path):
    """Lines that a file may have, or None: config files are recipe cards, prepare scripts one data set, tests free."""
    return BUDGET.get(path) or {'config': 30, 'prepare': 120}.get(path.split('/')[0])


@pytest.mark.parametrize('path', [path for path in FILES if not path.startswith('tests/')])
def test_file_keeps_its_budget_of_lines(path):
    assert budget(path), f'{path} has no budget: add it to the table here'
    assert len((ROOT / path).read_text(encoding='utf-8').splitlines()) <= budget(path)


def test_lines_fit_in_120_columns():
    long = [f'{path}:{i}' for path in FILES
            for i, line in enumerate((ROOT / path).read_text(encoding='utf-8').splitlines(), 1) if len(line) > 120]
    assert not long


@pytest.mark.parametrize('name', ['sampling', 'optim', 'dataset', 'humaneval', 'ngrams'])
def test_examples_in_docstrings_are_true(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0 and result.failed == 0


def test_readme_shows_pictures_that_are_there():
    shown = re.findall(r'!\[.+?\]\((.+?)\)', (ROOT / 'README.md').read_text(encoding='utf-8'))
    assert len(shown) == 2 and all((ROOT / name).read_bytes().startswith(b'\x89PNG') for name in shown)


def test_readme_is_short():
    assert len((ROOT / 'README.md').read_text(encoding='utf-8').splitlines()) < 280
