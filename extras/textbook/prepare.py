"""
Prepare the data of "Textbooks Are All You Need" (Gunasekar et al. 2023) in miniature.
    python extras/textbook/prepare.py  # all of it is made here, without a network
    python extras/textbook/prepare.py --source=hub  # published sets
    OPENAI_API_KEY=… python extras/textbook/prepare.py --source=api --teacher=gpt-4o-mini

Writes three data sets, with one BPE for all:
- data/textbook_raw: raw code
- data/textbook_filtered: the part of that code which a quality classifier likes best, and textbook
  pages
- data/textbook_exercises: a signature and a docstring as the prompt, of which only the solution is
  learned; next to them problems.jsonl, problems of held-out compositions for extras/humaneval.py

For people to read, textbook_filtered also has chosen.txt and textbook.txt, and textbook_exercises
has exercises.txt: one document after the other.

A document that shares `overlap` words in a row with one of these problems, or with one of
HumanEval's, is removed. study.py, next to this file, runs the study.

Needs folio/, prepare/, extras/humaneval.py, extras/confine.py and the files next to it; for a
teacher the package openai.
"""
import itertools
import os
import random
import re
import sys
import sysconfig
import zlib

sys.path.insert(0, os.path.abspath(__file__ + '/../../..'))  # the root of the checkout
import torch
import torch.nn as nn
import torch.nn.functional as F

import folio.tokenizer
from extras import confine, humaneval
from extras.textbook import generator, lessons
from folio.configurator import UserError, configure, notice, require_at_least, require_choice
from folio.data import write_jsonl
from folio.download import hub_errors
from prepare.corpus import write_dataset

# ---- Settings ------------------------------------------------------------------------------------
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
budget = 5.0  # api: dollars for this teacher; only answers under way can exceed it
price_in = 0.15  # api: dollars for a million tokens of prompts, here gpt-4o-mini's; 0: free
price_out = 0.6  # api: dollars for a million tokens of answers
max_tokens = 1024  # api: of an answer; longer ones are left out
concurrency = 8  # api: prompts asked at once
topics = ''  # api: a JSON file {topic: [subtopic, …]}; empty: the teacher is asked for them
rated = 300  # api: pieces of raw code that the teacher rates, for the classifier
allow_code_execution = False  # api: run each of the teacher's solutions, drop what fails

# The published sets: a repository on the Hugging Face hub, and the columns that are used
HUB = {
    'raw': ('nampdn-ai/tiny-codes', ['programming_language', 'response']),
    'pages': ('nampdn-ai/tiny-textbooks', ['textbook']),
    'exercises': ('jinaai/code_exercises', ['problem', 'solution'])}


# ---- Sources -------------------------------------------------------------------------------------
# Each returns raw code and textbook pages, lists of strings, exercises, a list of (prompt,
# solution), and ratings of some of the raw code, {piece: 1 to 10 or None}.

def from_builtin(rng):
    """Return raw code, pages, exercises and no ratings, all from this machine."""
    raw = standard_library(raw_chars, rng)
    textbook = list(generator.make(generator.page, pages, held_out=False, rng=rng))
    pairs = list(generator.make(generator.exercise, exercises, held_out=False, rng=rng))
    return raw, textbook, pairs, {}


def standard_library(n_chars, rng):
    """Return n_chars characters of Python's own modules in pieces of about 2,000.

    They are cut between statements at the top level, and come in a random order.
    """
    skipped = {'site-packages', 'dist-packages', 'test', 'tests', '__pycache__'}
    pieces = []
    for folder, folders, names in os.walk(sysconfig.get_paths()['stdlib']):
        # In place: os.walk goes into the folders that are left, in this order
        folders[:] = sorted(set(folders) - skipped)
        for name in sorted(names):
            if name.endswith('.py'):
                with open(os.path.join(folder, name), encoding='utf-8', errors='replace') as f:
                    pieces += cut(f.read())
    rng.shuffle(pieces)
    return first_chars(pieces, n_chars)


def cut(program):
    """Return a program in pieces of whole statements; one ends when it has 2,000 characters."""
    statement = r'(?:def|class|async def|@|if|for|[A-Za-z_]\w* = )\b'
    pieces = []
    piece = ''
    for part in re.split(rf'\n(?={statement})', program):
        piece += part + '\n'
        if len(piece) > 2000:
            pieces.append(piece[:8000])  # a single statement can be a table of any length
            piece = ''
    if piece.strip():
        pieces.append(piece)
    return pieces


def first_chars(texts, n_chars):
    """Return as few of the first texts as have n_chars characters in all. texts: any iterable."""
    taken = []
    for text in texts:
        if n_chars <= 0:
            break
        taken.append(text)
        n_chars -= len(text)
    return taken


