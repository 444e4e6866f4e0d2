"""Every mistake a user can make: one line on standard error, exit status 2, nothing lost."""
import os
import resource

import pytest

from conftest import TINY, run


def refused(script, *args, cwd, **options):
    """The one line that a script answers a mistake with."""
    _, err = run(script, *args, cwd=cwd, status=2, **options)
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith('error: '), err
    return lines[0]


@pytest.mark.parametrize('args, says', [
    (['--n_lyer=2'], 'did you mean n_layer?'),
    (['--n_layer=two'], 'takes int'),
    (['config/no.py'], 'no config file'),
    (['--dataset=novel'], 'prepare/book/prepare.py --dataset=novel'),
    (['--init_from=resume'], 'no checkpoint out/ckpt.pt'),
    (['--init_from=missing.pt'], 'no checkpoint missing.pt'),
    (['--init_from=missing'], 'not a Hugging Face folder'),
    (['--n_embd=33'], '--n_embd=36'),
    (['--n_layer=0'], 'at least 1'),
    (['--block_size=100000'], '--block_size='),
    (['--batch_size=0'], 'batch_size'),
    (['--gradient_accumulation_steps=0'], 'gradient_accumulation_steps'),
    (['--arch=gpt5'], 'gpt2, modern'),
    (['--optimizer=sgd'], 'adamw, muon'),
    (['--schedule=linear'], 'cosine, trapezoid'),
    (['--learning_rate=0'], 'learning_rate'),
    (['--max_iters=-1'], 'max_iters'),
    (['--eval_iters=-1'], 'eval_iters'),
    (['--beta2=1'], 'beta2'),
    (['--dtype=int8'], 'bfloat16'),
    (['--device=tpu9'], '--device=cpu'),
    (['--dropout=1.5'], 'dropout'),
    (['--out_dir=book.txt'], 'another --out_dir'),
], ids=lambda x: x[0] if isinstance(x, list) else '')
def test_training_settings_that_cannot_work(book_once, args, says):
    assert says in refused('train.py', *TINY, *args, cwd=book_once)


def test_processes_must_divide_the_micro_steps(book_once):
    environment = os.environ | {'RANK': '0', 'WORLD_SIZE': '3', 'LOCAL_RANK': '0'}
    line = refused('train.py', *TINY, '--gradient_accumulation_steps=4', cwd=book_once, env=environment)
    assert 'gradient_accumulation_steps (4)' in line and '3' in line


def test_data_of_another_vocabulary_than_the_checkpoint(book):
    run('train.py', *TINY, '--max_iters=2', cwd=book)
    kept = (book / 'out' / 'ckpt.pt').read_bytes()
    (book / 'other.txt').write_text('Another book, with other characters: àéîõü.\n' * 100, encoding='utf-8')
    run('prepare/book/prepare.py', '--book=other.txt', cwd=book)
    assert 'another shape (vocab_size' in refused('train.py', *TINY, '--init_from=resume', cwd=book)
    assert 'another shape (vocab_size' in refused('train.py', *TINY, cwd=book)
    assert 'another vocabulary' in refused('train.py', *TINY, '--init_from=out/best.pt', '--out_dir=new', cwd=book)
    assert (book / 'out' / 'ckpt.pt').read_bytes() == kept


def test_same_number_of_other_characters_is_another_vocabulary_too(book):
    run('train.py', *TINY, '--max_iters=2', cwd=book)
    text = (book / 'book.txt').read_text(encoding='utf-8')
    (book / 'other.txt').write_text(text.replace('e', '\u4e00'), encoding='utf-8')
    run('prepare/book/prepare.py', '--book=other.txt', cwd=book)
    assert 'another vocabulary' in refused('train.py', *TINY, '--init_from=resume', cwd=book)


def test_an_out_dir_that_holds_a_run_of_another_shape(book):
    run('train.py', *TINY, '--max_iters=2', cwd=book)
    kept = (book / 'out' / 'ckpt.pt').read_bytes()
    for how in ('scratch', 'resume', 'auto'):
        line = refused('train.py', *TINY, '--n_layer=3', f'--init_from={how}', cwd=book)
        assert 'n_layer is 2, not 3' in line and '--out_dir' in line
    assert 'max_iters' in refused('train.py', *TINY, '--max_iters=1', '--init_from=resume', cwd=book)
    assert 'optimizer' in refused('train.py', *TINY, '--optimizer=muon', '--init_from=resume', cwd=book)
    assert (book / 'out' / 'ckpt.pt').read_bytes() == kept


def test_no_space_left_keeps_the_previous_checkpoint(book):
    """A limit on the size of a file stands in for a full disk: the system refuses the same write."""
    run('train.py', *TINY, '--max_iters=10', cwd=book)
    kept = (book / 'out' / 'ckpt.pt').read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 2,) * 2)
    line = refused('train.py', *TINY, '--init_from=resume', cwd=book, preexec_fn=limit)
    assert 'could not write out/' in line and 'intact' in line
    assert (book / 'out' / 'ckpt.pt').read_bytes() == kept and not (book / 'out' / 'ckpt.pt.tmp').exists()
    run('train.py', *TINY, '--init_from=resume', cwd=book)


def test_no_space_left_for_the_log_is_one_line(book):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100,) * 2)
    assert 'File too large' in refused('train.py', *TINY, cwd=book, preexec_fn=limit)


def test_no_space_left_for_a_data_set_keeps_the_previous_one(book):
    kept = (book / 'data' / 'book' / 'train.bin').read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10000,) * 2)
    assert 'could not write data/book' in refused('prepare/book/prepare.py', cwd=book, preexec_fn=limit)
    assert (book / 'data' / 'book' / 'train.bin').read_bytes() == kept
    run('train.py', *TINY, '--max_iters=1', cwd=book)


@pytest.mark.parametrize('content, args, says', [
    (b'', [], '0 characters'),
    (b'One line is not a book.\n', [], 'at least 200'),
    (b'caf\xe9 ' * 100, [], '--encoding=latin-1'),
    (b'words ' * 100, ['--encoding=utf-99'], '--encoding='),
    (b'words ' * 100, ['--tokenizer=word'], 'char, bpe, gpt2'),
    (b'words ' * 100, ['--tokenizer=bpe', '--vocab_size=100'], '257'),
    (None, [], 'cannot be read'),
])
def test_books_that_cannot_be_learned_from(tmp_path, content, args, says):
    if content is not None:
        (tmp_path / 'my.txt').write_bytes(content)
    assert says in refused('prepare/book/prepare.py', '--book=my.txt', *args, cwd=tmp_path)
    assert not (tmp_path / 'data' / 'book' / 'train.bin').exists()


def test_gutenberg_needs_a_number(tmp_path):
    assert 'gutenberg:1342' in refused('prepare/book/prepare.py', '--book=gutenberg:pride', cwd=tmp_path)


def test_prompts_and_settings_that_cannot_be_sampled(book):
    run('train.py', *TINY, '--max_iters=2', cwd=book)
    for args, says in {('--start=日本',): "'日'", ('--strategy=beam',): 'greedy, sample, top_k, nucleus',
                       ('--start=FILE:no.txt',): 'no.txt', ('--top_p=0', '--strategy=nucleus'): 'top_p',
                       ('--num_samples=0',): 'num_samples', ('--repetition_penalty=0',): 'above 0',
                       ('--out_dir=empty',): 'no checkpoint empty/ckpt.pt',
                       ('--temprature=1',): 'did you mean temperature'}.items():
        assert says in refused('sample.py', '--out_dir=out', '--device=cpu', *args, cwd=book)
