"""
Know the machine a script runs on: device, number format, and torchrun's other processes.
    python -c "from folio.machine import *; print(Machine(default_device(), 'auto'))"
"""
import atexit
import contextlib
import functools
import os
import platform
import warnings

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from folio.configurator import UserError

DTYPES = ('float32', 'bfloat16', 'float16')
# Dense products of 16 bits with sums in float32, in TFLOP/s, by the makers' data sheets. The names
# are torch.cuda.get_device_name's, whole: one chip comes in boards of different speed, and a slice
# of one (MIG) has a name of its own, which is not here.
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
    'Tesla V100-SXM2-32GB': 125,  # float16 here and below: they have no bfloat16
    'Tesla V100-SXM2-16GB': 125,
    'Tesla V100-PCIE-32GB': 112,
    'Tesla V100-PCIE-16GB': 112,
    'Tesla T4': 65,
}


# What training keeps for the backward pass, in bytes per token, layer and channel. Fitted to nine
# runs on a CPU (2026-11-25), of which it predicts the whole memory to 12 %; on a GPU not measured.
BYTES_KEPT = {('gpt2', 'float32'): 84, ('gpt2', '16 bits'): 60,
              ('modern', 'float32'): 144, ('modern', '16 bits'): 96}


def recompute_blocks(model):
    """Let a model keep only the inputs of its blocks, in place, and return it.

    What is inside a block is computed again in the backward pass (Chen et al. 2016): the same
    numbers, in a third more time and much less memory.
    """
    for block in model.transformer.h:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return model


def default_device():
    if torch.cuda.is_available():
        return 'cuda'
    if torch.backends.mps.is_available():
        return 'mps'
    return 'cpu'


