# nanoGPT's CPU recipe on the default book, the baseline of config/train_book.py.
#     python prepare/book/prepare.py && python train.py config/train_book_nanogpt.py
# Loss 1.575 in 103 s (two cores of an AMD EPYC, torch 2.13, 2026-11-30).
out_dir = 'out/book_nanogpt'
dataset = 'book'
device = 'cpu'
dtype = 'float32'  # as nanoGPT does on a CPU
compile = False
eval_interval = 250
eval_iters = 0  # the whole validation split
log_interval = 100
arch = 'gpt2'
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 12
gradient_accumulation_steps = 1
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
max_iters = 2000
beta2 = 0.99
