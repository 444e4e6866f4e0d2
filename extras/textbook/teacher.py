"""
A teacher: a model behind any OpenAI-compatible endpoint, asked for textbook pages, exercises and ratings.
    OPENAI_API_KEY=... python prepare/textbook/prepare.py --source=api --teacher=gpt-4o-mini

The endpoint is OPENAI_BASE_URL, or OpenAI's. folder/answers.jsonl has a line for each request, with its highest cost,
written before it is sent, and one with its real cost and answer as it comes. So a run that is killed, and started
again, asks for nothing twice but what was under way at the kill, of which it takes the highest cost for spent.
"""
import ast
import collections
import email.utils
import hashlib
import json
import os
import queue
import random
import re
import sys
import textwrap
import threading
import time
import warnings

import requests
import urllib3
from tqdm import tqdm

from folio.configurator import UserError
from prepare.corpus import only_one

BACKOFF = 1.0  # seconds before a second try, doubled before each further one
TIMEOUT = (10, 300)  # seconds to connect, and for the answer
PROFESSIONS = ('accountant actor architect astronomer baker beekeeper biologist carpenter chemist composer economist '
               'farmer firefighter geologist journalist librarian nurse pilot sailor shopkeeper').split()
TOPICS = 'List {n} topics of a Python course, from first steps to advanced ones. Answer with a JSON list of strings.'
SUBTOPICS = ('List {n} subtopics of "{topic}" in a Python course, each of which could fill a page. Answer with a JSON '
             'list of strings.')
PAGE = ('Write a page of a Python textbook on "{subtopic}" (chapter "{topic}") for a reader who works as {profession}. '
        'Explain one idea step by step in plain words, with short, complete examples of code and what they print.')
EXERCISE = ('Write an exercise on "{subtopic}" ("{topic}") from the work of the following profession: {profession}. '
            'Answer with one block of Python: imports, then one function with type hints, a docstring that says what '
            'it returns and has two or three doctest examples, and a correct solution. Standard library only.')
RATE = ('How much does a beginner learn about Python from the following text? Consider clarity, completeness and '
        'correctness. Answer with one number from 1 (nothing) to 10 (a model textbook) and nothing else.\n\n{text}')


