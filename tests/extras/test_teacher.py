"""Test the teacher against an endpoint on 127.0.0.1 that answers, or does not, as it is told."""
import collections
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import types

import pytest

from conftest import ROOT
from extras.textbook import teacher as teachers
from folio.configurator import UserError

# What can befall a request: an HTTP status, a body cut short, broken JSON, JSON without choices, an
# empty answer, a connection closed without a word; or an answer
TROUBLE = [429, 500, 'cut', 'broken', 'ok', 'no choices', 'empty', 503, 'ok', 'cut', 'refused']
# Dollars per million tokens. The endpoint counts by these too.
PRICES = {'price_in': 10.0, 'price_out': 50.0}
RUN = '''
import sys
sys.path.insert(0, sys.argv[1])
from extras.textbook import teacher
from folio import configurator
sys.excepthook = configurator.report
pupil = teacher.Teacher('wise', 'folder', 1000, concurrency=4)
print(len(dict(pupil.ask(f'question {i}' for i in range(40)))))
'''


class Endpoint:
    """A server that speaks OpenAI's protocol.

    url: its address.
    trouble: what befalls the next requests; when the list is used up, they are answered.
    say(prompt): the answer.
    hold_after: how many requests are let through before the others wait for `go`.
    asked: the prompts of all requests so far.
    served: [(prompt, cost)] of the requests that it took money for.
    """

    def __init__(self):
        self.trouble = []
        self.say = str.upper
        self.hold_after = 10**9
        self.asked = []
        self.served = []
        self.lock = threading.Lock()
        self.go = threading.Event()
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), self.handler())
        self.server.handle_error = lambda *args: None  # a client was killed
        self.url = f'http://127.0.0.1:{self.server.server_port}/v1'
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def wait_for(self, n_asked):
        while len(self.asked) < n_asked:
            self.go.wait(0.01)

    def handler(endpoint):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
                [message] = request['messages']
                prompt = message['content']
                with endpoint.lock:
                    text = endpoint.say(prompt)
                    how = endpoint.trouble.pop(0) if endpoint.trouble else 'ok'
                    endpoint.asked.append(prompt)
                    hold = len(endpoint.asked) > endpoint.hold_after
                if hold:
                    endpoint.go.wait()
                if self.headers['Authorization'] != 'Bearer right':
                    how = 401
                if how == 'refused':
                    return
                if how == 'no credit':
                    how = 429
                    text = 'insufficient_quota'
                # Fewer tokens than the teacher reserved money for
                tokens_in = len(prompt) // 3
                tokens_out = request['max_tokens'] * 2 // 3
                if isinstance(how, str):  # not an HTTP error: it was answered, one way or another
                    cost = (tokens_in * 10 + tokens_out * 50) / 1e6
                    endpoint.served.append((prompt, cost))
                content = {
                    'choices': [{'message': {'role': 'assistant', 'content': text}}],
                    'usage': {'prompt_tokens': tokens_in, 'completion_tokens': tokens_out}}
                if how == 'empty':
                    content['choices'][0]['message']['content'] = ''
                if how == 'no choices':
                    content = {'error': 'overloaded'}
                body = json.dumps(content).encode()
                if how == 'broken':
                    body = body[:-7]
                if how == 'deep':
                    body = b'[' * 10**5
                self.send_response(how if isinstance(how, int) else 200)
                if how == 429:
                    self.send_header('Retry-After', '7')
                self.send_header('Content-Length', str(len(body)))
                self.end_headers()
                if how == 'cut':
                    body = body[:len(body) // 2]
                self.wfile.write(body)

            def log_message(self, *args):
                pass
        return Handler


@pytest.fixture
def waits(monkeypatch):
    """The seconds that the teacher asks to wait each time, a list; no time passes."""
    class Event(threading.Event):
        def wait(self, seconds):
            waits.append(seconds)
    waits = []
    patched = types.SimpleNamespace(**vars(threading) | {'Event': Event})
    monkeypatch.setattr(teachers, 'threading', patched)
    return waits


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    endpoint = Endpoint()
    monkeypatch.setenv('OPENAI_BASE_URL', endpoint.url)
    monkeypatch.setenv('OPENAI_API_KEY', 'right')
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setattr(teachers, 'BACKOFF', 0.001)
    monkeypatch.chdir(tmp_path)
    yield endpoint
    endpoint.go.set()
    endpoint.server.shutdown()


def ask(prompts, **options):
    """Return {prompt: answer} by a teacher that is closed again, and what it has spent."""
    teacher = teachers.Teacher('wise', 'folder', **{'budget': 1000} | options)
    try:
        return dict(teacher.ask(prompts)), teacher.spent
    finally:
        teacher.close()


def on_disk():
    """Return the prompts whose answers are in the file, in its order."""
    with open('folder/answers.jsonl', encoding='utf-8') as f:
        return [entry['prompt'] for entry in map(json.loads, f) if 'text' in entry]


QUESTIONS = [f'question {i}' for i in range(40)]


# ---- Asking --------------------------------------------------------------------------------------
def test_every_good_answer_is_kept_exactly_once_whatever_befalls(endpoint, waits):
    endpoint.trouble = TROUBLE * 4
    answers, _ = ask(QUESTIONS + QUESTIONS[:5], tries=30)
    assert answers == {question: question.upper() for question in QUESTIONS}
    assert not endpoint.trouble
    assert sorted(on_disk()) == sorted(QUESTIONS)
    assert len(endpoint.asked) == len(QUESTIONS) + 4 * len([how for how in TROUBLE if how != 'ok'])


def test_what_was_answered_is_never_asked_again(endpoint):
    first, spent = ask(QUESTIONS[:30], **PRICES)
    again, spent_again = ask(QUESTIONS, **PRICES)
    assert first.items() <= again.items() and len(endpoint.asked) == len(on_disk()) == 40
    assert spent == pytest.approx(sum(cost for _, cost in endpoint.served[:30]))
    assert spent_again == pytest.approx(sum(cost for _, cost in endpoint.served))


def test_killed_and_restarted_it_asks_twice_only_for_what_was_under_way(endpoint):
    """Four threads; requests 13 to 16 are held, so twelve answers are written before the kill."""
    endpoint.hold_after = 12
    command = [sys.executable, '-c', RUN, str(ROOT)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE)
    endpoint.wait_for(16)
    process.kill()
    process.communicate()
    under_way = endpoint.asked[12:16]
    assert sorted(on_disk()) == sorted(endpoint.asked[:12])
    endpoint.go.set()
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == '40\n'
    times = collections.Counter(endpoint.asked)
    assert set(times) == set(QUESTIONS)
    assert {question for question in times if times[question] > 1} == set(under_way)
    assert max(times.values()) == 2
    assert sorted(on_disk()) == sorted(QUESTIONS)


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no signal that stands for Ctrl-C')
def test_ctrl_c_keeps_what_was_under_way_too(endpoint):
    endpoint.hold_after = 12
    command = [sys.executable, '-c', RUN, str(ROOT)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    endpoint.wait_for(16)
    process.send_signal(signal.SIGINT)
    while 'stopping' not in process.stderr.readline():
        assert process.poll() is None
    endpoint.go.set()
    assert process.stderr.read().endswith('interrupted\n') and process.wait(30) == 130
    assert len(endpoint.asked) == 16 and sorted(on_disk()) == sorted(endpoint.asked)


def test_a_torn_last_line_is_cut_off_and_asked_for_again(endpoint):
    ask(QUESTIONS[:3])
    with open('folder/answers.jsonl', 'rb+') as f:
        f.truncate(os.path.getsize('folder/answers.jsonl') - 9)
    whole = open('folder/answers.jsonl', 'rb').readlines()[:5]
    assert len(ask(QUESTIONS[:3])[0]) == 3
    assert len(endpoint.asked) == 4 and len(on_disk()) == 3
    assert open('folder/answers.jsonl', 'rb').readlines()[:5] == whole


def test_it_waits_longer_each_time_and_as_long_as_it_is_told(endpoint, waits):
    endpoint.trouble = [500, 500, 500, 429]
    assert len(ask(QUESTIONS[:1])[0]) == 1
    for n, seconds in enumerate(waits[:3]):
        assert 0.0005 * 2**n <= seconds <= 0.0015 * 2**n
    assert waits[3:] == [7.0]


@pytest.mark.parametrize('text, seconds', [
    ('12', 12.0), ('-1', 0.0), ('soon', 0.0), ('', 0.0), ('inf', 3600.0),
    ('Wed, 21 Oct 2015 07:28:00 GMT', 0.0), ('Fri, 01 Jan 2100 00:00:00 GMT', 3600.0)])
def test_retry_after_is_a_number_or_a_date(text, seconds):
    assert teachers.seconds_of(text) == seconds


def test_a_prompt_is_given_up_after_its_tries_and_tried_again_by_the_next_run(
        endpoint, waits, capfd):
    endpoint.trouble = [500] * 3
    assert list(ask(QUESTIONS[:2], concurrency=1, tries=3)[0]) == QUESTIONS[1:2]
    said = capfd.readouterr().err
    assert '1 prompts were given up after 3 tries each, the last for HTTP 500' in said
    assert len(ask(QUESTIONS[:2])[0]) == 2


def test_an_endpoint_that_never_answers_ends_the_run(endpoint, waits):
    endpoint.trouble = [500] * 1000
    with pytest.raises(UserError, match='24 requests in a row had no answer, the last for HTTP'):
        ask(QUESTIONS, concurrency=1, tries=3)
    assert len(endpoint.asked) == 24


# ---- Money ---------------------------------------------------------------------------------------
@pytest.mark.parametrize('concurrency', [1, 8])
@pytest.mark.parametrize('trouble', [[], TROUBLE * 10], ids=['calm', 'trouble'])
def test_the_budget_is_never_exceeded(endpoint, waits, concurrency, trouble, capfd):
    endpoint.trouble = list(trouble)
    budget = 0.1  # a good answer costs 0.0033, and 0.0061 are reserved for it
    options = {'budget': budget, 'concurrency': concurrency, 'max_tokens': 100} | PRICES
    answers, spent = ask(QUESTIONS, **options)
    assert sum(cost for _, cost in endpoint.served) <= spent + 1e-9 <= budget + 2e-9
    assert 0 < len(answers) < 40 and spent > 0.9 * budget
    assert 'the budget of 0.1 has no room for another answer' in capfd.readouterr().err
    n_asked = len(endpoint.asked)
    assert ask(QUESTIONS, **options) == (answers, pytest.approx(spent))
    assert len(endpoint.asked) == n_asked


def test_without_prices_the_budget_is_a_number_of_answers(endpoint):
    for _ in range(2):  # the second run finds it used up
        assert len(ask(QUESTIONS, budget=13)[0]) == 13
        assert len(endpoint.asked) == 13


def test_what_was_under_way_at_a_kill_counts_as_spent(endpoint):
    os.mkdir('folder')
    with open('folder/answers.jsonl', 'w') as f:
        f.write('{"request": "a", "cost": 9}\n'  # under way at the kill
                '{"request": "b", "cost": 5}\n{"request": "b", "cost": 2}\n')
    _, spent = ask(QUESTIONS, budget=13)
    assert spent == 13 and len(endpoint.asked) == 2


# ---- Keys and strangers' answers -----------------------------------------------------------------
class Repeater(http.server.BaseHTTPRequestHandler):
    """An endpoint that repeats what it was sent, and remembers it in .seen."""
    seen = []
    status = 500

    def do_POST(self):
        self.rfile.read(int(self.headers['Content-Length']))
        self.seen.append(self.headers['Authorization'])
        body = f'bad \x1b[2J\x00 header {self.headers["Authorization"]}'.encode()
        self.send_response(self.status)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(params=[401, 500, 200])
def repeater(request, monkeypatch, tmp_path):
    """Return (Repeater, its address without http://), and set the variables for it."""
    Repeater.seen = []
    Repeater.status = request.param
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Repeater) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f'127.0.0.1:{server.server_port}'
        monkeypatch.setenv('OPENAI_BASE_URL', f'http://user:s3cretpw@{address}/v1')
        monkeypatch.setenv('OPENAI_API_KEY', 'sk-SECRETKEY')
        monkeypatch.setenv('NO_PROXY', '127.0.0.1')
        monkeypatch.setattr(teachers, 'BACKOFF', 0.001)
        monkeypatch.chdir(tmp_path)
        yield address
        server.shutdown()


def test_neither_key_nor_password_is_ever_shown(repeater, capfd):
    said = ''
    try:
        ask(['question'], tries=2)
    except UserError as e:
        said = str(e)
    said += capfd.readouterr().err
    assert 'header Bearer …' in said
    assert 'SECRETKEY' not in said and 's3cretpw' not in said
    assert set(Repeater.seen) == {'Bearer sk-SECRETKEY'}


def test_a_netrc_does_not_replace_the_key(repeater, tmp_path, monkeypatch):
    (tmp_path / 'netrc').write_text('default login netrcuser password netrcpw\n')
    monkeypatch.setenv('NETRC', str(tmp_path / 'netrc'))
    try:
        ask(['question'], tries=1)
    except UserError:
        pass
    assert set(Repeater.seen) == {'Bearer sk-SECRETKEY'}


def test_an_address_is_shown_without_its_password(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv('OPENAI_BASE_URL', 'http://user:s3cretpw@127.0.0.1:9/v1')
    monkeypatch.setattr(teachers, 'BACKOFF', 0.001)
    monkeypatch.chdir(tmp_path)
    ask(['question'], tries=1)
    shown = capfd.readouterr().err
    assert '127.0.0.1:9/v1' in shown and 's3cretpw' not in shown


@pytest.mark.parametrize('line', [
    '{"request": "a", "cost": 1, "key": "k", "text": 7}', '{"request": "a", "cost": NaN}',
    '{"request": [], "cost": 1}', '{"request": "a", "cost": "x"}', '[' * 10**5, '7', 'null'])
def test_an_entry_that_cannot_be_is_named(endpoint, line):
    os.mkdir('folder')
    with open('folder/answers.jsonl', 'w') as f:
        f.write(line + '\n')
    with pytest.raises(UserError, match='answers.jsonl, line 1 is damaged'):
        ask(QUESTIONS)


def test_json_nested_deeper_than_python_can_follow_is_a_failure_like_others(endpoint, capfd):
    endpoint.trouble = ['deep'] * 2
    assert ask(['question'], tries=2)[0] == {}
    assert 'a malformed answer' in capfd.readouterr().err
    assert teachers.parse_list('[' * 10**5 + ']') == []


# ---- Mistakes ------------------------------------------------------------------------------------
@pytest.mark.parametrize('variables, trouble, says', [
    ({'OPENAI_API_KEY': 'wrong'}, [], 'HTTP 401 .* check OPENAI_API_KEY'),
    ({}, [404] * 9, 'HTTP 404 .* check the name of the teacher'),
    ({}, [400] * 9, 'HTTP 400 for wise'),
    ({}, ['no credit'] * 9, 'HTTP 429 .* check OPENAI_API_KEY and its credit'),
    ({'OPENAI_API_KEY': '', 'OPENAI_BASE_URL': ''}, [], 'set OPENAI_API_KEY'),
    ({'OPENAI_BASE_URL': 'localhost:8000'}, [], 'OPENAI_BASE_URL is localhost:8000'),
], ids=['key', 'model', 'request', 'no credit', 'no key', 'address'])
def test_a_mistake_is_one_line_and_costs_nothing(endpoint, monkeypatch, variables, trouble, says):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    endpoint.trouble = trouble
    endpoint.say = lambda prompt: 'several\n\nlines\n'
    with pytest.raises(UserError) as error:
        ask(QUESTIONS)
    assert re.search(says, str(error.value)) and '\n' not in str(error.value)
    assert len(endpoint.asked) <= 8 and not endpoint.served
    if endpoint.asked:
        assert ask([])[1] == 0


def test_two_runs_in_one_folder_are_refused(endpoint):
    pytest.importorskip('fcntl')
    first = teachers.Teacher('wise', 'folder', 1)
    with pytest.raises(UserError, match='another run is at work in folder'):
        teachers.Teacher('wise', 'folder', 1)
    first.close()


def test_a_damaged_file_is_named_with_its_line(endpoint):
    ask(QUESTIONS[:1])
    with open('folder/answers.jsonl', 'a') as f:
        f.write('???\n')
    with pytest.raises(UserError, match=r'folder.answers\.jsonl, line 3 is damaged'):
        ask(QUESTIONS[:1])


# ---- Lessons -------------------------------------------------------------------------------------
GOOD = '''Here you are:
```python
import math

def area(r: float) -> float:
    """The area of a circle.

    >>> round(area(1.0), 2)
    3.14
    """
    # by Archimedes
    return math.pi * r**2

print(area(2.0))
```
Have fun!'''


@pytest.fixture
def wise(endpoint):
    teacher = teachers.Teacher('wise', 'folder', 1000)
    yield teacher
    teacher.close()


@pytest.mark.parametrize('answer, items', [
    ('["lists", "loops"]', ['lists', 'loops']),
    ('Sure:\n```json\n["lists",\n "loops", 3, "lists"]\n```', ['lists', 'loops']),
    ('Here are two:\n1. lists\n2) **loops**\n', ['lists', 'loops']),
    ('- lists\n* "loops",', ['lists', 'loops']),
    ('lists\n\nloops', ['lists', 'loops']),
    ('', []),
])
def test_lists_are_read_in_whatever_form_they_come(answer, items):
    assert teachers.parse_list(answer) == items


@pytest.mark.parametrize('answer, rating', [
    ('7', 7.0), ('**8/10**', 8.0), ('Rating: 6.5', 6.5), ('I give it 9 out of 10.', 9.0),
    ('On a scale of 1 to 10: 4', 4.0), ('Its score is 3, for 2 reasons', 3.0),
    ('{"rating": 5}', 5.0), ('0', None), ('11', None), ('good', None), ('', None)])
def test_ratings_are_read_in_whatever_form_they_come(answer, rating):
    assert teachers.parse_rating(answer) == rating


def test_a_rating_belongs_to_its_text(endpoint, wise):
    endpoint.say = lambda prompt: {'A': '3', 'B': '9/10', 'C': 'what?'}[prompt[-1]]
    assert teachers.rate(wise, ['B', 'A', 'C', 'B']) == [9.0, 3.0, None, 9.0]
    assert len(endpoint.asked) == 3


def test_the_tree_is_asked_of_the_teacher_once(endpoint, wise):
    def say(prompt):
        return '["a", "b", "c"]' if 'subtopics' in prompt else '1. lists\n2. loops\n3. files'
    endpoint.say = say
    found = teachers.topics(wise, 36)
    assert len({(c['topic'], c['subtopic']) for c in found}) == 9
    assert len(found) == 9 * len(teachers.PROFESSIONS) and found[0]['topic'] == 'lists'
    assert len(endpoint.asked) == 4
    assert teachers.topics(wise, 36) == found
    assert len(endpoint.asked) == 4


def test_the_tree_is_read_from_a_file(wise, endpoint, tmp_path):
    (tmp_path / 'tree.json').write_text('{"lists": ["slices", "sorting"]}')
    found = teachers.topics(wise, 5, 'tree.json')
    assert {c['subtopic'] for c in found} == {'slices', 'sorting'}
    for wrong in ('[]', '{"a": 1}', '{', '{}', '{"a": "slices"}', '{"a": [1]}', '{"a": {}}'):
        (tmp_path / 'tree.json').write_text(wrong)
        with pytest.raises(UserError, match='tree.json'):
            teachers.topics(wise, 5, 'tree.json')
    assert not endpoint.asked


def test_each_page_is_of_another_combination_of_a_seeded_shuffle(wise, endpoint, tmp_path, capsys):
    (tmp_path / 'tree.json').write_text('{"lists": ["slices", "sorting"]}')

    def say(prompt):
        return '  One page. ' if 'farmer' in prompt else f'A page on {prompt}'
    endpoint.say = say
    pages = teachers.write_textbook(wise, 30, 1, 'tree.json')
    assert pages == teachers.write_textbook(wise, 30, 1, 'tree.json')
    assert set(teachers.write_textbook(wise, 20, 1, 'tree.json')) <= set(pages)
    assert len(set(endpoint.asked)) == len(endpoint.asked) == 30
    assert teachers.write_textbook(wise, 30, 2, 'tree.json') != pages
    all_pages = teachers.write_textbook(wise, 1000, 1, 'tree.json')
    combinations = 2 * len(teachers.PROFESSIONS)
    assert len(all_pages) == combinations - 1 and 'One page.' in all_pages
    assert len(endpoint.asked) == combinations
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (f'textbook pages: asked for 1,000, {combinations} combinations, '
                    f'{combinations} answers, {combinations - 1} kept; a repeat: 1')


def test_an_exercise_is_cut_after_its_docstring():
    (prompt, solution), _ = teachers.parse_exercise(GOOD)
    assert prompt.startswith('import math\n\ndef area') and prompt.endswith('3.14\n    """\n')
    assert solution == '    # by Archimedes\n    return math.pi * r**2\n'
    assert teachers.parse_exercise(GOOD.replace('\n', '\r\n'))[0] == (prompt, solution)
    without_fence = GOOD.split('```python\n')[1].split('```')[0]
    assert teachers.parse_exercise(without_fence)[0] == (prompt, solution)


@pytest.mark.parametrize('answer, why', [
    (GOOD.replace('r: float)', 'r: float'), 'does not compile'),
    (GOOD.replace('    return', 'return'), 'does not compile'),
    (GOOD.replace('>>> ', ''), 'no function documented'),
    (GOOD.replace('    # by Archimedes\n    return math.pi * r**2\n', ''),
     'no function documented'),
    ('```python\ndef f(): ">>> f()"; return 1\n```', 'no function documented'),
    ('I cannot help with that.', 'does not compile'),
    (GOOD.replace('r**2', ' + '.join(['r'] * 400)), 'too deeply nested|does not compile'),
], ids=['syntax', 'return', 'examples', 'stub', 'line', 'prose', 'depth'])
def test_what_is_not_an_exercise_is_refused_with_the_reason(answer, why):
    with pytest.raises(ValueError, match=why):
        teachers.parse_exercise(answer)


def test_exercises_that_fail_or_repeat_are_dropped_and_counted(wise, endpoint, tmp_path, capsys):
    (tmp_path / 'tree.json').write_text('{"lists": ["slices"]}')
    repeat = GOOD.replace('    # by Archimedes\n', '\n')
    repeat = repeat.replace('math.pi * r**2', 'math.pi*r ** 2')
    answers = [GOOD, repeat, GOOD.replace('area', 'size'), GOOD.replace('r**2', 'r'),
               'I am sorry.', GOOD.replace('>>>', '')]
    said = {}
    endpoint.say = lambda prompt: said.setdefault(prompt, answers[len(said) % 6])

    def runs(prompt, solution):
        return 'r**2' in solution or 'r ** 2' in solution
    kept = teachers.write_exercises(wise, 6, 1, 'tree.json', runs)
    assert sorted(re.search(r'def (\w+)', prompt)[1] for prompt, _ in kept) == ['area', 'size']
    line = capsys.readouterr().out
    assert line.count('\n') == 1
    for why in ('a repeat', 'does not run as its examples say', 'does not compile',
                'no function documented with examples'):
        assert f'; {why}: 1' in line
