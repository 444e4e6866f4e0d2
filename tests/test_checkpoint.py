"""folio/checkpoint.py: what is loaded, what is refused in one line, and files that are whole."""
import dataclasses
import errno
import json
import os
import pickle
import random

import pytest
import torch

import folio.tokenizer
from conftest import need_gpt2
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


def test_a_model_may_be_loaded_with_a_shorter_context(small):
    shorter = GPT.from_pretrained(contents(small), block_size=8)
    idx_BT = torch.randint(50, (2, 8))
    assert torch.equal(shorter(idx_BT)[0], small(idx_BT)[0])


def test_a_model_is_not_loaded_with_a_longer_context(small):
    with pytest.raises(ValueError, match='block_size 17 is longer'):
        GPT.from_pretrained(contents(small), block_size=17)


# ---- What is refused -----------------------------------------------------------------------------
def test_a_file_given_as_the_folder_of_a_run_is_no_checkpoint_there(small, tmp_path):
    checkpoint.save(str(tmp_path / 'ckpt.pt'), contents(small))
    with pytest.raises(UserError, match='no checkpoint .*ckpt.pt/ckpt.pt; .* name its folder'):
        checkpoint.load('resume', out_dir=str(tmp_path / 'ckpt.pt'))


SPOILT = {  # what is wrong: (how a checkpoint gets so, what is said)
    'field': (lambda c: c['model_args'].update(n_kv_head=2, alibi=True),
              'settings that GPTConfig lacks: alibi, n_kv_head'),
    'shape': (lambda c: c['model_args'].update(n_head=5),
              'n_embd (32) must be a multiple of n_head (5)'),
    'missing': (lambda c: c['model'].pop('transformer.h.1.ln_2.bias'),
                'Missing key(s) in state_dict: "transformer.h.1.ln_2.bias"'),
    'too many': (lambda c: c['model'].update({'transformer.h.2.ln_2.bias': torch.zeros(32)}),
                 'Unexpected key(s) in state_dict: "transformer.h.2.ln_2.bias"'),
    'size': (lambda c: c['model'].update({'transformer.ln_f.weight': torch.zeros(31)}),
             'size mismatch for transformer.ln_f.weight')}


@pytest.mark.parametrize('what', SPOILT)
def test_what_does_not_fit_is_named_in_one_line(small, tmp_path, what):
    spoil, says = SPOILT[what]
    saved = contents(small)
    spoil(saved)
    checkpoint.save(str(tmp_path / 'a.pt'), saved)
    with pytest.raises(UserError) as error:
        checkpoint.build(GPT, checkpoint.load(str(tmp_path / 'a.pt')))
    line = str(error.value)
    assert line.startswith(f'{tmp_path}/a.pt does not fit: ')
    assert says in line
    assert '\n' not in line


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


def test_a_flipped_bit_in_a_checkpoint_is_noticed(small, tmp_path):
    path = tmp_path / 'ckpt.pt'
    checkpoint.save(str(path), contents(small))
    good = path.read_bytes()
    rng = random.Random(0)
    n_refused = 0
    for _ in range(50):
        damaged = bytearray(good)
        bit = rng.randrange(8 * len(good))
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            # Between the records there is padding, where a bit changes nothing.
            assert_same_weights(checkpoint.load(str(path)), small)
        except UserError:
            n_refused += 1
    assert n_refused > 30


@pytest.mark.parametrize('n_bytes', [0, 10, 1000, -1])
def test_a_checkpoint_cut_short_is_refused(small, tmp_path, n_bytes):
    path = tmp_path / 'ckpt.pt'
    checkpoint.save(str(path), contents(small))
    path.write_bytes(path.read_bytes()[:n_bytes])
    line = refused(path)
    assert 'damaged' in line or 'refused' in line


# ---- Saving --------------------------------------------------------------------------------------
def test_a_reader_of_the_previous_checkpoint_reads_it_whole(small, tmp_path):
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
    checkpoint.save(best, contents(small, iter_num=2))
    checkpoint.save_again(best, ckpt)
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


def test_a_kill_between_the_two_names_leaves_the_first_intact(twice, small):
    best, ckpt = twice
    os.link(best, ckpt + '.tmp')  # and then it was killed
    checkpoint.save(ckpt, contents(small, iter_num=3))
    assert checkpoint.load(best)['iter_num'] == 2
    os.link(best, ckpt + '.tmp')
    checkpoint.save(best, contents(small, iter_num=4))
    checkpoint.save_again(best, ckpt)
    assert checkpoint.load(ckpt)['iter_num'] == 4


