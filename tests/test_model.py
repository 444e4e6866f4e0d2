import dataclasses
import errno
import functools
import os
import pickle

import pytest
import torch
import torch.nn.functional as F

from folio.configurator import UserError
import folio.checkpoint
from folio import engine
from folio import fast
from folio.engine import KVCache
from model import GPT, GPTConfig
from folio.optim import make_optimizers


@pytest.mark.parametrize('arch', ['gpt2', 'modern'])
def test_loss_at_init_is_log_vocab(arch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=103, n_layer=2, n_head=2, n_embd=64, arch=arch))
    idx_BT = torch.randint(103, (8, 64))
    _, loss = model(idx_BT, idx_BT.roll(-1, 1))
    assert loss.item() == pytest.approx(torch.tensor(103.0).log().item(), abs=0.05 if arch == 'gpt2' else 1e-5)


def test_no_peeking_at_the_future(model):
    idx_BT = torch.randint(50, (1, 16))
    logits_BTV, _ = model(idx_BT, all_logits=True)
    for t in range(1, 16):
        changed_BT = idx_BT.clone()
        changed_BT[:, t] = (changed_BT[:, t] + 1) % 50
        changed_BTV, _ = model(changed_BT, all_logits=True)
        assert torch.equal(changed_BTV[:, :t], logits_BTV[:, :t])
        assert not torch.allclose(changed_BTV[:, t:], logits_BTV[:, t:], atol=1e-3)


@pytest.mark.parametrize('arch, optimizer', [('gpt2', 'adamw'), ('modern', 'adamw'), ('modern', 'muon')])
def test_overfits_one_batch(arch, optimizer):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=64, arch=arch))
    optimizers = make_optimizers(model, optimizer, 3e-3, 0.02, 0.0, (0.9, 0.95))
    idx_BT = torch.randint(50, (4, 17))
    for _ in range(150):
        _, loss = model(idx_BT[:, :-1], idx_BT[:, 1:])
        loss.backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
    assert loss.item() < 0.05


def test_targets_of_minus_one_do_not_count(model):
    idx_BT, targets_BT = torch.randint(50, (2, 8)), torch.randint(50, (2, 8))
    targets_BT[:, :5] = -1
    logits_BTV, loss = model(idx_BT, all_logits=True)[0], model(idx_BT, targets_BT)[1]
    expected = F.cross_entropy(logits_BTV[:, 5:].flatten(0, 1), targets_BT[:, 5:].flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert model(idx_BT, torch.full_like(targets_BT, -1))[1].item() == 0


@pytest.mark.parametrize('window', [0, 5])
def test_written_out_attention_equals_fused(model, window):
    idx_BT = torch.randint(50, (3, 16))
    logits = []
    for flash in (True, False):
        other = GPT(dataclasses.replace(model.config, flash=flash, window=window)).eval()
        other.load_state_dict(model.state_dict())
        logits.append(other(idx_BT, all_logits=True)[0])
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)


def test_window_hides_older_tokens(model):
    windowed = GPT(dataclasses.replace(model.config, window=3, n_layer=1)).eval()
    idx_BT = torch.randint(50, (1, 16))
    changed_BT = idx_BT.clone()
    changed_BT[:, 4] = (changed_BT[:, 4] + 1) % 50
    difference_T = (windowed(idx_BT, all_logits=True)[0] - windowed(changed_BT, all_logits=True)[0]).abs().amax((0, 2))
    assert difference_T[7:].max() == 0 and difference_T[:4].max() == 0
    if model.config.arch == 'gpt2':  # modern's fresh head gives zeros
        assert difference_T[4:7].min() > 0


@pytest.mark.parametrize('window', [1, 5, 64, 100, 149, 150, 299, 300, 1000])
def test_a_window_in_blocks_equals_written_out_attention_and_so_do_its_gradients(window):
    config, results = GPTConfig(block_size=300, vocab_size=50, n_layer=2, n_head=2, n_embd=32, window=window), []
    for flash in (True, False):
        torch.manual_seed(0)
        model = GPT(dataclasses.replace(config, flash=flash))
        model = fast.accelerate(model) if flash else model
        logits_BTV, _ = model(torch.randint(50, (2, 300)), all_logits=True)
        logits_BTV.square().sum().backward()
        results.append([logits_BTV, *(p.grad / p.grad.abs().max() for p in model.parameters())])
    for ours, written_out in zip(*results):
        torch.testing.assert_close(ours, written_out, atol=1e-5, rtol=0)


