"""
Save and load checkpoints, ours and nanoGPT's, and keep the folder of a run.
    python -c "from folio import checkpoint; print(checkpoint.load('out/book')['model_args'])"

A checkpoint is a dictionary of tensors and plain values. Reading one never runs what it brings.
"""
import contextlib
import dataclasses
import json
import os
import pathlib
import pickle
import re
import shutil
import zipfile

import torch
import torch.nn.functional as F

import folio.tokenizer
from folio.configurator import UserError
from folio.data import Dataset, check_pickle
from folio.tokenizer import spec_hash, vocab_size_of
from model import GPT, GPTConfig, padded

FORMAT = 1  # of our checkpoints; nanoGPT's have none
FILES_OF_A_RUN = ('ckpt.pt', 'best.pt', 'log.jsonl')


# ---- Loading -------------------------------------------------------------------------------------
def load(source, out_dir=None, mmap=False):
    """Return the dictionary of a checkpoint, on the CPU: {model, model_args, …}.

    source: a .pt of ours or of nanoGPT, the folder of a run (its newest checkpoint), a Hugging Face
    folder, one of OpenAI's names (gpt2 …), or 'resume' for the run in out_dir. mmap: leave a .pt's
    tensors in the file until they are read: several processes then share one copy in the system's
    memory. Raises UserError.
    """
    if source == 'resume':
        source = os.path.join(out_dir, 'ckpt.pt')
    elif os.path.exists(os.path.join(source, 'ckpt.pt')):
        source = os.path.join(source, 'ckpt.pt')
    if source.endswith('.pt'):
        checkpoint = load_file(source, mmap)
    else:
        from folio.hugging_face import load_hugging_face
        checkpoint = load_hugging_face(source)
    try:
        check_parts(checkpoint)
        check_weights(checkpoint, source)
    except UserError:
        raise
    except Exception as e:  # what comes from elsewhere may be anything
        raise UserError(f'{source} describes a model that cannot be: {e}') from e
    return checkpoint


