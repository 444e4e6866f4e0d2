"""extras/report.py: the page, its pictures, and the n-grams next to which it puts a run."""
import collections
import json
import re
import shutil
import types

import numpy as np
import pytest
import torch

pytest.importorskip('matplotlib')

import folio.checkpoint
from conftest import TINY, log_of, run
from extras import ngrams, plots, report

QUICK = ['--device=cpu', '--num_samples=2', '--max_new_tokens=20', '--prompts=The|If',
         '--temperatures=1.0']
OTHER_BOOK = 'Another book, with other characters: àéîõü.\n' * 100


@pytest.fixture(scope='session')
def trained_once(book_once, tmp_path_factory):
    """Return a folder with data/book and out/a, a run of 30 steps that was evaluated four times."""
    folder = tmp_path_factory.mktemp('report') / 'work'
    shutil.copytree(book_once, folder)
    run('train.py', *TINY, '--out_dir=out/a', cwd=folder)
    return folder


@pytest.fixture
def trained(trained_once, tmp_path):
    return shutil.copytree(trained_once, tmp_path / 'work')


def written(folder, *args):
    """Return the page that report.py writes, all pictures of which are there and are PNGs."""
    run('extras/report.py', *QUICK, *args, cwd=folder)
    page = (folder / 'out' / 'report' / 'report.md').read_text(encoding='utf-8')
    for name in pictures(page):
        assert (folder / 'out' / 'report' / name).read_bytes().startswith(b'\x89PNG')
    return page


def pictures(page):
    """Return the names of the pictures in a page."""
    return re.findall(r'!\[.*?\]\((.*?)\)', page)


def cells(page, name):
    """Return the cells of a row: of the first one that has this name."""
    line = next(line for line in page.splitlines() if line.startswith(f'| {name} |'))
    return [cell.strip() for cell in line.strip('|').split('|')[1:]]


def another(folder, name, edit):
    """Copy out/a to a run of another name, each entry of its log as edit(entry) returns it."""
    shutil.copytree(folder / 'out' / 'a', folder / 'out' / name)
    lines = [json.dumps(edit(entry)) + '\n' for entry in log_of(folder, 'out/a')]
    (folder / 'out' / name / 'log.jsonl').write_text(''.join(lines))


def with_settings(**settings):
    """Return a function that changes settings in a log, and leaves its other entries alone."""
    def edit(entry):
        if 'config' in entry:
            return entry | {'config': entry['config'] | settings}
        return entry
    return edit


def prepare_other_book(folder):
    """Write data/book again, with another vocabulary."""
    (folder / 'other.txt').write_text(OTHER_BOOK, encoding='utf-8')
    run('prepare/book/prepare.py', '--book=other.txt', cwd=folder)


# ---- The page ------------------------------------------------------------------------------------
def test_figures_equal_the_log_and_what_eval_only_prints(trained):
    page = written(trained, 'out/a')
    evaluations = [entry for entry in log_of(trained, 'out/a') if 'val_loss' in entry]
    best = min(evaluations, key=lambda entry: entry['val_loss'])
    assert cells(page, 'validation loss') == [f'{best["val_loss"]:.3f}']
    assert cells(page, 'best at step') == [str(best['iter'])]
    assert cells(page, 'validation bits per byte') == [f'{best["bits_per_byte"]:.3f}']
    assert cells(page, 'validated on') == ['512 of 999 tokens']

    out, _ = run('train.py', *TINY, '--out_dir=out/a', '--init_from=out/a/best.pt',
                 '--eval_only=True', '--eval_iters=0', cwd=trained)
    printed = dict(re.findall(r'^(\w+): loss (\S+),', out, re.MULTILINE))
    assert cells(page, 'test loss, whole split') == [f'{float(printed["test"]):.3f}']


def test_a_page_has_settings_curves_a_baseline_and_texts(trained):
    page = written(trained, 'out/a')
    assert cells(page, 'learning_rate') == ['0.001'] and cells(page, 'n_layer') == ['2']
    assert pictures(page) == ['loss1.png']  # one temperature makes no curve
    assert len(cells(page, 'validation loss')) == 1 and '| 6-gram |' in page
    for strategy in ('greedy', 'top-k 50', 'nucleus 0.9', 'plain sampling'):
        assert re.search(rf'^\| {strategy}.*\|$', page, re.MULTILINE)
        assert len(re.findall(f'^After “.*”, {strategy}', page, re.MULTILINE)) == 2
    assert pictures(written(trained, 'out/a', '--temperatures=0.8 1.0'))[-1] == 'text1.png'


