"""config/: every recipe sets what there is, says how to run it, and is the recipe it claims."""
import ast
import functools

import pytest
import torch

from conftest import ROOT, run
from folio.configurator import model_settings
from model import GPT, GPTConfig

CONFIGS = sorted(path.name for path in (ROOT / 'config').glob('*.py'))


@functools.cache
def settings_of(*configs, device='cuda'):
    """Return train.py's settings after these config files, as --help tells them."""
    paths = [ROOT / 'config' / name for name in configs]
    out, _ = run('train.py', *paths, f'--device={device}', '--help', cwd=ROOT)
    settings = {}
    for line in out.splitlines():
        if line.startswith('  --'):
            name, _, value = line.removeprefix('  --').split('  ')[0].partition('=')
            try:
                settings[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):  # a text
                settings[name] = value
    return settings


def model_of(settings):
    """Return the model of these settings, without the memory of its weights."""
    with torch.device('meta'):
        return GPT(GPTConfig(**model_settings(settings, GPTConfig), vocab_size=50257))


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_sets_only_settings_that_exist(name, device):
    settings_of(name, device=device)  # fails at a name or a type that train.py lacks


@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_says_how_to_run_it(name):
    lines = (ROOT / 'config' / name).read_text(encoding='utf-8').splitlines()
    assert any(f'config/{name}' in line for line in lines if line.startswith('#'))


@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_describes_a_model_that_can_be(name):
    model_of(settings_of(name))


# ---- The published recipe ------------------------------------------------------------------------
RECIPE = {
    'max_iters': 19073, 'warmup_iters': 715, 'lr_decay_iters': 0, 'learning_rate': 6e-4,
    'min_lr': 6e-5, 'weight_decay': 0.1, 'beta1': 0.9, 'beta2': 0.95, 'n_layer': 12, 'n_head': 12,
    'n_embd': 768, 'bias': True, 'arch': 'gpt2'}


@pytest.mark.parametrize('name', RECIPE)
def test_train_fineweb_is_the_published_recipe(name):
    assert settings_of('train_fineweb.py')[name] == RECIPE[name]


def test_train_fineweb_takes_half_a_million_tokens_a_step():
    s = settings_of('train_fineweb.py')
    assert s['gradient_accumulation_steps'] * s['batch_size'] * s['block_size'] == 524288
    assert s['gradient_accumulation_steps'] % 8 == 0  # eight GPUs


def test_train_fineweb_evaluates_ten_million_tokens():
    s = settings_of('train_fineweb.py')
    assert s['eval_iters'] * s['batch_size'] * s['block_size'] == 10485760


# ---- Sizes ---------------------------------------------------------------------------------------
SIZES = {'small': 124.4, 'medium': 354.8, 'large': 774.0, 'xl': 1557.6}  # millions of parameters


def recipe_of(size):
    """Return the config files of a size of GPT-2; the small one is the recipe's own."""
    return ['train_fineweb.py'] if size == 'small' else ['train_fineweb.py', f'gpt2_{size}.py']


@pytest.mark.parametrize('size', SIZES)
def test_a_size_stacked_on_a_recipe_changes_the_size_alone(size):
    plain = settings_of('train_fineweb.py')
    sized = settings_of(*recipe_of(size))
    changed = {name for name in sized if sized[name] != plain[name]}
    assert changed <= {'n_layer', 'n_head', 'n_embd'}


@pytest.mark.parametrize('size', SIZES)
def test_a_size_has_the_parameters_of_openais(size):
    settings = settings_of(*recipe_of(size))
    model = model_of(settings)
    padding = (50304 - 50257) * settings['n_embd']
    n_parameters = sum(p.numel() for p in model.parameters()) - padding
    assert n_parameters == pytest.approx(SIZES[size] * 1e6, rel=1e-3)
