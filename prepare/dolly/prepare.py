"""
databricks-dolly-15k, 15,011 instructions answered by people, to train.bin and val.bin; only the answers are targets.
    python prepare/dolly/prepare.py                     # from the hub; --source=file.jsonl: yours, of the same columns
    python train.py config/finetune_dolly.py
    python sample.py --out_dir=out/gpt2_dolly --start=FILE:question.txt

A document is the following, without the part of the context where there is none. A question.txt for sample.py ends with
the line end after "Response:", as the tokens of the prompt do.

    Instruction:
    When was the Sydney Harbour Bridge opened?

    Context:
    The bridge was designed and built by Dorman Long, and opened on 19 March 1932.

    Response:
    It was opened on 19 March 1932.
"""
import os
import random
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the root
import folio.tokenizer
from folio.configurator import UserError, configure
from prepare.corpus import encode_pair, write_dataset
from prepare.documents import first_line
from extras.humaneval import read_jsonl

source = ''  # instead of the hub: a .jsonl with instruction, response and, if you like, context
tokenizer = 'gpt2'  # or bpe (trained on the documents), or a data folder or tokenizer.json with a BPE of yours
vocab_size = 4096  # bpe only
dataset = 'dolly'  # the folder under data/ to write
val_share = 0.05  # of the documents
max_tokens = 1024  # leave out documents of more tokens; 0: none
seed = 1337  # of the split
configure(globals())
origin = source or 'databricks/databricks-dolly-15k'


def from_hub():
    """The rows of the published set."""
    import datasets
    import huggingface_hub
    huggingface_hub.logging.set_verbosity_error()  # in place of a line for each attempt
    try:
        return list(datasets.load_dataset(origin, split='train'))
    except Exception as e:  # offline, refused, disk full: its errors have no common class
        raise UserError(f'{origin} could not be downloaded ({first_line(e)}); check the network, or give '
                        '--source=file.jsonl') from e


def to_pair(row, number):
    """(prompt, answer) of a row; an empty prompt where it has no instruction."""
    try:
        texts = row['instruction'], row.get('context') or '', row['response']
        instruction, context, response = (text.strip() for text in texts)
    except (KeyError, TypeError, AttributeError):
        raise UserError(f'{origin}, row {number}: it takes the texts instruction and response, perhaps context; it is '
                        f'{str(row)[:80]!r}') from None
    middle = f'Context:\n{context}\n\n' if context else ''
    return f'Instruction:\n{instruction}\n\n{middle}Response:\n' if instruction else '', response


if not 0 < val_share < 1 or max_tokens < 0:
    raise UserError(f'val_share is {val_share}, max_tokens {max_tokens}; give a share between 0 and 1, and 0 or more')
rows = read_jsonl(source, ('instruction', 'response'), '--source= takes a .jsonl') if source else from_hub()
pairs = [to_pair(row, number) for number, row in enumerate(rows, 1)]
if tokenizer == 'bpe':
    tok = folio.tokenizer.train_bpe([prompt + answer for prompt, answer in pairs], vocab_size)
else:
    tok = folio.tokenizer.load(tokenizer)
if tok.eot is None:
    raise UserError(f'{tokenizer} has characters and no token that ends an answer; give --tokenizer=gpt2 or bpe')
short = [pair for pair in pairs if not max_tokens or len(encode_pair(tok, *pair)[0]) <= max_tokens]
kept = [(prompt, answer) for prompt, answer in short if prompt and answer]
if len(kept) < 2:
    raise UserError(f'{origin}: {len(kept)} of {len(rows)} rows can be used; it takes one to train on and one to '
                    'validate')
random.Random(seed).shuffle(kept)
n_val = min(len(kept) - 1, max(1, round(val_share * len(kept))))
meta = write_dataset(os.path.join('data', dataset), tok, {'train': kept[n_val:], 'val': kept[:n_val]}, origin)
print(f'{len(kept):,} of {len(rows):,} documents; left out: {len(pairs) - len(short):,} of over {max_tokens:,} tokens, '
      f'{len(short) - len(kept):,} without instruction or response')
for name, counts in meta['splits'].items():
    print(f'data/{dataset}/{name}.bin: {counts["tokens"]:,} tokens in {counts["documents"]:,} documents, '
          f'{counts["targets"]:,} of them targets')
