"""model.py: the architectures, their loss, attention and plain generation, and that it is alone."""
import dataclasses
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model as model_module
from conftest import ROOT
from folio import engine
from folio.optim import make_optimizers
from model import GPT, GPTConfig


# ---- Learning ------------------------------------------------------------------------------------
@pytest.mark.parametrize('arch, tolerance', [('gpt2', 0.05), ('modern', 1e-5)])
def test_loss_at_init_is_log_vocab(arch, tolerance):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=103, n_layer=2, n_head=2, n_embd=64, arch=arch))
    idx_BT = torch.randint(103, (8, 64))
    _, loss = model(idx_BT, idx_BT.roll(-1, 1))
    assert loss.item() == pytest.approx(torch.tensor(103.0).log().item(), abs=tolerance)


@pytest.mark.parametrize('arch, optimizer', [
    ('gpt2', 'adamw'), ('modern', 'adamw'), ('modern', 'muon')])
def test_overfits_one_batch(arch, optimizer):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=64, arch=arch))
    optimizers = make_optimizers(model, optimizer, learning_rate=3e-3, muon_learning_rate=0.02,
                                 weight_decay=0.0, betas=(0.9, 0.95))
    idx_BT = torch.randint(50, (4, 17))
    for _ in range(100):
        _, loss = model(idx_BT[:, :-1], idx_BT[:, 1:])
        loss.backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
    assert loss.item() < 0.05


def test_a_call_with_targets_returns_their_mean_loss(model):
    idx_BT = torch.randint(50, (2, 8))
    targets_BT = torch.randint(50, (2, 8))
    logits_BTV, loss = model(idx_BT, targets_BT, all_logits=True)
    assert logits_BTV.shape == (2, 8, 50)
    expected = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert model(idx_BT, targets_BT)[0] is None
    assert torch.equal(model(idx_BT, targets_BT)[1], loss)


def test_a_call_without_targets_returns_the_last_logits(model):
    idx_BT = torch.randint(50, (2, 8))
    logits_BTV, loss = model(idx_BT)
    assert loss is None
    all_logits_BTV, _ = model(idx_BT, all_logits=True)
    torch.testing.assert_close(logits_BTV, all_logits_BTV[:, -1:])


def test_targets_of_minus_one_do_not_count(model):
    idx_BT = torch.randint(50, (2, 8))
    targets_BT = torch.randint(50, (2, 8))
    targets_BT[:, :5] = -1
    logits_BTV, loss = model(idx_BT, targets_BT, all_logits=True)
    expected = F.cross_entropy(logits_BTV[:, 5:].flatten(0, 1), targets_BT[:, 5:].flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_loss_without_any_target_is_zero(model):
    idx_BT = torch.randint(50, (2, 8))
    assert model(idx_BT, torch.full_like(idx_BT, -1))[1].item() == 0


def test_residual_projections_begin_smaller_in_deep_models():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=8, n_head=2, n_embd=128))
    for block in model.transformer.h:
        assert block.attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert block.attn.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
        assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


# ---- Attention -----------------------------------------------------------------------------------
def test_no_peeking_at_the_future(model):
    idx_BT = torch.randint(50, (1, 16))
    logits_BTV, _ = model(idx_BT, all_logits=True)
    for t in range(1, 16):
        changed_BT = idx_BT.clone()
        changed_BT[:, t] = (changed_BT[:, t] + 1) % 50
        changed_BTV, _ = model(changed_BT, all_logits=True)
        assert torch.equal(changed_BTV[:, :t], logits_BTV[:, :t])
        assert not torch.allclose(changed_BTV[:, t:], logits_BTV[:, t:], atol=1e-3)


@pytest.mark.parametrize('window', [0, 5])
def test_written_out_attention_equals_fused(model, window):
    idx_BT = torch.randint(50, (3, 16))
    logits = []
    for flash in (True, False):
        other = GPT(dataclasses.replace(model.config, flash=flash, window=window)).eval()
        other.load_state_dict(model.state_dict())
        logits.append(other(idx_BT, all_logits=True)[0])
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)


def test_a_window_shows_its_length_of_tokens_and_no_older_one(model):
    windowed = GPT(dataclasses.replace(model.config, window=3, n_layer=1)).eval()
    for p in windowed.parameters():
        torch.nn.init.normal_(p, std=0.2)
    idx_BT = torch.randint(50, (1, 16))
    changed_BT = idx_BT.clone()
    changed_BT[:, 4] = (changed_BT[:, 4] + 1) % 50
    before = windowed(idx_BT, all_logits=True)[0]
    after = windowed(changed_BT, all_logits=True)[0]
    has_changed_T = (before != after).any(dim=-1)[0]
    assert has_changed_T.nonzero().flatten().tolist() == [4, 5, 6]


