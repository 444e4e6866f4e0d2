"""What nanoGPT's users bring, written as nanoGPT writes it: configs, data folders, checkpoints."""
import pickle
import shutil

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from conftest import TINY, run, shared
from folio import checkpoint
from folio.tokenizer import CharTokenizer
from model import GPT
from prepare.corpus import write_dataset

TEXT = 'To be, or not to be: that is the question.\n' * 100
CHARS = sorted(set(TEXT))
CHAR_RUN = [*TINY, '--dataset=shakespeare_char', '--bias=False']


# ---- What they bring -----------------------------------------------------------------------------
def char_folder(folder):
    """Write data/shakespeare_char as its prepare.py leaves it."""
    folder.mkdir(parents=True)
    ids = [CHARS.index(c) for c in TEXT]
    np.array(ids[:3600], dtype=np.uint16).tofile(folder / 'train.bin')
    np.array(ids[3600:], dtype=np.uint16).tofile(folder / 'val.bin')
    itos = dict(enumerate(CHARS))
    stoi = {c: i for i, c in itos.items()}
    meta = {'vocab_size': len(CHARS), 'itos': itos, 'stoi': stoi}
    (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))


class PlainBlock(nn.Module):
    """A pre-norm block with nanoGPT's parameter names, by torch's own modules."""

    def __init__(self, C, n_head, bias):
        super().__init__()
        self.n_head = n_head
        self.ln_1 = nn.LayerNorm(C, bias=bias)
        self.ln_2 = nn.LayerNorm(C, bias=bias)
        self.attn = nn.ModuleDict({'c_attn': nn.Linear(C, 3 * C, bias=bias),
                                   'c_proj': nn.Linear(C, C, bias=bias)})
        self.mlp = nn.ModuleDict({'c_fc': nn.Linear(C, 4 * C, bias=bias),
                                  'c_proj': nn.Linear(4 * C, C, bias=bias)})

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.attn.c_attn(self.ln_1(x)).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        future = torch.full((T, T), -torch.inf).triu(1)
        scores = q @ k.mT * (C // self.n_head)**-0.5 + future
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C)
        x = x + self.attn.c_proj(y)
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))  # the exact GELU


class PlainGPT(nn.Module):
    def __init__(self, vocab_size, block_size, n_layer, n_head, n_embd, bias, dropout):
        super().__init__()
        self.transformer = nn.ModuleDict({
            'wte': nn.Embedding(vocab_size, n_embd),
            'wpe': nn.Embedding(block_size, n_embd),
            'h': nn.ModuleList([PlainBlock(n_embd, n_head, bias) for _ in range(n_layer)]),
            'ln_f': nn.LayerNorm(n_embd, bias=bias)})
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx):
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(idx.size(1)))
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


def checkpoint_file(path, vocab_size=len(CHARS), bias=False, prefix='', **changes):
    """Write a ckpt.pt after one step of AdamW over nanoGPT's two groups: matrices, then vectors.

    prefix: of the names, as of a compiled model. changes: entries of the dictionary; None: left
    out. Returns (the model, its optimizer).
    """
    torch.manual_seed(0)
    args = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, bias=bias, vocab_size=vocab_size,
                dropout=0.0)
    model = PlainGPT(**args)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{'params': matrices, 'weight_decay': 0.1},
                                   {'params': vectors, 'weight_decay': 0.0}], lr=1e-3)
    idx = torch.randint(min(vocab_size, 50), (2, 32))
    F.cross_entropy(model(idx).flatten(0, 1), idx.flatten()).backward()
    optimizer.step()
    weights = {prefix + name: weight for name, weight in model.state_dict().items()}
    # Older versions kept the mask.
    weights[f'{prefix}transformer.h.0.attn.bias'] = torch.ones(1, 1, 32, 32).tril()
    saved = {'model': weights, 'optimizer': optimizer.state_dict(), 'model_args': args,
             'iter_num': 20, 'best_val_loss': torch.tensor(3.5),
             'config': {'dataset': 'shakespeare_char', 'out_dir': 'out'}} | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({key: value for key, value in saved.items() if value is not None}, path)
    return model.eval(), optimizer


