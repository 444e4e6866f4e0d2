# The baseline of config/train_textbooks.py: gpt2 and AdamW, with as many parameters and tokens.
#     python train.py config/train_textbooks_gpt2.py --compile=True
# With 30 MB of textbooks: loss 5.278, 2.059 bits a byte (two cores of an AMD EPYC, in bfloat16 and
# compiled, torch 2.13, 2026-11-30).
out_dir = 'out/textbooks_gpt2'
dataset = 'textbooks'
arch = 'gpt2'
bias = True
n_layer, n_head, n_embd = 7, 5, 320  # 10.0 M, as there, where the head is untied
block_size = 256
batch_size = 16
gradient_accumulation_steps = 1
learning_rate = 1e-3
min_lr = 0.0
weight_decay = 0.1
warmup_iters = 50
max_iters = 500
eval_interval = 100
eval_iters = 0  # the whole validation split
log_interval = 10
