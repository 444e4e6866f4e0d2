"""Every mistake a user can make: one line on standard error, exit status 2, nothing lost."""
import pytest

from conftest import TINY, largest_file, run, run_process
from folio.data import Dataset, train_batch


def the_line(err):
    """Return the one line that is all of standard error."""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith('error: ')
    return lines[0]


def refused(script, *args, cwd, **options):
    """Return the one line with which a script answers a mistake."""
    _, err = run(script, *args, cwd=cwd, status=2, **options)
    return the_line(err)


# ---- As a user sees it ---------------------------------------------------------------------------
@pytest.mark.parametrize('script', [
    'train.py', 'prepare/book/prepare.py', pytest.param('sample.py', marks=pytest.mark.slow),
    pytest.param('bench.py', marks=pytest.mark.slow),
    pytest.param('hellaswag.py', marks=pytest.mark.slow)])
def test_a_process_prints_one_line_and_ends_with_status_2(tmp_path, script):
    _, err = run_process(script, '--dataset', cwd=tmp_path, status=2)
    line = the_line(err)
    assert '--dataset: a setting is written --' in line
    assert '=value (--help lists them)' in line


# ---- Training ------------------------------------------------------------------------------------
@pytest.mark.parametrize('arg, says', [
    ('--n_lyer=2', 'did you mean n_layer?'),
    ('config/no.py', 'no config file'),
    ('--dataset=novel', 'prepare/book/prepare.py --book=my.txt --dataset=novel'),
    ('--init_from=resume', 'no checkpoint none/ckpt.pt'),
    ('--init_from=missing.pt', 'no checkpoint missing.pt'),
    ('--init_from=missing', 'not a Hugging Face folder'),
    ('--n_embd=33', '--n_embd=36'),
    ('--block_size=100000', '--block_size='),
    ('--batch_size=0', 'batch_size'),
    ('--gradient_accumulation_steps=0', 'gradient_accumulation_steps'),
    ('--log_interval=0', 'log_interval'),
    ('--optimizer=sgd', 'adamw, muon'),
    ('--schedule=linear', 'cosine, trapezoid'),
    ('--cooldown=70', 'a share of the steps, from 0 to 1'),
    ('--compile=maybe', 'auto, True, False'),
    ('--learning_rate=0', 'learning_rate'),
    ('--learning_rate=nan', 'learning_rate'),
    ('--muon_learning_rate=-1', 'muon_learning_rate'),
    ('--min_lr=-1', 'min_lr'),
    ('--weight_decay=-0.1', 'weight_decay'),
    ('--weight_decay=nan', 'weight_decay'),
    ('--grad_clip=-1', 'grad_clip'),
    ('--grad_clip=nan', 'grad_clip'),
    ('--dropout=nan', 'dropout'),
    ('--max_iters=-1', 'max_iters'),
    ('--eval_iters=-1', 'eval_iters'),
    ('--beta2=1', 'beta'),
    ('--dtype=int8', 'bfloat16'),
    ('--device=tpu9', '--device=cpu'),
    ('--device=meta', '--device=cpu'),
    ('--out_dir=book.txt', 'another --out_dir'),
])
def test_a_training_setting_out_of_range_is_refused(book_once, arg, says):
    assert says in refused('train.py', *TINY, '--out_dir=none', arg, cwd=book_once)
    assert not (book_once / 'none').exists()


def test_a_context_may_be_as_long_as_the_text(book_once):
    tokens = Dataset(str(book_once / 'data' / 'book')).tokens('train')
    n_tokens = len(tokens)
    line = refused('train.py', *TINY, f'--block_size={n_tokens + 1}', cwd=book_once)
    assert f'use at most --block_size={n_tokens}' in line
    idx_BT, targets_BT = train_batch(tokens, None, n_tokens, batch_size=1, seed=0, first=3)
    assert sorted(idx_BT[0].tolist()) == sorted(targets_BT[0].tolist()) == sorted(tokens.tolist())


def test_processes_must_divide_the_micro_steps(book_once, monkeypatch):
    for name, value in {'TORCHELASTIC_RUN_ID': 'none', 'RANK': '0', 'WORLD_SIZE': '3'}.items():
        monkeypatch.setenv(name, value)
    line = refused('train.py', *TINY, '--gradient_accumulation_steps=4', cwd=book_once)
    assert 'gradient_accumulation_steps (4)' in line
    assert 'a multiple of their number, 3' in line


# ---- A run that is there already -----------------------------------------------------------------
@pytest.fixture
def kept(trained):
    """A folder with data and a run, whose checkpoint must not change."""
    before = (trained / 'out' / 'ckpt.pt').read_bytes()
    yield trained
    assert (trained / 'out' / 'ckpt.pt').read_bytes() == before


