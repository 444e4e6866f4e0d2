"""extras/peers.py: the same work by folio and by transformers."""
import re

import pytest

from conftest import run

SMALL = ['--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=64', '--train_tokens=16',
         '--new_tokens=4', '--rounds=1', '--compile=False', '--device=cpu']


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_table_has_both_speeds_and_their_ratio(tmp_path, dtype):
    pytest.importorskip('transformers')
    out, _ = run('extras/peers.py', *SMALL, f'--dtype={dtype}', cwd=tmp_path)
    assert f'dtype {dtype}' in out
    rows = re.findall(r'^(training|decoding) .* (\S+) +(\S+) +(\S+)$', out, re.MULTILINE)
    assert [row[0] for row in rows] == ['training', 'decoding']
    for _, *numbers in rows:
        ours, theirs, ratio = (float(number.replace(',', '')) for number in numbers)
        assert ratio == pytest.approx(ours / theirs, rel=0.01, abs=0.01)  # of rounded numbers


@pytest.mark.parametrize('arg, says', [
    ('--rounds=0', 'at least 1'), ('--new_tokens=64', 'block_size is 64: give at least 81')])
def test_a_mistake_gets_one_line(tmp_path, arg, says):
    pytest.importorskip('transformers')
    _, error = run('extras/peers.py', *SMALL, arg, cwd=tmp_path, status=2)
    assert says in error
    assert error.count('\n') == 1
