"""
Save and load checkpoints, ours and nanoGPT's, and keep the folder of a run.
    python -c "from folio import checkpoint; print(checkpoint.load('out/book')['model_args'])"

A checkpoint is a dictionary of tensors and plain values: reading one runs no code.
"""
import contextlib
import hashlib
import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile

import torch
import torch.nn.functional as F

import folio.tokenizer
from folio.configurator import UserError, notice
from folio.data import Dataset
from folio.tokenizer import spec_hash

FORMAT = 1  # of our checkpoints; nanoGPT's have none
FILES_OF_A_RUN = ('ckpt.pt', 'best.pt', 'log.jsonl')


# ---- Loading -------------------------------------------------------------------------------------
def load(source, out_dir=None):
    """Return the dictionary of a checkpoint, its tensors on the CPU: {model, model_args, …}.

    source: a .pt of folio or nanoGPT, the folder of a run (its newest checkpoint), a Hugging Face
    folder, one of OpenAI's names (gpt2 …), or 'resume' for the run in out_dir. Raises UserError if
    there is no checkpoint, or if it is damaged or not what it claims to be.
    """
    if source == 'resume':
        source = os.path.join(out_dir, 'ckpt.pt')
    elif os.path.exists(os.path.join(source, 'ckpt.pt')):
        source = os.path.join(source, 'ckpt.pt')
    if source.endswith('.pt'):
        checkpoint = load_file(source)
    else:
        from folio.hugging_face import load_hugging_face
        checkpoint = load_hugging_face(source)
    return checkpoint | {'source': source}