class Teacher:
    """One model, its answers, and what was spent on them. One at a time works in a folder, until close().

    budget: US dollars, of price_in and price_out dollars for a million tokens; answers, where both prices are 0. It is
    kept as long as the endpoint keeps to max_tokens; answers that got lost are counted as if they had come.
    """

    def __init__(self, model, folder, budget, concurrency=8, price_in=0.0, price_out=0.0, max_tokens=1024,
                 temperature=1.0, tries=6):
        base = os.environ.get('OPENAI_BASE_URL', '').strip()
        key = os.environ.get('OPENAI_API_KEY', '').strip()
        if base and not base.startswith(('http://', 'https://')):
            raise UserError(f'OPENAI_BASE_URL is {base}; it takes an address such as http://127.0.0.1:8000/v1')
        if not (key or base) or not (key.isascii() and key.isprintable()):
            raise UserError('set OPENAI_API_KEY to your key, or OPENAI_BASE_URL to an endpoint that wants none')
        if min(concurrency, max_tokens, tries) < 1 or min(budget, price_in, price_out) < 0:
            raise UserError('concurrency, max_tokens and tries are at least 1, budget and prices at least 0')
        self.url, self.headers = (base or 'https://api.openai.com/v1').rstrip('/') + '/chat/completions', {}
        self.headers |= {'Authorization': f'Bearer {key}'} if key else {}
        self.model, self.budget, self.concurrency, self.tries = model, budget, concurrency, tries
        self.prices, self.max_tokens, self.temperature = (price_in, price_out), max_tokens, temperature
        self.answers, self.costs, self.spent, self.under_way, self.failures, self.in_a_row = {}, {}, 0.0, 0, 0, 0
        self.changed, self.stop, self.over, self.why = threading.Condition(), threading.Event(), False, ''
        os.makedirs(folder, exist_ok=True)
        self.lock = only_one(os.path.join(folder, 'answers.lock'))
        self.file = open(os.path.join(folder, 'answers.jsonl'), 'a+b')
        self.file.seek(0)
        content = self.file.read()
        self.file.truncate(content.rfind(b'\n') + 1)  # a kill may have torn the last line
        for i, line in enumerate(content.split(b'\n')[:-1], 1):
            try:
                self.count(json.loads(line))
            except (ValueError, KeyError, TypeError):
                raise UserError(f'{self.file.name}, line {i} is damaged; remove that line') from None

    def close(self):
        self.file.close()
        self.lock.close()

    def key(self, prompt):
        return hashlib.sha256(json.dumps([self.model, prompt]).encode()).hexdigest()[:32]

    def price(self, tokens_in, tokens_out):
        return (tokens_in * self.prices[0] + tokens_out * self.prices[1]) / 1e6 if any(self.prices) else 1.0

    def count(self, entry):
        """Of a request's lines only the last counts."""
        self.spent += entry['cost'] - self.costs.get(entry['request'], 0.0)
        self.costs[entry['request']] = entry['cost']
        if 'text' in entry:
            self.answers[entry['key']] = entry['text']

    def write(self, entry):
        self.file.write(json.dumps(entry).encode() + b'\n')
        self.file.flush()
        os.fsync(self.file.fileno())
        self.count(entry)

    def reserve(self, prompt):
        """The entry of a request about to be sent; None if the budget has no room for it or the run is stopping."""
        cost = self.price(len(prompt.encode('utf-8', 'replace')) + 100, self.max_tokens)  # no token is under a byte
        with self.changed:
            while self.spent + cost > self.budget and self.under_way and not self.stop.is_set():
                self.changed.wait(1.0)  # what is under way may turn out cheaper
            self.over = self.over or self.spent + cost > self.budget
            if self.over or self.stop.is_set():
                return None
            entry = {'request': os.urandom(8).hex(), 'cost': cost}
            self.write(entry)
            self.under_way += 1
            return entry

    def settle(self, entry):
        with self.changed:
            self.under_way -= 1
            self.failures += 'text' not in entry
            self.in_a_row = 0 if 'text' in entry else self.in_a_row + 1
            self.write(entry)
            self.changed.notify_all()
        self.came.put(())

    def post(self, session, prompt, entry):
        """Send a request and complete its entry; returns (why there is no text, seconds to wait). UserError."""
        body = {'model': self.model, 'messages': [{'role': 'user', 'content': prompt}], 'max_tokens': self.max_tokens,
                'temperature': self.temperature}
        try:
            response = session.post(self.url, json=body, headers=self.headers, timeout=TIMEOUT)
        except requests.RequestException as e:
            unsent = urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError
            if isinstance(getattr(e.args[0] if e.args else e, 'reason', None), unsent):
                entry['cost'] = 0.0
            return f'{type(e).__name__} at {self.url}', 0.0
        status, said = response.status_code, ' '.join(response.text.split())[:200]
        if status != 200:
            entry['cost'] = 0.0
            if 400 <= status < 500 and (status not in (408, 409, 425, 429) or 'insufficient_quota' in said):
                check = ('OPENAI_API_KEY and its credit' if status in (401, 403, 429) else
                         'the name of the teacher and OPENAI_BASE_URL')
                raise UserError(f'HTTP {status} for {self.model} at {self.url}; check {check}: {said}')
            return f'HTTP {status}: {said}', seconds_of(response.headers.get('Retry-After', ''))
        try:
            answer = response.json()
            text, usage = answer['choices'][0]['message']['content'] or '', answer.get('usage') or {}
            tokens = [usage.get('prompt_tokens'), usage.get('completion_tokens')]
            entry['cost'] = self.price(*tokens) if all(type(n) is int and n >= 0 for n in tokens) else entry['cost']
            if text.strip():
                entry |= {'key': self.key(prompt), 'model': self.model, 'prompt': prompt, 'usage': usage,
                          'text': text.encode('utf-8', 'replace').decode()}
            return 'an empty answer', 0.0
        except (ValueError, LookupError, TypeError, AttributeError):
            return f'a malformed answer: {said}', 0.0

    def answer(self, session, prompt):
        """The answer to a prompt, or None if there is none after so many tries."""
        for n in range(self.tries):
            if (entry := self.reserve(prompt)) is None:
                return None
            try:
                why, pause = self.post(session, prompt, entry)
            finally:
                self.settle(entry)
            if 'text' in entry:
                return entry['text']
            self.why = why
            if n + 1 < self.tries:
                self.stop.wait(max(pause, BACKOFF * 2**n * random.uniform(0.5, 1.5)))
        if self.in_a_row >= 8 * self.tries and not self.stop.is_set():
            raise UserError(f'{self.in_a_row} requests on end had no answer, the last for {why}; check OPENAI_BASE_URL '
                            'and the network: the same command goes on')
        return None

    def work(self, prompts):
        try:
            with requests.Session() as session:
                while not (self.over or self.stop.is_set()):
                    with self.changed:
                        prompt = next(prompts, None)
                    if prompt is None:
                        break
                    self.came.put((prompt, self.answer(session, prompt)))
        except Exception as e:  # for the thread that asked
            self.came.put((None, e))
        self.came.put(None)

    def ask(self, prompts):
        """(prompt, answer) for each prompt that gets one, as they come; those in the file are not asked for again."""
        prompts = list(dict.fromkeys(prompts))
        new = [prompt for prompt in prompts if self.key(prompt) not in self.answers]
        yield from [(prompt, self.answers[k]) for prompt in prompts if (k := self.key(prompt)) in self.answers]
        self.stop, self.over, self.came, todo = threading.Event(), False, queue.SimpleQueue(), iter(new)
        threads = [threading.Thread(target=self.work, args=(todo,), daemon=True)
                   for _ in range(min(self.concurrency, len(new)))]
        bar = tqdm(total=len(new), unit=' answers', disable=not new)
        try:
            for thread in threads:
                thread.start()
            running, gone = len(threads), 0
            while running:
                item = self.came.get()  # (prompt, answer); () after each request; None from a thread that ends
                running -= item is None
                if item and isinstance(item[1], Exception):
                    raise item[1]
                gone += bool(item) and item[1] is None
                bar.set_postfix_str(f'{self.failures} failures, ' + (f'${self.spent:.4f}' if any(self.prices) else
                                                                     f'{self.spent:.0f} spent of {self.budget:.0f}'))
                if item and item[1] is not None:
                    bar.update()
                    yield item
        except KeyboardInterrupt:
            print('\nstopping when what is under way has come; Ctrl-C again: without it', file=sys.stderr)
            raise
        finally:
            self.stop.set()
            for thread in threads:
                thread.join()
            bar.close()
        if self.over:
            print(f'the budget of {self.budget:g} has no room for another answer: {len(new) - bar.n} of {len(new)} '
                  'prompts have none; with a larger one the same command goes on', file=sys.stderr)
        elif gone:
            print(f'{gone} prompts were given up after {self.tries} tries each, the last for {self.why}; the same '
                  'command tries them again', file=sys.stderr)


