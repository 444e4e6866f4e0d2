# The size of GPT-2 small, 124 M parameters. Stack it on another config:
#     python train.py config/train_fineweb.py config/gpt2_small.py --out_dir=out/fineweb_small
n_layer, n_head, n_embd = 12, 12, 768
