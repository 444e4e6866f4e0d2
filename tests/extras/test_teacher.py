"""Test the teacher against an endpoint on 127.0.0.1 that answers, or does not, as it is told."""
import collections
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT
from endpoint import TOKENS_IN, TOKENS_OUT, Endpoint

pytest.importorskip('openai', reason='needs openai: pip install -r extras/requirements.txt')
from extras.textbook import teacher as teachers
from folio.configurator import UserError

PRICES = {'price_in': 10.0, 'price_out': 50.0}  # dollars per million tokens
COST = (TOKENS_IN * 10 + TOKENS_OUT * 50) / 1e6
QUESTIONS = [f'question {i}' for i in range(40)]


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    endpoint = Endpoint()
    monkeypatch.setenv('OPENAI_BASE_URL', endpoint.url)
    monkeypatch.setenv('OPENAI_API_KEY', 'right')
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.chdir(tmp_path)
    yield endpoint
    endpoint.go.set()
    endpoint.server.shutdown()


def ask(prompts, model='wise', **options):
    """Return {prompt: answer} by a teacher that is closed again, and what it has spent."""
    options = {'budget': 1000, **PRICES} | options
    teacher = teachers.Teacher(model, 'folder', **options)
    try:
        return teacher.ask(prompts, 'answers'), teacher.spent
    finally:
        teacher.close()


def on_disk():
    """Return the prompts whose answers are in the file, in its order."""
    with open('folder/answers.jsonl', encoding='utf-8') as f:
        return [entry['prompt'] for entry in map(json.loads, f)]


# ---- Nothing is paid twice -----------------------------------------------------------------------
def test_every_answer_is_kept_once_through_all_faults(endpoint):
    faults = [429, 500, 'cut', 408, 'dropped', 503, 409, 429, 'cut', 502]
    endpoint.trouble = ['ok'] * 8 + faults
    answers, spent = ask(QUESTIONS + QUESTIONS[:5])
    assert answers == {question: question.upper() for question in QUESTIONS}
    assert not endpoint.trouble and len(endpoint.asked) == len(QUESTIONS) + len(faults)
    assert sorted(on_disk()) == sorted(QUESTIONS)
    assert spent == pytest.approx(40 * COST)


def test_what_was_answered_is_never_asked_again(endpoint, capfd):
    first, spent = ask(QUESTIONS[:30])
    again, spent_again = ask(QUESTIONS)
    assert first.items() <= again.items() and sorted(endpoint.prompts()) == sorted(QUESTIONS)
    assert spent == pytest.approx(30 * COST) and spent_again == pytest.approx(40 * COST)
    assert re.search(r'answers: 100%.* 40/40 .*\$0\.1280', capfd.readouterr().err)


RUN = '''
import sys
from extras.textbook import teacher
from folio import configurator
sys.excepthook = configurator.report
pupil = teacher.Teacher('wise', sys.argv[1], 1000, 10.0, 50.0, concurrency=4)
print(len(pupil.ask([f'question {i}' for i in range(40)], 'answers')))
'''


def start(tmp_path, **options):
    command = [sys.executable, '-c', RUN, str(tmp_path / 'folder')]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, **options)


def test_after_a_kill_only_what_was_under_way_is_asked_again(endpoint, tmp_path):
    """Four threads; requests 13 to 16 are held, so twelve answers are written before the kill."""
    endpoint.hold_after = 12
    process = start(tmp_path, stderr=subprocess.DEVNULL)
    endpoint.wait_for(16)
    process.kill()
    process.communicate()
    under_way = endpoint.prompts()[12:16]
    assert sorted(on_disk()) == sorted(endpoint.prompts()[:12])
    endpoint.go.set()
    assert start(tmp_path).communicate()[0] == '40\n'
    times = collections.Counter(endpoint.prompts())
    assert set(times) == set(QUESTIONS) and max(times.values()) == 2
    assert {question for question in times if times[question] > 1} == set(under_way)
    assert sorted(on_disk()) == sorted(QUESTIONS)


