"""extras/gpu_report.py: checks and measurements of a GPU, here in their small form on a CPU."""
import json
import re

import pytest
import torch

from conftest import TINY, run
from extras import gpu_checks, gpu_report
from folio import checkpoint
from folio.machine import Machine

QUICK = ['float32', 'formats', 'training/2', 'kernels', 'muon', 'decoding', 'hellaswag']


def lines(name):
    """Return the lines of a section of the small form."""
    machine = Machine('cpu', 'auto')
    return list(gpu_report.lines_of(name, machine, gpu_report.SMALL))


def results(name):
    return [line['result'] for line in lines(name)]


def report(folder, *args, status=0):
    """Write a report; return (its page, its JSON)."""
    run('extras/gpu_report.py', '--device=cpu', '--to=pages', *args, cwd=folder, status=status)
    page, = (folder / 'pages').glob('*.md')
    return page.read_text(), json.loads(page.with_suffix('.json').read_text())


# ---- The report ----------------------------------------------------------------------------------
def test_a_report_has_a_verdict_for_each_check_and_a_number_for_each_measurement(tmp_path):
    pytest.importorskip('transformers')
    page, data = report(tmp_path, f'--sections={",".join(QUICK)}')
    assert list(data['sections']) == QUICK
    for name, section in data['sections'].items():
        for line in section:
            assert f'| {line["name"]} | {line["result"]} |' in page
            if name in gpu_report.CHECKS:
                assert line['result'] == 'pass'
            else:
                assert line['value'] > 0
    names = [line['name'] for line in data['sections']['training/2']]
    assert names == ['batch 2, folio', 'batch 2, plain loop', 'batch 2, transformers',
                     'batch 2, folio / plain loop', 'batch 2, folio / transformers']
    assert len(data['sections']['kernels']) == 11
    assert 'Failed: 0.' in page


def test_an_error_in_a_section_is_a_line_and_the_others_go_on(tmp_path):
    page, data = report(tmp_path, '--sections=hellaswag,decoding', '--hellaswag_source=none.jsonl',
                        status=1)
    failed, = data['sections']['hellaswag']
    assert failed['result'] == 'FAILED' and 'none.jsonl cannot be read' in failed['comment']
    assert [line['name'] for line in data['sections']['decoding']] == ['batch 1, eager',
                                                                       'batch 4, eager']
    assert 'Failed: 1.' in page


def test_what_no_time_is_left_for_is_left_out(tmp_path):
    _, data = report(tmp_path, '--sections=float32,training', '--minutes=0')
    assert [section[0]['result'] for section in data['sections'].values()] == ['left out'] * 2


def test_what_does_not_fit_is_a_line_and_a_smaller_batch_is_taken(monkeypatch):
    forward = gpu_report.GPT.forward

    def forward_with_little_memory(self, idx_BT, *args, **options):
        if len(idx_BT) > 2:
            raise torch.OutOfMemoryError
        return forward(self, idx_BT, *args, **options)

    monkeypatch.setattr(gpu_report, 'find_spec', lambda name: None)
    monkeypatch.setattr(gpu_report.GPT, 'forward', forward_with_little_memory)
    found = {line['name']: line['result'] for line in lines('training')}
    assert found == {'transformers': 'left out', 'batch 4, folio': 'out of memory',
                     'batch 4, plain loop': 'out of memory'}
    assert lines('kernels')[0]['name'].startswith('batch 2, all ')


def test_a_cut_off_report_leaves_what_it_has(tmp_path, monkeypatch):
    def interrupted(machine):
        raise KeyboardInterrupt
        yield

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(gpu_report.CHECKS, 'formats', interrupted)
    (tmp_path / 'docs' / 'gpu').mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        gpu_report.make_report(['float32', 'formats'], Machine('cpu', 'auto'))
    page, = tmp_path.glob('docs/gpu/*.md')
    assert '## float32' in page.read_text() and '## formats' not in page.read_text()


def test_a_mistake_gets_one_line(tmp_path):
    (tmp_path / 'file').touch()
    mistakes = {'--sections=tranning': 'some of float32', '--minutes=-1': 'at least 0',
                '--to=file': 'another --to'}
    for argument, message in mistakes.items():
        _, error = run('extras/gpu_report.py', argument, cwd=tmp_path, status=2)
        assert message in error and error.count('\n') == 1


