"""
Weights on disk: our checkpoints, nanoGPT's, and Hugging Face folders of GPT-2, read without running what they bring.
    python -c "from checkpoint import *; print(load_checkpoint('out/book/ckpt.pt')['model_args'])"
"""
import glob
import json
import math
import os
import pickle

import torch
import torch.nn.functional as F

from configurator import UserError

FORMAT = 1  # of our checkpoints; nanoGPT's have none
OPENAI = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')


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


def load_hugging_face(source):
    """(fields of GPTConfig, state dict) of one of OpenAI's four models, downloaded once, or of a GPT-2 in a folder."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    folder = download_openai(source) if source in OPENAI else source
    try:
        with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
            hf = json.load(f)
    except (OSError, ValueError) as e:
        raise UserError(f'{folder} is no Hugging Face folder: config.json could not be read ({e})') from None
    files = sorted(glob.glob(os.path.join(glob.escape(folder), '*.safetensors')))
    if hf.get('model_type') != 'gpt2' or not files:
        raise UserError(f'{folder} holds a {hf.get("model_type")} in {len(files)} .safetensors; '
                        'a gpt2 is needed, in 1 or more')
    plain = {'scale_attn_by_inverse_layer_idx': [False], 'layer_norm_epsilon': [1e-5], 'tie_word_embeddings': [True],
             'scale_attn_weights': [True], 'n_inner': [None, 4 * hf.get('n_embd', 0)]}
    if odd := [k for k, allowed in plain.items() if hf.get(k, allowed[0]) not in allowed]:
        raise UserError(f'{folder} holds a GPT-2 of another kind ({", ".join(odd)}), which cannot be loaded')
    try:
        args = {k: hf[k] for k in ('vocab_size', 'n_layer', 'n_head', 'n_embd')} | {'block_size': hf['n_positions']}
        args['gelu'] = {'gelu_new': 'tanh', 'gelu': 'none'}[hf['activation_function']]
        tensors = [item for file in files for item in load_file(file).items()]
    except (KeyError, SafetensorError, OSError) as e:
        raise UserError(f'{folder} is damaged or of another kind ({type(e).__name__}: {e})') from e
    weights = {}
    for k, v in tensors:
        if not k.endswith(('.attn.bias', '.attn.masked_bias', 'lm_head.weight')):  # masks, and the copy of a tied head
            conv1d = k.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))  # stored (in, out)
            weights['transformer.' + k.removeprefix('transformer.')] = v.T if conv1d else v
    wte = weights['transformer.wte.weight']
    weights['transformer.wte.weight'] = F.pad(wte, (0, 0, 0, padded(args['vocab_size']) - args['vocab_size']))
    return args, weights | {'lm_head.weight': weights['transformer.wte.weight']}


def download_openai(name):
    """The folder that one of OpenAI's four models lies in, downloaded once by huggingface_hub."""
    from huggingface_hub import hf_hub_download
    try:
        hf_hub_download(f'openai-community/{name}', 'config.json')
        return os.path.dirname(hf_hub_download(f'openai-community/{name}', 'model.safetensors'))
    except Exception as e:  # offline, no such file, disk full: the hub's errors have no common class
        raise UserError(f'could not download {name}: {str(e).partition(chr(10))[0]}') from e
