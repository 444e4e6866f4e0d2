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

from extras import ngrams
from extras import plots
from extras import report
from folio.configurator import UserError
from conftest import TINY, run

QUICK = ['--device=cpu', '--num_samples=2', '--max_new_tokens=20', '--prompts=The|If', '--temperatures=1.0']


@pytest.fixture(scope='session')
def trained_once(book_once, tmp_path_factory):
    """A folder with data/book and out/a, a run of 30 steps that was evaluated four times."""
    folder = tmp_path_factory.mktemp('report') / 'work'
    shutil.copytree(book_once, folder)
    run('train.py', *TINY, '--out_dir=out/a', cwd=folder)
    return folder


@pytest.fixture
def trained(trained_once, tmp_path):
    return shutil.copytree(trained_once, tmp_path / 'work')


def make(folder, *args):
    """What `python report.py args` does in a folder, in this process: to start one takes longer than most reports."""
    with pytest.MonkeyPatch.context() as patch:  # it puts back the settings too
        for name in ('to', 'prompts', 'temperatures', 'num_samples', 'max_new_tokens', 'device'):
            patch.setattr(report, name, getattr(report, name))
        patch.setattr(sys, 'argv', ['extras/report.py', *args])
        patch.setattr(sys, 'excepthook', sys.excepthook)
        patch.chdir(folder)
        report.main()


def written(folder, *args, where='out/report'):
    """The page that report.py writes, every picture of which is there and is a PNG."""
    make(folder, *QUICK, *args)
    page = (folder / where / 'report.md').read_text(encoding='utf-8')
    for name in re.findall(r'!\[.*?\]\((.*?)\)', page):
        assert (folder / where / name).read_bytes().startswith(b'\x89PNG')
    return page


def row(page, name):
    """{column: cell} of a run in the first table."""
    head, _, *rows = [[cell.strip() for cell in line.strip('|').split('|')]
                      for line in page.splitlines() if line.startswith('|')]
    return dict(zip(head, next(cells for cells in rows if cells[0] == name)))


def change_log(folder, *entries):
    """Append entries to the log of out/a, as train.py would have."""
    with open(folder / 'out' / 'a' / 'log.jsonl', 'a', encoding='utf-8') as f:
        f.writelines(json.dumps(entry) + '\n' for entry in entries)


# ---- The page --------------------------------------------------------------------------------------------------------
def test_figures_equal_the_log_and_what_eval_only_prints(trained):
    found = row(written(trained, 'out/a'), 'a')
    entries = [json.loads(line) for line in (trained / 'out' / 'a' / 'log.jsonl').read_text().splitlines()]
    best = min((e for e in entries if 'val_loss' in e), key=lambda e: e['val_loss'])
    assert found['val loss'] == f'{best["val_loss"]:.4f}' and found['at step'] == str(best['iter'])
    assert found['bits per byte'] == f'{best["bits_per_byte"]:.4f}'
    assert found['tokens'] == f'{entries[-1]["tokens"]:,}'
    assert found['parameters'] == f'{entries[0]["parameters"] / 1e6:.2f} M'
    printed, _ = run('train.py', *TINY, '--out_dir=out/a', '--init_from=resume', '--eval_only=True', cwd=trained)
    printed = {split: dict(f.split(' ') for f in figures.split(', '))
               for split, figures in re.findall(r'^(val|test): (.*)$', printed, re.MULTILINE)}
    assert found['val loss'] == printed['val']['loss'] and found['perplexity'] == printed['val']['perplexity']
    assert found['test perplexity'] == printed['test']['perplexity']


def test_a_run_has_curves_a_baseline_and_texts_of_every_strategy(trained):
    page = written(trained, 'out/a', '--to=page', where='page')
    assert re.findall(r'\]\((.*?)\)', page) == ['loss1.png', 'text1.png'] and '| 6-gram |' in page
    for strategy in ('greedy', 'top-k 50', 'nucleus 0.9', 'plain sampling'):
        assert re.search(rf'^\| {strategy}.*\|$', page, re.MULTILINE) and page.count(f'\n{strategy}') == 2  # a prompt


def test_only_the_run_folder_is_needed(trained):
    shutil.rmtree(trained / 'data')
    page = written(trained, 'out/a')
    assert row(page, 'a')['test perplexity'] == '–' and 'gram |' not in page and 'no data set in data/book' in page
    assert 'text1.png' in page


def test_data_prepared_anew_with_another_vocabulary_is_not_taken(trained):
    (trained / 'other.txt').write_text('Another book, with other characters: àéîõü.\n' * 100, encoding='utf-8')
    run('prepare/book/prepare.py', '--book=other.txt', cwd=trained)
    page = written(trained, 'out/a')
    assert row(page, 'a')['test perplexity'] == '–' and 'has another vocabulary by now' in page