@pytest.fixture
def other_data(kept):
    """The same after data/book was made again from a text of other characters."""
    text = 'Another book, with other characters: àéîõü.\n' * 100
    (kept / 'other.txt').write_text(text, encoding='utf-8')
    run('prepare/book/prepare.py', '--book=other.txt', cwd=kept)
    return kept


@pytest.mark.parametrize('args, says', [
    (['--init_from=resume'], 'different vocabulary'),
    (['--init_from=out/best.pt', '--out_dir=new'], 'different vocabulary'),
], ids=['resume', 'file'])
def test_data_of_another_vocabulary_than_the_checkpoint(other_data, args, says):
    assert says in refused('train.py', *TINY, *args, cwd=other_data)


def test_as_many_other_characters_are_another_vocabulary_too(kept):
    text = (kept / 'book.txt').read_text(encoding='utf-8')
    (kept / 'other.txt').write_text(text.replace('e', '\u4e00'), encoding='utf-8')
    run('prepare/book/prepare.py', '--book=other.txt', cwd=kept)
    assert 'different vocabulary' in refused('train.py', *TINY, '--init_from=resume', cwd=kept)


@pytest.mark.parametrize('how', ['resume', 'auto'])
def test_an_out_dir_that_holds_a_run_of_another_shape(kept, how):
    line = refused('train.py', *TINY, '--n_layer=3', f'--init_from={how}', cwd=kept)
    assert 'n_layer is 2, not 3' in line
    assert '--out_dir' in line


def test_a_run_is_resumed_with_the_optimizer_that_it_had(kept):
    line = refused('train.py', *TINY, '--optimizer=muon', '--init_from=resume', cwd=kept)
    assert 'give --optimizer as it was' in line


# ---- A full disk ---------------------------------------------------------------------------------
def test_a_full_disk_keeps_the_checkpoint_from_which_to_continue(trained):
    before = (trained / 'out' / 'ckpt.pt').read_bytes()
    with largest_file(len(before) // 2):
        line = refused('train.py', *TINY, '--init_from=resume', '--max_iters=40', cwd=trained)
    assert 'could not write out/' in line
    assert 'intact' in line
    assert (trained / 'out' / 'ckpt.pt').read_bytes() == before
    assert not (trained / 'out' / 'ckpt.pt.tmp').exists()
    out, _ = run('train.py', *TINY, '--init_from=resume', '--max_iters=40', cwd=trained)
    assert 'done at step 40' in out


def test_no_space_left_for_the_log_is_one_line(book):
    with largest_file(100):
        assert 'File too large' in refused('train.py', *TINY, cwd=book)


def test_no_space_left_for_a_data_set_keeps_the_previous_one(book):
    before = (book / 'data' / 'book' / 'train.bin').read_bytes()
    with largest_file(10000):
        assert 'could not write data/book' in refused('prepare/book/prepare.py', cwd=book)
    assert (book / 'data' / 'book' / 'train.bin').read_bytes() == before
    run('train.py', *TINY, '--max_iters=1', cwd=book)


# ---- Preparing a book ----------------------------------------------------------------------------
@pytest.mark.parametrize('content, args, says', [
    (b'', [], '0 characters'),
    (b'One line is not a book.\n', [], 'at least 200'),
    (b'caf\xe9 ' * 100, [], '--encoding=latin-1'),
    (b'words ' * 100, ['--encoding=utf-99'], '--encoding='),
    (b'words ' * 100, ['--tokenizer=word'], 'no tokenizer in word'),
    (b'words ' * 100, ['--tokenizer=bpe', '--vocab_size=100'], '257'),
    (None, [], 'cannot be read'),
], ids=['empty', 'short', 'latin-1', 'encoding', 'tokenizer', 'vocab_size', 'missing'])
def test_a_book_that_cannot_be_learned_from_is_refused(tmp_path, content, args, says):
    if content is not None:
        (tmp_path / 'my.txt').write_bytes(content)
    line = refused('prepare/book/prepare.py', '--book=my.txt', *args, cwd=tmp_path)
    assert says in line
    assert not (tmp_path / 'data' / 'book' / 'train.bin').exists()


def test_gutenberg_needs_a_number(tmp_path):
    line = refused('prepare/book/prepare.py', '--book=gutenberg:pride', cwd=tmp_path)
    assert 'gutenberg:1342' in line


# ---- Sampling ------------------------------------------------------------------------------------
@pytest.mark.parametrize('arg, says', [
    ('--start=日本', "'日'"),
    ('--strategy=beam', 'greedy, sample, top_k, nucleus'),
    ('--start=FILE:no.txt', 'no.txt'),
    ('--top_p=0', 'top_p'),
    ('--num_samples=0', 'num_samples'),
    ('--out_dir=empty', 'no checkpoint empty/ckpt.pt'),
    ('--temprature=1', 'did you mean temperature'),
])
def test_a_sampling_mistake_is_refused(trained_once, arg, says):
    assert says in refused('sample.py', '--out_dir=out', '--device=cpu', arg, cwd=trained_once)
