"""
Change the settings of a script, which are its global variables, from files and the command line.
    python train.py config/train_book.py --batch_size=8

A script assigns its settings at the top and then calls configure(globals()). Config files are plain
Python and run in the script's namespace: they can read the settings, branch on them, and bring
another model with `from my_model import GPT, GPTConfig`. Then --key=value has the last word. There
is no parser to keep in step with the settings, and a setting is used by its bare name.
"""
import ast
import contextlib
import dataclasses
import difflib
import hashlib
import os
import sys
import traceback


class UserError(Exception):
    """A user's mistake, in one line: what is wrong, and what to type instead.

    It ends a script with that line and status 2.
    """


@contextlib.contextmanager
def user_errors():
    """Turn a ValueError of model.py, which does without folio, into a UserError."""
    try:
        yield
    except ValueError as e:
        raise UserError(str(e)) from None


def configure(namespace, argv=None, strict=True):
    """Change a script's settings in place and return them as {setting: value}.

    Settings are the globals of type bool, int, float and str whose names are in lower case. If the
    script imports a GPTConfig, its fields are settings too, with its defaults; a config file may
    import another GPTConfig. namespace: globals(). argv: sys.argv[1:] if None. strict: False
    ignores settings in a config file that the script lacks, for scripts that read train.py's files.
    Raises UserError for a setting that is unknown or of another type.
    """
    sys.excepthook = report
    for stream in (sys.stdout, sys.stderr):
        # A letter that the terminal lacks is written as \u4e00, instead of ending the run.
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
    argv = sys.argv[1:] if argv is None else argv
    defaults = {}
    for key, value in namespace.items():
        if key[0].islower() and is_plain(value):
            defaults[key] = value
    files, texts = split_arguments([arg for arg in argv if arg not in ('--help', '-h')], defaults)
    takes_a_model = 'GPTConfig' in namespace
    fields_before = model_defaults(namespace['GPTConfig']) if takes_a_model else {}

    # 1. Run the files. They see the command line's values, to branch on what was asked for.
    for key in texts.keys() & defaults.keys():
        namespace[key] = from_command_line(key, texts[key], defaults)
    in_files = {}  # {name: (value, path of the last file that set it)}
    for path in files:
        for name, value in run_file(path, namespace).items():
            in_files[name] = (value, path)

    # 2. Now that a file may have brought another model, its fields are settings too.
    if takes_a_model:
        for name, default in model_defaults(namespace['GPTConfig']).items():
            # A default that was edited in a copied model counts, also where the script has another.
            if name not in defaults or default != fields_before.get(name, default):
                defaults[name] = default
    # 3. What the files say, and then what the command line says, which wins.
    settings = dict(defaults)
    for name, (value, path) in in_files.items():
        if name in defaults or strict:
            settings[name] = checked(name, value, defaults, f'in {path}')
        else:
            del namespace[name]  # another script's setting
    for key, text in texts.items():
        settings[key] = from_command_line(key, text, defaults)
    namespace.update(settings)
    if '--help' in argv or '-h' in argv:
        print_help(namespace, settings)
        sys.exit()
    return settings


def is_plain(value):
    return type(value) in (bool, int, float, str)


def split_arguments(argv, known):
    """Return (paths of config files, {key: text of its value}) of a command line."""
    files = []
    texts = {}
    for arg in argv:
        if arg.endswith('.py') and not arg.startswith('-'):
            files.append(arg)
            continue
        key, equals, text = arg.removeprefix('--').partition('=')
        if not arg.startswith('--') or not equals:
            form = f'--{key}=value' if key in known else '--key=value'
            raise UserError(f'{arg}: a setting is written {form} (--help lists them), '
                            'a config file name.py')
        texts[key] = text
    return files, texts


def run_file(path, namespace):
    """Run a config file in a script's namespace; return {name: value} of the settings in it.

    Whatever else it imports or defines, for example a model, stays in the namespace.
    """
    try:
        with open(path, encoding='utf-8-sig') as f:  # Windows may add a byte order mark
            source = f.read()
    except OSError as e:
        raise UserError(f'no config file {path} ({e.strerror}); to list them: ls config') from None
    except UnicodeDecodeError as e:
        raise UserError(f'{path} cannot be read as UTF-8 text: {e}') from None
    sys.path.insert(0, os.path.dirname(path) or '.')  # a model may lie next to the file
    before = dict(namespace)
    try:
        exec(compile(source, path, 'exec'), namespace)
    except SyntaxError as e:
        raise UserError(f'{path}: SyntaxError: {e}') from None  # it names file and line
    except Exception as e:
        where = traceback.extract_tb(e.__traceback__)[-1]
        if where.filename != path:
            raise  # in code that the file calls: the traceback leads there
        raise UserError(f'{path}, line {where.lineno}: {type(e).__name__}: {e}') from e
    assigned = {}
    for name, value in namespace.items():
        is_new = name not in before or value is not before[name]
        is_helper = callable(value) or isinstance(value, type(sys))  # a function, a class, a module
        is_constant = name.isupper() and name.lower() not in before  # EPOCHS, but not SEED
        if is_new and not is_helper and not is_constant and not name.startswith('_'):
            assigned[name] = value
    return assigned


