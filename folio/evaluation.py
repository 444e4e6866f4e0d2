"""
A model's loss on a split, and what follows from it: what train.py logs and report.py prints.
    python train.py config/train_book.py --init_from=resume --eval_only=True
"""
import math

import torch

from folio.data import eval_batches


@torch.no_grad()
def evaluate(model, data, split, block_size, batch_size, n_windows, machine):
    """{loss, perplexity, bits_per_byte, word_perplexity} over n_windows of a split (0: all), as far as counted.

    data: a Dataset. The loss is in nats a token. With several processes each takes its share, and all get the same.
    """
    training, nats, count = model.training, 0.0, 0
    model.eval()
    for batch in eval_batches(data.tokens(split), data.mask(split), block_size, batch_size, n_windows, machine.rank,
                              machine.world_size):
        idx_BT, targets_BT = (t.to(machine.device) for t in batch)
        with machine.autocast:
            _, loss = model(idx_BT, targets_BT)
        n = (targets_BT != -1).sum().item()
        nats, count = nats + loss.item() * n, count + n
    model.train(training)
    nats, count = machine.sum(nats, count)
    loss = nats / max(1, count)
    figures = {'loss': loss, 'perplexity': math.exp(min(loss, 700))}
    if bytes_per_token := data.per_token(split, 'bytes'):
        figures['bits_per_byte'] = loss / math.log(2) / bytes_per_token
    if words_per_token := data.per_token(split, 'words'):
        figures['word_perplexity'] = math.exp(min(loss / words_per_token, 700))
    return figures