class Machine:
    """Device and processes of a script, as the settings and torchrun say.

    device, type     such as cuda:1 and cuda; under torchrun each process gets a GPU of its own
    name             of the processor
    dtype            float32, bfloat16 or float16, as decided
    autocast         a context in which matrix products are made in dtype
    peak_flops       a second, in dtype, by the data sheet; None where it is unknown
    rank, world_size of this process, and how many there are
    """

    def __init__(self, device, dtype):
        """device: cpu, cuda, cuda:1, mps …; dtype: one of DTYPES, or auto. Raises UserError."""
        self.rank = int(os.environ.get('RANK', '0'))
        self.world_size = int(os.environ.get('WORLD_SIZE', '1'))
        if dtype not in ('auto', *DTYPES):
            raise UserError(f'dtype is {dtype!r}; choose from auto, {", ".join(DTYPES)}')
        try:
            self.type = torch.device(device).type
            if self.world_size > 1 and self.type == 'cuda':
                device = f'cuda:{os.environ["LOCAL_RANK"]}'
            if self.type == 'cuda' and ':' in device:
                torch.cuda.set_device(device)  # for what asks about the current GPU
            torch.zeros(1, device=device).item()  # there are devices that hold no numbers
        except (RuntimeError, AssertionError) as e:  # either, for a device that is not there
            reason = str(e).partition('\n')[0]
            raise UserError(f'device {device}: {reason}; try --device=cpu') from None
        self.device = device
        self.dtype = self.default_dtype() if dtype == 'auto' else dtype
        self.autocast = contextlib.nullcontext()
        if self.dtype != 'float32':
            self.autocast = torch.autocast(self.type, getattr(torch, self.dtype))
        self.name = platform.processor() or platform.machine()
        if self.type == 'cuda':
            self.name = torch.cuda.get_device_name(device)
        self.peak_flops = None
        if self.dtype != 'float32' and self.name in PEAK_TFLOPS:
            self.peak_flops = 1e12 * PEAK_TFLOPS[self.name]
        torch.set_float32_matmul_precision('high')  # TF32 where there are tensor cores

    def default_dtype(self):
        """Return bfloat16 on GPUs that have it, float16 on others, float32 elsewhere."""
        if self.type != 'cuda':
            return 'float32'
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return 'bfloat16'
        return 'float16'

    def launch(self):
        """Return what tells one start of torchrun from another, restarts included; '' without it.

        It has a folder with a random name for each start: …/none_x1y2z3/attempt_0/0/error.json
        """
        return os.environ.get('TORCHELASTIC_ERROR_FILE', '').partition('/attempt_')[0]

    def __str__(self):
        processes = '1 process' if self.world_size == 1 else f'{self.world_size} processes'
        return (f'{processes} on {self.device} ({self.name}), dtype {self.dtype}, '
                f'torch {torch.__version__}')

    def print0(self, *words):
        """Print, on the first process only."""
        if self.rank == 0:
            print(*words, flush=True)

    def synchronize(self):
        """Wait until the device has done what it was given."""
        if self.type != 'cpu':
            getattr(torch, self.type).synchronize()

    def make_deterministic(self):
        """Choose kernels on a GPU that give the same bits each time; warn where there is none."""
        if self.type == 'cuda':
            os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS asks for it
            torch.use_deterministic_algorithms(True, warn_only=True)
            # With warn_only, attention by cuDNN is not ruled out, and it adds in no fixed order.
            torch.backends.cuda.enable_cudnn_sdp(False)

    def for_inference(self, model):
        """Move a model that is only read to the device, and return it: the same numbers, sooner.

        Autocast casts the weights of linear layers to dtype: a compiled model reads all of them in
        float32 for each token, an eager one holds both. Here they are cast once. Embeddings and
        norms stay float32, as under autocast, so that a tied head gets a matrix of its own.
        """
        for layer in model.modules():
            if self.dtype != 'float32' and isinstance(layer, torch.nn.Linear):
                for name, p in list(layer.named_parameters(recurse=False)):
                    p = torch.nn.Parameter(p.to(getattr(torch, self.dtype)), requires_grad=False)
                    setattr(layer, name, p)
        return model.to(self.device).eval()

    def can_compile(self):
        """Return whether torch.compile works here, and say why if not."""
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(2, device=self.device))
            return True
        except Exception as e:  # whatever keeps the compiler from working, training works without
            reason = str(e).strip().partition('\n')[0]
            self.print0(f'compile is off: {type(e).__name__}: {reason}')
            return False

    def expected_memory(self, model, optimizers, batch_size, recomputes=False):
        """Return about how many bytes training takes in one process, beside torch itself.

        Parameters, gradients and the optimizers' averages take 4 bytes a number, what the backward
        pass needs of the forward one as BYTES_KEPT says. recomputes: after recompute_blocks.
        """
        config = model.config
        n_parameters = sum(p.numel() for p in model.parameters())
        n_numbers = 2 * n_parameters  # with a gradient for each
        for optimizer in optimizers:
            n_averages = 2 if isinstance(optimizer, torch.optim.AdamW) else 1
            for group in optimizer.param_groups:
                n_numbers += n_averages * sum(p.numel() for p in group['params'])
        if hasattr(model, 'unshard'):
            n_numbers /= self.world_size
        n_tokens = batch_size * config.block_size
        precision = 'float32' if self.dtype == 'float32' else '16 bits'
        bytes_kept = BYTES_KEPT[config.arch, precision] * config.n_layer
        if recomputes:
            # Of each block its input, of one at a time all, with gradients. Fitted to three runs of
            # 25 M parameters on a CPU (2026-11-25), of which it predicts the whole to 16 %.
            bytes_kept = 4 * config.n_layer + 3 * BYTES_KEPT[config.arch, precision]
        activations = bytes_kept * n_tokens * config.n_embd
        # The loss is computed for some of the logits at a time, see fast.py.
        logits = 8 * min(n_tokens * config.vocab_size, 2**25)
        return int(4 * n_numbers + activations + logits)

    def fitting_batch_size(self, model, optimizers, batch_size):
        """Return batch_size, halved until a step of so many sequences fits in every process.

        Raises UserError where it cannot be halved further: the step would become another.
        """
        while self.any(not self.fits(model, optimizers, batch_size)):
            if batch_size % 2 != 0:
                raise UserError(f'not even batch_size {batch_size} fits in the memory, and it '
                                'cannot be halved; give a smaller one and more '
                                'gradient_accumulation_steps')
            batch_size //= 2
            torch.compiler.reset()  # else the model is compiled for batches of any size, and slower
        if self.world_size > 1:
            torch.compiler.reset()  # DDP will have it compiled in pieces, to send while it computes
        return batch_size

    def fits(self, model, optimizers, batch_size):
        """Return whether this process has the memory for a step; a CPU has it always."""
        idx_BT = torch.zeros(batch_size, model.config.block_size, dtype=torch.long,
                             device=self.device)
        # What is not there before the first step, for each parameter: the averages that optimizers
        # keep, two at most, and with several processes what their gradients are sent from.
        n_to_come = 0
        if not any(optimizer.state for optimizer in optimizers):
            n_to_come = 2
        if self.world_size > 1:
            n_to_come += 1
        try:
            held = [torch.empty_like(p) for p in model.parameters() for _ in range(n_to_come)]
            for _ in range(2):  # the second time beside the gradients of the first
                with self.autocast:
                    _, loss = model(idx_BT, idx_BT)
                loss.backward()
            del held
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            model.zero_grad(set_to_none=True)

    # ---- Several processes -----------------------------------------------------------------------
    def init_processes(self, backend):
        """Meet the other processes: by `backend` (nccl) between GPUs, by gloo between CPUs."""
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
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        atexit.register(dist.destroy_process_group)

    def barrier(self):
        """Wait until all processes are here."""
        if self.world_size > 1:
            dist.barrier()

    def any(self, flag):
        """Return whether a flag is set in any process.

        The tensor is on the CPU, where gloo sums it: a GPU's queue of work is not waited for.
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

    def shard(self, model):
        """Divide a model's parameters among the processes, block by block (Zhao et al. 2023).

        In bfloat16 a block's parameters are cast before they are gathered, which halves what is
        sent; gradients are summed in float32. Embeddings and head, which autocast reads in float32,
        are gathered so.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        # It warns not to change logits in place, which nothing here does.
        warnings.filterwarnings('ignore', 'FSDP2-wrapped module')
        mesh = dist.device_mesh.init_device_mesh(self.type, (self.world_size,))
        policy = MixedPrecisionPolicy()
        # A CPU's LayerNorm takes no gains in bfloat16 beside a stream in float32; RMSNorm has none.
        takes_bfloat16 = self.type != 'cpu' or model.config.arch == 'modern'
        if self.dtype == 'bfloat16' and takes_bfloat16:
            # Autocast decides about the block's inputs: the residual stream stays as it is.
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32,
                                          cast_forward_inputs=False)
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
        dist.barrier()  # rank 0 is about to move an old run away, and others may still look at it

    @contextlib.contextmanager
    def unsharded(self, model):
        """Gather what a sharded model holds outside its blocks, for calls of model.forward.

        Only model(…) runs the hook that gathers it.
        """
        is_sharded = hasattr(model, 'unshard')
        if is_sharded:
            model.unshard()
        try:
            yield
        finally:
            if is_sharded:
                model.reshard()

    def gather_full(self, state):
        """Return nested dictionaries and lists with each sharded tensor whole, on rank 0.

        The others get None in its place, but must take part.
        """
        if isinstance(state, dict):
            return {key: self.gather_full(value) for key, value in state.items()}
        if isinstance(state, list):
            return [self.gather_full(value) for value in state]
        if not hasattr(state, 'full_tensor'):
            return state
        tensor = state.full_tensor()
        return tensor.cpu() if self.rank == 0 else None
