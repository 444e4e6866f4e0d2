"""Test what extras/textbook/prepare.py writes, and the study that study.py runs."""
import ast
import doctest
import importlib.util
import io
import itertools
import json
import os
import random
import re
import shutil

import pytest

import folio.tokenizer
from conftest import ROOT, run, shared
from endpoint import Endpoint
from extras.textbook import generator, prepare, study
from folio.log import read
from folio.configurator import UserError
from folio.data import Dataset, write_jsonl
from hub import Hub

needs_openai = pytest.mark.skipif(
    importlib.util.find_spec('openai') is None,
    reason='needs openai: pip install -r extras/requirements.txt')
PREPARE = 'extras/textbook/prepare.py'
STUDY = 'extras/textbook/study.py'
SMALL = ['--raw_chars=200000', '--pages=120', '--exercises=150', '--problems=12',
         '--vocab_size=600', '--keep=0.3']


@pytest.fixture(scope='module')
def prepared_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp('textbook')
    return folder, run(PREPARE, *SMALL, cwd=folder)[0]


# ---- The generator -------------------------------------------------------------------------------
def test_solutions_give_what_their_docstrings_say():
    runner = doctest.DocTestRunner()
    out = io.StringIO()
    for prompt, solution in generator.make(generator.exercise, 400, False, random.Random(0)):
        name = re.match(r'def (\w+)', prompt)[1]
        names = {}
        exec(prompt + solution, names)
        test = doctest.DocTestParser().get_doctest(names[name].__doc__, names, name, None, 0)
        assert 1 <= len(test.examples) <= 2
        runner.run(test, out=out.write)
    assert runner.summarize(verbose=False).failed == 0, out.getvalue()


def test_the_generator_shows_what_it_makes(tmp_path):
    out, _ = run('extras/textbook/generator.py', '--n=2', cwd=tmp_path)
    assert out.count('\n# ') >= 2 and out.count("'entry_point'") == 2
    assert '--n=3' in run('extras/textbook/generator.py', '--help', cwd=tmp_path)[0]


def test_hidden_tests_pass_the_solution_and_fail_constants():
    compositions = list(generator.compositions(held_out=True))
    for i, composition in enumerate(compositions):
        problem = generator.problem(composition, i, random.Random(i))
        names = {}
        exec(problem['prompt'] + problem['canonical_solution'] + problem['test'], names)
        names['check'](names[problem['entry_point']])
        for answer in map(ast.literal_eval, re.findall(r'\) == (.+)\n', problem['test'])):
            with pytest.raises(AssertionError):
                names['check'](lambda argument, answer=answer: answer)
        shown = re.findall(r'>>> \w+(\(.+\))\n', problem['prompt'])
        hidden = re.findall(r'candidate(\(.+\)) ==', problem['test'])
        assert len(shown) == 2 and len(hidden) == 8
        assert not set(shown) & set(hidden)


def test_held_out_compositions_are_in_no_page_and_no_exercise():
    def names(compositions):
        return {(kind, p[0], t[0], a[0]) for kind, p, t, a in compositions}
    held_out = list(generator.compositions(held_out=True))
    known = list(generator.compositions(held_out=False))
    assert len(held_out) >= 100 and not names(held_out) & names(known)
    used = []

    def record(composition, rng):
        used.append(composition)
        return generator.page(composition, rng)
    texts = list(generator.make(record, 1500, False, random.Random(1)))
    assert len(set(texts)) == 1500 and len(known) <= 1500
    assert not any(composition in held_out for composition in used)
    assert all(composition in used for composition in known)


def meaning(function):
    """Return a function as one expression in which the parameter is p and the element v."""
    renamed = {function['v']: 'v', function['parameter']: 'p'}
    tree = ast.parse(function['plain'])
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            node.id = renamed.get(node.id, node.id)
        elif isinstance(node, ast.arg):
            node.arg = 'p'
    return ast.unparse(tree)


