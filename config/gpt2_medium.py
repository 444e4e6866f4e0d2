# The size of GPT-2 medium, 355 M parameters. Stack it on another config:
#     python train.py config/train_fineweb.py config/gpt2_medium.py --out_dir=out/fineweb_medium
n_layer, n_head, n_embd = 24, 16, 1024
