"""folio/checkpoint.py: what is loaded, what is refused in one line, and files that are whole."""
import dataclasses
import errno
import os
import pickle

import pytest
import torch

from folio import checkpoint, hugging_face
from folio.configurator import UserError
from model import GPT, GPTConfig

SMALL = GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)


def contents(model, **more):
    """Return the dictionary of a checkpoint with nothing but weights, and more."""
    args = dataclasses.asdict(model.config)
    return {'model': model.state_dict(), 'model_args': args, **more}


@pytest.fixture
def small():
    torch.manual_seed(0)
    return GPT(SMALL)


def refused(source, out_dir=None):
    """Return the one line with which a source is refused."""
    with pytest.raises(UserError) as error:
        checkpoint.load(str(source), out_dir)
    assert '\n' not in str(error.value)
    return str(error.value)


# ---- Every kind of source ------------------------------------------------------------------------
def assert_same_weights(found, model):
    assert found['model_args'] == dataclasses.asdict(model.config)
    for name, weight in model.state_dict().items():
        assert torch.equal(found['model'][name], weight), name


def test_a_file_is_loaded(small, tmp_path):
    checkpoint.save(str(tmp_path / 'any_name.pt'), contents(small))
    assert_same_weights(checkpoint.load(str(tmp_path / 'any_name.pt')), small)


def test_of_the_folder_of_a_run_the_newest_checkpoint_is_loaded(small, tmp_path):
    checkpoint.save(str(tmp_path / 'best.pt'), contents(small, iter_num=1))
    checkpoint.save(str(tmp_path / 'ckpt.pt'), contents(small, iter_num=2))
    assert checkpoint.load(str(tmp_path))['iter_num'] == 2


def test_resume_loads_the_run_in_out_dir(small, tmp_path):
    checkpoint.save(str(tmp_path / 'ckpt.pt'), contents(small, iter_num=2))
    assert checkpoint.load('resume', out_dir=str(tmp_path))['iter_num'] == 2


def test_a_hugging_face_folder_is_loaded(tmp_path):
    transformers = pytest.importorskip('transformers')
    config = transformers.GPT2Config(vocab_size=101, n_positions=32, n_embd=48, n_layer=3, n_head=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    args = GPTConfig(**checkpoint.load(str(tmp_path))['model_args'])
    assert args == GPTConfig(vocab_size=101, block_size=32, n_embd=48, n_layer=3, n_head=4)


def test_a_model_is_made_of_the_loaded_dictionary(small, tmp_path):
    checkpoint.save(str(tmp_path / 'a.pt'), contents(small))
    idx_BT = torch.randint(50, (2, 16))
    again = GPT.from_pretrained(checkpoint.load(str(tmp_path / 'a.pt')))
    assert torch.equal(again(idx_BT)[0], small(idx_BT)[0])


def test_a_model_may_be_loaded_with_a_shorter_context(small):
    shorter = GPT.from_pretrained(contents(small), block_size=8)
    idx_BT = torch.randint(50, (2, 8))
    assert torch.equal(shorter(idx_BT)[0], small(idx_BT)[0])


def test_a_model_is_not_loaded_with_a_longer_context(small):
    with pytest.raises(ValueError, match='block_size 17 is longer'):
        GPT.from_pretrained(contents(small), block_size=17)


# ---- What is refused -----------------------------------------------------------------------------
def test_a_missing_file_is_refused(tmp_path):
    assert 'no checkpoint' in refused(tmp_path / 'missing.pt')


def test_a_missing_run_is_refused(tmp_path):
    assert f'no checkpoint {tmp_path}/ckpt.pt' in refused('resume', out_dir=str(tmp_path))


def test_a_folder_without_a_model_is_refused(tmp_path):
    assert 'not a Hugging Face folder' in refused(tmp_path)


def test_the_folder_of_a_run_with_best_alone_says_what_was_meant(small, tmp_path):
    checkpoint.save(str(tmp_path / 'best.pt'), contents(small))
    assert f'did you mean {tmp_path}/best.pt?' in refused(tmp_path)


def unfit(saved, tmp_path):
    """Return the one line that says why no GPT can be built of a checkpoint."""
    checkpoint.save(str(tmp_path / 'a.pt'), saved)
    with pytest.raises(UserError) as error:
        checkpoint.build(GPT, checkpoint.load(str(tmp_path / 'a.pt')))
    line = str(error.value)
    assert line.startswith(f'{tmp_path}/a.pt does not fit the model code: ')
    assert '\n' not in line
    return line


def test_fields_that_the_model_lacks_are_named(small, tmp_path):
    saved = contents(small)
    saved['model_args'] |= {'n_kv_head': 2, 'alibi': True}
    assert 'settings that GPTConfig lacks: alibi, n_kv_head' in unfit(saved, tmp_path)


def test_a_missing_weight_is_named(small, tmp_path):
    saved = contents(small)
    del saved['model']['transformer.h.1.ln_2.bias']
    line = unfit(saved, tmp_path)
    assert 'Missing key(s) in state_dict: "transformer.h.1.ln_2.bias"' in line


def test_a_weight_too_many_is_named(small, tmp_path):
    saved = contents(small)
    saved['model']['transformer.h.2.ln_2.bias'] = torch.zeros(32)
    line = unfit(saved, tmp_path)
    assert 'Unexpected key(s) in state_dict: "transformer.h.2.ln_2.bias"' in line


def test_a_weight_of_another_shape_is_named_with_both(small, tmp_path):
    saved = contents(small)
    saved['model']['transformer.ln_f.weight'] = torch.zeros(31)
    line = unfit(saved, tmp_path)
    assert 'size mismatch for transformer.ln_f.weight' in line
    assert 'torch.Size([31])' in line and 'torch.Size([32])' in line


def test_settings_that_cannot_be_are_named(small, tmp_path):
    saved = contents(small)
    saved['model_args']['n_head'] = 5
    assert 'n_embd (32) must be a multiple of n_head (5)' in unfit(saved, tmp_path)


def test_layers_may_differ_from_one_another(small, tmp_path):
    """Every second layer has a module of its own, as mixtures of experts do."""
    class Uneven(GPT):
        def __init__(self, config):
            super().__init__(config)
            for block in self.transformer.h[1::2]:
                block.mlp.gate = torch.nn.Linear(config.n_embd, 4)

    model = Uneven(SMALL)
    checkpoint.save(str(tmp_path / 'a.pt'), contents(model))
    again = checkpoint.build(Uneven, checkpoint.load(str(tmp_path / 'a.pt')))
    gates = [each.transformer.h[1].mlp.gate.weight for each in (again, model)]
    assert torch.equal(*gates)


@pytest.mark.parametrize('saved', [[1, 2], {'weights': {}}, {'model': {}}], ids=str)
def test_another_file_of_torch_is_refused(tmp_path, saved):
    torch.save(saved, tmp_path / 'a.pt')
    assert 'is not a checkpoint of folio or nanoGPT' in refused(tmp_path / 'a.pt')


class Evil:
    """What would run a command if it were unpickled."""

    def __reduce__(self):
        return os.system, ('touch ran',)


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize('save', [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))],
                         ids=['torch', 'pickle'])
