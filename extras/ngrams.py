"""
N-grams: the loss that any language model has to beat, and measures of how much texts repeat themselves and each other.
    python -c "import dataset, ngrams; print(ngrams.losses(dataset.Dataset('book'), order=6))"

That prints the loss, in nats a token, of predicting from 0, 1, … 5 tokens before.
"""
import collections
import math
import re

import numpy as np


# ---- The baseline ----------------------------------------------------------------------------------------------------
def probabilities(train, text, vocab_size, order):
    """(order, T): the probability of each token of text after the n - 1 before it, for n = 1 … order, as in train.

    Interpolated absolute discounting (Ney, Essen and Kneser 1994): every count of n tokens gives up a share D of one,
    and what is gained is spread by the probabilities of n - 1 tokens; those of none are uniform. A context that never
    occurred backs off to the shorter one. For each context the probabilities of the vocabulary sum to one.

    >>> probabilities([0, 1, 0, 1, 0, 1], [0, 1], vocab_size=2, order=2).round(2)
    array([[0.5 , 0.5 ],
           [0.5 , 0.96]])
    """
    train, text = np.asarray(train, np.int64), np.asarray(text, np.int64)
    p, rows, n_contexts = np.full(len(text), 1 / vocab_size), [], 1
    context, train_context = np.zeros(len(text), np.int64), np.zeros(len(train), np.int64)  # the number of each
    for n in range(1, min(order, len(train)) + 1):
        grams, ids, counts = np.unique(train_context * vocab_size + train[n - 1:], return_inverse=True,
                                       return_counts=True)
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        discount = (once + 1) / (once + 2 * twice + 2)  # their estimate, kept off 0 and 1
        total = np.bincount(grams // vocab_size, weights=counts, minlength=n_contexts)
        kinds = np.bincount(grams // vocab_size, minlength=n_contexts)
        wanted = context * vocab_size + text
        found = np.searchsorted(grams, wanted).clip(max=len(grams) - 1)
        hit = (context >= 0) & (grams[found] == wanted)
        own = np.where(hit, counts[found] - discount, 0.0)
        known = (context >= 0) & (total[context] > 0)
        p = np.where(known, (own + discount * kinds[context] * p) / total[context].clip(min=1), p)
        rows.append(p)
        context, n_contexts = np.concatenate(([-1], np.where(hit, found, -1)[:-1])), len(grams)  # -1: never occurred
        train_context = ids[:-1]
    return np.array(rows)


def losses(data, order, n_train=5_000_000, n_val=0):
    """(order,): the loss of each n, in nats a token, on the validation split of a Dataset.

    Counted in the first n_train tokens of its training split; n_val: on the first so many targets only, 0: on all.
    """
    tokens, mask = data.tokens('val')[:n_val + 1 if n_val else None], data.mask('val')
    p = probabilities(data.tokens('train')[:n_train], tokens, data.vocab_size, order)
    targets = slice(1, None) if mask is None else np.flatnonzero(mask[1:len(tokens)]) + 1
    return -np.log(p[:, targets]).mean(axis=1)


# ---- Measures of texts -----------------------------------------------------------------------------------------------
def count(words, n):
    """How often each n words in a row occur in a list."""
    return collections.Counter(zip(*(words[i:] for i in range(n))))


def self_bleu(texts):
    """Mean BLEU-4 of each text, a list of words, against the others (Zhu et al. 2018): 1 where all are the same.

    Counts of two words and more are raised by one (Lin and Och 2004), for short texts.

    >>> self_bleu([['the', 'cat', 'sat', 'down']] * 2), self_bleu([['the', 'cat'], ['a', 'dog']])
    (1.0, 0.0)
    """
    scores = []
    for i, words in enumerate(texts):
        others, logs = texts[:i] + texts[i + 1:], []
        for n in range(1, 5):
            mine, theirs, add = count(words, n), collections.Counter(), int(n > 1)
            for other in others:
                theirs |= count(other, n)
            hits = (mine & theirs).total() + add
            logs.append(math.log(hits / (mine.total() + add)) if hits else -math.inf)
        closest = min((len(other) for other in others), key=lambda size: abs(size - len(words)), default=0)
        scores.append(math.exp(min(0, 1 - closest / max(1, len(words))) + sum(logs) / 4))
    return sum(scores) / max(1, len(scores))


def measure(groups):
    """Diversity of texts, given as lists of texts of one prompt each; a word is a run of letters, or of other signs.

    distinct-n: the share of different n-grams among all (Li et al. 2016). repeated-4: the share of 4-grams that stood
    in the same text before (Welleck et al. 2020). self-BLEU: of the texts of a prompt, the mean over the prompts.

    >>> measure([['so it is', 'so it was']])['distinct-1']
    0.6666666666666666
    """
    groups = [[re.findall(r'\w+|[^\w\s]+', text) for text in texts] for texts in groups]
    texts, figures = sum(groups, []), {}
    for n in (1, 2, 3):
        counts = sum((count(words, n) for words in texts), collections.Counter())
        figures[f'distinct-{n}'] = len(counts) / max(1, counts.total())
    fours = [count(words, 4) for words in texts]
    figures['repeated-4'] = 1 - sum(map(len, fours)) / max(1, sum(c.total() for c in fours))
    return figures | {'self-BLEU': sum(map(self_bleu, groups)) / len(groups)}
