"""An experiment is a copied file: a model of one's own in every script, and which code ran."""
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT, TINY, log_of, run
from folio import checkpoint
from folio.data import Dataset, train_batch
from model import GPT, GPTConfig


def edited(name, *pairs):
    """Return the text of one of our files with each old text, which it has once, replaced."""
    text = (ROOT / name).read_text(encoding='utf-8')
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


# Grouped queries (Ainslie et al. 2023): fewer heads of keys and values than of queries
GROUPED = edited(
    'model.py',
    ('    n_head: int = 12\n', '    n_head: int = 12\n    n_kv_head: int = 1\n'),
    ('nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)\n',
     'nn.Linear(config.n_embd, config.n_embd + 2 * config.n_embd // config.n_head\n'
     '                                * config.n_kv_head, bias=config.bias)\n'),
    ('self.c_attn.n_matrices = 3', 'self.c_attn.n_matrices = 1'),
    ('q, k, v = self.c_attn(x).split(C, dim=2)\n',
     'K = self.config.n_kv_head\n'
     '        q, k, v = self.c_attn(x).split([C, C // H * K, C // H * K], dim=2)\n'),
    ('k = k.view(B, T, H, C // H)', 'k = k.view(B, T, K, C // H)'),
    ('v = v.view(B, T, H, C // H)', 'v = v.view(B, T, K, C // H)'),
    ('        y = self.attend(q, k, v, self.window)\n',
     '        k = k.repeat_interleave(H // K, dim=1)\n'
     '        v = v.repeat_interleave(H // K, dim=1)\n'
     '        y = self.attend(q, k, v, self.window)\n'))
# Two lines of config: with n_embd 32 and two heads
CONFIG = 'from my_model import GPT, GPTConfig\nn_kv_head = 1\n'


@pytest.fixture
def experiment(book):
    """A folder with data/book, my_model.py and gqa.py, which brings it."""
    (book / 'my_model.py').write_text(GROUPED, encoding='utf-8')
    (book / 'gqa.py').write_text(CONFIG)
    return book


# ---- A model that a config file brings -----------------------------------------------------------
def test_a_copied_model_trains_resumes_and_is_sampled(experiment):
    options = ['gqa.py', *TINY, '--arch=modern', '--optimizer=muon', '--lr_decay_iters=30']
    out, _ = run('train.py', *options, cwd=experiment)
    assert out.endswith('read it with: python sample.py gqa.py --init_from=resume '
                        '--out_dir=out\n')
    run('train.py', *options, '--max_iters=13', '--out_dir=other', cwd=experiment)
    run('train.py', *options, '--init_from=resume', '--out_dir=other', cwd=experiment)
    alone = checkpoint.load(str(experiment / 'out'))
    resumed = checkpoint.load(str(experiment / 'other'))
    assert alone['model_args']['n_kv_head'] == 1
    assert alone['model']['transformer.h.0.attn.c_attn.weight'].shape == (64, 32)
    assert all(resumed['model'][name].equal(w) for name, w in alone['model'].items())
    text, err = run('sample.py', 'gqa.py', '--out_dir=out', '--start=The', '--device=cpu',
                    '--max_new_tokens=40', cwd=experiment)  # past the context of 32
    assert len(text) == len('The') + 40 + len('\n')
    assert 'code other than' not in err


def test_a_copied_model_is_scored_and_benched(experiment):
    run('train.py', 'gqa.py', *TINY, '--max_iters=2', cwd=experiment)
    item = {'ctx': 'the name of', 'endings': ['it', 'the object', 'zzz', 'a'], 'label': 1}
    (experiment / 'items.jsonl').write_text(json.dumps(item))
    out, _ = run('hellaswag.py', 'gqa.py', '--out_dir=out', '--source=items.jsonl',
                 '--device=cpu', cwd=experiment)
    assert json.loads(out.splitlines()[-1])['n'] == 1
    out, _ = run('bench.py', 'gqa.py', '--dataset=book', '--n_layer=2', '--n_embd=32',
                 '--n_head=2', '--block_size=32', '--gradient_accumulation_steps=1',
                 '--steps=2', '--new_tokens=4', '--device=cpu', cwd=experiment)
    assert '\ndecoding ' in out
    _, err = run('extras/export.py', 'gqa.py', '--out_dir=out', cwd=experiment, status=2)
    assert 'transformers has no such model' in err


