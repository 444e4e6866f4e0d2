"""What nanoGPT's users bring: config files, data folders, checkpoints, all written here the way nanoGPT writes them."""
import pickle

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from conftest import TINY, run, shared
from model import GPT
import folio.checkpoint

CHARS = sorted(set('To be, or not to be: that is the question.\n'))


def char_folder(folder):
    """data/shakespeare_char as its prepare.py leaves it."""
    folder.mkdir(parents=True)
    ids = [CHARS.index(c) for c in 'To be, or not to be: that is the question.\n' * 100]
    np.array(ids[:3600], dtype=np.uint16).tofile(folder / 'train.bin')
    np.array(ids[3600:], dtype=np.uint16).tofile(folder / 'val.bin')
    meta = {'vocab_size': len(CHARS), 'itos': dict(enumerate(CHARS)), 'stoi': {c: i for i, c in enumerate(CHARS)}}
    (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))


class PlainBlock(nn.Module):
    """A pre-norm block with nanoGPT's parameter names, by torch's own modules: exact GELU, separate softmax."""

    def __init__(self, C, n_head, bias):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=bias), nn.LayerNorm(C, bias=bias)
        self.attn = nn.ModuleDict(dict(c_attn=nn.Linear(C, 3 * C, bias=bias), c_proj=nn.Linear(C, C, bias=bias)))
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(C, 4 * C, bias=bias), c_proj=nn.Linear(4 * C, C, bias=bias)))

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2)
                   for t in self.attn.c_attn(self.ln_1(x)).split(C, dim=2))
        scores = (q @ k.mT) * (C // self.n_head)**-0.5 + torch.full((T, T), -torch.inf).triu(1)
        x = x + self.attn.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class PlainGPT(nn.Module):
    def __init__(self, vocab_size, block_size, n_layer, n_head, n_embd, bias, dropout):
        super().__init__()
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(vocab_size, n_embd), wpe=nn.Embedding(block_size, n_embd),
            h=nn.ModuleList([PlainBlock(n_embd, n_head, bias) for _ in range(n_layer)]),
            ln_f=nn.LayerNorm(n_embd, bias=bias)))
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx):
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(idx.size(1)))
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


def checkpoint_file(path, vocab_size, bias, prefix=''):
    """A ckpt.pt after one step of AdamW over nanoGPT's two groups: matrices, then vectors."""
    torch.manual_seed(0)
    args = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, bias=bias, vocab_size=vocab_size, dropout=0.0)
    theirs = PlainGPT(**args)
    params = list(theirs.parameters())
    optimizer = torch.optim.AdamW([{'params': [p for p in params if p.dim() >= 2], 'weight_decay': 0.1},
                                   {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}], lr=1e-3)
    idx = torch.randint(min(vocab_size, 50), (2, 32))
    F.cross_entropy(theirs(idx).flatten(0, 1), idx.flatten()).backward()
    optimizer.step()
    weights = {prefix + k: v for k, v in theirs.state_dict().items()}
    weights[f'{prefix}transformer.h.0.attn.bias'] = torch.ones(1, 1, 32, 32).tril()  # the mask of older versions
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({'model': weights, 'optimizer': optimizer.state_dict(), 'model_args': args, 'iter_num': 20,
                'best_val_loss': torch.tensor(3.5), 'config': {'dataset': 'shakespeare_char', 'out_dir': 'out'}}, path)
    return theirs.eval(), optimizer


@pytest.mark.parametrize('vocab_size, bias, prefix', [(len(CHARS), False, ''), (50304, True, '_orig_mod.')])
def test_checkpoint_gives_the_same_logits(tmp_path, vocab_size, bias, prefix):
    theirs, _ = checkpoint_file(tmp_path / 'ckpt.pt', vocab_size, bias, prefix)
    ours = GPT.from_pretrained(str(tmp_path / 'ckpt.pt')).eval()
    idx = torch.randint(len(CHARS), (3, 32))
    with torch.no_grad():
        mine = ours(idx, all_logits=True)[0]
        torch.testing.assert_close(mine, theirs(idx)[..., :mine.size(-1)], atol=1e-5, rtol=1e-5)
    assert mine.size(-1) == {50304: 50257}.get(vocab_size, vocab_size)  # 47 rows of padding are no tokens


