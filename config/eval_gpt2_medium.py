# Measures the loss of OpenAI's gpt2-medium, 355 M parameters, on OpenWebText.
#     python prepare/openwebtext/prepare.py --max_tokens=100000000
#     python train.py config/eval_gpt2_medium.py
# Any other data in GPT-2's tokens will do: --dataset=…
# nanoGPT reports 2.84 on its validation split.
# Ours is not measured yet: we had no access to the hub.
init_from = 'gpt2-medium'
eval_only = True
dataset = 'openwebtext'
batch_size = 8
eval_iters = 500
