"""
Score a model on HellaSwag (Zellers et al. 2019): does it prefer the true one of four endings?
    python hellaswag.py --init_from=gpt2
    torchrun --nproc_per_node=2 hellaswag.py --out_dir=out/fineweb --scores=out/fineweb/scores.jsonl

An item, shortened:
    {"ctx": "A man is sitting on a roof. he", "label": 3,
     "endings": ["is using wrap to wrap a pair of skis.", "is ripping level tiles off.",
                 "is holding a rubik's cube.", "starts pulling up roofing on a roof."]}

The last line of output is JSON: acc, acc_norm, acc_mean, the standard error of each (acc_stderr
…), and n. Guessing gives 0.25. The ending chosen is the one with
    acc       the highest log-probability: the acc of lm-evaluation-harness
    acc_norm  the highest log-probability per character: the acc_norm of lm-evaluation-harness
    acc_mean  the lowest loss per token: what build-nanogpt and llm.c call acc_norm (GPT-2 124M
              0.2955, GPT-3 124M 0.337)
A text is scored as it stands in the file: ctx, then ' ' + ending, with nothing in front. A text
longer than the model's context loses its beginning. The harness's own task cleans the text first
(activity label in front, capitals, no [title]), which changes the figures of GPT-2 124M:
    as it stands in the file    acc 0.2859
    cleaned by the harness      acc 0.2892, acc_norm 0.3114

Needs model.py and folio/.
"""
import collections
import itertools
import json
import os

import torch
import torch.nn.functional as F
from tqdm import tqdm

import folio.checkpoint
from folio.configurator import UserError, configure, require_at_least
from folio.download import download
from folio.engine import KVCache, send
from folio.machine import Machine, default_device
from model import GPT

# ---- Settings ------------------------------------------------------------------------------------
init_from = 'resume'  # resume (out_dir/ckpt.pt), gpt2[-medium|-large|-xl], a .pt, or a folder
out_dir = 'out'  # the run to score
source = ''  # a file in HellaSwag's format; empty: its validation split, downloaded once
limit = 0  # items to score; 0: all
scores = ''  # a file to write the four scores of each item to
device = default_device()  # cpu, cuda, cuda:1, mps …
dtype = 'auto'  # float32, bfloat16, float16; auto: float32 on a CPU; a GPU: bfloat16 if it can

URL = 'https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl'
SHA256 = '0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588'
BATCH_SIZE = 64  # endings in a pass

# One of the four texts of an item, as token ids: context and ending are tuples.
Row = collections.namedtuple('Row', 'item choice context ending')


# ---- Items ---------------------------------------------------------------------------------------
def load(source='', machine=None):
    """Return the items of a file in HellaSwag's format, or of its validation split for ''.

    The split is downloaded once, by rank 0, while the other processes wait. Raises UserError if a
    file cannot be had, or a line is not an item.
    """
    path = source
    if not source:
        path = os.path.join('data', 'downloads', 'hellaswag_val.jsonl')
        if machine is None or machine.rank == 0:
            download([URL], path, sha256=SHA256)
    if machine is not None:
        machine.barrier()
    items = []
    try:
        with open(path, 'rb') as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    items.append(read_item(line, f'{path}, line {number}'))
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}); --source= takes a file like "
                        "HellaSwag's") from None
    if not items:
        raise UserError(f"{path} is empty; --source= takes a file like HellaSwag's, an item on "
                        'each line')
    return items


def read_item(line, where):
    """Return the item in a line, its label as an int from 0 to 3. Raises UserError.

    where: the file and the line, for messages; the item keeps it under that key.
    """
    try:
        item = json.loads(line)
        item['label'] = int(item['label'])
        if not 0 <= item['label'] <= 3:
            raise ValueError(f"the label is '{item['label']}'")
        item['where'] = where
        texts = [item['ctx'], *item['endings']]
        if len(texts) != 5 or not all(isinstance(text, str) and text for text in texts):
            raise ValueError('a text is missing or empty')
        return item
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f'{where}: an item has ctx, four endings and label, 0 to 3 '
                        f'({type(e).__name__}: {e})') from None


def render(items, tokenizer, block_size):
    """Return the rows of all items, four of each. Raises UserError.

    A long text is cut to its last block_size + 1 tokens: the model reads all but the very last one,
    which is only predicted.
    """
    rows = []
    for i, item in enumerate(items):
        try:
            context = tokenizer.encode(item['ctx'])
            endings = [tokenizer.encode(' ' + ending) for ending in item['endings']]
        except UserError as e:
            raise UserError(f'{item["where"]}: {e}') from None
        for choice, ending in enumerate(endings):
            ids = (context + ending)[-(block_size + 1):]
            n = min(len(ending), block_size)
            rows.append(Row(i, choice, context=tuple(ids[:-n]), ending=tuple(ids[-n:])))
    return rows


