# FineWeb-Edu with what learns fastest here: modern, Muon, trapezoid; 1.7 B tokens instead of 10 B.
#     python prepare/fineweb/prepare.py
#     torchrun --nproc_per_node=8 train.py config/speedrun_fineweb.py
# The aim is a loss of 3.28. modded-nanogpt reaches it with as many tokens, but on FineWeb; this is
# FineWeb-Edu, another text, so the two losses cannot be compared. For the loss of
# config/train_fineweb.py give it more steps: --max_iters. Not measured yet. The learning rates are
# guesses from smaller runs; docs/log.md says what else was tried, one by one.
# Meant for GPUs of 80 GB. On smaller ones: --batch_size=32 --gradient_accumulation_steps=16
#     --eval_iters=320, and so on
out_dir = 'out/fineweb_speedrun'
dataset = 'fineweb'
arch = 'modern'
optimizer = 'muon'
schedule = 'trapezoid'
batch_size = 64
gradient_accumulation_steps = 8  # 524,288 tokens a step, on 1, 2, 4 or 8 GPUs
block_size = 1024
learning_rate = 3e-3
muon_learning_rate = 0.02
min_lr = 0.0
beta1 = 0.8
weight_decay = 0.01
warmup_iters = 100
max_iters = 3250  # 1.7 B tokens
cooldown = 0.6
eval_interval = 250
eval_iters = 160  # the first 10.5 M tokens of val.bin, those of the published runs
hellaswag_interval = 250
sample_interval = 250
log_interval = 10
