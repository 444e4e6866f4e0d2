"""
Compute the loss of n-grams, which any language model has to beat, and how repetitive texts are.
    python -c "import extras.ngrams as n, folio.data as d; print(n.losses(d.Dataset('book'), 6))"

That prints the loss on the validation split of data/book, in nats per token, of predicting each
token from the 0, 1, … 5 before it.

Needs numpy only.
"""
import collections
import math
import re

import numpy as np


# ---- The baseline --------------------------------------------------------------------------------
def probabilities(train, text, vocab_size, order):
    """Return (order, T): each token's probability after the n - 1 before it, for n = 1 … order.

    text has T tokens. N-grams are counted in train and smoothed by interpolated absolute
    discounting (Ney, Essen and Kneser 1994): every n-gram seen gives up a part D of its count, and
    what this frees is spread over the vocabulary by the probabilities of the (n - 1)-grams; below
    the 1-grams lies the uniform distribution. A context that train does not have backs off to the
    shorter one. In every context the probabilities of the whole vocabulary sum to one.

    >>> probabilities([0, 1, 0, 1, 0, 1], [0, 1], vocab_size=2, order=2).round(2)
    array([[0.5 , 0.5 ],
           [0.5 , 0.96]])
    """
    train = np.asarray(train, np.int64)
    text = np.asarray(text, np.int64)

    # A context is a number: the row of its n - 1 tokens in the sorted table of all (n - 1)-grams of
    # train. So every n-gram fits one integer, context * vocab_size + token, however long it is.
    train_context = np.zeros(len(train), np.int64)
    context = np.zeros(len(text), np.int64)  # -1: train does not have it
    n_contexts = 1  # for n = 1 all tokens follow the one empty context
    p = np.full(len(text), 1 / vocab_size)
    rows = []
    for n in range(1, min(order, len(train)) + 1):
        grams, train_rows, counts = np.unique(
            train_context * vocab_size + train[n - 1:], return_inverse=True, return_counts=True)
        once = (counts == 1).sum()
        twice = (counts == 2).sum()
        # The authors' estimate is once / (once + 2 * twice); ours is never 0 or 1
        discount = (once + 1) / (once + 2 * twice + 2)

        # For each context: how many tokens followed it, and how many different ones
        gram_context = grams // vocab_size
        total = np.bincount(gram_context, weights=counts, minlength=n_contexts)
        n_different = np.bincount(gram_context, minlength=n_contexts)

        # Look up the n-gram that ends at each token of text
        wanted = context * vocab_size + text
        found = np.searchsorted(grams, wanted).clip(max=len(grams) - 1)
        hit = (context >= 0) & (grams[found] == wanted)
        own = np.where(hit, counts[found] - discount, 0.0)
        freed = discount * n_different[context]
        known = (context >= 0) & (total[context] > 0)
        p = np.where(known, (own + freed * p) / total[context].clip(min=1), p)
        rows.append(p)

        # An n-gram that ends at one token is the context of the next
        train_context = train_rows[:-1]
        context = np.concatenate(([-1], np.where(hit, found, -1)[:-1]))
        n_contexts = len(grams)
    return np.array(rows)


def losses(data, order, n_train=5_000_000, n_val=0):
    """Return (order,): the n-grams' loss, nats per token, on the validation split of a Dataset.

    n_train: count them in this many training tokens, from the first on.
    n_val: evaluate on this many targets; 0: on all of them.
    """
    tokens = data.tokens('val')
    if n_val:
        tokens = tokens[:n_val + 1]  # one more, because the first token is not a target
    mask = data.mask('val')
    p = probabilities(data.tokens('train')[:n_train], tokens, data.vocab_size, order)
    targets = slice(1, None)
    if mask is not None:
        targets = np.flatnonzero(mask[1:len(tokens)]) + 1
    return -np.log(p[:, targets]).mean(axis=1)


# ---- Measures of texts ---------------------------------------------------------------------------
def count(words, n):
    """Return how often each run of n words occurs in a list of words."""
    shifted = [words[i:] for i in range(n)]
    return collections.Counter(zip(*shifted))


def bleu(words, references):
    """Return the BLEU-4 of one text against others, all lists of words (Papineni et al. 2002).

    From two words on, counts are raised by one (Lin and Och 2004), because short texts often have
    no longer n-gram in common.
    """
    if words in references:
        return 1.0  # also if there is no word in either
    log_precisions = []
    for n in range(1, 5):
        mine = count(words, n)
        allowed = collections.Counter()
        for reference in references:
            allowed |= count(reference, n)  # the largest count in any one reference
        added = 0 if n == 1 else 1
        hits = (mine & allowed).total() + added
        if hits == 0:
            return 0.0  # not a word in common
        log_precisions.append(math.log(hits / (mine.total() + added)))

    lengths = [len(reference) for reference in references]
    closest = min(lengths, key=lambda length: abs(length - len(words)))
    brevity = min(0, 1 - closest / max(1, len(words)))  # log of the penalty for a short text
    return math.exp(brevity + sum(log_precisions) / 4)


def self_bleu(texts):
    """Return the mean BLEU-4 of each text, a list of words, against the others (Zhu et al. 2018).

    It is 1 where all are the same.

    >>> self_bleu([['the', 'cat', 'sat', 'down']] * 2), self_bleu([['the', 'cat'], ['a', 'dog']])
    (1.0, 0.0)
    """
    scores = [bleu(words, texts[:i] + texts[i + 1:]) for i, words in enumerate(texts)]
    return sum(scores) / len(scores)


def measure(groups):
    """Return how diverse texts are; groups: a list of texts for each prompt.

    A word is a run of letters and digits, or of other signs.
    distinct-1, -2, -3: the share of different n-grams in a text (after Li et al. 2016).
    repeated-4: the share of 4-grams that occurred earlier in the text (Welleck et al. 2020).
    self-BLEU: computed among the texts of one prompt, then averaged over the prompts.
    A measure is NaN where texts are too short for it, or where it needs several texts per prompt.

    >>> measure([['so it is so', 'so it was so']])['distinct-1']
    0.75
    """
    groups = [[re.findall(r'\w+|[^\w\s]+', text) for text in texts] for texts in groups]
    share = {}  # of different n-grams
    for n in (1, 2, 3, 4):
        counts = [count(words, n) for texts in groups for words in texts]
        total = sum(found.total() for found in counts)
        share[n] = sum(len(found) for found in counts) / total if total else math.nan
    metrics = {f'distinct-{n}': share[n] for n in (1, 2, 3)}
    metrics['repeated-4'] = 1 - share[4]
    metrics['self-BLEU'] = math.nan
    if len(groups[0]) > 1:
        metrics['self-BLEU'] = sum(self_bleu(texts) for texts in groups) / len(groups)
    return metrics
