# Fine-tunes a model of yours on a book, in GPT-2's tokens.
#     python prepare/book/prepare.py --book=gutenberg:1342 --dataset=pride_gpt2 --tokenizer=gpt2
#     python train.py config/finetune_gpt2_book.py config/finetune_checkpoint_book.py
# Here it is the model that config/train_fineweb.py trains. Another one: --init_from=out/…/best.pt
# All other settings are those of finetune_gpt2_book.py. Not measured yet.
out_dir = 'out/fineweb_pride'
init_from = 'out/fineweb/best.pt'
