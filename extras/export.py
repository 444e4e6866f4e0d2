"""
A checkpoint as a Hugging Face folder, which transformers, vLLM and lm-evaluation-harness load.
    python export.py --out_dir=out/book --to=book-hf

It computes the same logits, and its tokenizer gives the same ids for any text. The folder appears whole or not at all.
"""
import json
import os
import shutil
import sys

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the root
import folio.tokenizer
import folio.checkpoint
from folio.configurator import UserError, configure
from folio.data import tokenizer_of
from folio.hugging_face import TOKENIZER, to_hugging_face
from model import GPT

# ---- Settings --------------------------------------------------------------------------------------------------------
init_from = 'resume'  # resume (out_dir/ckpt.pt), gpt2[-medium|-large|-xl], a .pt, or a Hugging Face folder
out_dir = 'out'  # of the run to export
to = ''  # the folder to write; empty: out_dir/hf
dtype = 'float32'  # of the weights in it: float32, bfloat16 or float16
configure(globals())
FILES = {'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json',
         'README.md', TOKENIZER}
to = os.path.normpath(to or os.path.join(out_dir, 'hf'))
if dtype not in ('float32', 'bfloat16', 'float16'):
    raise UserError(f'dtype is {dtype!r}; choose from float32, bfloat16, float16')
try:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
except ImportError:
    raise UserError('export needs a package: pip install tokenizers') from None
names = set(os.listdir(to)) if os.path.isdir(to) else {to} if os.path.exists(to) else set()
earlier = 'config.json' in names and names <= FILES
if earlier:
    with open(os.path.join(to, 'config.json'), encoding='utf-8', errors='replace') as f:
        earlier = '"exported_by": "folio"' in f.read()
if names and not earlier:
    raise UserError(f'{to} is there already, and is not just an earlier export; give another --to=…')

# ---- Model and tokenizer ---------------------------------------------------------------------------------------------
source = os.path.join(out_dir, 'ckpt.pt') if init_from == 'resume' else init_from
checkpoint = folio.checkpoint.load(source)
model, tokenizer = GPT.from_pretrained(checkpoint), tokenizer_of(checkpoint)
spec, trained_on = tokenizer.spec, checkpoint.get('config', {}).get('dataset', '')
hf, tensors = to_hugging_face(model.config, model.state_dict(), tokenizer.eot)
tensors = {name: w.to(getattr(torch, dtype)).contiguous() for name, w in tensors.items()}


# ---- Its tokenizer for transformers ----------------------------------------------------------------------------------
def char_tokenizer(chars):
    """A token a character. Any other character is an error, as there is no token that could stand for it."""
    theirs = Tokenizer(models.WordLevel({c: i for i, c in enumerate(chars)}, unk_token='<unknown>'))
    theirs.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
    theirs.decoder = decoders.Fuse()
    return theirs


def encode_piece(piece, tokens, rank):
    """What tiktoken makes of a piece: join the adjacent pair that spells the oldest token, until none spells any."""
    while True:
        spelled = [tokens[left] + tokens[right] for left, right in zip(piece, piece[1:])]
        joins = [(rank[s], j) for j, s in enumerate(spelled) if s in rank]
        if not joins:
            return piece
        new, j = min(joins)
        piece[j:j + 2] = [new]


def bpe_tokenizer(tokenizer):
    """tokenizers joins the pairs of a list, tiktoken any two tokens that spell a third; yet one pair a token is exact.

    Once both ends of a token's bytes are ends of tokens, what lies between is joined as it is where it stands alone.
    So a token is always made of the same two: those left when its bytes are encoded without it.
    """
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.eot)]
    rank = {token: i for i, token in enumerate(tokens)}
    odd = [b for b in range(256) if b == 32 or not chr(b).isprintable()]  # spelled with letters from U+0100, as GPT-2's
    spelled = [''.join(chr(256 + odd.index(b) if b in odd else b) for b in token) for token in tokens]
    merges = []
    for i, token in enumerate(tokens[256:], 256):
        del rank[token]
        parts = encode_piece([rank[bytes([b])] for b in token], tokens, rank)
        rank[token] = i
        merges += [tuple(spelled[part] for part in parts)] * (len(parts) == 2)
    vocabulary = {s: i for i, s in enumerate(spelled)}
    theirs = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))  # a piece that is a token stays whole
    split = pre_tokenizers.Split(Regex(tokenizer.spec.get('pattern', folio.tokenizer.SPLIT_PATTERN)), 'isolated')
    theirs.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    theirs.decoder = decoders.ByteLevel()
    theirs.add_special_tokens([AddedToken(folio.tokenizer.EOT, special=True, normalized=False)])
    return theirs


