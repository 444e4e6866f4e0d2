# Fine-tunes OpenAI's GPT-2 (124 M) on a book, at a low and constant learning rate.
#     python prepare/book/prepare.py --book=gutenberg:1342 --dataset=pride_gpt2 --tokenizer=gpt2
#     python train.py config/finetune_gpt2_book.py
#     python sample.py --out_dir=out/gpt2_pride --start="It is a truth"
# Another model: --init_from=gpt2-xl, out/fineweb/best.pt, or a Hugging Face folder of a GPT-2 or a
# NanoChat with GPT-2's tokens.
# The weights (0.5 GB) come from the Hugging Face hub, and the book from Project Gutenberg.
# Time and loss are not measured yet: we had no access to the hub.
out_dir = 'out/gpt2_pride'
dataset = 'pride_gpt2'
init_from = 'gpt2'
block_size = 512
batch_size = 4
gradient_accumulation_steps = 4
dropout = 0.1
learning_rate = 3e-5
decay_lr = False
weight_decay = 0.0
max_iters = 200
eval_interval = 20
eval_iters = 0  # the whole validation split
log_interval = 5
# A book is small: keep the checkpoint from before it was learned by heart.
always_save_checkpoint = False
patience = 3