def model_defaults(model_config):
    """Return {field: default} of a model's configuration, except vocab_size, which the data has."""
    defaults = {}
    for field in dataclasses.fields(model_config):
        if field.name != 'vocab_size' and (field.default is None or is_plain(field.default)):
            defaults[field.name] = field.default
    return defaults


def model_settings(config, model_config):
    """Return {field: setting} for the fields of a model's configuration, except vocab_size."""
    return {name: config[name] for name in model_defaults(model_config)}


def from_command_line(key, text, defaults):
    """Return the value that a text stands for, if it has the type of its setting."""
    return checked(key, parse(text, defaults.get(key, '')), defaults, 'on the command line')


def checked(key, value, defaults, where):
    """Return a value for a setting if the type is right. Raises UserError.

    An int is promoted to float; a setting whose default is 'auto' may be True or False too; ~/ at
    the beginning of a text is the user's home.
    """
    if key not in defaults:
        # --lr means learning_rate, whatever else is spelled like it
        similar = [name for name in defaults if key == ''.join(w[:1] for w in name.split('_'))]
        similar += difflib.get_close_matches(key.replace('-', '_'), defaults, n=1, cutoff=0.5)
        hint = f'did you mean {similar[0]}?' if similar else 'see --help'
        raise UserError(f'unknown setting {key} {where}: {hint}')
    default = defaults[key]
    if default is None:  # of a model's field, n_kv_head: int | None = None
        return value
    if type(default) is float and type(value) is int:
        return float(value)
    may_be_bool = default == 'auto' and type(value) is bool
    if type(value) is not type(default) and not may_be_bool:
        raise UserError(f'{key} = {value!r} {where}: it takes {type(default).__name__}, '
                        f'for example {default!r}')
    if type(value) is str and value.startswith('~/'):
        return os.path.expanduser(value)  # a shell leaves --out_dir=~/book as it is
    return value


def parse(text, default):
    """Convert a text to the type of a default; return it unchanged where that fails.

    >>> parse('5', 1), parse('5', ''), parse('five', 1), parse('false', True)
    (5, '5', 'five', False)
    >>> parse('5', None), parse('false', None), parse('five', None)
    (5, False, 'five')
    """
    if type(default) is bool or default == 'auto':
        return {'true': True, 'false': False}.get(text.lower(), text)
    if default is None:
        literal = text
        if text.isalpha():  # false and none, as well as False and None
            literal = text.capitalize()
        with contextlib.suppress(ValueError, SyntaxError):
            return ast.literal_eval(literal)
        return text
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


def folder_of(dataset):
    """Return the folder of a data set: data/book for book, and for data/book too."""
    return os.path.join('data', dataset.removeprefix('data/'))


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
        comment = comments.get(key, 'a field of GPTConfig')
        print(f'  --{key}={value}  '.ljust(40) + comment)


def report(kind, error, trace):
    """Print a UserError or an OSError as one line and exit with 2; print a bug with its traceback.

    A device that runs out of memory gets one line too. This is sys.excepthook once a script has
    called configure.
    """
    if issubclass(kind, KeyboardInterrupt):
        print('interrupted', file=sys.stderr)
        sys.exit(130)
    if kind.__name__ == 'OutOfMemoryError':  # torch's; this file does not import torch
        reason = '. '.join(str(error).split('. ')[:2])  # the first two of many sentences
        error = UserError(f'{reason}: train.py takes less with half the --batch_size and twice the '
                          '--gradient_accumulation_steps, which leaves a step as it is, or with '
                          '--activation_checkpointing=True')
        kind = UserError
    if issubclass(kind, OSError):  # the system's words, and where: it may be a bug after all
        frames = traceback.extract_tb(trace)
        where = [frame for frame in frames if 'site-packages' not in frame.filename][-1]
        error = UserError(f'{error} ({where.filename}, line {where.lineno})')
        kind = UserError
    if kind is UserError:
        say_once('error: ' + ' '.join(str(error).splitlines()))
        sys.exit(2)
    sys.__excepthook__(kind, error, trace)


def notice(text):
    """Print a line about something that a user should know, on standard error."""
    say_once(f'notice: {text}')


def say_once(line):
    """Print a line on standard error, unless another process of this torchrun has said it.

    torchrun gives each process a file for its errors, …/attempt_0/<local rank>/error.json. The
    processes of one node and one attempt share a folder, where the first to speak leaves a mark.
    """
    error_file = os.environ.get('TORCHELASTIC_ERROR_FILE', '')
    folder = os.path.dirname(os.path.dirname(error_file))
    mark = os.path.join(folder, f'said-{hashlib.sha256(line.encode()).hexdigest()[:16]}')
    try:
        if folder:
            open(mark, 'x').close()
    except FileExistsError:
        return
    except OSError:
        pass  # better twice than not at all
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:  # nobody listens any more, and flushing at the end would fail too
        sys.stderr = open(os.devnull, 'w')