@pytest.fixture(scope='module')
def resumed_once(tmp_path_factory):
    """A folder with their data and a run of theirs that ours took from step 20 to 22."""
    folder = tmp_path_factory.mktemp('nanogpt') / 'work'
    char_folder(folder / 'data' / 'shakespeare_char')
    checkpoint_file(folder / 'out' / 'ckpt.pt')
    out, _ = run('train.py', *CHAR_RUN, '--init_from=resume', '--max_iters=22', '--log_interval=1',
                 cwd=folder)
    (folder / 'printed.txt').write_text(out)
    return folder


@pytest.fixture
def nanogpt(tmp_path):
    """A folder with their data and a run of theirs, as their scripts left them."""
    char_folder(tmp_path / 'data' / 'shakespeare_char')
    checkpoint_file(tmp_path / 'out' / 'ckpt.pt')
    return tmp_path


def sample(folder):
    """Return 20 characters that a run says to 'To be'."""
    out, _ = run('sample.py', '--out_dir=out', '--start=To be', '--max_new_tokens=20',
                 '--device=cpu', cwd=folder)
    assert out.startswith('To be')
    return out.removeprefix('To be').removesuffix('\n')


# ---- Checkpoints ---------------------------------------------------------------------------------
@pytest.mark.parametrize('vocab_size, n_tokens, bias, prefix', [
    (len(CHARS), len(CHARS), False, ''),
    (50304, 50257, True, '_orig_mod.'),  # GPT-2's vocabulary, with 47 rows that are no tokens
], ids=['char', 'gpt2-compiled'])
def test_a_checkpoint_gives_the_same_logits(tmp_path, vocab_size, n_tokens, bias, prefix):
    theirs, _ = checkpoint_file(tmp_path / 'ckpt.pt', vocab_size, bias, prefix)
    ours = GPT.from_pretrained(checkpoint.load(str(tmp_path / 'ckpt.pt'))).eval()
    idx_BT = torch.randint(len(CHARS), (3, 32))
    with torch.no_grad():
        logits_BTV, _ = ours(idx_BT, all_logits=True)
        expected = theirs(idx_BT)[..., :n_tokens]
    torch.testing.assert_close(logits_BTV, expected, atol=1e-5, rtol=1e-5)


def test_a_run_continues_at_its_step(resumed_once):
    out = (resumed_once / 'printed.txt').read_text()
    assert 'iter 20:' in out
    assert 'iter 19:' not in out


def test_a_run_continues_with_its_optimizer(resumed_once):
    """Every parameter has been stepped once by theirs and twice by ours."""
    state = checkpoint.load(str(resumed_once / 'out'))['optimizer'][0]['state']
    model = GPT.from_pretrained(checkpoint.load(str(resumed_once / 'out')))
    shapes = sorted(p.shape for p in model.parameters())  # the embedding's is padded to 128 rows
    assert sorted(entry['exp_avg'].shape for entry in state.values()) == shapes
    assert [entry['step'].item() for entry in state.values()] == [3] * len(shapes)


@pytest.mark.parametrize('optimizer', [{}, None], ids=['empty', 'missing'])
def test_a_run_without_its_optimizer_gets_a_new_one_and_says_so(nanogpt, optimizer):
    checkpoint_file(nanogpt / 'out' / 'ckpt.pt', optimizer=optimizer)
    out, _ = run('train.py', *CHAR_RUN, '--init_from=resume', '--max_iters=21', cwd=nanogpt)
    assert 'out/ckpt.pt was saved without its optimizer, which starts over' in out
    assert 'done at step 21' in out


def test_resuming_weights_without_a_step_says_what_to_do(nanogpt):
    checkpoint_file(nanogpt / 'out' / 'ckpt.pt', iter_num=None)
    _, err = run('train.py', *CHAR_RUN, '--init_from=resume', cwd=nanogpt, status=2)
    assert 'holds weights but no iter_num' in err
    assert '--init_from=out/ckpt.pt' in err


