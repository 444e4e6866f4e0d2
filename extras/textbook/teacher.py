"""
Ask a teacher, a model behind any OpenAI-compatible endpoint, for pages, exercises and ratings.
    OPENAI_API_KEY=… python extras/textbook/prepare.py --source=api --teacher=gpt-4o-mini

The endpoint is OPENAI_BASE_URL or, without one, OpenAI's own. Every request leaves two lines in
folder/answers.jsonl: one before it is sent, with the most that it can cost, and one when it ends,
with its real cost and its answer. So a run that was killed, and is started again, repeats only the
requests that were under way at the kill, and counts each of those at the most it can have cost.

Needs folio/ and prepare/corpus.py.
"""
import ast
import collections
import email.utils
import hashlib
import json
import math
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
from folio.log import only_one

BACKOFF = 1.0  # seconds before the second try, doubled before each further one
TIMEOUT = (10, 300)  # seconds to connect, and to wait for the answer

# The prompts. Answers are found again by the prompt that they answer: whoever changes one of these
# pays for all its answers anew.
PROFESSIONS = [
    'accountant', 'actor', 'architect', 'astronomer', 'baker', 'beekeeper', 'biologist',
    'carpenter', 'chemist', 'composer', 'economist', 'farmer', 'firefighter', 'geologist',
    'journalist', 'librarian', 'nurse', 'pilot', 'sailor', 'shopkeeper']
TOPICS = (
    'List {n} topics of a Python course, from first steps to advanced ones. Answer with a JSON '
    'list of strings.')
SUBTOPICS = (
    'List {n} subtopics of "{topic}" in a Python course, each of which could fill a page. Answer '
    'with a JSON list of strings.')
PAGE = (
    'Write a page of a Python textbook on "{subtopic}" (chapter "{topic}") for a reader who works '
    'as {profession}. Explain one idea step by step in plain words, with short, complete examples '
    'of code and what they print.')
EXERCISE = (
    'Write an exercise on "{subtopic}" ("{topic}") from the work of the following profession: '
    '{profession}. Answer with one block of Python: imports, then one function with type hints, a '
    'docstring that says what it returns and has two or three doctest examples, and a correct '
    'solution. Standard library only.')
RATE = (
    'How much does a beginner learn about Python from the following text? Consider clarity, '
    'completeness and correctness. Answer with one number from 1 (nothing) to 10 (a model '
    'textbook) and nothing else.\n\n{text}')


