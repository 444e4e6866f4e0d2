"""
"Textbooks Are All You Need" (Gunasekar et al. 2023) in small: raw code, chosen code with a textbook, and exercises.
    python prepare/textbook/prepare.py                                 # all of it made here, without a network
    python prepare/textbook/prepare.py --source=hub                    # published sets
    OPENAI_API_KEY=… python prepare/textbook/prepare.py --source=api --teacher=gpt-4o-mini --budget=5

Writes, with one BPE for all three: data/textbook_raw, raw code; data/textbook_filtered, of that code what a quality
classifier likes best, and textbook pages; data/textbook_exercises, signature and docstring as a prompt, of which only
the solution is learned; there also problems.jsonl, problems of held-out compositions for humaneval.py. What shares
`overlap` words in a row with these problems or with HumanEval's is removed. textbook.py runs the study.
"""
import itertools
import os
import random
import re
import sys
import sysconfig
import zlib

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the root
from extras import confine
from extras.textbook import generator
from extras import humaneval
from extras.textbook import teacher as teachers
import folio.tokenizer
from folio.configurator import UserError, configure
from prepare.corpus import write_dataset
from prepare.documents import first_line

source = 'builtin'  # builtin, hub (published sets) or api (a teacher that speaks OpenAI's protocol)
raw_chars = 8_000_000  # characters of raw code
pages = 6000  # of the textbook
exercises = 12000
problems = 100  # of held-out compositions
keep = 0.15  # share of the raw code that textbook_filtered keeps
overlap = 13  # words in a row that a document may not share with a problem
vocab_size = 2048
val_share = 0.02  # of the documents of each set
seed = 1337
teacher = 'gpt-4o-mini'  # api: the model's name; OPENAI_BASE_URL and OPENAI_API_KEY say where it is
budget = 5.0  # api: dollars to spend at most; a number of answers, if both prices are 0
price_in = 0.15  # api: dollars for a million tokens of questions, as gpt-4o-mini costs
price_out = 0.6  # api: dollars for a million tokens of answers
concurrency = 8  # api: questions at a time
topics = ''  # api: a JSON file {topic: [subtopic, …]}; empty: the teacher is asked for it
rated = 300  # api: pieces of raw code that the teacher rates, for the classifier
allow_code_execution = False  # api: run the teacher's solutions, each in a process of its own, and drop what fails

HUB = {'raw': ('nampdn-ai/tiny-codes', ('programming_language', 'response')),
       'pages': ('nampdn-ai/tiny-textbooks', ('textbook',)),
       'exercises': ('jinaai/code_exercises', ('problem', 'solution'))}


# ---- Sources ---------------------------------------------------------------------------------------------------------
def standard_library(n_chars, rng):
    """Pieces of about 2,000 characters of Python's own modules, cut between top-level statements, in random order."""
    root, paths = sysconfig.get_paths()['stdlib'], []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - {'site-packages', 'dist-packages', 'test', 'tests', '__pycache__'})
        paths += [os.path.join(folder, name) for name in sorted(names) if name.endswith('.py')]
    pieces = []
    for path in paths:
        with open(path, encoding='utf-8', errors='replace') as f:
            statements, piece = re.split(r'\n(?=(?:def|class|async def|@|if|for|[A-Za-z_]\w* = )\b)', f.read()), ''
        for statement in statements:
            piece += statement + '\n'
            if len(piece) > 2000:
                pieces.append(piece[:8000])
                piece = ''
        pieces += [piece] if piece.strip() else []
    rng.shuffle(pieces)
    return first_chars(pieces, n_chars)


def first_chars(texts, n_chars):
    """The first texts that have n_chars characters between them."""
    taken = []
    for text in texts:
        if n_chars <= 0:
            break
        taken.append(text)
        n_chars -= len(text)
    return taken


def hub_rows(name):
    """The rows of one of the published sets, streamed, those with text; UserError if it cannot be had or has others."""
    from datasets import load_dataset
    repository, columns = HUB[name]
    try:
        rows = load_dataset(repository, split='train', streaming=True)
        for row in rows.shuffle(seed=seed, buffer_size=1000):
            if not set(columns) <= row.keys():
                raise UserError(f'{repository} has the columns {", ".join(row)}; {", ".join(columns)} are expected')
            if all(isinstance(row[column], str) for column in columns):
                yield row
    except UserError:
        raise
    except Exception as e:  # offline, refused, gated, cut short: the hub's errors have no common class
        raise UserError(f'{repository} could not be read ({first_line(e)}); check the network, and whether it asks you '
                        'to accept its terms (then: hf auth login)') from e


