"""
Make Python exercises and textbook pages by composing a predicate, a transform and an aggregate.
    python extras/textbook/generator.py --n=3  # three exercises, three pages, three problems

A composition such as (even, squares, sum) takes the numbers of a list, of a dictionary's values or
of a range; others take the words of a list, a dictionary or a text. Each is named, worded and coded
in many ways. Every solution is executed: the examples in its docstring show what it returned, and a
single comprehension that does the same has returned it too. One composition in seven is held out:
it occurs in no page and no exercise, only in the problems.

Needs folio/configurator.py.
"""
import os
import random
import sys
import zlib

if __name__ == '__main__':
    sys.path.insert(0, os.path.abspath(__file__ + '/../../..'))  # the root of the checkout
from folio.configurator import configure

n = 3  # exercises, pages and problems to show

# ---- What is composed ----------------------------------------------------------------------------
# (name, wordings, code). In the wordings {x} is what the elements are called, such as "numbers in
# data". In the code {v} is an element, {k} a small number, {m} another, {c} a letter. No two have
# the same code: m starts at 3, because "divisible by 2" would be "even".
PREDICATES = {
    'number': [
        ('all', ['{x}'], ''),
        ('even', ['even {x}', '{x} that are even'], '{v} % 2 == 0'),
        ('odd', ['odd {x}', '{x} that are odd'], '{v} % 2 == 1'),
        ('positive', ['positive {x}', '{x} above zero'], '{v} > 0'),
        ('negative', ['negative {x}', '{x} below zero'], '{v} < 0'),
        ('nonzero', ['nonzero {x}', '{x} that are not zero'], '{v} != 0'),
        ('above', ['{x} greater than {k}', '{x} above {k}'], '{v} > {k}'),
        ('below', ['{x} less than {k}', '{x} below {k}'], '{v} < {k}'),
        ('at_least', ['{x} that are at least {k}', '{x} not less than {k}'], '{v} >= {k}'),
        ('divisible', ['{x} divisible by {m}', 'multiples of {m} among the {x}'],
         '{v} % {m} == 0'),
        ('indivisible', ['{x} not divisible by {m}', '{x} that {m} does not divide'],
         '{v} % {m} != 0')],
    'word': [
        ('all', ['{x}'], ''),
        ('long', ['{x} longer than {k} letters', '{x} with more than {k} letters'],
         'len({v}) > {k}'),
        ('short', ['{x} shorter than {k} letters', '{x} with fewer than {k} letters'],
         'len({v}) < {k}'),
        ('starting', ["{x} that start with '{c}'", "{x} beginning with '{c}'"],
         "{v}.startswith('{c}')"),
        ('ending', ["{x} that end with '{c}'", "{x} ending in '{c}'"], "{v}.endswith('{c}')"),
        ('with', ["{x} that contain '{c}'", "{x} with the letter '{c}'"], "'{c}' in {v}"),
        ('without', ["{x} that do not contain '{c}'", "{x} without the letter '{c}'"],
         "'{c}' not in {v}")]}

# (name, wordings, code, kind of the result). {y} is what the predicate leaves, {j} a small number.
TRANSFORMS = {
    'number': [
        ('same', ['the {y}'], '{v}', 'number'),
        ('squares', ['the squares of the {y}', 'the {y}, squared'], '{v} * {v}', 'number'),
        ('cubes', ['the cubes of the {y}', 'the {y}, cubed'], '{v} ** 3', 'number'),
        ('doubles', ['twice the {y}', 'the {y}, doubled'], '2 * {v}', 'number'),
        ('negatives', ['the negatives of the {y}', 'the {y}, with the sign changed'],
         '-{v}', 'number'),
        ('magnitudes', ['the absolute values of the {y}', 'the {y}, without their signs'],
         'abs({v})', 'number'),
        ('halves', ['the halves, rounded down, of the {y}', 'the {y}, halved and rounded down'],
         '{v} // 2', 'number'),
        ('raised', ['the {y}, each plus {j}', 'the {y}, each increased by {j}'],
         '{v} + {j}', 'number'),
        ('remainders', ['the remainders modulo {j} of the {y}', 'the {y}, each modulo {j}'],
         '{v} % {j}', 'number')],
    'word': [
        ('same', ['the {y}'], '{v}', 'word'),
        ('capitals', ['the {y}, in upper case', 'the {y}, in capital letters'],
         '{v}.upper()', 'word'),
        ('backwards', ['the {y}, written backwards', 'the {y}, each reversed'],
         '{v}[::-1]', 'word'),
        ('initials', ['the first letters of the {y}', 'the initials of the {y}'], '{v}[0]', 'word'),
        ('finals', ['the last letters of the {y}', 'the final letters of the {y}'],
         '{v}[-1]', 'word'),
        ('twins', ['the {y}, each written twice', 'the {y}, each repeated'], '{v} * 2', 'word'),
        ('lengths', ['the lengths of the {y}', 'the numbers of letters of the {y}'],
         'len({v})', 'number')]}