@pytest.mark.parametrize('window', [1, 5, 64, 100, 149, 150, 299, 300, 1000])
def test_a_window_in_blocks_equals_one_by_a_mask(window):
    torch.manual_seed(0)
    config = GPTConfig(block_size=300, vocab_size=50, n_layer=1, n_head=2, n_embd=32)
    attention = GPT(config).transformer.h[0].attn
    results = []
    qkv = torch.randn(3, 2, 2, 300, 16, requires_grad=True)
    pos_T = torch.arange(300)
    distance = pos_T[:, None] - pos_T
    mask = (distance >= 0) & (distance < window)
    for y in (attention.attend(*qkv, window), F.scaled_dot_product_attention(*qkv, mask)):
        gradient, = torch.autograd.grad(y.square().sum(), qkv)
        results.append((y, gradient))
    for ours, masked in zip(*results):
        torch.testing.assert_close(ours, masked, atol=1e-5, rtol=1e-5)


def flops_of_attention(window, T):
    config = GPTConfig(block_size=T, vocab_size=50, n_layer=1, n_head=2, n_embd=32)
    attention = GPT(config).transformer.h[0].attn
    q, k, v = torch.randn(3, 1, 2, T, 16)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        attention.attend(q, k, v, window)
    return counter.get_total_flops()


def test_an_edit_for_each_head_does_the_same_in_blocks(monkeypatch):
    """Such as ALiBi's slopes (Press et al. 2022)."""
    config = GPTConfig(block_size=300, vocab_size=50, n_layer=1, n_head=3, n_embd=24)
    attention = GPT(config).transformer.h[0].attn
    q, k, v = torch.randn(3, 2, 3, 300, 8)

    def with_slopes(mask_TS, q_BHTD, k_BHSD, v_BHSD):
        T, S = mask_TS.shape
        distance_TS = torch.arange(S)[-T:, None] - torch.arange(S)
        slopes_H11 = torch.tensor([0.1, 0.5, 2.0])[:, None, None]
        bias_HTS = (-slopes_H11 * distance_TS).masked_fill(~mask_TS, -torch.inf)
        return F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, bias_HTS)
    monkeypatch.setattr(attention, 'attend_where', with_slopes)
    mask_TT = model_module.can_see(300, 300, window=20, device='cpu')
    torch.testing.assert_close(attention.attend(q, k, v, window=20),
                               with_slopes(mask_TT, q, k, v), atol=1e-5, rtol=1e-5)


def test_attention_in_a_window_costs_the_window_not_the_context():
    short = flops_of_attention(100, 1000)
    assert flops_of_attention(100, 4000) == pytest.approx(4 * short, rel=0.1)
    assert flops_of_attention(100, 4000) < flops_of_attention(0, 4000) / 10


