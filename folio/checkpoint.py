"""
Save and load checkpoints, ours and nanoGPT's, and say which code a model was trained with.
    python -c "from folio import checkpoint; print(checkpoint.load('out/book')['model_args'])"

A checkpoint is a dictionary of tensors and plain values: reading one runs no code.
"""
import contextlib
import hashlib
import inspect
import os
import pickle
import shutil
import subprocess
import sys
import time
import zipfile

import torch
import torch.nn.functional as F

import folio.tokenizer
from folio.configurator import UserError, folder_of, notice
from folio.data import Dataset
from folio.tokenizer import spec_hash

FORMAT = 1  # of our checkpoints; nanoGPT's have none
# Fields that the weights do not decide
FREE = ('dropout', 'flash', 'window', 'block_size', 'activation_checkpointing')


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
    """Return the dictionary in a .pt file, nanoGPT's upgraded to our format. Raises UserError.

    Only tensors and plain values are unpickled: no file runs code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not compare checksums
        if damaged is not None:
            raise ValueError(f'the checksum of {damaged} is wrong')
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f'no checkpoint {path}; train one first, or name its folder with '
                        '--out_dir=…') from None
    except pickle.UnpicklingError as e:
        _, _, reason = str(e).partition('WeightsUnpickler error: ')
        raise UserError(f'{path} is refused: it is not a checkpoint, or holds more than tensors '
                        f'and plain values ({reason.partition(". ")[0]})') from e
    except Exception as e:  # a damaged file may raise anything
        raise UserError(f'{path} is damaged or cut short, or not a checkpoint '
                        f'({type(e).__name__}: {e}); use another copy of it') from e
    if not isinstance(checkpoint, dict) or not {'model', 'model_args'} <= checkpoint.keys():
        raise UserError(f'{path} is not a checkpoint of folio or nanoGPT: it lacks model or '
                        'model_args')
    return checkpoint if 'format' in checkpoint else upgrade_nanogpt(checkpoint)


def upgrade_nanogpt(checkpoint):
    """Return a checkpoint of nanoGPT in folio's format.

    nanoGPT trains with the exact GELU. Its older versions saved the attention mask too, and
    torch.compile and DDP put a prefix before each name.
    """
    args = {'arch': 'gpt2', 'gelu': 'none'} | checkpoint['model_args']
    n_rows = args['vocab_size']
    if n_rows == 50304:
        args['vocab_size'] = 50257  # GPT-2's vocabulary, which nanoGPT pads in the settings

    weights = {}
    for name, weight in checkpoint['model'].items():
        name = name.removeprefix('_orig_mod.').removeprefix('module.')
        if not name.endswith('.attn.bias'):  # the mask, not a bias: that would be c_attn.bias
            weights[name] = weight

    optimizer = dict(checkpoint.get('optimizer') or {})
    if optimizer:
        # model.py pads the vocabulary to a multiple of 64 rows; pad the optimizer's averages too.
        missing = -n_rows % 64
        embedding = optimizer['state'].get(0, {})  # its first parameter is wte
        for name in ('exp_avg', 'exp_avg_sq'):
            if name in embedding:
                embedding[name] = F.pad(embedding[name], (0, 0, 0, missing))
    optimizers = [optimizer] if optimizer else []
    return checkpoint | {'model': weights, 'model_args': args, 'optimizer': optimizers}


def build(model_class, checkpoint, settings=None):
    """Return the model in a checkpoint, of the class that a script hands over. Raises UserError.

    settings: fields of the model's configuration, to continue training with. Only what the weights
    do not decide is taken from them: dropout, a window, a shorter context, a field that the
    checkpoint lacks. Prints a notice if the model was trained with other code.
    """
    free = {}
    for name, value in (settings or {}).items():
        if name in FREE or name not in checkpoint['model_args']:
            free[name] = value
    if is_of_other_code(checkpoint, model_class):
        notice(trained_with_other_code(checkpoint, model_class))
    try:
        return model_class.from_pretrained(checkpoint, **free)
    except ValueError as e:
        raise UserError(f'{checkpoint["source"]} does not fit: {e}') from None


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


def hash_of_code(model_class):
    """Return a hash of the file that defines a model."""
    with open(inspect.getsourcefile(model_class), encoding='utf-8') as f:
        return hashlib.sha256(f.read().encode()).hexdigest()[:16]


def refuse_other_code(checkpoint, model_class):
    """Raise UserError if the model in a checkpoint was trained with code other than a class's.

    For comparing runs: otherwise one model would be measured with the code of another.
    """
    if is_of_other_code(checkpoint, model_class):
        raise UserError(f'not measured: {trained_with_other_code(checkpoint, model_class)}')


def is_of_other_code(checkpoint, model_class):
    """Return whether the model in a checkpoint was trained with code other than a class's.

    nanoGPT's checkpoints and transformers' folders do not say.
    """
    trained_with = checkpoint.get('record', {}).get('model')
    return trained_with not in (None, hash_of_code(model_class))


def trained_with_other_code(checkpoint, model_class):
    """Return a line: the model was trained with other code, where its copy is, what to do."""
    source = checkpoint['source']
    folder = os.path.dirname(source) or '.'
    return (f'{source} was trained with code other than {inspect.getsourcefile(model_class)}. That '
            f'code is in {folder} (model.py or model_until_….py): copy it to old_model.py, and '
            'give a config file with the line: from old_model import GPT, GPTConfig')


# ---- Does it fit this run? -----------------------------------------------------------------------
def require_same_tokenizer(checkpoint, data):
    """Raise UserError if the weights were trained with a vocabulary other than a Dataset's."""
    spec = checkpoint.get('tokenizer', data.spec)  # without a tokenizer only the sizes are compared
    vocab_size = checkpoint['model_args']['vocab_size']
    if vocab_size != data.vocab_size or spec_hash(spec) != spec_hash(data.spec):
        raise UserError(f'{data.folder} has a different vocabulary ({data.spec["kind"]}, '
                        f'{data.vocab_size} tokens) from {checkpoint["source"]} ({spec["kind"]}, '
                        f'{vocab_size}): the model can only be trained with its own')


