"""
Read a transformers folder into our settings and weights, and write ours as transformers would.
    python -c "from folio import hugging_face as hf; print(hf.load_hugging_face('gpt2'))"

GPT2LMHeadModel is arch='gpt2', NanoChatForCausalLM is arch='modern'. A folder is only ever data:
JSON and safetensors are read, and code that comes with it is not run.
"""
import dataclasses
import json
import os

import torch
from safetensors.torch import load_file

from folio.configurator import UserError, notice
from folio.download import hub_errors
from folio.tokenizer import control_tokens, file_in, read_json, read_spec, token_named

OPENAI = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')

# What config.json calls the sizes of a model, by its model_type: {our name: its name}.
SIZES = {
    'gpt2': {
        'vocab_size': 'vocab_size',
        'block_size': 'n_positions',
        'n_layer': 'n_layer',
        'n_head': 'n_head',
        'n_embd': 'n_embd',
    },
    'nanochat': {
        'vocab_size': 'vocab_size',
        'block_size': 'max_position_embeddings',
        'n_layer': 'num_hidden_layers',
        'n_head': 'num_attention_heads',
        'n_embd': 'hidden_size',
    },
}
# What a config.json may choose there, and model.py has only one way to do.
FIXED = {
    'gpt2': {
        'layer_norm_epsilon': 1e-5,
        'scale_attn_weights': True,
        'scale_attn_by_inverse_layer_idx': False,
        'add_cross_attention': False,
        'tie_word_embeddings': True,
    },
    'nanochat': {
        'hidden_act': 'relu2',
        'rms_norm_eps': 1e-6,
        'final_logit_softcapping': 15.0,
        'attention_bias': False,
        'tie_word_embeddings': False,
    },
}
ROPE = {'rope_type': 'default', 'rope_theta': 10000.0}
GELU = {'tanh': 'gelu_new', 'none': 'gelu'}  # our gelu: their activation_function
# The fields of GPTConfig that are exported, or that do not change what a model computes
FIELDS = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias', 'arch',
          'gelu', 'window', 'flash', 'activation_checkpointing')
MATRICES = {  # of a block: (rows, columns), in multiples of n_embd
    'attn.c_attn': (3, 1),
    'attn.c_proj': (1, 1),
    'mlp.c_fc': (4, 1),
    'mlp.c_proj': (1, 4),
}

WTE = 'transformer.wte.weight'  # this and the head have a row for each token of the vocabulary
LM_HEAD = 'lm_head.weight'
CONV1D = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')  # GPT-2 stores these as (in, out)
NANOCHAT = {  # parts of our names: parts of theirs
    'transformer.wte': 'model.embed_tokens',
    'transformer.h.': 'model.layers.',
    '.mlp.c_fc': '.mlp.fc1',
    '.mlp.c_proj': '.mlp.fc2',
    '.attn.c_proj': '.self_attn.o_proj',
    '.attn.c_attn': '.self_attn.qkv_proj',
}


def rename(name, parts):
    """Return the name of a tensor with each old part replaced by its new one."""
    for old, new in parts.items():
        name = name.replace(old, new)
    return name


# ---- Reading -------------------------------------------------------------------------------------
def load_hugging_face(source):
    """Return a folder or an OpenAI model as a checkpoint: {model_args, model, …}.

    If a folder has a tokenizer, also what `read_tokenizer` returns. OpenAI's models are downloaded
    once. Raises UserError for a damaged folder, or a model that fits neither of our architectures.
    """
    folder = source
    if source in OPENAI:
        folder = download_openai(source)
    hf = read_config(folder)
    kind = hf.get('model_type')
    if not isinstance(kind, str) or kind not in SIZES:
        raise UserError(f'{folder} holds a {kind}; a gpt2 or a nanochat is needed')
    try:
        model_args = read_model_args(hf, kind)
        unsupported = unsupported_settings(hf, kind, model_args)
        if unsupported:
            settings = ', '.join(f'{name} = {hf.get(name)!r}' for name in unsupported)
            raise UserError(f'{folder} holds a {kind} that model.py cannot be, by its {settings}')
        weights = load_weights(folder, kind)
        if kind == 'gpt2':
            weights[LM_HEAD] = weights[WTE]  # tied
        checkpoint = {'model_args': model_args, 'model': weights}
        if source in OPENAI:
            return checkpoint | {'tokenizer': {'kind': 'gpt2'}}
        if file_in(folder):
            checkpoint |= read_tokenizer(folder)
        return checkpoint
    except UserError:
        raise
    except Exception as e:
        # A missing key, a size of 0 or null, a file cut short: any damage.
        why = f'{type(e).__name__}: {e}'
        raise UserError(f'{folder} is damaged, or of an unknown kind ({why})') from e