def test_a_checkpoint_cannot_run_what_it_brings(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    save({'model': {}, 'model_args': Evil()}, tmp_path / 'a.pt')
    assert 'not a checkpoint' in refused('a.pt')
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('n_bytes', [0, 10, 1000, -1])
def test_a_checkpoint_cut_short_is_refused(small, tmp_path, n_bytes):
    path = tmp_path / 'ckpt.pt'
    checkpoint.save(str(path), contents(small))
    path.write_bytes(path.read_bytes()[:n_bytes])
    line = refused(path)
    assert 'damaged' in line or 'refused' in line


# ---- Saving --------------------------------------------------------------------------------------
class FullDisk:
    """A file to which nothing can be written."""

    def __init__(self, *args):
        self.file = open(*args)

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()

    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flush(self):
        pass


def test_a_full_disk_leaves_the_previous_checkpoint_and_nothing_else(small, tmp_path, monkeypatch):
    path = str(tmp_path / 'ckpt.pt')
    checkpoint.save(path, contents(small, iter_num=1))
    monkeypatch.setattr(checkpoint, 'open', FullDisk, raising=False)
    with pytest.raises(UserError, match='No space left.*intact'):
        checkpoint.save(path, contents(small, iter_num=2))
    assert checkpoint.load(path)['iter_num'] == 1
    assert os.listdir(tmp_path) == ['ckpt.pt']


def test_a_checkpoint_is_replaced_by_a_rename_not_by_writing_into_it(small, tmp_path):
    """So who reads the old file goes on reading the old one, whole."""
    path = tmp_path / 'ckpt.pt'
    checkpoint.save(str(path), contents(small, iter_num=1))
    with open(path, 'rb') as old:
        checkpoint.save(str(path), contents(small, iter_num=2))
        assert torch.load(old, weights_only=True)['iter_num'] == 1
    assert os.listdir(tmp_path) == ['ckpt.pt']


@pytest.fixture
def in_use(monkeypatch):
    """A function: as on Windows while somebody reads a file, the next renames over it fail."""
    replace = os.replace
    errors = []

    def busy(*names):
        if errors:
            raise errors.pop()
        replace(*names)

    def next_fail(times):
        errors.extend(PermissionError(errno.EACCES, 'in use') for _ in range(times))

    monkeypatch.setattr(os, 'replace', busy)
    monkeypatch.setattr(checkpoint.time, 'sleep', lambda seconds: None)
    return next_fail


def test_a_checkpoint_that_somebody_reads_is_waited_for(small, tmp_path, in_use):
    path = str(tmp_path / 'ckpt.pt')
    checkpoint.save(path, contents(small, iter_num=1))
    in_use(3)
    checkpoint.save(path, contents(small, iter_num=2))
    assert checkpoint.load(path)['iter_num'] == 2


def test_a_checkpoint_that_stays_in_use_is_left_as_it_is(small, tmp_path, in_use):
    path = str(tmp_path / 'ckpt.pt')
    checkpoint.save(path, contents(small, iter_num=1))
    in_use(100)
    with pytest.raises(UserError, match='in use; what was there before is intact'):
        checkpoint.save(path, contents(small, iter_num=2))
    assert checkpoint.load(path)['iter_num'] == 1


@pytest.fixture
def twice(small, tmp_path):
    """Where best.pt is, saved at step 2, and ckpt.pt, which was of step 1 and is now the same."""
    best, ckpt = str(tmp_path / 'best.pt'), str(tmp_path / 'ckpt.pt')
    checkpoint.save(ckpt, contents(small, iter_num=1))
    checkpoint.save([best, ckpt], contents(small, iter_num=2))
    return best, ckpt


def test_a_checkpoint_of_two_names_is_one_file(twice, tmp_path):
    assert os.path.samefile(*twice)
    assert checkpoint.load(twice[1])['iter_num'] == 2
    assert sorted(os.listdir(tmp_path)) == ['best.pt', 'ckpt.pt']


def test_the_next_checkpoint_of_one_name_leaves_the_other(twice, small):
    best, ckpt = twice
    checkpoint.save(ckpt, contents(small, iter_num=3))
    assert checkpoint.load(best)['iter_num'] == 2
    assert checkpoint.load(ckpt)['iter_num'] == 3


def test_a_run_killed_before_the_second_name_was_there_does_not_write_into_the_first(twice, small):
    best, ckpt = twice
    os.link(best, ckpt + '.tmp')  # and then it was killed
    checkpoint.save(ckpt, contents(small, iter_num=3))
    assert checkpoint.load(best)['iter_num'] == 2
    os.link(best, ckpt + '.tmp')
    checkpoint.save([best, ckpt], contents(small, iter_num=4))
    assert checkpoint.load(ckpt)['iter_num'] == 4


def test_a_second_name_is_a_copy_where_there_are_no_links(small, tmp_path, monkeypatch):
    def link(*args):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, 'link', link)
    best, ckpt = str(tmp_path / 'best.pt'), str(tmp_path / 'ckpt.pt')
    checkpoint.save([best, ckpt], contents(small, iter_num=2))
    assert checkpoint.load(ckpt)['iter_num'] == 2
    assert not os.path.samefile(best, ckpt)
    assert sorted(os.listdir(tmp_path)) == ['best.pt', 'ckpt.pt']