def test_run_resumes_with_its_optimizer_and_is_sampled(tmp_path):
    char_folder(tmp_path / 'data' / 'shakespeare_char')
    _, theirs = checkpoint_file(tmp_path / 'out' / 'ckpt.pt', len(CHARS), bias=False)
    args = [*TINY, '--dataset=shakespeare_char', '--bias=False', '--init_from=resume']
    out, _ = run('train.py', *args, '--max_iters=22', '--log_interval=1', cwd=tmp_path)
    assert 'iter 20:' in out and 'iter 19:' not in out
    state = folio.checkpoint.load(str(tmp_path / 'out' / 'ckpt.pt'))['optimizer'][0]['state']
    assert len(state) == len(theirs.state_dict()['state']) and all(s['step'].item() == 3 for s in state.values())
    text, _ = run('sample.py', '--out_dir=out', '--start=To be', '--max_new_tokens=20', '--device=cpu', cwd=tmp_path)
    assert text.startswith('To be') and set(text) <= set(CHARS)


def test_checkpoint_of_nanogpt_is_sampled_with_the_characters_of_its_data(tmp_path):
    char_folder(tmp_path / 'data' / 'shakespeare_char')
    checkpoint_file(tmp_path / 'out' / 'ckpt.pt', len(CHARS), bias=False)
    text, _ = run('sample.py', '--out_dir=out', '--start=To be', '--max_new_tokens=20', '--device=cpu', cwd=tmp_path)
    assert text.startswith('To be') and len(text) == 26 and set(text) <= set(CHARS)


def test_char_folder_with_meta_pkl_is_trained_on(tmp_path):
    char_folder(tmp_path / 'data' / 'shakespeare_char')
    out, _ = run('train.py', *TINY, '--dataset=shakespeare_char', '--learning_rate=1e-2', cwd=tmp_path)
    checkpoint = folio.checkpoint.load(str(tmp_path / 'out' / 'ckpt.pt'))
    assert checkpoint['model_args']['vocab_size'] == len(CHARS) and checkpoint['tokenizer']['chars'] == ''.join(CHARS)
    assert checkpoint['best_val_loss'] < 2.5 and 'perplexity' in out and 'bits_per_byte' not in out  # no byte counts


def test_folder_without_meta_is_gpt2_bpe(tmp_path):
    shared('tiktoken')
    (tmp_path / 'data' / 'openwebtext').mkdir(parents=True)
    for split in ('train', 'val'):
        (np.arange(2000) * 25 % 50257).astype(np.uint16).tofile(tmp_path / 'data' / 'openwebtext' / f'{split}.bin')
    run('train.py', *TINY, '--dataset=openwebtext', '--max_iters=2', '--eval_iters=1', cwd=tmp_path)
    checkpoint = folio.checkpoint.load(str(tmp_path / 'out' / 'ckpt.pt'))
    assert checkpoint['model_args']['vocab_size'] == 50257 and checkpoint['tokenizer'] == {'kind': 'gpt2'}


def test_config_file_works_unchanged(tmp_path):
    """Setting names, an import and an expression, as in nanoGPT's config/finetune_shakespeare.py and train_gpt2.py."""
    char_folder(tmp_path / 'data' / 'shakespeare_char')
    (tmp_path / 'config.py').write_text('''
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
''')
    run('train.py', 'config.py', cwd=tmp_path)
    assert folio.checkpoint.load(str(tmp_path / 'out-char' / 'ckpt.pt'))['config']['beta2'] == 0.99