def read_config(folder):
    """Return the contents of a folder's config.json. Raises UserError where it cannot be read."""
    try:
        with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
            return dict(json.load(f))
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f'{folder} is not a Hugging Face folder: config.json could not be read '
                        f'({e})') from None


def read_model_args(hf, kind):
    """Return the fields of GPTConfig that a config.json stands for."""
    model_args = {ours: int(hf[theirs]) for ours, theirs in SIZES[kind].items()}
    if kind == 'nanochat':
        return model_args | {'arch': 'modern', 'bias': False}
    gelu_of = {theirs: ours for ours, theirs in GELU.items()} | {'gelu_pytorch_tanh': 'tanh'}
    gelu = gelu_of.get(hf['activation_function'])  # None: see unsupported_settings
    return model_args | {'arch': 'gpt2', 'bias': True, 'gelu': gelu}


def unsupported_settings(hf, kind, model_args):
    """Return the names of the settings in a config.json that ask for what model.py cannot do."""
    C = model_args['n_embd']
    H = model_args['n_head']
    if kind == 'gpt2':
        derived = {'n_inner': 4 * C}
    else:
        derived = {'num_key_value_heads': H, 'head_dim': C // H, 'intermediate_size': 4 * C}
    # A derived size that is missing or null is the same as ours.
    names = [name for name, value in derived.items() if hf.get(name) not in (None, value)]
    if kind == 'gpt2' and model_args['gelu'] is None:
        names.append('activation_function')

    if kind == 'nanochat':
        # transformers 4 spreads the rotary settings over two keys, transformers 5 has one.
        rope = ROPE | {'rope_theta': hf.get('rope_theta', ROPE['rope_theta'])}
        rope |= hf.get('rope_scaling') or {}
        rope |= hf.get('rope_parameters') or {}
        if rope != ROPE:
            names.append('rope_parameters')

    names += [name for name, value in FIXED[kind].items() if hf.get(name, value) != value]
    return names


def load_weights(folder, kind):
    """Return {our name: tensor} of a folder's .safetensors, one or several, without a tied head."""
    names = os.listdir(folder)
    if 'model.safetensors' in names:
        files = {'model.safetensors'}
    elif 'model.safetensors.index.json' in names:
        with open(os.path.join(folder, 'model.safetensors.index.json'), encoding='utf-8') as f:
            files = set(json.load(f)['weight_map'].values())
    else:
        raise UserError(f'{folder} has no model.safetensors. To get it from a pytorch_model.bin, '
                        'load and save the folder with transformers: from_pretrained(…), then '
                        'save_pretrained(…)')
    tensors = {}
    for file in files:
        tensors |= load_file(os.path.join(folder, file))
    if kind == 'gpt2':
        return gpt2_weights(tensors)
    return nanochat_weights(tensors)


def gpt2_weights(tensors):
    """Return GPT2LMHeadModel's tensors under our names, without masks and its tied head."""
    weights = {}
    for name, w in tensors.items():
        if name.endswith(('.attn.bias', '.attn.masked_bias', 'lm_head.weight')):
            continue
        # OpenAI's own files lack the prefix that transformers writes.
        ours = 'transformer.' + name.removeprefix('transformer.')
        weights[ours] = w.T if name.endswith(CONV1D) else w
    return weights


def nanochat_weights(tensors):
    """Return NanoChatForCausalLM's tensors under our names: query, key and value are one matrix."""
    for q_name in [name for name in tensors if '.q_proj' in name]:
        qkv = [tensors.pop(q_name.replace('.q_', f'.{x}_')) for x in 'qkv']
        tensors[q_name.replace('.q_', '.qkv_')] = torch.cat(qkv)
    parts = {theirs: ours for ours, theirs in NANOCHAT.items()}
    return {rename(name, parts): w for name, w in tensors.items()}


# ---- Reading what texts look like ----------------------------------------------------------------
def read_tokenizer(folder):
    """Return what a folder says about texts, as in a checkpoint: {tokenizer, begin, template}.

    begin: the ids in front of each text. template: see `template_of`. Raises UserError for a
    tokenizer of a kind that we do not have.
    """
    spec = read_spec(folder)
    control = control_tokens(spec)
    config = read_json(os.path.join(folder, 'tokenizer_config.json'))
    first = first_token(read_json(os.path.join(folder, 'tokenizer.json')), config)
    template = None
    chat_template = read_chat_template(folder, config)
    if chat_template:
        template = template_of(chat_template, config, control)
        if template is None:
            notice(f'the chat template of {folder} is more than text around a question: '
                   '--chat=True will continue the text without it')
    begin = [] if first is None else [control[first]]
    return {'tokenizer': spec, 'begin': begin, 'template': template}


def first_token(saved, config):
    """Return the control token that a tokenizer puts in front of each text, or None.

    saved, config: the contents of tokenizer.json and tokenizer_config.json. transformers 5 asks
    config first, older versions only saved.
    """
    if config.get('add_bos_token'):
        return token_named('bos_token', config)
    processor = saved.get('post_processor') or {}
    for step in processor.get('processors', [processor]):
        if step.get('type') == 'TemplateProcessing' and 'add_bos_token' not in config:
            return step['single'][0].get('SpecialToken', {}).get('id')
    return None


def read_chat_template(folder, config):
    """Return a folder's chat template: a file since transformers 5, in config before; or None."""
    path = os.path.join(folder, 'chat_template.jinja')
    if os.path.exists(path):
        with open(path, encoding='utf-8') as f:
            return f.read()
    return config.get('chat_template')


def template_of(chat_template, config, control):
    """Return the text that a chat template writes around a question, with {} in its place.

    chat_template: in Jinja. config: the contents of tokenizer_config.json. control: the texts of
    the control tokens. Returns None if it writes anything but the token that begins a text, and
    plain text with the question in it once.

    >>> chat_template = "{% for m in messages %}{{ bos_token }}Q: {{ m['content'] }} A:{% endfor %}"
    >>> template_of(chat_template, {'bos_token': '<s>', 'eos_token': '<s>'}, ['<s>'])
    'Q: {} A:'
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    bos = token_named('bos_token', config) or ''
    eos = token_named('eos_token', config) or ''
    question = {'role': 'user', 'content': '{}'}
    try:
        text = environment.from_string(chat_template).render(
            messages=[question], bos_token=bos, eos_token=eos, add_generation_prompt=True)
    except Exception:  # somebody else's program may fail in any way
        return None
    template = text.removeprefix(bos)
    if template == text or template.count('{}') != 1 or any(token in template for token in control):
        return None
    return template


# ---- The hub -------------------------------------------------------------------------------------
def download_openai(name):
    """Return the folder of one of OpenAI's four models, which huggingface_hub downloads once.

    Raises UserError if it cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging
    logging.set_verbosity_error()  # it would print a line for each of its own attempts
    repository = f'openai-community/{name}'
    remedy = 'check the network, or give --init_from=a folder that has its files'
    with hub_errors(f'could not download {name}', remedy):
        hf_hub_download(repository, 'config.json')
        path = hf_hub_download(repository, 'model.safetensors')
    return os.path.dirname(path)


# ---- Writing -------------------------------------------------------------------------------------
def to_hugging_face(config, weights, eot):
    """Return (contents of config.json, {name: tensor}) of the same model in transformers.

    config: a GPTConfig. weights: the model's state_dict. eot: the id of the token that ends a text,
    or None. A tied head is stored once; a bias that bias=False lacks becomes zeros. Raises
    UserError for a model that transformers does not have.
    """
    kind = 'gpt2' if config.arch == 'gpt2' else 'nanochat'
    sizes = {theirs: getattr(config, ours) for ours, theirs in SIZES[kind].items()}
    hf = {'model_type': kind} | sizes | FIXED[kind]
    hf |= {'bos_token_id': eot, 'eos_token_id': eot, 'pad_token_id': None}
    require_fields_that_fit(config)
    # The rows that pad our vocabulary are not exported.
    weights = weights | {name: weights[name][:config.vocab_size] for name in (WTE, LM_HEAD)}
    require_weights_that_fit(config, weights)
    if kind == 'gpt2':
        hf |= {
            'architectures': ['GPT2LMHeadModel'],
            'n_ctx': config.block_size,  # n_positions again, for llama.cpp's converter and mlx-lm
            'activation_function': GELU[config.gelu],
            'resid_pdrop': config.dropout,
            'embd_pdrop': config.dropout,
            'attn_pdrop': config.dropout,
        }
        return hf, to_gpt2_tensors(weights)
    hf |= {
        'architectures': ['NanoChatForCausalLM'],
        'num_key_value_heads': config.n_head,
        'intermediate_size': 4 * config.n_embd,
        'rope_parameters': ROPE,
        'attention_dropout': config.dropout,
    }
    return hf, to_nanochat_tensors(weights)


def require_fields_that_fit(config):
    """Raise UserError if a field of a model's configuration asks for what transformers lacks."""
    if config.arch not in ('gpt2', 'modern'):
        raise UserError(f'arch is {config.arch!r}, and transformers has no such model')
    if 0 < config.window < config.block_size:
        raise UserError(f'window is {config.window}, and transformers has no such model: train on '
                        'without one, by --window=0 --init_from=<this checkpoint> '
                        '--out_dir=<another folder>, and export that')
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in FIELDS and value != field.default:
            raise UserError(f'{field.name} is {value}, and transformers has no such model')


def require_weights_that_fit(config, weights):
    """Raise UserError if a weight has a name or a shape that transformers does not have."""
    C = config.n_embd
    expected = {WTE: (config.vocab_size, C), LM_HEAD: (config.vocab_size, C)}
    for layer in range(config.n_layer):
        for name, (rows, columns) in MATRICES.items():
            expected[f'transformer.h.{layer}.{name}.weight'] = (rows * C, columns * C)
    if config.arch == 'gpt2':
        expected['transformer.wpe.weight'] = (config.block_size, C)
        norms = ['transformer.ln_f']
        for layer in range(config.n_layer):
            norms += [f'transformer.h.{layer}.ln_1', f'transformer.h.{layer}.ln_2']
        expected |= {f'{norm}.weight': (C,) for norm in norms}
        # Each of these may have a bias, a number per output; embeddings and head never have one.
        for name, shape in list(expected.items()):
            bias = name.replace('.weight', '.bias')
            if name.startswith(('transformer.h.', 'transformer.ln_f.')) and bias in weights:
                expected[bias] = shape[:1]
    for name in sorted(expected.keys() | weights.keys()):
        ours = tuple(weights[name].shape) if name in weights else 'missing'
        theirs = expected.get(name, 'unknown')
        if ours != theirs:
            raise UserError(f'transformers has no such model: the weight {name} is {ours} here and '
                            f'{theirs} there')


def to_gpt2_tensors(weights):
    """Return our weights under OpenAI's names and in GPT2LMHeadModel's layout, each with a bias.

    transformers would write the prefix transformer. before each name; mlx-lm does without.
    """
    tensors = {}
    for name, w in weights.items():
        name = name.removeprefix('transformer.')
        if name.startswith(('h.', 'ln_f.')):
            tensors[name.replace('.weight', '.bias')] = w.new_zeros(len(w))
    # The biases that the model has come later, and replace the zeros.
    for name, w in weights.items():
        if name != LM_HEAD:  # tied
            w = w.T if name.endswith(CONV1D) else w
            tensors[name.removeprefix('transformer.')] = w
    return tensors


def to_nanochat_tensors(weights):
    """Return our weights under NanoChatForCausalLM's names, with query, key and value apart."""
    tensors = {}
    for name, w in weights.items():
        name = rename(name, NANOCHAT)
        if '.qkv_proj' in name:
            for x, part in zip('qkv', w.chunk(3)):
                tensors[name.replace('qkv', x)] = part
        else:
            tensors[name] = w
    return tensors