@pytest.mark.parametrize('lines, evaluations', [(1, 0), (2, 1), (4, 1), (7, 2)])
def test_a_run_cut_short_is_reported_as_far_as_it_goes(trained, lines, evaluations):
    log = trained / 'out' / 'a' / 'log.jsonl'
    whole = log.read_text().splitlines(keepends=True)
    log.write_text(''.join(whole[:lines]) + whole[lines][:20])  # the last line is torn
    for name in ('best.pt', 'ckpt.pt'):
        (trained / 'out' / 'a' / name).unlink()
    page = written(trained, 'out/a')
    seen = [e for e in map(json.loads, whole[:lines]) if 'val_loss' in e]
    assert len(seen) == evaluations and 'its log ends at step' in page and 'no checkpoint' in page
    assert row(page, 'a')['val loss'] == (f'{seen[-1]["val_loss"]:.4f}' if seen else '–') and 'loss1.png' in page


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
    assert [row(page, name)['run'] for name in ('out/a', 'b', 'more/a')] and page.count('\n- ') == 3
    assert re.findall(r'\]\((.*?)\)', page) == ['loss1.png', 'loss2.png']


def test_a_log_that_is_damaged_within_is_reported_without_that_line(trained):
    log = trained / 'out' / 'a' / 'log.jsonl'
    lines = log.read_text().splitlines(keepends=True)
    log.write_text(''.join([*lines[:4], lines[4][:20] + '\n', *lines[5:]]))
    page = written(trained, 'out/a', '--num_samples=0')
    assert 'left out as damaged: line 5 of its log' in page and row(page, 'a')['at step'] == '30'
    error = run('train.py', *TINY, '--out_dir=out/a', '--init_from=resume', '--max_iters=31', cwd=trained, status=2)[1]
    assert 'log.jsonl, line 5 is damaged; remove that line' in error


def test_runs_of_other_vocabularies_share_no_picture(trained):
    (trained / 'other.txt').write_text('Another book, with other characters: àéîõü.\n' * 100, encoding='utf-8')
    run('prepare/book/prepare.py', '--book=other.txt', cwd=trained)
    run('train.py', *TINY, '--out_dir=out/b', cwd=trained)
    page = written(trained, 'out/a', 'out/b', '--num_samples=0')
    assert re.findall(r'\]\((.*?)\)', page) == ['loss1.png', 'loss2.png']
    assert page.count('There are no n-grams') == page.count('N-grams were counted in') == 1


def test_of_masked_data_the_loss_is_said_to_be_of_the_answers(trained):
    meta = json.loads((trained / 'data' / 'book' / 'meta.json').read_text())
    for split in ('train', 'val'):
        mask = np.arange(meta['splits'][split]['tokens']) % 2
        mask.astype(np.uint8).tofile(trained / 'data' / 'book' / f'{split}.mask.bin')
    assert 'its loss is of the answers alone' in written(trained, 'out/a', '--num_samples=0')


def test_hellaswag_is_drawn_where_it_was_scored(trained):
    change_log(trained, {'iter': 30, 'hellaswag': 0.2519, 'acc_mean_stderr': 0.0043, 'n': 10042})
    page = written(trained, 'out/a', '--num_samples=0')
    assert row(page, 'a')['HellaSwag'] == '0.2519 ± 0.0043' and 'hellaswag.png' in page


@pytest.mark.parametrize('source, kind, drawn', [
    ('https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu', 'gpt2', True), ('my/*.parquet', 'gpt2', False),
    ('https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu', 'bpe', False)])
def test_gpt2s_loss_is_of_fineweb_edu_in_its_own_tokens(source, kind, drawn):
    data = types.SimpleNamespace(meta={'source': source})
    run = types.SimpleNamespace(config={'dataset': 'fineweb'}, data=data, spec={'kind': kind})
    assert report.is_fineweb_edu(run) == drawn


@pytest.mark.parametrize('dataset, drawn', [('book', []), ('fineweb', [3.2924]), ('more/fineweb_10B', [3.2924])])
def test_gpt2s_loss_is_drawn_beside_fineweb_alone(trained, monkeypatch, dataset, drawn):
    levels = []
    draw_losses = plots.draw_losses
    monkeypatch.setattr(plots, 'draw_losses', lambda *args: levels.append(args[-1]) or draw_losses(*args))
    log = trained / 'out' / 'a' / 'log.jsonl'
    log.write_text(log.read_text().replace('"dataset": "book"', f'"dataset": "{dataset}"'))
    for name in ('best.pt', 'ckpt.pt'):  # whose tokenizer is not GPT-2's
        (trained / 'out' / 'a' / name).unlink()
    written(trained, 'out/a')
    assert [loss for label, loss in levels[0].items() if 'gram' not in label] == drawn