def test_accelerated_attention_in_a_window_costs_twice_the_window_a_token(monkeypatch):
    costs, plain = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, 'scaled_dot_product_attention', lambda q, k, v, *rest, **options: costs.append(
        q[..., 0].numel() * k.size(-2)) or plain(q, k, v, *rest, **options))
    for T in (1000, 2000):
        config = GPTConfig(block_size=T, vocab_size=50, n_layer=1, n_head=2, n_embd=32, window=100)
        fast.accelerate(GPT(config))(torch.zeros(3, T, dtype=torch.long))
        assert sum(costs) <= 3 * 2 * T * 2 * 100  # rows, heads, queries, keys
        costs.clear()


@torch.no_grad()
@pytest.mark.parametrize('window', [0, 5])
def test_cached_equals_uncached_logits(model, window):
    """Ragged rows, prompt in one go, then token by token."""
    model.config.window = window
    rows, lengths = torch.randint(50, (3, 16)), [7, 3, 5]
    prompts = torch.zeros(3, 7, dtype=torch.long)
    for b, n in enumerate(lengths):
        prompts[b, 7 - n:] = rows[b, :n]
    cache = KVCache(model, 3, padding=[0, 4, 2])
    cached = [model(prompts, cache=cache)[0][:, 0]]
    for step in range(9):
        new_B1 = torch.stack([rows[b, n + step] for b, n in enumerate(lengths)])[:, None]
        cached.append(model(new_B1, cache=cache)[0][:, 0])
    for b, n in enumerate(lengths):
        for step in range(10):
            alone = model(rows[b:b + 1, :n + step])[0][0, 0]
            torch.testing.assert_close(cached[step][b], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('prompts', [[[1, 2, 3]], [[1, 2, 3], [4], list(range(20)), [5] * 16]])
def test_generation_with_cache_equals_without_past_a_full_context(model, prompts):
    cached = torch.stack(list(engine.generate(model, prompts, 40, strategy='greedy')))
    uncached = torch.stack(list(engine.generate(model, prompts, 40, strategy='greedy', use_cache=False)))
    assert torch.equal(cached, uncached)
    for row, prompt in enumerate(prompts):  # and a row does not depend on its neighbours
        assert torch.equal(torch.cat(list(engine.generate(model, [prompt], 40, strategy='greedy'))), cached[:, row])


@pytest.mark.parametrize('window', [0, 5])
def test_compiled_decoding_gives_the_same_tokens_and_compiles_once(model, window, monkeypatch):
    """Ragged rows, past a full context, twice; the backend here only counts."""
    torch.compiler.reset()
    graphs, model.config.window = [], window
    monkeypatch.setattr(torch, 'compile', functools.partial(
        torch.compile, backend=lambda graph, inputs: graphs.append(graph) or graph.forward, fullgraph=True))
    for _ in range(2):
        eager, compiled = (torch.stack(list(engine.generate(model, [[1, 2, 3], [4], [5] * 16], 40, strategy='greedy',
                                                            compile=c))) for c in (False, True))
        assert torch.equal(eager, compiled) and len(graphs) == 1


def test_full_context_is_cut_to_its_newer_half(model):
    ids = [7] * 16
    for next_B in engine.generate(model, [list(ids)], 10, strategy='greedy'):
        context = ids[-16:] if len(ids) <= 16 else ids[-(8 + len(ids) - 17):]  # 17 tokens become 8, then it grows again
        expected = model(torch.tensor([context]))[0].argmax().item()
        assert next_B.item() == expected
        ids.append(next_B.item())


def test_same_seed_gives_the_same_text_and_another_another(model):
    first, again, other = (torch.cat(list(engine.generate(model, [[1]], 30, seed=s))) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_stop_ends_a_row_and_the_generator(model):
    free = torch.stack(list(engine.generate(model, [[1], [2]], 30, strategy='greedy')))
    stop = free[3, 0].item()
    steps = torch.stack(list(engine.generate(model, [[1], [2]], 30, strategy='greedy', stop=[stop])))
    for row in range(2):
        hit = (free[:, row] == stop).nonzero()
        end = hit[0].item() if len(hit) else len(steps)
        assert torch.equal(steps[:end, row], free[:end, row]) and (steps[end:, row] == stop).all()


def test_padding_of_the_vocabulary_is_never_seen(model):
    assert model.transformer.wte.weight.shape[0] == 64
    assert model(torch.tensor([[1]]))[0].shape == (1, 1, 50)


def test_flops_per_token_counts_matrix_products():
    config = GPTConfig(block_size=1024, vocab_size=50257, bias=False)
    weights = 12 * 12 * 768**2 + 50304 * 768 + 25 * 768  # blocks, tied head, norms
    assert GPT(config).flops_per_token() == 6 * weights + 12 * 12 * 768 * 1024


# ---- Checkpoints -----------------------------------------------------------------------------------------------------

def test_checkpoint_loader_refuses_what_weights_only_refuses(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/ran',)
    for name, save in {'torch.pt': torch.save, 'pickle.pt': lambda x, path: pickle.dump(x, open(path, 'wb'))}.items():
        save({'model': {}, 'model_args': Evil()}, tmp_path / name)
        with pytest.raises(UserError, match='refused'):
            folio.checkpoint.load(str(tmp_path / name))
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('keep', [0, 10, 1000, -1])
def test_a_checkpoint_cut_short_is_one_clear_error(model, tmp_path, keep):
    path = str(tmp_path / 'ckpt.pt')
    folio.checkpoint.save(path, {'model': model.state_dict(), 'model_args': dataclasses.asdict(model.config)})
    data = open(path, 'rb').read()
    open(path, 'wb').write(data[:keep])
    with pytest.raises(UserError, match='damaged|refused'):
        folio.checkpoint.load(path)


def test_a_full_disk_leaves_the_previous_checkpoint_intact(model, tmp_path, monkeypatch):
    path = str(tmp_path / 'ckpt.pt')
    weights, args = model.state_dict(), dataclasses.asdict(model.config)
    folio.checkpoint.save(path, {'model': weights, 'model_args': args, 'iter_num': 1})

    class FullDisk:
        def __init__(self, *args):
            self.file = open(*args)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.file.close()

        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def flush(self):
            pass
    monkeypatch.setattr(folio.checkpoint, 'open', FullDisk, raising=False)
    with pytest.raises(UserError, match='No space left'):
        folio.checkpoint.save(path, {'model': weights, 'model_args': args, 'iter_num': 2})
    assert folio.checkpoint.load(path)['iter_num'] == 1
    assert os.listdir(tmp_path) == ['ckpt.pt']


# ---- Other people's weights ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('activation', ['gelu_new', 'gelu'])
def test_gpt2_folder_of_transformers_gives_the_same_logits(tmp_path, activation):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=101, n_positions=32, n_embd=48, n_layer=3, n_head=4, bos_token_id=0,
                                     eos_token_id=0, initializer_range=0.2, activation_function=activation)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    idx_BT = torch.randint(101, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx_BT, all_logits=True)[0], theirs(idx_BT).logits, atol=1e-4, rtol=1e-4)


def test_modern_has_the_shape_of_nanochat():
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    ours = GPT(GPTConfig(block_size=32, vocab_size=64, n_layer=3, n_head=4, n_embd=48, arch='modern')).eval()
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.2)
    theirs = transformers.NanoChatForCausalLM(transformers.NanoChatConfig(
        vocab_size=64, hidden_size=48, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=32)).eval()
    weights = {'model.embed_tokens.weight': ours.transformer.wte.weight, 'lm_head.weight': ours.lm_head.weight}
    for i, block in enumerate(ours.transformer.h):
        layer = f'model.layers.{i}.'
        for name, weight in zip('qkv', block.attn.c_attn.weight.chunk(3)):
            weights[f'{layer}self_attn.{name}_proj.weight'] = weight
        weights |= {f'{layer}self_attn.o_proj.weight': block.attn.c_proj.weight, f'{layer}mlp.fc1.weight':
                    block.mlp.c_fc.weight, f'{layer}mlp.fc2.weight': block.mlp.c_proj.weight}
    theirs.load_state_dict(weights)
    idx_BT = torch.randint(64, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx_BT, all_logits=True)[0], theirs(idx_BT).logits, atol=1e-4, rtol=1e-4)
