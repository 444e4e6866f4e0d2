"""
Write a checkpoint as a Hugging Face folder, or as a .gguf for llama.cpp and Ollama.
    python extras/export.py --out_dir=out/book --to=book-hf
    python extras/export.py --out_dir=out/gpt2_dolly --to=dolly.gguf --dtype=float16

The exported model computes the same logits. Its tokenizer gives the same ids for any text, and
begins a text as folio does. If the model was tuned to answer, the form of its prompts becomes its
chat template. The folder's README.md says what loads it. sample.py and train.py read the folder
too.

Needs model.py, folio/ and tokenizers; for a .gguf, gguf instead of tokenizers.
"""
import importlib
import json
import os
import shutil
import sys

sys.path.insert(0, os.path.abspath(__file__ + '/../..'))  # the root of the checkout
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import folio.checkpoint
from folio.configurator import UserError, configure, notice
from folio.hugging_face import CONV1D, to_hugging_face
from folio.tokenizer import EACH_CHARACTER, SPLIT_PATTERN, control_tokens, spell
from model import GPT

# ---- Settings ------------------------------------------------------------------------------------
init_from = 'resume'  # resume (out_dir/ckpt.pt), gpt2[-medium|-large|-xl], a .pt, a folder
out_dir = 'out'  # of the run to export
to = ''  # the folder or the .gguf to write; empty: out_dir/hf
dtype = 'float32'  # of the weights in it: float32, bfloat16 or float16

# ---- The tokenizer for transformers --------------------------------------------------------------
def char_tokenizer(chars):
    """Return a tokenizers.Tokenizer with a token for each character.

    To encode any other character is an error, as no token could stand for it.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    vocabulary = {c: i for i, c in enumerate(chars)}
    hf_tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token='<unknown>'))
    # Every character is a word of its own, line ends too, which a dot would not match.
    each_character = Regex(EACH_CHARACTER['pattern']['Regex'])
    hf_tokenizer.pre_tokenizer = pre_tokenizers.Split(each_character, 'isolated')
    hf_tokenizer.decoder = decoders.Fuse()
    return hf_tokenizer


def bpe_tokenizer(tokenizer):
    """Return a tokenizers.Tokenizer that encodes as a BPETokenizer does, which uses tiktoken."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    vocabulary = {token: i for i, token in enumerate(spelled_tokens(tokenizer))}
    hf_tokenizer = Tokenizer(models.BPE(vocabulary, list_merges(tokenizer)))
    pattern = tokenizer.spec.get('pattern', SPLIT_PATTERN)
    hf_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    hf_tokenizer.decoder = decoders.ByteLevel()
    for token in control_tokens(tokenizer.spec):
        hf_tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    return hf_tokenizer


def spelled_tokens(tokenizer):
    """Return the tokens of a BPETokenizer, by their ids, as GPT-2's vocabulary spells them."""
    spelled = [spell(tokenizer.decode_bytes([i])) for i in range(tokenizer.n_vocab)]
    for token, i in control_tokens(tokenizer.spec).items():
        spelled[i] = token
    return spelled


def list_merges(tokenizer):
    """Return the merges of a BPETokenizer in order, pairs of tokens as a vocabulary spells them.

    tiktoken joins any two tokens that together spell a third, and makes the oldest such token
    first. Where the learned merges are unknown, the list has all such pairs.
    """
    if 'merges' in tokenizer.spec:
        learned = tokenizer.spec['merges']
        return [tuple(spell(part.encode('latin-1')) for part in pair) for pair in learned]
    control = control_tokens(tokenizer.spec).values()
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.n_vocab) if i not in control]
    known = set(tokens)
    merges = []
    for token in tokens:
        for cut in range(1, len(token)):
            left = token[:cut]
            right = token[cut:]
            if left in known and right in known:
                merges.append((spell(left), spell(right)))
    return merges