def test_losses_by_step_are_those_of_the_log(trained):
    page = written(trained, 'out/a', '--num_samples=0')
    entries = log_of(trained, 'out/a')
    training = [e['loss'] for e in entries if 'loss' in e and 10 <= e['iter'] < 20]
    validation = [e['val_loss'] for e in entries if 'val_loss' in e and e['iter'] == 20]
    assert cells(page, '20') == [f'{np.mean(training):.3f}', f'{validation[0]:.3f}']
    assert cells(page, '0')[0] == '–'


def test_seeds_of_one_setting_are_a_mean_with_its_standard_error(trained):
    def worse(entry):
        entry = with_settings(seed=2)(entry)
        if 'val_loss' in entry:
            return entry | {'val_loss': entry['val_loss'] + 0.2}
        return entry

    another(trained, 'b', worse)
    another(trained, 'copy', with_settings())  # the same seed again
    another(trained, 'c', with_settings(learning_rate=0.5))
    page = written(trained, 'out/a', 'out/b', 'out/copy', 'out/c', '--num_samples=0')
    assert '|  | a, b | copy | c |' in page
    loss = min(e['val_loss'] for e in log_of(trained, 'out/a') if 'val_loss' in e)
    assert cells(page, 'validation loss')[0] == f'{loss + 0.1:.3f} ± 0.100'
    assert cells(page, 'validation loss')[1] == f'{loss:.3f}'  # of one seed no error is known
    assert cells(page, 'seed') == ['1337, 2', '1337', '1337']


@pytest.mark.parametrize('change, says', [
    (lambda folder: shutil.rmtree(folder / 'data'), 'no data set in data/book'),
    (prepare_other_book, 'has another vocabulary now')])
def test_a_page_needs_the_run_folder_alone(trained, change, says):
    change(trained)
    page = written(trained, 'out/a')
    assert says in page and 'test loss' not in page.partition('Losses are')[0]
    assert 'gram |' not in page and 'After “The”' in page


@pytest.mark.parametrize('lines, evaluations', [(1, 0), (7, 2)])
def test_a_run_cut_short_is_reported_as_far_as_it_goes(trained, lines, evaluations):
    log = trained / 'out' / 'a' / 'log.jsonl'
    whole = log.read_text().splitlines(keepends=True)
    log.write_text(''.join(whole[:lines]) + whole[lines][:20])  # the last line is torn
    for name in ('best.pt', 'ckpt.pt'):
        (trained / 'out' / 'a' / name).unlink()
    page = written(trained, 'out/a')
    assert 'its log ends at step' in page and 'no checkpoint' in page and 'loss1.png' in page
    val_losses = [e['val_loss'] for e in map(json.loads, whole[:lines]) if 'val_loss' in e]
    assert len(val_losses) == evaluations
    if evaluations:
        assert cells(page, 'validation loss') == [f'{val_losses[-1]:.3f}']


def test_runs_validated_alike_share_a_picture(trained):
    shutil.copytree(trained / 'out' / 'a', trained / 'more' / 'a')
    another(trained, 'b', with_settings(dataset='gone'))
    page = written(trained, 'out/a', 'out/b', 'out/a/', 'more/a', '--num_samples=0')
    assert '|  | out/a | b | more/a |' in page
    assert pictures(page) == ['loss1.png', 'loss2.png']


def test_runs_of_other_vocabularies_share_no_picture(trained):
    prepare_other_book(trained)
    run('train.py', *TINY, '--out_dir=out/b', cwd=trained)
    page = written(trained, 'out/a', 'out/b', '--num_samples=0')
    assert pictures(page) == ['loss1.png', 'loss2.png'] and page.count('6-gram |') == 1


def test_of_masked_data_the_loss_is_said_to_be_of_the_answers(trained):
    meta = json.loads((trained / 'data' / 'book' / 'meta.json').read_text())
    for split in ('train', 'val'):
        mask = np.arange(meta['splits'][split]['tokens']) % 2  # every other token is a target
        mask.astype(np.uint8).tofile(trained / 'data' / 'book' / f'{split}.mask.bin')
    assert 'its loss is of the answers alone' in written(trained, 'out/a', '--num_samples=0')


