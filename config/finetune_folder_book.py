# Fine-tunes a model in a Hugging Face folder, a GPT-2 or a NanoChat, on a book, in GPT-2's tokens.
#     python prepare/book/prepare.py --book=gutenberg:1342 --dataset=pride_gpt2 --tokenizer=gpt2
#     python train.py config/finetune_gpt2_book.py config/finetune_folder_book.py
# Settings as from OpenAI's weights; any folder with config.json and .safetensors will do: --init_from=folder.
# Not measured yet.
out_dir = 'out/folder_pride'
init_from = 'models/gpt2'  # hf download openai-community/gpt2 --local-dir models/gpt2
