"""
Describe the machine a script runs on: device, number format, and torchrun's other processes.
    python -c "from folio.machine import *; print(Machine(default_device(), 'auto'))"
"""
import contextlib
import datetime
import os
import platform
import signal
import sys
import time

import torch
import torch.distributed as dist

from folio.configurator import UserError, notice

DTYPES = ('float32', 'bfloat16', 'float16')
# Processors without these instructions emulate bfloat16, slower than float32.
CPU_HAS_BFLOAT16 = torch.cpu._is_avx512_bf16_supported()
WAIT = datetime.timedelta(minutes=10)  # for another process; torch's own limit for gloo is 30
# With torch's own limit of 30 operations the gradient of modern's capped logits would be two
# kernels, which pass float32 logits to each other: 13 GB at 64 x 1,024.
COMPILE_OPTIONS = {'realize_opcount_threshold': 40}
# Peak speed of dense 16-bit matrix products with sums in float32, in TFLOP/s, by the makers' data
# sheets. torch.cuda.get_device_name returns these names, in full: the same chip comes on boards of
# different speed, and a slice of a GPU (MIG) has a name of its own, which is not listed.
PEAK_TFLOPS = {
    'NVIDIA GB200': 2500,
    'NVIDIA B200': 2250,
    'NVIDIA GH200 480GB': 990,
    'NVIDIA GH200 144G HBM3e': 990,
    'NVIDIA H200': 989,
    'NVIDIA H200 NVL': 835,
    'NVIDIA H100 80GB HBM3': 989,  # SXM
    'NVIDIA H100 NVL': 835,
    'NVIDIA H100 PCIe': 756,
    'NVIDIA A100-SXM4-80GB': 312,
    'NVIDIA A100-SXM4-40GB': 312,
    'NVIDIA A100 80GB PCIe': 312,
    'NVIDIA A100-PCIE-40GB': 312,
    'NVIDIA L40S': 362,
    'NVIDIA L40': 181,
    'NVIDIA L4': 121,
    'NVIDIA A10': 125,
    'NVIDIA RTX A6000': 155,
    'NVIDIA GeForce RTX 5090': 209,
    'NVIDIA GeForce RTX 4090': 165,
    'NVIDIA GeForce RTX 3090': 71,
    'Tesla V100-SXM2-32GB': 125,  # in float16, here and below: these GPUs have no bfloat16
    'Tesla V100-SXM2-16GB': 125,
    'Tesla V100-PCIE-32GB': 112,
    'Tesla V100-PCIE-16GB': 112,
    'Tesla T4': 65,
}


def default_device():
    """Return cuda, mps or cpu: the first of them that is there."""
    if torch.cuda.is_available():
        return 'cuda'
    if torch.backends.mps.is_available():
        return 'mps'
    return 'cpu'


def why_no_gpu():
    """Return why torch finds no GPU; '' if it finds one, or was not built for CUDA."""
    if torch.version.cuda is None or torch.cuda.is_available():
        return ''
    try:
        torch.cuda.init()
    except RuntimeError as e:
        return str(e).partition('\n')[0]
    return ''


def catch_signals():
    """Return a list to which SIGINT, SIGTERM and SIGHUP are added as they come.

    The caller can then finish what is under way. A signal over two seconds after the first ends the
    process; an earlier one may be the same signal, which torchrun and Slurm pass on twice.
    """
    signals = []

    def on_signal(number, frame):
        signals.append(number)
        if len(signals) == 1:
            on_signal.first = time.monotonic()
            notice('stopping as soon as the run is saved; a second signal stops at once, '
                   'without saving')
        elif time.monotonic() > on_signal.first + 2:
            notice('stopped; what came after the last checkpoint is lost')
            os._exit(128 + number)

    for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        # nohup makes the process ignore SIGHUP; don't undo that.
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, on_signal)
    return signals