@pytest.fixture
def lines(monkeypatch):
    """Return the level lines in the pictures that are drawn from now on: {label: value}."""
    found = {}
    draw_references = plots.draw_references

    def noted(axes, references):
        found.update(references)
        return draw_references(axes, references)

    monkeypatch.setattr(plots, 'draw_references', noted)
    return found


@pytest.mark.parametrize('source', ['', 'my.jsonl'])
def test_hellaswag_is_drawn_with_what_others_reach(trained, lines, source):
    score = {'iter': 30, 'hellaswag': 0.2519, 'acc_mean_stderr': 0.0043, 'n': 10042}
    another(trained, 'b', with_settings(hellaswag_source=source))
    with open(trained / 'out' / 'b' / 'log.jsonl', 'a') as f:
        f.write(json.dumps(score) + '\n')
    page = written(trained, 'out/b', '--num_samples=0')
    items = source or 'HellaSwag'
    assert f'### 10,042 items of {items}\n\n![accuracy](hellaswag1.png)' in page
    assert f'10,042 items of {items} is 0.252 ± 0.004' in page
    assert lines['guessing'] == 0.25 and ('GPT-3 124 M' in lines) == (source == '')


@pytest.mark.parametrize('source, kind, drawn', [
    ('https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu', 'gpt2', True),
    ('https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu', 'bpe', False),
    ('my/*.parquet', 'gpt2', False)])
def test_gpt2s_loss_is_of_fineweb_edu_in_its_own_tokens(source, kind, drawn):
    data = types.SimpleNamespace(meta={'source': source})
    run = types.SimpleNamespace(data=data, spec={'kind': kind})
    assert report.is_fineweb_edu(run) == drawn


def test_a_number_that_only_a_researcher_logs_is_drawn(trained):
    with open(trained / 'out' / 'a' / 'log.jsonl', 'a') as f:
        f.write(json.dumps({'iter': 10, 'entropy': 1.5, 'phase': 'early'}) + '\n')
    page = written(trained, 'out/a', '--num_samples=0')
    assert pictures(page) == ['loss1.png', 'loss1-entropy.png']


def test_a_prompt_of_unknown_characters_leaves_out_the_texts(trained):
    page = written(trained, 'out/a', '--prompts=日本')
    assert 'never saw' in page and '## Texts' not in page
    assert cells(page, 'test loss, whole split') != ['–']


@pytest.mark.parametrize('args, says', [
    ([], 'python extras/report.py out/book'),
    (['out/none'], 'no run in out/none'),
    (['out/a', '--num_samples=-1'], 'at least 0'),
    (['out/a', '--temperatures=hot'], '--temperatures='),
    (['out/a', '--promts=The'], 'did you mean prompts?'),
    (['out/a', '--device=tpu9'], '--device=cpu'),
], ids=lambda x: ' '.join(x) if isinstance(x, list) else '')
def test_a_mistake_is_told_in_one_line(trained_once, args, says):
    _, err = run('extras/report.py', *args, cwd=trained_once, status=2)
    assert says in err
    assert err.count('\n') == 1


# ---- What the figures say ------------------------------------------------------------------------
def column(name, *losses):
    """Return a column of runs with these best losses."""
    return [types.SimpleNamespace(name=f'{name}{i}', config={'dataset': 'book'},
                                  best={'val_loss': loss}) for i, loss in enumerate(losses)]


def test_a_difference_is_weighed_by_the_errors_of_both():
    columns = [column('a', 1.0, 1.2), column('b', 1.3, 1.1), column('c', 2.0, 2.2)]
    said = report.say_losses(columns, baselines=np.array([3.0, 1.5]))
    assert said == ['On book the lowest validation loss is 1.100 ± 0.100 nats a token, by a0, a1.',
                    'The loss of b0, b1 is 0.100 ± 0.141 higher, which may be chance.',
                    'The loss of c0, c1 is 1.000 ± 0.141 higher.',
                    'The best n-gram, of 2 tokens, has 1.500; lower: a0, a1; b0, b1.']
    _, said = report.say_losses([column('a', 1.0), column('b', 1.1)], baselines=())
    assert said.startswith('The loss of b0 is 0.100 higher; with a single seed nobody knows')


