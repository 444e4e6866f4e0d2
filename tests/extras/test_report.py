import collections
import json
import math
import re
import shutil
import sys
import types

import numpy as np
import pytest
import torch

pytest.importorskip('matplotlib')

from conftest import TINY, run
from extras import ngrams, plots, report
from folio.configurator import UserError

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


def make(folder, *args):
    """Do what `python extras/report.py args` does in a folder, but in this process.

    To start another one takes longer than most reports do.
    """
    with pytest.MonkeyPatch.context() as patch:  # puts back the settings too
        for name in ('to', 'prompts', 'temperatures', 'num_samples', 'max_new_tokens', 'device'):
            patch.setattr(report, name, getattr(report, name))
        patch.setattr(sys, 'argv', ['extras/report.py', *args])
        patch.setattr(sys, 'excepthook', sys.excepthook)
        patch.chdir(folder)
        report.main()


def written(folder, *args, where='out/report'):
    """Return the page that report.py writes, all pictures of which are there and are PNGs."""
    make(folder, *QUICK, *args)
    page = (folder / where / 'report.md').read_text(encoding='utf-8')
    for name in pictures(page):
        assert (folder / where / name).read_bytes().startswith(b'\x89PNG')
    return page


def pictures(page):
    """Return the names of the pictures in a page."""
    return re.findall(r'!\[.*?\]\((.*?)\)', page)


def row(page, name):
    """Return {column: cell} of a run in the first table."""
    lines = [line for line in page.splitlines() if line.startswith('|')]
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    cells = next(cells for cells in rows if cells[0] == name)
    return dict(zip(rows[0], cells))


def read_entries(folder):
    """Return the entries of the log of out/a."""
    lines = (folder / 'out' / 'a' / 'log.jsonl').read_text().splitlines()
    return [json.loads(line) for line in lines]


def append_to_log(folder, entry):
    """Append an entry to the log of out/a, as train.py would."""
    with open(folder / 'out' / 'a' / 'log.jsonl', 'a', encoding='utf-8') as f:
        f.write(json.dumps(entry) + '\n')


def prepare_other_book(folder):
    """Write data/book anew, with another vocabulary."""
    (folder / 'other.txt').write_text(OTHER_BOOK, encoding='utf-8')
    run('prepare/book/prepare.py', '--book=other.txt', cwd=folder)


def remove_checkpoints(folder):
    for name in ('best.pt', 'ckpt.pt'):
        (folder / 'out' / 'a' / name).unlink()


# ---- The page ------------------------------------------------------------------------------------
def test_figures_equal_the_log_and_what_eval_only_prints(trained):
    found = row(written(trained, 'out/a'), 'a')
    entries = read_entries(trained)
    best = min((e for e in entries if 'val_loss' in e), key=lambda e: e['val_loss'])
    assert found['val loss'] == f'{best["val_loss"]:.4f}'
    assert found['at step'] == str(best['iter'])
    assert found['bits per byte'] == f'{best["bits_per_byte"]:.4f}'
    assert found['tokens'] == f'{entries[-1]["tokens"]:,}'
    assert found['parameters'] == f'{entries[0]["parameters"] / 1e6:.2f} M'

    out, _ = run('train.py', *TINY, '--out_dir=out/a', '--init_from=resume', '--eval_only=True',
                 cwd=trained)
    printed = {}
    for split, metrics in re.findall(r'^(val|test): (.*)$', out, re.MULTILINE):
        printed[split] = dict(metric.split(' ') for metric in metrics.split(', '))
    assert found['val loss'] == printed['val']['loss']
    assert found['perplexity'] == printed['val']['perplexity']
    assert found['test perplexity'] == printed['test']['perplexity']


def test_a_run_has_curves_a_baseline_and_texts_of_every_strategy(trained):
    page = written(trained, 'out/a', '--to=page', where='page')
    assert pictures(page) == ['loss1.png', 'text1.png']
    assert '| 6-gram |' in page
    for strategy in ('greedy', 'top-k 50', 'nucleus 0.9', 'plain sampling'):
        assert re.search(rf'^\| {strategy}.*\|$', page, re.MULTILINE)
        assert page.count(f'\n{strategy}') == 2  # one for each prompt


def test_only_the_run_folder_is_needed(trained):
    shutil.rmtree(trained / 'data')
    page = written(trained, 'out/a')
    assert row(page, 'a')['test perplexity'] == '–'
    assert 'gram |' not in page and 'no data set in data/book' in page
    assert 'text1.png' in page