# ---- Asking --------------------------------------------------------------------------------------
class Teacher:
    """One model, the answers it gave, and what they cost.

    folder: where answers.jsonl is kept. Only one Teacher at a time may use it, until close().
    budget: US dollars to spend at most, at price_in and price_out dollars per million tokens. If
        both prices are 0, it is a number of answers. It is kept as long as the endpoint respects
        max_tokens; a request whose answer got lost is counted as if it had been answered.
    tries: requests per prompt before it is given up.
    """

    def __init__(self, model, folder, budget, concurrency=8, price_in=0.0, price_out=0.0,
                 max_tokens=1024, temperature=1.0, tries=6):
        self.url, self.api_key = endpoint()
        self.address = self.url.rpartition('@')[2]  # to be shown: without a password
        if min(concurrency, max_tokens, tries) < 1:
            raise UserError('concurrency, max_tokens and tries must be at least 1')
        if min(budget, price_in, price_out) < 0:
            raise UserError('budget and prices must be at least 0')
        self.model = model
        self.budget = budget
        self.concurrency = concurrency
        self.price_in = price_in
        self.price_out = price_out
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.tries = tries

        # The threads share this; whoever changes it holds the lock of self.changed
        self.changed = threading.Condition()
        self.answers = {}  # key of a prompt -> text
        self.cut = {}  # key of a prompt -> the max_tokens that its answer did not fit in
        self.costs = {}  # id of a request -> its cost
        self.spent = 0.0  # their sum
        self.under_way = 0  # requests sent and not answered yet
        self.failures = 0  # requests that brought no text
        self.failures_in_a_row = 0

        self.last_failure = ''  # for a message only, so any thread may set it

        # These belong to one call of ask(), which sets them anew
        self.stop = threading.Event()  # tells the threads to finish
        self.over_budget = False
        self.events = queue.SimpleQueue()  # what the threads report: see work()

        os.makedirs(folder, exist_ok=True)
        self.lock = only_one(os.path.join(folder, 'answers.lock'))
        self.file = open(os.path.join(folder, 'answers.jsonl'), 'a+b')
        self.read_file()

    def close(self):
        self.file.close()
        self.lock.release()

    def key(self, prompt):
        """Return the key of this model's answer to a prompt, 32 hexadecimal digits."""
        return hashlib.sha256(json.dumps([self.model, prompt]).encode()).hexdigest()[:32]

    def has_prices(self):
        return self.price_in > 0 or self.price_out > 0

    def cost(self, tokens_in, tokens_out):
        """Return the cost of an answer in dollars, or 1 where the budget counts answers."""
        if not self.has_prices():
            return 1.0
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    # ---- The file ----

    def read_file(self):
        """Take in the answers and costs of earlier runs. Raise UserError for a damaged line."""
        self.file.seek(0)
        content = self.file.read()
        self.file.truncate(content.rfind(b'\n') + 1)  # a kill may have torn the last line
        for number, line in enumerate(content.split(b'\n')[:-1], start=1):
            try:
                self.count(json.loads(line))
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(
                    f'{self.file.name}, line {number} is damaged; remove that line') from None

    def count(self, entry):
        """Add an entry to the answers and costs. The second of a request replaces the first."""
        request = entry['request']
        cost = float(entry['cost'])
        if not (math.isfinite(cost) and isinstance(entry.get('text', ''), str)):
            raise ValueError('no cost, or no text')
        self.spent += cost - self.costs.get(request, 0.0)
        self.costs[request] = cost
        if 'text' in entry:
            self.answers[entry['key']] = entry['text']
        if 'cut' in entry:
            self.cut[entry['key']] = entry['cut']

    def write(self, entry):
        """Append an entry to the file, and count it."""
        self.file.write(json.dumps(entry).encode() + b'\n')
        # On disk before the request is sent: money that is spent must not be forgotten
        self.file.flush()
        os.fsync(self.file.fileno())
        self.count(entry)

    # ---- One request: reserve, post, settle ----

    def reserve(self, prompt):
        """Return the entry of a request that may now be sent, at the most that it can cost.

        Return None if the budget has no room for it or the run is stopping.
        """
        # No token is shorter than a byte; 100 is for those that the endpoint puts around the prompt
        most_tokens_in = len(prompt.encode('utf-8', 'replace')) + 100
        most = self.cost(most_tokens_in, self.max_tokens)
        with self.changed:
            # Requests under way may turn out cheaper than what was reserved for them
            while (self.spent + most > self.budget and self.under_way > 0
                   and not self.stop.is_set()):
                self.changed.wait(1.0)
            if self.spent + most > self.budget:
                self.over_budget = True
            if self.over_budget or self.stop.is_set():
                return None
            entry = {'request': os.urandom(8).hex(), 'cost': most}
            self.write(entry)
            self.under_way += 1
            return entry

    def post(self, session, prompt, entry):
        """Send a request, and complete its entry by the real cost and the text, if one came.

        Return (why there is no text, seconds that the endpoint wants us to wait). Raise UserError
        for what a further try would not mend, such as a wrong key.
        """
        body = {'model': self.model, 'messages': [{'role': 'user', 'content': prompt}],
                'max_tokens': self.max_tokens, 'temperature': self.temperature}
        # A function: to a header that was given, requests would prefer what .netrc says.
        auth = self.authorize if self.api_key else None
        try:
            response = session.post(self.url, json=body, auth=auth, timeout=TIMEOUT)
        except requests.RequestException as error:
            # Without a connection nothing was asked. If one broke later, we may have to pay.
            if never_connected(error):
                entry['cost'] = 0.0
            return f'{type(error).__name__} at {self.address}', 0.0
        excerpt = self.excerpt(response.text)
        if response.status_code != 200:
            entry['cost'] = 0.0
            self.raise_if_permanent(response.status_code, excerpt)
            pause = seconds_of(response.headers.get('Retry-After', ''))
            return f'HTTP {response.status_code}: {excerpt}', pause
        try:
            self.complete(entry, prompt, response.json())
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return f'a malformed answer: {excerpt}', 0.0
        return 'an empty answer', 0.0  # the reason only where the entry has no text

    def authorize(self, request):
        """Put the key into a request, and return it."""
        request.headers['Authorization'] = f'Bearer {self.api_key}'
        return request

    def excerpt(self, text):
        """Return how an answer begins, in one line without the key, which some endpoints repeat."""
        if self.api_key:
            text = text.replace(self.api_key, '…')
        return ' '.join(text.split())[:200]

    def raise_if_permanent(self, status, excerpt):
        """Raise UserError for an HTTP status that will be the same however often we try."""
        if not 400 <= status < 500:
            return
        # Timeout, conflict, too early, too many requests. 429 also says that the credit is used up.
        is_temporary = status in (408, 409, 425, 429) and 'insufficient_quota' not in excerpt
        if is_temporary:
            return
        if status in (401, 403, 429):
            check = 'OPENAI_API_KEY and its credit'
        else:
            check = 'the name of the teacher and OPENAI_BASE_URL'
        raise UserError(f'HTTP {status} for {self.model} at {self.address}; check {check}: '
                        f'{excerpt}')

    def complete(self, entry, prompt, answer):
        """Put the real cost of an answer, decoded JSON, and its text if it has one, in the entry.

        Raise one of several errors if the JSON has another shape than it should.
        """
        choice = answer['choices'][0]
        text = choice['message']['content'] or ''
        usage = answer.get('usage') or {}
        tokens_in = usage.get('prompt_tokens')
        tokens_out = usage.get('completion_tokens')
        # Without credible counts the highest cost stands
        if all(type(n) is int and n >= 0 for n in (tokens_in, tokens_out)):
            entry['cost'] = self.cost(tokens_in, tokens_out)
        if choice.get('finish_reason') == 'length':
            # Half a page, or half a function: worse than none.
            entry['key'] = self.key(prompt)
            entry['cut'] = self.max_tokens
        elif text.strip():
            entry['key'] = self.key(prompt)
            entry['model'] = self.model
            entry['prompt'] = prompt
            entry['usage'] = usage
            entry['text'] = text.encode('utf-8', 'replace').decode()  # no lone surrogates

    def settle(self, entry):
        """Write the entry of a request that has ended, and wake those that wait for its budget."""
        with self.changed:
            self.under_way -= 1
            if 'text' in entry or 'cut' in entry:
                self.failures_in_a_row = 0
            else:
                self.failures += 1
                self.failures_in_a_row += 1
            self.write(entry)
            self.changed.notify_all()
        self.events.put(('request', None, None))

    # ---- Many prompts ----

    def answer(self, session, prompt):
        """Return the answer to a prompt, or None if no try brought one or the budget is used up.

        Raise UserError if the endpoint does not seem to answer anybody.
        """
        for attempt in range(self.tries):
            entry = self.reserve(prompt)
            if entry is None:
                return None
            try:
                failure, pause = self.post(session, prompt, entry)
            finally:
                # After an exception too: other threads wait for what was reserved
                self.settle(entry)
            if 'text' in entry:
                return entry['text']
            if 'cut' in entry:
                return None  # another one would be as long, and as dear
            self.last_failure = failure
            if attempt + 1 < self.tries:
                # The random factor keeps the threads from coming back all at once
                backoff = BACKOFF * 2**attempt * random.uniform(0.5, 1.5)
                self.stop.wait(max(pause, backoff))
        if self.failures_in_a_row >= 8 * self.tries and not self.stop.is_set():
            raise UserError(
                f'{self.failures_in_a_row} requests in a row had no answer, the last for '
                f'{failure}; check OPENAI_BASE_URL and the network, then run the same '
                'command again: it goes on')
        return None

    def work(self, prompts):
        """Answer prompts of an iterator that all threads share; this is what one thread does.

        It puts triples in self.events: ('answer', prompt, text), ('no answer', prompt, None),
        ('error', None, exception) and, when it ends, ('end of thread', None, None). settle() adds
        ('request', None, None) after each request, for the progress bar.
        """
        try:
            with requests.Session() as session:
                while not (self.over_budget or self.stop.is_set()):
                    with self.changed:  # an iterator is not safe to share without a lock
                        prompt = next(prompts, None)
                    if prompt is None:
                        break
                    text = self.answer(session, prompt)
                    event = 'no answer' if text is None else 'answer'
                    self.events.put((event, prompt, text))
        except Exception as error:  # raised again in the thread that asked
            self.events.put(('error', None, error))
        self.events.put(('end of thread', None, None))

    def ask(self, prompts):
        """Yield (prompt, answer) for each prompt that gets an answer, as the answers come.

        Those that are in the file come first, and are not asked for again; nor are those whose
        answers did not fit in max_tokens.
        """
        known = {}
        new = []
        for prompt in dict.fromkeys(prompts):  # each one once
            key = self.key(prompt)
            if key in self.answers:
                known[prompt] = self.answers[key]
            elif self.cut.get(key, 0) < self.max_tokens:
                new.append(prompt)
        yield from known.items()
        if new:
            yield from self.ask_new(new)

    def ask_new(self, prompts):
        """Yield (prompt, answer) from threads that ask the endpoint, and say what is missing."""
        self.stop = threading.Event()
        self.over_budget = False
        self.events = queue.SimpleQueue()
        todo = iter(prompts)
        # Daemons, so that a second Ctrl-C, while we wait for them below, ends the program
        threads = [threading.Thread(target=self.work, args=(todo,), daemon=True)
                   for _ in range(min(self.concurrency, len(prompts)))]
        n_running = len(threads)
        n_given_up = 0
        bar = tqdm(total=len(prompts), unit=' answers')
        try:
            for thread in threads:
                thread.start()
            while n_running > 0:
                event, prompt, value = self.events.get()
                if event == 'error':
                    raise value
                if event == 'end of thread':
                    n_running -= 1
                if event == 'no answer' and self.key(prompt) not in self.cut:
                    n_given_up += 1
                bar.set_postfix_str(self.progress())
                if event == 'answer':
                    bar.update()
                    yield prompt, value
        except KeyboardInterrupt:
            print('\nstopping when the requests under way have ended; Ctrl-C again stops at once',
                  file=sys.stderr)
            raise
        finally:
            # Also when the caller wants no more answers: what is under way is paid for, so keep it
            self.stop.set()
            for thread in threads:
                thread.join()
            bar.close()
        n_cut = sum(self.key(prompt) in self.cut for prompt in prompts)
        if n_cut > 0:
            print(f'{n_cut} answers did not fit in {self.max_tokens:,} tokens and are left out',
                  file=sys.stderr)
        if self.over_budget:
            print(f'the budget of {self.budget:g} has no room for another answer: '
                  f'{len(prompts) - bar.n} of {len(prompts)} prompts have none; with a larger '
                  'budget the same command goes on', file=sys.stderr)
        elif n_given_up > 0:
            print(f'{n_given_up} prompts were given up after {self.tries} tries each, the last '
                  f'for {self.last_failure}; the same command tries them again', file=sys.stderr)

    def progress(self):
        """Return the failures and the expense so far, for the progress bar."""
        if self.has_prices():
            return f'{self.failures} failures, ${self.spent:.4f}'
        return f'{self.failures} failures, {self.spent:.0f} spent of {self.budget:.0f}'


