"""Files from strangers: whatever is in them, reading them ends in one line, and runs nothing.

    python tests/test_hostile.py 300000  # mutate and read this many files, and count what happens

The tests begin with a whole file of each format, mutate it in many ways, and read it as a script
would. It may be accepted or refused by a UserError, but must not raise anything else, hang, fill
the memory, or run a command.
"""
import collections
import contextlib
import copy
import gzip
import io
import json
import math
import os
import pathlib
import pickle
import random
import re
import signal
import sys
import tempfile
import time
import traceback
import zipfile

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import folio.checkpoint
import folio.data
import folio.hugging_face
import folio.tokenizer
import hellaswag
from extras import export, humaneval, report
from extras.textbook import teacher
from folio.configurator import UserError
from folio.configurator import report as report_error
from folio.data import Dataset
from model import GPT, GPTConfig
from prepare import corpus

SECONDS = 10  # after which a file counts as one that hangs

# ---- Whole files of each format ------------------------------------------------------------------
CHARS = {'kind': 'char', 'chars': '\n abcdefg'}
MERGES = [['a', 'b'], ['ab', 'c'], [' ', 'a']]
BPE = {'kind': 'bpe', 'pattern': folio.tokenizer.SPLIT_PATTERN, 'merges': MERGES}
CONFIG = {'dataset': 'book', 'seed': 1, 'dtype': 'float32', 'eval_iters': 2, 'batch_size': 2,
          'block_size': 8, 'max_iters': 9, 'gradient_accumulation_steps': 1}