def test_no_held_out_problem_has_the_code_of_a_known_composition():
    """Not even under another name, as `even` and `divisible by 2` would be."""
    rng = random.Random(0)
    found = {True: set(), False: set()}
    for held_out in found:
        for composition in generator.compositions(held_out):
            for _ in range(60):  # often enough for each number and letter to occur
                found[held_out].add(meaning(generator.write_function(composition, rng)))
    assert len(found[True]) > 1000
    assert not found[True] & found[False]


# ---- Preparing -----------------------------------------------------------------------------------
def test_three_sets_share_a_tokenizer_and_solutions_are_targets(prepared_once):
    folder, out = prepared_once
    sets = {name: Dataset(str(folder / 'data' / f'textbook_{name}'))
            for name in ('raw', 'filtered', 'exercises')}
    assert len({folio.tokenizer.spec_hash(data.spec) for data in sets.values()}) == 1
    assert sets['raw'].mask('train') is None and sets['filtered'].mask('train') is None
    data = sets['exercises']
    tokenizer = folio.tokenizer.load(data.spec)
    tokens = data.tokens('train')
    mask = data.mask('train')
    documents = tokenizer.decode(tokens.tolist()).split(folio.tokenizer.EOT)[1:]
    solutions = tokenizer.decode(tokens[mask == 1].tolist()).split(folio.tokenizer.EOT)[1:]
    assert len(documents) == len(solutions) > 100
    for document, solution in zip(documents, solutions):
        assert document.startswith('def ') and document.endswith('"""' + solution)
        assert solution.startswith('\n    ')
        ast.parse(document)
    text = tokenizer.decode(sets['filtered'].tokens('train').tolist())
    assert text.count(folio.tokenizer.EOT + '# ') > 100 and 'classifier, ' in out


def test_the_texts_can_be_read(prepared_once):
    folder, out = prepared_once
    exercises = (folder / 'data/textbook_exercises/exercises.txt').read_text(encoding='utf-8')
    ast.parse(exercises.replace('-' * 80, ''))
    assert exercises.count('def ') == 150 and exercises.startswith('def ')
    assert (folder / 'data/textbook_filtered/textbook.txt').read_text().startswith('# ')
    n_chosen = int(re.search(r'documents of raw code the (\d+) that', out)[1])
    chosen = (folder / 'data/textbook_filtered/chosen.txt').read_text(encoding='utf-8')
    assert chosen.count(f'\n{"-" * 80}\n') >= n_chosen - 1


def test_problems_have_humanevals_schema(prepared_once):
    folder, _ = prepared_once
    path = folder / 'data/textbook_exercises/problems.jsonl'
    problems = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
    assert len(problems) == 12 and len({p['task_id'] for p in problems}) == 12
    for problem in problems:
        names = {}
        exec(problem['prompt'] + problem['canonical_solution'] + '\n' + problem['test'], names)
        names['check'](names[problem['entry_point']])


def test_the_same_seed_gives_the_same_files(prepared_once, tmp_path):
    run(PREPARE, *SMALL, cwd=tmp_path)
    for path in sorted((tmp_path / 'data').rglob('*.*')):
        assert path.read_bytes() == (prepared_once[0] / path.relative_to(tmp_path)).read_bytes()


def test_documents_too_like_a_problem_are_removed_and_counted(capsys):
    solution = ('    total = 0\n    for a in b:\n        total += a * a - 1 + a * 3\n'
                '    return total or b\n')
    problem = {'prompt': 'def f(b):\n', 'canonical_solution': solution}
    copied = '# A copy\n' + solution.replace('    ', '\t').upper()
    kept = ['def g(b):\n    return sum(b)\n', ('def h(b):\n', '    total = 0\n    return total\n')]
    documents = [kept[0], copied, kept[1], ('def f(b):\n', solution)]
    assert prepare.decontaminate(documents, [problem], 'x') == kept
    assert 'x: 4 documents, 2 dropped as too similar to a problem' in capsys.readouterr().out