def test_a_second_name_is_a_copy_on_file_systems_without_links(small, tmp_path, monkeypatch):
    def link(*args):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, 'link', link)
    best, ckpt = str(tmp_path / 'best.pt'), str(tmp_path / 'ckpt.pt')
    checkpoint.save(best, contents(small, iter_num=2))
    checkpoint.save_again(best, ckpt)
    assert checkpoint.load(ckpt)['iter_num'] == 2
    assert not os.path.samefile(best, ckpt)
    assert sorted(os.listdir(tmp_path)) == ['best.pt', 'ckpt.pt']


# ---- Other people's weights ----------------------------------------------------------------------
def gpt2_of_transformers(**fields):
    """Return a small GPT-2 of transformers, its predictions sharp."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = dict(vocab_size=101, n_positions=32, n_embd=48, n_layer=3, n_head=4, bos_token_id=0,
                  eos_token_id=0, initializer_range=0.2)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**(config | fields))).eval()


@pytest.mark.parametrize('activation', ['gelu_new', 'gelu', 'gelu_pytorch_tanh'])
def test_a_gpt2_folder_of_transformers_gives_the_same_logits(tmp_path, activation):
    theirs = gpt2_of_transformers(activation_function=activation)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(checkpoint.load(str(tmp_path))).eval()
    gelu = 'none' if activation == 'gelu' else 'tanh'
    assert ours.config == GPTConfig(vocab_size=101, block_size=32, n_embd=48, n_layer=3, n_head=4,
                                    gelu=gelu)
    idx_BT = torch.randint(101, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx_BT, all_logits=True)[0], theirs(idx_BT).logits,
                                   atol=1e-4, rtol=1e-4)


def test_pickled_weights_are_refused_with_the_remedy(tmp_path):
    gpt2_of_transformers().save_pretrained(tmp_path)
    os.rename(tmp_path / 'model.safetensors', tmp_path / 'pytorch_model.bin')
    line = refused(tmp_path)
    assert 'pytorch_model.bin' in line and 'save_pretrained' in line and 'damaged' not in line


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


# ---- Other people's tokenizers -------------------------------------------------------------------
TEXTS = ['', ' ', 'The value', '  two\n\n  three \t', "we've 1234 ½ naïve 日本語 👍🏽", 'ab' * 50]


@pytest.fixture
def byte_level():
    """A byte-level BPE trained with Hugging Face's tokenizers, its control tokens in front."""
    tokenizers = pytest.importorskip('tokenizers')
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator(["The value of two values, we've three. "] * 3 + TEXTS * 2,
                               vocab_size=300, special_tokens=['<s>', '</s>', '<pad>'])
    return theirs


def write_tokenizer(folder, theirs, config=None, **changes):
    """Write tokenizer.json, some of its entries changed, and tokenizer_config.json to a folder."""
    saved = json.loads(theirs._tokenizer.to_str()) | changes
    (folder / 'tokenizer.json').write_text(json.dumps(saved), encoding='utf-8')
    named = {'bos_token': '<s>', 'eos_token': {'content': '</s>'}}
    (folder / 'tokenizer_config.json').write_text(json.dumps(named | (config or {})))


@pytest.mark.parametrize('form', ['tokenizer.json', 'vocab.json'])
def test_a_folder_brings_its_tokenizer(tmp_path, byte_level, form):
    gpt2_of_transformers(vocab_size=300).save_pretrained(tmp_path)
    write_tokenizer(tmp_path, byte_level)
    if form == 'vocab.json':
        byte_level.save_model(str(tmp_path))
        (tmp_path / 'tokenizer.json').unlink()
    ours = checkpoint.tokenizer_of(checkpoint.load(str(tmp_path)))
    for text in TEXTS:
        assert ours.encode(text) == byte_level.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    assert (ours.eot, ours.n_vocab) == (1, 300)


def test_a_folder_with_the_files_of_gpt2_has_gpt2s_tokenizer(tmp_path):
    transformers = pytest.importorskip('transformers')
    need_gpt2()
    encoding = folio.tokenizer.load('gpt2').encoding
    ranks = {encoding.decode_single_token_bytes(i): i for i in range(50256)}
    vocab = {folio.tokenizer.spell(token): i for token, i in ranks.items()}
    merges = []
    for token in ranks:
        cuts = range(1, len(token))
        pairs = [(token[:cut], token[cut:]) for cut in cuts if token[:cut] in ranks]
        pairs = [pair for pair in pairs if pair[1] in ranks]
        merges += [tuple(map(folio.tokenizer.spell, pair)) for pair in pairs]
    theirs = transformers.GPT2Tokenizer(vocab | {'<|endoftext|>': 50256}, merges)
    theirs.save_pretrained(tmp_path)
    assert folio.tokenizer.load(str(tmp_path)).spec == {'kind': 'gpt2'}
    theirs.add_special_tokens({'pad_token': '[PAD]'})
    theirs.save_pretrained(tmp_path)
    ours = folio.tokenizer.load(str(tmp_path))
    assert (ours.eot, ours.n_vocab) == (50256, 50258)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)['input_ids']