def from_hub():
    """Return raw code, pages, exercises and no ratings from the published sets. Raise UserError."""
    python_rows = (row for row in hub_rows('raw') if row['programming_language'] == 'Python')
    raw = first_chars((row['response'] for row in python_rows), raw_chars)

    textbook = []
    for row in itertools.islice(hub_rows('pages'), pages):
        textbook.append(row['textbook'])
    require_rows('pages', textbook, pages)

    pairs = []
    for row in itertools.islice(hub_rows('exercises'), exercises):
        pairs.append((row['problem'], row['solution']))
    require_rows('exercises', pairs, exercises)

    if not raw:
        raise UserError(f'{HUB["raw"][0]} has no rows in Python')
    n_chars = sum(len(text) for text in raw)
    if n_chars < raw_chars:
        notice(f'{HUB["raw"][0]} has {n_chars:,} characters of Python, not {raw_chars:,}')
    return raw, textbook, pairs, {}


def hub_rows(name):
    """Yield the rows of a published set that have text, streamed and shuffled.

    Raise UserError if the set cannot be read or has other columns.
    """
    from datasets import load_dataset  # slow to import, and needed for this source alone
    repository, columns = HUB[name]
    remedy = ('check the network, and whether it asks you to accept its terms '
              '(then: hf auth login)')
    with hub_errors(f'{repository} could not be read', remedy):
        rows = load_dataset(repository, split='train', streaming=True)
        for row in rows.shuffle(seed=seed, buffer_size=1000):
            if not set(columns) <= row.keys():
                raise UserError(f'{repository} has the columns {", ".join(row)}; '
                                f'{", ".join(columns)} are expected')
            if all(isinstance(row[column], str) for column in columns):
                yield row


def require_rows(name, rows, n):
    """Raise UserError if a published set has fewer than n rows."""
    if len(rows) < n:
        raise UserError(f'{HUB[name][0]} has {len(rows):,} rows; '
                        f'ask for no more than these: --{name}={len(rows)}')


def open_teacher():
    """Return the teacher, which keeps its answers in data/textbook_teacher.

    Raise UserError if asking would waste money.
    """
    if teacher != 'gpt-4o-mini' and (price_in, price_out) == (0.15, 0.6):
        raise UserError(f'what does {teacher} cost? Give --price_in and --price_out, dollars per '
                        'million tokens, or 0 for both if it is free')
    if allow_code_execution:
        confine.permit(True)
    else:
        notice("the teacher's solutions are checked for their form only; to run their examples as "
               'well, each in a process of its own: --allow_code_execution=True')
    from extras.textbook.teacher import Teacher  # slow to import, and needed for this source alone
    return Teacher(teacher, 'data/textbook_teacher', budget, price_in, price_out,
                   max_tokens=max_tokens, concurrency=concurrency)


def from_api(model, rng):
    """Return raw code, and pages, exercises and ratings of some of that code by a teacher."""
    raw = standard_library(raw_chars, rng)
    combinations = lessons.topics(model, topics)
    ratings = dict(zip(raw[:rated], lessons.rate(model, raw[:rated])))
    textbook = lessons.write_textbook(model, combinations, pages, seed)
    runs = None
    if allow_code_execution:
        runs = examples_hold
    pairs = lessons.write_exercises(model, combinations, exercises, seed, runs)
    model.close()
    return raw, textbook, pairs, ratings


def examples_hold(prompt, solution):
    """Return whether a solution, run in a process of its own, does what its examples say."""
    # The last function of the prompt: the others are helpers, which come before it
    name = re.findall(r'^def (\w+)', prompt, re.MULTILINE)[-1]
    check = f'''
import doctest
runner = doctest.DocTestRunner()
runner.run(doctest.DocTestParser().get_doctest({name}.__doc__, globals(), "", None, 0))
assert runner.tries > 0
assert runner.failures == 0
'''
    return confine.execute(prompt + solution + check) == 'passed'