class Machine:
    """The device and the processes of a script, as its settings and torchrun say.

    device, type     cuda:1 and cuda, for example; under torchrun each process gets a GPU of its own
    name             name of the GPU or CPU
    dtype            float32, bfloat16 or float16, as decided; torch_dtype: the same for torch
    autocast         a context in which matrix products are computed in dtype
    peak_flops       FLOP/s in dtype by the GPU's data sheet; None where they are unknown
    rank, world_size number of this process, and how many processes there are
    """

    def __init__(self, device, dtype):
        """Decide device and number format. Raises UserError.

        device: cpu, cuda, cuda:1, mps …; dtype: one of DTYPES, or auto.
        """
        self.rank = 0
        self.world_size = 1
        if dist.is_torchelastic_launched():  # otherwise these variables are a cluster's own
            self.rank = int(os.environ['RANK'])
            self.world_size = int(os.environ['WORLD_SIZE'])
        if dtype not in ('auto', *DTYPES):
            raise UserError(f'dtype is {dtype!r}; choose from auto, {", ".join(DTYPES)}')
        try:
            self.type = torch.device(device).type
            if self.world_size > 1 and self.type == 'cuda':
                device = f'cuda:{os.environ["LOCAL_RANK"]}'
            if self.type == 'cuda' and ':' in device:
                torch.cuda.set_device(device)  # for code that asks for the current GPU
            torch.zeros(1, device=device).item()  # fails on meta, a device without numbers
        except (RuntimeError, AssertionError) as e:  # torch raises either for a missing device
            reason = str(e).partition('\n')[0]
            raise UserError(f'device {device}: {reason}; try --device=cpu') from None
        self.device = device
        self.dtype = self.default_dtype() if dtype == 'auto' else dtype
        self.torch_dtype = getattr(torch, self.dtype)
        self.autocast = contextlib.nullcontext()
        if self.dtype != 'float32':
            self.autocast = torch.autocast(self.type, self.torch_dtype)
        self.name = platform.processor() or platform.machine()
        if self.type == 'cuda':
            self.name = torch.cuda.get_device_name(device)
        self.peak_flops = None
        if self.dtype != 'float32' and self.name in PEAK_TFLOPS:
            self.peak_flops = 1e12 * PEAK_TFLOPS[self.name]
        torch.set_float32_matmul_precision('high')  # TF32 where there are tensor cores

    def default_dtype(self):
        """Return what 'auto' stands for: bfloat16 where the device multiplies it.

        Otherwise float16 on a GPU, and float32 elsewhere.
        """
        if self.type == 'cpu':
            return 'bfloat16' if CPU_HAS_BFLOAT16 else 'float32'
        if self.type != 'cuda':
            return 'float32'
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return 'bfloat16'
        return 'float16'

    def __str__(self):
        processes = '1 process' if self.world_size == 1 else f'{self.world_size} processes'
        name = self.name
        if self.type == 'cpu':
            reason = why_no_gpu()
            if reason:
                name += f'; no GPU: {reason}'
        return (f'{processes} on {self.device} ({name}), dtype {self.dtype}, '
                f'torch {torch.__version__}')

    def print0(self, *words):
        """Print on the first process only; once the output is closed, work continues unheard."""
        if self.rank != 0:
            return
        try:
            print(*words, flush=True)
        except OSError:  # a closed pipe or terminal, a full disk
            sys.stdout = open(os.devnull, 'w')

    def synchronize(self):
        """Wait until the device has finished its queued work."""
        if self.type != 'cpu':
            getattr(torch, self.type).synchronize()

    def can_compile(self):
        """Return whether torch.compile works here; print the reason if it does not."""
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(2, device=self.device))
            return True
        except Exception as e:  # whatever is wrong, training works without the compiler
            reason = str(e).strip().partition('\n')[0]
            self.print0(f'compile is off: {type(e).__name__}: {reason}')
            return False

    # ---- Several processes -----------------------------------------------------------------------
    def init_processes(self, backend):
        """Connect to the other processes: by `backend` between GPUs, by gloo between CPUs.

        A process that waits for another one gives up after WAIT.
        """
        if self.world_size == 1:
            return
        store, rank, world_size = next(dist.rendezvous('env://'))
        if os.environ.get('GROUP_WORLD_SIZE') == '1':
            # After a restart torchrun's store still holds the addresses of the dead workers.
            store = dist.PrefixStore(os.environ['TORCHELASTIC_RESTART_COUNT'], store)
        if self.type == 'cuda':
            backend = f'cpu:gloo,cuda:{backend}'
        else:
            backend = 'gloo'
        # torch wraps our excepthook and holds its text back until it returns. But ours ends the
        # process, so the line that says what is wrong would be lost.
        hook = sys.excepthook
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size,
                                timeout=WAIT)
        sys.excepthook = hook

    def end_processes(self):
        """Disconnect, at the normal end only: NCCL would wait for processes that have failed."""
        if self.world_size > 1:
            dist.destroy_process_group()

    def barrier(self):
        """Wait until all processes have come to this call."""
        if self.world_size > 1:
            dist.barrier()

    def any(self, flag):
        """Return whether a flag is set in any process.

        gloo sums it on the CPU, so this does not wait for a GPU's queued work.
        """
        if self.world_size == 1:
            return flag
        total = torch.tensor(int(flag))
        dist.all_reduce(total)
        return total.item() > 0

    def sum(self, *numbers):
        """Return each number summed over all processes."""
        if self.world_size == 1:
            return numbers
        return self.sum_tensor(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def sum_tensor(self, tensor):
        """Return a tensor summed over all processes."""
        if self.world_size == 1:
            return tensor
        tensor = tensor.to(self.device)
        dist.all_reduce(tensor)
        return tensor.cpu()