def test_ctrl_c_keeps_what_was_under_way_too(endpoint, tmp_path):
    endpoint.hold_after = 12
    process = start(tmp_path, stderr=subprocess.PIPE)
    endpoint.wait_for(16)
    process.send_signal(signal.SIGINT)
    while 'waiting for the answers' not in process.stderr.readline():
        assert process.poll() is None
    endpoint.go.set()
    assert process.stderr.read().endswith('interrupted\n') and process.wait(30) == 130
    assert len(endpoint.asked) == 16 and sorted(on_disk()) == sorted(endpoint.prompts())


def test_a_second_ctrl_c_ends_it_at_once(endpoint, tmp_path):
    endpoint.always = 'hangs'
    process = start(tmp_path, stderr=subprocess.PIPE)
    endpoint.wait_for(4)
    process.send_signal(signal.SIGINT)
    while 'waiting for the answers' not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == -signal.SIGINT


def test_a_torn_last_line_is_cut_off_and_asked_for_again(endpoint):
    ask(QUESTIONS[:3])
    with open('folder/answers.jsonl', 'rb+') as f:
        f.truncate(os.path.getsize('folder/answers.jsonl') - 9)
    assert len(ask(QUESTIONS[:3])[0]) == 3
    assert len(endpoint.asked) == 4 and sorted(on_disk()) == QUESTIONS[:3]


def test_a_damaged_line_is_named(endpoint):
    ask(QUESTIONS[:1])
    with open('folder/answers.jsonl', 'a') as f:
        f.write('???\n')
    with pytest.raises(UserError, match=r'folder.answers\.jsonl, line 2 is damaged'):
        ask(QUESTIONS[:1])


def test_two_runs_in_one_folder_are_refused(endpoint):
    first = teachers.Teacher('wise', 'folder', 1, 0, 0)
    with pytest.raises(UserError, match='another run is at work in folder'):
        teachers.Teacher('wise', 'folder', 1, 0, 0)
    first.close()


# ---- Money ---------------------------------------------------------------------------------------
@pytest.mark.parametrize('concurrency', [1, 8])
def test_a_spent_budget_ends_the_run(endpoint, concurrency):
    options = {'budget': 10 * COST, 'concurrency': concurrency}
    with pytest.raises(UserError, match=r'budget of \$0.032 is spent .*larger --budget'):
        ask(QUESTIONS, **options)
    n_asked = len(endpoint.asked)
    assert 10 <= n_asked < 10 + concurrency
    with pytest.raises(UserError, match='budget'):
        ask(QUESTIONS, **options)
    assert len(endpoint.asked) == len(on_disk()) == n_asked
    answers, spent = ask(endpoint.prompts(), **options)  # what is there may be used
    assert len(answers) == n_asked and spent == pytest.approx(n_asked * COST)


def test_each_teacher_has_a_budget_of_its_own(endpoint):
    _, spent = ask(QUESTIONS, model='local', budget=1, price_in=0, price_out=0)
    assert spent == 0 and len(endpoint.asked) == 40
    answers, spent = ask(QUESTIONS[:2], budget=1)
    assert len(answers) == 2 and spent == pytest.approx(2 * COST)
    assert ask([], model='local', price_in=0, price_out=0)[1] == 0


# ---- Answers that cannot be used -----------------------------------------------------------------
@pytest.mark.parametrize('said', [
    '<think>A list [1, 2]?\nOr not.</think>\n\nHello', 'The user wants [a list].</think>Hello',
    'Hello<think>Was that right?'])
def test_thoughts_reach_no_answer(endpoint, said):
    endpoint.say = lambda prompt: said
    for _ in range(2):  # from the endpoint, and from the file
        assert ask(['question'])[0] == {'question': 'Hello'}
    assert len(endpoint.asked) == 1


def test_a_cut_answer_is_asked_for_again_with_more_tokens(endpoint, capfd):
    endpoint.trouble = ['too long']
    for _ in range(2):
        answers, spent = ask(QUESTIONS[:2], concurrency=1)
        assert list(answers) == ['question 1'] and spent == pytest.approx(2 * COST)
        said = capfd.readouterr().err
        assert '1 of 2 answers did not fit in 1,024 tokens' in said
        assert 'a larger --max_tokens' in said
    assert len(endpoint.asked) == 2
    assert len(ask(QUESTIONS[:2], max_tokens=2048)[0]) == 2
    assert len(endpoint.asked) == 3
    assert len(ask(QUESTIONS[:2])[0]) == 2 and len(endpoint.asked) == 3