# ---- The best of the raw code --------------------------------------------------------------------
class Quality(nn.Module):
    """Logistic regression on hashed n-grams: words and signs, each alone and in pairs."""

    def __init__(self, n_features=2**16):
        super().__init__()
        # A text's score is the mean of its n-grams' weights, whatever its length
        self.weight = nn.EmbeddingBag(n_features, 1, mode='mean')
        self.bias = nn.Parameter(torch.zeros(1))
        nn.init.zeros_(self.weight.weight)

    def features(self, text):
        """Return the indices of a text's n-grams, at least one of them, (n,)."""
        words = re.findall(r'\w+|[^\w\s]', text[:4000])
        pairs = [' '.join(pair) for pair in zip(words, words[1:])]
        grams = (words + pairs) or ['']
        # Not hash(), which Python seeds again in each process
        indices = [zlib.crc32(gram.encode()) % self.weight.num_embeddings for gram in grams]
        return torch.tensor(indices)

    def forward(self, texts):
        """Return the log-odds that each text is one of the good ones, (n,)."""
        # EmbeddingBag takes all bags in one tensor, and where each one starts
        bags = [self.features(text) for text in texts]
        ends = torch.tensor([0] + [len(bag) for bag in bags]).cumsum(0)
        starts = ends[:-1]
        return self.weight(torch.cat(bags), starts)[:, 0] + self.bias


