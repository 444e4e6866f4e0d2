# GPT-2 124 M on 10 B tokens of FineWeb-Edu, as the published reproductions train it.
#     python prepare/fineweb/prepare.py
#     torchrun --nproc_per_node=8 train.py config/train_fineweb.py
# Published: validation loss 3.1078, HellaSwag 0.2970, 940,000 tokens/s on 8 A100. Ours: not
# measured yet.
# Meant for GPUs of 80 GB. On smaller ones: --batch_size=32 --gradient_accumulation_steps=16
#     --eval_iters=320, and so on
out_dir = 'out/fineweb'
dataset = 'fineweb'
batch_size = 64
gradient_accumulation_steps = 8  # 524,288 tokens a step, on 1, 2, 4 or 8 GPUs
block_size = 1024
bias = True
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 715
max_iters = 19073
weight_decay = 0.1
eval_interval = 250
eval_iters = 160  # the first 10.5 M tokens of val.bin, as in the published runs
hellaswag_interval = 1000
sample_interval = 250
log_interval = 10
