# 10 M parameters on 2 M tokens of textbooks, or of your own documents, on a CPU.
#     python prepare/fineweb/prepare.py --source='my/*.parquet' --dataset=textbooks \
#         --tokenizer=bpe --vocab_size=4096
#     python train.py config/train_textbooks.py --compile=True
# With 30 MB of textbooks: loss 3.947 ± 0.002, 1.539 bits a byte (three seeds; one core of an AMD
# EPYC, in bfloat16 and compiled, torch 2.13, 2026-11-30). The baseline is
# config/train_textbooks_gpt2.py.
out_dir = 'out/textbooks'
dataset = 'textbooks'
arch = 'modern'
optimizer = 'muon'
schedule = 'trapezoid'
n_layer, n_head, n_embd = 6, 5, 320
block_size = 256
batch_size = 16
gradient_accumulation_steps = 1
learning_rate = 8e-3
min_lr = 0.0
beta1 = 0.8
weight_decay = 0.1
warmup_iters = 20
max_iters = 500
eval_interval = 100
eval_iters = 0  # the whole validation split
log_interval = 10
