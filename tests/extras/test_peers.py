"""extras/peers.py: the same work by others, and the race to a loss."""
import json
import re

import pytest

from conftest import TINY, run, shared


def test_peers_do_the_same_work_and_the_table_says_how_much_faster_ours_is(tmp_path):
    pytest.importorskip('transformers')
    shared('tiktoken')
    lines = []
    for i in range(40):
        lines.append(json.dumps({'text': f'Text number {i} of many, and its words. ' * 20}))
    (tmp_path / 'some.jsonl').write_text('\n'.join(lines))
    endings = ['down.', 'on a roof and sings.', 'up', 'in the rain.']
    item = {'ctx': 'A man sits', 'endings': endings, 'label': 1}
    (tmp_path / 'items.jsonl').write_text(json.dumps(item))
    out, _ = run('extras/peers.py', *TINY, '--steps=2', '--new_tokens=4', '--rounds=1',
                 '--bias=True', '--dataset=none', '--texts=some.jsonl',
                 '--hellaswag_source=items.jsonl', '--json=peers.json', cwd=tmp_path)
    metrics = json.loads((tmp_path / 'peers.json').read_text())
    for name in ('training step', 'decoding, 1 x 900 tokens', "Muon's step", 'HellaSwag',
                 'tokenizing to a file', 'learning a BPE of 32,000, tokenizers'):
        assert metrics[name] > 0 and f'\n{name} ' in out
    assert 'transformers' in out and 'a document a task' in out and 'rustbpe' in out
    difference = float(re.search('the scores differ by (.*) at most', out).group(1))
    assert difference < 1e-4


def test_a_race_takes_the_time_to_a_loss(book):
    tiny = ' '.join([*TINY, '--max_iters=2'])
    race = ['--which=race', '--rounds=1', f'--race_ours={tiny}', f'--race_theirs={tiny} --seed=2',
            '--json=peers.json']
    out, _ = run('extras/peers.py', *race, '--race_loss=99.0', cwd=book)
    metrics = json.loads((book / 'peers.json').read_text())
    assert out.count('round ') == 2 and 'seed=2' in out
    share = metrics['race to 99.0'] / metrics['race to 99.0, theirs']
    assert metrics['race, share of the time'] == share
    _, error = run('extras/peers.py', *race, '--race_loss=0.1', cwd=book, status=2)
    assert 'above 0.1' in error


def test_a_mistake_gets_one_line(tmp_path):
    mistakes = {'--which=tranning': 'some of training', '--new_tokens=101': 'at most 100',
                '--rounds=0': 'at least 1'}
    for argument, message in mistakes.items():
        _, error = run('extras/peers.py', argument, cwd=tmp_path, status=2)
        assert message in error and error.count('\n') == 1
