"""What a device could get wrong, in each number format, against float32 on a CPU.

    pytest tests/test_device.py  # on this CPU
    pytest --device=cuda         # on a GPU: these tests, and no others
"""
import contextlib
import json

import pytest
import torch

import folio.tokenizer
import hellaswag
from conftest import TINY, log_of, run
from folio import engine
from folio.machine import COMPILE_OPTIONS, Machine
from model import GPT, GPTConfig

# The largest difference allowed between numbers that should be equal, as a share of the largest of
# them. bfloat16 has 8 significant bits and float16 has 11; their errors add up over the layers.
TOLERANCES = {'float32': 1e-4, 'bfloat16': 0.05, 'float16': 0.01}
# What a step is multiplied by, so that its gradients do not underflow.
LOSS_SCALES = {'float32': 1.0, 'bfloat16': 1.0, 'float16': 1024.0}

in_each_format = pytest.mark.parametrize('dtype', TOLERANCES)
of_each_arch = pytest.mark.parametrize('arch', ['gpt2', 'modern'])
on_a_gpu_only = pytest.mark.skipif("config.getoption('device') == 'cpu'",
                                   reason='needs a GPU: pytest --device=cuda')


# ---- Small models --------------------------------------------------------------------------------
def make_model(arch, **options):
    """Return a small model on the CPU, the same in each call, whose head is not zero."""
    torch.manual_seed(0)
    sizes = {'block_size': 64, 'vocab_size': 1000, 'n_layer': 2, 'n_head': 4, 'n_embd': 128}
    model = GPT(GPTConfig(arch=arch, **sizes | options))
    torch.nn.init.normal_(model.lm_head.weight, std=0.05)
    return model


def batch_for(model, n_rows):
    """Return random (idx_BT, targets_BT) on a model's device; the same numbers on each device."""
    torch.manual_seed(0)
    config = model.config
    idx_BT = torch.randint(config.vocab_size, (n_rows, config.block_size))
    targets_BT = idx_BT.roll(-1, dims=1)
    targets_BT[:, -1] = -1
    device = model.lm_head.weight.device
    return idx_BT.to(device), targets_BT.to(device)


def autocast(device, dtype):
    if dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(device, getattr(torch, dtype))


