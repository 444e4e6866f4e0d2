# FineWeb-Edu with what learns fastest here: modern, Muon, trapezoid; 1.7 B tokens instead of 10 B.
#     python prepare/fineweb/prepare.py
#     torchrun --nproc_per_node=8 train.py config/speedrun_fineweb.py
# The aim is a loss of 3.28. modded-nanogpt reaches it with as many tokens of FineWeb, a
# different text from FineWeb-Edu, so the two losses cannot be compared. To reach the loss of
# config/train_fineweb.py, give more steps: --max_iters. Not measured yet. Muon's rate and decay,
# the cooldown and heads of 128 come from modded-nanogpt's simple track (3.2787 in 3,250 steps, the
# mean of ten runs). There the embedding and the head have rates of their own; here both have
# learning_rate, a guess from smaller runs.
# Meant for GPUs of 80 GB. On smaller ones: --batch_size=32 --gradient_accumulation_steps=16
#     --eval_iters=320, and so on
out_dir = 'out/fineweb_speedrun'
dataset = 'fineweb'
arch = 'modern'
n_head = 6
optimizer = 'muon'
schedule = 'trapezoid'
batch_size = 64
gradient_accumulation_steps = 8  # 524,288 tokens a step, on 1, 2, 4 or 8 GPUs
block_size = 1024
learning_rate = 3e-3
muon_learning_rate = 0.025
min_lr = 0.0
beta1 = 0.8
weight_decay = 0.05
warmup_iters = 100
max_iters = 3250  # 1.7 B tokens
cooldown = 0.7
eval_interval = 250
eval_iters = 160  # the first 10.5 M tokens of val.bin, as in the published runs
hellaswag_interval = 1000
sample_interval = 250
log_interval = 10
