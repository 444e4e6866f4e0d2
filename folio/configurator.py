"""
Change the settings of a script, which are its global variables, from files and the command line.
    python train.py config/train_book.py --batch_size=8

A script assigns its settings at the top and then calls configure(globals()). Config files are plain
Python and run in the script's namespace, so that they can read the settings and branch on them;
then --key=value has the last word. There is no parser to keep in step with the settings, and a
setting is used by its bare name.
"""
import contextlib
import dataclasses
import difflib
import hashlib
import os
import sys


class UserError(Exception):
    """A user's mistake, in one line: what is wrong, and what to type instead.

    It ends a script with that line and status 2.
    """


@contextlib.contextmanager
def user_errors():
    """Turn a ValueError of model.py, which knows no scripts, into a UserError."""
    try:
        yield
    except ValueError as e:
        raise UserError(str(e)) from None


def configure(namespace, argv=None):
    """Change a script's settings in place and return them as {setting: value}.

    Settings are the globals of type bool, int, float and str whose names are in lower case.
    namespace: globals(). argv: sys.argv[1:] if None. Raises UserError for a setting that is unknown
    or of another type.
    """
    sys.excepthook = report
    for stream in (sys.stdout, sys.stderr):
        # A letter that the terminal does not have is written as \u4e00, and ends no run.
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
    argv = sys.argv[1:] if argv is None else argv
    settings = {}
    for key, value in namespace.items():
        if key[0].islower() and type(value) in (bool, int, float, str):
            settings[key] = value
    if '--help' in argv or '-h' in argv:
        print_help(namespace, settings)
        sys.exit()

    defaults = dict(settings)
    files = []
    overrides = {}
    for arg in argv:
        if arg.endswith('.py') and not arg.startswith('-'):
            files.append(arg)
            continue
        key, equals, text = arg.removeprefix('--').partition('=')
        if not arg.startswith('--') or not equals:
            form = f'--{key}=value' if key in defaults else '--key=value'
            raise UserError(f'{arg}: a setting is written {form} (--help lists them), '
                            'a config file name.py')
        value = parse(text, defaults.get(key, ''))
        overrides[key] = checked(key, value, defaults, 'on the command line')
    for path in files:
        # A file sees the command line's values, to branch on what was asked for.
        before = namespace | settings | overrides
        for key, value in run_file(path, before).items():
            is_helper = callable(value) or isinstance(value, type(sys))  # a function, a module
            if key in defaults or not is_helper:
                settings[key] = checked(key, value, defaults, f'in {path}')
    settings |= overrides
    namespace.update(settings)
    return settings


def run_file(path, before):
    """Run a config file on a copy of the names `before`; return {name: value} of what it set."""
    names = dict(before)
    try:
        with open(path, encoding='utf-8') as f:
            exec(compile(f.read(), path, 'exec'), names)
    except OSError as e:
        raise UserError(f'no config file {path} ({e.strerror}); to list them: ls config') from None
    except Exception as e:  # it is the user's code, so anything may come
        line = e.lineno if isinstance(e, SyntaxError) else e.__traceback__.tb_next.tb_lineno
        raise UserError(f'{path}, line {line}: {type(e).__name__}: {e}') from e
    assigned = {}
    for name, value in names.items():
        is_new = name not in before or value is not before[name]
        if is_new and not name.startswith('_'):
            assigned[name] = value
    return assigned


def checked(key, value, defaults, where):
    """Return a value for a setting if it has its type. Raises UserError.

    An int is promoted to float; a setting that is 'auto' may become True or False too.
    """
    if key not in defaults:
        similar = difflib.get_close_matches(key.replace('-', '_'), defaults, n=1, cutoff=0.5)
        hint = f'did you mean {similar[0]}?' if similar else 'see --help'
        raise UserError(f'unknown setting {key} {where}: {hint}')
    default = defaults[key]
    if type(value) in (int, float) and not -2**63 <= value < 2**63:  # a NaN is in no range
        raise UserError(f'{key} = {value} {where}: it takes a finite number below 2**63, '
                        f'for example {default!r}')
    if type(default) is float and type(value) is int:
        return float(value)
    may_be_bool = default == 'auto' and type(value) is bool
    if type(value) is not type(default) and not may_be_bool:
        raise UserError(f'{key} = {value!r} {where}: it takes {type(default).__name__}, '
                        f'for example {default!r}')
    return value


