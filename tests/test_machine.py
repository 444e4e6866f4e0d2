"""The machine a script runs on: its name and its number format."""
import pytest
import torch

from folio import machine as folio_machine
from folio.machine import Machine


def test_a_processor_has_a_name():
    assert Machine('cpu', 'float32').name


def test_a_build_for_cuda_without_a_gpu_says_why(monkeypatch):
    def init():
        raise RuntimeError('The NVIDIA driver on your system is too old\nmore')
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    monkeypatch.setattr(torch.cuda, 'init', init)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    shown = str(Machine('cpu', 'float32'))
    assert '; no GPU: The NVIDIA driver on your system is too old), dtype float32' in shown


# ---- The number format ---------------------------------------------------------------------------
@pytest.mark.parametrize('has_it, expected', [(True, 'bfloat16'), (False, 'float32')])
def test_on_a_cpu_auto_is_bfloat16_where_it_is_fast(has_it, expected, monkeypatch):
    monkeypatch.setattr(folio_machine, 'CPU_HAS_BFLOAT16', has_it)
    assert Machine('cpu', 'auto').dtype == expected
    assert Machine('cpu', 'float32').dtype == 'float32'