def test_a_checkpoint_is_sampled_with_the_characters_of_its_data(nanogpt):
    """From the data's meta.pkl, or from our meta.json where we have made the data again."""
    folder = nanogpt / 'data' / 'shakespeare_char'
    expected = sample(nanogpt)
    assert len(expected) == 20
    assert set(expected) <= set(CHARS)
    shutil.rmtree(folder)
    write_dataset(folder, CharTokenizer(''.join(CHARS)), {'train': [TEXT], 'val': [TEXT]},
                  source='here')
    assert not (folder / 'meta.pkl').exists()
    assert sample(nanogpt) == expected


def test_a_checkpoint_of_characters_needs_its_data(nanogpt):
    shutil.rmtree(nanogpt / 'data')
    _, err = run('sample.py', '--out_dir=out', '--device=cpu', cwd=nanogpt, status=2)
    assert f"has no tokenizer, and its {len(CHARS)} tokens are not GPT-2's 50257" in err


# ---- Data ----------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def char_run(tmp_path_factory):
    """(the checkpoint of a run on their characters, what it printed)."""
    folder = tmp_path_factory.mktemp('char')
    char_folder(folder / 'data' / 'shakespeare_char')
    out, _ = run('train.py', *CHAR_RUN, '--learning_rate=1e-2', cwd=folder)
    return checkpoint.load(str(folder / 'out')), out


def test_a_char_folder_with_meta_pkl_is_trained_on(char_run):
    saved, _ = char_run
    assert saved['best_val_loss'] < 2.5


def test_the_characters_of_meta_pkl_are_the_tokenizer(char_run):
    saved, _ = char_run
    assert saved['tokenizer'] == {'kind': 'char', 'chars': ''.join(CHARS)}


def test_bits_per_byte_are_reported_where_bytes_were_counted(char_run):
    _, out = char_run
    assert 'perplexity' in out
    assert 'bits_per_byte' not in out


def test_a_folder_without_meta_is_gpt2_bpe(tmp_path):
    shared('tiktoken')
    folder = tmp_path / 'data' / 'openwebtext'
    folder.mkdir(parents=True)
    for split in ('train', 'val'):
        (np.arange(2000) * 25 % 50257).astype(np.uint16).tofile(folder / f'{split}.bin')
    run('train.py', *TINY, '--dataset=openwebtext', '--max_iters=1', '--eval_iters=1',
        cwd=tmp_path)
    saved = checkpoint.load(str(tmp_path / 'out'))
    assert saved['model_args']['vocab_size'] == 50257
    assert saved['tokenizer'] == {'kind': 'gpt2'}


# ---- Settings ------------------------------------------------------------------------------------
# Names, an import and expressions as in nanoGPT's config/finetune_shakespeare.py and train_gpt2.py
CONFIG = '''
import time
out_dir = 'out-char'
eval_interval = 250
eval_iters = 2
eval_only = False
log_interval = 10
always_save_checkpoint = False
init_from = 'scratch'
wandb_log = False
wandb_project = 'char'
wandb_run_name = 'mini-' + str(time.time())
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1 * 2
batch_size = 4
block_size = 16
n_layer = 1
n_head = 2
n_embd = 16
dropout = 0.2
bias = False
learning_rate = 1e-3
max_iters = 20
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.99
grad_clip = 1.0
decay_lr = True
warmup_iters = 100
lr_decay_iters = 5000
min_lr = 1e-4
backend = 'nccl'
device = 'cpu'
dtype = 'bfloat16'
compile = False
'''


def test_a_config_file_works_unchanged(tmp_path):
    char_folder(tmp_path / 'data' / 'shakespeare_char')
    (tmp_path / 'config.py').write_text(CONFIG)
    run('train.py', 'config.py', cwd=tmp_path)
    assert checkpoint.load(str(tmp_path / 'out-char'))['config']['beta2'] == 0.99
