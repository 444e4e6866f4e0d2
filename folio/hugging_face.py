"""
GPT-2 and NanoChat as transformers keeps them: read into our settings and weights, and ours written so.
    python -c "from folio.hugging_face import *; print(load_hugging_face('gpt2')['model_args'])"

GPT2LMHeadModel is arch='gpt2', NanoChatForCausalLM is arch='modern'. A folder is data: nothing that it brings is run.
"""
import json
import os
import time

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from folio.checkpoint import padded
from folio.configurator import UserError
from folio.download import sha256_of

OPENAI = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
SIZES = {  # what a config.json calls vocab_size, block_size, n_layer, n_head, n_embd
    'gpt2': ('vocab_size', 'n_positions', 'n_layer', 'n_head', 'n_embd'),
    'nanochat': ('vocab_size', 'max_position_embeddings', 'num_hidden_layers', 'num_attention_heads', 'hidden_size')}
FIXED = {  # what it may choose and our architectures may not
    'gpt2': {'layer_norm_epsilon': 1e-5, 'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False,
             'add_cross_attention': False, 'tie_word_embeddings': True},
    'nanochat': {'hidden_act': 'relu2', 'rms_norm_eps': 1e-6, 'final_logit_softcapping': 15.0, 'attention_bias': False,
                 'tie_word_embeddings': False}}
ROPE = {'rope_type': 'default', 'rope_theta': 10000.0}
TOKENIZER = 'folio_tokenizer.json'  # of an exported model: what tokenizer.load reads
GELU = {'tanh': 'gelu_new', 'none': 'gelu'}
CONV1D = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')  # which GPT-2 stores as (in, out)
NANOCHAT = {'transformer.wte': 'model.embed_tokens', 'transformer.h.': 'model.layers.', '.mlp.c_fc': '.mlp.fc1',
            '.mlp.c_proj': '.mlp.fc2', '.attn.c_proj': '.self_attn.o_proj', '.attn.c_attn': '.self_attn.qkv_proj'}
VOCABULARY = ('transformer.wte.weight', 'lm_head.weight')  # the two matrices with a row a token


