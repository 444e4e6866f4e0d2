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
import json
import os

os.environ.setdefault('GOMP_SPINCOUNT', '10000')  # see train.py
import torch
import torch.nn.functional as F
from tqdm import tqdm

import folio.checkpoint
from folio.configurator import UserError, configure, require_at_least
from folio.data import read_jsonl, write_jsonl
from folio.download import download
from folio.engine import KVCache
from folio.machine import Machine, default_device
from model import GPT

# ---- Settings ------------------------------------------------------------------------------------
init_from = 'resume'  # resume (out_dir/ckpt.pt), gpt2[-medium|-large|-xl], a .pt, or a folder
out_dir = 'out'  # the run to score
source = ''  # a file in HellaSwag's format; empty: its validation split, downloaded once
limit = 0  # items to score; 0: all
scores = ''  # a file to write the four scores of each item to
device = default_device()  # cpu, cuda, cuda:1, mps …
dtype = 'auto'  # float32, bfloat16, float16; auto: bfloat16 where that is fast

URL = 'https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl'
SHA256 = '0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588'
ITEMS_IN_A_PASS = 8  # 32 rows


# ---- Items ---------------------------------------------------------------------------------------
def load(source, machine):
    """Return the items of a file in HellaSwag's format, or of its validation split for ''.

    The split is downloaded once, by rank 0, while the other processes wait. Raises UserError if the
    file cannot be downloaded or read, or a line isn't an item.
    """
    path = source
    if not source:
        path = os.path.join('data', 'downloads', 'hellaswag_val.jsonl')
        if machine.rank == 0:
            download(URL, path, sha256=SHA256)
    machine.barrier()
    items = read_jsonl(path, ['ctx'], "--source= takes a file like HellaSwag's")
    for number, item in enumerate(items, 1):
        item['label'] = label_of(item, f'{path}, item {number}')
    return items


def label_of(item, where):
    """Return the label of an item, 0 to 3. Raises UserError, with the place, for a broken item."""
    try:
        label = int(item['label'])
        if len(item['endings']) != 4 or not all([item['ctx'], *item['endings']]):
            raise ValueError('a text is missing')
        if not 0 <= label <= 3:
            raise ValueError(f'the label is {label}')
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f'{where}: an item has ctx, four endings and a label, 0 to 3 '
                        f'({type(e).__name__}: {e})') from None
    return label


def render(items, tokenizer, block_size):
    """Return four rows for each item: (token ids, number of tokens in the ending).

    A long text loses its beginning: the model sees block_size tokens, and predicts one more.
    """
    rendered = []
    for item in items:
        context = tokenizer.encode(item['ctx'])
        rows = []
        for text in item['endings']:
            ending = tokenizer.encode(' ' + text)
            ids = (context + ending)[-(block_size + 1):]
            rows.append((ids, min(len(ending), len(ids) - 1)))
        rendered.append(rows)
    return rendered


# ---- Scores --------------------------------------------------------------------------------------
def shared_length(rendered):
    """Return how many tokens of context the four rows of every item share."""
    n = min(len(ids) - 1 - n_ending for rows in rendered for ids, n_ending in rows)
    for rows in rendered:
        n = min(n, len(os.path.commonprefix([ids for ids, _ in rows])))
    return n


def score_items(model, rendered, device):
    """Return the log-probability of each ending in nats, (items, 4).

    rendered: items from `render`. The context of an item is read once for its four rows.
    """
    rows = sum(rendered, [])
    longest = max(len(ids) for ids, _ in rows)
    # Padding after a text changes nothing before it: attention is causal.
    idx_BT = torch.zeros(len(rows), longest - 1, dtype=torch.long)
    targets_BT = torch.full((len(rows), longest - 1), -1)
    for b, (ids, n_ending) in enumerate(rows):
        end = len(ids) - 1
        idx_BT[b, :end] = torch.tensor(ids[:-1])
        targets_BT[b, end - n_ending:end] = torch.tensor(ids[-n_ending:])
    idx_BT = idx_BT.to(device)

    n_shared = shared_length(rendered)
    cache = KVCache(model, size=longest)
    # Not model(...): it may be compiled, and rows come in all lengths.
    if n_shared > 0:
        model.forward(idx_BT[::4, :n_shared], cache=cache)  # one row of each item
        cache.repeat(4)
    logits_BTV, _ = model.forward(idx_BT[:, n_shared:], all_logits=True, cache=cache)
    targets_N = targets_BT[:, n_shared:].flatten().to(device)
    losses_N = F.cross_entropy(logits_BTV.flatten(0, 1), targets_N, ignore_index=-1,
                               reduction='none')
    return -losses_N.view(len(rendered), 4, -1).sum(dim=2)


def lengths(rows):
    """Return the lengths of an item's shortest context and longest row, to sort items by.

    Items of about the same lengths are scored together, so that little is padding.
    """
    return (min(len(ids) - n_ending for ids, n_ending in rows), max(len(ids) for ids, _ in rows))


@torch.no_grad()
def score(model, rendered, machine, progress=False):
    """Return log-probability and number of tokens of each ending, both (items, 4)."""
    order = sorted(range(len(rendered)), key=lambda i: lengths(rendered[i]))
    passes = [order[first:first + ITEMS_IN_A_PASS]
              for first in range(0, len(order), ITEMS_IN_A_PASS)]
    passes = passes[machine.rank::machine.world_size]
    sums = torch.zeros(len(rendered), 4, dtype=torch.float64)
    counts = torch.tensor([[n_ending for _, n_ending in rows] for rows in rendered])
    was_training = model.training
    model.eval()
    for indices in tqdm(passes, desc='HellaSwag', disable=not progress or machine.rank > 0):
        with machine.autocast:
            logps = score_items(model, [rendered[i] for i in indices], machine.device)
        sums[indices] = logps.cpu().double()
    model.train(was_training)
    return machine.sum_tensor(sums), counts  # what other processes have scored is zero here


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
    model = folio.checkpoint.build(GPT, checkpoint).eval()
    model.to(machine.device, machine.torch_dtype)
    tokenizer = folio.checkpoint.tokenizer_of(checkpoint)
    rendered = render(items, tokenizer, model.config.block_size)
    sums, counts = score(model, rendered, machine, progress=True)
    metrics = accuracies(items, sums, counts)
    shown = []
    for name in ('acc', 'acc_norm', 'acc_mean'):
        shown.append(f'{name} {metrics[name]:.4f} ± {metrics[f"{name}_stderr"]:.4f}')
    machine.print0(f'{len(items):,} items: {", ".join(shown)}')
    machine.print0(json.dumps(metrics))
    if scores and machine.rank == 0:
        rows = []
        for item, item_scores in zip(items, sums.tolist()):
            rows.append({'ind': item.get('ind'), 'scores': item_scores, 'label': item['label']})
        write_jsonl(scores, rows)
    machine.end_processes()


if __name__ == '__main__':
    config = configure(globals(), strict=False)
    require_at_least(0, config, 'limit')
    main()