def endpoint():
    """Return (URL, key) as OPENAI_BASE_URL and OPENAI_API_KEY say. Raise UserError."""
    base = os.environ.get('OPENAI_BASE_URL', '').strip()
    key = os.environ.get('OPENAI_API_KEY', '').strip()
    if base and not base.startswith(('http://', 'https://')):
        raise UserError(f'OPENAI_BASE_URL is {base.rpartition("@")[2]}; '
                        'it takes an address such as http://127.0.0.1:8000/v1')
    fits_header = key.isascii() and key.isprintable()
    if not (key or base) or not fits_header:
        raise UserError('set OPENAI_API_KEY to your key, '
                        'or OPENAI_BASE_URL to an endpoint that needs none')
    base = base or 'https://api.openai.com/v1'
    return base.rstrip('/') + '/chat/completions', key


def never_connected(error):
    """Return whether an exception of requests says that no connection was made."""
    # requests wraps the exception of urllib3, which has the reason
    cause = error.args[0] if error.args else error
    unconnected = (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError)
    return isinstance(getattr(cause, 'reason', None), unconnected)


def seconds_of(retry_after):
    """Return the seconds that a Retry-After header, a number or a date, asks us to wait.

    They are an hour at most, and 0 where the header is neither.

    >>> seconds_of('20')
    20.0
    """
    try:
        seconds = float(retry_after)
    except ValueError:
        date = email.utils.parsedate_tz(retry_after)
        if date is None:
            return 0.0
        seconds = email.utils.mktime_tz(date) - time.time()
    return min(3600.0, max(0.0, seconds))


