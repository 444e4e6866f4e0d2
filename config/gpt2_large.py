# The size of GPT-2 large, 774 M parameters. Stack it on another config:
#     python train.py config/train_fineweb.py config/gpt2_large.py --out_dir=out/fineweb_large
n_layer, n_head, n_embd = 36, 20, 1280