@pytest.mark.slow
def test_every_process_of_torchrun_has_the_copied_model(experiment):
    run('train.py', 'gqa.py', *TINY, '--max_iters=4', '--gradient_accumulation_steps=2',
        cwd=experiment, processes=2)
    assert checkpoint.load(str(experiment / 'out'))['model_args']['n_kv_head'] == 1


def test_copied_scripts_with_an_edited_import_do_the_same(experiment):
    line = ('from model import GPT, GPTConfig\n', 'from my_model import GPT, GPTConfig\n')
    (experiment / 'my_train.py').write_text(edited('train.py', line), encoding='utf-8')
    line = ('from model import GPT\n', 'from my_model import GPT\n')
    (experiment / 'my_sample.py').write_text(edited('sample.py', line), encoding='utf-8')
    run(experiment / 'my_train.py', *TINY, '--max_iters=2', '--n_kv_head=1', cwd=experiment)
    run(experiment / 'my_train.py', *TINY, '--max_iters=4', '--n_kv_head=1',
        '--init_from=resume', cwd=experiment)
    text, _ = run(experiment / 'my_sample.py', '--out_dir=out', '--start=The', '--device=cpu',
                  '--max_new_tokens=5', cwd=experiment)
    assert len(text) == len('The') + 5 + len('\n')


def test_the_model_next_to_its_config_is_the_one_that_runs(experiment, monkeypatch):
    """Whatever else has its name on Python's path."""
    monkeypatch.syspath_prepend(experiment)
    (experiment / 'mine').mkdir()
    capped = edited('model.py', ('LOGIT_CAP = 15.0', 'LOGIT_CAP = 0.5'))
    (experiment / 'mine' / 'my_model.py').write_text(capped, encoding='utf-8')
    (experiment / 'mine' / 'cap.py').write_text('from my_model import GPT, GPTConfig\n')
    run('train.py', 'mine/cap.py', *TINY, '--arch=modern', '--max_iters=2',
        '--out_dir=out/cap', cwd=experiment)
    assert 'LOGIT_CAP = 0.5' in (experiment / 'out' / 'cap' / 'model.py').read_text()


# ---- What an edit may add ------------------------------------------------------------------------
# A mixture of experts in every second layer, a 3-D stack of them, a gate that begins at zero, and
# an expert that no token reaches
MIXED = edited(
    'model.py',
    ('class Block(nn.Module):', '''class Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))
        self.first = nn.Parameter(torch.full((2, config.n_embd, config.n_embd), 0.25))
        self.unused = nn.Parameter(torch.ones(3, config.n_embd, config.n_embd))

    def forward(self, x):
        return self.gate * (x @ self.first[0] + x @ self.first[1])


class Block(nn.Module):'''),
    ('        self.mlp = MLP(config)\n',
     '        self.mlp = MLP(config) if layer % 2 == 0 else Experts(config)\n'))


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_an_edit_may_add_layers_that_differ_and_idle_weights(book, optimizer):
    (book / 'my_model.py').write_text(MIXED, encoding='utf-8')
    (book / 'moe.py').write_text('from my_model import GPT, GPTConfig\n')
    options = ['moe.py', *TINY, f'--optimizer={optimizer}', '--log_interval=1']
    out, _ = run('train.py', *options, '--max_iters=2', cwd=book)
    assert out.count('no gradient reaches transformer.h.1.mlp.unused: left as it is') == 1
    weights = checkpoint.load(str(book / 'out'))['model']
    assert weights['transformer.h.1.mlp.unused'].eq(1).all()
    assert 0 < weights['transformer.h.1.mlp.gate'].abs().item() < 0.01  # two steps away from 0
    assert weights['transformer.h.1.mlp.first'].mean().item() == pytest.approx(0.25, abs=0.01)
    run('train.py', *options, '--max_iters=4', '--init_from=resume', cwd=book)
    text, _ = run('sample.py', 'moe.py', '--start=The', '--device=cpu', '--max_new_tokens=5',
                  cwd=book)
    assert text.startswith('The')