# ---- Scores --------------------------------------------------------------------------------------
def make_batches(rows):
    """Return lists of at most BATCH_SIZE rows whose contexts have the same length."""
    def context_length(row):
        return len(row.context)

    batches = []
    for _, alike in itertools.groupby(sorted(rows, key=context_length), key=context_length):
        alike = list(alike)
        for first in range(0, len(alike), BATCH_SIZE):
            batches.append(alike[first:first + BATCH_SIZE])
    return batches


def score_batch(model, batch, device):
    """Return the log-probability of each row's ending, in nats, (rows,); it waits for no GPU.

    Each context is read once, into a cache, for all of its endings.
    """
    contexts = list(dict.fromkeys(row.context for row in batch))
    owners = [contexts.index(row.context) for row in batch]
    # Padding behind an ending changes nothing in front of it: attention is causal.
    longest = max(len(row.ending) for row in batch)
    inputs_BT = torch.zeros(len(batch), longest, dtype=torch.long)
    targets_BT = torch.full((len(batch), longest), -1)
    for b, row in enumerate(batch):
        T = len(row.ending)
        # The last token of the context predicts the first one of the ending.
        inputs_BT[b, :T] = torch.tensor(row.context[-1:] + row.ending[:-1])
        targets_BT[b, :T] = torch.tensor(row.ending)

    cache = None
    contexts_BT = torch.tensor(contexts)[:, :-1]
    if contexts_BT.size(1) > 0:
        cache = KVCache(model, size=contexts_BT.size(1) + longest)
        model.forward(send(contexts_BT, device), cache=cache)
        cache = cache.rows(owners)
    logits_BTV, _ = model.forward(send(inputs_BT, device), all_logits=True, cache=cache)
    losses_N = F.cross_entropy(logits_BTV.flatten(0, 1), send(targets_BT, device).flatten(),
                               ignore_index=-1, reduction='none')
    return -losses_N.view_as(targets_BT).sum(dim=1)


@torch.no_grad()
def score(model, rows, machine, progress=False):
    """Return (sums, counts) of the endings, both (items, 4): log-probabilities, and tokens."""
    batches = make_batches(rows)[machine.rank::machine.world_size]
    mine = []  # rows that this process has scored
    logps = []  # tensors of their log-probabilities, one for each batch
    was_training = model.training
    model.eval()
    for batch in tqdm(batches, desc='HellaSwag', disable=not progress or machine.rank > 0):
        with machine.autocast:
            logps.append(score_batch(model, batch, machine.device))
        mine += batch
    model.train(was_training)
    shape = (rows[-1].item + 1, 4)
    sums = torch.zeros(shape, dtype=torch.float64)
    counts = torch.zeros(shape, dtype=torch.float64)
    if mine:
        places = ([row.item for row in mine], [row.choice for row in mine])
        sums[places] = torch.cat(logps).cpu().double()  # one copy: each one waits for the device
        counts[places] = torch.tensor([len(row.ending) for row in mine], dtype=torch.float64)
    # What one process has scored is zero on the others, so a sum puts all together.
    sums, counts = machine.sum_tensor(torch.stack((sums, counts)))
    return sums, counts


def accuracies(items, sums, counts):
    """Return {acc, acc_norm, acc_mean, the _stderr of each, n}, as explained at the top."""
    characters = torch.tensor([[len(ending) for ending in item['endings']] for item in items])
    labels = torch.tensor([item['label'] for item in items])
    n = len(items)
    result = {}
    ratings_of = {'acc': sums, 'acc_norm': sums / characters, 'acc_mean': sums / counts}
    for name, ratings in ratings_of.items():
        p = (ratings.argmax(dim=1) == labels).double().mean().item()
        result[name] = p
        result[f'{name}_stderr'] = (p * (1 - p) / max(1, n - 1))**0.5
    return result | {'n': n}


# ---- The script ----------------------------------------------------------------------------------
def main():
    machine = Machine(device, dtype)
    machine.init_processes('nccl')
    items = load(source, machine)
    if limit > 0:
        items = items[:limit]
    checkpoint = folio.checkpoint.load(init_from, out_dir)
    model = folio.checkpoint.build(GPT, checkpoint).to(machine.device, machine.torch_dtype)
    tokenizer = folio.checkpoint.tokenizer_of(checkpoint)
    rows = render(items, tokenizer, model.config.block_size)
    sums, counts = score(model, rows, machine, progress=True)
    metrics = accuracies(items, sums, counts)
    shown = []
    for name in ('acc', 'acc_norm', 'acc_mean'):
        shown.append(f'{name} {metrics[name]:.4f} ± {metrics[f"{name}_stderr"]:.4f}')
    machine.print0(f'{len(items):,} items: {", ".join(shown)}')
    machine.print0(json.dumps(metrics))
    if scores and machine.rank == 0:
        with open(scores + '.tmp', 'w', encoding='utf-8') as f:
            for item, item_scores in zip(items, sums.tolist()):
                entry = {'ind': item.get('ind'), 'scores': item_scores, 'label': item['label']}
                f.write(json.dumps(entry) + '\n')
        os.replace(scores + '.tmp', scores)


if __name__ == '__main__':
    config = configure(globals(), strict=False)
    require_at_least(0, config, 'limit')
    main()
