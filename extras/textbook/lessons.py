"""
Ask a teacher for topics, pages, exercises and ratings, and read its answers.
    OPENAI_API_KEY=… python extras/textbook/prepare.py --source=api --teacher=gpt-4o-mini

A teacher has ask(prompts, what), which returns {prompt: answer}: see teacher.py, next to this file.

Needs folio/configurator.py.
"""
import ast
import collections
import hashlib
import json
import re
import textwrap
import warnings

from tqdm import tqdm

from folio.configurator import UserError

# The prompts. Answers are kept by their prompt: if you change one of these, you pay for all of its
# answers again.
PROFESSIONS = [
    'accountant', 'actor', 'architect', 'astronomer', 'baker', 'beekeeper', 'biologist',
    'carpenter', 'chemist', 'composer', 'economist', 'farmer', 'firefighter', 'geologist',
    'journalist', 'librarian', 'nurse', 'pilot', 'sailor', 'shopkeeper']
N_TOPICS = 30  # with as many subtopics and 20 professions: 18,000 combinations
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


# ---- Topics --------------------------------------------------------------------------------------
def parse_list(answer):
    """Return the strings of the JSON list in an answer or, if it has none, the items of its lines.

    If some lines have bullets or numbers, the others are taken for talk around the list.

    >>> parse_list('Here are two:\\n1. lists\\n2. loops')
    ['lists', 'loops']
    """
    try:
        items = json.loads(answer[answer.index('['):answer.rindex(']') + 1])
    except ValueError:
        bullet = r'(?:[-*•]|\d+[.)])\s+'
        lines = [line.strip() for line in answer.splitlines() if not line.startswith('```')]
        bulleted = [line for line in lines if re.match(bullet, line)]
        items = [re.sub('^' + bullet, '', line) for line in bulleted or lines]
    items = [item.strip(' \t*`"\',[]') for item in items if isinstance(item, str)]
    # A line of more than 100 characters is talk, not a topic
    return list(dict.fromkeys(item for item in items if 0 < len(item) <= 100))


def topics(teacher, path=''):
    """Return the combinations {'topic', 'subtopic', 'profession'} to write about, a list.

    path: a JSON file {topic: [subtopic, ...]}; '': the teacher is asked. Raises UserError.
    """
    tree = read_tree(path) if path else ask_for_tree(teacher)
    combinations = []
    for topic, subtopics in tree.items():
        for subtopic in subtopics:
            for profession in PROFESSIONS:
                combinations.append(
                    {'topic': topic, 'subtopic': subtopic, 'profession': profession})
    if not combinations:
        raise UserError(f'no topics in {path or "the answers of the teacher"}; '
                        '--topics=file.json takes {"topic": ["subtopic", …], …}')
    return combinations


def read_tree(path):
    """Return {topic: [subtopic, ...]} from a JSON file. Raises UserError for any other."""
    try:
        with open(path, encoding='utf-8') as f:
            tree = json.load(f)
        for topic, subtopics in tree.items():
            if not isinstance(subtopics, list):
                raise TypeError(f'{topic!r} has no list')
        return tree
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f'{path} is not {{"topic": ["subtopic", …], …}}: {e}') from None


def ask_for_tree(teacher):
    """Return {topic: [subtopic, ...]} from the teacher, as many subtopics as topics."""
    prompt = TOPICS.format(n=N_TOPICS)
    answers = teacher.ask([prompt], 'topics')
    names = parse_list(answers.get(prompt, ''))
    prompts = {name: SUBTOPICS.format(n=N_TOPICS, topic=name) for name in names}
    answers = teacher.ask(prompts.values(), 'subtopics')
    # In the order of the topics, whichever answer came first
    return {name: parse_list(answers.get(prompt, '')) for name, prompt in prompts.items()}


# ---- Pages, exercises and ratings ----------------------------------------------------------------
def collect(teacher, template, combinations, n, *, seed, parse, what):
    """Return what parse() makes of the answers to up to n prompts, in the order of the prompts.

    template: a prompt with the fields of a combination; seed chooses n of the combinations.
    parse(answer): (result, form), or ValueError with the reason to drop it. Of the results that
        share a form the first is kept.
    what: the name of the results, for the line that says how many there are.
    """
    prompts = [template.format(**combination) for combination in combinations]

    # In the order of their hashes, another n or a larger tree keeps the prompts already asked; a
    # seeded shuffle would draw others.
    def shuffled(prompt):
        return hashlib.sha256(f'{seed} {prompt}'.encode()).digest()
    prompts = sorted(prompts, key=shuffled)[:n]

    answers = teacher.ask(prompts, what)
    kept = {}  # form -> result
    dropped = collections.Counter()  # why -> how many
    # Running examples takes a tenth of a second per exercise; reading a page takes no time
    for prompt in tqdm(prompts, desc=f'{what} read', delay=2):
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


def write_textbook(teacher, combinations, n, seed):
    """Return up to n pages, a list of strings, each on another combination: see topics."""
    def parse(answer):
        return answer.strip(), ' '.join(answer.split())  # equal except for white space: a repeat
    return collect(teacher, PAGE, combinations, n, seed=seed, parse=parse, what='pages')


def syntax_tree(code):
    """Return the syntax tree of a program, or None if it does not compile."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            # The compiler refuses more than the parser does: a return outside a function, say
            compile(code, 'answer', 'exec', dont_inherit=True)
            return ast.parse(code)
    except (SyntaxError, ValueError):
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
    form: the function without its docstring, comments and spacing; repeats have the same form.
    Raise ValueError, with the reason, if no block has such a function.
    """
    answer = answer.replace('\r\n', '\n')
    # An answer may be cut off before its closing fence, or be code without any fence
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
            return (prompt, solution), ast.unparse(function)
    raise ValueError(why)


def write_exercises(teacher, combinations, n, seed, runs=None):
    """Return up to n exercises, a list of (prompt, solution): see parse_exercise.

    runs(prompt, solution): whether the solution does what its examples say. It comes from the
        caller, who decides whether to run strangers' code; without it nothing is run.
    """
    def parse(answer):
        exercise, form = parse_exercise(answer)
        if runs is not None and not runs(*exercise):
            raise ValueError('does not run as its examples say')
        return exercise, form
    return collect(teacher, EXERCISE, combinations, n, seed=seed, parse=parse, what='exercises')


def rate(teacher, texts):
    """Return how much each text teaches, 1 to 10, or None where the teacher gives no such number.

    The teacher reads the first 4,000 characters of each.
    """
    prompts = [RATE.format(text=text[:4000]) for text in texts]
    answers = teacher.ask(prompts, 'ratings')
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