@pytest.mark.slow
def test_two_processes_leave_idle_weights_alone(book):
    (book / 'my_model.py').write_text(MIXED, encoding='utf-8')
    (book / 'moe.py').write_text('from my_model import GPT, GPTConfig\n')
    out, _ = run('train.py', 'moe.py', *TINY, '--gradient_accumulation_steps=2', '--max_iters=4',
                 cwd=book, processes=2)
    assert out.count('no gradient reaches transformer.h.1.mlp.unused') == 1


# ---- What is read is what runs -------------------------------------------------------------------
# Edits of a line or two: of the loss, of attention (ALiBi, Press et al. 2022), of the rotation
# (none for queries), of one layer's window
EDITS = {
    'loss': [("ignore_index=-1, reduction='sum')",
              "ignore_index=-1, reduction='sum',\n                               "
              "label_smoothing=0.3)")],
    'attention': [(' and T <= window and self.config.flash:\n', ' and False:\n'),
                  ('        if self.config.flash:\n',
                   '        pos_T = torch.arange(q_BHTD.size(-2), device=q_BHTD.device)\n'
                   '        bias_TS = (pos_T - pos_T[:, None]) * 0.5\n'
                   '        mask_TS = bias_TS.masked_fill(~mask_TS, -math.inf).type_as(q_BHTD)\n'
                   '        if self.config.flash:\n')],
    'rotation': [('            q = rms_norm(rotate(q, *cos_sin))\n',
                  '            q = rms_norm(q)\n')],
    'window': [('        self.window = config.window\n',
                '        self.window = 1 if layer == 1 else 0\n')],
}


@pytest.fixture(scope='module')
def sharp(book_once, tmp_path_factory):
    """A folder with data/book and sharp.pt, weights so large that each token seen matters."""
    folder = tmp_path_factory.mktemp('sharp')
    os.symlink(book_once / 'data', folder / 'data')
    data = Dataset(str(folder / 'data' / 'book'))
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=data.vocab_size, n_layer=2, n_head=2, n_embd=32,
                          arch='modern'))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    checkpoint.save(str(folder / 'sharp.pt'), {
        'model': model.state_dict(), 'model_args': dataclasses.asdict(model.config),
        'tokenizer': data.spec})
    return folder