def seconds_of(retry_after):
    """Seconds that a Retry-After asks to wait, a number or a date, but at most an hour; 0 if it is neither.

    >>> seconds_of('20')
    20.0
    """
    try:
        seconds = float(retry_after)
    except ValueError:
        date = email.utils.parsedate_tz(retry_after)
        seconds = email.utils.mktime_tz(date) - time.time() if date else 0.0
    return min(3600.0, max(0.0, seconds))


# ---- What it is asked for --------------------------------------------------------------------------------------------
def parse_list(answer):
    """The strings of a JSON list in an answer, or else its lines; of those, where some are bulleted, these alone."""
    try:
        items = json.loads(answer[answer.index('['):answer.rindex(']') + 1])
    except ValueError:
        lines = [line.strip() for line in answer.splitlines() if line.strip()]
        items = [line for line in lines if re.match(r'[-*•]\s|\d+[.)]\s', line)] or lines
        items = [re.sub(r'^([-*•]|\d+[.)])\s+', '', line) for line in items]
    items = [item.strip(' \t*`"\',') for item in items if isinstance(item, str)]
    return list(dict.fromkeys(item for item in items if 0 < len(item) <= 100))


def topics(teacher, n, path=''):
    """At least n combinations {'topic', 'subtopic', 'profession'}, if the teacher names as many topics as it is asked.

    path: a JSON file {topic: [subtopic, ...]} to take instead, of any size. UserError.
    """
    if path:
        try:
            with open(path, encoding='utf-8') as f:
                tree = json.load(f)
            if not all(isinstance(name, str) for names in tree.values() for name in names) or str in map(
                    type, tree.values()):
                raise ValueError('its subtopics are not lists of strings')
        except (OSError, ValueError, TypeError, AttributeError) as e:
            raise UserError(f'{path} is no JSON of the form {{"topic": ["subtopic", ...]}}: {e}') from None
    else:
        # Few professions a subtopic, for more to write about; in steps, so that a somewhat larger n keeps the tree
        side = next(side for side in (3, 5, 10, 20, 40) if 4 * side * side >= n or side == 40)
        [names] = [parse_list(text) for _, text in teacher.ask([TOPICS.format(n=side)])] or [[]]
        asked = {SUBTOPICS.format(n=side, topic=name): name for name in names}
        came = {asked[prompt]: parse_list(text) for prompt, text in teacher.ask(asked)}
        tree = {name: came[name] for name in names if name in came}  # in one order, however they came
    if not any(tree.values()):
        raise UserError(f'no topics in {path}' if path else 'the teacher named no topics; give a file of them, or a '
                        'larger budget')
    return [{'topic': topic, 'subtopic': subtopic, 'profession': profession}
            for topic, names in tree.items() for subtopic in names for profession in PROFESSIONS]