def test_without_counts_an_answer_costs_the_most_that_it_can(endpoint):
    endpoint.trouble = ['null counts']
    first = ask(QUESTIONS[:1])
    assert first[1] > 10 * COST
    assert ask(QUESTIONS[:1]) == first  # what is kept can be read again


@pytest.mark.parametrize('how', ['empty', 'filtered'])
def test_an_empty_answer_is_counted_and_asked_for_again(endpoint, capfd, how):
    endpoint.trouble = [how]
    assert len(ask(QUESTIONS[:2], concurrency=1)[0]) == 1
    assert '1 of 2 prompts got no answer (the last: an empty' in capfd.readouterr().err
    assert len(ask(QUESTIONS[:2])[0]) == 2


def test_a_refused_prompt_among_answered_ones_is_counted(endpoint, capfd):
    endpoint.trouble = ['ok', 400]
    assert len(ask(QUESTIONS[:5], concurrency=1)[0]) == 4
    said = capfd.readouterr().err
    assert '1 of 5 prompts got no answer (the last: Error code: 400 - a fault)' in said


def test_a_server_that_wants_max_completion_tokens_gets_them(endpoint):
    endpoint.always = 'wants the other name'
    assert len(ask(QUESTIONS)[0]) == 40
    names = collections.Counter(name for _, name in endpoint.asked)
    assert names['max_completion_tokens'] == 40 and 1 <= names['max_tokens'] <= 8


# ---- Mistakes and faults that stay ---------------------------------------------------------------
def test_it_waits_as_long_as_it_is_told(endpoint):
    endpoint.trouble = ['wait']
    began = time.monotonic()
    assert len(ask(QUESTIONS[:1])[0]) == 1
    assert time.monotonic() - began >= 1


@pytest.mark.parametrize('how, says, most', [
    (401, 'Incorrect API key provided: wrong; check OPENAI_API_KEY', 8),
    (403, 'check OPENAI_API_KEY', 8),
    (404, 'The model `wise` does not exist .*; check --teacher and OPENAI_BASE_URL', 8),
    (400, 'Error code: 400 - a fault', 8),
    (429, 'Rate limit reached .*; wait, lower --concurrency', 32),
    ('no credit', 'You exceeded your current quota.* or add credit', 32),
    (500, 'Error code: 500', 32),
    ('dropped', 'is it running', 32),
    ('cut', 'is it running', 32),
    ('hangs', 'timed out; it may need a smaller --max_tokens', 32),
    ('broken', 'Unterminated string', 8),
    ('a page', 'this is not a completion: <html>Please log in</html>', 8),
    ('no choices', 'this is not a completion: .*overloaded', 8),
], ids=str)
def test_a_fault_that_stays_ends_the_run_in_one_line(endpoint, monkeypatch, how, says, most):
    monkeypatch.setattr(teachers, 'TIMEOUT', 0.3)
    endpoint.always = how
    with pytest.raises(UserError) as error:
        ask(QUESTIONS)
    message = str(error.value)
    assert re.search(says, message) and '\n' not in message and 'answered is kept' in message
    assert len(endpoint.asked) <= most and on_disk() == []
    endpoint.always = 'ok'
    endpoint.go.set()
    assert len(ask(QUESTIONS)[0]) == 40


@pytest.mark.parametrize('variables, says', [
    ({'OPENAI_API_KEY': '', 'OPENAI_BASE_URL': ''}, 'set OPENAI_API_KEY'),
    ({'OPENAI_BASE_URL': 'http://user:secret@127.0.0.1:9/v1'},
     'wise at 127.0.0.1:9: .*Connection refused; is it running'),
    ({'OPENAI_BASE_URL': 'localhost:8000'}, 'protocol .*Check OPENAI_BASE_URL'),
], ids=['no key', 'nobody there', 'no address'])
def test_an_endpoint_that_is_not_there_is_said_in_one_line(endpoint, monkeypatch, variables, says):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says) as error:
        ask(QUESTIONS)
    assert '\n' not in str(error.value) and 'secret' not in str(error.value)