def from_hub():
    """(raw code, pages, exercises, no ratings) of the published sets."""
    python = (row['response'] for row in hub_rows('raw') if row['programming_language'] == 'Python')
    raw = first_chars(python, raw_chars)
    textbook = [row['textbook'] for row in itertools.islice(hub_rows('pages'), pages)]
    pairs = [(row['problem'], row['solution']) for row in itertools.islice(hub_rows('exercises'), exercises)]
    for name, got, wanted in (('pages', textbook, pages), ('exercises', pairs, exercises)):
        if len(got) < wanted:
            raise UserError(f'{HUB[name][0]} has {len(got):,} rows; ask for at most so many: --{name}={len(got)}')
    if not raw:
        raise UserError(f'{HUB["raw"][0]} has no rows in Python')
    if (size := sum(map(len, raw))) < raw_chars:
        print(f'notice: {HUB["raw"][0]} has {size:,} characters of Python, not {raw_chars:,}', file=sys.stderr)
    return raw, textbook, pairs, {}


def open_teacher():
    """The teacher, who keeps its answers in a folder. UserError for what would make asking it a waste."""
    if teacher != 'gpt-4o-mini' and (price_in, price_out) == (0.15, 0.6):
        raise UserError(f'what does {teacher} cost? Give --price_in and --price_out, dollars a million tokens; with '
                        '0 for both the budget is a number of answers')
    if allow_code_execution:
        confine.permit(True)
    return teachers.Teacher(teacher, 'data/textbook_teacher', budget, concurrency, price_in, price_out)


def from_api(model, rng):
    """(raw code, pages, exercises, {piece of raw code: rating}) of a teacher."""
    if not allow_code_execution:
        print("the teacher's solutions are checked for their form only; to run their examples as well, each in a "
              'process of its own: --allow_code_execution=True', file=sys.stderr)
    raw = standard_library(raw_chars, rng)
    ratings = dict(zip(raw[:rated], teachers.rate(model, raw[:rated])))
    textbook = teachers.write_textbook(model, pages, seed, topics)
    runs = {'runs': examples_hold} if allow_code_execution else {}
    pairs = teachers.write_exercises(model, exercises, seed, topics, **runs)
    model.close()
    return raw, textbook, pairs, ratings


def examples_hold(prompt, solution):
    """Whether a solution runs and gives what the examples in its docstring say, in a process of its own."""
    name = re.findall(r'^def (\w+)', prompt, re.MULTILINE)[-1]
    check = ('import doctest\nrunner = doctest.DocTestRunner()\n'
             f'runner.run(doctest.DocTestParser().get_doctest({name}.__doc__, globals(), "", None, 0))\n'
             'assert runner.failures == 0 < runner.tries\n')
    return confine.execute(f'{prompt}{solution}\n{check}') == 'passed'


# ---- What is kept ----------------------------------------------------------------------------------------------------
class Quality(nn.Module):
    """Logistic regression on hashed n-grams: the words and signs of a text, each alone and in pairs."""

    def __init__(self, n_features=2**16):
        super().__init__()
        self.weight = nn.EmbeddingBag(n_features, 1, mode='mean')  # the mean of their weights
        self.bias = nn.Parameter(torch.zeros(1))
        nn.init.zeros_(self.weight.weight)

    def forward(self, texts):
        """Log-odds that each text is as good as the good ones, (n,)."""
        bags = []
        for text in texts:
            words = re.findall(r'\w+|[^\w\s]', text[:4000])
            grams = words + [' '.join(pair) for pair in zip(words, words[1:])] or ['']
            bags.append(torch.tensor([zlib.crc32(g.encode()) % self.weight.num_embeddings for g in grams]))
        offsets = torch.tensor([0] + [len(bag) for bag in bags]).cumsum(0)[:-1]
        return self.weight(torch.cat(bags), offsets)[:, 0] + self.bias