def small_checkpoint(arch='gpt2'):
    """Return the dictionary of a whole checkpoint of folio."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=2, n_head=2, n_embd=8, arch=arch))
    return {'format': 1, 'model': model.state_dict(), 'model_args': dict(vars(model.config)),
            'tokenizer': CHARS, 'template': 'Q: {}', 'optimizer': [], 'config': CONFIG,
            'iter_num': 3, 'best_val_loss': 2.5, 'train_seconds': 1.5}


def of_nanogpt():
    """Return the dictionary of a whole checkpoint as nanoGPT writes it."""
    checkpoint = small_checkpoint()
    args = checkpoint['model_args'] | {'vocab_size': 64}
    args = {name: args[name] for name in ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias',
                                          'vocab_size', 'dropout')}
    weights = {f'_orig_mod.{name}': weight for name, weight in checkpoint['model'].items()}
    moments = {'exp_avg': torch.zeros(64, 8), 'exp_avg_sq': torch.zeros(64, 8),
               'step': torch.tensor(3.0)}
    return {'model': weights, 'model_args': args, 'iter_num': 3, 'config': {'dataset': 'none'},
            'best_val_loss': torch.tensor(2.5), 'optimizer': {'state': {0: moments}}}


def meta():
    spec_hash = folio.tokenizer.spec_hash(CHARS)
    return {'tokenizer': {'kind': 'char', 'file': 'tokenizer.json', 'hash': spec_hash},
            'vocab_size': 9, 'eot': None, 'dtype': '<u2', 'source': 'here',
            'splits': {'train': {'tokens': 20, 'documents': 1, 'bytes': 20},
                       'val': {'tokens': 20, 'documents': 1, 'bytes': 20}}}


def log():
    step = {'iter': 1, 'loss': 2.5, 'tokens': 32, 'tokens_per_second': 9.5, 'train_seconds': 1.0}
    return [{'config': CONFIG, 'parameters': 999, 'first_iter': 0, 'machine': {'device': 'cpu'}},
            step, step | {'iter': 2},
            {'iter': 2, 'val_loss': 2.25, 'tokens': 32, 'train_seconds': 1.0, 'perplexity': 9.5},
            {'iter': 2, 'hellaswag': 0.25, 'acc_mean_stderr': 0.01}]


def in_lines(rows):
    return ''.join(json.dumps(row) + '\n' for row in rows).encode()


def as_json(value):
    return json.dumps(value).encode()


def as_pt(checkpoint):
    file = io.BytesIO()
    torch.save(checkpoint, file)
    return file.getvalue()


def hugging_face_files(arch):
    """Return {name: bytes} of an exported folder whose weights are in two files and an index."""
    from safetensors.torch import save
    checkpoint = small_checkpoint(arch)
    config = GPTConfig(**checkpoint['model_args'])
    hf, tensors = folio.hugging_face.to_hugging_face(config, checkpoint['model'], None)
    names = sorted(tensors)
    halves = {'a.safetensors': names[::2], 'b.safetensors': names[1::2]}
    index = {name: file for file, half in halves.items() for name in half}
    files = {file: save({name: tensors[name].contiguous() for name in half})
             for file, half in halves.items()}
    return files | {'config.json': as_json(hf), 'folio_tokenizer.json': as_json(CHARS),
                    'model.safetensors.index.json': as_json({'weight_map': index})}


# ---- What reads them -----------------------------------------------------------------------------
def read_checkpoint(folder):
    checkpoint = folio.checkpoint.load(str(folder / 'ckpt.pt'))
    model = GPT.from_pretrained(checkpoint)
    if checkpoint.get('tokenizer'):  # else it is GPT-2's, which may have to be downloaded
        folio.checkpoint.tokenizer_of(checkpoint).decode([0, 1])
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long))


def read_data(folder):
    data = Dataset(str(folder))
    for split in data.splits():
        data.mask(split)
        data.per_token(split, 'bytes')
        folio.data.train_batch(data.tokens(split), None, 8, batch_size=2, seed=0, first=0)
    if data.spec['kind'] != 'gpt2':
        folio.tokenizer.load(data.spec)


def read_tokenizer(folder):
    tokenizer = folio.tokenizer.load(str(folder))
    with contextlib.suppress(UserError):  # it may lack a character
        tokenizer.decode(tokenizer.encode('a bad cab\n'))
    tokenizer.decode_bytes(range(tokenizer.n_vocab))


def read_hugging_face(folder):
    checkpoint = folio.checkpoint.load(str(folder))
    GPT.from_pretrained(checkpoint)
    folio.checkpoint.tokenizer_of(checkpoint)
    export.is_earlier_export(folder)


def read_log(folder):
    run = report.read_run(str(folder))
    report.run_row(run)
    run.color = 'C0'
    report.group_by_data([run])


def read_problems(folder):
    tasks = humaneval.load(str(folder / 'a.jsonl'))
    for task in tasks.values():
        humaneval.end_of_function(task['prompt'], task['test'])


def read_items(folder):
    tokenizer = folio.tokenizer.load(BPE)
    hellaswag.render(hellaswag.load(str(folder / 'a.jsonl')), tokenizer, 8)


def read_progress(folder):
    tokenizer = folio.tokenizer.load(CHARS)
    corpus.require_ours(str(folder))
    corpus.find_finished(str(folder), corpus.new_meta(tokenizer, 'here'))


def read_answers(folder):
    os.environ['OPENAI_BASE_URL'] = 'http://127.0.0.1:9/v1'
    asked = teacher.Teacher('wise', str(folder), budget=1)
    asked.close()
    teacher.parse_list(list(asked.answers.values())[0] if asked.answers else '')
    teacher.read_tree(str(folder / 'topics.json'))


TASK = {'task_id': 'a', 'prompt': 'def f():\n', 'entry_point': 'f', 'test': 'x = 1\ny = 2\n'}
TASKS = [TASK, TASK | {'task_id': 'b'}]
ITEM = {'ctx': 'a cab', 'label': 3, 'endings': ['is', 'was', 'had', 'bad']}
ANSWERS = [{'request': 'a', 'cost': 1.0}, {'request': 'a', 'cost': 0.5, 'key': 'k', 'text': '[1]'}]
PICKLE = pickle.dumps({'vocab_size': 3, 'itos': {0: 'a', 1: 'b', 2: 'c'}, 'stoi': {'a': 0}})
TOKENS = bytes(40)

# {format: (what reads it, {file: contents}, the files that are mutated)}
FORMATS = {
    'a checkpoint': (read_checkpoint, {'ckpt.pt': small_checkpoint('modern')}, ['ckpt.pt']),
    "nanoGPT's checkpoint": (read_checkpoint, {'ckpt.pt': of_nanogpt()}, ['ckpt.pt']),
    'a data set': (read_data, {'meta.json': meta(), 'tokenizer.json': CHARS, 'train.bin': TOKENS,
                               'val.bin': TOKENS}, ['meta.json', 'tokenizer.json']),
    "nanoGPT's data set": (read_data, {'meta.pkl': PICKLE, 'train.bin': TOKENS}, ['meta.pkl']),
    'a tokenizer': (read_tokenizer, {'tokenizer.json': BPE}, ['tokenizer.json']),
    'a folder of transformers': (
        read_hugging_face, hugging_face_files('gpt2'),
        ['config.json', 'model.safetensors.index.json', 'folio_tokenizer.json', 'a.safetensors']),
    "a NanoChat's folder": (
        read_hugging_face, hugging_face_files('modern'),
        ['config.json', 'model.safetensors.index.json', 'b.safetensors']),
    'a log': (read_log, {'log.jsonl': log()}, ['log.jsonl']),
    'problems': (read_problems, {'a.jsonl': TASKS}, ['a.jsonl']),
    'compressed problems': (
        read_problems, {'a.jsonl': gzip.compress(in_lines(TASKS))}, ['a.jsonl']),
    'items': (read_items, {'a.jsonl': [ITEM, ITEM]}, ['a.jsonl']),
    'the progress of a corpus': (read_progress, {'meta.json': meta()}, ['meta.json']),
    'answers': (read_answers, {'answers.jsonl': ANSWERS, 'topics.json': {'a': ['b', 'c']}},
                ['answers.jsonl', 'topics.json']),
}


def contents(value, name):
    """Return the bytes of a file that holds a value: JSON, lines of JSON, or what torch writes."""
    if isinstance(value, bytes):
        return value
    if name.endswith('.pt'):
        return as_pt(value)
    return in_lines(value) if isinstance(value, list) else as_json(value)


# ---- Mutations -----------------------------------------------------------------------------------
class Planted:
    """Run a command when it is unpickled, unless the reader refuses."""

    def __reduce__(self):
        return os.system, ('true planted',)


VALUES = [None, True, False, -1, 0, 1, 2, 3, 64, 2**20, 2**31, 2**63, 10**30, -10**30, 0.5, 1e308,
          math.nan, math.inf, '', 'x', 'O', '|O', '<u4', 'i4,O', 'V0', '<f4', '../x', '/etc/passwd',
          'a.safetensors', '../a.safetensors', '\x1b[2J\n\0', '\ud800', '<img src=x>', 'modern',
          'gelu', [], {}, [[]], [{}], {'kind': 'char'}, ['a', 'b'], {'a': {'b': 1}}]
TEXTS = [b'[' * 10**5, b'{"a":' * 10**5, b'null', b'[]', b'{}', b'7', b'"x"', b'', b'\xff\xfe',
         b'NaN', b'1' * 5000, b'\0', b'\n', b'\x1b]0;x\x07', pickle.dumps(Planted())]
TENSORS = [torch.zeros(()), torch.zeros(1).expand(10**9), torch.zeros(1, 1).expand(10**6, 10**6),
           torch.zeros(3, dtype=torch.int8), torch.zeros(2, 2), torch.zeros(0), torch.ones(8)]


def nested(depth):
    """Return an empty tuple in a tuple in a tuple …: to hash a deep one overflows the stack."""
    value = ()
    for _ in range(depth):
        value = (value,)
    return value


def mutate_value(value, draw, more=()):
    """Return a tree of dictionaries and lists with a change in one place.

    draw: a random.Random. more: further values to put there, besides VALUES.
    """
    value = copy.copy(value)
    is_tree = isinstance(value, (dict, list)) and len(value) > 0
    if not is_tree or draw.random() < 0.1:
        return draw.choice([*VALUES, *more])
    key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    how = draw.random()
    if how < 0.1:
        del value[key]
    elif how < 0.15 and isinstance(value, dict):
        value[draw.choice(['zzz', '\x1b[1m\n', 'folder', 'name', '__init__'])] = draw.choice(VALUES)
    elif how < 0.2 and isinstance(value, dict):
        value[draw.choice(list(value))] = value[key]
    else:
        value[key] = mutate_value(value[key], draw, more)
    return value


def mutate_bytes(data, draw):
    """Return data with some bytes changed, cut, repeated or inserted."""
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8])):
        place = draw.randrange(len(data) + 1)
        how = draw.randrange(7)
        if how == 0:
            data[place:place + 1] = bytes([draw.randrange(256)])
        elif how == 1:
            del data[place:]
        elif how == 2:
            del data[place:place + draw.randrange(1, 20)]
        elif how == 3:
            data[place:place] = draw.choice(TEXTS[3:])
        elif how == 4:
            data[place:place + 4] = draw.choice([b'\xff' * 4, b'\0' * 4, b'\0\0\0\x40'])
        elif how == 5:
            start = draw.randrange(len(data) + 1)
            data[place:place] = data[start:start + 50]
        else:
            data[place:place + 8] = draw.choice([2**62, 2**32, 2**31]).to_bytes(8, 'little')
    return bytes(data)


def mutate_pickle(data, draw):
    """Return a .pt with a change in its pickle.

    Its checksums are those of the changed pickle, or every change would be refused for them alone.
    """
    archive = zipfile.ZipFile(io.BytesIO(data))
    file = io.BytesIO()
    compression = draw.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(file, 'w', compression) as new:
        for name in archive.namelist():
            record = archive.read(name)
            if name.endswith('data.pkl'):
                record = mutate_bytes(record, draw)
                if draw.random() < 0.05:
                    record = pickle.dumps({nested(300): Planted(), 'model': {}}, protocol=2)
            new.writestr(name, record)
    return file.getvalue()


def mutate(value, whole, name, draw):
    """Return the bytes of a mutated file.

    value: what is in the whole file, whole: its bytes, name: its name, which says how to mutate it.
    """
    if draw.random() < 0.02:
        return draw.choice(TEXTS)
    if name.endswith('.pt'):
        how = draw.random()
        if how < 0.25:
            return mutate_bytes(whole, draw)
        if how < 0.6:
            return mutate_pickle(whole, draw)
        for _ in range(draw.choice([1, 1, 2])):
            value = mutate_value(value, draw, [*TENSORS, Planted(), nested(100)])
        return as_pt(value)
    if draw.random() < 0.5:
        return mutate_bytes(whole, draw)
    if name.endswith('.safetensors'):
        return mutate_header(whole, draw)
    if isinstance(value, bytes) and name.endswith('.json'):
        value = json.loads(value)
    if isinstance(value, bytes):
        return mutate_bytes(whole, draw)
    for _ in range(draw.choice([1, 1, 2])):
        value = mutate_value(value, draw)
    return contents(value, 'x.json' if not isinstance(value, list) else name)


def mutate_header(data, draw):
    """Return a .safetensors file with a change in its header, which is its length and then JSON."""
    n = int.from_bytes(data[:8], 'little')
    header = as_json(mutate_value(json.loads(data[8:8 + n]), draw))
    return len(header).to_bytes(8, 'little') + header + data[8 + n:]


# ---- The campaign --------------------------------------------------------------------------------
EVENTS = {'os.system', 'os.exec', 'os.posix_spawn', 'os.fork', 'subprocess.Popen', 'socket.connect',
          'os.remove', 'os.rename', 'shutil.rmtree'}
executed = []  # (event, arguments) of those that happened while a file was read
is_reading = False


def watch(event, arguments):
    """Note the events that a file must not cause. Python calls this for each of its own events."""
    if is_reading and event in EVENTS:
        executed.append((event, arguments))


sys.addaudithook(watch)  # for good: Python can remove no such hook, hence is_reading


class Hang(BaseException):
    """The file is still being read after SECONDS. Not an Exception, which readers may catch."""


def on_alarm(number, frame):
    raise Hang


def attempt(read, folder):
    """Read a file; return (accepted, refused, hang or traceback; a text about it)."""
    global is_reading
    is_reading = True
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        read(folder)
        return 'accepted', ''
    except UserError as e:
        return 'refused', str(e)
    except Hang:
        return 'hang', traceback.format_exc(limit=-3)
    except BaseException:
        return 'traceback', traceback.format_exc(limit=-3)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        is_reading = False


def campaign(name, n, seed):
    """Return (Counter of the outcomes of n mutated files of a format, texts about the bad ones)."""
    read, values, mutated = FORMATS[name]
    whole = {file: contents(value, file) for file, value in values.items()}
    draw = random.Random(f'{name} {seed}')
    counts = collections.Counter()
    bad = []
    before = signal.signal(signal.SIGALRM, on_alarm)
    with tempfile.TemporaryDirectory() as folder:
        for file, data in whole.items():
            pathlib.Path(folder, file).write_bytes(data)
        for _ in range(n):
            target = draw.choice(mutated)
            data = mutate(values[target], whole[target], target, draw)
            pathlib.Path(folder, target).write_bytes(data)
            outcome, text = attempt(read, pathlib.Path(folder))
            pathlib.Path(folder, target).write_bytes(whole[target])
            counts[outcome] += 1
            if outcome in ('hang', 'traceback'):
                bad.append(f'{target}: {text}')
    signal.signal(signal.SIGALRM, before)
    return counts, bad


def peak_memory():
    """Return the most memory that this process has taken so far, in bytes."""
    resource = pytest.importorskip('resource')  # Windows lacks it
    unit = 1 if sys.platform == 'darwin' else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.filterwarnings('ignore')  # torch warns of some files before it refuses them
@pytest.mark.skipif(not hasattr(signal, 'setitimer'), reason='Windows has no such alarm')
@pytest.mark.parametrize('name', FORMATS)
def test_a_file_from_a_stranger_ends_in_one_line(name):
    executed.clear()
    memory = peak_memory()
    n = 500 if name.endswith('checkpoint') else 1000  # checkpoints take longer
    counts, bad = campaign(name, n, seed=1)
    assert not bad, bad[0]
    assert not executed
    assert peak_memory() - memory < 2**30
    assert counts['refused'] > 100 and counts['accepted'] > 10  # it mutates, and not too much


# ---- Small files that took all memory, hung or crashed -------------------------------------------
def refused(read, folder, **files):
    """Write files, and return the one line with which they are refused, soon and in little memory.

    files: contents by name, in which __ stands for a dot.
    """
    for name, value in files.items():
        name = name.replace('__', '.')
        (folder / name).write_bytes(contents(value, name))
    clock = time.monotonic()
    memory = peak_memory()
    outcome, text = attempt(read, folder)
    assert outcome == 'refused', text
    assert peak_memory() - memory < 2**29 and time.monotonic() - clock < SECONDS
    return text


@pytest.mark.parametrize('arch', ['gpt2', 'modern'])
@pytest.mark.parametrize('name', ['n_layer', 'vocab_size', 'n_embd', 'block_size'])
@pytest.mark.parametrize('size', [10**8, 10**12, 10**30])
def test_settings_are_compared_with_the_weights_before_memory_is_taken(tmp_path, arch, name, size):
    checkpoint = small_checkpoint(arch)
    checkpoint['model_args'][name] = size
    assert 'ckpt.pt' in refused(read_checkpoint, tmp_path, ckpt__pt=checkpoint)


def test_weights_larger_than_their_file_are_refused(tmp_path):
    """A matrix may be one number, repeated by a stride of 0."""
    for checkpoint in (small_checkpoint('modern'), of_nanogpt()):
        model_args = checkpoint['model_args']
        model_args['vocab_size'] = 10**9
        for name, weight in checkpoint['model'].items():
            if 'wte' in name or 'lm_head' in name:
                checkpoint['model'][name] = torch.zeros(1, 1).expand(10**9, 8)
        assert 'larger than the file' in refused(read_checkpoint, tmp_path, ckpt__pt=checkpoint)


def test_a_setting_that_is_a_large_tensor_takes_no_memory(tmp_path):
    checkpoint = of_nanogpt()
    checkpoint['model_args']['vocab_size'] = torch.zeros(1).expand(10**9)
    assert 'its vocab_size is of type Tensor' in refused(
        read_checkpoint, tmp_path, ckpt__pt=checkpoint)


def test_layers_that_share_one_storage_are_counted_each(tmp_path):
    checkpoint = small_checkpoint('modern')
    checkpoint['model_args'] |= {'n_layer': 2000, 'n_embd': 512}
    matrix = torch.zeros(4 * 512 * 512)
    for layer in range(2000):
        for part, shape in {'attn.c_attn': (1536, 512), 'attn.c_proj': (512, 512),
                            'mlp.c_fc': (2048, 512), 'mlp.c_proj': (512, 2048)}.items():
            weight = matrix[:math.prod(shape)].view(shape)
            checkpoint['model'][f'transformer.h.{layer}.{part}.weight'] = weight
    assert 'larger than the file' in refused(read_checkpoint, tmp_path, ckpt__pt=checkpoint)


def repacked(data, record=None, compression=zipfile.ZIP_STORED):
    """Return a .pt with another pickle, or with its records compressed."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', compression) as new:
        for name in archive.namelist():
            is_pickle = record is not None and name.endswith('data.pkl')
            new.writestr(name, record if is_pickle else archive.read(name))
    return file.getvalue()


