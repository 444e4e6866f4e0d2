import pathlib

import pytest

from folio.configurator import UserError, configure
from conftest import ROOT


def settings(*argv):
    namespace = dict(start='\n', seed=1, learning_rate=0.5, bias=True, compile='auto', device='cuda', _private=1,
                     path=pathlib)
    return configure(namespace, list(argv))


def write(tmp_path, text):
    (tmp_path / 'config.py').write_text(text)
    return str(tmp_path / 'config.py')


@pytest.mark.parametrize('arg, key, value', [
    ('--start=5', 'start', '5'), ('--start=a=b', 'start', 'a=b'), ('--start=', 'start', ''),
    ('--bias=false', 'bias', False), ('--bias=True', 'bias', True), ('--compile=false', 'compile', False),
    ('--learning_rate=1', 'learning_rate', 1.0), ('--learning_rate=1e-3', 'learning_rate', 1e-3),
    ('--seed=-3', 'seed', -3)])
def test_values_take_the_type_of_their_setting(arg, key, value):
    got = settings(arg)[key]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize('arg, message', [
    ('--sed=1', 'did you mean seed'), ('--learning-rate=1', 'did you mean learning_rate'), ('--seed=1.5', 'takes int'),
    ('--seed=x', 'takes int'), ('--bias=2', 'takes bool'), ('--bias', '--key=value'), ('-seed=1', '--key=value'),
    ('seed=1', '--key=value'), ('my.txt', 'name.py'), ('no.py', 'no config file'), ('--_private=2', 'unknown'),
    ('--path=x', 'unknown')])
def test_mistakes_on_the_command_line_are_named(arg, message):
    with pytest.raises(UserError) as error:
        settings(arg)
    assert message in str(error.value)


def test_files_apply_in_order_and_the_command_line_wins(tmp_path):
    first, second = write(tmp_path, 'seed = 2\nlearning_rate = 2'), tmp_path / 'second.py'
    second.write_text('learning_rate = learning_rate * 2')
    got = settings(first, str(second), '--seed=7')
    assert (got['seed'], got['learning_rate']) == (7, 4.0) and type(got['learning_rate']) is float


def test_a_config_file_may_branch_on_what_was_asked_for(tmp_path):
    config = write(tmp_path, "if device == 'cpu':\n    seed = 5")
    assert settings(config, '--device=cpu')['seed'] == 5 and settings(config)['seed'] == 1


def test_helpers_of_a_config_file_stay_its_own(tmp_path):
    got = settings(write(tmp_path, 'import time\nfrom math import pi as _pi\ndef f(): pass\n_n = 3\nseed = _n'))
    assert got['seed'] == 3 and set(got) == {'start', 'seed', 'learning_rate', 'bias', 'compile', 'device'}


@pytest.mark.parametrize('text, message', [
    ('sed = 1', 'unknown setting sed in .*config.py: did you mean seed'), ('seed = 1.0', 'takes int'),
    ('bias = 1', 'takes bool'), ('seed = True', 'takes int'), ('start = None', 'takes str'),
    ('seed = 1\nx y', 'line 2: SyntaxError'), ('seed = 1 / 0', 'line 1: ZeroDivisionError')])
def test_mistakes_in_a_config_file_are_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        settings(write(tmp_path, text))


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_every_setting_of_the_shipped_configs_exists(device):
    source = (ROOT / 'train.py').read_text().split('config = configure')[0]
    namespace = {'default_device': lambda: device}
    exec('\n'.join(line for line in source.splitlines() if line[:1].isalpha() and ' = ' in line), namespace)
    for config in sorted((ROOT / 'config').glob('*.py')):
        configure(dict(namespace), [str(config)])
