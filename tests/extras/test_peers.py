"""extras/peers.py: the same work by folio and by transformers."""
import re

import pytest

from conftest import run

SMALL = ['--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=64', '--train_tokens=16',
         '--new_tokens=4', '--steps=2', '--rounds=1', '--compile=False', '--device=cpu']


def test_the_table_has_both_speeds_and_their_ratio(tmp_path):
    pytest.importorskip('transformers')
    out, _ = run('extras/peers.py', *SMALL, cwd=tmp_path)
    rows = re.findall(r'^(training|decoding) .*, (\w+) +(\S+) +(\S+) +(\S+)$', out, re.MULTILINE)
    assert [row[:2] for row in rows] == [('training', 'float32'), ('decoding', 'float32'),
                                         ('training', 'bfloat16'), ('decoding', 'bfloat16')]
    for _, _, ours, theirs, ratio in rows:
        ours, theirs = float(ours.replace(',', '')), float(theirs.replace(',', ''))
        assert float(ratio) == pytest.approx(ours / theirs, abs=0.01)


@pytest.mark.parametrize('arg, says', [
    ('--which=tranning', 'training, decoding, all'), ('--rounds=0', 'at least 1'),
    ('--new_tokens=64', 'block_size is 64: give at least 81')])
def test_a_mistake_gets_one_line(tmp_path, arg, says):
    pytest.importorskip('transformers')
    _, error = run('extras/peers.py', *SMALL, arg, cwd=tmp_path, status=2)
    assert says in error
    assert error.count('\n') == 1