# (name, wordings, code around a comprehension, code around the name of a list). {z} is what the
# transform makes, of the kind given here.
AGGREGATES = {
    'number': [
        ('sum', ['the sum of {z}', 'the total of {z}'], 'sum({})', 'sum({})'),
        ('largest', ['the largest of {z}, or 0', 'the maximum of {z}, or 0'],
         'max(({}), default=0)', 'max({}, default=0)'),
        ('smallest', ['the smallest of {z}, or 0', 'the minimum of {z}, or 0'],
         'min(({}), default=0)', 'min({}, default=0)'),
        ('list', ['a list of {z}', 'a list with {z}'], '[{}]', '{}'),
        ('sorted', ['a sorted list of {z}', 'a list of {z} in ascending order'],
         'sorted({})', 'sorted({})'),
        ('reversed', ['a list of {z} in reverse', 'a list of {z}, the last one first'],
         '[{}][::-1]', '{}[::-1]'),
        ('different',
         ['how many different values {z} have', 'the number of different values of {z}'],
         'len(set({}))', 'len(set({}))'),
        ('spread', ['a list of {z} from large to small', 'a list of {z} in descending order'],
         'sorted(({}), reverse=True)', 'sorted({}, reverse=True)')],
    'word': [
        ('list', ['a list of {z}', 'a list with {z}'], '[{}]', '{}'),
        ('sorted', ['a sorted list of {z}', 'a list of {z} in alphabetical order'],
         'sorted({})', 'sorted({})'),
        ('reversed', ['a list of {z} in reverse', 'a list of {z}, the last one first'],
         '[{}][::-1]', '{}[::-1]'),
        ('spaced', ['{z}, joined by spaces', 'a string of {z} with spaces between'],
         "' '.join({})", "' '.join({})"),
        ('dashed', ['{z}, joined by dashes', 'a string of {z} with dashes between'],
         "'-'.join({})", "'-'.join({})"),
        ('longest', ["the longest of {z}, or ''", "the one with the most letters of {z}, or ''"],
         "max(({}), key=len, default='')", "max({}, key=len, default='')"),
        ('different',
         ['how many different values {z} have', 'the number of different values of {z}'],
         'len(set({}))', 'len(set({}))'),
        ('first',
         ["the alphabetically first of {z}, or ''", "the smallest of {z} in the alphabet, or ''"],
         "min(({}), default='')", "min({}, default='')")]}

# (names of the parameter {p}, the elements in words, the iterable, names of an element)
DICTIONARIES = ['scores', 'prices', 'ages', 'table']  # a parameter of these names is a dictionary
SOURCES = {
    'number': [
        (['numbers', 'values', 'data', 'nums'], 'numbers in {p}', '{p}', ['n', 'x', 'number']),
        (DICTIONARIES, 'values of the dictionary {p}', '{p}.values()', ['v', 'value']),
        (['n', 'limit', 'end'], 'numbers from 1 to {p}', 'range(1, {p} + 1)', ['i', 'k'])],
    'word': [
        (['words', 'names', 'items'], 'words in {p}', '{p}', ['w', 'word']),
        (['text', 'sentence', 'line'], 'words of the string {p}', '{p}.split()', ['w', 'word']),
        (DICTIONARIES, 'keys of the dictionary {p}', '{p}', ['key', 'name'])]}

WORDS = [
    'apple', 'river', 'stone', 'cloud', 'tiger', 'green', 'seven', 'music', 'table', 'light',
    'ocean', 'bread', 'night', 'paper', 'horse', 'sugar', 'winter', 'garden', 'silver', 'yellow',
    'window', 'candle', 'pocket', 'rabbit', 'bridge', 'summer', 'island', 'tea', 'sun', 'map',
    'ice', 'owl', 'red', 'net', 'ant', 'eat', 'sees']


# ---- A composition, in words and in code ---------------------------------------------------------
def compositions(held_out):
    """Yield (kind, predicate, transform, aggregate): all that are held out, or all that are not."""
    for kind in PREDICATES:
        for predicate in PREDICATES[kind]:
            for transform in TRANSFORMS[kind]:
                for aggregate in AGGREGATES[transform[3]]:
                    # A hash of the names, without the kind: numbers and words can share their code
                    names = f'{predicate[0]} {transform[0]} {aggregate[0]}'
                    in_one_seventh = zlib.crc32(names.encode()) % 7 == 0
                    if in_one_seventh == held_out:
                        yield kind, predicate, transform, aggregate


