"""
HellaSwag (Zellers et al. 2019): of four endings of a text, is the true one the likeliest to a model?
    python hellaswag.py --init_from=gpt2
    torchrun --nproc_per_node=2 hellaswag.py --out_dir=out/fineweb --scores=out/fineweb/hellaswag.jsonl

The last line is JSON: acc, acc_norm, acc_mean, the standard error of each (acc_stderr …), and n. Guessing gives 0.25.
    acc       the highest sum of the log-probabilities of an ending's tokens wins: lm-evaluation-harness's acc
    acc_norm  the highest sum over the ending's number of characters: lm-evaluation-harness's acc_norm
    acc_mean  the lowest loss a token: what build-nanogpt and llm.c call acc_norm (GPT-2 124M 0.2955, GPT-3 124M 0.337)
A text is scored as it stands in the file: ctx, then ' ' + ending, nothing in front. The harness's own task cleans it
(activity label in front, capitals, no [title]), so its figures are of another text: for GPT-2 124M acc 0.2892 and
acc_norm 0.3114, where the text as it stands gives acc 0.2859. A text longer than the context loses its beginning.
"""
import json
import os

import torch
import torch.nn.functional as F
from tqdm import tqdm

import folio.checkpoint
from folio import fast
from folio.configurator import UserError, configure
from folio.data import tokenizer_of
from folio.download import download
from folio.machine import Machine, default_device
from folio.engine import KVCache
from model import GPT

# ---- Settings --------------------------------------------------------------------------------------------------------
init_from = 'resume'  # resume (out_dir/ckpt.pt), gpt2[-medium|-large|-xl], a .pt, or a Hugging Face folder
out_dir = 'out'  # of the run to score
source = ''  # a file like HellaSwag's, an item a line; empty: its validation split, downloaded once
url = 'https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl'
sha256 = '0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588'  # of the file at url; empty: any
limit = 0  # items to score; 0 is all
batch_tokens = 2048  # tokens in memory at a time, padding included; raise it on a GPU
scores = ''  # a file for the four scores of each item, an item a line
device = default_device()  # cpu, cuda, cuda:1, mps …
dtype = 'auto'  # float32, bfloat16 or float16; auto: bfloat16 where a GPU has it, float16 on other GPUs


# ---- Items -----------------------------------------------------------------------------------------------------------
def load(source='', machine=None):
    """The items of a file like HellaSwag's, or of its validation split, which a machine's first process downloads."""
    path = source or os.path.join('data', 'downloads', 'hellaswag_val.jsonl')
    if not source and (machine is None or machine.rank == 0):
        download([url], path, sha256=sha256 or None)
    if machine is not None:
        machine.sum(0)  # the others wait
    try:
        with open(path, 'rb') as f:
            items = [read_item(line, f'{path}, line {i}') for i, line in enumerate(f, 1) if line.strip()]
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}); --source= takes a file like HellaSwag's") from None
    if not items:
        raise UserError(f"{path} is empty; --source= takes a file like HellaSwag's, an item a line")
    return items


def read_item(line, where):
    try:
        item = json.loads(line)
        texts, label = [item['ctx'], *item['endings']], ['0', '1', '2', '3'].index(str(item['label']))
        if len(texts) != 5 or not all(isinstance(text, str) and text for text in texts):
            raise ValueError('a text is missing or empty')
        return item | {'label': label, 'where': where}
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f'{where}: an item has ctx, four endings and label, 0 to 3 ({type(e).__name__}: {e})') from None


def render(item, tokenizer, block_size):
    """Four (context ids, ending ids): the last block_size + 1 tokens, as the very last is scored but never read."""
    try:
        context, *endings = [tokenizer.encode(text) for text in (item['ctx'], *(' ' + e for e in item['endings']))]
    except UserError as e:
        raise UserError(f'{item["where"]}: {e}') from None
    rows = [((context + ending)[-(block_size + 1):], min(len(ending), block_size)) for ending in endings]
    return [(row[:-n], row[-n:]) for row, n in rows]


# ---- Scores ----------------------------------------------------------------------------------------------------------
def make_batches(items, tokenizer, block_size, batch_tokens):
    """Batches: lists of (context ids, [(item, choice, ending ids), …]), with contexts of about the same length."""
    groups = {}
    for i, item in enumerate(items):
        for choice, (context, ending) in enumerate(render(item, tokenizer, block_size)):
            groups.setdefault((i, *context), []).append((i, choice, ending))  # four, unless they cut the context apart
    batches, height = [], 0
    for (_, *context), rows in sorted(groups.items(), key=lambda group: len(group[0])):
        longest = max(len(ending) for *_, ending in rows)
        height = max(height, longest)
        room = len(context) + height
        if not batches or room * (len(batches[-1]) + 1) > batch_tokens or room > block_size + 1:
            batches.append([])
            height = longest
        batches[-1].append((context, rows))
    return batches


