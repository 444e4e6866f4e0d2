"""
Python exercises and textbook pages made on the spot, by composing a predicate, a transform and an aggregate.
    python prepare/textbook/generator.py 3                  # three exercises, three pages, three held-out problems

A composition such as (even, squares, sum) over the numbers of a list, the values of a dictionary or a range, or over
the words of a text, is named, worded and coded in many ways. Every solution is executed: the examples in its docstring
are what it returned, and what the same as a single comprehension returns. One in seven compositions is held out: it is
in no page and no exercise, only in the problems.
"""
import random
import sys
import zlib

# Each has a name, wordings, and code, which is no other's: m is above 2, for what 2 divides is even. k and j are small
# numbers too, c is a letter, v the element.
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
        ('divisible', ['{x} divisible by {m}', 'multiples of {m} among the {x}'], '{v} % {m} == 0'),
        ('indivisible', ['{x} not divisible by {m}', '{x} that {m} does not divide'], '{v} % {m} != 0')],
    'word': [
        ('all', ['{x}'], ''),
        ('long', ['{x} longer than {k} letters', '{x} with more than {k} letters'], 'len({v}) > {k}'),
        ('short', ['{x} shorter than {k} letters', '{x} with fewer than {k} letters'], 'len({v}) < {k}'),
        ('starting', ["{x} that start with '{c}'", "{x} beginning with '{c}'"], "{v}.startswith('{c}')"),
        ('ending', ["{x} that end with '{c}'", "{x} ending in '{c}'"], "{v}.endswith('{c}')"),
        ('with', ["{x} that contain '{c}'", "{x} with the letter '{c}'"], "'{c}' in {v}"),
        ('without', ["{x} that do not contain '{c}'", "{x} without the letter '{c}'"], "'{c}' not in {v}")]}
TRANSFORMS = {
    'number': [
        ('same', ['the {y}'], '{v}', 'number'),
        ('squares', ['the squares of the {y}', 'the {y}, squared'], '{v} * {v}', 'number'),
        ('cubes', ['the cubes of the {y}', 'the {y}, cubed'], '{v} ** 3', 'number'),
        ('doubles', ['twice the {y}', 'the {y}, doubled'], '2 * {v}', 'number'),
        ('negatives', ['the negatives of the {y}', 'the {y}, with the sign changed'], '-{v}', 'number'),
        ('magnitudes', ['the absolute values of the {y}', 'the {y}, without their signs'], 'abs({v})', 'number'),
        ('halves', ['the halves, rounded down, of the {y}', 'the {y}, halved and rounded down'], '{v} // 2', 'number'),
        ('raised', ['the {y}, each plus {j}', 'the {y}, each increased by {j}'], '{v} + {j}', 'number'),
        ('remainders', ['the remainders modulo {j} of the {y}', 'the {y}, each modulo {j}'], '{v} % {j}', 'number')],
    'word': [
        ('same', ['the {y}'], '{v}', 'word'),
        ('capitals', ['the {y}, in upper case', 'the {y}, in capital letters'], '{v}.upper()', 'word'),
        ('backwards', ['the {y}, written backwards', 'the {y}, each reversed'], '{v}[::-1]', 'word'),
        ('initials', ['the first letters of the {y}', 'the initials of the {y}'], '{v}[0]', 'word'),
        ('finals', ['the last letters of the {y}', 'the final letters of the {y}'], '{v}[-1]', 'word'),
        ('twins', ['the {y}, each written twice', 'the {y}, each repeated'], '{v} * 2', 'word'),
        ('lengths', ['the lengths of the {y}', 'the numbers of letters of the {y}'], 'len({v})', 'number')]}
AGGREGATES = {  # code for a comprehension, and for a list that is there
    'number': [
        ('sum', ['the sum of {z}', 'the total of {z}'], 'sum({})', 'sum({})'),
        ('largest', ['the largest of {z}, or 0', 'the maximum of {z}, or 0'],
         'max(({}), default=0)', 'max({}, default=0)'),
        ('smallest', ['the smallest of {z}, or 0', 'the minimum of {z}, or 0'],
         'min(({}), default=0)', 'min({}, default=0)'),
        ('list', ['a list of {z}', 'a list with {z}'], '[{}]', '{}'),
        ('sorted', ['a sorted list of {z}', 'a list of {z} in ascending order'], 'sorted({})', 'sorted({})'),
        ('reversed', ['a list of {z} in reverse', 'a list of {z}, the last one first'], '[{}][::-1]', '{}[::-1]'),
        ('different', ['how many different values {z} have', 'the number of different values of {z}'],
         'len(set({}))', 'len(set({}))'),
        ('spread', ['a list of {z} from large to small', 'a list of {z} in descending order'],
         'sorted(({}), reverse=True)', 'sorted({}, reverse=True)')],
    'word': [
        ('list', ['a list of {z}', 'a list with {z}'], '[{}]', '{}'),
        ('sorted', ['a sorted list of {z}', 'a list of {z} in alphabetical order'], 'sorted({})', 'sorted({})'),
        ('reversed', ['a list of {z} in reverse', 'a list of {z}, the last one first'], '[{}][::-1]', '{}[::-1]'),
        ('spaced', ['{z}, joined by spaces', 'a string of {z} with spaces between'], "' '.join({})", "' '.join({})"),
        ('dashed', ['{z}, joined by dashes', 'a string of {z} with dashes between'], "'-'.join({})", "'-'.join({})"),
        ('longest', ["the longest of {z}, or ''", "the one with the most letters of {z}, or ''"],
         "max(({}), key=len, default='')", "max({}, key=len, default='')"),
        ('different', ['how many different values {z} have', 'the number of different values of {z}'],
         'len(set({}))', 'len(set({}))'),
        ('first', ["the alphabetically first of {z}, or ''", "the smallest of {z} in the alphabet, or ''"],
         "min(({}), default='')", "min({}, default='')")]}
