# The size of GPT-2 xl, 1558 M parameters. Stack it on another config:
#     python train.py config/train_fineweb.py config/gpt2_xl.py --out_dir=out/fineweb_xl
n_layer, n_head, n_embd = 48, 25, 1600