def require_same_run(checkpoint, model_args, data, seed):
    """Raise UserError unless a run can continue unchanged with these settings and data."""
    path = checkpoint['source']
    for name in ('iter_num', 'best_val_loss', 'optimizer'):
        if name not in checkpoint:
            raise UserError(f'{path} holds weights but no {name}, so no run can be resumed: start '
                            f'one with --init_from={path} and another --out_dir')
    saved = checkpoint['model_args'] | checkpoint.get('config', {})
    # The checkpoint's gelu is kept: nanoGPT's is exact, our default is not.
    may_change = ('dropout', 'flash', 'activation_checkpointing', 'gelu')
    different = []
    for name, value in (model_args | {'seed': seed}).items():
        if name not in may_change and saved.get(name, value) != value:
            different.append(f'{name} is {saved[name]}, not {value}')
    if different:
        raise UserError(f'{path} is from a run with different settings ({"; ".join(different)}): '
                        'give those, or another --out_dir')
    for split, fingerprint in checkpoint.get('fingerprints', {}).items():
        if fingerprint != data.fingerprint(split):
            raise UserError(f'{data.folder}/{split}.bin is not the file of the run in {path}: '
                            'bring that file back, or start a run on this one with '
                            f'--init_from={path} and another --out_dir')


def tokenizer_of(checkpoint):
    """Return the tokenizer in a checkpoint, or else in the data set that it was trained on.

    nanoGPT's checkpoints have no tokenizer. If the data set is not here either, GPT-2's is used,
    with a notice. Raises UserError if the tokenizer does not fit the model.
    """
    source = checkpoint['source']
    trained_on = checkpoint.get('config', {}).get('dataset', '')
    spec = checkpoint.get('tokenizer')
    is_here = os.path.exists(os.path.join(folder_of(trained_on), 'train.bin'))
    if spec is None and is_here:
        spec = Dataset(trained_on).spec
    vocab_size = checkpoint['model_args']['vocab_size']
    if spec is None:
        if vocab_size != 50257:
            raise UserError(f'{source} has no tokenizer, and its {vocab_size} tokens are not '
                            "GPT-2's 50257: run this where its data set is")
        notice(f"{source} has no tokenizer: its tokens are taken for GPT-2's")
        spec = {'kind': 'gpt2'}
    tokenizer = folio.tokenizer.load(spec)
    if tokenizer.n_vocab != vocab_size:
        raise UserError(f'{source} is a model of {vocab_size} tokens, but its tokenizer '
                        f'({tokenizer.spec["kind"]}) has {tokenizer.n_vocab}')
    return tokenizer


def encode_prompt(checkpoint, tokenizer, text):
    """Return the ids of a prompt, at least one: what comes before a text, and the text."""
    ids = beginning_of(checkpoint, tokenizer) + tokenizer.encode(text)
    return ids or [tokenizer.start]


def beginning_of(checkpoint, tokenizer):
    """Return the ids that come before a prompt: the end-of-text token, or none.

    folio begins each document with that token, if its tokenizer has one. A Hugging Face folder says
    which ids come before a text. OpenAI's and nanoGPT's models continue a prompt as it is.
    """
    if 'begin' in checkpoint:
        return checkpoint['begin']
    is_run = 'tokenizer' in checkpoint and 'config' in checkpoint
    if is_run and tokenizer.eot is not None:
        return [tokenizer.eot]
    return []


# ---- Saving --------------------------------------------------------------------------------------
def save(path, checkpoint):
    """Write a dictionary of tensors and plain values to a file, whole or not at all.

    It is synced, then renamed. Raises UserError if that fails.
    """
    with replacing(path) as temporary:
        with open(temporary, 'wb') as f:
            torch.save(checkpoint | {'format': FORMAT}, f)
            f.flush()
            os.fsync(f.fileno())


def save_again(saved, path):
    """Give a checkpoint that has been saved another name, whole or not at all.

    It is a link to the same file, or a copy where the file system has no links. Raises UserError if
    that fails.
    """
    with replacing(path) as temporary:
        try:
            os.link(saved, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(saved, temporary)


@contextlib.contextmanager
def replacing(path):
    """Yield the name path.tmp, to be written to; rename it to path at the end."""
    temporary = path + '.tmp'
    try:
        # A killed run may have left path.tmp as a link to another checkpoint, and writing into it
        # would destroy that one.
        if os.path.lexists(temporary):
            os.remove(temporary)
        yield temporary
        rename(temporary, path)
    except BaseException as e:
        if os.path.exists(temporary):
            os.remove(temporary)
        reason = e.__context__ if isinstance(e, RuntimeError) else e  # torch wraps a failed write
        if not isinstance(reason, OSError):
            raise
        raise UserError(f'could not write {path}: {reason.strerror}; what was there before is '
                        'intact. Make room, then continue with --init_from=auto') from e


def rename(path, other):
    """Rename a file, over another one if need be.

    Windows refuses that while another program reads the other file: sample.py, say, or a virus
    scanner. Try for some seconds.
    """
    for _ in range(20):
        try:
            return os.replace(path, other)
        except PermissionError:
            time.sleep(0.25)
    os.replace(path, other)