def load_file(path, mmap=False):
    """Return the dictionary in a .pt file. Only tensors and plain values are unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = os.path.getsize(path)
            check_archive(archive, size)
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
        if not isinstance(checkpoint, dict) or not {'model', 'model_args'} <= checkpoint.keys():
            raise UserError(f'{path} is not a checkpoint of folio or nanoGPT: it lacks model or '
                            'model_args')
        # A few bytes may stand for a matrix of any size; but a tied head is stored once.
        if sum(weight.numel() for weight in checkpoint['model'].values()) > 2 * size:
            raise ValueError('its weights are larger than the file')
        if 'format' not in checkpoint:
            checkpoint = upgrade_nanogpt(checkpoint)
    except FileNotFoundError:
        raise UserError(f'no checkpoint {path}; train one first, or name its folder with '
                        '--out_dir=…') from None
    except pickle.UnpicklingError as e:
        raise UserError(f'{path} is refused: it is not a checkpoint, or holds more than tensors '
                        'and plain values') from e
    except UserError:
        raise
    except Exception as e:  # a damaged file may raise anything
        raise UserError(f'{path} is damaged or cut short, or not a checkpoint '
                        f'({type(e).__name__}: {e}); use another copy of it') from e
    return checkpoint


# What torch's pickles have besides plain values: tensors, and the tuples that they are made from.
TENSOR_OPCODES = ('GLOBAL', 'BINPERSID', 'REDUCE', 'BUILD', 'EMPTY_TUPLE', 'TUPLE', 'TUPLE1',
                  'TUPLE2', 'TUPLE3')
GLOBALS = re.compile(r'collections OrderedDict|torch \w+Storage|'
                     r'torch._utils _rebuild_(tensor_v2|parameter)')
MAX_TUPLES = 50_000  # a hundred layers have 20,000; hashing 200,000 nested ones is a crash


def check_archive(archive, size):
    """Raise ValueError unless the records of a .pt file, a zip of `size` bytes, can be read safely.

    torch.load checks no sums: a flipped bit would become a weight. And it unpacks and builds
    whatever the file asks for, however large.
    """
    records = archive.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError('it is compressed')
    if sum(record.file_size for record in records) > size:
        raise ValueError('its records overlap')
    damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f'the sum of {damaged} is wrong')
    for record in records:
        if not record.filename.endswith('data.pkl'):
            continue
        found = check_pickle(archive.read(record), more=TENSOR_OPCODES)
        for name in found['GLOBAL']:
            if not GLOBALS.fullmatch(name):
                raise pickle.UnpicklingError(f'it asks for {name}')
        if sum(len(found[opcode]) for opcode in TENSOR_OPCODES if 'TUPLE' in opcode) > MAX_TUPLES:
            raise ValueError('it has too many tuples')


def upgrade_nanogpt(checkpoint):
    """Return a checkpoint of nanoGPT as one of ours.

    It trained with the exact GELU. Older versions kept mask buffers, and a compiled model has a
    prefix before each name. Our matrices are padded to a multiple of 64 rows.
    """
    args = {'gelu': 'none'} | checkpoint['model_args']
    n_rows = args['vocab_size']
    if type(n_rows) is not int:  # to compare a tensor may take a gigabyte
        raise TypeError(f'its vocab_size is of type {type(n_rows).__name__}')
    if n_rows == 50304:
        args['vocab_size'] = 50257  # GPT-2's vocabulary, which nanoGPT pads in the settings
    missing_rows = padded(args['vocab_size']) - n_rows

    weights = {}
    for name, weight in checkpoint['model'].items():
        name = name.removeprefix('_orig_mod.')
        if not name.endswith('.attn.bias'):
            weights[name] = weight
    for name in ('transformer.wte.weight', 'lm_head.weight'):
        if name in weights:
            weights[name] = pad_rows(weights[name], missing_rows)

    optimizer = dict(checkpoint.get('optimizer') or {})
    if optimizer:
        embedding = optimizer['state'].get(0, {})  # its first parameter is wte
        for name in ('exp_avg', 'exp_avg_sq'):
            if name in embedding:
                embedding[name] = pad_rows(embedding[name], missing_rows)
    optimizers = [optimizer] if optimizer else []
    return checkpoint | {'model': weights, 'model_args': args, 'optimizer': optimizers}


def pad_rows(weight, n_rows):
    """Return a matrix with so many rows of zeros more."""
    if not weight.is_contiguous():  # it may claim to be larger than what is stored of it
        raise ValueError('a matrix is not stored row by row')
    return F.pad(weight, (0, 0, 0, n_rows))


# What these parts of a checkpoint are, if it has them
TYPES = {
    'model': dict, 'model_args': dict, 'optimizer': list, 'scaler': dict, 'config': dict,
    'tokenizer': (dict, type(None)), 'template': (str, type(None)), 'data': str,
    'iter_num': int, 'windows': int, 'evals_without_gain': int, 'norms': list,
    'best_val_loss': (int, float, torch.Tensor), 'train_seconds': (int, float),
}
MAX_CONTEXT = 2**20  # tokens; a rotary model's weights do not tell how long its context is


def check_parts(checkpoint):
    """Raise an error unless the parts of a checkpoint are of their types."""
    for name, types in TYPES.items():
        if name in checkpoint and not isinstance(checkpoint[name], types):
            raise TypeError(f'its {name} is of type {type(checkpoint[name]).__name__}')
    for name in ('vocab_size', 'block_size', 'n_layer', 'n_head', 'n_embd'):
        if name not in checkpoint['model_args']:
            raise ValueError(f'its settings lack {name}')
    for name, value in checkpoint['model_args'].items():
        default = getattr(GPTConfig, str(name), value)
        types = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, types):
            raise TypeError(f'its {name} is of type {type(value).__name__}')
    config = checkpoint.get('config', {})
    if not isinstance(config.get('dataset', ''), str) or not isinstance(config.get('seed', 0), int):
        raise TypeError('its dataset or its seed is of another type')
    float(checkpoint.get('best_val_loss', 0))  # an error if it is several numbers
    if checkpoint.get('tokenizer') is not None:
        vocab_size_of(checkpoint['tokenizer'])
        spec_hash(checkpoint['tokenizer'])


def check_weights(checkpoint, source):
    """Raise UserError unless the weights are those of the model that model_args describe."""
    args = checkpoint['model_args']
    unknown = sorted(args.keys() - GPTConfig.__dataclass_fields__.keys())
    if unknown:
        raise UserError(f'{source} was made with settings that folio does not have: '
                        f'{", ".join(unknown)}')
    config = GPTConfig(**args)
    if config.block_size > MAX_CONTEXT:
        raise ValueError(f'block_size is {config.block_size}, and at most {MAX_CONTEXT} here')
    with torch.device('meta'):  # names and shapes, without memory
        expected = GPT(dataclasses.replace(config, n_layer=1)).state_dict()
    weights = checkpoint['model']
    # All layers are like the first. More of them than there are weights need not be listed.
    of_a_layer = [name for name in expected if name.startswith('transformer.h.0.')]
    for layer in range(1, min(config.n_layer, len(weights))):
        for name in of_a_layer:
            expected[name.replace('.0.', f'.{layer}.', 1)] = expected[name]
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights:
            raise UserError(f'{source} lacks the weight {name}')
        if name not in expected:
            raise UserError(f'{source} has a weight that folio does not have: {name}')
        if not weights[name].is_floating_point():
            raise UserError(f'{source}: {name} is of {weights[name].dtype}')
        if weights[name].shape != expected[name].shape:
            raise UserError(f'{source}: {name} has the shape {tuple(weights[name].shape)}, where '
                            f'its settings ask for {tuple(expected[name].shape)}')


# ---- Does it fit this run? -----------------------------------------------------------------------
def require_same_shape(checkpoint, model_args, path):
    """Raise UserError unless the model in a checkpoint has the shape that the settings ask for."""
    saved = checkpoint['model_args'] | checkpoint.get('config', {})
    different = []
    for name, value in model_args.items():
        # Dropout and flash may change from run to run; gelu stays as the weights have it.
        if name not in ('dropout', 'flash', 'gelu') and saved.get(name, value) != value:
            different.append(f'{name} is {saved[name]}, not {value}')
    if different:
        raise UserError(f'{path} has another shape ({"; ".join(different)}): give its settings, or '
                        'another --out_dir')


def require_same_data(checkpoint, data, seed, path):
    """Raise UserError if a run would go on in other data, or in another order, than it began in."""
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
    spec = checkpoint.get('tokenizer', data.spec)  # where nothing is known, the sizes must do
    vocab_size = checkpoint['model_args']['vocab_size']
    if vocab_size != data.vocab_size or spec_hash(spec) != spec_hash(data.spec):
        raise UserError(f'{data.folder} has another vocabulary ({data.spec["kind"]}, '
                        f'{data.vocab_size} tokens) than {source} ({spec["kind"]}, {vocab_size}): '
                        'it can only go on with its own')


def require_elsewhere(init_from, out_dir):
    """Raise UserError if weights to begin with lie where the run that they are of is moved away."""
    folder = os.path.realpath(out_dir)
    path = os.path.realpath(init_from)
    if os.path.exists(init_from) and folder in (path, os.path.dirname(path)):
        raise UserError(f'{init_from} lies in out_dir, whose run would be moved aside: give '
                        'another --out_dir, or --init_from=resume')


def require_training_state(checkpoint, path):
    """Raise UserError unless a checkpoint holds what a run goes on from."""
    for name in ('iter_num', 'best_val_loss', 'optimizer'):
        if name not in checkpoint:
            raise UserError(f'{path} holds weights but no {name}, so no run can be resumed from '
                            f'it; start one with --init_from={path} and another --out_dir')


def tokenizer_of(checkpoint):
    """Return the tokenizer that a checkpoint carries, or else the one of the data it names.

    nanoGPT's checkpoints carry none, and those that name no data set here have GPT-2's. Raises
    UserError where it does not fit the model.
    """
    trained_on = checkpoint.get('config', {}).get('dataset', '')
    spec = checkpoint.get('tokenizer')
    is_here = os.path.exists(os.path.join('data', trained_on, 'train.bin'))
    # Only of a folder under data/, whatever else a file may name
    is_inside = not os.path.isabs(trained_on) and '..' not in pathlib.PurePath(trained_on).parts
    if spec is None and is_here and is_inside:
        spec = Dataset(trained_on).spec
    tokenizer = folio.tokenizer.load(spec or {'kind': 'gpt2'})
    vocab_size = checkpoint['model_args']['vocab_size']
    if tokenizer.n_vocab != vocab_size:
        raise UserError(f'a model of {vocab_size} tokens cannot be read with a tokenizer '
                        f'({tokenizer.spec["kind"]}) of {tokenizer.n_vocab}')
    return tokenizer


# ---- Saving --------------------------------------------------------------------------------------
def save(path, checkpoint):
    """Write a dictionary of tensors and plain values so that path is always whole.

    It goes to path.tmp first, is synced, then renamed. Raises UserError where that fails.
    """
    with replacing(path) as temporary, open(temporary, 'wb') as f:
        torch.save(checkpoint | {'format': FORMAT}, f)
        f.flush()
        os.fsync(f.fileno())


def save_again(saved, path):
    """Give what was saved under one name a second one, path, which is always whole.

    It is a link to the same file, and a copy where the file system has no links.
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
    """Yield path.tmp, which takes the place of path once it has been written.

    Raises UserError, and leaves path as it was, where the system cannot write it.
    """
    temporary = path + '.tmp'
    try:
        # A run that was killed may have left it here, as a second name of another checkpoint: to
        # write into it would destroy that one.
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
    """Move the run in a folder to its previous-1, or the next number that is free.

    Return the folder it is in now, or None if there was no run.
    """
    if not holds_a_run(out_dir):
        return None
    number = 1
    while os.path.exists(os.path.join(out_dir, f'previous-{number}')):
        number += 1
    previous = os.path.join(out_dir, f'previous-{number}')
    os.makedirs(previous)
    for name in FILES_OF_A_RUN:
        if os.path.exists(os.path.join(out_dir, name)):
            os.replace(os.path.join(out_dir, name), os.path.join(previous, name))
    return previous