def pad(rows, side, device):
    """Return lists of ids as one tensor, shorter ones filled up on one side."""
    rows = [torch.tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side).to(device)


def score_batch(model, batch, device):
    """Return {(item, choice): (log-probability, tokens)} for the endings of a batch.

    Each context is read once, into the cache, for all of its endings.
    """
    # A context's last token is read with the ending, whose first token it predicts.
    lengths = [len(context) - 1 for context, _ in batch]
    contexts = [context[:-1] or [0] for context, _ in batch]  # an empty one is one token of padding
    longest = max(len(context) for context in contexts)
    endings = []  # (group: which context it continues, item, choice, ids)
    for group, (_, rows) in enumerate(batch):
        endings += [(group, item, choice, ending) for item, choice, ending in rows]
    groups = [group for group, *_ in endings]
    inputs_BT = pad([batch[group][0][-1:] + ending[:-1] for group, _, _, ending in endings], 'right', device)
    targets_BT = pad([ending for *_, ending in endings], 'right', device)

    padding = [longest - length for length in lengths]
    cache = KVCache(model, len(batch), padding, size=longest + targets_BT.size(1))
    model.forward(pad(contexts, 'left', device), cache=cache)
    logits_BTV, _ = model.forward(inputs_BT, all_logits=True, cache=cache.rows(groups))

    scores = {}
    for row, (_, item, choice, ending) in enumerate(endings):
        n = len(ending)
        loss = F.cross_entropy(logits_BTV[row, :n], targets_BT[row, :n], reduction='sum')
        scores[item, choice] = -loss.item(), n
    return scores


@torch.no_grad()
def score(model, items, tokenizer, machine, batch_tokens=batch_tokens, progress=False):
    """(sums, counts), both (n, 4): the log-probability of each ending, in nats, and its number of tokens."""
    batches = make_batches(items, tokenizer, model.config.block_size, batch_tokens)
    both = torch.zeros(2, len(items), 4, dtype=torch.float64)
    turns = range(machine.rank, -(-len(batches) // machine.world_size) * machine.world_size, machine.world_size)
    was_training = model.training
    model.eval()
    for i in tqdm(turns, desc='HellaSwag', disable=not progress or machine.rank > 0):
        batch = batches[min(i, len(batches) - 1)]  # with sharded parameters all must take part in each forward pass
        with machine.autocast:
            scored = score_batch(model, batch, machine.device)
        if i >= len(batches):
            continue  # this pass was only for the sharded parameters, which all must gather together
        for (item, choice), of_ending in scored.items():
            both[:, item, choice] = torch.tensor(of_ending, dtype=both.dtype)
    model.train(was_training)
    both = machine.sum(*both.flatten().tolist())  # what one process has scored is zero on the others
    return torch.tensor(both, dtype=torch.float64).view(2, -1, 4)


def figures(items, sums, counts):
    """{acc, acc_norm, acc_mean, each one's _stderr, n} of what `score` gives; it is said above what they are."""
    characters = torch.tensor([[len(ending) for ending in item['endings']] for item in items])
    labels, n, result = torch.tensor([item['label'] for item in items]), len(items), {}
    for name, of_endings in {'acc': sums, 'acc_norm': sums / characters, 'acc_mean': sums / counts}.items():
        p = (of_endings.argmax(dim=1) == labels).double().mean().item()
        result |= {name: p, f'{name}_stderr': (p * (1 - p) / max(1, n - 1))**0.5}
    return result | {'n': n}


def evaluate(model, items, tokenizer, machine, batch_tokens=batch_tokens):
    """The figures of a model, which stays as it was, on items that `load` gave: the same on every process."""
    return figures(items, *score(model, items, tokenizer, machine, batch_tokens))


# ---- The script ------------------------------------------------------------------------------------------------------
if __name__ == '__main__':
    configure(globals())
    if limit < 0:
        raise UserError(f'limit is {limit}; it must be at least 0, which is all')
    machine = Machine(device, dtype)
    machine.join('nccl')
    items = load(source, machine)[:limit or None]
    checkpoint = folio.checkpoint.load(init_from, out_dir)
    model = fast.accelerate(GPT.from_pretrained(checkpoint)).to(machine.device)
    sums, counts = score(model, items, tokenizer_of(checkpoint), machine, batch_tokens, progress=True)
    result = figures(items, sums, counts)
    shown = [f'{name} {result[name]:.4f} ± {result[name + "_stderr"]:.4f}' for name in ('acc', 'acc_norm', 'acc_mean')]
    machine.say(f'{len(items):,} items: {", ".join(shown)}\n{json.dumps(result)}')
    if scores and machine.rank == 0:
        with open(scores + '.tmp', 'w', encoding='utf-8') as f:
            for item, four in zip(items, sums.tolist()):
                print(json.dumps({'ind': item.get('ind'), 'scores': four, 'label': item['label']}), file=f)
        os.replace(scores + '.tmp', scores)