# ---- Topics --------------------------------------------------------------------------------------
def parse_list(answer):
    """Return the strings of the JSON list in an answer or, if it has none, the items of its lines.

    If some lines have bullets or numbers, the others are taken for talk around the list.

    >>> parse_list('Here are two:\\n1. lists\\n2. loops')
    ['lists', 'loops']
    """
    try:
        items = json.loads(answer[answer.index('['):answer.rindex(']') + 1])
    except (ValueError, RecursionError):
        bullet = r'(?:[-*•]|\d+[.)])\s+'
        lines = [line.strip() for line in answer.splitlines() if line.strip()]
        bulleted = [line for line in lines if re.match(bullet, line)]
        items = [re.sub('^' + bullet, '', line) for line in bulleted or lines]
    items = [item.strip(' \t*`"\',') for item in items if isinstance(item, str)]
    # A line of more than 100 characters is talk, not a topic
    return list(dict.fromkeys(item for item in items if 0 < len(item) <= 100))


def topics(teacher, n, path=''):
    """Return the combinations {'topic', 'subtopic', 'profession'} to write about, a list.

    There are at least n, if the teacher names as many topics as it is asked for.
    path: a JSON file {topic: [subtopic, ...]} to take instead, of any size. Raise UserError.
    """
    tree = read_tree(path) if path else ask_for_tree(teacher, n)
    if not any(tree.values()):
        if path:
            raise UserError(f'no topics in {path}')
        raise UserError('the teacher named no topics; give a file of them, or a larger budget')
    combinations = []
    for topic, subtopics in tree.items():
        for subtopic in subtopics:
            for profession in PROFESSIONS:
                combinations.append(
                    {'topic': topic, 'subtopic': subtopic, 'profession': profession})
    return combinations


