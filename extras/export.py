"""
Write a checkpoint as a Hugging Face folder, for transformers, vLLM and lm-evaluation-harness.
    python extras/export.py --out_dir=out/book --to=book-hf

The model in it computes the same logits, and its tokenizer gives the same ids for any text; its
README.md says how to load both. The folder appears whole or not at all, in place of an earlier one.

Needs model.py, folio/ and tokenizers.
"""
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
from folio.hugging_face import TOKENIZER, to_hugging_face
from folio.tokenizer import EOT, SPLIT_PATTERN
from model import GPT

# ---- Settings ------------------------------------------------------------------------------------
init_from = 'resume'  # resume (out_dir/ckpt.pt), gpt2[-medium|-large|-xl], a .pt, a folder
out_dir = 'out'  # of the run to export
to = ''  # the folder to write; empty: out_dir/hf
dtype = 'float32'  # of the weights in it: float32, bfloat16 or float16

# All that an export consists of: a folder with anything else in it is not ours to replace.
FILES = {'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json',
         'tokenizer_config.json', 'README.md', TOKENIZER}


def is_earlier_export(folder):
    """Return whether a folder holds an export that this script wrote, and nothing else."""
    names = set(os.listdir(folder))
    if 'config.json' not in names or not names <= FILES:
        return False
    try:
        with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
            hf = json.load(f)
    except (ValueError, RecursionError):  # not JSON, or not UTF-8
        return False
    return isinstance(hf, dict) and hf.get('exported_by') == 'folio'


def refuse_to_overwrite(path):
    """Raise UserError where something stands in the way of an export, other than an earlier one."""
    if not os.path.exists(path):
        return
    if os.path.isdir(path) and (not os.listdir(path) or is_earlier_export(path)):
        return
    raise UserError(f'{path} is there already, and is not just an earlier export; '
                    'give another --to=…')


# ---- The tokenizer for transformers --------------------------------------------------------------
def char_tokenizer(chars):
    """Return a tokenizers.Tokenizer with a token for each character.

    Any other character is an error when it is encoded, as no token could stand for it.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    vocabulary = {c: i for i, c in enumerate(chars)}
    hf_tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token='<unknown>'))
    # Every character is a word of its own, line ends too, which a dot would not match.
    hf_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
    hf_tokenizer.decoder = decoders.Fuse()
    return hf_tokenizer


def bpe_tokenizer(tokenizer):
    """Return a tokenizers.Tokenizer that encodes as a BPETokenizer, tiktoken's, does.

    The two work differently: tokenizers applies a list of merges, each of a certain pair, where
    tiktoken joins any two tokens that spell a third. Yet one merge for each token makes them agree.
    Wherever a token comes to stand, no join has crossed its two ends, so its bytes were joined in
    the order in which they are joined when they stand alone, and the last join is of the same two.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.eot)]
    spelled = [spell(token) for token in tokens]
    vocabulary = {text: i for i, text in enumerate(spelled)}
    merges = [(spelled[left], spelled[right]) for left, right in last_joins(tokens)]
    # A piece that is a token stays whole, as in tiktoken, even if no merges lead to it.
    hf_tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    pattern = tokenizer.spec.get('pattern', SPLIT_PATTERN)
    hf_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    hf_tokenizer.decoder = decoders.ByteLevel()
    hf_tokenizer.add_special_tokens([AddedToken(EOT, special=True, normalized=False)])
    return hf_tokenizer


def spell(token):
    """Return bytes as the text that stands for them in GPT-2's vocabulary, one character a byte."""
    return ''.join(BYTE_CHARACTERS[b] for b in token)


def byte_characters():
    """Return GPT-2's 256 characters: a printable byte as it is, chr(256), chr(257) … for others."""
    characters = []
    n_others = 0
    for b in range(256):
        if chr(b).isprintable() and chr(b) != ' ':
            characters.append(chr(b))
        else:
            characters.append(chr(256 + n_others))
            n_others += 1
    return characters


BYTE_CHARACTERS = byte_characters()


def last_joins(tokens):
    """Return for each token after the 256 bytes the ids of the two that it is made of, in order.

    tokens: bytes, in the order of their ids. The two are what is left when the bytes of the token
    are encoded with all tokens but itself. A token that no two others spell is left out.
    """
    rank = {token: i for i, token in enumerate(tokens)}  # a lower rank is joined sooner
    joins = []
    for i, token in enumerate(tokens[256:], start=256):
        # While the token is missing, its bytes are joined as far as they go without it.
        del rank[token]
        parts = encode_piece([rank[bytes([b])] for b in token], tokens, rank)
        rank[token] = i
        if len(parts) == 2:
            joins.append(tuple(parts))
    return joins


def encode_piece(piece, tokens, rank):
    """Return a list of ids after tiktoken's joins: first the pair that spells the oldest token.

    tokens: the bytes of each id. rank: {bytes: id}, the tokens that a pair may become.
    """
    while True:
        joins = []
        for j, (left, right) in enumerate(zip(piece, piece[1:])):
            joined = tokens[left] + tokens[right]
            if joined in rank:
                joins.append((rank[joined], j))
        if not joins:
            return piece
        new, j = min(joins)
        piece[j:j + 2] = [new]


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
    loss = float(checkpoint.get('best_val_loss', 1e9))
    if loss < 1e9:  # nanoGPT stores 1e9 before its first evaluation
        facts.append(f'best validation loss: {loss:.4f} nats a token')
    return facts