def write_function(composition, rng):
    """Return a function that does what a composition says, worded and coded at random.

    It is a dictionary: the name, the parameter, the task in words, the body; the pieces of which
    these are made, for the prose of a page; and `plain`, a lambda to check the body with.
    """
    # The order of the random choices is part of the result: the same seed, the same texts
    kind, predicate, transform, aggregate = composition
    predicate_name, predicate_wordings, predicate_code = predicate
    transform_name, transform_wordings, transform_code, _ = transform
    aggregate_name, aggregate_wordings, of_comprehension, of_list = aggregate
    parameters, elements, iterable, variables = rng.choice(SOURCES[kind])
    p = rng.choice(parameters)
    v = rng.choice([name for name in variables if name != p])
    fill = {
        'v': v,
        'p': p,
        'k': rng.randint(2, 6),
        'm': rng.randint(3, 7),
        'j': rng.randint(2, 9),
        'c': rng.choice('aeinrst'),
        'x': elements.format(p=p)}

    things = rng.choice(predicate_wordings).format(**fill)
    changed = rng.choice(transform_wordings).format(y=things, **fill)
    task = rng.choice(aggregate_wordings).format(z=changed)

    test = predicate_code.format(**fill)
    value = transform_code.format(**fill)
    iterable = iterable.format(p=p)
    comprehension = f'{value} for {v} in {iterable}'
    if test:
        comprehension += f' if {test}'
    one_expression = of_comprehension.format(comprehension)

    style = rng.choice(['comprehension', 'comprehension', 'steps', 'loop'])
    if style == 'comprehension':
        lines = [f'return {one_expression}']
    elif style == 'steps':
        lines = [f'result = [{comprehension}]', f'return {of_list.format("result")}']
    else:
        lines = ['result = []', f'for {v} in {iterable}:']
        if test:
            lines += [f'    if {test}:', f'        result.append({value})']
        else:
            lines += [f'    result.append({value})']
        lines += [f'return {of_list.format("result")}']

    # The name says what is done, in one order or the other, or says nothing
    steps = []
    if predicate_name != 'all':
        steps.append(predicate_name)
    if transform_name != 'same':
        steps.append(transform_name)
    words = '_'.join(steps)
    vague = rng.choice(['solve', 'compute', 'answer', 'process', 'result_of', 'find'])
    name = rng.choice([
        f'{aggregate_name}_{words or "of"}_{p}', f'{words or p}_{aggregate_name}', vague])

    return {
        'name': name,
        'parameter': p,
        'task': task,
        'body': ''.join(f'    {line}\n' for line in lines),
        'things': things,
        'changed': changed,
        'test': test,
        'value': value,
        'v': v,
        'iterable': iterable,
        'plain': f'lambda {p}: {one_expression}',
        'kind': kind}


def random_argument(function, rng):
    """Return a value to call a function with."""
    # Both are always drawn, so that the same seed gives the same texts
    words = rng.sample(WORDS, rng.randint(2, 5))
    numbers = [rng.randint(-9, 20) for _ in range(rng.randint(3, 6))]
    if function['iterable'].startswith('range'):
        return rng.randint(1, 12)
    if function['parameter'] in DICTIONARIES:
        return dict(zip(words, numbers))
    if function['iterable'].endswith('.split()'):
        return ' '.join(words)
    if function['kind'] == 'word':
        return words
    return numbers


def examples(function, n, rng):
    """Return n pairs of an argument and what the function returns for it, both as code.

    Pairs whose result is not empty come first.
    """
    namespace = {}
    exec(f'def {function["name"]}({function["parameter"]}):\n{function["body"]}', namespace)
    run = namespace[function['name']]
    run_plain = eval(function['plain'])
    results = {}
    for _ in range(20 * n):
        argument = random_argument(function, rng)
        result = run(argument)
        assert result == run_plain(argument), (
            f'{function["body"]} does not do what {function["plain"]} does')
        results.setdefault(repr(argument), repr(result))
    # A stable sort: within each half the pairs stay in their random order
    pairs = sorted(results.items(), key=lambda pair: pair[1] in ('[]', "''", '0'))
    return pairs[:n]