NESTED = b')' + b'\x85' * 250_000  # an empty tuple, in a tuple, and so on
HUGE_ARRAY = b'\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\xf2\x05*\x01\x85R.'


@pytest.mark.parametrize('pickled', [
    b'\x80\x02}' + NESTED + b'K\0s.',  # as the key of a dictionary, which is hashed
    HUGE_ARRAY,
    b'\x80\x02}r\0\0\0\x40.',  # the memo's place 2**30
    pickle.dumps(Planted(), protocol=2),
], ids=['nested', 'bytearray', 'memo', 'planted'])
def test_a_pickle_is_read_before_it_is_obeyed(tmp_path, pickled):
    whole = as_pt(small_checkpoint())
    refused(read_checkpoint, tmp_path, ckpt__pt=repacked(whole, pickled))
    (tmp_path / 'train.bin').write_bytes(TOKENS)
    refused(read_data, tmp_path, meta__pkl=pickled)
    assert not executed


def test_what_unpacks_to_much_is_refused(tmp_path):
    deflated = repacked(as_pt(small_checkpoint()), compression=zipfile.ZIP_DEFLATED)
    assert 'compressed' in refused(read_checkpoint, tmp_path, ckpt__pt=deflated)
    bomb = gzip.compress(bytes(2**28), compresslevel=1)
    assert 'unpacked' in refused(read_problems, tmp_path, a__jsonl=bomb)


