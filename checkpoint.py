"""
Checkpoints, ours and nanoGPT's, read without running what they bring; and the folder of a run.
    python -c "from checkpoint import *; print(load_checkpoint('out/book/ckpt.pt')['model_args'])"
"""
import json
import math
import os
import pickle
import shutil

import torch
import torch.nn.functional as F

from configurator import UserError

FORMAT = 1  # of our checkpoints; nanoGPT's have none


def padded(vocab_size):
    """Rows of the matrices for a vocabulary: a multiple of 64, which matrix kernels like. padded(50257) is 50304."""
    return math.ceil(vocab_size / 64) * 64


def save_checkpoint(path, checkpoint):
    """Write a dictionary of tensors and plain values to path.tmp, synced, then renamed, so path is always whole."""
    try:
        with open(path + '.tmp', 'wb') as f:
            torch.save(checkpoint | {'format': FORMAT}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + '.tmp', path)
    except (OSError, RuntimeError) as e:  # torch wraps a failed write in a RuntimeError
        if os.path.exists(path + '.tmp'):
            os.remove(path + '.tmp')
        why = e if isinstance(e, OSError) else e.__context__
        if not isinstance(why, OSError):
            raise
        raise UserError(f'could not write {path}: {why.strerror}; what was there before is intact. Make room, '
                        'then go on with --init_from=resume') from e


def load_checkpoint(path):
    """The dictionary in a ckpt.pt of ours or of nanoGPT, on the CPU. Only tensors and plain values are unpickled."""
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UserError(f'no checkpoint {path}; train one first, or name its folder with --out_dir=…') from None
    except pickle.UnpicklingError as e:
        raise UserError(f'{path} is refused: it is no checkpoint, or holds more than tensors and plain values') from e
    except (RuntimeError, EOFError, OSError, ValueError) as e:
        raise UserError(f'{path} is damaged or cut short ({type(e).__name__}); use another copy of it') from e
    if not isinstance(checkpoint, dict) or not {'model', 'model_args'} <= checkpoint.keys():
        raise UserError(f'{path} is not a checkpoint of folio or nanoGPT: it lacks model or model_args')
    return checkpoint if 'format' in checkpoint else upgrade_nanogpt(checkpoint)


def upgrade_nanogpt(checkpoint):
    """A nanoGPT checkpoint as one of ours: exact GELU, no mask buffers or torch.compile prefix, vocabulary padded."""
    args = {'gelu': 'none'} | checkpoint['model_args']
    rows = args['vocab_size']
    args['vocab_size'] = 50257 if args['vocab_size'] == 50304 else args['vocab_size']  # GPT-2's, padded by hand

    def pad(tensors, names):
        for name in names & tensors.keys():
            if tensors[name].ndim == 2:
                tensors[name] = F.pad(tensors[name], (0, 0, 0, padded(args['vocab_size']) - rows))

    weights = {k.removeprefix('_orig_mod.'): v for k, v in checkpoint['model'].items()}
    weights = {k: v for k, v in weights.items() if not k.endswith('.attn.bias')}
    optimizer = checkpoint.get('optimizer', {'state': {}})
    pad(weights, {'transformer.wte.weight', 'lm_head.weight'})
    pad(optimizer['state'].get(0, {}), {'exp_avg', 'exp_avg_sq'})  # its first parameter is wte
    return checkpoint | {'model': weights, 'model_args': args, 'optimizer': [optimizer]}


# ---- The folder of a run ---------------------------------------------------------------------------------------------
def set_aside(out_dir):
    """Move the run that is in a folder into its previous/, in place of what was there; whether there was one."""
    if not os.path.exists(os.path.join(out_dir, 'ckpt.pt')):
        return False
    previous = os.path.join(out_dir, 'previous')
    shutil.rmtree(previous, ignore_errors=True)
    os.makedirs(previous)
    for name in ('ckpt.pt', 'best.pt', 'log.jsonl'):
        if os.path.exists(os.path.join(out_dir, name)):
            os.replace(os.path.join(out_dir, name), os.path.join(previous, name))
    return True


def read_log(path, damaged=None):
    """The entries of a log.jsonl, but the last if it was cut short.

    Of a damaged line before that the number goes into the list `damaged`, or is told in a UserError.
    """
    entries = []
    if os.path.exists(path):
        with open(path, encoding='utf-8', errors='replace') as f:
            for i, line in enumerate(f, 1):
                try:
                    entries.append(dict(json.loads(line)))
                except (ValueError, TypeError):
                    if line.endswith('\n') and damaged is None:
                        raise UserError(f'{path}, line {i} is damaged; remove that line') from None
                    if line.endswith('\n'):
                        damaged.append(i)
    return entries


def forget_log_after(path, iter_num):
    """Drop what a killed run logged after its last checkpoint, at iter_num; the resumed run will log it again."""
    entries = [e for e in read_log(path) if e.get('iter', -1) + ('loss' in e) <= iter_num]
    if os.path.exists(path):
        with open(path + '.tmp', 'w', encoding='utf-8') as f:
            f.writelines(json.dumps(e) + '\n' for e in entries)
        os.replace(path + '.tmp', path)