def model_card(title, facts, folder, config):
    """Return the README.md of an export: its facts, and the code that loads it from the folder."""
    fact_list = '\n'.join(f'- {fact}' for fact in facts)
    n_tokens = min(100, config.block_size // 2)
    vllm_options = ''
    if config.arch == 'modern':  # vLLM has GPT-2 itself, NanoChat through transformers
        vllm_options = ' --model-impl transformers'
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {title}

{fact_list}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained('{folder}')
model = AutoModelForCausalLM.from_pretrained('{folder}')
inputs = tokenizer('The', return_tensors='pt')
ids = model.generate(**inputs, max_new_tokens={n_tokens}, do_sample=True)[0]
print(tokenizer.decode(ids))
```

With vLLM: `vllm serve {folder}{vllm_options}`. Exported by folio.
"""


# ---- Writing -------------------------------------------------------------------------------------
def to_json(settings):
    """Return a dictionary as indented JSON that ends with a line end."""
    return json.dumps(settings, indent=2) + '\n'


def write_folder(folder, texts, tensors):
    """Write a folder of texts, {name: str}, and tensors, {name: tensor}; all of it, or nothing.

    It is written beside its place and then renamed. Raises UserError where it cannot be.
    """
    # With the number of this process, so that a backup that somebody called .old is safe.
    new = f'{folder}.{os.getpid()}.new'
    old = f'{folder}.{os.getpid()}.old'
    try:
        os.makedirs(new)
        for name, text in texts.items():
            with open(os.path.join(new, name), 'w', encoding='utf-8') as f:
                f.write(text)
        weights = os.path.join(new, 'model.safetensors')
        save_file(tensors, weights, {'format': 'pt'})
        shutil.copymode(os.path.join(new, 'config.json'), weights)  # save_file makes it 0600
        # A folder that is not empty cannot be replaced in one step.
        if os.path.exists(folder):
            os.replace(folder, old)
        os.replace(new, folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as e:
        if os.path.exists(old) and not os.path.exists(folder):  # it failed between the two
            os.replace(old, folder)
        raise UserError(f'could not write {folder}; what was there before is intact ({e})') from e
    finally:
        shutil.rmtree(new, ignore_errors=True)


# ---- The script ----------------------------------------------------------------------------------
def main():
    if dtype not in ('float32', 'bfloat16', 'float16'):
        raise UserError(f'dtype is {dtype!r}; choose from float32, bfloat16, float16')
    # Imported where it is used, and here to say at once that it is missing.
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        raise UserError('export needs a package: pip install tokenizers') from None
    folder = os.path.normpath(to or os.path.join(out_dir, 'hf'))
    refuse_to_overwrite(folder)

    checkpoint = folio.checkpoint.load(init_from, out_dir)
    model = folio.checkpoint.build(GPT, checkpoint)
    tokenizer = folio.checkpoint.tokenizer_of(checkpoint)
    hf, tensors = to_hugging_face(model.config, model.state_dict(), tokenizer.eot)
    if GPT.__module__ != 'model':
        notice(f'transformers computes what model.py does: compare its logits with those of '
               f'{GPT.__module__}')
    tensors = {name: w.to(getattr(torch, dtype)).contiguous() for name, w in tensors.items()}

    tokenizer_config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'model_max_length': model.config.block_size,
        # Without token types, which GPT-2 would add to its input.
        'model_input_names': ['input_ids', 'attention_mask'],
        # The characters <|endoftext|> in a text are text, never the control token.
        'split_special_tokens': True,
        'clean_up_tokenization_spaces': False,
    }
    generation_config = {}
    if tokenizer.eot is None:
        hf_tokenizer = char_tokenizer(tokenizer.spec['chars'])
    else:
        hf_tokenizer = bpe_tokenizer(tokenizer)
        tokenizer_config |= {'bos_token': EOT, 'eos_token': EOT}
        generation_config |= {'bos_token_id': tokenizer.eot, 'eos_token_id': tokenizer.eot}

    architecture = hf['architectures'][0]
    n_parameters = sum(w.numel() for w in tensors.values())
    facts = list_facts(checkpoint, model.config, tokenizer, architecture=architecture,
                       n_parameters=n_parameters)
    hf |= {'dtype': dtype, 'exported_by': 'folio'}  # by which is_earlier_export knows it
    title = out_dir if init_from == 'resume' else init_from
    texts = {
        'config.json': to_json(hf),
        'generation_config.json': to_json(generation_config),
        'tokenizer_config.json': to_json(tokenizer_config),
        'tokenizer.json': hf_tokenizer.to_str(),
        'README.md': model_card(title, facts, folder, model.config),
        TOKENIZER: json.dumps(tokenizer.spec),
    }
    write_folder(folder, texts, tensors)
    print(f'{folder}: {architecture} with its tokenizer ({tokenizer.spec["kind"]}); '
          'its README.md says how to load it')


if __name__ == '__main__':
    configure(globals(), strict=False)
    main()