SOURCES = {  # parameter names, the elements in words, the iterable, names of an element
    'number': [(['numbers', 'values', 'data', 'nums'], 'numbers in {p}', '{p}', ['n', 'x', 'number']),
               (['scores', 'prices', 'ages', 'table'], 'values of the dictionary {p}', '{p}.values()', ['v', 'value']),
               (['n', 'limit', 'end'], 'numbers from 1 to {p}', 'range(1, {p} + 1)', ['i', 'k'])],
    'word': [(['words', 'names', 'items'], 'words in {p}', '{p}', ['w', 'word']),
             (['text', 'sentence', 'line'], 'words of the string {p}', '{p}.split()', ['w', 'word']),
             (['scores', 'prices', 'ages', 'table'], 'keys of the dictionary {p}', '{p}', ['key', 'name'])]}
WORDS = ('apple river stone cloud tiger green seven music table light ocean bread night paper horse sugar winter '
         'garden silver yellow window candle pocket rabbit bridge summer island tea sun map ice owl red net ant eat '
         'sees').split()


# ---- A composition, in words and in code -----------------------------------------------------------------------------
def compositions(held_out):
    """All (kind, predicate, transform, aggregate) that are held out, or all that are not, by a hash of their names."""
    for kind in PREDICATES:
        for predicate in PREDICATES[kind]:
            for transform in TRANSFORMS[kind]:
                for aggregate in AGGREGATES[transform[3]]:
                    name = ' '.join((predicate[0], transform[0], aggregate[0]))  # of both kinds, as code may be too
                    if (zlib.crc32(name.encode()) % 7 == 0) == held_out:
                        yield kind, predicate, transform, aggregate


def write_function(composition, rng):
    """A dictionary: name, parameter, task (in words), body, parts (of the body's meaning), call (to make examples)."""
    kind, (p_name, p_words, p_code), (t_name, t_words, t_code, _), (a_name, a_words, a_comp, a_list) = composition
    parameters, things, iterable, variables = rng.choice(SOURCES[kind])
    p = rng.choice(parameters)
    v = rng.choice([v for v in variables if v != p])
    fill = {'v': v, 'p': p, 'k': rng.randint(2, 6), 'm': rng.randint(3, 7), 'j': rng.randint(2, 9),
            'c': rng.choice('aeinrst'), 'x': things.format(p=p)}
    things = rng.choice(p_words).format(**fill)
    changed = rng.choice(t_words).format(y=things, **fill)
    task = rng.choice(a_words).format(z=changed)
    test, value, iterable = p_code.format(**fill), t_code.format(**fill), iterable.format(p=p)
    condition, style = f' if {test}' if test else '', rng.choice(['comprehension', 'comprehension', 'steps', 'loop'])
    if style == 'comprehension':
        lines = [f'return {a_comp.format(f"{value} for {v} in {iterable}{condition}")}']
    elif style == 'steps':
        lines = [f'result = [{value} for {v} in {iterable}{condition}]', f'return {a_list.format("result")}']
    else:
        inside = [f'    if {test}:', f'        result.append({value})'] if test else [f'    result.append({value})']
        lines = ['result = []', f'for {v} in {iterable}:', *inside, f'return {a_list.format("result")}']
    words = '_'.join(word for word, none in ((p_name, 'all'), (t_name, 'same')) if word != none)
    name = rng.choice([f'{a_name}_{words or "of"}_{p}', f'{words or p}_{a_name}',
                       rng.choice(['solve', 'compute', 'answer', 'process', 'result_of', 'find'])])
    plain = f'lambda {p}: {a_comp.format(f"{value} for {v} in {iterable}{condition}")}'
    return {'name': name, 'parameter': p, 'task': task, 'body': ''.join(f'    {line}\n' for line in lines),
            'things': things, 'changed': changed, 'test': test, 'value': value, 'v': v, 'iterable': iterable,
            'plain': plain, 'kind': kind}


def an_argument(function, rng):
    """A value to call it with."""
    words, numbers = rng.sample(WORDS, rng.randint(2, 5)), [rng.randint(-9, 20) for _ in range(rng.randint(3, 6))]
    if function['iterable'].startswith('range'):
        return rng.randint(1, 12)
    if function['parameter'] in SOURCES['number'][1][0]:
        return dict(zip(words, numbers))
    if function['iterable'].endswith('.split()'):
        return ' '.join(words)
    return words if function['kind'] == 'word' else numbers