hf_tokenizer = char_tokenizer(spec['chars']) if tokenizer.eot is None else bpe_tokenizer(tokenizer)
ends = () if tokenizer.eot is None else ('bos_token', 'eos_token')
tokenizer_config = {
    'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': model.config.block_size,
    'model_input_names': ['input_ids', 'attention_mask'],  # no token types: GPT-2 would add them to its input
    'split_special_tokens': True,  # text is only ever text
    'clean_up_tokenization_spaces': False, **dict.fromkeys(ends, folio.tokenizer.EOT)}

# ---- The model card --------------------------------------------------------------------------------------------------
c, steps, loss = model.config, checkpoint.get('iter_num', 0), float(checkpoint.get('best_val_loss', 1e9))
facts = [f'{hf["architectures"][0]}: {c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, context of {c.block_size}',
         f'parameters: {sum(w.numel() for w in tensors.values()):,}, stored as {dtype}',
         f'tokenizer: {spec["kind"]}, {c.vocab_size:,} tokens']
facts += [f'data set: {trained_on}'] * bool(trained_on) + [f'trained for {steps:,} steps'] * (steps > 0)
facts += [f'best validation loss: {loss:.4f} nats a token'] * (loss < 1e9)  # which is nanoGPT's before it has any
card = f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {source}

{chr(10).join(f'- {fact}' for fact in facts)}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained('{to}'), AutoModelForCausalLM.from_pretrained('{to}')
inputs = tokenizer('The', return_tensors='pt')
print(tokenizer.decode(model.generate(**inputs, max_new_tokens={min(100, c.block_size // 2)}, do_sample=True)[0]))
```

With vLLM: `vllm serve {to}{' --model-impl transformers' * (c.arch == 'modern')}`. Exported by folio.
"""

# ---- Writing ---------------------------------------------------------------------------------------------------------
texts = {'config.json': hf | {'dtype': dtype, 'exported_by': 'folio'}, 'tokenizer_config.json': tokenizer_config,
         'generation_config.json': {f'{name}_id': tokenizer.eot for name in ends}}
texts = {name: json.dumps(settings, indent=2) + '\n' for name, settings in texts.items()}
texts |= {'tokenizer.json': hf_tokenizer.to_str(), 'README.md': card, TOKENIZER: json.dumps(spec)}
new, old = f'{to}.{os.getpid()}.new', f'{to}.{os.getpid()}.old'  # names that nobody else has
try:
    os.makedirs(new)
    for name, text in texts.items():
        with open(os.path.join(new, name), 'w', encoding='utf-8') as f:
            f.write(text)
    save_file(tensors, os.path.join(new, 'model.safetensors'), {'format': 'pt'})
    shutil.copymode(os.path.join(new, 'config.json'), os.path.join(new, 'model.safetensors'))  # it is written as 0600
    if os.path.exists(to):
        os.replace(to, old)
    os.replace(new, to)
    shutil.rmtree(old, ignore_errors=True)
except (OSError, SafetensorError) as e:
    if os.path.exists(old) and not os.path.exists(to):
        os.replace(old, to)
    raise UserError(f'could not write {to}; what was there before is intact ({e})') from e
finally:
    shutil.rmtree(new, ignore_errors=True)
print(f'{to}: {hf["architectures"][0]} with its tokenizer ({spec["kind"]}); its README.md says how to load it')