# ---- Other people's weights ----------------------------------------------------------------------
@pytest.mark.parametrize('activation', ['gelu_new', 'gelu'])
def test_a_gpt2_folder_of_transformers_gives_the_same_logits(tmp_path, activation):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=101, n_positions=32, n_embd=48, n_layer=3, n_head=4, bos_token_id=0,
        eos_token_id=0, initializer_range=0.2, activation_function=activation)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(checkpoint.load(str(tmp_path))).eval()
    idx_BT = torch.randint(101, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx_BT, all_logits=True)[0], theirs(idx_BT).logits,
                                   atol=1e-4, rtol=1e-4)


def test_modern_has_the_shape_of_nanochat(tmp_path):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = transformers.NanoChatConfig(
        vocab_size=64, hidden_size=48, intermediate_size=192, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=32, initializer_range=0.2)
    theirs = transformers.NanoChatForCausalLM(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(checkpoint.load(str(tmp_path))).eval()
    assert ours.config.arch == 'modern'
    idx_BT = torch.randint(64, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx_BT, all_logits=True)[0], theirs(idx_BT).logits,
                                   atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('change, unsupported', [
    ({}, []),
    ({'rope_parameters': None, 'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}},
     ['rope_parameters']),
    ({'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e5}}, ['rope_parameters']),
])
def test_rotary_embeddings_of_another_kind_are_not_supported(change, unsupported):
    config = GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=8, arch='modern')
    hf, _ = hugging_face.to_hugging_face(config, GPT(config).state_dict(), eot=None)
    model_args = dataclasses.asdict(config)
    assert hugging_face.unsupported_settings(hf | change, 'nanochat', model_args) == unsupported
