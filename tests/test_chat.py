"""Talking with a model: sample.py --chat, at a terminal and through a pipe."""
import io
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
from conftest import ROOT, run
from folio import engine
from model import GPT, GPTConfig

TEMPLATE = 'Q: {}\nA: '
ANSWERS = {'hi': 'hello', 'who?': 'me'}


@pytest.fixture(scope='module')
def tuned(tmp_path_factory):
    """A folder with a model that has learned two answers by heart."""
    folder = tmp_path_factory.mktemp('tuned')
    tokenizer = folio.tokenizer.train_bpe([], 257)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=48, vocab_size=257, n_layer=1, n_head=1, n_embd=32,
                          arch='modern'))
    documents = []
    for question, answer in ANSWERS.items():
        ids = tokenizer.encode(TEMPLATE.replace('{}', question) + answer)
        documents.append(torch.tensor([tokenizer.eot, *ids, tokenizer.eot]))
    rows = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=tokenizer.eot)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        _, loss = model(rows[:, :-1], rows[:, 1:])
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
            '--strategy=greedy', '--max_new_tokens=20', *options]


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


def test_a_tuned_model_answers_line_by_line_at_a_terminal_until_ctrl_d(tuned):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command('--out_dir=.'), cwd=tuned, stdin=theirs, stdout=theirs,
                               stderr=theirs)
    os.close(theirs)
    assert read_until(ours, '> ').endswith('> ')
    for question in ('hi', 'who?', 'hi'):  # the third no longer fits the context beside the first
        os.write(ours, f'{question}\n'.encode())
        shown = read_until(ours, '\n> ')
        assert shown.replace('\r', '') == f'{question}\n{ANSWERS[question]}\n> '
    os.write(ours, b'\x04')  # Ctrl-D
    assert process.wait(30) == 0
    os.close(ours)


@pytest.mark.slow
def test_a_model_without_a_template_continues_the_text(tuned):
    done = subprocess.run(command('--init_from=plain.pt'), cwd=tuned, input='Q: who?', text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('\nA: me')


def test_earlier_turns_stay_in_the_context_and_an_empty_line_ends_nothing(tuned, monkeypatch):
    """Even if an answer may be longer than the context, of 48 tokens."""
    prompts = []

    def answer_x(model, tokenizer, idx_BT, max_new_tokens, **options):
        prompts.append(tokenizer.decode(idx_BT[0, 1:].tolist()))
        yield ['x']
    monkeypatch.setattr(engine, 'stream_text', answer_x)
    monkeypatch.setattr(sys, 'stdin', io.StringIO('one\n\ntwo\n'))
    run('sample.py', '--init_from=plain.pt', '--chat=True', '--device=cpu', '--max_new_tokens=1000',
        cwd=tuned)
    assert prompts == ['one', 'onex', 'onexxtwo']