# ---- Reading ---------------------------------------------------------------------------------------------------------
def load_hugging_face(source):
    """{model_args, model[, tokenizer]}, as in a checkpoint, of OpenAI's models, downloaded once, or of a folder.

    Raises UserError for a folder that is damaged, or that holds a model which neither of our architectures can be.
    """
    folder = download_openai(source) if source in OPENAI else source
    try:
        with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
            hf = dict(json.load(f))
    except (OSError, ValueError, TypeError) as e:
        hint = f'; did you mean {folder}/best.pt?' if os.path.exists(os.path.join(folder, 'best.pt')) else ''
        raise UserError(f'{folder} is no Hugging Face folder: config.json could not be read ({e}){hint}') from None
    if (kind := hf.get('model_type')) not in SIZES:
        raise UserError(f'{folder} holds a {kind}; a gpt2 or a nanochat is needed')
    try:
        V, T, L, H, C = (int(hf[k]) for k in SIZES[kind])
        args = {'vocab_size': V, 'block_size': T, 'n_layer': L, 'n_head': H, 'n_embd': C}
        if kind == 'gpt2':
            args['gelu'] = {theirs: ours for ours, theirs in GELU.items()}[hf['activation_function']]
            usual, rope, n_parameters = {'n_inner': 4 * C}, ROPE, (V + T + 2) * C + L * (12 * C + 13) * C
        else:
            usual = {'num_key_value_heads': H, 'head_dim': C // H, 'intermediate_size': 4 * C}
            rope = ROPE | {'rope_theta': hf.get('rope_theta', 10000.0)} | (hf.get('rope_scaling') or {})
            rope |= hf.get('rope_parameters') or {}
            args['arch'], n_parameters = 'modern', 2 * V * C + 12 * L * C * C
        odd = [k for k, v in usual.items() if (hf.get(k) or v) != v] + ['rope_parameters'] * (rope != ROPE)
        if odd := odd + [k for k, v in FIXED[kind].items() if hf.get(k, v) != v]:
            raise UserError(f'{folder} holds a {kind} of another kind ({", ".join(odd)}), which cannot be loaded')
        weights = load_weights(folder, kind)
        if (n := sum(w.numel() for w in weights.values())) != n_parameters:
            raise ValueError(f'config.json describes {n_parameters:,} parameters, the files hold {n:,}')
        weights |= {k: F.pad(weights[k], (0, 0, 0, padded(V) - V)) for k in VOCABULARY if k in weights}
        checkpoint = {'model_args': args, 'model': {'lm_head.weight': weights['transformer.wte.weight']} | weights}
        if os.path.exists(path := os.path.join(folder, TOKENIZER)):
            with open(path, encoding='utf-8') as f:
                checkpoint['tokenizer'] = json.load(f)
        return checkpoint
    except (ArithmeticError, LookupError, TypeError, ValueError, OSError, SafetensorError) as e:
        raise UserError(f'{folder} is damaged or of another kind ({type(e).__name__}: {e})') from e


def load_weights(folder, kind):
    """The tensors of a folder's .safetensors, one or several, under our names; of a tied head none."""
    tensors, files = {}, ['model.safetensors']
    if not os.path.exists(os.path.join(folder, files[0])):
        with open(os.path.join(folder, 'model.safetensors.index.json'), encoding='utf-8') as f:
            files = set(json.load(f)['weight_map'].values())
    for file in files:
        tensors |= load_file(os.path.join(folder, file))
    if kind == 'gpt2':  # without masks, and without the copy of a tied head
        return {'transformer.' + k.removeprefix('transformer.'): w.T if k.endswith(CONV1D) else w
                for k, w in tensors.items() if not k.endswith(('.attn.bias', '.attn.masked_bias', 'lm_head.weight'))}
    for q in [k for k in tensors if '.q_proj' in k]:
        tensors[q.replace('.q_', '.qkv_')] = torch.cat([tensors.pop(q.replace('.q_', f'.{x}_')) for x in 'qkv'])
    return {renamed(k, {theirs: ours for ours, theirs in NANOCHAT.items()}): w for k, w in tensors.items()}


def renamed(name, parts):
    for old, new in parts.items():
        name = name.replace(old, new)
    return name


def download_openai(name):
    """The folder that one of OpenAI's four models lies in, downloaded once by huggingface_hub, and then checked."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import logging
    logging.set_verbosity_error()  # in place of a line for each of its own attempts
    repository, known = f'openai-community/{name}', True
    for wait in (1, 2, 4, 0):  # seconds before another try, which goes on where the last broke off
        try:
            known = known and try_to_load_from_cache(repository, 'model.safetensors')
            hf_hub_download(repository, 'config.json')
            path = hf_hub_download(repository, 'model.safetensors')
            break
        except Exception as e:  # offline, no such file, disk full: the hub's errors have no common class
            if not wait or isinstance(e, LocalEntryNotFoundError):  # which is: no connection, and it has tried for long
                raise UserError(f'could not download {name}: {str(e).partition(chr(10))[0]}') from e
            time.sleep(wait)
    blob = os.path.realpath(path)  # which the hub's cache names by its SHA-256
    if not known and len(os.path.basename(blob)) == 64 and sha256_of(blob) != os.path.basename(blob):
        os.remove(path)
        os.remove(blob)
        raise UserError(f'{name} came damaged, by its SHA-256; run this again to download it again')
    return os.path.dirname(path)


# ---- Writing ---------------------------------------------------------------------------------------------------------
def to_hugging_face(config, weights, eot):
    """(contents of config.json, tensors) of the same model in transformers; eot: the id that ends a text, or None.

    A tied head is stored once; a bias that bias=False lacks becomes zeros. Raises UserError for a window.
    """
    if 0 < config.window < config.block_size:
        raise UserError(f'window is {config.window}, and transformers has no such model: train on without, with '
                        '--window=0 --init_from=<this checkpoint> --out_dir=<another folder>, and export that')
    V, T, L, H, C = config.vocab_size, config.block_size, config.n_layer, config.n_head, config.n_embd
    kind = 'gpt2' if config.arch == 'gpt2' else 'nanochat'
    hf = {'model_type': kind, **dict(zip(SIZES[kind], (V, T, L, H, C))), **FIXED[kind],
          'bos_token_id': eot, 'eos_token_id': eot, 'pad_token_id': None}
    weights = weights | {k: weights[k][:V] for k in VOCABULARY}  # the padding stays here
    if kind == 'gpt2':
        del weights['lm_head.weight']
        biases = {k.replace('.weight', '.bias'): w.new_zeros(len(w)) for k, w in weights.items()
                  if k.startswith(('transformer.h.', 'transformer.ln_f.'))}
        hf |= {'architectures': ['GPT2LMHeadModel'], 'activation_function': GELU[config.gelu],
               **dict.fromkeys(('resid_pdrop', 'embd_pdrop', 'attn_pdrop'), config.dropout)}
        return hf, {k: w.T if k.endswith(CONV1D) else w for k, w in (biases | weights).items()}
    hf |= {'architectures': ['NanoChatForCausalLM'], 'num_key_value_heads': H, 'intermediate_size': 4 * C,
           'rope_parameters': ROPE, 'attention_dropout': config.dropout}
    tensors = {renamed(k, NANOCHAT): w for k, w in weights.items()}
    for name in [k for k in tensors if '.qkv_proj' in k]:
        tensors |= {name.replace('qkv', x): w for x, w in zip('qkv', tensors.pop(name).chunk(3))}
    return hf, tensors
