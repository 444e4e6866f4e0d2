# 23 M parameters on WikiText-2, in the 32,000 tokens of its own BPE. For a GPU of 8 GB.
#     python prepare/wikitext2/prepare.py && python train.py config/train_wikitext2.py
#     python train.py config/train_wikitext2.py --init_from=out/wikitext2/best.pt --eval_only=True
# The second line prints loss, perplexity per token and word, and bits per byte of every split.
# Not measured yet on the whole set; docs/benchmarks.md has the figures of a stand-in.
out_dir = 'out/wikitext2'
dataset = 'wikitext2'
block_size = 128
n_layer, n_head, n_embd = 6, 8, 384
bias = True
dropout = 0.3
batch_size = 32
gradient_accumulation_steps = 4  # 16,384 tokens a step
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 200
max_iters = 4000
weight_decay = 0.1
eval_interval = 250
eval_iters = 0  # the whole validation split
log_interval = 50
patience = 4