@pytest.mark.parametrize('size', [10**7, 10**12])
def test_a_context_longer_than_any_is_refused(tmp_path, size):
    files = hugging_face_files('modern')
    hf = json.loads(files.pop('config.json')) | {'max_position_embeddings': size}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert 'block_size' in refused(read_hugging_face, tmp_path, config__json=hf)


# ---- A data set ----------------------------------------------------------------------------------
@pytest.mark.parametrize('dtype', ['O', '|O', 'object', 'i4,O', 'foo', 'V0', '<f4', 'M8[s]', '>u2',
                                   7, None, [], {'names': ['a'], 'formats': ['O']}], ids=str)
def test_tokens_are_of_two_types_and_no_other(tmp_path, dtype):
    files = {'tokenizer__json': CHARS, 'train__bin': b'A' * 40, 'val__bin': TOKENS}
    described = meta() | {'dtype': dtype}
    assert 'its dtype is' in refused(read_data, tmp_path, meta__json=described, **files)
    del described['splits']
    assert 'its dtype is' in refused(read_data, tmp_path, meta__json=described, **files)
    # The prepare scripts read the same file.
    assert 'its dtype is' in refused(read_progress, tmp_path, meta__json=described)


def test_the_size_of_a_vocabulary_is_its_tokenizers(tmp_path):
    files = {'tokenizer__json': CHARS, 'train__bin': TOKENS, 'val__bin': TOKENS}
    says = refused(read_data, tmp_path, meta__json=meta() | {'vocab_size': 10**8}, **files)
    assert 'vocab_size is 100000000, its tokenizer has 9' in says


