"""
The machine a script runs on: device, number format, and the other processes that torchrun started.
    python -c "from folio.machine import *; print(Machine(default_device(), 'auto'))"
"""
import atexit
import contextlib
import os
import platform
import re
import signal
import time
import warnings

import torch
import torch.distributed as dist

from folio.configurator import UserError

PEAK_TFLOPS = {'B200': 2250, 'H200': 989, 'H100': 989, 'A100': 312, 'RTX 4090': 165, 'L4': 121}  # dense bfloat16


def default_device():
    return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'


class Machine:
    def __init__(self, device, dtype):
        """device: cpu, cuda, cuda:1, mps …; dtype: float32, bfloat16, float16 or auto. UserError for others.

        Attributes: device, type (cuda …), name, dtype (decided), autocast (a context), peak_flops (a second, in dtype,
        by the data sheet; None if unknown), rank, world_size. Under torchrun each process gets a GPU of its own.
        """
        self.rank, self.world_size = int(os.environ.get('RANK', '0')), int(os.environ.get('WORLD_SIZE', '1'))
        if dtype not in ('auto', 'float32', 'bfloat16', 'float16'):
            raise UserError(f'dtype is {dtype!r}; choose from auto, float32, bfloat16, float16')
        try:
            self.type = torch.device(device).type
            if self.world_size > 1 and self.type == 'cuda':
                device = f'cuda:{os.environ["LOCAL_RANK"]}'
            if self.type == 'cuda' and ':' in device:
                torch.cuda.set_device(device)  # for what asks about the current GPU
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError) as e:  # torch raises either for a device that is not there
            raise UserError(f'device {device}: {str(e).partition(chr(10))[0]}; try --device=cpu') from None
        self.device = device
        if dtype == 'auto':
            fast = 'bfloat16' if self.type == 'cuda' and torch.cuda.is_bf16_supported(False) else 'float16'
            dtype = fast if self.type == 'cuda' else 'float32'
        self.dtype = dtype
        half = dtype != 'float32'
        self.autocast = torch.autocast(self.type, getattr(torch, dtype)) if half else contextlib.nullcontext()
        cpu = platform.processor() or platform.machine()
        self.name = torch.cuda.get_device_name(device) if self.type == 'cuda' else cpu
        known = [1e12 * tflops for name, tflops in PEAK_TFLOPS.items() if half and re.search(rf'\b{name}\b', self.name)]
        self.peak_flops = known[0] if known else None
        torch.set_float32_matmul_precision('high')  # TF32 where there are tensor cores

    def join(self, backend):
        """Meet the other processes: NCCL (or `backend`) between GPUs, gloo between CPUs."""
        if self.world_size > 1:
            store, rank, world_size = next(dist.rendezvous('env://'))
            if os.environ.get('GROUP_WORLD_SIZE') == '1':  # torchrun's restarts share a store, with old addresses in it
                store = dist.PrefixStore(os.environ['TORCHELASTIC_RESTART_COUNT'], store)
            dist.init_process_group(backend if self.type == 'cuda' else 'gloo', store=store, rank=rank,
                                    world_size=world_size)
            atexit.register(dist.destroy_process_group)

    def sum(self, *numbers):
        """Each number summed over all processes."""
        if self.world_size == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def catch_signals(self):
        """From now on Ctrl-C and SIGTERM only ask to stop; one that comes 2 seconds later ends the process at once."""
        self.signals = []  # (number, time)

        def on_signal(number, frame):
            if self.signals and time.monotonic() > self.signals[0][1] + 2:  # torchrun and Slurm pass the first on twice
                os._exit(128 + number)
            self.signals.append((number, time.monotonic()))
        signal.signal(signal.SIGINT, on_signal)
        signal.signal(signal.SIGTERM, on_signal)

    def wait(self):
        """Until the device has done what it was given."""
        if self.type != 'cpu':
            getattr(torch, self.type).synchronize()

    def asked_to_stop(self):
        """Whether a signal came to any process: some may not have got it."""
        return self.sum(len(self.signals))[0] > 0

    def can_compile(self):
        """Whether torch.compile works here; says why if not."""
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(2, device=self.device))
            return True
        except Exception as e:  # whatever keeps the compiler from working here, training works without it
            self.say(f'compile is off: {type(e).__name__}: {str(e).strip().partition(chr(10))[0]}')
            return False

    def shard(self, model):
        """Share out a model's parameters, a block at a time, over all processes (Zhao et al. 2023, PyTorch FSDP)."""
        from torch.distributed.fsdp import fully_shard
        warnings.filterwarnings('ignore', 'FSDP2-wrapped module')  # not to change logits in place, which we never do
        mesh = dist.device_mesh.init_device_mesh(self.type, (self.world_size,))
        for module in (*model.transformer.h, model):
            fully_shard(module, mesh=mesh)
        dist.barrier()  # before the first process puts a run aside, all have seen it

    @contextlib.contextmanager
    def unsharded(self, model):
        """Hold a sharded model's parameters outside its blocks, for model.forward skips the hook that gathers them."""
        if hasattr(model, 'unshard'):
            model.unshard()
        try:
            yield
        finally:
            if hasattr(model, 'reshard'):
                model.reshard()

    def whole(self, state):
        """Nested dictionaries and lists with each sharded tensor whole on the first process, None on the others."""
        if isinstance(state, dict):
            return {k: self.whole(v) for k, v in state.items()}
        if isinstance(state, list):
            return [self.whole(v) for v in state]
        if not hasattr(state, 'full_tensor'):
            return state
        tensor = state.full_tensor()  # all processes must take part
        return tensor.cpu() if self.rank == 0 else None

    def say(self, *words):
        """Print, on the first process only."""
        if self.rank == 0:
            print(*words, flush=True)

    def __str__(self):
        processes = f'{self.world_size} process' + 'es' * (self.world_size > 1)
        return f'{processes} on {self.device} ({self.name}), dtype {self.dtype}, torch {torch.__version__}'