# ---- What is computed ----------------------------------------------------------------------------
@pytest.mark.parametrize('context', [[], [1], [1, 2, 1], [4, 4, 4], [0, 3, 2, 1]])
def test_ngram_probabilities_sum_to_one_after_any_context(context):
    train = np.random.RandomState(0).randint(4, size=60)  # the token 4 never occurs
    p = np.array([ngrams.probabilities(train, context + [token], vocab_size=5, order=4)[:, -1]
                  for token in range(5)])
    assert p.shape == (5, 4)
    assert (p > 0).all() and np.allclose(p.sum(axis=0), 1)


def test_ngrams_are_those_of_counting_by_hand():
    train = [0, 1, 0, 1, 0, 2, 1, 1]
    text = [0, 1, 2, 0]

    def discount(counts):
        once = sum(count == 1 for count in counts.values())
        twice = sum(count == 2 for count in counts.values())
        return (once + 1) / (once + 2 * twice + 2)

    ones = collections.Counter(train)
    twos = collections.Counter(zip(train, train[1:]))
    D1 = discount(ones)
    D2 = discount(twos)
    p1 = [(max(ones[w] - D1, 0) + D1 * len(ones) / 4) / len(train) for w in range(4)]
    p2 = [p1[text[0]]]  # nothing comes before the first
    for u, v in zip(text, text[1:]):
        after_u = [second for first, second in twos.elements() if first == u]
        own = max(twos[u, v] - D2, 0)
        freed = D2 * len(set(after_u))
        p2.append((own + freed * p1[v]) / len(after_u))
    found = ngrams.probabilities(train, text, vocab_size=4, order=2)
    assert np.allclose(found, [[p1[w] for w in text], p2])


def test_self_bleu_is_one_for_copies_and_near_zero_for_strangers():
    a = 'the cat sat on the mat'.split()
    b = 'a b c d e f'.split()
    c = 'u v w x y z'.split()
    assert ngrams.self_bleu([a, a, a]) == 1
    assert ngrams.self_bleu([a, b, c]) == 0
    assert 0.3 < ngrams.self_bleu([a, a[:4] + ['a', 'hat']]) < 0.9


def test_texts_without_words_are_copies_too():
    assert ngrams.self_bleu([[], []]) == 1


def test_diversity_counts_what_it_says():
    metrics = ngrams.measure([['a b a b a b', 'a b a b a b'], ['c d', 'e']])
    assert metrics['distinct-1'] == 7 / 15
    assert metrics['distinct-2'] == 5 / 11
    assert metrics['repeated-4'] == pytest.approx(1 / 3)
    assert metrics['self-BLEU'] == 0.5  # copies after the first prompt, strangers after the second


def test_measures_of_too_short_texts_are_nan():
    metrics = ngrams.measure([['a b']])  # no 4-grams, and no other text after this prompt
    assert np.isnan([metrics['repeated-4'], metrics['self-BLEU']]).all()
    assert report.shown([metrics['self-BLEU']]) == '–'


def test_log_probability_of_texts_is_the_models_own(model, monkeypatch):
    """The temperature they were drawn at does not matter, nor does what follows an end of text."""
    class Letters:
        eot = 49
        start = 0

        def encode(self, text):
            return [ord(c) - 97 for c in text]

        def decode(self, ids):
            return ''.join(chr(97 + i) for i in ids)

    monkeypatch.setattr(report, 'prompts', 'abc|d')
    monkeypatch.setattr(report, 'num_samples', 2)
    monkeypatch.setattr(report, 'max_new_tokens', 13)  # with 'abc' it just fits into the context
    monkeypatch.setattr(folio.checkpoint, 'tokenizer_of', lambda checkpoint: Letters())
    machine = report.Machine('cpu', 'float32')
    groups, measures = report.write_texts(model, {}, machine, 'sample', temperature=2.0)
    log_probs = []
    for prompt, texts in zip(('abc', 'd'), groups):
        for text in texts:
            ids = Letters().encode(prompt + text)
            if len(text) < 13:
                ids.append(Letters.eot)
            logits_BTV, _ = model(torch.tensor([ids[:-1]]), all_logits=True)
            logp_TV = logits_BTV[0].log_softmax(dim=-1)
            log_probs += [logp_TV[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))]
    assert measures['log-prob'] == pytest.approx(np.mean(log_probs), abs=1e-4)
