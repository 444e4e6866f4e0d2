"""
Settings of a script: its bare globals, then config files (plain Python, which see those globals), then --key=value.
    python train.py config/train_book.py --batch_size=8
"""
import difflib
import sys


class UserError(Exception):
    """A user's mistake, in one line: what is wrong and what to type instead. It ends a script with status 2."""


def configure(namespace, argv=None):
    """Change a script's settings, its globals of type bool, int, float and str, in place; returns {setting: value}.

    namespace: globals(). argv: sys.argv[1:] if None. Raises UserError for what is no setting or of the wrong type.
    """
    sys.excepthook = report
    argv = sys.argv[1:] if argv is None else argv
    defaults = {k: v for k, v in namespace.items() if k[0].islower() and type(v) in (bool, int, float, str)}
    if '--help' in argv or '-h' in argv:
        sys.exit(print_help(namespace, defaults))
    settings, overrides = dict(defaults), {}
    files = [a for a in argv if a.endswith('.py') and not a.startswith('-')]
    for arg in (a for a in argv if a not in files):
        key, equals, text = arg.removeprefix('--').partition('=')
        if not arg.startswith('--') or not equals:
            raise UserError(f'{arg}: a setting is written --key=value (--help lists them), a config file name.py')
        overrides[key] = checked(key, parse(text, defaults.get(key, '')), defaults, 'on the command line')
    for path in files:  # it sees the overrides, to branch on what was asked for
        names = dict(before := namespace | settings | overrides)
        try:
            with open(path, encoding='utf-8') as f:
                exec(compile(f.read(), path, 'exec'), names)
        except OSError as e:
            raise UserError(f'no config file {path} ({e.strerror}); to list them: ls config') from None
        except Exception as e:  # it runs the user's code, so anything may come
            line = e.lineno if isinstance(e, SyntaxError) else e.__traceback__.tb_next.tb_lineno
            raise UserError(f'{path}, line {line}: {type(e).__name__}: {e}') from e
        for key in (k for k in names if not k.startswith('_') and names[k] is not before.get(k, names)):
            if key in defaults or not (callable(names[key]) or isinstance(names[key], type(sys))):
                settings[key] = checked(key, names[key], defaults, f'in {path}')
    namespace.update(settings | overrides)
    return settings | overrides


def checked(key, value, defaults, where):
    """The value, if of its setting's type; an int is promoted to float, and 'auto' may become True or False too."""
    if key not in defaults:
        near = difflib.get_close_matches(key.replace('-', '_'), defaults, n=1, cutoff=0.5)
        raise UserError(f'unknown setting {key} {where}: ' + (f'did you mean {near[0]}?' if near else 'see --help'))
    wanted, given = type(defaults[key]), type(value)
    if given is not wanted and (wanted, given) != (float, int) and (defaults[key], given) != ('auto', bool):
        raise UserError(f'{key} = {value!r} {where}: it takes {wanted.__name__}, for example {defaults[key]!r}')
    return float(value) if wanted is float else value


def parse(text, default):
    """Text of the command line as the type of a default; as it is where that fails. parse('5', 1) is 5."""
    if type(default) is bool or default == 'auto':
        return {'true': True, 'false': False}.get(text.lower(), text)
    try:
        return text if type(default) is str else type(default)(text)
    except ValueError:
        return text


def print_help(namespace, defaults):
    with open(namespace['__file__'], encoding='utf-8') as f:
        comments = {s.split(' = ')[0]: s.partition('  # ')[2].strip() for s in reversed(f.readlines()) if ' = ' in s}
    lines = [f'  --{key}={value}  '.ljust(40) + comments.get(key, '') for key, value in defaults.items()]
    print(namespace['__doc__'].strip(), '', *lines, sep='\n')


def report(kind, error, traceback):
    """sys.excepthook: one line and status 2 for a user's mistake or a full disk; for a bug of ours, the traceback."""
    if not issubclass(kind, (UserError, OSError, KeyboardInterrupt)):
        return sys.__excepthook__(kind, error, traceback)
    print('interrupted' if kind is KeyboardInterrupt else f'error: {error}', file=sys.stderr)
    sys.exit(130 if kind is KeyboardInterrupt else 2)
