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
import math
import os

import folio  # first: it sets what torch reads when it is loaded
import torch
import torch.nn.functional as F
from tqdm import tqdm

import folio.checkpoint
from folio import fast
from folio.configurator import UserError, configure, require_at_least
from folio.download import download
from folio.engine import KVCache, send
from folio.machine import Machine, default_device
from model import GPT

# ---- Settings ------------------------------------------------------------------------------------
init_from = 'resume'  # resume (out_dir/ckpt.pt), gpt2[-medium|-large|-xl], a .pt, or a folder
out_dir = 'out'  # the run to score
source = ''  # a file in HellaSwag's format; empty: its validation split, downloaded once
url = 'https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl'
sha256 = '0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588'  # of url; empty: any
limit = 0  # items to score; 0: all
batch_tokens = 0  # tokens in a pass: contexts, each with one ending; 0: as the device takes
scores = ''  # a file to write the four scores of each item to
device = default_device()  # cpu, cuda, cuda:1, mps …
dtype = 'auto'  # float32, bfloat16, float16; auto: float32 on a CPU; a GPU: bfloat16 if it can


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
            download([url], path, sha256=sha256 or None)
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
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as e:
        raise UserError(f'{where}: an item has ctx, four endings and label, 0 to 3 '
                        f'({type(e).__name__}: {e})') from None


def render(item, tokenizer, block_size):
    """Return an item's four (context ids, ending ids). Raises UserError.

    A long text is cut to its last block_size + 1 tokens: the model reads all but the very last one,
    which is only predicted.
    """
    try:
        context = tokenizer.encode(item['ctx'])
        endings = [tokenizer.encode(' ' + ending) for ending in item['endings']]
    except UserError as e:
        raise UserError(f'{item["where"]}: {e}') from None
    rows = []
    for ending in endings:
        ids = (context + ending)[-(block_size + 1):]
        n = min(len(ending), block_size)
        rows.append((ids[:-n], ids[-n:]))
    return rows


# ---- Scores --------------------------------------------------------------------------------------
def make_batches(items, tokenizer, block_size, batch_tokens):
    """Return batches: lists of (context ids, [(item, choice, ending ids), …]).

    A batch holds endings of about the same length, with the contexts that they continue.
    """
    # An item's four endings usually continue the same context. But where the text is too long, the
    # context is cut, and how much of it is left depends on the length of the ending.
    groups = {}  # {(item, context): endings}
    for i, item in enumerate(items):
        for choice, (context, ending) in enumerate(render(item, tokenizer, block_size)):
            groups.setdefault((i, tuple(context)), []).append((i, choice, ending))

    def longest_ending(group):
        _, endings = group
        return max(len(ending) for _, _, ending in endings)

    # Sort by the length of the endings and not of the contexts: there are four times as many of
    # them to be padded.
    batches = []
    current = []
    longest_context = 0  # in the current batch
    for group in sorted(groups.items(), key=longest_ending):
        (_, context), endings = group
        longest_context = max(longest_context, len(context))
        row_tokens = longest_context + longest_ending(group)
        takes_too_much = row_tokens * (len(current) + 1) > batch_tokens
        exceeds_context = row_tokens > block_size + 1  # + 1: the last token is only predicted
        if current and (takes_too_much or exceeds_context):
            batches.append(current)
            current = []
            longest_context = len(context)
        current.append((list(context), endings))
    batches.append(current)
    return batches


def tokens_a_pass(machine):
    """Return how many tokens to take in a pass, the same number in every process.

    That is 2,048 on a CPU, and on a GPU 2,048 per 8 GiB of memory: enough to keep it busy, and few
    enough for their keys, values and logits to fit, for models up to the size of GPT-2 XL. (This
    was computed, not measured: a token takes 0.9 MB with GPT-2, and 2.2 MB with GPT-2 XL.)
    """
    if machine.type != 'cuda':
        return 2048
    memory = torch.cuda.get_device_properties(machine.device).total_memory
    mean = machine.sum(memory)[0] / machine.world_size
    return 2048 * max(1, int(mean / 2**33))


def pad(rows, side, value=0):
    """Return lists of ids as one tensor (B, T), the shorter ones filled up on one side."""
    rows = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value,
                                           padding_side=side)


