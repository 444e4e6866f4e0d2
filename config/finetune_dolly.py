# Instruction tuning: teaches GPT-2 (124 M) to answer, with databricks-dolly-15k. Meant for one GPU.
#     python prepare/dolly/prepare.py
#     python train.py config/finetune_dolly.py
#     python sample.py --out_dir=out/gpt2_dolly --chat=True
# Only the answers count in the loss. Sees 5.9 M tokens, by our estimate two epochs.
# On a smaller GPU: --batch_size=4 --gradient_accumulation_steps=8
# Memory, time and loss are not measured yet: we had no access to the hub.
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
min_lr = 3e-6
weight_decay = 0.0
eval_interval = 30
eval_iters = 0  # the whole validation split
log_interval = 10
always_save_checkpoint = False  # the best on validation
