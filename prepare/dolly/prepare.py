"""
Turn databricks-dolly-15k, 15,011 instructions that people answered, into train.bin and val.bin.
    python prepare/dolly/prepare.py  # from the hub; --source=file.jsonl: yours, with these columns
    python train.py config/finetune_dolly.py
    python sample.py --out_dir=out/gpt2_dolly --chat=True

Only the answers are targets: train.mask.bin and val.mask.bin say which tokens those are. A document
looks like this, without the part "Context:" if there is no context. The template goes into the
checkpoint, from which sample.py --chat takes it.

    Instruction:
    When was the Sydney Harbour Bridge opened?

    Context:
    The bridge was designed and built by Dorman Long, and opened on 19 March 1932.

    Response:
    It was opened on 19 March 1932.

Needs folio/ and prepare/corpus.py.
"""
import os
import random
import sys

sys.path[0] = os.path.abspath(__file__ + '/../../..')  # the root of the checkout
import folio.tokenizer
from folio.configurator import UserError, configure, folder_of
from folio.data import read_jsonl
from folio.download import hub_errors
from prepare.corpus import encode_document, without_blank_ends, write_dataset

source = ''  # instead of the hub: a .jsonl with instruction, response and, if you like, context
tokenizer = 'gpt2'  # or bpe (trained on the documents), or your own data folder or tokenizer.json
vocab_size = 4096  # bpe only
dataset = 'dolly'  # the folder under data/ to write
val_share = 0.05  # of the documents
max_tokens = 1024  # leave out longer documents; 0: keep all
seed = 1337  # of the split

PUBLISHED = 'databricks/databricks-dolly-15k'  # on the hub
TEMPLATE = 'Instruction:\n{}\n\nResponse:\n'  # a prompt without context


def from_hub():
    """Return the rows of the published set."""
    import datasets
    import huggingface_hub
    huggingface_hub.logging.set_verbosity_error()  # otherwise it prints a line for each attempt
    remedy = 'check the network, or give --source=file.jsonl'
    with hub_errors(f'{PUBLISHED} could not be downloaded', remedy):
        return list(datasets.load_dataset(PUBLISHED, split='train'))


def clean(text):
    """Return a text of a row as it goes into a document; code keeps its indentation."""
    return without_blank_ends(folio.tokenizer.without_surrogates(text))


def to_pair(row, number, origin):
    """Return (prompt, answer) of a row; the prompt is empty if the row has no instruction.

    number, origin: which row, and where it came from, for the message of a UserError.
    """
    try:
        instruction = clean(row['instruction'])
        context = clean(row.get('context') or '')
        response = clean(row['response'])
    except (KeyError, TypeError, AttributeError):
        raise UserError(f'{origin}, row {number}: it needs the texts instruction and response, '
                        f'perhaps context; it is {str(row)[:80]!r}') from None
    # main leaves such a row out, and counts it.
    if not instruction:
        return '', response
    if context:
        instruction += f'\n\nContext:\n{context}'
    return TEMPLATE.replace('{}', instruction), response


def is_short(pair, tok):
    """Return whether a document has at most max_tokens tokens."""
    tokens, _ = encode_document(tok, pair)
    return len(tokens) <= max_tokens


def main():
    if not 0 < val_share < 1 or max_tokens < 0:
        raise UserError(f'val_share is {val_share}, max_tokens {max_tokens}; '
                        'give a share between 0 and 1, and 0 or more')
    origin = source or PUBLISHED
    if source:
        rows = read_jsonl(source, ('instruction', 'response'), '--source= takes a .jsonl')
    else:
        rows = from_hub()
    pairs = [to_pair(row, number, origin) for number, row in enumerate(rows, 1)]

    if tokenizer == 'bpe':
        texts = [prompt + answer for prompt, answer in pairs]
        tok = folio.tokenizer.train_bpe(texts, vocab_size)
    else:
        tok = folio.tokenizer.load(tokenizer)
    # Without an end-of-text token to predict, a model would never learn to stop.
    if tok.eot is None:
        raise UserError(f'{tokenizer} has no token that ends an answer, only characters; '
                        'give --tokenizer=gpt2 or bpe')

    short = pairs
    if max_tokens > 0:
        short = [pair for pair in pairs if is_short(pair, tok)]
    kept = [(prompt, answer) for prompt, answer in short if prompt and answer]
    if len(kept) < 2:
        raise UserError(f'{origin}: {len(kept)} of {len(rows)} rows can be used; '
                        'it takes one to train on and one to validate')

    random.Random(seed).shuffle(kept)
    n_val = round(val_share * len(kept))
    n_val = min(max(n_val, 1), len(kept) - 1)  # at least one document on each side
    splits = {'train': kept[n_val:], 'val': kept[:n_val]}
    folder = folder_of(dataset)
    meta = write_dataset(folder, tok, splits, source=origin, template=TEMPLATE)

    print(f'{len(kept):,} of {len(rows):,} documents; '
          f'left out: {len(pairs) - len(short):,} of over {max_tokens:,} tokens, '
          f'{len(short) - len(kept):,} without instruction or response')
    for name, counts in meta['splits'].items():
        print(f'{folder}/{name}.bin: {counts["tokens"]:,} tokens '
              f'in {counts["documents"]:,} documents, {counts["targets"]:,} of them targets')


configure(globals())
main()