def train_classifier(good, bad, rng):
    """(classifier, its accuracy on a tenth of the texts that it was not trained on)."""
    n = min(len(good), len(bad), 2000)
    if n < 10:
        raise UserError(f'{n} texts of each kind are too few to learn from; give more --pages, or a higher --rated')
    labelled = [(text, 1.0) for text in rng.sample(good, n)] + [(text, 0.0) for text in rng.sample(bad, n)]
    rng.shuffle(labelled)
    held_out, labelled = labelled[:n // 5], labelled[n // 5:]
    classifier = Quality()
    optimizer = torch.optim.Adam(classifier.parameters(), lr=0.2)
    for first in range(0, 3 * len(labelled), 64):
        texts, labels = zip(*(labelled[i % len(labelled)] for i in range(first, first + 64)))
        loss = F.binary_cross_entropy_with_logits(classifier(texts), torch.tensor(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    texts, labels = zip(*held_out)
    with torch.no_grad():
        return classifier, ((classifier(texts) > 0) == (torch.tensor(labels) > 0)).double().mean().item()


def best_of(raw, textbook, ratings, rng):
    """The share `keep` of the raw code that a classifier likes best, in the order it had.

    It learns the textbook against raw code; or, if a teacher has rated twenty pieces, the better half of these against
    the other.
    """
    good, bad, what = textbook, raw, 'textbook against raw code'
    ranked = sorted((ratings[text], i) for i, text in enumerate(raw) if ratings.get(text) is not None)
    if len(ranked) >= 20:
        bad, good = ([raw[i] for _, i in half] for half in (ranked[:len(ranked) // 2], ranked[len(ranked) // 2:]))
        what = f'the better of {len(ranked)} rated pieces against the others'
    classifier, accuracy = train_classifier(good, bad, rng)
    print(f'classifier, {what}: {100 * accuracy:.1f} % right on texts that it had not seen')
    with torch.no_grad():
        scores = [s for first in range(0, len(raw), 256) for s in classifier(raw[first:first + 256]).tolist()]
    least = sorted(scores, reverse=True)[:max(1, round(keep * len(raw)))][-1]
    return [text for text, s in zip(raw, scores) if s >= least]


def runs_of_words(text, n):
    """The set of all n words in a row, without signs and capitals."""
    words = re.findall(r'\w+', text.lower())
    return {tuple(words[i:i + n]) for i in range(len(words) - n + 1)}


def decontaminated(documents, tests, what):
    """The documents that share no n-gram with the problems of `tests`; says how many do."""
    forbidden = set().union(*(runs_of_words(p['prompt'] + p['canonical_solution'], overlap) for p in tests))
    clean = [d for d in documents
             if forbidden.isdisjoint(runs_of_words(d if isinstance(d, str) else ''.join(d), overlap))]
    print(f'{what}: {len(documents):,} documents, {len(documents) - len(clean):,} dropped as too like a problem')
    return clean


# ---- Work ------------------------------------------------------------------------------------------------------------
def main():
    if source not in ('builtin', 'hub', 'api'):
        raise UserError(f'source is {source!r}; choose from builtin, hub, api')
    if not (0 < keep <= 1 and 0 < val_share < 1) or min(raw_chars, pages, exercises, problems, overlap) < 1:
        raise UserError('keep and val_share lie between 0 and 1; raw_chars, pages, exercises, problems and overlap are '
                        'at least 1')
    model = open_teacher() if source == 'api' else None
    rng = random.Random(seed)
    held_out = list(generator.compositions(held_out=True))
    rng.shuffle(held_out)
    tests = [generator.problem(held_out[i % len(held_out)], i, rng) for i in range(problems)]
    against = list(tests)
    if source != 'builtin' or os.path.exists('data/downloads/HumanEval.jsonl.gz'):
        against += humaneval.load('humaneval').values()
    else:
        print('HumanEval is not in data/downloads, so texts are compared with the held-out problems alone')
    if source == 'builtin':
        raw, ratings = standard_library(raw_chars, rng), {}
        textbook = list(generator.make(generator.page, pages, False, rng))
        pairs = list(generator.make(generator.exercise, exercises, False, rng))
    else:
        raw, textbook, pairs, ratings = from_hub() if source == 'hub' else from_api(model, rng)
    raw, textbook, pairs = (decontaminated(d, against, name) for name, d in (
        ('raw code', raw), ('textbook', textbook), ('exercises', pairs)))
    pairs = [(a.rstrip(), a[len(a.rstrip()):] + b) for a, b in pairs]  # as the tokens of a whole program have it
    chosen = best_of(raw, textbook, ratings, rng)
    print(f'of the raw code the {len(chosen):,} documents that it likes best join the textbook')
    sample = first_chars(raw, 3_000_000) + first_chars(textbook, 2_000_000)
    tok = folio.tokenizer.train_bpe(sample + first_chars([a + b for a, b in pairs], 1_000_000), vocab_size)
    for name, documents in (('raw', raw), ('filtered', chosen + textbook), ('exercises', pairs)):
        folder = f'data/textbook_{name}'
        documents = rng.sample(documents, len(documents))
        n_val = max(1, round(val_share * len(documents)))
        if len(documents) <= n_val:
            raise UserError(f'{folder} would have {len(documents)} documents; ask for more')
        meta = write_dataset(folder, tok, {'train': documents[n_val:], 'val': documents[:n_val]}, source=source)
        counts = meta['splits']
        print(f'{folder}: {counts["train"]["tokens"]:,} tokens to train on, {counts["val"]["tokens"]:,} to validate')
    humaneval.write_jsonl('data/textbook_exercises/problems.jsonl', tests)
    print(f'data/textbook_exercises/problems.jsonl: {len(tests)} problems of {len(held_out)} held-out compositions')


if __name__ == '__main__':
    configure(globals())
    main()