def read_log(path, damaged=None):
    """Return the entries of a log.jsonl; the last is left out if it was cut short.

    damaged: a list that takes the numbers of damaged lines before that; None: they raise UserError.
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


def is_of_launch(out_dir, launch):
    """Return whether the run in a folder was begun by this start of torchrun, and can be resumed.

    launch: what Machine.launch returns. Each start and each resume writes it to the log.
    """
    starts = []
    for entry in read_log(os.path.join(out_dir, 'log.jsonl'), damaged=[]):
        if 'config' in entry:
            starts.append(entry)
    if not starts or not os.path.exists(os.path.join(out_dir, 'ckpt.pt')):
        return False
    return starts[-1]['machine'].get('launch', '') == launch


def steps_done(entry):
    """Return the steps finished when a log line was written; -1 for a header.

    A training loss, or that a step was skipped, is logged after it; everything else before one.
    """
    if 'iter' not in entry:
        return -1
    is_of_step = 'loss' in entry or 'skipped' in entry
    return entry['iter'] + 1 if is_of_step else entry['iter']


def truncate_log(path, iter_num, is_validated):
    """Drop what a killed run logged after its checkpoint at iter_num, to be logged again.

    is_validated: whether the checkpoint was saved after the evaluation at iter_num.
    """
    if not os.path.exists(path):
        return
    entries = []
    for entry in read_log(path):
        is_again = entry.get('iter') == iter_num and 'val_loss' in entry and not is_validated
        if steps_done(entry) <= iter_num and not is_again:
            entries.append(entry)
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(entry) + '\n' for entry in entries)
    os.replace(path + '.tmp', path)