def examples(function, n, rng):
    """n pairs of an argument and what the function returns for it, the first ones not empty if that can be."""
    namespace = {}
    exec(f'def {function["name"]}({function["parameter"]}):\n{function["body"]}', namespace)
    plain, pairs = eval(function['plain']), {}
    for _ in range(20 * n):
        argument = an_argument(function, rng)
        result = namespace[function['name']](argument)
        assert result == plain(argument), f'{function["body"]} does not do what {function["plain"]} does'
        pairs.setdefault(repr(argument), repr(result))
    telling = sorted(pairs.items(), key=lambda pair: pair[1] in ('[]', "''", '0'))  # a stable sort keeps them random
    return telling[:n]


# ---- What is made of it ----------------------------------------------------------------------------------------------
def write_prompt(function, shown):
    """The signature and the docstring with examples, as HumanEval has them."""
    calls = ''.join(f'    >>> {function["name"]}({argument})\n    {result}\n' for argument, result in shown)
    return f'def {function["name"]}({function["parameter"]}):\n    """Return {function["task"]}.\n\n{calls}    """\n'


def exercise(composition, rng):
    """(prompt, solution)."""
    function = write_function(composition, rng)
    return write_prompt(function, examples(function, rng.randint(1, 2), rng)), function['body']


def problem(composition, number, rng):
    """A problem in HumanEval's schema, with eight hidden tests that are not among its examples."""
    pairs = []
    while len({result for _, result in pairs[2:]}) < 2:  # what always says the same shall not pass
        function = write_function(composition, rng)
        pairs = examples(function, 10, rng)
    tests = ''.join(f'    assert candidate({argument}) == {result}\n' for argument, result in pairs[2:])
    return {'task_id': f'folio/{number}', 'prompt': write_prompt(function, pairs[:2]), 'entry_point': function['name'],
            'canonical_solution': function['body'], 'test': f'def check(candidate):\n{tests}'}


OPENINGS = ['Suppose that we want {task}.', 'Our task is to find {task}.', 'How do we get {task}?',
            'In this section we look for {task}.', 'Here is a common question: what is {task}?']
CHOOSING = ['First we need only the {things}, so each {v} has to pass the test `{test}`.',
            'Not every element counts: we keep the {things}. In Python the condition is `{test}`.',
            'The condition `{test}` picks the {things}.']
CHANGING = ['For each of them we compute `{value}`, which gives {changed}.',
            'The expression `{value}` makes {changed}.',
            'Then `{value}` turns a single {v} into what we want, and so we have {changed}.']
ENDINGS = ['Put together, the function is short:', 'Now we can write the function:', 'This is the whole program:',
           'With a name and a docstring it looks like this:']
CHECKS = ['Let us try it:', 'To be sure, we call it:', 'We check it by hand:', 'For example:']
LOOPS = ['We walk over `{iterable}` and call the element `{v}`.', 'The elements come from `{iterable}`; one is `{v}`.',
         'Python lets us go through `{iterable}`, one {v} at a time.']


def page(composition, rng):
    """A page of a textbook: a question, the way to its answer in words, a function, and calls with their results."""
    function = write_function(composition, rng)
    lines = [rng.choice(OPENINGS), rng.choice(LOOPS)]
    lines += [rng.choice(CHOOSING)] if function['test'] else []
    lines += [rng.choice(CHANGING)] if function['value'] != function['v'] else []
    prose = ' '.join(lines + [rng.choice(ENDINGS)]).format(**function)
    title, shown = function['task'][0].upper() + function['task'][1:], examples(function, rng.randint(1, 3), rng)
    if rng.random() < 0.5:
        return f'# {title}\n\n{prose}\n\n{write_prompt(function, shown)}{function["body"]}'
    calls = ''.join(f'>>> {function["name"]}({argument})\n{result}\n' for argument, result in shown)
    head = f'def {function["name"]}({function["parameter"]}):\n    """Return {function["task"]}."""\n'
    return (f'# {title}\n\n{prose}\n\n{head}{function["body"]}\n{rng.choice(CHECKS)}\n\n{calls}')


def make(write, n, held_out, rng):
    """n times write(composition, rng), over the compositions in turn, in a random order, without repetitions."""
    known, seen = list(compositions(held_out)), set()
    while len(seen) < n:
        rng.shuffle(known)
        for composition in known:
            text = write(composition, rng)
            if text not in seen and len(seen) < n:
                seen.add(text)
                yield text


if __name__ == '__main__':
    rng, n = random.Random(1), int(sys.argv[1]) if sys.argv[1:] and sys.argv[1].isdigit() else 3
    for prompt, solution in make(exercise, n, False, rng):
        print(prompt + solution)
    print(*make(page, n, False, rng), sep='\n')
    print(*(problem(c, i, rng) for i, c in zip(range(n), compositions(True))), sep='\n')