def read_tree(path):
    """Return {topic: [subtopic, ...]} from a JSON file. Raise UserError for any other."""
    try:
        with open(path, encoding='utf-8') as f:
            tree = json.load(f)
        if not isinstance(tree, dict):
            raise ValueError('it is not a dictionary')
        for subtopics in tree.values():
            if not (isinstance(subtopics, list) and all(isinstance(s, str) for s in subtopics)):
                raise ValueError('its subtopics are not lists of strings')
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f'{path} is not JSON of the form {{"topic": ["subtopic", ...]}}: {error}') from None
    return tree


def ask_for_tree(teacher, n):
    """Return {topic: [subtopic, ...]} from the teacher, as many subtopics as topics."""
    # As if there were four professions, not twenty: n texts then spread over more subtopics. The
    # steps let a somewhat larger n keep its tree, and with it the answers that are there.
    for side in (3, 5, 10, 20, 40):
        if 4 * side * side >= n:
            break
    prompt = TOPICS.format(n=side)
    answers = dict(teacher.ask([prompt]))
    names = parse_list(answers.get(prompt, ''))
    prompts = {name: SUBTOPICS.format(n=side, topic=name) for name in names}
    answers = dict(teacher.ask(prompts.values()))
    # In the order of the topics, whichever answer came first
    tree = {}
    for name, prompt in prompts.items():
        if prompt in answers:
            tree[name] = parse_list(answers[prompt])
    return tree


# ---- Pages, exercises and ratings ----------------------------------------------------------------
def collect(teacher, template, n, *, seed, path, parse, what):
    """Return what parse() makes of the answers to up to n prompts, in the order of the prompts.

    template: a prompt with the fields of a combination; seed and path choose these: see topics.
    parse(answer): (result, form), or ValueError with the reason to drop it. Of the results that
        share a form the first is kept.
    what: the name of the results, for the line that says how many there are.
    """
    combinations = [template.format(**c) for c in topics(teacher, n, path)]

    # Sorted by hash, a larger n or a larger tree adds prompts and keeps those already asked; a
    # seeded shuffle would draw others.
    def shuffled(prompt):
        return hashlib.sha256(f'{seed} {prompt}'.encode()).digest()
    prompts = sorted(combinations, key=shuffled)[:n]

    answers = dict(teacher.ask(prompts))
    kept = {}  # form -> result
    dropped = collections.Counter()  # why -> how many
    for prompt in prompts:
        if prompt not in answers:
            continue
        try:
            result, form = parse(answers[prompt])
        except ValueError as error:
            dropped[str(error)] += 1
            continue
        if form in kept:
            dropped['a repeat'] += 1
        else:
            kept[form] = result
    reasons = ''.join(f'; {why}: {count:,}' for why, count in dropped.most_common())
    print(f'{what}: asked for {n:,}, {len(combinations):,} combinations, '
          f'{len(answers):,} answers, {len(kept):,} kept{reasons}')
    return list(kept.values())


