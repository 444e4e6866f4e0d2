"""sample.py: text from a run, on standard output."""
import dataclasses
import shutil
import subprocess
import sys

import pytest
import torch

import folio.tokenizer
from conftest import ROOT, run, shared
from folio import checkpoint
from model import GPT, GPTConfig


def sample(folder, *args):
    """Return 40 characters of the run in a folder, after the prompt."""
    out, _ = run('sample.py', '--out_dir=out', '--device=cpu', '--max_new_tokens=40', *args,
                 cwd=folder)
    return out


def test_it_works_from_the_checkpoint_alone(trained_once, tmp_path):
    (tmp_path / 'out').mkdir()
    shutil.copy(trained_once / 'out' / 'ckpt.pt', tmp_path / 'out')
    text = sample(tmp_path, '--start=The')
    assert text.startswith('The')
    assert len(text) == len('The') + 40 + len('\n')


@pytest.mark.parametrize('strategy', ['greedy', 'sample', 'top_k', 'nucleus'])
def test_a_seed_repeats_its_text_and_another_gives_another(trained_once, strategy):
    first, again, other = [sample(trained_once, f'--strategy={strategy}', f'--seed={seed}')
                           for seed in (1, 1, 2)]
    assert first == again
    assert (first == other) == (strategy == 'greedy')


def test_several_samples_differ_and_all_begin_with_the_prompt(trained_once):
    out = sample(trained_once, '--num_samples=3', '--start=a')
    texts = out.split('\n---------------\n')
    assert len(set(texts)) == len(texts) == 3
    assert all(text.startswith('a') for text in texts)


def test_a_prompt_comes_from_a_file(trained_once, tmp_path):
    (tmp_path / 'prompt.txt').write_text('def f(x):\n', encoding='utf-8')
    assert sample(trained_once, f'--start=FILE:{tmp_path}/prompt.txt').startswith('def f(x):\n')


def test_a_byte_order_mark_before_a_prompt_is_not_part_of_it(trained_once, tmp_path):
    (tmp_path / 'prompt.txt').write_text('def', encoding='utf-8-sig')
    assert sample(trained_once, f'--start=FILE:{tmp_path}/prompt.txt').startswith('def')


def test_an_over_long_prompt_is_cut_with_a_notice(trained_once):
    prompt = 'abc ' * 20  # the model sees 32 characters
    out, err = run('sample.py', '--out_dir=out', '--device=cpu', '--max_new_tokens=5',
                   f'--start={prompt}', cwd=trained_once)
    assert out.startswith(prompt)
    assert len(out) == 80 + 5 + 1
    assert err.startswith('notice: ')


@pytest.fixture(scope='module')
def stopped(trained_once):
    """(three characters that the greedy text has, the text before they come)."""
    whole = sample(trained_once, '--strategy=greedy', '--start=The')
    stop = whole[10:13]
    return stop, whole[:whole.index(stop, 3)]


def test_stop_ends_the_text_before_it(trained_once, stopped):
    stop, expected = stopped
    text = sample(trained_once, '--strategy=greedy', '--start=The', f'--stop={stop}')
    assert text == expected + '\n'


def test_stop_ends_each_of_several_texts(trained_once, stopped):
    stop, expected = stopped
    text = sample(trained_once, '--strategy=greedy', '--start=The', f'--stop={stop}',
                  '--num_samples=2')
    assert text == f'{expected}\n---------------\n{expected}\n'


def test_streamed_characters_are_whole_and_end_with_the_document(tmp_path):
    """The bytes of a character come one a token; whatever a pipe holds at a moment decodes."""
    tokenizer = folio.tokenizer.train_bpe([], 257)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=257, n_layer=1, n_head=1, n_embd=32,
                          arch='modern'))
    text = 'né 日本 ok'
    idx = torch.tensor([[tokenizer.eot, *tokenizer.encode(text), tokenizer.eot]])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        _, loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.01
    checkpoint.save(str(tmp_path / 'ckpt.pt'), {
        'model': model.state_dict(), 'model_args': vars(model.config), 'tokenizer': tokenizer.spec})
    command = [sys.executable, str(ROOT / 'sample.py'), '--out_dir=.', '--device=cpu',
               '--strategy=greedy']
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, bufsize=0)
    pieces = []
    while piece := process.stdout.read(4096):
        pieces.append(piece.decode('utf-8'))  # raises where a character is broken
    assert process.wait() == 0
    assert ''.join(pieces) == text + '\n'


def test_gpt2_weights_are_sampled_with_gpt2_tokens(tmp_path):
    transformers = pytest.importorskip('transformers')
    shared('tiktoken')
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / 'gpt2')
    out, _ = run('sample.py', '--init_from=./gpt2', '--start=Hello', '--max_new_tokens=3',
                 '--device=cpu', cwd=tmp_path)
    assert out.startswith('Hello')
    assert len(out) > 6


def greedy(model, ids, n):
    """Return the n tokens with which greedy decoding continues ids."""
    ids = list(ids)
    for _ in range(n):
        with torch.no_grad():
            logits, _ = model(torch.tensor([ids]))
        ids.append(logits[0, -1].argmax().item())
    return ids[-n:]


@pytest.mark.parametrize('is_run', [True, False])
def test_a_prompt_follows_the_end_of_text_token_if_documents_did(tmp_path, is_run):
    tokenizer = folio.tokenizer.train_bpe(['one two three four five six seven ' * 20], 300)
    torch.manual_seed(0)
    config = GPTConfig(block_size=64, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=2, n_embd=32)
    model = GPT(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    contents = {'model_args': dataclasses.asdict(config), 'model': model.state_dict(),
                'tokenizer': tokenizer.spec}
    if is_run:
        contents['config'] = {}
    checkpoint.save(str(tmp_path / 'a.pt'), contents)
    out, _ = run('sample.py', '--init_from=a.pt', '--start=one two', '--strategy=greedy',
                 '--max_new_tokens=8', '--device=cpu', '--dtype=float32', cwd=tmp_path)
    start = [tokenizer.eot] if is_run else []
    new = greedy(model, start + tokenizer.encode('one two'), n=8)
    if tokenizer.eot in new:
        new = new[:new.index(tokenizer.eot)]
    expected = tokenizer.decode_bytes(new).decode('utf-8', 'replace')
    # sample.py does not show a character that is not complete yet.
    assert out.strip('\n\ufffd') == f'one two{expected}'.strip('\n\ufffd')
