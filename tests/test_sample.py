import subprocess
import sys

import pytest
import torch

import folio.tokenizer
from conftest import ROOT, TINY, run, shared
import folio.checkpoint
from model import GPT, GPTConfig


@pytest.fixture
def trained(book):
    run('train.py', *TINY, cwd=book)
    return book


def sample(folder, *args):
    return run('sample.py', '--out_dir=out', '--device=cpu', '--max_new_tokens=40', *args, cwd=folder)[0]


def test_works_from_the_checkpoint_alone(trained, tmp_path):
    (tmp_path / 'alone' / 'out').mkdir(parents=True)
    (trained / 'out' / 'ckpt.pt').rename(tmp_path / 'alone' / 'out' / 'ckpt.pt')
    text = sample(tmp_path / 'alone', '--start=The')
    assert text.startswith('The') and len(text) == len('The') + 40 + len('\n')


@pytest.mark.parametrize('strategy', ['greedy', 'sample', 'top_k', 'nucleus'])
def test_the_same_seed_repeats_the_text(trained, strategy):
    first, again, other = (sample(trained, f'--strategy={strategy}', f'--seed={s}') for s in (1, 1, 2))
    assert first == again and (first == other) == (strategy == 'greedy')


def test_samples_are_drawn_as_one_batch(trained):
    texts = sample(trained, '--num_samples=3', '--start=a').split('\n---------------\n')
    assert len(texts) == 3 and len(set(texts)) == 3 and all(text.startswith('a') for text in texts)


def test_prompt_comes_from_a_file(trained):
    (trained / 'prompt.txt').write_text('def f(x):\n', encoding='utf-8')
    assert sample(trained, '--start=FILE:prompt.txt').startswith('def f(x):\n')


def test_an_over_long_prompt_is_cut_with_a_notice(trained):
    out, err = run('sample.py', '--out_dir=out', '--device=cpu', '--max_new_tokens=5', f'--start={"abc " * 20}',
                   cwd=trained)
    assert out.startswith('abc ' * 20) and len(out) == 80 + 5 + 1 and err.startswith('notice: ')


def test_stop_ends_the_text_before_it(trained):
    whole = sample(trained, '--strategy=greedy', '--start=The')
    stop = whole[10:13]
    expected = whole[:whole.index(stop, 3)]
    assert sample(trained, '--strategy=greedy', '--start=The', f'--stop={stop}') == expected + '\n'
    both = sample(trained, '--strategy=greedy', '--start=The', f'--stop={stop}', '--num_samples=2')
    assert both == f'{expected}\n---------------\n{expected}\n'


def test_streamed_text_never_breaks_a_character(trained, tmp_path):
    """Bytes of a character come one a token; what is read from the pipe at any moment decodes."""
    tokenizer = folio.tokenizer.train_bpe([], 257)
    model = GPT(GPTConfig(block_size=64, vocab_size=257, n_layer=1, n_head=1, n_embd=32, arch='modern'))
    text = 'né 日本 👩‍👩‍👧 ok'
    idx = torch.tensor([[tokenizer.eot] + tokenizer.encode(text) + [tokenizer.eot]])
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        _, loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.01
    (tmp_path / 'run').mkdir()
    folio.checkpoint.save(str(tmp_path / 'run' / 'ckpt.pt'), {'model': model.state_dict(), 'model_args': vars(model.config),
                                                        'tokenizer': tokenizer.spec})
    command = [sys.executable, str(ROOT / 'sample.py'), '--out_dir=run', '--device=cpu', '--strategy=greedy']
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    pieces = []
    while piece := process.stdout.read(4096):
        pieces.append(piece.decode('utf-8'))  # raises where a character is broken
    assert ''.join(pieces) == text + '\n' and process.wait() == 0  # and the end of the document ended it


def test_gpt2_weights_are_sampled_with_gpt2_tokens(tmp_path):
    transformers = pytest.importorskip('transformers')
    shared('tiktoken')
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / 'gpt2')
    out, _ = run('sample.py', '--init_from=./gpt2', '--start=Hello', '--max_new_tokens=3', '--device=cpu', cwd=tmp_path)
    assert out.startswith('Hello') and len(out) > 6
