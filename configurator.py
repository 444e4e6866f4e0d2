"""
Settings of a script: its bare globals, then config files (plain Python, which see those globals), then --key=value.
    python train.py config/train_book.py --batch_size=8
"""
import difflib
import os
import sys
import types


class UserError(Exception):
    """A user's mistake, in one line: what is wrong and what to type instead. It ends a script with status 2."""


def configure(namespace, argv=None):
    """Change a script's settings, its globals of type bool, int, float and str, in place; returns {setting: value}.

    namespace: globals(). argv: sys.argv[1:] if None. Raises UserError for what is no setting or of the wrong type.
    """
    sys.excepthook = report
    argv = sys.argv[1:] if argv is None else argv
    settings = {k: v for k, v in namespace.items() if not k.startswith('_') and type(v) in (bool, int, float, str)}
    defaults, overrides = dict(settings), {}
    if {'--help', '-h'} & set(argv):
        sys.exit(print_help(namespace, defaults))
    for arg in (a for a in argv if a.startswith('-')):
        key, equals, text = arg.removeprefix('--').partition('=')
        if not arg.startswith('--') or not equals:
            raise UserError(f'{arg}: write a setting as --{key.strip("-") or "seed"}=value; --help lists them')
        overrides[key] = checked(key, parse(text, defaults.get(key, '')), defaults, 'on the command line')
    for path in (a for a in argv if not a.startswith('-')):  # overrides first: a file may branch on what was asked for
        settings |= run_config_file(path, namespace | settings | overrides, defaults)
    settings |= overrides
    namespace.update(settings)
    return settings


def run_config_file(path, before, defaults):
    """Execute a file in a copy of the script's names and return its settings. Its _names and imports stay its own."""
    names = dict(before)
    try:
        with open(path, encoding='utf-8') as f:
            exec(compile(f.read(), path, 'exec'), names)
    except OSError as e:
        raise UserError(f'no config file {path} ({e.strerror}); config files are listed by: ls config') from None
    except Exception as e:
        line = e.lineno if isinstance(e, SyntaxError) else e.__traceback__.tb_next.tb_lineno
        raise UserError(f'{path}, line {line}: {type(e).__name__}: {e}') from e
    changed = [k for k in names if not k.startswith('_') and names[k] is not before.get(k, names)]
    imported = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    changed = [k for k in changed if k in defaults or not isinstance(names[k], imported)]
    return {k: checked(k, names[k], defaults, f'in {path}') for k in changed}


def checked(key, value, defaults, where):
    """The value, if it is of its setting's type; an int is promoted to float. 'auto' may become True or False too."""
    if key not in defaults:
        near = difflib.get_close_matches(key.replace('-', '_'), defaults, n=1, cutoff=0.5)
        raise UserError(f'unknown setting {key} {where}: ' + (f'did you mean {near[0]}?' if near else 'see --help'))
    default = defaults[key]
    if type(default) is float and type(value) is int:
        return float(value)
    if type(value) is not type(default) and not (default == 'auto' and type(value) is bool):
        raise UserError(f'{key} = {value!r} {where}: it takes a value of type {type(default).__name__}, '
                        f'for example {default!r}')
    return value


def parse(text, default):
    """Text of the command line as the type of a default. parse('5', 1) is 5, parse('5', 'a') is '5'."""
    if type(default) is bool or default == 'auto':
        return {'true': True, 'false': False}.get(text.lower(), text)
    try:
        return text if type(default) is str else type(default)(text)
    except ValueError:
        return text  # of the wrong type, as checked() will say


def print_help(namespace, defaults):
    print(namespace['__doc__'].strip() + '\n\nSettings:')
    with open(namespace['__file__'], encoding='utf-8') as f:
        comments = {line.split(' = ')[0]: line.partition('  # ')[2].strip() for line in f if ' = ' in line}
    for key, value in defaults.items():
        print(f'  --{key}={value}'.ljust(44), comments.get(key, ''))


def report(kind, error, traceback):
    """sys.excepthook: a user's mistake in one line and status 2; Ctrl-C, status 130; for a bug of ours, the traceback."""
    if issubclass(kind, (UserError, KeyboardInterrupt)):
        print(f'error: {error}' if kind is UserError else 'interrupted', file=sys.stderr)
        sys.exit(2 if kind is UserError else 130)
    sys.__excepthook__(kind, error, traceback)