def test_data_prepared_anew_with_another_vocabulary_is_not_taken(trained):
    prepare_other_book(trained)
    page = written(trained, 'out/a')
    assert row(page, 'a')['test perplexity'] == '–'
    assert 'has another vocabulary by now' in page


@pytest.mark.parametrize('lines, evaluations', [(1, 0), (2, 1), (4, 1), (7, 2)])
def test_a_run_cut_short_is_reported_as_far_as_it_goes(trained, lines, evaluations):
    log = trained / 'out' / 'a' / 'log.jsonl'
    whole = log.read_text().splitlines(keepends=True)
    log.write_text(''.join(whole[:lines]) + whole[lines][:20])  # the last line is torn
    remove_checkpoints(trained)
    page = written(trained, 'out/a')
    assert 'its log ends at step' in page and 'no checkpoint' in page and 'loss1.png' in page

    val_losses = [e['val_loss'] for e in map(json.loads, whole[:lines]) if 'val_loss' in e]
    assert len(val_losses) == evaluations
    if evaluations:
        assert row(page, 'a')['val loss'] == f'{val_losses[-1]:.4f}'
    else:
        assert row(page, 'a')['val loss'] == '–'


def test_a_damaged_checkpoint_is_said_and_the_other_is_taken(trained):
    path = trained / 'out' / 'a' / 'best.pt'
    path.write_bytes(path.read_bytes()[:1000])
    page = written(trained, 'out/a')
    assert 'damaged' in page and '### a: ckpt.pt, of step 30' in page


def test_runs_on_one_data_set_share_a_picture_and_those_of_equal_name_are_told_apart(trained):
    shutil.copytree(trained / 'out' / 'a', trained / 'more' / 'a')
    shutil.copytree(trained / 'out' / 'a', trained / 'out' / 'b')
    log = trained / 'out' / 'b' / 'log.jsonl'
    log.write_text(log.read_text().replace('"dataset": "book"', '"dataset": "gone"'))
    page = written(trained, 'out/a', 'out/b', 'out/a/', 'more/a', '--num_samples=0')
    for name in ('out/a', 'b', 'more/a'):
        assert row(page, name)['run'] == name
    assert page.count('\n- ') == 3  # notes: out/a/ is out/a
    assert pictures(page) == ['loss1.png', 'loss2.png']


def test_runs_of_other_vocabularies_share_no_picture(trained):
    prepare_other_book(trained)
    run('train.py', *TINY, '--out_dir=out/b', cwd=trained)
    page = written(trained, 'out/a', 'out/b', '--num_samples=0')
    assert pictures(page) == ['loss1.png', 'loss2.png']
    assert page.count('There are no n-grams') == page.count('N-grams were counted in') == 1


def test_of_masked_data_the_loss_is_said_to_be_of_the_answers(trained):
    meta = json.loads((trained / 'data' / 'book' / 'meta.json').read_text())
    for split in ('train', 'val'):
        mask = np.arange(meta['splits'][split]['tokens']) % 2  # every other token is a target
        mask.astype(np.uint8).tofile(trained / 'data' / 'book' / f'{split}.mask.bin')
    assert 'its loss is of the answers alone' in written(trained, 'out/a', '--num_samples=0')


def test_hellaswag_is_drawn_where_it_was_scored(trained):
    score = {'iter': 30, 'hellaswag': 0.2519, 'acc_mean_stderr': 0.0043, 'n': 10042}
    append_to_log(trained, score)
    page = written(trained, 'out/a', '--num_samples=0')
    assert row(page, 'a')['HellaSwag'] == '0.2519 ± 0.0043'
    assert 'hellaswag.png' in page


@pytest.mark.parametrize('source, kind, drawn', [
    ('https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu', 'gpt2', True),
    ('https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu', 'bpe', False),
    ('my/*.parquet', 'gpt2', False)])
def test_gpt2s_loss_is_of_fineweb_edu_in_its_own_tokens(source, kind, drawn):
    data = types.SimpleNamespace(meta={'source': source})
    run = types.SimpleNamespace(config={'dataset': 'fineweb'}, data=data, spec={'kind': kind})
    assert report.is_fineweb_edu(run) == drawn


@pytest.mark.parametrize('dataset, drawn', [
    ('book', []), ('fineweb', [3.2924]), ('more/fineweb_10B', [3.2924])])