def load_file(path):
    """Return the dictionary in a .pt file, one of nanoGPT's upgraded to ours. Raises UserError.

    Only tensors and plain values are unpickled: no file runs code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not compare checksums
        if damaged is not None:
            raise ValueError(f'the checksum of {damaged} is wrong')
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UserError(f'no checkpoint {path}; train one first, or name its folder with '
                        '--out_dir=…') from None
    except pickle.UnpicklingError as e:
        raise UserError(f'{path} is refused: it is not a checkpoint, or holds more than tensors '
                        'and plain values') from e
    except Exception as e:  # a damaged file may raise anything
        raise UserError(f'{path} is damaged or cut short, or not a checkpoint '
                        f'({type(e).__name__}: {e}); use another copy of it') from e
    if not isinstance(checkpoint, dict) or not {'model', 'model_args'} <= checkpoint.keys():
        raise UserError(f'{path} is not a checkpoint of folio or nanoGPT: it lacks model or '
                        'model_args')
    return checkpoint if 'format' in checkpoint else upgrade_nanogpt(checkpoint)


def upgrade_nanogpt(checkpoint):
    """Return a checkpoint of nanoGPT in folio's format.

    nanoGPT trains with the exact GELU. Its older versions saved the attention mask too, and a
    compiled model puts a prefix before each name.
    """
    args = {'arch': 'gpt2', 'gelu': 'none'} | checkpoint['model_args']
    n_rows = args['vocab_size']
    if n_rows == 50304:
        args['vocab_size'] = 50257  # GPT-2's vocabulary, which nanoGPT pads in the settings

    weights = {}
    for name, weight in checkpoint['model'].items():
        name = name.removeprefix('_orig_mod.')
        if not name.endswith('.attn.bias'):  # the mask, not a bias: that would be c_attn.bias
            weights[name] = weight

    optimizer = dict(checkpoint.get('optimizer') or {})
    if optimizer:
        # model.py pads the vocabulary to a multiple of 64 rows, and its averages with it.
        missing = -n_rows % 64
        embedding = optimizer['state'].get(0, {})  # its first parameter is wte
        for name in ('exp_avg', 'exp_avg_sq'):
            if name in embedding:
                embedding[name] = F.pad(embedding[name], (0, 0, 0, missing))
    optimizers = [optimizer] if optimizer else []
    return checkpoint | {'model': weights, 'model_args': args, 'optimizer': optimizers}


def build(model_class, checkpoint, **overrides):
    """Return the model in a checkpoint, of the class that a script hands over. Raises UserError.

    Says so if it was trained with other code. overrides: those of model_class.from_pretrained.
    """
    if is_of_other_code(checkpoint, model_class):
        notice(f'{checkpoint["source"]} was trained with other code than '
               f'{inspect.getsourcefile(model_class)}; a copy of it is {copy_of_code(checkpoint)}')
    try:
        return model_class.from_pretrained(checkpoint, **overrides)
    except ValueError as e:
        raise UserError(f'{checkpoint["source"]} does not fit the model code: {e}') from None


# ---- Which code ran ------------------------------------------------------------------------------
def record_of(model_class):
    """Return what tells later which code ran: {commit, dirty, argv, model}.

    commit and dirty are git's, of the checkout that the model is in; model is a hash of the file
    that defines it.
    """
    folder = os.path.dirname(os.path.abspath(inspect.getsourcefile(model_class)))
    commit = git('rev-parse', 'HEAD', folder=folder)
    dirty = git('status', '--porcelain', folder=folder) != ''
    return {'commit': commit, 'dirty': dirty, 'argv': sys.argv, 'model': hash_of_code(model_class)}


def git(*arguments, folder):
    """Return what git prints in a folder; '' where there is no git or no repository."""
    try:
        done = subprocess.run(['git', *arguments], cwd=folder, capture_output=True, text=True)
    except OSError:
        return ''
    return done.stdout.strip()


def code_of(model_class):
    """Return the text of the file that defines a model."""
    with open(inspect.getsourcefile(model_class), encoding='utf-8') as f:
        return f.read()


def hash_of_code(model_class):
    return hashlib.sha256(code_of(model_class).encode()).hexdigest()[:16]


def refuse_other_code(checkpoint, model_class):
    """Raise UserError if the model in a checkpoint was trained with other code than a class has.

    For what compares runs: one of two models would be measured as the other.
    """
    if is_of_other_code(checkpoint, model_class):
        raise UserError(f'{checkpoint["source"]} was trained with other code than '
                        f'{inspect.getsourcefile(model_class)}, and is not compared; a copy of it '
                        f'is {copy_of_code(checkpoint)}')


def is_of_other_code(checkpoint, model_class):
    """Return whether the model in a checkpoint was trained with other code than that of a class.

    nanoGPT's checkpoints and transformers' folders do not say.
    """
    trained_with = checkpoint.get('record', {}).get('model')
    return trained_with not in (None, hash_of_code(model_class))


def copy_of_code(checkpoint):
    """Return where train.py has written the code with which a model was trained."""
    return os.path.join(os.path.dirname(checkpoint['source']), 'model.py')


# ---- Does it fit this run? -----------------------------------------------------------------------
def require_same_shape(checkpoint, model_args, path):
    """Raise UserError unless the model in a checkpoint has the shape that the settings ask for."""
    saved = checkpoint['model_args'] | checkpoint.get('config', {})
    different = []
    for name, value in model_args.items():
        # Dropout and flash may change when a run is resumed; gelu is taken from the checkpoint.
        if name not in ('dropout', 'flash', 'gelu') and saved.get(name, value) != value:
            different.append(f'{name} is {saved[name]}, not {value}')
    if different:
        raise UserError(f'{path} has another shape ({"; ".join(different)}): give its settings, or '
                        'another --out_dir')


def require_same_data(checkpoint, data, seed, path):
    """Raise UserError if a run would go on with other data, or in another order, than before."""
    fingerprint = checkpoint.get('data')
    if fingerprint is not None and fingerprint != data.fingerprint('train'):
        raise UserError(f'{data.folder}/train.bin is not the one that {path} was trained on: bring '
                        'that one back, or start a run on this one with '
                        f'--init_from={path} and another --out_dir')
    old_seed = checkpoint.get('config', {}).get('seed', seed)
    if old_seed != seed:
        raise UserError(f'{path} was trained with --seed={old_seed}, which gives its data an '
                        'order: resume it with that')


def require_same_tokenizer(checkpoint, source, data):
    """Raise UserError if the weights were trained with another vocabulary than a Dataset has."""
    spec = checkpoint.get('tokenizer', data.spec)  # without a tokenizer only the sizes are compared
    vocab_size = checkpoint['model_args']['vocab_size']
    if vocab_size != data.vocab_size or spec_hash(spec) != spec_hash(data.spec):
        raise UserError(f'{data.folder} has another vocabulary ({data.spec["kind"]}, '
                        f'{data.vocab_size} tokens) than {source} ({spec["kind"]}, {vocab_size}): '
                        'it can only go on with its own')


def require_elsewhere(init_from, out_dir):
    """Raise UserError if init_from lies in out_dir, whose run train.py is about to move aside."""
    folder = os.path.realpath(out_dir)
    path = os.path.realpath(init_from)
    if os.path.exists(init_from) and folder in (path, os.path.dirname(path)):
        raise UserError(f'{init_from} lies in out_dir, whose run would be moved aside: give '
                        'another --out_dir, or --init_from=resume')


def require_training_state(checkpoint, path):
    """Raise UserError unless a checkpoint holds what it takes to resume a run."""
    for name in ('iter_num', 'best_val_loss', 'optimizer'):
        if name not in checkpoint:
            raise UserError(f'{path} holds weights but no {name}, so no run can be resumed from '
                            f'it; start one with --init_from={path} and another --out_dir')


def tokenizer_of(checkpoint):
    """Return the tokenizer that a checkpoint carries, or else that of the data it was trained on.

    nanoGPT's checkpoints carry none. Where that data is not here either, it is GPT-2's. Raises
    UserError if it does not fit the model.
    """
    trained_on = checkpoint.get('config', {}).get('dataset', '')
    spec = checkpoint.get('tokenizer')
    is_here = os.path.exists(os.path.join('data', trained_on, 'train.bin'))
    if spec is None and is_here:
        spec = Dataset(trained_on).spec
    tokenizer = folio.tokenizer.load(spec or {'kind': 'gpt2'})
    vocab_size = checkpoint['model_args']['vocab_size']
    if tokenizer.n_vocab != vocab_size:
        raise UserError(f'a model of {vocab_size} tokens cannot be read with a tokenizer '
                        f'({tokenizer.spec["kind"]}) of {tokenizer.n_vocab}')
    return tokenizer


# ---- Saving --------------------------------------------------------------------------------------
def save(path, checkpoint):
    """Write a dictionary of tensors and plain values to path, whole or not at all.

    It is written to path.tmp, synced, then renamed. Raises UserError if that fails.
    """
    with replacing(path) as temporary, open(temporary, 'wb') as f:
        torch.save(checkpoint | {'format': FORMAT}, f)
        f.flush()
        os.fsync(f.fileno())


def save_again(saved, path):
    """Give a checkpoint that was saved under one name a second name, path, whole or not at all.

    The second name is a hard link, or a copy where the file system has no links. Raises UserError.
    """
    with replacing(path) as temporary:
        try:
            os.link(saved, temporary)
        except OSError:
            with open(saved, 'rb') as source, open(temporary, 'wb') as f:
                shutil.copyfileobj(source, f, 2**24)
                f.flush()
                os.fsync(f.fileno())


@contextlib.contextmanager
def replacing(path):
    """Yield the name path.tmp, to be written to; rename it to path at the end.

    Raises UserError, and leaves path as it was, if the system cannot write it.
    """
    temporary = path + '.tmp'
    try:
        # A killed run may have left path.tmp as a hard link to another checkpoint, which would be
        # destroyed by writing into it.
        if os.path.lexists(temporary):
            os.remove(temporary)
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        if os.path.exists(temporary):
            os.remove(temporary)
        reason = e if isinstance(e, OSError) else e.__context__  # torch wraps a failed write
        if not isinstance(reason, OSError):
            raise
        raise UserError(f'could not write {path}: {reason.strerror}; what was there before is '
                        'intact. Make room, then go on with --init_from=resume') from e


# ---- The folder of a run -------------------------------------------------------------------------
def holds_a_run(out_dir):
    """Return whether a folder has a file that a run has written."""
    return any(os.path.exists(os.path.join(out_dir, name)) for name in FILES_OF_A_RUN)


def set_aside(out_dir):
    """Move the run in a folder into a subfolder previous-1, or the next number that is free.

    Return the folder it is in now, or None if there was no run.
    """
    if not holds_a_run(out_dir):
        return None
    number = 1
    while os.path.exists(os.path.join(out_dir, f'previous-{number}')):
        number += 1
    previous = os.path.join(out_dir, f'previous-{number}')
    os.makedirs(previous)
    for name in (*FILES_OF_A_RUN, 'model.py'):
        if os.path.exists(os.path.join(out_dir, name)):
            os.replace(os.path.join(out_dir, name), os.path.join(previous, name))
    return previous


def read_log(path, damaged=None):
    """Return the entries of a log.jsonl; the last is left out if it was cut short.

    damaged: a list, to which the numbers of other damaged lines are added. None: raise UserError
    for such a line.
    """
    entries = []
    if not os.path.exists(path):
        return entries
    with open(path, encoding='utf-8', errors='replace') as f:
        for number, line in enumerate(f, 1):
            try:
                entries.append(dict(json.loads(line)))
            except (ValueError, TypeError, RecursionError):
                if not line.endswith('\n'):
                    continue  # the last line, cut short by a kill
                if damaged is None:
                    raise UserError(f'{path}, line {number} is damaged; remove that line') from None
                damaged.append(number)
    return entries


def steps_done(entry):
    """Return the number of steps finished when a log line was written; -1 for a header.

    A step's own loss is logged after the step. What else has an iter, such as an evaluation, is
    logged before the step of that number.
    """
    if 'iter' not in entry:
        return -1
    return entry['iter'] + 1 if 'loss' in entry else entry['iter']


def truncate_log(path, iter_num, is_validated):
    """Drop what a killed run logged after its checkpoint at iter_num: it will be logged again.

    is_validated: whether the checkpoint was saved after the evaluation at iter_num. Raises
    UserError for a damaged line.
    """
    if not os.path.exists(path):
        return
    entries = []
    for entry in read_log(path):
        is_evaluation = entry.get('iter') == iter_num and 'val_loss' in entry
        comes_again = is_evaluation and not is_validated
        if steps_done(entry) <= iter_num and not comes_again:
            entries.append(entry)
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(entry) + '\n' for entry in entries)
    os.replace(path + '.tmp', path)
