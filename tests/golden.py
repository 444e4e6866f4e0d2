"""
Compute the numbers that a refactoring must not change, or write them down anew.
    python tests/golden.py                       # print them as JSON
    python tests/golden.py tests/golden.json     # write them, where a mend changes one on purpose

Tiny seeded runs of the scripts themselves on a text made here: 20 losses and gradient norms of
each, samples, HellaSwag scores, and the merges of a BPE. tests/test_golden.py compares.
"""
import contextlib
import hashlib
import io
import json
import os
import pathlib
import platform
import random
import runpy
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TINY = ['--dataset=golden', '--device=cpu', '--dtype=float32', '--compile=False', '--n_layer=2',
        '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=4',
        '--gradient_accumulation_steps=1', '--learning_rate=2e-3', '--warmup_iters=2',
        '--lr_decay_iters=20', '--max_iters=20', '--eval_interval=20', '--eval_iters=2',
        '--log_interval=1']
RUNS = {
    'gpt2, AdamW, dropout': ['--bias=True', '--dropout=0.1'],
    'gpt2, AdamW, exact GELU, attention written out': ['--gelu=none', '--flash=False'],
    'gpt2, AdamW, window, masks': ['--dataset=masked', '--window=5'],
    'gpt2, AdamW, float16': ['--dtype=float16'],
    'gpt2, Muon, trapezoid': ['--optimizer=muon', '--schedule=trapezoid', '--cooldown=0.4'],
    'modern, AdamW, bfloat16': ['--arch=modern', '--dtype=bfloat16'],
    'modern, AdamW, window in blocks': ['--arch=modern', '--block_size=256', '--window=16'],
    'modern, Muon, dropout, accumulation': ['--arch=modern', '--optimizer=muon', '--dropout=0.1',
                                            '--gradient_accumulation_steps=3'],
}


def golden_text():
    """Return 20,000 characters that are the same on every machine and under every Python."""
    words = ('time light river stone every little nothing between morning house question answer '
             'green quiet letter number second garden window people water sudden gentle over '
             'under').split()
    rng = random.Random(0)
    text = ''
    while len(text) < 20000:
        sentence = ' '.join(words[int(rng.random() * len(words))] for _ in range(8))
        text += sentence.capitalize() + rng.choice(['. ', '? ', '.\n\n'])
    return text[:20000]


def run_script(script, *args):
    """Run a script in this process as `python script args` would; return what it printed."""
    printed = io.StringIO()
    sys.argv = [script, *args]
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        runpy.run_path(str(ROOT / script), run_name='__main__')
    return printed.getvalue()


def read_jsonl(path):
    with open(path, encoding='utf-8') as f:
        return [json.loads(line) for line in f]


def train(name):
    """Return the losses and norms of one run, and its last validation loss."""
    out_dir = f'out/{list(RUNS).index(name)}'
    run_script('train.py', *TINY, *RUNS[name], f'--out_dir={out_dir}')
    log = read_jsonl(f'{out_dir}/log.jsonl')
    steps = [entry for entry in log if 'loss' in entry]
    return {'loss': [entry['loss'] for entry in steps],
            'grad_norm': [entry['grad_norm'] for entry in steps],
            'val_loss': [entry['val_loss'] for entry in log if 'val_loss' in entry][-1]}


def sample(name, *options):
    out_dir = f'out/{list(RUNS).index(name)}'
    return run_script('sample.py', f'--out_dir={out_dir}', '--device=cpu', '--dtype=float32',
                      '--start=The ', '--max_new_tokens=60', *options)


def hellaswag_scores(name, text):
    """Return four log-probabilities for each of ten items cut from the text."""
    with open('items.jsonl', 'w', encoding='utf-8') as f:
        for i in range(10):
            cut = text[100 * i:100 * i + 24]
            endings = [text[2000 * j + 37 * i:][:6 + 3 * j] for j in range(4)]
            json.dump({'ind': i, 'ctx': cut, 'endings': endings, 'label': i % 4}, f)
            f.write('\n')
    out_dir = f'out/{list(RUNS).index(name)}'
    run_script('hellaswag.py', f'--out_dir={out_dir}', '--source=items.jsonl', '--device=cpu',
               '--dtype=float32', '--scores=scores.jsonl')
    return [entry['scores'] for entry in read_jsonl('scores.jsonl')]


def machine():
    """Describe what decides the last bit of a float: processor, its instructions, torch."""
    import torch
    try:
        info = pathlib.Path('/proc/cpuinfo').read_text()
        lines = [line for line in info.splitlines() if line.startswith(('model name', 'flags'))]
        cpu = hashlib.sha256('\n'.join(sorted(set(lines))).encode()).hexdigest()[:16]
    except OSError:
        cpu = platform.processor()
    return {'cpu': cpu, 'torch': torch.__version__, 'threads': torch.get_num_threads(),
            'bfloat16': bool(torch.cpu._is_avx512_bf16_supported())}


def compute():
    """Return {machine, runs, samples, hellaswag, merges}; works in the current folder."""
    text = golden_text()
    pathlib.Path('golden.txt').write_text(text, encoding='utf-8')
    prepare = ['--book=golden.txt']
    run_script('prepare/book/prepare.py', *prepare, '--dataset=golden')
    run_script('prepare/book/prepare.py', *prepare, '--dataset=masked')
    run_script('prepare/book/prepare.py', *prepare, '--dataset=bpe', '--tokenizer=bpe',
               '--vocab_size=320')
    for split in ('train', 'val'):  # in the masked set two tokens of three are targets
        size = os.path.getsize(f'data/masked/{split}.bin') // 2
        mask = bytes(i % 3 > 0 for i in range(size))
        pathlib.Path(f'data/masked/{split}.mask.bin').write_bytes(mask)
    runs = {name: train(name) for name in RUNS}
    sampled = (list(RUNS)[0], list(RUNS)[-1])
    samples = []
    for name in sampled:
        samples.append(sample(name, '--strategy=greedy'))
        samples.append(sample(name, '--strategy=nucleus', '--num_samples=2'))
    scores = [hellaswag_scores(name, text) for name in sampled]
    tokenizer = json.loads(pathlib.Path('data/bpe/tokenizer.json').read_text(encoding='utf-8'))
    return {'machine': machine(), 'runs': runs, 'samples': samples, 'hellaswag': scores,
            'merges': tokenizer['merges']}


def main():
    target = os.path.abspath(sys.argv[1]) if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        numbers = json.dumps(compute(), indent=1)
        os.chdir(ROOT)
    if target is None:
        print(numbers)
    else:
        pathlib.Path(target).write_text(numbers + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