def score_batch(model, batch, device):
    """Return ([(item, choice), …], their log-probabilities (B,), list of their numbers of tokens).

    Each context is read once, into a cache, for all of its endings. Nothing here waits for a GPU.
    """
    # The last token of a context predicts the first one of an ending, so it is read together with
    # the ending. Of a context of one token nothing is left to read before that; it gets a dummy
    # token, which counts as padding.
    contexts = [context[:-1] or [0] for context, _ in batch]
    longest = max(len(context) for context in contexts)
    padding = [longest - (len(context) - 1) for context, _ in batch]
    owners = []  # for each ending, the row of its context
    item_choices = []
    inputs = []
    targets = []
    for owner, (context, endings) in enumerate(batch):
        for item, choice, ending in endings:
            owners.append(owner)
            item_choices.append((item, choice))
            inputs.append(context[-1:] + ending[:-1])
            targets.append(ending)

    longest_ending = max(len(ending) for ending in targets)
    cache = KVCache(model, len(batch), padding, size=longest + longest_ending)
    contexts_BT = send(pad(contexts, 'left'), device)
    inputs_BT = send(pad(inputs, 'right'), device)
    targets_BT = send(pad(targets, 'right', value=-1), device)
    model.forward(contexts_BT, cache=cache)
    logits_BTV, _ = model.forward(inputs_BT, all_logits=True, cache=cache.rows(owners))
    losses = []
    # A few endings at a time: for all at once, cross_entropy takes as much memory again as the
    # logits.
    for logits_bTV, targets_bT in zip(logits_BTV.split(16), targets_BT.split(16)):
        losses_N = F.cross_entropy(logits_bTV.flatten(0, 1), targets_bT.flatten(),
                                   ignore_index=-1, reduction='none')
        losses.append(losses_N.view_as(targets_bT).sum(dim=1))
    return item_choices, -torch.cat(losses), [len(target) for target in targets]


@torch.no_grad()
def score(model, items, tokenizer, machine, batch_tokens, progress=False, should_stop=None):
    """Return (sums, counts), both (n, 4): log-probability in nats, and tokens, of each ending.

    batch_tokens: tokens in a pass, of contexts and one ending for each; 0: as many as the device
    takes. should_stop: called before each batch; once it returns True, (None, None) is returned.
    """
    batch_tokens = batch_tokens or tokens_a_pass(machine)
    batches = make_batches(items, tokenizer, model.config.block_size, batch_tokens)
    scored = []  # (item, choice) of each ending that this process has scored
    logps = []  # tensors of their log-probabilities, one for each batch
    counts = []  # tokens of each
    was_training = model.training
    model.eval()
    # All processes take as many turns, so that they can be asked to stop together.
    n_turns = math.ceil(len(batches) / machine.world_size)
    for turn in tqdm(range(n_turns), desc='HellaSwag', disable=not progress or machine.rank > 0):
        if should_stop is not None and should_stop():
            model.train(was_training)
            return None, None
        i = turn * machine.world_size + machine.rank
        if i >= len(batches):
            continue
        with machine.autocast:
            item_choices, logp_B, lengths = score_batch(model, batches[i], machine.device)
        scored += item_choices
        logps.append(logp_B)
        counts += lengths
    model.train(was_training)
    sums_and_counts = torch.zeros(2, len(items), 4, dtype=torch.float64)
    if scored:
        item_N, choice_N = torch.tensor(scored).T
        logp_N = torch.cat(logps).cpu()  # a single copy, because each one waits for the device
        sums_and_counts[0, item_N, choice_N] = logp_N.double()
        sums_and_counts[1, item_N, choice_N] = torch.tensor(counts, dtype=torch.float64)
    # What one process has scored is zero on the others, so a sum puts all together.
    sums, counts = machine.sum_tensor(sums_and_counts)
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


def evaluate(model, items, tokenizer, machine, batch_tokens, should_stop=None):
    """Return the accuracies of a model, the same on every process.

    should_stop: called before each batch; once it returns True, None is returned.
    """
    sums, counts = score(model, items, tokenizer, machine, batch_tokens, should_stop=should_stop)
    if sums is None:
        return None
    return accuracies(items, sums, counts)


# ---- The script ----------------------------------------------------------------------------------
def main():
    machine = Machine(device, dtype)
    machine.init_processes('nccl')
    items = load(source, machine)
    if limit > 0:
        items = items[:limit]
    checkpoint = folio.checkpoint.load(init_from, out_dir)
    model = machine.for_inference(fast.accelerate(GPT.from_pretrained(checkpoint)))
    tokenizer = folio.checkpoint.tokenizer_of(checkpoint)
    sums, counts = score(model, items, tokenizer, machine, batch_tokens, progress=True)
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
    config = configure(globals())
    require_at_least(0, config, 'limit', 'batch_tokens')
    main()