@pytest.mark.parametrize('names', [['pytorch_model.bin', 'tokenizer.json'], ['notes.txt'],
                                   ['train.bin', 'val.bin', 'meta.pkl']], ids=str)
def test_preparing_leaves_a_folder_of_others_alone(tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes(b'weeks of work')
    tokenizer = folio.tokenizer.load(CHARS)
    with pytest.raises(UserError, match='give another --dataset'):
        corpus.write_dataset(str(tmp_path), tokenizer, {'train': ['abc']}, source='here')
    bpe = folio.tokenizer.load(BPE)
    with pytest.raises(UserError, match='give another --dataset'):
        corpus.write_corpus(str(tmp_path), bpe, [], None, val_tokens=1)
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert all((tmp_path / name).read_bytes() == b'weeks of work' for name in names)


def test_preparing_anew_removes_what_it_wrote_and_nothing_else(tmp_path):
    tokenizer = folio.tokenizer.load(CHARS)
    splits = {'train': [('a', 'bc')], 'val': ['abc'], 'test': ['abc']}
    corpus.write_dataset(str(tmp_path), tokenizer, splits, source='here')
    (tmp_path / 'pytorch_model.bin').write_bytes(b'weeks of work')
    corpus.write_dataset(str(tmp_path), tokenizer, {'train': ['ab'], 'val': ['abc']}, source='here')
    assert sorted(os.listdir(tmp_path)) == ['meta.json', 'pytorch_model.bin', 'tokenizer.json',
                                            'train.bin', 'val.bin']


# ---- A file names files --------------------------------------------------------------------------
@pytest.mark.parametrize('name', ['../outside/a.safetensors', '/etc/passwd', '', '.', '..', 'a.bin',
                                  'b/a.safetensors'])
def test_an_index_names_files_of_its_own_folder_only(tmp_path, name):
    (tmp_path / 'outside').mkdir()
    (tmp_path / 'inside').mkdir()
    for file, data in hugging_face_files('gpt2').items():
        (tmp_path / 'outside' / file).write_bytes(data)
        (tmp_path / 'inside' / file).write_bytes(data)
    index = json.loads(hugging_face_files('gpt2')['model.safetensors.index.json'])['weight_map']
    index = {key: name if file.startswith('a') else file for key, file in index.items()}
    index = {'weight_map': index}
    says = refused(read_hugging_face, tmp_path / 'inside', model__safetensors__index__json=index)
    assert 'its index names' in says


@pytest.mark.parametrize('spec', ['secret.json', '/etc/passwd', 0, 1.5, [], [['kind', 'char']]],
                         ids=str)
def test_a_tokenizer_in_a_file_is_a_dictionary(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    pathlib.Path('secret.json').write_bytes(as_json(CHARS))
    refused(read_checkpoint, tmp_path, ckpt__pt=small_checkpoint() | {'tokenizer': spec})
    (tmp_path / 'ckpt.pt').unlink()
    refused(read_tokenizer, tmp_path, tokenizer__json=as_json(spec))
    for name, data in hugging_face_files('gpt2').items():
        (tmp_path / name).write_bytes(data)
    refused(read_hugging_face, tmp_path, folio_tokenizer__json=as_json(spec))


def test_a_checkpoint_names_data_under_data_only(tmp_path, monkeypatch):
    (tmp_path / 'outside').mkdir()
    (tmp_path / 'outside' / 'train.bin').write_bytes(TOKENS)
    (tmp_path / 'outside' / 'meta.pkl').write_bytes(pickle.dumps({'itos': {0: 'x'}}))
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data').mkdir()
    opened = []
    monkeypatch.setattr(folio.checkpoint, 'Dataset', opened.append)
    for name in (str(tmp_path / 'outside'), '../outside', '../data/../outside'):
        checkpoint = of_nanogpt() | {'config': {'dataset': name}}
        with contextlib.suppress(UserError):  # GPT-2's does not fit 64 tokens, or cannot be had
            folio.checkpoint.tokenizer_of(checkpoint)
    assert not opened


# ---- One line ------------------------------------------------------------------------------------
def test_what_a_file_says_is_shown_as_one_line_that_no_terminal_obeys(tmp_path, capsys):
    hostile = 'a\n\x1b]52;c;x\x07\0b\u202e'
    (tmp_path / 'config.json').write_bytes(as_json({'model_type': hostile}))
    with pytest.raises(UserError) as error:
        folio.checkpoint.load(str(tmp_path))
    with pytest.raises(SystemExit):
        report_error(UserError, error.value, None)
    err = capsys.readouterr().err
    assert err.endswith('\n') and err[:-1].isprintable() and 'a\\n\\x1b]52' in err


def test_what_a_log_says_is_not_html_in_the_report():
    hostile = 'x\n\n<img src=http://evil.example/t.png> | y\x1b[2J'
    shown = report.table(['run'], [[hostile]]) + report.plain(hostile) + report.fenced(hostile)
    outside = re.sub('(?s)~~~+text.*~~~+', '', shown)
    assert '<' not in outside and '\x1b' not in shown and '\n\n' not in outside


@pytest.mark.parametrize('name', ['zzz', 'n_kv_head'])
def test_settings_of_a_fork_of_nanogpt_are_named(tmp_path, name):
    checkpoint = of_nanogpt()
    checkpoint['model_args'][name] = 1
    assert f'settings that folio does not have: {name}' in refused(
        read_checkpoint, tmp_path, ckpt__pt=checkpoint)


if __name__ == '__main__':
    n_each = math.ceil(int(sys.argv[1]) / len(FORMATS))
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    memory = peak_memory()
    total = collections.Counter()
    for name in FORMATS:
        clock = time.process_time()
        counts, bad = campaign(name, n_each, seed)
        total += counts
        more = (peak_memory() - memory) / 2**20
        print(f'{name}: {dict(counts)}, {time.process_time() - clock:.1f} s, so far '
              f'{more:.0f} MiB more memory at most', flush=True)
        for text, times in collections.Counter(bad).most_common(20):
            print(f'  {times} times {text}', flush=True)
    print(f'{sum(total.values()):,} files: {dict(total)}; {len(executed)} executions '
          f'{executed[:5]}')