def parse(text, default):
    """Return text of the command line as the type of a default; as it is where that fails.

    >>> parse('5', 1), parse('5', ''), parse('five', 1), parse('false', True)
    (5, '5', 'five', False)
    """
    if type(default) is bool or default == 'auto':
        return {'true': True, 'false': False}.get(text.lower(), text)
    try:
        return type(default)(text)
    except ValueError:
        return text


def require_at_least(minimum, config, *names):
    """Raise UserError unless each of these settings is at least `minimum`."""
    for name in names:
        if not config[name] >= minimum:
            raise UserError(f'{name} is {config[name]}; it must be at least {minimum}')


def require_choice(config, name, choices):
    """Raise UserError unless a setting is one of the choices."""
    if config[name] not in choices:
        listed = ', '.join(str(choice) for choice in choices)
        raise UserError(f'{name} is {config[name]!r}; choose from {listed}')


def model_settings(config, model_config):
    """Return {field: setting} for the fields of a model's configuration, but vocab_size.

    That is decided by the data. Raises UserError for a field without a setting of its name: it
    would keep its default whatever the user asks for.
    """
    names = [field.name for field in dataclasses.fields(model_config) if field.name != 'vocab_size']
    for name in names:
        if name not in config:
            raise UserError(f'{model_config.__name__} has a field {name}, and the script no '
                            'setting of that name: add one')
    return {name: config[name] for name in names}


def print_help(namespace, settings):
    """Print the script's docstring, then each setting with its value and its comment."""
    comments = {}
    with open(namespace['__file__'], encoding='utf-8') as f:
        for line in f:
            name, equals, rest = line.partition(' = ')
            if equals and name in settings and name not in comments:
                comments[name] = rest.partition('  # ')[2].strip()
    print(namespace['__doc__'].strip() + '\n')
    for key, value in settings.items():
        print(f'  --{key}={value}  '.ljust(40) + comments.get(key, ''))


def report(kind, error, traceback):
    """Print a user's mistake or a full disk as one line, status 2; of a bug of ours all there is.

    So is a device whose memory is too small.

    This is sys.excepthook once a script has called configure.
    """
    if issubclass(kind, KeyboardInterrupt):
        print('interrupted', file=sys.stderr)
        sys.exit(130)
    if kind.__name__ == 'OutOfMemoryError':  # of torch, which this file can do without
        reason = '. '.join(str(error).split('. ')[:2])  # of many sentences
        error = UserError(f'{reason}: halve --batch_size and double --gradient_accumulation_steps, '
                          'which leaves a step as it is, or give --activation_checkpointing=True')
        kind = UserError
    if issubclass(kind, (UserError, OSError)):
        line = 'error: ' + ' '.join(str(error).splitlines())
        if is_first_to_say(line):
            print(line, file=sys.stderr, flush=True)
        sys.exit(2)
    sys.__excepthook__(kind, error, traceback)


def is_first_to_say(line):
    """Return whether no other process of this torchrun has said the same line.

    torchrun gives each process a file for its errors, …/attempt_0/<local rank>/error.json: those of
    one node and one attempt share a folder, in which the first to fail leaves a mark.
    """
    error_file = os.environ.get('TORCHELASTIC_ERROR_FILE', '')
    folder = os.path.dirname(os.path.dirname(error_file))
    mark = os.path.join(folder, f'said-{hashlib.sha256(line.encode()).hexdigest()[:16]}')
    try:
        if folder:
            open(mark, 'x').close()
    except FileExistsError:
        return False
    except OSError:
        pass  # better twice than not at all
    return True