def test_the_classifier_keeps_the_code_that_is_like_the_textbook(monkeypatch, capsys):
    rng = random.Random(0)
    lesson = '# Lesson {}\n\nThe sum of a list is found by adding its numbers: sum(numbers).'
    textbook = [lesson.format(i) for i in range(60)]
    bad = [f'static int x{i} = 0x{i:x}; #define FOO_{i} bar->baz({i});' for i in range(90)]
    good = [f'# The sum of the numbers of list {i}, found by adding: sum(numbers)'
            for i in range(10)]
    monkeypatch.setattr(prepare, 'keep', 0.1)
    chosen = prepare.best_of(bad[:50] + good + bad[50:], textbook, {}, rng)
    assert chosen == good
    assert 'classifier, textbook against raw code, ' in capsys.readouterr().out

    rated = bad[:12] + good + [f'{text}, found' for text in good]
    ratings = {'removed since': 9.0}
    for text in rated:
        if 'static' in text:
            ratings[text] = 1.0
        elif '3' in text:
            ratings[text] = None  # the teacher gave no number
        else:
            ratings[text] = 9.0
    chosen = prepare.best_of(rated + bad, textbook, ratings, rng)
    assert not any('static' in text for text in chosen)


def test_published_sets_come_from_the_hub(tmp_path):
    (tmp_path / 'data/downloads').mkdir(parents=True)
    shutil.copy(shared('HumanEval.jsonl.gz'), tmp_path / 'data/downloads')
    code = []
    for i in range(40):
        code.append({'programming_language': 'Rust', 'response': f'let x{2 * i} = {2 * i};\n' * 9})
        odd = 2 * i + 1
        program = f'x{odd} = {odd}\nprint(x{odd} + {odd})\n' * 9
        code.append({'programming_language': 'Python', 'response': program})
    pages = [{'textbook': f'Lesson {i}: of the number {i} and how to print it, in many words.'}
             for i in range(40)]
    pairs = [{'problem': f'def f{i}(n):\n    """Add {i}."""\n', 'solution': f'    return n + {i}'}
             for i in range(30)]
    rows = {'nampdn-ai/tiny-codes': code, 'nampdn-ai/tiny-textbooks': pages,
            'jinaai/code_exercises': pairs}
    files = {}
    for name in rows:
        lines = ''.join(json.dumps(row) + '\n' for row in rows[name])
        files[name] = {'train.jsonl': lines.encode()}
    hub = Hub(files)
    sizes = ['--source=hub', '--pages=40', '--problems=3', '--vocab_size=300', '--val_share=0.1']
    environment = os.environ | hub.environment(tmp_path / 'hub')
    run(PREPARE, *sizes, '--exercises=30', cwd=tmp_path, env=environment)
    data = Dataset(str(tmp_path / 'data/textbook_raw'))
    text = folio.tokenizer.load(data.spec).decode(data.tokens('train').tolist())
    assert 'x1 = 1\n' in text and 'x2 = 2' not in text
    splits = Dataset(str(tmp_path / 'data/textbook_exercises')).meta['splits']
    assert splits['train']['documents'] == 27
    _, error = run(PREPARE, *sizes, '--exercises=31', cwd=tmp_path, env=environment, status=2)
    assert 'error: jinaai/code_exercises has 30 rows' in error
    hub.files['jinaai/code_exercises'] = {'train.jsonl': b'{"question": "a", "solution": "b"}\n'}
    environment |= {'HF_HOME': str(tmp_path / 'other')}
    _, error = run(PREPARE, *sizes, '--exercises=30', cwd=tmp_path, env=environment, status=2)
    hub.server.shutdown()
    assert 'error: jinaai/code_exercises has the columns question, solution' in error