@pytest.mark.parametrize('flash', [True, False])
def test_attention_drops_out_when_it_trains_and_only_then(flash):
    """The projection and all else pass through: what differs is the attention's own."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=32, dropout=0.5,
                       flash=flash)
    attention = GPT(config).transformer.h[0].attn
    q, k, v = torch.randn(3, 1, 2, 16, 16)
    outputs = {}
    for mode in (True, False):
        attention.train(mode)
        outputs[mode] = [attention.attend(q, k, v, window=0) for _ in range(2)]
    assert torch.equal(*outputs[False])
    assert not torch.equal(*outputs[True])


# ---- Less memory ---------------------------------------------------------------------------------
def loss_and_gradients(model, idx_BT):
    torch.manual_seed(0)  # of dropout
    _, loss = model(idx_BT, idx_BT.roll(-1, dims=1))
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


def test_activation_checkpointing_changes_no_gradient(model, monkeypatch):
    monkeypatch.setattr(model_module, 'LOSS_ROWS', 7)
    model = GPT(dataclasses.replace(model.config, dropout=0.1))
    idx_BT = torch.randint(50, (3, 16))
    plain = loss_and_gradients(model, idx_BT)
    model.config.activation_checkpointing = True
    for ours, expected in zip(loss_and_gradients(model, idx_BT), plain):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


def bytes_kept(function, *args):
    """Return how many bytes a forward pass keeps for the backward pass."""
    sizes = []

    def keep(tensor):
        sizes.append(tensor.nbytes)
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function(*args)
    return sum(sizes)


def test_activation_checkpointing_keeps_less_of_blocks_and_loss(model, monkeypatch):
    monkeypatch.setattr(model_module, 'LOSS_ROWS', 16)
    idx_BT = torch.zeros(8, 16, dtype=torch.long)
    x = torch.randn(8, 16, 32, requires_grad=True)
    model.train()
    kept = {}
    for is_on in (False, True):
        model.config.activation_checkpointing = is_on
        kept[is_on] = bytes_kept(model, idx_BT, idx_BT), bytes_kept(model.loss, x, idx_BT)
    assert kept[True][0] < kept[False][0] / 4
    assert kept[True][1] < kept[False][1] / 2


# ---- The vocabulary ------------------------------------------------------------------------------
def test_the_vocabulary_is_padded_to_a_multiple_of_64(model):
    assert model.config.vocab_size == 50
    assert model.transformer.wte.weight.shape[0] == 64


def test_padding_of_the_vocabulary_is_never_seen(model):
    assert model(torch.tensor([[1]]))[0].shape == (1, 1, 50)


def test_flops_per_token_counts_matrix_products():
    config = GPTConfig(block_size=1024, vocab_size=50257, bias=False)
    with torch.device('meta'):
        model = GPT(config)
    weights = 12 * 12 * 768**2 + 50304 * 768 + 25 * 768  # blocks, tied head, norms
    assert model.flops_per_token() == 6 * weights + 12 * 12 * 768 * 1024


@pytest.mark.parametrize('options, says', [
    (dict(n_embd=33), 'try --n_embd=36'),
    (dict(n_layer=0), 'n_layer is 0; it must be at least 1'),
    (dict(arch='gpt5'), 'choose from gpt2, modern'),
    (dict(gelu='erf'), 'choose from tanh, none'),
    (dict(dropout=1.5), 'dropout is 1.5'),
    (dict(window=-1), 'window is -1'),
    (dict(arch='modern', n_embd=6), 'even head size'),
])
def test_a_shape_that_cannot_be_is_a_value_error(options, says):
    with pytest.raises(ValueError, match=says):
        GPTConfig(**(dict(n_layer=2, n_head=2, n_embd=32) | options))


# ---- Plain generation ----------------------------------------------------------------------------
def test_generate_returns_the_prompt_and_its_continuation(model):
    prompt_BT = torch.randint(50, (3, 4))
    longer_BT = model.generate(prompt_BT, 20)  # past the context of 16
    assert longer_BT.shape == (3, 24)
    assert torch.equal(longer_BT[:, :4], prompt_BT)


def test_generate_draws_only_tokens_that_exist():
    """With a head of zeros all tokens are alike, the padding too if it were there."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=4, vocab_size=5, n_layer=1, n_head=1, n_embd=8, arch='modern'))
    drawn = model.generate(torch.zeros(100, 1, dtype=torch.long), 10)
    assert set(drawn.flatten().tolist()) == set(range(5))


@pytest.mark.parametrize('options', [
    dict(top_k=1), dict(temperature=1e-4), dict(temperature=0.0)], ids=str)
def test_generate_is_greedy_with_top_k_of_1_or_no_temperature(model, options):
    prompt_BT = torch.randint(50, (2, 3))
    greedy = torch.stack(list(engine.generate(model, prompt_BT, 13, strategy='greedy')), dim=1)
    assert torch.equal(model.generate(prompt_BT, 13, **options)[:, 3:], greedy)


# ---- Alone ---------------------------------------------------------------------------------------
ALONE = """
import sys
sys.path.insert(0, '.')
import torch
from model import GPT, GPTConfig
for arch in ('gpt2', 'modern'):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=16, arch=arch))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    idx = torch.randint(20, (4, 9))
    losses = []
    for step in range(2):
        logits, loss = model(idx[:, :-1], idx[:, 1:])
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]
    assert model.generate(idx[:, :2], 12, top_k=5).shape == (4, 14)
assert 'folio' not in sys.modules
print('trained and generated')
"""


def test_model_copied_alone_trains_and_generates(tmp_path):
    shutil.copy(ROOT / 'model.py', tmp_path)
    done = subprocess.run([sys.executable, '-I', '-c', ALONE], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.stdout == 'trained and generated\n', done.stderr


# ---- Compiled ------------------------------------------------------------------------------------
@pytest.mark.parametrize('arch, options', [
    ('gpt2', {}), ('modern', {}), ('modern', {'window': 16}),
    ('modern', {'flash': False, 'dropout': 0.1}), ('modern', {'activation_checkpointing': True})],
    ids=str)
def test_training_and_evaluation_are_two_graphs(arch, options):
    """Whole, without breaks, and used again: torch.compile need not come back to a model."""
    torch._dynamo.reset()
    model = GPT(GPTConfig(block_size=64, vocab_size=50, n_layer=2, n_head=2, n_embd=32, arch=arch,
                          **options))
    counter = CompileCounterWithBackend('eager')
    model.compile(backend=counter, fullgraph=True)
    idx_BT = torch.randint(50, (2, 64))
    for is_training in (True, False, True, False):
        model.train(is_training)
        with torch.set_grad_enabled(is_training):
            model(idx_BT, idx_BT)
    assert counter.frame_count == 2