def collect(teacher, template, n, seed, path, parse, what):
    """What `parse` makes of up to n answers, in the order of the prompts; it raises ValueError(why) for one to drop.

    parse(answer) gives (result, form); of those that share a form the first is kept.
    """
    combinations = [template.format(**c) for c in topics(teacher, n, path)]
    # In an order in which those of a larger n, or of a tree that got larger, do not displace those asked before
    prompts = sorted(combinations, key=lambda prompt: hashlib.sha256(f'{seed} {prompt}'.encode()).digest())[:n]
    came, kept, dropped = dict(teacher.ask(prompts)), {}, collections.Counter()
    for prompt in (prompt for prompt in prompts if prompt in came):
        try:
            result, form = parse(came[prompt])
            dropped['a repeat'] += form in kept
            kept.setdefault(form, result)
        except ValueError as e:
            dropped[str(e)] += 1
    print(f'{what}: asked for {n:,}, {len(combinations):,} combinations, {len(came):,} answers, {len(kept):,} kept'
          + ''.join(f'; {why}: {count:,}' for why, count in (+dropped).most_common()))
    return list(kept.values())


def write_textbook(teacher, n, seed, path):
    """Up to n pages, list of str, each of another combination of a seeded shuffle. path: see topics."""
    return collect(teacher, PAGE, n, seed, path, lambda text: (text.strip(), ' '.join(text.split())), 'textbook pages')


def parse_exercise(answer):
    """((prompt, solution), form) of the first block of an answer with a documented function. ValueError if none has.

    The prompt is the block down to the docstring's end, the solution the rest of the function; the form is the function
    without docstring, comments and spacing.
    """
    why = 'no function documented with examples'
    blocks = re.findall(r'```[ \w]*\n(.*?)(?:```|\Z)', answer := answer.replace('\r\n', '\n'), re.DOTALL)
    for block in map(textwrap.dedent, blocks or [answer]):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                compile(block, 'answer', 'exec', dont_inherit=True)
                tree = ast.parse(block)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            why = 'does not compile'
            continue
        for node in reversed(tree.body):  # what it calls comes first
            if (isinstance(node, ast.FunctionDef) and '>>>' in (ast.get_docstring(node) or '') and len(node.body) > 1
                    and node.body[1].lineno > node.body[0].end_lineno):
                lines, middle = block.split('\n'), node.body.pop(0).end_lineno
                texts = lines[:middle], lines[middle:node.end_lineno]
                try:
                    return tuple('\n'.join(text) + '\n' for text in texts), ast.unparse(node)
                except RecursionError:
                    why = 'too deeply nested'
    raise ValueError(why)


def write_exercises(teacher, n, seed, path, runs=lambda prompt, solution: True):
    """Up to n exercises, list of (prompt, solution): a function down to its docstring's end, and the rest of it.

    runs(prompt, solution): whether it does what its examples say, for the caller knows how to run strangers' code.
    """
    def parse(answer):
        exercise, form = parse_exercise(answer)
        if not runs(*exercise):
            raise ValueError('does not run as its examples say')
        return exercise, form
    return collect(teacher, EXERCISE, n, seed, path, parse, 'exercises')


def rate(teacher, texts):
    """How much each text (its first 4,000 characters) teaches, 1 to 10; None where the teacher gives no such number."""
    prompts = [RATE.format(text=text[:4000]) for text in texts]
    came = dict(teacher.ask(prompts))
    return [parse_rating(came.get(prompt, '')) for prompt in prompts]


def parse_rating(answer):
    """The number out of ten, or named rating or score, or else the last one: parse_rating('Rating: 7 of 10') is 7.0."""
    for pattern in (r'(\d+(?:\.\d+)?)\W*(?:/|out of|of)\s*10\b', r'(?i)(?:rating|score)\D{0,20}(\d+(?:\.\d+)?)',
                    r'(\d+(?:\.\d+)?)\D*$'):
        if match := re.search(pattern, answer):
            return float(match[1]) if 1 <= float(match[1]) <= 10 else None
    return None
