"""The machine a script runs on: its number format, and what training will take of its memory."""
import pytest

from folio import machine as folio_machine
from folio.machine import Machine
from folio.optim import make_optimizers
from model import GPT, GPTConfig

SHAPE = dict(block_size=32, vocab_size=64, n_layer=2, n_head=2, n_embd=32)


def expected(kind, batch_size, **options):
    model = GPT(GPTConfig(**SHAPE, arch='modern'))
    optimizers = make_optimizers(model, kind, learning_rate=1e-3, muon_learning_rate=0.02,
                                 weight_decay=0.1, betas=(0.9, 0.95))
    machine = Machine('cpu', 'float32')
    return model, machine.expected_memory(model, optimizers, batch_size, **options)


def test_memory_is_that_of_numbers_activations_and_logits():
    model, memory = expected('adamw', batch_size=4)
    n_parameters = sum(p.numel() for p in model.parameters())
    n_tokens = 4 * 32
    # A parameter, its gradient, and AdamW's two averages, of four bytes each
    numbers = 16 * n_parameters
    assert memory == numbers + 144 * n_tokens * 2 * 32 + 8 * n_tokens * 64


def test_muon_keeps_one_average_of_the_matrices_of_the_blocks():
    model, with_adamw = expected('adamw', batch_size=4)
    _, with_muon = expected('muon', batch_size=4)
    matrices = sum(p.numel() for name, p in model.named_parameters() if '.h.' in name)
    assert with_adamw - with_muon == 4 * matrices


def test_blocks_that_are_computed_again_keep_their_inputs_and_one_block_its_activations():
    _, kept = expected('adamw', batch_size=4)
    _, recomputed = expected('adamw', batch_size=4, recomputes=True)
    n_numbers = 4 * 32 * 32  # of the stream: tokens times channels
    assert kept - recomputed == n_numbers * (144 * 2 - (4 * 2 + 3 * 144))


def test_a_processor_has_a_name():
    assert Machine('cpu', 'float32').name


# ---- The number format ---------------------------------------------------------------------------
@pytest.mark.parametrize('has_it, trains, expected', [
    (True, True, 'bfloat16'), (True, False, 'float32'), (False, True, 'float32')])
def test_on_a_cpu_auto_is_bfloat16_only_to_train_and_only_where_it_is_fast(
        has_it, trains, expected, monkeypatch):
    monkeypatch.setattr(folio_machine, 'CPU_HAS_BFLOAT16', has_it)
    assert Machine('cpu', 'auto', trains).dtype == expected
    assert Machine('cpu', 'float32', trains).dtype == 'float32'
