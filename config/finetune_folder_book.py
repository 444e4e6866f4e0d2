# Fine-tunes the model in a Hugging Face folder, a GPT-2 or a NanoChat, on a book.
#     python prepare/book/prepare.py --book=gutenberg:1342 --dataset=pride_gpt2 --tokenizer=gpt2
#     python train.py config/finetune_gpt2_book.py config/finetune_folder_book.py
# The folder needs config.json and .safetensors, and GPT-2's tokens. Another one: --init_from=folder
# All other settings are those of finetune_gpt2_book.py. Not measured yet.
out_dir = 'out/folder_pride'
init_from = 'models/gpt2'  # hf download openai-community/gpt2 --local-dir models/gpt2