def test_a_loss_that_is_no_number_stops_no_report(trained):
    change_log(trained, {'iter': 40, 'tokens': 5120, 'train_seconds': 9.0, 'val_loss': math.nan})
    assert row(written(trained, 'out/a', '--num_samples=0'), 'a')['at step'] == '30'


def test_a_prompt_that_a_tokenizer_does_not_know_leaves_out_the_texts_alone(trained):
    page = written(trained, 'out/a', '--prompts=日本')
    assert 'never saw' in page and 'text1.png' not in page and row(page, 'a')['test perplexity'] != '–'


@pytest.mark.parametrize('args, says', [
    ([], 'python report.py out/book'),
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
    assert err.startswith('error: no run in out/none') and len(err.splitlines()) == 1 and not out


# ---- What is computed ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('context', [[], [1], [1, 2, 1], [4, 4, 4], [0, 3, 2, 1]])
def test_ngram_probabilities_sum_to_one_after_any_context(context):
    train = np.random.RandomState(0).randint(4, size=60)  # the token 4 never occurs
    p = np.array([ngrams.probabilities(train, context + [w], 5, 4)[:, -1] for w in range(5)])
    assert p.shape == (5, 4) and (p > 0).all() and np.allclose(p.sum(axis=0), 1)


def test_ngrams_are_those_of_counting_by_hand():
    train, text = [0, 1, 0, 1, 0, 2, 1, 1], [0, 1, 2, 0]

    def discount(counts):
        once, twice = (sum(c == k for c in counts.values()) for k in (1, 2))
        return (once + 1) / (once + 2 * twice + 2)

    ones, twos = collections.Counter(train), collections.Counter(zip(train, train[1:]))
    D1, D2 = discount(ones), discount(twos)
    p1 = [(max(ones[w] - D1, 0) + D1 * len(ones) / 4) / len(train) for w in range(4)]
    p2 = [p1[text[0]]]
    for h, w in zip(text, text[1:]):
        after = [v for (u, v) in twos.elements() if u == h]
        p2.append((max(twos[h, w] - D2, 0) + D2 * len(set(after)) * p1[w]) / len(after))
    found = ngrams.probabilities(train, text, 4, 2)
    assert np.allclose(found, [[p1[w] for w in text], p2])


def test_longer_ngrams_learn_a_pattern_that_shorter_ones_cannot():
    pattern = [0, 0, 1, 0, 0, 2] * 200
    loss = -np.log(ngrams.probabilities(pattern[:900], pattern[900:], 3, 4))[:, 10:].mean(axis=1)
    assert (np.diff(loss) < 0).all() and loss[0] > 0.8 and loss[3] < 0.01


def test_self_bleu_is_one_for_copies_and_near_zero_for_strangers():
    a, b, c = 'the cat sat on the mat'.split(), 'a b c d e f'.split(), 'u v w x y z'.split()
    assert ngrams.self_bleu([a, a, a]) == 1 and ngrams.self_bleu([a, b, c]) == 0
    assert 0.3 < ngrams.self_bleu([a, a[:4] + ['a', 'hat']]) < 0.9


def test_diversity_counts_what_it_says():
    figures = ngrams.measure([['a b a b a b', 'a b a b a b'], ['c d', 'e']])
    assert figures['distinct-1'] == 5 / 15 and figures['distinct-2'] == 3 / 11
    assert math.isclose(figures['repeated-4'], 1 / 3)
    assert figures['self-BLEU'] == 0.5  # copies after the first prompt, strangers after the second


def test_log_probability_of_texts_is_the_models_own(model, monkeypatch):
    """Of the drawn tokens alone, however far the temperature they were drawn at was from 1."""
    class Letters:
        eot, start = 49, 0

        def encode(self, text):
            return [ord(c) - 97 for c in text]

        def decode(self, ids):
            return ''.join(chr(97 + i) for i in ids)

    for name, value in dict(prompts='abc|d', num_samples=2, max_new_tokens=99).items():
        monkeypatch.setattr(report, name, value)
    machine = report.Machine('cpu', 'float32')
    groups, figures = report.write_texts(model, Letters(), machine, 'sample', 2.0)
    total, count = 0.0, 0
    for start, texts in zip(('abc', 'd'), groups):
        for text in texts:
            ids = Letters().encode(start + text)
            ids += [Letters.eot] * (len(text) < 16 + 1 - len('abc'))  # it ended before the context was full
            logp = model(torch.tensor([ids[:-1]]), all_logits=True)[0][0].log_softmax(dim=-1)
            total += sum(logp[i - 1, ids[i]].item() for i in range(len(start), len(ids)))
            count += len(ids) - len(start)
    assert abs(figures['log-prob'] - total / count) < 1e-4