@needs_openai
def test_a_teachers_wrong_solutions_are_dropped(tmp_path):
    (tmp_path / 'data/downloads').mkdir(parents=True)
    shutil.copy(shared('HumanEval.jsonl.gz'), tmp_path / 'data/downloads')
    (tmp_path / 'topics.json').write_text('{"adding": ["one", "two"]}')
    endpoint = Endpoint()
    count = itertools.count()

    def say(prompt):
        i = next(count)
        if 'Answer with one number' in prompt:
            return str(1 + i % 10)
        if 'exercise' in prompt:
            added = i + 1 if i % 3 == 0 else i  # each third solution is wrong
            return (f'```python\ndef add_{i}(n: int) -> int:\n    """Return n plus {i}.\n\n'
                    f'    >>> add_{i}(1)\n    {i + 1}\n    """\n    return n + {added}\n```')
        return f'Page {i} tells of adding {i} to a number, step by step and in plain words.'
    endpoint.say = say
    environment = os.environ | {'OPENAI_BASE_URL': endpoint.url, 'NO_PROXY': '127.0.0.1'}
    command = [PREPARE, '--source=api', '--raw_chars=100000', '--pages=30', '--exercises=24',
               '--problems=3', '--rated=20', '--vocab_size=400', '--topics=topics.json',
               '--teacher=local', '--price_in=0', '--price_out=0', '--allow_code_execution=True']
    _, error = run(*command, cwd=tmp_path, env=environment)
    for stage in ('ratings', 'pages', 'exercises'):
        assert re.search(rf'{stage}: 100%.*\$0.0000', error)
    data = Dataset(str(tmp_path / 'data/textbook_exercises'))
    text = folio.tokenizer.load(data.spec).decode(data.tokens('train').tolist())
    assert text.count('def add_') > 8 and data.mask('train') is not None
    for number, added in re.findall(r'def add_(\d+).*?return n \+ (\d+)', text, re.DOTALL):
        assert number == added
    assert len(endpoint.asked) == 20 + 30 + 24
    run(*command, cwd=tmp_path, env=environment)
    endpoint.server.shutdown()
    assert len(endpoint.asked) == 74  # nothing is asked twice


def test_without_humaneval_a_teacher_can_be_asked_all_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, 'source', 'api')

    def fail(name):
        raise UserError('could not download HumanEval.jsonl.gz')
    monkeypatch.setattr(prepare.humaneval, 'load', fail)
    assert prepare.other_problems() == []
    assert 'could not download HumanEval.jsonl.gz; until then' in capsys.readouterr().err


@pytest.mark.parametrize('args, says', [
    (['--source=web'], 'choose from builtin, hub, api'),
    (['--keep=0.0'], 'keep is 0.0; it must be above 0'),
    (['--val_share=1.0'], 'val_share is 1.0; it must lie between 0 and 1'),
    (['--problems=0'], 'problems is 0; it must be at least 1'),
    (['--concurrency=0'], 'concurrency is 0; it must be at least 1'),
    (['--pages=3', '--raw_chars=90000'], 'too few to learn from'),
    pytest.param(['--source=api'], 'OPENAI_API_KEY', marks=needs_openai),
    (['--source=api', '--teacher=x'], 'what does x cost?')])
def test_a_mistake_in_preparing_is_one_line(tmp_path, monkeypatch, args, says):
    for name in ('OPENAI_BASE_URL', 'OPENAI_API_KEY'):
        monkeypatch.delenv(name, raising=False)
    _, err = run(PREPARE, '--exercises=20', *args, cwd=tmp_path, status=2)
    line = err.splitlines()[-1]  # there may be a notice about examples that are not run
    assert line.startswith('error: ') and says in line
    assert not (tmp_path / 'data').exists()


