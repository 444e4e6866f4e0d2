# Measures the loss of OpenAI's gpt2-large, 774 M parameters, on OpenWebText.
#     python prepare/openwebtext/prepare.py --max_tokens=100000000
#     python train.py config/eval_gpt2_large.py
# Any other data in GPT-2's tokens will do: --dataset=…
# nanoGPT reports 2.67 on its validation split.
# Ours is not measured yet: we had no access to the hub.
init_from = 'gpt2-large'
eval_only = True
dataset = 'openwebtext'
batch_size = 8
eval_iters = 500