# ---- Exercises, problems and pages ---------------------------------------------------------------
def write_prompt(function, pairs):
    """Return the signature, and the docstring with examples, as HumanEval has them."""
    calls = ''
    for argument, result in pairs:
        calls += f'    >>> {function["name"]}({argument})\n    {result}\n'
    return (f'def {function["name"]}({function["parameter"]}):\n'
            f'    """Return {function["task"]}.\n\n{calls}    """\n')


def exercise(composition, rng):
    """Return (prompt, solution): the function down to its docstring's end, and its body."""
    function = write_function(composition, rng)
    pairs = examples(function, rng.randint(1, 2), rng)
    return write_prompt(function, pairs), function['body']


def problem(composition, number, rng):
    """Return a problem in HumanEval's schema, whose eight tests are not among its examples."""
    # Until the tests expect two different results: a constant must not pass them
    expected = set()
    while len(expected) < 2:
        function = write_function(composition, rng)
        pairs = examples(function, 10, rng)
        expected = {result for _, result in pairs[2:]}
    tests = ''
    for argument, result in pairs[2:]:
        tests += f'    assert candidate({argument}) == {result}\n'
    return {
        'task_id': f'folio/{number}',
        'prompt': write_prompt(function, pairs[:2]),
        'entry_point': function['name'],
        'canonical_solution': function['body'],
        'test': f'def check(candidate):\n{tests}'}


# The sentences of a page: one from each list, in this order. CHOOSING needs a predicate, CHANGING a
# transform.
OPENINGS = [
    'Suppose that we want {task}.',
    'Our task is to find {task}.',
    'How do we get {task}?',
    'In this section we look for {task}.',
    'Here is a common question: what is {task}?']
LOOPS = [
    'We walk over `{iterable}` and call the element `{v}`.',
    'The elements come from `{iterable}`; one is `{v}`.',
    'Python lets us go through `{iterable}`, one {v} at a time.']
CHOOSING = [
    'First we need only the {things}, so each {v} has to pass the test `{test}`.',
    'Not every element counts: we keep the {things}. In Python the condition is `{test}`.',
    'The condition `{test}` picks the {things}.']
CHANGING = [
    'For each of them we compute `{value}`, which gives {changed}.',
    'The expression `{value}` makes {changed}.',
    'Then `{value}` turns a single {v} into what we want, and so we have {changed}.']
ENDINGS = [
    'Put together, the function is short:',
    'Now we can write the function:',
    'This is the whole program:',
    'With a name and a docstring it looks like this:']
CHECKS = ['Let us try it:', 'To be sure, we call it:', 'We check it by hand:', 'For example:']


def page(composition, rng):
    """Return a textbook page: a question, the way to its answer, a function, calls and results."""
    function = write_function(composition, rng)
    sentences = [rng.choice(OPENINGS), rng.choice(LOOPS)]
    if function['test']:
        sentences.append(rng.choice(CHOOSING))
    if function['value'] != function['v']:
        sentences.append(rng.choice(CHANGING))
    sentences.append(rng.choice(ENDINGS))
    prose = ' '.join(sentences).format(**function)
    task = function['task']
    title = task[0].upper() + task[1:]
    pairs = examples(function, rng.randint(1, 3), rng)

    # Half of the pages have the examples in the docstring, the other half below the function
    if rng.random() < 0.5:
        return f'# {title}\n\n{prose}\n\n{write_prompt(function, pairs)}{function["body"]}'
    head = f'def {function["name"]}({function["parameter"]}):\n    """Return {task}."""\n'
    calls = ''
    for argument, result in pairs:
        calls += f'>>> {function["name"]}({argument})\n{result}\n'
    return (f'# {title}\n\n{prose}\n\n{head}{function["body"]}\n'
            f'{rng.choice(CHECKS)}\n\n{calls}')


def make(write, n, held_out, rng):
    """Yield n different results of write(composition, rng), taking the compositions in turn.

    Their order is random, and shuffled again each time that all have had their turn.
    """
    known = list(compositions(held_out))
    seen = set()
    while len(seen) < n:
        rng.shuffle(known)
        # No break when there are n: what the caller draws from rng next would no longer be the same
        for composition in known:
            text = write(composition, rng)
            if text not in seen and len(seen) < n:
                seen.add(text)
                yield text


def main():
    rng = random.Random(1)
    for prompt, solution in make(exercise, n, held_out=False, rng=rng):
        print(prompt + solution)
    for text in make(page, n, held_out=False, rng=rng):
        print(text)
    for number, composition in zip(range(n), compositions(held_out=True)):
        print(problem(composition, number, rng))


if __name__ == '__main__':
    configure(globals())
    main()
