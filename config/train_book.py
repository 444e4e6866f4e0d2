# A book, one character a token: 0.8 M parameters on a CPU, nanoGPT's 6 layers of 384 on a GPU.
#     python prepare/book/prepare.py && python train.py config/train_book.py
# CPU: loss 1.299 in 67 to 80 s (the default book, in bfloat16; two cores of an AMD EPYC, torch
# 2.13, 2026-11-30). A CPU without AVX512-BF16 trains in float32: that EPYC does so to 1.294 in 85
# to 95 s.
# GPU: not measured yet.
import folio.machine

out_dir = 'out/book'
dataset = 'book'
arch = 'modern'
optimizer = 'muon'
schedule = 'trapezoid'
eval_iters = 0  # the whole validation split
gradient_accumulation_steps = 1
min_lr = 0.0
block_size = 256
weight_decay = 0.01
beta1 = 0.8

if device == 'cpu':
    n_layer, n_head, n_embd = 4, 4, 128
    batch_size = 8
    learning_rate = 8e-3
    max_iters = 560
    warmup_iters = 20
    eval_interval, log_interval = 140, 20
    # In bfloat16 a CPU computes short contexts faster with attention written out.
    flash = not folio.machine.CPU_HAS_BFLOAT16
else:
    n_layer, n_head, n_embd = 6, 6, 384
    dropout = 0.2
    batch_size = 64
    learning_rate = 2e-3
    max_iters = 1500
    warmup_iters = 50
    eval_interval, log_interval = 250, 50
