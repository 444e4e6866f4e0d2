"""Talking with a model: sample.py --chat, at a terminal and through a pipe."""
import os
import pty
import select
import subprocess
import sys
import time

import pytest
import torch

import folio.checkpoint
import folio.tokenizer
from conftest import ROOT
from model import GPT, GPTConfig

TEMPLATE = 'Q: {}\nA: '
HI = ('hi', 'hello')
WHO = ('who?', 'me')
# To 'more' the answer is the one before, which has to be in the context.
DOCUMENTS = [[HI, ('more', 'hello')], [WHO, ('more', 'me')],
             [('more', 'hello'), WHO, ('more', 'me')]]


@pytest.fixture(scope='module')
def tuned(tmp_path_factory):
    """A folder with a model that has learned some answers by heart."""
    folder = tmp_path_factory.mktemp('tuned')
    tokenizer = folio.tokenizer.train_bpe([], 257)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=257, n_layer=1, n_head=1, n_embd=32,
                          arch='modern'))
    documents = []
    for turns in DOCUMENTS:
        ids = []
        for question, answer in turns:
            ids += [tokenizer.eot, *tokenizer.encode(TEMPLATE.replace('{}', question) + answer)]
        documents.append(torch.tensor([*ids, tokenizer.eot]))
    rows = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=-1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        _, loss = model(rows[:, :-1].clamp(min=0), rows[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.3
    weights = {'model': model.state_dict(), 'model_args': vars(model.config),
               'tokenizer': tokenizer.spec}
    folio.checkpoint.save(str(folder / 'ckpt.pt'), weights | {'template': TEMPLATE})
    folio.checkpoint.save(str(folder / 'plain.pt'), weights)
    return folder


def command(*options):
    return [sys.executable, str(ROOT / 'sample.py'), '--chat=True', '--device=cpu',
            '--strategy=greedy', *options]


def read_until(terminal, ending):
    """Return what a terminal shows until it shows this, or for a minute."""
    shown = ''
    deadline = time.monotonic() + 60
    while ending not in shown and time.monotonic() < deadline:
        if select.select([terminal], [], [], 1)[0]:
            try:
                shown += os.read(terminal, 4096).decode()
            except OSError:  # the other end is closed
                break
    return shown


def test_a_tuned_model_answers_at_a_terminal_until_ctrl_d(tuned):
    """It knows the turn before, but the context of 64 tokens has no room for three.

    An answer might have 1,000 tokens, for which there is half of the context.
    """
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command('--out_dir=.', '--max_new_tokens=1000'), cwd=tuned,
                               stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert read_until(ours, '> ').endswith('> ')
    for question, answer in (HI, ('more', 'hello'), WHO, ('more', 'me')):
        os.write(ours, f'{question}\n'.encode())
        shown = read_until(ours, '\n> ')
        assert shown.replace('\r', '') == f'{question}\n{answer}\n> '
    os.write(ours, b'\n')  # an empty line ends nothing
    assert read_until(ours, '\n> ').endswith('> ')
    os.write(ours, b'\x04')  # Ctrl-D
    assert process.wait(30) == 0
    os.close(ours)


@pytest.mark.slow
def test_a_model_without_a_template_continues_the_text(tuned):
    done = subprocess.run(command('--init_from=plain.pt', '--max_new_tokens=20'), cwd=tuned,
                          input='Q: who?', text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('\nA: me')


def test_an_empty_line_is_answered_by_a_character_model(tmp_path):
    config = GPTConfig(block_size=16, vocab_size=2, n_layer=1, n_head=1, n_embd=16)
    folio.checkpoint.save(str(tmp_path / 'ckpt.pt'), {
        'model': GPT(config).state_dict(), 'model_args': vars(config),
        'tokenizer': {'kind': 'char', 'chars': '\na'}})
    done = subprocess.run(command('--out_dir=.', '--max_new_tokens=20'), cwd=tmp_path,
                          input='a\n\n', text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