def train_classifier(good, bad, rng):
    """Return a classifier, and its accuracy on the tenth of the texts that it was not trained on.

    Raise UserError if there are too few texts.
    """
    n = min(len(good), len(bad), 2000)
    if n < 10:
        raise UserError(f'{n} texts of each kind are too few to learn from; '
                        'give more --pages, or a higher --rated')
    labelled = [(text, 1.0) for text in rng.sample(good, n)]
    labelled += [(text, 0.0) for text in rng.sample(bad, n)]
    rng.shuffle(labelled)
    n_held_out = n // 5  # of 2n texts
    held_out = labelled[:n_held_out]
    labelled = labelled[n_held_out:]

    classifier = Quality()
    optimizer = torch.optim.Adam(classifier.parameters(), lr=0.2)
    # Three epochs in batches of 64; the last batch is filled up from the beginning
    for first in range(0, 3 * len(labelled), 64):
        batch = [labelled[i % len(labelled)] for i in range(first, first + 64)]
        texts, labels = zip(*batch)
        loss = F.binary_cross_entropy_with_logits(classifier(texts), torch.tensor(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    texts, labels = zip(*held_out)
    with torch.no_grad():
        is_right = (classifier(texts) > 0) == (torch.tensor(labels) > 0)
    return classifier, is_right.double().mean().item()


def best_of(raw, textbook, ratings, rng):
    """Return the share `keep` of the raw code that a classifier likes best, in the same order.

    The classifier learns to tell the textbook from raw code; or, if a teacher has rated twenty
    pieces of the code, the better half of these from the other half.
    """
    rated_texts = [text for text in raw if ratings.get(text) is not None]
    if len(rated_texts) >= 20:
        rated_texts.sort(key=ratings.get)
        half = len(rated_texts) // 2
        bad = rated_texts[:half]
        good = rated_texts[half:]
        what = f'the better of {len(rated_texts)} rated pieces against the others'
    else:
        bad = raw
        good = textbook
        what = 'textbook against raw code, which differ in style already'
    classifier, accuracy = train_classifier(good, bad, rng)
    print(f'classifier, {what}: {100 * accuracy:.1f} % right on texts that it had not seen')

    scores = []
    with torch.no_grad():
        for first in range(0, len(raw), 256):  # in batches, for memory's sake
            scores += classifier(raw[first:first + 256]).tolist()
    n_kept = max(1, round(keep * len(raw)))
    threshold = sorted(scores, reverse=True)[n_kept - 1]
    return [text for text, score in zip(raw, scores) if score >= threshold]


# ---- Decontamination -----------------------------------------------------------------------------
def word_ngrams(text, n):
    """Return the set of all n words in a row, without signs and capitals."""
    words = re.findall(r'\w+', text.lower())
    return {tuple(words[i:i + n]) for i in range(len(words) - n + 1)}


def decontaminate(documents, tests, what):
    """Return the documents that share no n-gram with the problems `tests`; print how many do.

    documents: strings, or pairs of a prompt and its solution.
    """
    # Solutions count too: a page may tell the answer without the question
    forbidden = set()
    for test in tests:
        forbidden |= word_ngrams(test['prompt'] + test['canonical_solution'], overlap)
    clean = []
    for document in documents:
        text = document if isinstance(document, str) else ''.join(document)
        if forbidden.isdisjoint(word_ngrams(text, overlap)):
            clean.append(document)
    print(f'{what}: {len(documents):,} documents, '
          f'{len(documents) - len(clean):,} dropped as too similar to a problem')
    return clean


def other_problems():
    """Return HumanEval's problems, to compare documents with them too; [] without a network.

    source = 'builtin' takes them only if they are there already, so that it needs no network.
    """
    if source == 'builtin' and not os.path.exists('data/downloads/HumanEval.jsonl.gz'):
        print('HumanEval is not in data/downloads, '
              'so texts are compared with the held-out problems alone')
        return []
    try:
        return list(humaneval.load('humaneval').values())
    except UserError as e:
        notice(f'{e}; until then texts are compared with the held-out problems alone')
        return []


# ---- Work ----------------------------------------------------------------------------------------
def check_settings():
    """Raise UserError for a setting out of its range."""
    settings = globals()
    require_choice(settings, 'source', ('builtin', 'hub', 'api'))
    require_at_least(1, settings, 'raw_chars', 'pages', 'exercises', 'problems', 'overlap',
                     'max_tokens', 'concurrency')
    if not 0 < keep <= 1:
        raise UserError(f'keep is {keep}; it must be above 0 and at most 1')
    if not 0 < val_share < 1:
        raise UserError(f'val_share is {val_share}; it must lie between 0 and 1')


def write_set(name, tokenizer, documents, rng):
    """Write data/textbook_<name>, its documents shuffled and split. Raise UserError if too few."""
    folder = f'data/textbook_{name}'
    # Shuffle: they come in the order of their sources, and the first ones are for validation
    documents = rng.sample(documents, len(documents))
    n_val = max(1, round(val_share * len(documents)))
    if len(documents) <= n_val:
        raise UserError(f'{folder} would have {len(documents)} documents; ask for more')
    splits = {'train': documents[n_val:], 'val': documents[:n_val]}
    meta = write_dataset(folder, tokenizer, splits, source=source)
    n_train_tokens = meta['splits']['train']['tokens']
    n_val_tokens = meta['splits']['val']['tokens']
    print(f'{folder}: {n_train_tokens:,} tokens to train on, {n_val_tokens:,} to validate')


def write_text(path, documents):
    """Write documents into a file for people to read: a rule stands between two documents."""
    with open(path, 'w', encoding='utf-8') as f:
        f.write(f'\n{"-" * 80}\n'.join(documents))


def move_white_space(prompt, solution):
    """Return the pair with the prompt's last white space at the beginning of the solution.

    A BPE joins white space to what follows: cut there, both have the tokens of the whole program.
    """
    stripped = prompt.rstrip()
    return stripped, prompt[len(stripped):] + solution


def make_problems(rng):
    """Return problems of the held-out compositions, and how many of these there are."""
    held_out = list(generator.compositions(held_out=True))
    rng.shuffle(held_out)
    # With more problems than compositions, each composition has another turn, in other words
    tests = []
    for number in range(problems):
        composition = held_out[number % len(held_out)]
        tests.append(generator.problem(composition, number, rng))
    return tests, len(held_out)


def train_tokenizer(raw, textbook, pairs):
    """Return one BPE for all three sets, learned from some of each: so models can be compared."""
    programs = [prompt + solution for prompt, solution in pairs]
    sample = first_chars(raw, 3_000_000)
    sample += first_chars(textbook, 2_000_000)
    sample += first_chars(programs, 1_000_000)
    return folio.tokenizer.train_bpe(sample, vocab_size)


def main():
    check_settings()
    # The teacher first: what is wrong with its settings is said before any work is done
    model = open_teacher() if source == 'api' else None
    rng = random.Random(seed)

    tests, n_compositions = make_problems(rng)
    forbidden = tests + other_problems()
    if source == 'builtin':
        raw, textbook, pairs, ratings = from_builtin(rng)
    elif source == 'hub':
        raw, textbook, pairs, ratings = from_hub()
    else:
        raw, textbook, pairs, ratings = from_api(model, rng)
    raw = decontaminate(raw, forbidden, 'raw code')
    textbook = decontaminate(textbook, forbidden, 'textbook')
    pairs = decontaminate(pairs, forbidden, 'exercises')
    pairs = [move_white_space(prompt, solution) for prompt, solution in pairs]
    chosen = best_of(raw, textbook, ratings, rng)
    print(f'of the {len(raw):,} documents of raw code the {len(chosen):,} that it likes best join '
          'the textbook')

    tokenizer = train_tokenizer(raw, textbook, pairs)
    write_set('raw', tokenizer, raw, rng)
    write_set('filtered', tokenizer, chosen + textbook, rng)
    write_set('exercises', tokenizer, pairs, rng)
    write_text('data/textbook_filtered/chosen.txt', chosen)
    write_text('data/textbook_filtered/textbook.txt', textbook)
    write_text('data/textbook_exercises/exercises.txt', map(''.join, pairs))
    write_jsonl('data/textbook_exercises/problems.jsonl', tests)
    print(f'data/textbook_exercises/problems.jsonl: {len(tests)} problems '
          f'of {n_compositions} held-out compositions')


if __name__ == '__main__':
    configure(globals())
    main()