# ---- What else a tokenizer is told ---------------------------------------------------------------
def begin_texts(hf_tokenizer, token, token_id):
    """Have a tokenizers.Tokenizer put a control token in front of each text."""
    from tokenizers.processors import TemplateProcessing
    hf_tokenizer.post_processor = TemplateProcessing(
        single=[token, '$A'], pair=[token, '$A', '$B'], special_tokens=[(token, token_id)])


def to_chat_template(template):
    """Return folio's template, with {} for the question, as the Jinja template of a whole chat.

    As in sample.py, each question begins a document, and its answer follows. So the tokenizer must
    have a token that begins one.
    """
    before, _, after = template.partition('{}')
    parts = ['bos_token', json.dumps(before, ensure_ascii=False), "message['content']",
             json.dumps(after, ensure_ascii=False)]
    return ("{% for message in messages %}"
            "{% if message['role'] == 'assistant' %}{{ message['content'] }}"
            "{% elif message['role'] == 'user' %}{{ " + ' + '.join(parts) + " }}"
            "{% else %}{{ raise_exception('only user and assistant have a place here') }}"
            "{% endif %}{% endfor %}")


def describe_tokenizer(checkpoint, model, tokenizer):
    """Return (contents of tokenizer.json, of tokenizer_config.json, of generation_config.json)."""
    config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'model_max_length': model.config.block_size,
        # Without token types, which GPT-2 would add to its input.
        'model_input_names': ['input_ids', 'attention_mask'],
        'clean_up_tokenization_spaces': False,
        # The characters <|endoftext|> in a text are text, never the control token, except where a
        # chat template has to spell it.
        'split_special_tokens': not checkpoint.get('template'),
    }
    # Without a limit, transformers' pipeline runs past the positions of a short context.
    generation = {'max_length': model.config.block_size}
    if tokenizer.spec['kind'] == 'char':
        hf_tokenizer = char_tokenizer(tokenizer.spec['chars'])
    else:
        hf_tokenizer = bpe_tokenizer(tokenizer)
    if tokenizer.eot is not None:
        begin = folio.checkpoint.beginning_of(checkpoint, tokenizer)
        first = begin[0] if begin else tokenizer.eot
        bos = hf_tokenizer.id_to_token(first)
        eos = hf_tokenizer.id_to_token(tokenizer.eot)
        config |= {'bos_token': bos, 'eos_token': eos, 'unk_token': eos}
        generation |= {'bos_token_id': first, 'eos_token_id': tokenizer.eot}
        if begin:
            begin_texts(hf_tokenizer, bos, first)
        if checkpoint.get('template'):
            config['chat_template'] = to_chat_template(checkpoint['template'])
    return hf_tokenizer.to_str(), config, generation


# ---- The model card ------------------------------------------------------------------------------
def list_facts(checkpoint, config, tokenizer, architecture, n_parameters):
    """Return what a checkpoint tells about its model and how it was trained, a fact a line."""
    facts = [f'{architecture}: {config.n_layer} layers, {config.n_head} heads, '
             f'width {config.n_embd}, context of {config.block_size}',
             f'parameters: {n_parameters:,}, stored as {dtype}',
             f'tokenizer: {tokenizer.spec["kind"]}, {config.vocab_size:,} tokens']
    trained_on = checkpoint.get('config', {}).get('dataset', '')
    if trained_on:
        facts.append(f'data set: {trained_on}')
    steps = checkpoint.get('iter_num', 0)
    if steps > 0:
        facts.append(f'trained for {steps:,} steps')
    if checkpoint.get('template'):
        facts.append('tuned to answer questions, in the form that its chat template writes')
    loss = float(checkpoint.get('best_val_loss', 1e9))
    if loss < 1e9:  # nanoGPT stores 1e9 before its first evaluation
        facts.append(f'best validation loss: {loss:.4f} nats a token')
    return facts


