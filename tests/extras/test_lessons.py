"""extras/textbook/lessons.py: what a teacher is asked for, and how its answers are read."""
import re

import pytest

from extras.textbook import lessons
from folio.configurator import UserError


class Teacher:
    """A teacher that answers with say(prompt), and remembers what it was asked."""

    def __init__(self, say):
        self.say = say
        self.asked = []

    def ask(self, prompts, what):
        self.asked += prompts
        return {prompt: self.say(prompt) for prompt in prompts}


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


@pytest.mark.parametrize('answer, items', [
    ('["lists", "loops"]', ['lists', 'loops']),
    ('Sure:\n```json\n["lists",\n "loops", 3, "lists"]\n```', ['lists', 'loops']),
    ('Here are two:\n1. lists\n2) **loops**\n', ['lists', 'loops']),
    ('- lists\n* "loops",', ['lists', 'loops']),
    ('```json\n[\n"lists",\n"loops",\n', ['lists', 'loops']),
    ('lists\n\nloops', ['lists', 'loops']),
    ('', []),
])
def test_lists_are_read_in_whatever_form_they_come(answer, items):
    assert lessons.parse_list(answer) == items


@pytest.mark.parametrize('answer, rating', [
    ('7', 7.0), ('**8/10**', 8.0), ('Rating: 6.5', 6.5), ('I give it 9 out of 10.', 9.0),
    ('On a scale of 1 to 10: 4', 4.0), ('Its score is 3, for 2 reasons', 3.0),
    ('{"rating": 5}', 5.0), ('0', None), ('11', None), ('good', None), ('', None)])
def test_ratings_are_read_in_whatever_form_they_come(answer, rating):
    assert lessons.parse_rating(answer) == rating


def test_a_rating_belongs_to_its_text():
    teacher = Teacher(lambda prompt: {'A': '3', 'B': '9/10', 'C': 'what?'}[prompt[-1]])
    assert lessons.rate(teacher, ['B', 'A', 'C', 'B']) == [9.0, 3.0, None, 9.0]


def test_the_teacher_is_asked_for_topics_and_their_subtopics():
    def say(prompt):
        return '["a", "b", "c"]' if 'subtopics' in prompt else '1. lists\n2. loops\n3. files'
    teacher = Teacher(say)
    found = lessons.topics(teacher)
    assert len({(c['topic'], c['subtopic']) for c in found}) == 9 and len(teacher.asked) == 4
    assert len(found) == 9 * len(lessons.PROFESSIONS) and found[0]['topic'] == 'lists'
    with pytest.raises(UserError, match='no topics in the answers of the teacher; --topics='):
        lessons.topics(Teacher(lambda prompt: ''))


def test_topics_are_read_from_a_file(tmp_path):
    path = tmp_path / 'tree.json'
    path.write_text('{"lists": ["slices", "sorting"]}')
    assert {c['subtopic'] for c in lessons.topics(None, str(path))} == {'slices', 'sorting'}
    for wrong in ('[]', '{"a": 1}', '{', '{}', '{"a": "slices"}', '{"a": {}}'):
        path.write_text(wrong)
        with pytest.raises(UserError, match='tree.json'):
            lessons.topics(None, str(path))


COMBINATIONS = [{'topic': 'lists', 'subtopic': subtopic, 'profession': profession}
                for subtopic in ('slices', 'sorting') for profession in lessons.PROFESSIONS]


def test_each_page_is_of_another_combination_of_a_seeded_shuffle(capsys):
    def say(prompt):
        return '  One page. ' if 'farmer' in prompt else f'A page on {prompt}'
    teacher = Teacher(say)
    pages = lessons.write_textbook(teacher, COMBINATIONS, 30, seed=1)
    assert len(set(teacher.asked)) == len(teacher.asked) == 30
    assert pages == lessons.write_textbook(teacher, COMBINATIONS, 30, seed=1)
    assert pages != lessons.write_textbook(teacher, COMBINATIONS, 30, seed=2)
    fewer = lessons.write_textbook(teacher, COMBINATIONS, 20, seed=1)
    assert set(fewer) < set(pages)  # so a smaller n asks nothing new
    all_pages = lessons.write_textbook(teacher, COMBINATIONS, 1000, seed=1)
    assert len(all_pages) == 39 and 'One page.' in all_pages
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == 'pages: asked for 1,000, 40 combinations, 40 answers, 39 kept; a repeat: 1'


def test_an_exercise_is_cut_after_its_docstring():
    (prompt, solution), _ = lessons.parse_exercise(GOOD)
    assert prompt.startswith('import math\n\ndef area') and prompt.endswith('3.14\n    """\n')
    assert solution == '    # by Archimedes\n    return math.pi * r**2\n'
    assert lessons.parse_exercise(GOOD.replace('\n', '\r\n'))[0] == (prompt, solution)
    without_fence = GOOD.split('```python\n')[1].split('```')[0]
    assert lessons.parse_exercise(without_fence)[0] == (prompt, solution)


@pytest.mark.parametrize('answer, why', [
    (GOOD.replace('r: float)', 'r: float'), 'does not compile'),
    (GOOD.replace('    return', 'return'), 'does not compile'),
    (GOOD.replace('>>> ', ''), 'no function documented'),
    (GOOD.replace('    # by Archimedes\n    return math.pi * r**2\n', ''),
     'no function documented'),
    ('```python\ndef f(): ">>> f()"; return 1\n```', 'no function documented'),
    ('I cannot help with that.', 'does not compile'),
], ids=['syntax', 'return', 'examples', 'stub', 'line', 'prose'])
def test_an_answer_without_an_exercise_is_refused(answer, why):
    with pytest.raises(ValueError, match=why):
        lessons.parse_exercise(answer)


def test_exercises_that_fail_or_repeat_are_dropped_and_counted(capsys):
    repeat = GOOD.replace('    # by Archimedes\n', '\n')
    repeat = repeat.replace('math.pi * r**2', 'math.pi*r ** 2')
    answers = [GOOD, repeat, GOOD.replace('area', 'size'), GOOD.replace('r**2', 'r'),
               'I am sorry.', GOOD.replace('>>>', '')]

    def runs(prompt, solution):
        return 'r**2' in solution or 'r ** 2' in solution
    teacher = Teacher(lambda prompt: answers.pop())
    kept = lessons.write_exercises(teacher, COMBINATIONS, 6, seed=1, runs=runs)
    assert sorted(re.search(r'def (\w+)', prompt)[1] for prompt, _ in kept) == ['area', 'size']
    line = capsys.readouterr().out
    assert line.count('\n') == 1
    for why in ('a repeat', 'does not run as its examples say', 'does not compile',
                'no function documented with examples'):
        assert f'; {why}: 1' in line