def write_textbook(teacher, n, seed, path):
    """Return up to n pages, a list of strings, each on another combination. path: see topics."""
    def parse(answer):
        return answer.strip(), ' '.join(answer.split())  # the same but for white space: a repeat
    return collect(teacher, PAGE, n, seed=seed, path=path, parse=parse, what='textbook pages')


def syntax_tree(code):
    """Return the syntax tree of a program, or None if it does not compile."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            # The compiler refuses more than the parser does: a return outside a function, say
            compile(code, 'answer', 'exec', dont_inherit=True)
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def is_documented(node):
    """Return whether a node is a function with examples in its docstring and code below it."""
    if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
        return False
    docstring, first_statement = node.body[:2]
    has_examples = '>>>' in (ast.get_docstring(node) or '')
    return has_examples and first_statement.lineno > docstring.end_lineno


def parse_exercise(answer):
    """Return ((prompt, solution), form) of the first block of code with a documented function.

    prompt: the block down to the end of the docstring.
    solution: the rest of the function.
    form: the function without its docstring, comments and spacing, by which repeats are known.
    Raise ValueError, with the reason, if no block has such a function.
    """
    answer = answer.replace('\r\n', '\n')
    # An answer may end before its last fence does, or be code without any fence
    blocks = re.findall(r'```[ \w]*\n(.*?)(?:```|\Z)', answer, re.DOTALL) or [answer]
    why = 'no function documented with examples'
    for block in blocks:
        block = textwrap.dedent(block)
        tree = syntax_tree(block)
        if tree is None:
            why = 'does not compile'
            continue
        for function in reversed(tree.body):  # the helpers that it calls come before it
            if not is_documented(function):
                continue
            lines = block.split('\n')
            end_of_docstring = function.body[0].end_lineno
            prompt = '\n'.join(lines[:end_of_docstring]) + '\n'
            solution = '\n'.join(lines[end_of_docstring:function.end_lineno]) + '\n'
            # What is left has no docstring, and unparsing drops comments and spacing
            del function.body[0]
            try:
                return (prompt, solution), ast.unparse(function)
            except RecursionError:
                why = 'too deeply nested'
    raise ValueError(why)


def write_exercises(teacher, n, seed, path, runs=None):
    """Return up to n exercises, a list of (prompt, solution): see parse_exercise.

    runs(prompt, solution): whether the solution does what its examples say. The caller gives it,
        as running strangers' code is the caller's decision; without it nothing is run.
    """
    def parse(answer):
        exercise, form = parse_exercise(answer)
        if runs is not None and not runs(*exercise):
            raise ValueError('does not run as its examples say')
        return exercise, form
    return collect(teacher, EXERCISE, n, seed=seed, path=path, parse=parse, what='exercises')


def rate(teacher, texts):
    """Return how much each text teaches, 1 to 10, or None where the teacher gives no such number.

    It reads the first 4,000 characters of each.
    """
    prompts = [RATE.format(text=text[:4000]) for text in texts]
    answers = dict(teacher.ask(prompts))
    return [parse_rating(answers.get(prompt, '')) for prompt in prompts]


def parse_rating(answer):
    """Return the rating in an answer, 1 to 10, or None if it has no such number.

    >>> parse_rating('On a scale of 1 to 10, the rating is 7.')
    7.0
    """
    number = r'(\d+(?:\.\d+)?)'
    patterns = [
        number + r'\W*(?:/|out of|of)\s*10\b',  # 7/10, 7 out of 10
        r'(?i)(?:rating|score)\D{0,20}' + number,  # Rating: 7
        number + r'\D*$']  # the last number
    for pattern in patterns:
        match = re.search(pattern, answer)
        if match:
            rating = float(match[1])
            return rating if 1 <= rating <= 10 else None
    return None
