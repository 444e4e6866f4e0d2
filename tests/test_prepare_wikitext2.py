"""prepare/wikitext2/prepare.py: its splits, and perplexity a word as the benchmark has it."""
import io
import json
import math
import os

import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F

import folio.tokenizer
from conftest import run, shared
from folio.data import Dataset
from hub import Hub
from model import GPT

WIKITEXT2 = 'prepare/wikitext2/prepare.py'
SMALL = ['--dataset=wikitext2', '--device=cpu', '--n_layer=1', '--n_head=2', '--n_embd=32',
         '--block_size=24', '--batch_size=8', '--gradient_accumulation_steps=1', '--max_iters=20']


@pytest.fixture
def folder(tmp_path):
    """A folder as --source takes it: the first lines of the two splits that we have."""
    for name, file, size in (
            ('train', 'valid', 60000), ('valid', 'test', 9000), ('test', 'test', 20000)):
        text = shared(f'wikitext-2/{file}.txt').read_text(encoding='utf-8')
        end = text.index('\n', size) + 1
        (tmp_path / f'{name}.txt').write_text(text[:end], encoding='utf-8')
    return tmp_path


def words_of(text):
    return sum(len(line.split()) + 1 for line in text.splitlines())


def nats_of(model, ids, block_size):
    """Return the sum of -log p of all tokens but the first, window by window."""
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, block_size):
            window = torch.tensor([ids[start:start + block_size + 1]])
            logits, _ = model(window[:, :-1], all_logits=True)
            log_p = F.log_softmax(logits[0].double(), dim=-1)
            nats -= log_p.gather(1, window[0, 1:, None]).sum().item()
    return nats


def test_words_are_counted_as_the_benchmark_counts_them():
    assert words_of(shared('wikitext-2/valid.txt').read_text(encoding='utf-8')) == 217646
    assert words_of(shared('wikitext-2/test.txt').read_text(encoding='utf-8')) == 245569


def test_each_split_is_one_document_in_the_tokens_of_its_own_bpe(folder):
    out, _ = run(WIKITEXT2, '--source=.', '--vocab_size=1000', cwd=folder)
    data = Dataset(str(folder / 'data' / 'wikitext2'))
    tokenizer = folio.tokenizer.load(data.spec)
    assert data.splits() == ['train', 'val', 'test']
    assert tokenizer.n_vocab == 1000
    assert 'test.bin' in out
    for split, file in (('train', 'train'), ('val', 'valid'), ('test', 'test')):
        text = (folder / f'{file}.txt').read_text(encoding='utf-8')
        first, *ids = data.tokens(split).tolist()
        assert first == tokenizer.eot
        assert tokenizer.eot not in ids
        assert tokenizer.decode(ids) == text
        assert data.meta['splits'][split]['words'] == words_of(text)


def test_perplexity_a_word_is_that_of_a_computation_by_hand(folder):
    run(WIKITEXT2, '--source=.', '--vocab_size=500', cwd=folder)
    run('train.py', *SMALL, '--learning_rate=3e-3', '--warmup_iters=0', '--eval_interval=20',
        '--eval_iters=0', cwd=folder)
    out, _ = run('train.py', *SMALL, '--init_from=resume', '--eval_only=True', '--eval_iters=0',
                 cwd=folder)
    model = GPT.from_pretrained(folio.checkpoint.load(str(folder / 'out' / 'ckpt.pt'))).eval()
    data = Dataset(str(folder / 'data' / 'wikitext2'))
    for split, file in (('val', 'valid'), ('test', 'test')):
        text = (folder / f'{file}.txt').read_text(encoding='utf-8')
        ids = data.tokens(split).tolist()
        nats = nats_of(model, ids, block_size=24)
        loss = nats / (len(ids) - 1)
        expected = {
            'loss': pytest.approx(loss, abs=1e-4),
            'perplexity': pytest.approx(math.exp(loss), rel=1e-4),
            'word_perplexity': pytest.approx(math.exp(nats / words_of(text)), rel=1e-4),
            'bits_per_byte': pytest.approx(nats / math.log(2) / len(text.encode()), abs=1e-4),
        }
        # The line is "val: loss 4.1234, perplexity 61.77, …".
        line = next(line for line in out.splitlines() if line.startswith(split + ':'))
        printed = dict(part.rsplit(' ', 1) for part in line.removeprefix(split + ': ').split(', '))
        for name, value in expected.items():
            assert float(printed[name]) == value, name


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['raw', 'v1'])
def test_it_comes_from_the_hub_with_its_blank_lines(tmp_path, variant):
    name = 'wikitext-2-raw-v1' if variant == 'raw' else 'wikitext-2-v1'
    files = {}
    card = f'---\nconfigs:\n- config_name: {name}\n  data_files:\n'
    for split in ('train', 'validation', 'test'):
        lines = ['', f' = {variant} {split} = \n', '', ' Some text , and more <unk> text . \n']
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({'text': lines * 5}), buffer)
        files[f'{name}/{split}-00000-of-00001.parquet'] = buffer.getvalue()
        card += f'  - split: {split}\n    path: {name}/{split}-*\n'
    files['README.md'] = (card + '---\n').encode()
    hub = Hub({'Salesforce/wikitext': files})
    run(WIKITEXT2, f'--variant={variant}', '--tokenizer=gpt2', cwd=tmp_path,
        env=os.environ | hub.environment(tmp_path / 'hub'))
    hub.server.shutdown()
    data = Dataset(str(tmp_path / 'data' / 'wikitext2'))
    text = folio.tokenizer.load('gpt2').decode(data.tokens('test')[1:].tolist())
    assert text == f' \n = {variant} test = \n \n Some text , and more <unk> text . \n' * 5
    meta = json.loads((tmp_path / 'data/wikitext2/meta.json').read_text())
    assert meta['splits']['test']['words'] == words_of(text)


def test_a_split_is_the_one_file_that_has_its_name_as_a_word(tmp_path):
    for name in ('latest', 'test', 'wiki.train', 'valid'):
        (tmp_path / f'{name}.txt').write_text(f'{name} ' * 100)
    args = [WIKITEXT2, '--source=.', '--vocab_size=260']
    _, err = run(*args, cwd=tmp_path)
    assert 'test: ./test.txt' in err
    data = Dataset(str(tmp_path / 'data' / 'wikitext2'))
    ids = data.tokens('test')[1:].tolist()
    assert folio.tokenizer.load(data.spec).decode(ids) == 'test ' * 100

    (tmp_path / 'my-test.txt').write_text('another')
    _, err = run(*args, cwd=tmp_path, status=2)
    assert 'which is the test split: ./my-test.txt or ./test.txt?' in err


@pytest.mark.parametrize('args, says', [
    (['--source=nowhere'], 'no file in nowhere is called train.txt'),
    (['--variant=v2'], 'choose from raw, v1'),
])
def test_mistakes_get_one_line(tmp_path, args, says):
    _, error = run(WIKITEXT2, *args, cwd=tmp_path, status=2)
    assert error.startswith('error: ')
    assert says in error
    assert error.count('\n') == 1


@pytest.mark.slow
def test_a_hub_out_of_reach_gets_one_line(tmp_path):
    nowhere = {'HF_ENDPOINT': 'http://127.0.0.1:9', 'HF_HOME': str(tmp_path / 'hub')}
    _, error = run(WIKITEXT2, cwd=tmp_path, status=2, env=os.environ | nowhere)
    last = error.strip().splitlines()[-1]
    assert last.startswith('error: WikiText-2 could not be downloaded')
    assert '--source=' in last