def list_engines(folder, config, tokenizer):
    """Return the engines that are known to load an exported folder, one a line."""
    engines = ['transformers' if config.arch == 'gpt2' else 'transformers 5 or newer',
               f'vLLM: `vllm serve {folder} --dtype=float32`; by default it uses bfloat16']
    if tokenizer.eot is not None:
        engines.append('lm-evaluation-harness')
    if config.arch == 'gpt2':
        engines.append('mlx-lm')
    if config.arch == 'gpt2' and tokenizer.eot is not None:
        engines.append('CTranslate2')
        engines.append('llama.cpp and Ollama, from `extras/export.py --to=model.gguf` in folio')
    return engines


def model_card(title, facts, folder, engines, config):
    """Return the README.md of an export: its facts, what loads it, and the code that does."""
    n_tokens = min(100, config.block_size // 2)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {title}

{as_list(facts)}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained('{folder}')
model = AutoModelForCausalLM.from_pretrained('{folder}')
inputs = tokenizer('The', return_tensors='pt')
ids = model.generate(**inputs, max_new_tokens={n_tokens}, do_sample=True)[0]
print(tokenizer.decode(ids))
```

What loads it:

{as_list(engines)}

Exported by folio.
"""


def as_list(lines):
    """Return lines as a list in Markdown."""
    return '\n'.join(f'- {line}' for line in lines)


# ---- Writing -------------------------------------------------------------------------------------
def to_json(settings):
    """Return a dictionary as indented JSON that ends with a line end."""
    return json.dumps(settings, indent=2, ensure_ascii=False) + '\n'


def write_folder(folder, texts, tensors):
    """Write a new folder of texts, {name: str}, and tensors, {name: tensor}; all of it, or nothing.

    The last text makes the folder complete, so a killed process leaves none that looks complete.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        weights = os.path.join(folder, 'model.safetensors')
        save_file(tensors, weights, {'format': 'pt'})
        for name, text in texts.items():
            path = os.path.join(folder, name)
            with open(path, 'w', encoding='utf-8') as f:
                f.write(text)
        shutil.copymode(path, weights)  # save_file makes it 0600
    except BaseException as e:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(e, SafetensorError):  # a full disk, for example
            raise UserError(f'could not write {folder} ({e})') from e
        raise


def write_gguf(path, title, hf, tensors, checkpoint, tokenizer):
    """Write a GPT-2 as one file for llama.cpp, whole or not at all.

    hf, tensors: what to_hugging_face returns. Raises UserError for what llama.cpp does not have.
    """
    import gguf
    if hf['model_type'] != 'gpt2':
        raise UserError('llama.cpp does not have the architecture modern: export a folder, for '
                        'transformers or vLLM')
    if tokenizer.spec['kind'] == 'char':
        raise UserError('llama.cpp has no tokenizer of characters: export a folder, for '
                        'transformers or vLLM')
    if tokenizer.spec.get('pattern', SPLIT_PATTERN) != SPLIT_PATTERN:
        raise UserError("llama.cpp only knows the patterns of well-known tokenizers, and this "
                        "tokenizer does not cut texts by GPT-2's: export a folder")
    if hf['activation_function'] == 'gelu':
        notice('llama.cpp computes the tanh form of GELU, and this model has the exact one: its '
               'logits will differ a little')
    number_format = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16'}[dtype]
    stored = gguf.GGMLQuantizationType[number_format]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, hf['n_layer'])

    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    with folio.checkpoint.replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, 'gpt2')
        writer.add_name(title)
        writer.add_context_length(hf['n_positions'])
        writer.add_embedding_length(hf['n_embd'])
        writer.add_feed_forward_length(4 * hf['n_embd'])
        writer.add_block_count(hf['n_layer'])
        writer.add_head_count(hf['n_head'])
        writer.add_layer_norm_eps(hf['layer_norm_epsilon'])

        types = [gguf.TokenType.NORMAL] * tokenizer.n_vocab
        for i in control_tokens(tokenizer.spec).values():
            types[i] = gguf.TokenType.CONTROL
        writer.add_tokenizer_model('gpt2')
        writer.add_tokenizer_pre('gpt-2')  # the pattern
        writer.add_token_list(spelled_tokens(tokenizer))
        writer.add_token_types(types)
        writer.add_token_merges([' '.join(pair) for pair in list_merges(tokenizer)])
        begin = folio.checkpoint.beginning_of(checkpoint, tokenizer)
        if tokenizer.eot is not None:
            first = begin[0] if begin else tokenizer.eot
            writer.add_bos_token_id(first)
            writer.add_eos_token_id(tokenizer.eot)
            if checkpoint.get('template'):
                writer.add_chat_template(to_chat_template(checkpoint['template']))
        writer.add_add_bos_token(begin != [])

        for name, w in tensors.items():
            if name.endswith(CONV1D):
                w = w.T
            # As in files that llama.cpp's own converter writes
            is_small = w.dim() == 1 or name == 'wpe.weight'
            kind = gguf.GGMLQuantizationType.F32 if is_small else stored
            numbers = gguf.quants.quantize(w.float().contiguous().numpy(), kind)
            theirs = names.get_name(name, try_suffixes=('.weight', '.bias'))
            writer.add_tensor(theirs, numbers, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


# ---- The script ----------------------------------------------------------------------------------
def main():
    if dtype not in ('float32', 'bfloat16', 'float16'):
        raise UserError(f'dtype is {dtype!r}; choose from float32, bfloat16, float16')
    path = os.path.normpath(to or os.path.join(out_dir, 'hf'))
    is_gguf = path.endswith('.gguf')
    package = 'gguf' if is_gguf else 'tokenizers'
    try:
        importlib.import_module(package)
    except ImportError:
        raise UserError(f'export needs a package: pip install {package}') from None
    if os.path.isfile(path) or (os.path.isdir(path) and os.listdir(path)):
        raise UserError(f'{path} is there already: remove it, or give another --to=…')

    checkpoint = folio.checkpoint.load(init_from, out_dir)
    model = folio.checkpoint.build(GPT, checkpoint)
    tokenizer = folio.checkpoint.tokenizer_of(checkpoint)
    hf, tensors = to_hugging_face(model.config, model.state_dict(), tokenizer.eot)
    if GPT.__module__ != 'model':
        notice(f'transformers computes what model.py does: compare its logits with the logits of '
               f'{GPT.__module__}')
    architecture = hf['architectures'][0]
    title = out_dir if init_from == 'resume' else init_from
    if is_gguf:
        write_gguf(path, title, hf, tensors, checkpoint, tokenizer)
        print(f'{path}: {architecture} with its tokenizer ({tokenizer.spec["kind"]})')
        return

    tensors = {name: w.to(getattr(torch, dtype)).contiguous() for name, w in tensors.items()}
    n_parameters = sum(w.numel() for w in tensors.values())
    facts = list_facts(checkpoint, model.config, tokenizer, architecture=architecture,
                       n_parameters=n_parameters)
    engines = list_engines(path, model.config, tokenizer)
    tokenizer_json, tokenizer_config, generation_config = describe_tokenizer(
        checkpoint, model, tokenizer)
    write_folder(path, {
        'generation_config.json': to_json(generation_config),
        'tokenizer_config.json': to_json(tokenizer_config),
        'tokenizer.json': tokenizer_json,
        'README.md': model_card(title, facts, path, engines, model.config),
        # As in generation_config.json: texts may begin with another token than they end with
        'config.json': to_json(hf | {
            'dtype': dtype, 'bos_token_id': generation_config.get('bos_token_id')}),
    }, tensors)
    print(f'{path}: {architecture} with its tokenizer ({tokenizer.spec["kind"]}); '
          'its README.md says what loads it')


if __name__ == '__main__':
    configure(globals(), strict=False)
    main()
