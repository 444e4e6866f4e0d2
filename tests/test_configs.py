import dataclasses

import pytest
import torch

from conftest import ROOT
from folio.configurator import configure
from model import GPT, GPTConfig

CONFIGS = sorted(path.name for path in (ROOT / 'config').glob('*.py'))


def settings_of(*configs):
    """train.py's settings after these config files."""
    namespace = {}
    exec((ROOT / 'train.py').read_text(encoding='utf-8').partition('\nconfig = configure(')[0], namespace)
    return configure(namespace | {'device': 'cuda'}, [str(ROOT / 'config' / name) for name in configs])


@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_sets_only_what_there_is_and_says_how_to_run_it(name):
    settings_of(name)  # which raises at a name or a type that is none of train.py's
    comments = [line for line in (ROOT / 'config' / name).read_text(encoding='utf-8').splitlines() if line[0:1] == '#']
    assert any(f'config/{name}' in line for line in comments)


def test_train_fineweb_is_the_published_recipe():
    s = settings_of('train_fineweb.py')
    assert s['gradient_accumulation_steps'] * s['batch_size'] * s['block_size'] == 524288
    assert (s['max_iters'], s['warmup_iters'], s['lr_decay_iters']) == (19073, 715, 19073)
    assert (s['learning_rate'], s['min_lr'], s['weight_decay'], s['beta1'], s['beta2']) == (6e-4, 6e-5, 0.1, 0.9, 0.95)
    assert (s['n_layer'], s['n_head'], s['n_embd'], s['bias'], s['arch']) == (12, 12, 768, True, 'gpt2')
    assert s['eval_iters'] * s['batch_size'] * s['block_size'] == 10485760 and s['gradient_accumulation_steps'] % 8 == 0


@pytest.mark.parametrize('size, millions', [('small', 124.4), ('medium', 354.8), ('large', 774.0), ('xl', 1557.6)])
def test_a_size_stacked_on_a_recipe_changes_the_size_alone(size, millions):
    plain, s = settings_of('train_fineweb.py'), settings_of('train_fineweb.py', f'gpt2_{size}.py')
    assert {k for k in s if s[k] != plain[k]} <= {'n_layer', 'n_head', 'n_embd'}
    with torch.device('meta'):
        model = GPT(GPTConfig(**{f.name: s.get(f.name, 50257) for f in dataclasses.fields(GPTConfig)}))
    padding = (50304 - 50257) * s['n_embd']
    assert sum(p.numel() for p in model.parameters()) - padding == pytest.approx(millions * 1e6, rel=1e-3)
