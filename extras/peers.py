"""
Measure training and decoding with folio and with transformers: the same model, in turn.
    python extras/peers.py
    python extras/peers.py config/gpt2_medium.py --dtype=float32 --decode_batch=8

Prints tokens a second of both, and their ratio: above 1, folio is faster. Both compute in one
number format, in training and in decoding. Weights and tokens are random, and the same for both.
GPT-2 124 M unless a config file or settings say otherwise.

Needs model.py, folio/, and transformers to compare with.
"""
import functools
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.abspath(__file__ + '/../..'))  # the root of the checkout
import torch
import torch.nn.functional as F

from folio import engine
from folio.configurator import (UserError, configure, model_settings, require_at_least,
                                user_errors)
from folio.hugging_face import to_hugging_face
from folio.machine import COMPILE_OPTIONS, Machine, default_device
from model import GPT, GPTConfig

# ---- Settings ------------------------------------------------------------------------------------
batch_size = 4  # training: sequences in a step
train_tokens = 256  # training: tokens in each sequence
compile = True  # training: compile both
decode_batch = 1  # decoding: prompts that are continued at once
new_tokens = 32  # decoding: tokens to write
rounds = 5  # training steps, and decodings, to take the median of
device = default_device()  # cpu, cuda, cuda:1, mps …
dtype = 'auto'  # float32, bfloat16, float16; auto: bfloat16 where that is fast
config = configure(globals(), strict=False)
machine = Machine(device, dtype)
PROMPT_TOKENS = 16

# ---- The same work -------------------------------------------------------------------------------
def in_transformers(model):
    """Return the same model, with the same weights, in transformers."""
    import transformers
    hf, tensors = to_hugging_face(model.config, model.state_dict(), None)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**hf))
    # GPT-2's tensors have OpenAI's names, as in the model without its tied head.
    body = theirs.transformer if model.config.arch == 'gpt2' else theirs
    body.load_state_dict(tensors)
    return theirs.to(model.lm_head.weight.device).eval()


def time_in_turn(times, *functions):
    """Return the median seconds of each function.

    They are called in turn, so that whatever slows the machine down slows all of them.
    """
    taken = [[] for _ in functions]
    for _ in range(times):
        for function, results in zip(functions, taken):
            machine.synchronize()
            start = time.perf_counter()
            function()
            machine.synchronize()
            results.append(time.perf_counter() - start)
    return [statistics.median(results) for results in taken]


def show(name, ours, theirs):
    """Print a line of the table; ours, theirs: tokens a second."""
    print(f'{name:<24}{ours:>10,.4g}{theirs:>15,.4g}{ours / theirs:>8.2f}', flush=True)


# ---- Training ------------------------------------------------------------------------------------
def compare_training(model_config):
    """Show the speed of a training step with AdamW, its loss included."""
    ours = GPT(model_config).to(machine.device)
    theirs = in_transformers(ours)
    idx_BT = torch.randint(model_config.vocab_size, (batch_size, train_tokens),
                           device=machine.device)
    targets_BT = F.pad(idx_BT[:, 1:], (0, 1), value=-1)

    def our_loss():
        return ours(idx_BT, targets_BT)[1]

    def their_loss():
        return theirs(idx_BT, labels=idx_BT, use_cache=False).loss

    # Equal losses show that both are given the same work.
    with torch.no_grad(), machine.autocast:
        difference = abs(our_loss().item() - their_loss().item())
    tolerance = 1e-4 if machine.dtype == 'float32' else 0.02
    assert difference < tolerance, f'not the same work: the losses differ by {difference}'
    if compile:
        ours.compile(options=COMPILE_OPTIONS)  # as train.py does
        theirs.compile()

    def make_step(model, loss_of_model):
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def step():
            with machine.autocast:
                loss = loss_of_model()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return step

    our_step = make_step(ours, our_loss)
    their_step = make_step(theirs, their_loss)
    # The first steps compile, and make the optimizers' state.
    time_in_turn(2, our_step, their_step)
    seconds = time_in_turn(rounds, our_step, their_step)
    n_tokens = batch_size * train_tokens
    show(f'training {batch_size} x {train_tokens}', n_tokens / seconds[0], n_tokens / seconds[1])


# ---- Decoding ------------------------------------------------------------------------------------
@torch.no_grad()
def compare_decoding(model_config):
    """Show the speed of greedy decoding with a cache, the prompt not counted."""
    ours = GPT(model_config).to(machine.device)
    theirs = in_transformers(ours).to(machine.torch_dtype)
    ours = ours.to(machine.torch_dtype)
    idx_BT = torch.randint(model_config.vocab_size, (decode_batch, PROMPT_TOKENS),
                           device=machine.device)

    def write_ours(n_tokens):
        return list(engine.generate(ours, idx_BT, n_tokens, strategy='greedy'))

    def write_theirs(n_tokens):
        # Exactly as many tokens as ours: at least and at most n_tokens.
        return theirs.generate(
            idx_BT, attention_mask=torch.ones_like(idx_BT), max_new_tokens=n_tokens,
            min_new_tokens=n_tokens, do_sample=False, use_cache=True, pad_token_id=0)

    # Each writes 1 token and 1 + n: the difference is n tokens without the prompt.
    calls = []
    for write in (write_ours, write_theirs):
        calls.append(functools.partial(write, 1))
        calls.append(functools.partial(write, 1 + new_tokens))
    times = time_in_turn(rounds, *calls)
    n_tokens = decode_batch * new_tokens
    show(f'decoding {decode_batch} x {new_tokens}',
         n_tokens / (times[1] - times[0]), n_tokens / (times[3] - times[2]))


# ---- The script ----------------------------------------------------------------------------------
def main():
    require_at_least(1, config, 'batch_size', 'train_tokens', 'new_tokens', 'decode_batch',
                     'rounds')
    try:
        import transformers
    except ImportError:
        raise UserError('the peer is a package: pip install transformers') from None
    transformers.logging.set_verbosity_error()
    fields = model_settings(config, GPTConfig) | {'dropout': 0.0}  # dropout differs by its noise
    with user_errors():
        model_config = GPTConfig(**fields, vocab_size=50257)
    longest = max(train_tokens, PROMPT_TOKENS + new_tokens + 1)
    if longest > model_config.block_size:
        raise UserError(f'block_size is {model_config.block_size}: give at least {longest}')
    print(f'{machine}, compile {compile}, transformers {transformers.__version__}')
    print(f'{"tokens a second":<24}{"folio":>10}{"transformers":>15}{"ratio":>8}')
    compare_training(model_config)
    compare_decoding(model_config)


if __name__ == '__main__':
    main()
