"""folio/configurator.py: settings from files and the command line, mistakes named."""
import dataclasses
import pathlib

import pytest

from conftest import run
from folio.configurator import UserError, configure

SETTINGS = {'start': '\n', 'seed': 1, 'learning_rate': 0.5, 'bias': True, 'compile': 'auto',
            'device': 'cuda'}
OTHERS = {'_private': 1, 'path': pathlib, 'Name': 'x', 'numbers': (1, 2)}


def settings(*argv):
    return configure(SETTINGS | OTHERS, list(argv))


@pytest.fixture
def write(tmp_path):
    """A function that writes a config file and returns its path."""
    def write(text, name='config.py'):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)
    return write


# ---- The command line ----------------------------------------------------------------------------
def test_settings_are_the_plain_values_in_lower_case():
    assert settings() == SETTINGS


@pytest.mark.parametrize('arg, key, value', [
    ('--start=5', 'start', '5'),
    ('--start=a=b', 'start', 'a=b'),
    ('--start=', 'start', ''),
    ('--bias=false', 'bias', False),
    ('--bias=True', 'bias', True),
    ('--compile=false', 'compile', False),
    ('--compile=auto', 'compile', 'auto'),
    ('--learning_rate=1', 'learning_rate', 1.0),
    ('--learning_rate=1e-3', 'learning_rate', 1e-3),
    ('--seed=-3', 'seed', -3),
])
def test_values_take_the_type_of_their_setting(arg, key, value):
    got = settings(arg)[key]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize('arg, says', [
    ('--sed=1', 'unknown setting sed on the command line: did you mean seed?'),
    ('--learning-rate=1', 'did you mean learning_rate?'),
    ('--lr=3', 'did you mean learning_rate?'),
    ('--xyzzy=1', 'see --help'),
    ('--seed=1.5', 'takes int'),
    ('--seed=x', 'takes int'),
    ('--bias=2', 'takes bool'),
    ('--bias', '--bias=value'),
    ('-seed=1', '--key=value'),
    ('seed=1', '--seed=value'),
    ('my.txt', 'name.py'),
    ('no.py', 'no config file'),
    ('--_private=2', 'unknown'),
    ('--path=x', 'unknown'),
])
def test_a_mistake_on_the_command_line_is_named(arg, says):
    with pytest.raises(UserError) as error:
        settings(arg)
    assert says in str(error.value)


# ---- Config files --------------------------------------------------------------------------------
def test_files_apply_in_order_and_read_the_settings_so_far(write):
    first = write('seed = 2\nlearning_rate = 2')
    second = write('learning_rate = learning_rate * 2', name='second.py')
    got = settings(first, second)
    assert got['seed'] == 2
    assert got['learning_rate'] == 4.0
    assert type(got['learning_rate']) is float


def test_the_command_line_has_the_last_word_wherever_it_stands(write):
    config = write('seed = 2')
    assert settings('--seed=7', config)['seed'] == 7
    assert settings(config, '--seed=7')['seed'] == 7


def test_the_globals_of_the_script_become_what_is_returned(write):
    namespace = SETTINGS | OTHERS | {'__builtins__': {}}
    got = configure(namespace, [write('seed = 2\nbias = False'), '--seed=7'])
    assert namespace == OTHERS | got | {'__builtins__': {}}
    assert namespace['seed'] == 7
    assert namespace['bias'] is False


def test_a_config_file_may_branch_on_what_was_asked_for(write):
    config = write("if device == 'cpu':\n    seed = 5")
    assert settings(config, '--device=cpu')['seed'] == 5
    assert settings(config)['seed'] == 1


def test_helpers_of_a_config_file_stay_its_own(write):
    config = write('import time\nfrom math import pi as _pi\ndef f(): pass\n_n = 2\n'
                   'EPOCHS = 1\nseed = _n + EPOCHS')
    assert settings(config) == SETTINGS | {'seed': 3}


@pytest.mark.parametrize('text, says', [
    ('sed = 1', 'unknown setting sed in .*config.py: did you mean seed'),
    ('Seed = 1', 'unknown setting Seed in .*config.py: did you mean seed'),
    ('SEED = 1', 'unknown setting SEED'),
    ('seed = 1.0', 'takes int'),
    ('bias = 1', 'takes bool'),
    ('seed = True', 'takes int'),
    ('start = None', 'takes str'),
    ('seed = 1\nx y', r'config.py: SyntaxError: invalid syntax \(config.py, line 2\)'),
    ('seed = 1\0', 'config.py: SyntaxError: .*null bytes'),
    ('seed = 1 / 0', 'config.py, line 1: ZeroDivisionError'),
])
def test_a_mistake_in_a_config_file_is_named(write, text, says):
    with pytest.raises(UserError, match=says):
        settings(write(text))