def module_from(path):
    """Import a file as a module, whatever was imported under that name before."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def loss_by_logits(path, folder, label_smoothing=0.0):
    """Return the loss of the first training batch, in float32, from the logits of a model file."""
    model = module_from(path).GPT.from_pretrained(checkpoint.load(str(folder / 'sharp.pt')))
    tokens = Dataset(str(folder / 'data' / 'book')).tokens('train')
    idx_BT, targets_BT = train_batch(tokens, None, block_size=32, batch_size=4, seed=1337, first=0)
    logits_BTV, _ = model(idx_BT, all_logits=True)
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(),
                           label_smoothing=label_smoothing).item()


@pytest.mark.parametrize('options', [
    ['--dtype=float32'],
    pytest.param(['--dtype=bfloat16', '--compile=True'], marks=pytest.mark.slow)], ids=' '.join)
@pytest.mark.parametrize('what', EDITS)
def test_an_edit_changes_the_training_loss_as_it_should(sharp, what, options, tmp_path):
    (tmp_path / 'edited_model.py').write_text(edited('model.py', *EDITS[what]), encoding='utf-8')
    (tmp_path / 'mine.py').write_text('from edited_model import GPT, GPTConfig\n')
    out, _ = run('train.py', tmp_path / 'mine.py', *TINY, '--init_from=sharp.pt', '--max_iters=1',
                 '--arch=modern', '--log_interval=1', f'--out_dir={tmp_path / "out"}', *options,
                 cwd=sharp)
    if 'compile is off: ' in out:
        pytest.skip('no compiler here, as train.py said')
    logged = [entry['loss'] for entry in log_of(tmp_path) if 'loss' in entry]
    smoothing = 0.3 if what == 'loss' else 0.0
    expected = loss_by_logits(tmp_path / 'edited_model.py', sharp, label_smoothing=smoothing)
    tolerance = 1e-4 if options == ['--dtype=float32'] else 0.005
    assert logged == [pytest.approx(expected, abs=tolerance)]
    assert abs(expected - loss_by_logits(ROOT / 'model.py', sharp)) > 2 * tolerance


# ---- Which code ran ------------------------------------------------------------------------------
def test_a_run_keeps_the_code_of_its_model_and_says_what_ran(experiment):
    run('train.py', 'gqa.py', *TINY, '--max_iters=1', '--note=do fewer keys cost much?',
        cwd=experiment)
    assert (experiment / 'out' / 'model.py').read_text(encoding='utf-8') == GROUPED
    first = log_of(experiment)[0]
    assert first['config']['note'] == 'do fewer keys cost much?'
    record = first['record']
    assert record == checkpoint.load(str(experiment / 'out'))['record']
    assert record['argv'][1:2] == ['gqa.py']
    assert record['model'] and record.keys() == {'commit', 'dirty', 'argv', 'model'}


def test_the_record_names_the_commit_and_a_dirty_tree(tmp_path):
    def git(*args):
        subprocess.run(['git', '-c', 'user.name=a', '-c', 'user.email=a@b', *args], cwd=tmp_path,
                       check=True, capture_output=True)

    (tmp_path / 'one_model.py').write_text('class GPT:\n    pass\n')
    git('init')
    git('add', '.')
    git('commit', '-m', 'first')
    sys.path.insert(0, str(tmp_path))
    from one_model import GPT
    sys.path.remove(str(tmp_path))
    clean = checkpoint.record_of(GPT)
    assert len(clean['commit']) == 40 and not clean['dirty']
    (tmp_path / 'one_model.py').write_text('class GPT:\n    x = 1\n')
    edited = checkpoint.record_of(GPT)
    assert edited['commit'] == clean['commit'] and edited['dirty']
    assert edited['model'] != clean['model']


# The same shapes and fields: without a record it would be taken for the other model.
NEGATED = edited('model.py', ('        x = self.c_fc(x)\n', '        x = -self.c_fc(x)\n'))


def test_a_checkpoint_of_other_code_says_so_and_names_the_copy(book):
    (book / 'my_model.py').write_text(NEGATED, encoding='utf-8')
    (book / 'mine.py').write_text('from my_model import GPT, GPTConfig\n')
    run('train.py', 'mine.py', *TINY, '--max_iters=1', cwd=book)
    _, err = run('sample.py', '--out_dir=out', '--device=cpu', '--max_new_tokens=5', cwd=book)
    assert err.count('\n') == 1
    assert 'notice: out/ckpt.pt was trained with code other than' in err
    assert 'That code is in out (model.py' in err
    # As it says:
    shutil.copy(book / 'out' / 'model.py', book / 'old_model.py')
    (book / 'old.py').write_text('from old_model import GPT, GPTConfig')
    _, err = run('sample.py', 'old.py', '--out_dir=out', '--device=cpu', '--max_new_tokens=5',
                 cwd=book)
    assert err == ''


@pytest.mark.slow
def test_a_report_does_not_measure_a_run_of_other_code(book):
    pytest.importorskip('matplotlib')
    (book / 'my_model.py').write_text(NEGATED, encoding='utf-8')
    (book / 'mine.py').write_text('from my_model import GPT, GPTConfig\n')
    run('train.py', 'mine.py', *TINY, '--max_iters=4', cwd=book)
    run('train.py', *TINY, '--max_iters=4', '--out_dir=plain', cwd=book)
    run('extras/report.py', 'out', 'plain', '--device=cpu', '--num_samples=2', cwd=book)
    page = (book / 'out' / 'report' / 'report.md').read_text(encoding='utf-8')
    assert 'out: its model is' in page and 'not measured: out/' in page
    assert page.count('not measured: ') == 1