# ---- Checks see what is wrong --------------------------------------------------------------------
def test_a_wrong_layer_fails_the_checks(monkeypatch):
    accelerate = gpu_checks.fast.accelerate

    def accelerate_badly(model):
        with torch.no_grad():
            model.transformer.h[1].mlp.c_proj.weight *= 1.01
        return accelerate(model)

    assert results('float32') == ['pass', 'pass']
    monkeypatch.setattr(gpu_checks.fast, 'accelerate', accelerate_badly)
    assert results('float32') == ['FAIL', 'FAIL']


def test_a_number_that_is_not_finite_fails_a_check():
    nan = {'loss': torch.tensor(float('nan'))}
    line = gpu_checks.compare('x', nan, {'loss': torch.tensor(1.0)}, dtype='float32')
    assert line['result'] == 'FAIL'


def test_a_cache_that_forgets_fails_the_checks(monkeypatch):
    monkeypatch.setattr(Machine, 'can_compile', lambda self: False)
    assert set(results('cache')) == {'pass'}
    append = gpu_checks.engine.KVCache.append

    def append_nothing_to_the_first_layer(self, layer, k_BHTD, v_BHTD):
        return append(self, layer, k_BHTD * (layer > 0), v_BHTD)

    monkeypatch.setattr(gpu_checks.engine.KVCache, 'append', append_nothing_to_the_first_layer)
    assert 'FAIL' in results('cache')


@pytest.mark.parametrize('name', ['compile', 'cache'])
def test_compiled_is_as_eager(name, monkeypatch):
    monkeypatch.setattr(gpu_checks, 'ARCHS', ('modern',))  # to compile takes long
    assert set(results(name)) == {'pass'}


def test_runs_learn_and_resume_to_the_same_bits():
    assert results('runs') == ['pass']
    assert results('resume') == ['pass', 'pass', 'pass']


def test_two_processes_have_the_losses_of_one():
    machine = Machine('cpu', 'auto')
    found = list(gpu_checks.check_processes(machine, n=2))
    assert [line['result'] for line in found] == ['pass', 'pass']
    assert results('processes') == ['left out']


def test_weights_that_differ_in_one_number_fail(trained):
    weights = checkpoint.load(str(trained / 'out' / 'ckpt.pt'))
    weights['model']['transformer.wpe.weight'][3, 5] += 1e-6
    (trained / 'other').mkdir()
    checkpoint.save(str(trained / 'other' / 'ckpt.pt'), weights)
    line = gpu_checks.check_same_weights('other', str(trained), 'out')
    assert line['result'] == 'FAIL' and '15 of 16 tensors are equal' in line['comment']


# ---- Training in several calls -------------------------------------------------------------------
def test_calls_of_some_minutes_make_one_run_and_its_picture(trained):
    pytest.importorskip('matplotlib')

    def train(max_iters, minutes):
        arguments = ' '.join([*TINY, f'--max_iters={max_iters}', '--eval_interval=200'])
        out, _ = run('extras/gpu_report.py', f'--train={arguments}', '--out_dir=out/long',
                     f'--minutes={minutes}', '--beside=out', '--to=pages', cwd=trained)
        return out, checkpoint.load(str(trained / 'out' / 'long' / 'ckpt.pt'))['iter_num']

    out, reached = train(1_000_000, minutes=0.25)
    assert 'the same command goes on' in out and 0 < reached < 1_000_000
    out, end = train(reached + 20, minutes=2)
    assert 'the same command goes on' not in out and end == reached + 20
    losses = gpu_checks.logged(str(trained / 'out'), 'long', 'loss')
    assert len(losses) == (end + 4) // 5  # one for each five steps: none is missing, none twice
    page, = (trained / 'pages').glob('*-long-out.md')
    assert re.search(r'\| long \|.*\| out \|', page.read_text().replace('\n', ' '))
    assert 'long has the last loss of out, ' in page.read_text()
    assert page.with_suffix('.png').read_bytes().startswith(b'\x89PNG')


def test_a_training_that_fails_gets_one_line(tmp_path):
    _, error = run('extras/gpu_report.py', '--train=--dataset=none', cwd=tmp_path, status=2)
    assert error == 'error: train.py ended with status 2; what it says stands above\n'