# ---- The study -----------------------------------------------------------------------------------
def test_the_study_trains_four_models_and_continues_where_it_was(prepared_once, tmp_path):
    shutil.copytree(prepared_once[0] / 'data', tmp_path / 'data')
    tiny = ('--device=cpu --n_layer=1 --n_head=1 --n_embd=16 --block_size=32 --batch_size=2 '
            '--max_iters=2 --warmup_iters=0 --eval_iters=2 --eval_interval=1')
    command = [STUDY, '--seeds=1', '--max_new_tokens=4', '--allow_code_execution=True',
               f'--settings={tiny}']
    out, error = run(*command, cwd=tmp_path)
    progress = re.findall('---- run (.*)', error)
    assert progress[0] == '1 of 4: raw code, seed 1'
    last = r'4 of 4: textbook, then exercises, seed 1; about \d+ min to go'
    assert re.fullmatch(last, progress[-1])
    assert error.count('step 2: val loss') == 4  # what train.py says is passed on
    none_solved = r'0\.0 ± 0\.0 %'
    row = rf'^\| ([a-z, ]+) \| ([\d.]+) \| {none_solved} \| {none_solved} \|$'  # a loss alone
    rows = re.findall(row, out, re.MULTILINE)
    names = [name for name, _ in rows]
    assert names == ['raw code', 'textbook', 'raw code, then exercises', 'textbook, then exercises']
    results = tmp_path / 'out/textbook_study'
    assert len(list(results.glob('*/result.json'))) == 4
    log = read(results / 'textbook_then_exercises_1/log.jsonl')
    losses = [entry['val_loss'] for entry in log if 'val_loss' in entry]
    assert rows[1][1] == f'{losses[0]:.3f}' and rows[3][1] == f'{losses[-1]:.3f}'

    # Of four results one is missing: only that one is made again
    (results / 'textbook_then_exercises_1/result.json').unlink()
    again, error = run(*command, cwd=tmp_path)
    assert again == out
    assert re.findall('---- run (.*)', error) == ['4 of 4: textbook, then exercises, seed 1']
    _, error = run(*command, '--temperature=1.0', cwd=tmp_path, status=2)
    assert 'was made with other settings' in error


def test_results_of_an_edited_recipe_are_refused(prepared_once, tmp_path, monkeypatch):
    monkeypatch.chdir(prepared_once[0])
    monkeypatch.setattr(study, 'out_dir', str(tmp_path / 'out'))
    for recipe in set(study.CONFIGS.values()):
        shutil.copy(os.path.join(study.HERE, recipe), tmp_path)
    monkeypatch.setattr(study, 'HERE', str(tmp_path))
    for name, seed in itertools.product(study.CONFIGS, range(1, study.seeds + 1)):
        folder = study.folder_of(name, seed)
        os.makedirs(folder)
        write_jsonl(os.path.join(folder, 'result.json'), [{'made_with': study.made_with()}])
    assert len(study.all_results()) == 4
    with open(tmp_path / 'train_textbook.py', 'a', encoding='utf-8') as f:
        f.write('max_iters = 900\n')
    with pytest.raises(UserError, match='other settings, recipes or data'):
        study.all_results()


def test_the_larger_error_of_seeds_and_problems_is_shown():
    results = [{'pass@1': p, 'pass@1_stderr': 0.01} for p in (0.1, 0.2, 0.6)]
    assert study.percentage(results, 'pass@1') == '30.0 ± 15.3 %'
    assert study.percentage(results[:1], 'pass@1') == '10.0 ± 1.0 %'
    results = [result | {'pass@1_stderr': 0.2} for result in results]
    assert study.percentage(results, 'pass@1') == '30.0 ± 20.0 %'
    assert study.loss_cell([1.0, 2.0]) == '1.500 ± 0.500'


def test_the_two_pretrainings_differ_in_nothing_but_the_data():
    def settings(name):
        found = {}
        path = ROOT / 'extras' / 'textbook' / name
        exec(path.read_text(encoding='utf-8'), found)
        del found['__builtins__']
        return found
    filtered = settings('train_textbook.py')
    raw = settings('train_textbook_raw.py')
    assert filtered.keys() == raw.keys()
    assert {key for key in filtered if filtered[key] != raw[key]} == {'out_dir', 'dataset'}


def test_the_study_asks_before_it_runs_what_a_model_wrote(tmp_path):
    _, error = run(STUDY, cwd=tmp_path, status=2)
    assert error.startswith('error: this runs code') and '--allow_code_execution=True' in error