def test_a_mark_that_windows_puts_in_front_is_passed_over(write):
    path = write('')
    pathlib.Path(path).write_bytes(b'\xef\xbb\xbfseed = 4\r\n')
    assert settings(path)['seed'] == 4


@pytest.mark.parametrize('content', ['seed = 4'.encode('utf-16'), 'note = "é"'.encode('latin-1')])
def test_a_file_in_another_encoding_is_named(write, content):
    path = write('')
    pathlib.Path(path).write_bytes(content)
    with pytest.raises(UserError, match='config.py cannot be read as UTF-8 text'):
        settings(path)


def test_a_bug_in_code_that_a_file_imports_keeps_its_traceback(write, tmp_path):
    write('def broken():\n    return 1 / 0\n', name='helper_with_a_bug.py')
    with pytest.raises(ZeroDivisionError):
        settings(write('from helper_with_a_bug import broken\nseed = broken()'))


def test_settings_of_another_script_are_an_error_if_strict(write):
    config = write('seed = 2\nn_layer = 6')
    with pytest.raises(UserError, match='unknown setting n_layer'):
        configure(dict(SETTINGS), [config])
    namespace = dict(SETTINGS)
    assert configure(namespace, [config], strict=False) == SETTINGS | {'seed': 2}
    assert 'n_layer' not in namespace
    with pytest.raises(UserError, match='unknown setting n_layer on the command line'):
        configure(dict(SETTINGS), ['--n_layer=6'], strict=False)


# ---- The model -----------------------------------------------------------------------------------
@dataclasses.dataclass
class GPTConfig:
    vocab_size: int = 50257
    n_layer: int = 12
    bias: bool = False


MODEL = '''
import dataclasses


@dataclasses.dataclass
class GPTConfig:
    vocab_size: int = 50257
    n_layer: int = 3
    n_kv_head: int = 2
    n_experts: int | None = None


class GPT:
    pass
'''


def test_fields_of_the_model_are_settings():
    namespace = SETTINGS | {'GPTConfig': GPTConfig}
    assert configure(namespace, []) == SETTINGS | {'n_layer': 12}
    assert configure(namespace, ['--n_layer=2'])['n_layer'] == 2
    assert namespace['n_layer'] == 2


def test_a_file_brings_another_model_and_its_fields(write):
    write(MODEL, name='a_model_of_mine.py')
    config = write('from a_model_of_mine import GPT, GPTConfig\nn_kv_head = 1')
    namespace = SETTINGS | {'GPT': None, 'GPTConfig': GPTConfig}
    got = configure(namespace, [config])
    assert got == SETTINGS | {'n_layer': 3, 'n_kv_head': 1, 'n_experts': None}
    assert namespace['GPT'].__module__ == 'a_model_of_mine'
    assert configure(dict(namespace), [config, '--n_kv_head=4'])['n_kv_head'] == 4
    assert configure(dict(namespace), [config, '--n_experts=8'])['n_experts'] == 8
    with pytest.raises(UserError, match='n_kv_head = .many. on the command line: it takes int'):
        configure(dict(namespace), [config, '--n_kv_head=many'])


def test_an_edited_default_of_a_copied_model_counts(write):
    write(MODEL, name='a_model_of_mine.py')
    config = write('from a_model_of_mine import GPT, GPTConfig')
    # Like train.py, which has settings of its own for the fields of its model.
    namespace = SETTINGS | {'n_layer': 12, 'bias': True, 'GPTConfig': GPTConfig}
    got = configure(dict(namespace), [config])
    assert got['n_layer'] == 3
    assert got['bias'] is True
    assert configure(dict(namespace), [config, '--n_layer=4'])['n_layer'] == 4
    # A field that is new to the model is what it always was: the setting of that name.
    namespace['n_kv_head'] = 5
    assert configure(namespace, [config])['n_kv_head'] == 5


# ---- Help ----------------------------------------------------------------------------------------
def test_help_prints_each_setting_with_its_comment(tmp_path):
    out, _ = run('train.py', '--help', cwd=tmp_path)
    assert out.startswith('Train a model')
    lines = [line.split(maxsplit=1) for line in out.splitlines() if line.startswith('  --')]
    assert ['--batch_size=12', 'sequences in a micro-step'] in lines
    assert all(len(line) == 2 for line in lines), lines
