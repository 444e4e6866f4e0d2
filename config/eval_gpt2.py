# Measures the loss of OpenAI's gpt2, 124 M parameters, on OpenWebText.
#     python prepare/openwebtext/prepare.py --max_tokens=100000000
#     python train.py config/eval_gpt2.py
# Another size: --init_from=gpt2-medium, gpt2-large or gpt2-xl. Any other data in GPT-2's tokens
# will do: --dataset=…
# nanoGPT reports 3.12 on its validation split, and 2.84, 2.67 and 2.54 for the other sizes.
# Ours is not measured yet: we had no access to the hub.
init_from = 'gpt2'
eval_only = True
dataset = 'openwebtext'
batch_size = 8
eval_iters = 500