def test_a_folder_without_a_tokenizer_gets_gpt2s_and_says_so(tmp_path, capsys):
    need_gpt2()
    gpt2_of_transformers(vocab_size=50257, n_embd=4).save_pretrained(tmp_path)
    ours = checkpoint.tokenizer_of(checkpoint.load(str(tmp_path)))
    assert ours.spec == {'kind': 'gpt2'}
    assert "has no tokenizer: its tokens are taken for GPT-2's" in capsys.readouterr().err


@pytest.mark.parametrize('changes, reason', [
    ({'normalizer': {'type': 'NFC'}}, 'it changes the text'),
    ({'pre_tokenizer': {'type': 'Metaspace'}}, 'it does not cut texts as GPT-2 does'),
    ({'pre_tokenizer': {'type': 'ByteLevel', 'add_prefix_space': True}}, 'as GPT-2 does'),
    ({'pre_tokenizer': None}, 'NoneType'),
    ({'model': {'type': 'Unigram', 'vocab': []}}, 'Unigram'),
    ({'model': {'type': 'WordLevel', 'vocab': {}}}, 'WordLevel'),
    ({'model': {'type': 'BPE', 'vocab': {'a': 0}, 'merges': []}, 'added_tokens': []}, 'KeyError'),
    ({'added_tokens': [{'id': 0, 'content': 'covid', 'special': False}]}, "'covid' was added"),
    ({'added_tokens': [{'id': 999, 'content': '<mask>', 'special': True}]}, 'gaps'),
], ids=str)
def test_another_tokenizer_is_refused_by_the_name_of_its_file(tmp_path, byte_level, changes,
                                                              reason):
    gpt2_of_transformers(vocab_size=300).save_pretrained(tmp_path)
    write_tokenizer(tmp_path, byte_level, **changes)
    line = refused(tmp_path)
    assert line.startswith(f'{tmp_path}/tokenizer.json cannot be read here') and reason in line


def test_tokens_that_no_merge_makes_and_texts_have_are_refused(tmp_path, byte_level):
    gpt2_of_transformers(vocab_size=300).save_pretrained(tmp_path)
    model = json.loads(byte_level._tokenizer.to_str())['model']
    model['vocab']['qqq'] = len(model['vocab'])
    write_tokenizer(tmp_path, byte_level, model=model | {'ignore_merges': True})
    assert 'it has tokens that no merge makes' in refused(tmp_path)


CHAT = "{% for m in messages %}{{ bos_token + 'Q: ' + m['content'] + '\n' }}{% endfor %}"


@pytest.mark.parametrize('where', ['chat_template.jinja', 'tokenizer_config.json'])
def test_a_folder_brings_its_template(tmp_path, byte_level, where):
    gpt2_of_transformers(vocab_size=300).save_pretrained(tmp_path)
    write_tokenizer(tmp_path, byte_level, config={'chat_template': CHAT})
    if where == 'chat_template.jinja':
        write_tokenizer(tmp_path, byte_level)
        (tmp_path / where).write_text(CHAT)
    assert checkpoint.load(str(tmp_path))['template'] == 'Q: {}\n'


@pytest.mark.parametrize('chat', [
    '{% for m in messages %}{{ m.content }}</s>{% endfor %}', '{{ raise_exception("no") }}', '{% x',
    '<s>{{ messages[0].content }}</s>', '<s>no question'])
def test_only_a_template_of_text_around_a_question_is_taken(tmp_path, byte_level, chat, capsys):
    gpt2_of_transformers(vocab_size=300).save_pretrained(tmp_path)
    write_tokenizer(tmp_path, byte_level, config={'chat_template': chat})
    assert checkpoint.load(str(tmp_path))['template'] is None
    assert f'the chat template of {tmp_path} is more than text' in capsys.readouterr().err


@pytest.mark.parametrize('config, processor, begins', [
    ({}, None, False), ({'add_bos_token': True}, None, True), ({}, 'TemplateProcessing', True),
    ({'add_bos_token': False}, 'TemplateProcessing', False)])
def test_a_folder_says_whether_a_text_begins_with_a_token(tmp_path, byte_level, config, processor,
                                                          begins):
    gpt2_of_transformers(vocab_size=300).save_pretrained(tmp_path)
    single = [{'SpecialToken': {'id': '<s>'}}, {'Sequence': {'id': 'A'}}]
    steps = [{'type': 'ByteLevel'}, {'type': processor, 'single': single}]
    write_tokenizer(tmp_path, byte_level, config=config,
                    post_processor={'type': 'Sequence', 'processors': steps})
    found = checkpoint.load(str(tmp_path))
    tokenizer = checkpoint.tokenizer_of(found)
    assert checkpoint.beginning_of(found, tokenizer) == ([0] if begins else [])
