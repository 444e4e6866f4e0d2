# Instruction tuning: GPT-2 (124 M) on databricks-dolly-15k, with the loss on the responses alone; one GPU.
#     python prepare/dolly/prepare.py
#     python train.py config/finetune_dolly.py
#     python sample.py --out_dir=out/gpt2_dolly --chat=True
# 5.9 M tokens, estimated to be two epochs. Memory, time and loss: not measured yet (no hub within reach, where weights
# and data come from). On a smaller GPU: --batch_size=4 --gradient_accumulation_steps=8.
out_dir = 'out/gpt2_dolly'
dataset = 'dolly'
init_from = 'gpt2'
block_size = 1024
batch_size = 16
gradient_accumulation_steps = 2  # 32,768 tokens a step
dropout = 0.1
learning_rate = 3e-5
warmup_iters = 20
max_iters = 180
lr_decay_iters = 180
min_lr = 3e-6
weight_decay = 0.0
eval_interval = 30
eval_iters = 0  # the whole validation split
log_interval = 10
always_save_checkpoint = False  # the best on validation
