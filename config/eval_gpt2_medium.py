# The loss of OpenAI's gpt2-medium, 355 M parameters, on OpenWebText, or other data in GPT-2's tokens (--dataset=…).
#     python prepare/openwebtext/prepare.py --max_tokens=100000000
#     python train.py config/eval_gpt2_medium.py
# nanoGPT reports 2.84 on its validation split. Ours: not measured yet, no hub within reach.
init_from = 'gpt2-medium'
eval_only = True
dataset = 'openwebtext'
batch_size = 8
eval_iters = 500
