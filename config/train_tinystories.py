# 10 M parameters on TinyStories (Eldan and Li 2023): a small model that tells whole stories.
#     python prepare/fineweb/prepare.py --dataset=tinystories --tokenizer=bpe --vocab_size=4096 \
#         --source='hf://datasets/roneneldan/TinyStories/data/train-*.parquet' --val_tokens=2000000
#     python train.py config/train_tinystories.py
#     python sample.py --out_dir=out/tinystories --start="Once upon a time"
# Downloads 1 GB. Sees 0.33 B tokens, by our estimate less than an epoch. Meant for one GPU.
# On a CPU, for a first look: --batch_size=8 --max_iters=500 --warmup_iters=20 --eval_iters=50
# Not measured here. The learning rates come from runs on textbooks.
out_dir = 'out/tinystories'
dataset = 'tinystories'
arch = 'modern'
optimizer = 'muon'
schedule = 'trapezoid'
n_layer, n_head, n_embd = 6, 5, 320
block_size = 512
batch_size = 128
gradient_accumulation_steps = 1  # 65,536 tokens a step
learning_rate = 4e-3
min_lr = 0.0
beta1 = 0.8
weight_decay = 0.01
warmup_iters = 100
max_iters = 5000
eval_interval = 500
eval_iters = 0  # the whole validation split
sample_interval = 500
log_interval = 10