@pytest.fixture(autouse=True)
def exact_products():
    """Without TF32, whose ten bits would be too coarse for float32's tolerance."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    yield
    torch.set_float32_matmul_precision(before)


def gradients_and_loss(model, device, dtype, n_rows=4):
    """Return {loss, gradients} of a model on a batch, as float32 tensors on the CPU."""
    idx_BT, targets_BT = batch_for(model, n_rows)
    model.zero_grad()
    with autocast(device, dtype):
        _, loss = model(idx_BT, targets_BT)
    scale = LOSS_SCALES[dtype]
    (scale * loss).backward()
    gradients = torch.cat([p.grad.float().flatten() for p in model.parameters()]) / scale
    return {'loss': loss.detach().cpu(), 'gradients': gradients.cpu()}


@torch.no_grad()
def logits_of(model, device, dtype):
    idx_BT, _ = batch_for(model, 4)
    with autocast(device, dtype):
        logits_BTV, _ = model(idx_BT, all_logits=True)
    return {'logits': logits_BTV.float().cpu()}


def assert_close(ours, theirs, dtype):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        difference = ((ours[name] - expected).abs().max() / expected.abs().max()).item()
        assert difference <= TOLERANCES[dtype], f'{name} differ by {difference:.1e}'


# ---- The model -----------------------------------------------------------------------------------
@of_each_arch
@in_each_format
def test_logits_loss_and_gradients_are_those_of_float32_on_a_cpu(arch, dtype, device):
    plain = make_model(arch)
    expected = logits_of(plain, 'cpu', 'float32') | gradients_and_loss(plain, 'cpu', 'float32')
    ours = make_model(arch).to(device)
    found = logits_of(ours, device, dtype) | gradients_and_loss(ours, device, dtype)
    assert_close(found, expected, dtype)


def needs_a_compiler(device):
    if not Machine(device, 'float32').can_compile():
        pytest.skip('torch.compile does not work here')


@pytest.mark.slow
@of_each_arch
@in_each_format
def test_compiled_loss_and_gradients_are_the_eager_ones(arch, dtype, device):
    needs_a_compiler(device)
    model = make_model(arch).to(device)
    expected = gradients_and_loss(model, device, dtype)
    torch.compiler.reset()
    model.compile(options=COMPILE_OPTIONS)
    assert_close(gradients_and_loss(model, device, dtype), expected, dtype)


@on_a_gpu_only
@of_each_arch
def test_compiled_gradients_are_the_eager_ones_at_a_recipes_size(arch, device):
    """64 rows of 1,024 tokens: at this size compilers and kernels have been wrong before."""
    needs_a_compiler(device)
    model = make_model(arch, block_size=1024, vocab_size=50257, n_head=12, n_embd=768)
    model.to(device)
    expected = gradients_and_loss(model, device, 'bfloat16', n_rows=64)
    torch.compiler.reset()
    model.compile(options=COMPILE_OPTIONS)
    found = gradients_and_loss(model, device, 'bfloat16', n_rows=64)
    assert found['gradients'].isfinite().all()
    assert_close(found, expected, 'bfloat16')


# ---- Text ----------------------------------------------------------------------------------------
N_NEW = 24  # tokens to continue each prompt with


def decode(model, prompts_BT):
    """Return (tokens (B, N), logits (B, N, V)) of greedy decoding with a cache."""
    tokens = []
    logits = []
    for next_B, logits_BV in engine.generate_with_logits(model, prompts_BT, N_NEW,
                                                         strategy='greedy'):
        tokens.append(next_B)
        logits.append(logits_BV.float())
    return torch.stack(tokens, dim=1), torch.stack(logits, dim=1)


@torch.no_grad()
@of_each_arch
@in_each_format
def test_decoding_with_a_cache_has_the_logits_of_the_whole_text(arch, dtype, device):
    model = make_model(arch).to(device, getattr(torch, dtype)).eval()
    prompts_BT = batch_for(model, 3)[0][:, :16]
    tokens_BN, logits_BNV = decode(model, prompts_BT)
    text_BT = torch.cat((prompts_BT, tokens_BN), dim=1)
    expected_BTV, _ = model(text_BT[:, :-1], all_logits=True)
    expected_BNV = expected_BTV[:, -N_NEW:].float()
    assert_close({'logits': logits_BNV.cpu()}, {'logits': expected_BNV.cpu()}, dtype)
    if dtype == 'float32':  # in 16 bits two logits may be so close that rounding decides
        assert torch.equal(text_BT, model.generate(prompts_BT, N_NEW, top_k=1))


@pytest.mark.parametrize('rules', [{'strategy': 'top_k', 'top_k': 3},
                                   {'strategy': 'nucleus', 'top_p': 0.5}], ids=str)
def test_only_tokens_that_the_strategy_keeps_are_drawn(rules, device):
    torch.manual_seed(0)
    logits_BV = 3 * torch.randn(1000, 500, device=device)
    is_kept_BV = engine.next_token_logits(logits_BV, **rules).isfinite()
    for _ in range(20):
        drawn_B = engine.draw_token(logits_BV, **rules)
        assert is_kept_BV.gather(1, drawn_B[:, None]).all()


def test_hellaswag_has_the_scores_of_a_cpu(device):
    letters = folio.tokenizer.CharTokenizer('abcdefghijklmnopqrstuvwxyz ')
    items = []
    for i in range(12):
        context = 'the quick brown fox jumps over the lazy dog'[i:]
        items.append({'ctx': context, 'endings': ['and so on', 'or', 'a' * (i + 1), 'then it ran'],
                      'label': i % 4})
    model = make_model('gpt2', vocab_size=27).eval()
    rows = hellaswag.render(items, letters, model.config.block_size)
    scores = []
    for where in ('cpu', device):
        machine = Machine(where, 'float32')
        torch.set_float32_matmul_precision('highest')  # Machine allows TF32
        sums, _ = hellaswag.score(model.to(where), rows, machine)
        scores.append({'sums': sums})
    assert_close(scores[1], scores[0], 'float32')


# ---- Runs ----------------------------------------------------------------------------------------
RUN = [*TINY, '--n_embd=64', '--n_head=2', '--block_size=64', '--batch_size=8', '--max_iters=40',
       '--learning_rate=3e-3', '--eval_interval=20', '--log_interval=1']
MUON = ['--arch=modern', '--optimizer=muon']
LEAST_FALL = 0.5  # nats by which the validation loss must fall in these 40 steps


def losses(folder, key, out_dir='out'):
    """Return what a run has logged under a key: loss, of each step, or val_loss."""
    return [entry[key] for entry in log_of(folder, out_dir) if key in entry]


# From here on only for GPUs: other files test the same on a CPU.
@on_a_gpu_only
@of_each_arch
@in_each_format
def test_training_learns(book, arch, dtype, device):
    run('train.py', *RUN, f'--device={device}', f'--dtype={dtype}', f'--arch={arch}', cwd=book)
    first, *_, last = losses(book, 'val_loss')
    assert last < first - LEAST_FALL


@on_a_gpu_only
def test_a_resumed_run_has_the_losses_of_one_left_alone(book, device):
    """To rounding: kernels of attention add in no fixed order."""
    options = [*RUN, *MUON, f'--device={device}', '--dropout=0.1', '--lr_decay_iters=40']
    run('train.py', *options, cwd=book)
    run('train.py', *options, '--max_iters=20', '--out_dir=other', cwd=book)
    run('train.py', *options, '--init_from=resume', '--out_dir=other', cwd=book)
    assert losses(book, 'loss', 'other') == pytest.approx(losses(book, 'loss'), abs=5e-3)


@on_a_gpu_only
def test_a_compiled_run_with_samples_comes_to_its_end(book, device):
    out, _ = run('train.py', *RUN, *MUON, f'--device={device}', '--dtype=auto', '--compile=auto',
                 '--sample_interval=20', cwd=book)
    assert 'compile True' in out
    assert len(losses(book, 'sample')) == 2


@on_a_gpu_only
def test_ddp_has_the_losses_of_one_process(book, device):
    n = torch.cuda.device_count()
    if n < 2:
        pytest.skip('needs several GPUs')
    options = [*RUN, *MUON, f'--device={device}', '--max_iters=10', '--batch_size=4',
               f'--gradient_accumulation_steps={n}']
    run('train.py', *options, cwd=book)
    run('train.py', *options, '--out_dir=other', cwd=book, processes=n)
    assert losses(book, 'loss', 'other') == pytest.approx(losses(book, 'loss'), abs=2e-3)


@on_a_gpu_only
def test_sample_and_bench_run(trained, device):
    text, _ = run('sample.py', f'--device={device}', '--start=The', '--max_new_tokens=20',
                  '--strategy=nucleus', cwd=trained)
    assert text.startswith('The')
    run('bench.py', '--dataset=book', '--n_layer=2', '--n_embd=96', '--block_size=64',
        '--batch_size=4', '--gradient_accumulation_steps=1', f'--device={device}', '--steps=3',
        '--new_tokens=4', '--save_to=b.json', cwd=trained)
    assert json.loads((trained / 'b.json').read_text())['training'] > 0