def test_gpt2s_loss_is_drawn_beside_fineweb_alone(trained, monkeypatch, dataset, drawn):
    lines = {}  # the level lines in the picture: {label: loss}
    draw_references = plots.draw_references

    def noted(axes, references):
        lines.update(references)
        return draw_references(axes, references)

    monkeypatch.setattr(plots, 'draw_references', noted)
    log = trained / 'out' / 'a' / 'log.jsonl'
    log.write_text(log.read_text().replace('"dataset": "book"', f'"dataset": "{dataset}"'))
    remove_checkpoints(trained)  # whose tokenizer is not GPT-2's
    written(trained, 'out/a')
    assert [loss for label, loss in lines.items() if 'gram' not in label] == drawn


def test_a_loss_that_is_no_number_stops_no_report(trained):
    append_to_log(trained, {'iter': 40, 'tokens': 5120, 'train_seconds': 9.0, 'val_loss': math.nan})
    page = written(trained, 'out/a', '--num_samples=0')
    assert row(page, 'a')['at step'] == '30'


def test_a_prompt_that_a_tokenizer_does_not_know_leaves_out_the_texts_alone(trained):
    page = written(trained, 'out/a', '--prompts=日本')
    assert 'never saw' in page and 'text1.png' not in page
    assert row(page, 'a')['test perplexity'] != '–'


@pytest.mark.parametrize('args, says', [
    ([], 'python extras/report.py out/book'),
    (['out/none'], 'there are out/a'),
    (['out/a', '--num_samples=1'], 'at least 2'),
    (['out/a', '--temperatures=hot'], '--temperatures='),
    (['out/a', '--promts=The'], 'did you mean prompts?'),
    (['out/a', '--to=book.txt'], 'another --to'),
    (['out/a', '--device=tpu9'], '--device=cpu'),
], ids=lambda x: ' '.join(x) if isinstance(x, list) else '')
def test_a_mistake_is_told_in_one_line(trained_once, args, says):
    with pytest.raises(UserError) as mistake:
        make(trained_once, *args)
    assert says in str(mistake.value) and '\n' not in str(mistake.value)


def test_the_command_itself_tells_a_mistake_without_a_traceback(trained_once):
    out, err = run('extras/report.py', 'out/none', cwd=trained_once, status=2)
    assert err.startswith('error: no run in out/none')
    assert len(err.splitlines()) == 1 and not out


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


def test_longer_ngrams_learn_a_pattern_that_shorter_ones_cannot():
    pattern = [0, 0, 1, 0, 0, 2] * 200
    p = ngrams.probabilities(pattern[:900], pattern[900:], vocab_size=3, order=4)
    losses = -np.log(p)[:, 10:].mean(axis=1)
    assert (np.diff(losses) < 0).all()
    assert losses[0] > 0.8 and losses[3] < 0.01


def test_self_bleu_is_one_for_copies_and_near_zero_for_strangers():
    a = 'the cat sat on the mat'.split()
    b = 'a b c d e f'.split()
    c = 'u v w x y z'.split()
    assert ngrams.self_bleu([a, a, a]) == 1
    assert ngrams.self_bleu([a, b, c]) == 0
    assert 0.3 < ngrams.self_bleu([a, a[:4] + ['a', 'hat']]) < 0.9


def test_diversity_counts_what_it_says():
    metrics = ngrams.measure([['a b a b a b', 'a b a b a b'], ['c d', 'e']])
    assert metrics['distinct-1'] == 5 / 15
    assert metrics['distinct-2'] == 3 / 11
    assert math.isclose(metrics['repeated-4'], 1 / 3)
    assert metrics['self-BLEU'] == 0.5  # copies after the first prompt, strangers after the second


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
    monkeypatch.setattr(report, 'max_new_tokens', 99)
    machine = report.Machine('cpu', 'float32')
    groups, metrics = report.write_texts(model, Letters(), machine, 'sample', temperature=2.0)

    longest_text = 16 + 1 - len('abc')  # the context needs no room for the last token drawn
    total = 0.0
    count = 0
    for prompt, texts in zip(('abc', 'd'), groups):
        for text in texts:
            ids = Letters().encode(prompt + text)
            if len(text) < longest_text:  # it ended before the context was full
                ids.append(Letters.eot)
            logits_BTV, _ = model(torch.tensor([ids[:-1]]), all_logits=True)
            logp_TV = logits_BTV[0].log_softmax(dim=-1)
            for i in range(len(prompt), len(ids)):
                total += logp_TV[i - 1, ids[i]].item()
                count += 1
    assert abs(metrics['log-prob'] - total / count) < 1e-4
