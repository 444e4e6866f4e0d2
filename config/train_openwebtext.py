# GPT-2 124 M on OpenWebText, nanoGPT's long run: 600,000 steps of 0.5 M tokens.
#     python prepare/openwebtext/prepare.py
#     torchrun --nproc_per_node=8 train.py config/train_openwebtext.py
# nanoGPT's published loss is about 2.85, after 4 days on 8 A100 of 40 GB. Ours: not measured yet.
out_dir = 'out/openwebtext'
dataset = 'openwebtext'
batch_size = 12
gradient_accumulation_steps = 40  # 491,520 tokens a step, on 1, 2, 4, 5 or 8 GPUs
block_size = 1024
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 2000
max_iters = 600000
weight_decay = 0.1
eval_interval = 1000
eval_iters = 200
log_interval = 10
