"""Exports that transformers loads, and folders that it wrote: same logits, text, token ids."""
import dataclasses
import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import folio.checkpoint
import folio.tokenizer
from conftest import ROOT, SHARED, TINY, run, shared
from extras import export as script
from folio import engine
from folio.configurator import UserError
from folio.hugging_face import hub_errors, template_of, to_hugging_face
from hub import Hub
from model import GPT, GPTConfig

transformers = pytest.importorskip('transformers')
tokenizers = pytest.importorskip('tokenizers')
hypothesis = pytest.importorskip('hypothesis')
st = hypothesis.strategies
VALID_TEXT = st.text(st.characters(exclude_categories=['Cs']))  # all but lone surrogates
HARD = ['', ' ', '\n', '<|endoftext|>', 'a<|endoftext|><|endoftext|> b',
        'naïve café, x\u0301 e\u0301\u0323', '日本語 中文 한국어', '👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽',
        'שלום \u202e مرحبا \u2067', '\x00', 'a\x00b\x00\x00',
        '\x01\x02\x1b\x7f\x85\ufeff\ufffd', '  two   three    ', '\n\n\n a\r\n\r\nb\r\t\t c\v\f',
        '1234 ½ ² Ⅷ ٣', '\u00a0\u2003\u3000 \u2028', "I'll we've 'tis DON'T x's",
        '<unknown> [UNK]', chr(0x10ffff), 'a' * 300, ' ' * 300, '\n' * 300, 'ab' * 200,
        'aaaa bbbbb' * 20]
BOOK = SHARED / 'books' / 'pride_and_prejudice.txt'


def random_model(vocab_size=101, **fields):
    """Return a small model; weights, gains and biases are large enough for sharp predictions."""
    torch.manual_seed(0)
    sizes = dict(block_size=32, vocab_size=vocab_size, n_layer=3, n_head=4, n_embd=48)
    model = GPT(GPTConfig(**(sizes | fields))).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def write(folder, model, eot=None):
    hf, tensors = to_hugging_face(model.config, model.state_dict(), eot)
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(hf))
    tensors = {name: w.contiguous() for name, w in tensors.items()}
    save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
    return folder


def export(folder, status=0, **settings):
    """Run export.py in a folder; return what it says on standard error."""
    args = [f'--{key}={value}' for key, value in settings.items()]
    return run('extras/export.py', *args, cwd=folder, status=status)[1]


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


@torch.no_grad()
def assert_same_logits(ours, theirs):
    idx_BT = torch.randint(ours.config.vocab_size, (1, ours.config.block_size))
    logits_BTV, _ = ours(idx_BT, all_logits=True)
    torch.testing.assert_close(logits_BTV, theirs(idx_BT).logits, atol=1e-4, rtol=1e-4)


# ---- What transformers wrote ---------------------------------------------------------------------
def gpt2_of_transformers(**fields):
    config = dict(vocab_size=101, n_positions=64, n_embd=48, n_layer=2, n_head=4,
                  initializer_range=0.2, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**(config | fields))).eval()


def nanochat_of_transformers(**fields):
    sizes = dict(vocab_size=101, max_position_embeddings=64, hidden_size=48, intermediate_size=192,
                 num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2)
    config = transformers.NanoChatConfig(**(sizes | fields))
    return transformers.NanoChatForCausalLM(config).eval()


@pytest.mark.parametrize('make', [gpt2_of_transformers, nanochat_of_transformers])
@pytest.mark.parametrize('shard', ['20KB', '1GB'])
def test_folder_of_one_or_many_files_gives_the_same_logits(tmp_path, make, shard):
    torch.manual_seed(0)
    theirs = make()
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob('*.safetensors'))) > 3) == (shard == '20KB')
    ours = GPT.from_pretrained(folio.checkpoint.load(str(tmp_path))).eval()
    assert ours.config.arch == ('gpt2' if make is gpt2_of_transformers else 'modern')
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize('make, field, value', [
    (gpt2_of_transformers, 'n_inner', 100),
    (gpt2_of_transformers, 'tie_word_embeddings', False),
    (gpt2_of_transformers, 'scale_attn_by_inverse_layer_idx', True),
    (gpt2_of_transformers, 'layer_norm_epsilon', 1e-6),
    (gpt2_of_transformers, 'activation_function', 'relu'),
    (nanochat_of_transformers, 'num_key_value_heads', 2),
    (nanochat_of_transformers, 'intermediate_size', 100),
    (nanochat_of_transformers, 'head_dim', 64),
    (nanochat_of_transformers, 'hidden_act', 'silu'),
    (nanochat_of_transformers, 'rms_norm_eps', 1e-5),
    (nanochat_of_transformers, 'final_logit_softcapping', 30.0),
    (nanochat_of_transformers, 'final_logit_softcapping', None),
    (nanochat_of_transformers, 'attention_bias', True),
    (nanochat_of_transformers, 'tie_word_embeddings', True),
    (nanochat_of_transformers, 'rope_parameters', {'rope_type': 'default', 'rope_theta': 1e5}),
    (nanochat_of_transformers, 'rope_parameters',
     {'rope_type': 'linear', 'rope_theta': 1e4, 'factor': 2.0}),
])
def test_a_model_of_another_kind_is_refused(tmp_path, make, field, value):
    make().save_pretrained(tmp_path)
    hf = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(hf | {field: value}))
    with pytest.raises(UserError, match=f'model.py cannot be, by its .*{field} = '):
        GPT.from_pretrained(folio.checkpoint.load(str(tmp_path)))


@pytest.mark.parametrize('make', [gpt2_of_transformers, nanochat_of_transformers])
def test_damaged_folder_is_one_clear_error(tmp_path, make):
    make().save_pretrained(tmp_path, max_shard_size='20KB')
    config = tmp_path / 'config.json'
    shard = max(tmp_path.glob('*.safetensors'))
    settings = config.read_text()
    tensors = shard.read_bytes()
    more_layers = settings.replace('_layers": 2', '_layers": 3').replace('r": 2', 'r": 3')
    for damage in [lambda: shard.unlink(),
                   lambda: shard.write_bytes(tensors[:-100]),
                   lambda: config.write_text('[1]'),
                   lambda: config.write_text(more_layers),
                   lambda: config.write_text(settings.replace(': 64', ': null')),
                   lambda: (tmp_path / 'model.safetensors.index.json').unlink()]:
        damage()
        with pytest.raises(UserError, match='damaged|not a Hugging Face folder|does not fit'):
            folio.checkpoint.build(GPT, folio.checkpoint.load(str(tmp_path)))
        config.write_text(settings)
        shard.write_bytes(tensors)


# ---- The hub -------------------------------------------------------------------------------------
def test_any_error_of_the_hub_is_one_line_that_says_what_to_do():
    with pytest.raises(UserError) as caught:
        with hub_errors('FineWeb could not be listed'):
            raise LookupError('no such data set\nand much more')
    assert str(caught.value) == ('FineWeb could not be listed (LookupError: no such data set); '
                                 'check the network')
    with pytest.raises(UserError, match='^it could not be read .ValueError: broken.$'):
        with hub_errors('it could not be read', remedy=''):
            raise ValueError('broken')


def test_our_own_errors_and_ctrl_c_go_through_the_hubs():
    for error in (UserError('no column text'), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught:
            with hub_errors('it could not be read'):
                raise error
        assert caught.value is error


# ---- What we write -------------------------------------------------------------------------------
KINDS = [dict(arch='gpt2'), dict(arch='gpt2', bias=False),
         dict(arch='gpt2', gelu='none', bias=False, dropout=0.1),
         dict(arch='modern'), dict(arch='modern', window=32, n_embd=64)]


@pytest.mark.parametrize('fields', KINDS, ids=str)
def test_export_gives_the_same_logits_and_the_same_greedy_text(tmp_path, fields):
    ours = random_model(**fields)
    theirs = load(write(tmp_path / 'hf', ours))
    name_of = {'gpt2': 'GPT2LMHeadModel', 'modern': 'NanoChatForCausalLM'}
    assert type(theirs).__name__ == name_of[ours.config.arch]
    assert theirs.get_input_embeddings().weight.shape[0] == 101
    assert theirs.get_output_embeddings().weight.shape[0] == 101
    assert_same_logits(ours, theirs)
    for prompt in ([5], [1, 2, 3, 1, 2]):
        text = theirs.generate(torch.tensor([prompt]), max_new_tokens=25, do_sample=False)[0]
        steps = engine.generate(ours, torch.tensor([prompt]), 25, strategy='greedy')
        assert text.tolist() == prompt + [token.item() for token in steps]


@pytest.mark.parametrize('fields', KINDS, ids=str)
def test_export_and_back_is_bitwise_identical(tmp_path, fields):
    ours = random_model(**fields)
    ours.transformer.wte.weight.data[101:] = 0
    ours.lm_head.weight.data[101:] = 0
    again = GPT.from_pretrained(folio.checkpoint.load(str(write(tmp_path / 'hf', ours))))
    before = ours.state_dict()
    after = again.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # With bias=False the zeros that were written come back as biases.
    added = after.keys() - before.keys()
    assert all(name.endswith('.bias') and not after[name].any() for name in added)
    assert bool(added) == (fields.get('bias') is False)
    assert again.config.gelu == ours.config.gelu


def test_window_cannot_be_exported():
    with pytest.raises(UserError, match='--window=0'):
        to_hugging_face(GPTConfig(window=8), {}, None)


@dataclasses.dataclass
class Edited(GPTConfig):
    slope: float = 0.0


@pytest.mark.parametrize('arch', ['gpt2', 'modern'])
def test_a_field_that_transformers_lacks_needs_its_default(arch):
    model = random_model(arch=arch)
    for slope in (0.0, 0.5):
        config = Edited(**vars(model.config), slope=slope)
        if slope == 0:
            to_hugging_face(config, model.state_dict(), None)
        else:
            with pytest.raises(UserError, match='slope is 0.5, and transformers has no such model'):
                to_hugging_face(config, model.state_dict(), None)


@pytest.mark.parametrize('arch', ['gpt2', 'modern'])
@pytest.mark.parametrize('name, shape', [
    ('transformer.h.1.attn.c_attn.weight', (96, 48)),  # grouped queries
    ('transformer.h.0.mlp.c_fc.weight', (128, 48)),  # another width
    ('transformer.h.0.mlp.experts.0.weight', (48, 48)),  # a mixture of experts
    ('second_head.weight', (101, 48)),  # a head for the token after the next
    ('transformer.wte.weight', None),
])
def test_a_weight_that_transformers_lacks_is_refused_by_name(arch, name, shape):
    model = random_model(arch=arch)
    weights = model.state_dict()
    if shape is None:
        weights[name] = torch.zeros(64, 48)
    else:
        weights[name] = torch.zeros(shape)
    with pytest.raises(UserError, match=f'transformers has no such model: the weight {name} is'):
        to_hugging_face(model.config, weights, None)


# ---- Tokenizers ----------------------------------------------------------------------------------
def novel():
    return BOOK.read_text(encoding='utf-8') if BOOK.exists() else ''


def save_model(path, model, spec):
    """Write a checkpoint of a model and the spec of its tokenizer."""
    folio.checkpoint.save(str(path), {
        'model': model.state_dict(), 'model_args': vars(model.config), 'tokenizer': spec})


def load_tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope='module', params=['char', 'bpe', 'gpt2', 'hugging_face'])
def pair(request, tmp_path_factory):
    """Return (our tokenizer, what AutoTokenizer makes of the folder that export.py wrote)."""
    folder = tmp_path_factory.mktemp(request.param)
    runs = ['a' * n + ' ' * n + 'ab' * n for n in range(1, 50)]
    if request.param == 'gpt2':
        shared('tiktoken')
        theirs = gpt2_of_transformers(vocab_size=50257, n_embd=8, n_layer=1)
        theirs.save_pretrained(folder / 'weights')
        export(folder, init_from='weights', to='hf')
        return folio.tokenizer.load('gpt2'), load_tokenizer(folder / 'hf')
    if request.param == 'hugging_face':  # others' control tokens come first
        trained = tokenizers.ByteLevelBPETokenizer()
        trained.train_from_iterator(runs + HARD * 2 + [novel()[:100000]], vocab_size=1000,
                                    special_tokens=['<|endoftext|>', '<pad>'])
        theirs = gpt2_of_transformers(vocab_size=trained.get_vocab_size(), n_embd=8, n_layer=1)
        theirs.save_pretrained(folder / 'weights')
        trained.save(str(folder / 'weights' / 'tokenizer.json'))
        export(folder, init_from='weights', to='hf')
        ours = folio.tokenizer.load(str(folder / 'weights'))
        for text in HARD:
            if '<|endoftext|>' not in text:
                assert trained.encode(text).ids == ours.encode(text)
        assert folio.tokenizer.load(str(folder / 'hf')).spec == ours.spec
        return ours, load_tokenizer(folder / 'hf')
    if request.param == 'char':
        ours = folio.tokenizer.CharTokenizer(''.join(sorted(set(novel() + ''.join(HARD)))))
    else:
        ours = folio.tokenizer.train_bpe(runs + HARD * 2 + [novel()[:100000]], 1000)
    model = random_model(ours.n_vocab, n_layer=1, n_embd=8)
    save_model(folder / 'ckpt.pt', model, ours.spec)
    export(folder, out_dir='.')
    return ours, load_tokenizer(folder / 'hf')


def assert_same(pair, text):
    ours, theirs = pair
    ids = ours.encode(text)
    assert theirs(text)['input_ids'] == theirs.encode(text) == ids
    assert theirs.decode(ids) == ours.decode(ids) == text
    assert ours.eot not in ids


def test_tokenizer_gives_the_same_ids_and_text_on_hard_unicode(pair):
    for text in HARD:
        assert_same(pair, text)


def test_tokenizer_gives_the_same_ids_and_text_on_a_book(pair):
    assert_same(pair, shared('books/pride_and_prejudice.txt').read_text(encoding='utf-8'))


def test_tokenizer_gives_the_same_ids_on_runs(pair):
    for unit in ('a', ' ', '\n', 'ab', 'aab', 'a ', ' a'):
        for n in range(1, 140):
            assert_same(pair, unit * n)


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(st.one_of(VALID_TEXT, st.text('aab \n<|>'),
                            st.lists(st.sampled_from(HARD), max_size=4).map(''.join)))
def test_tokenizer_gives_the_same_ids_and_text_on_any_unicode(pair, text):
    if pair[0].eot is None:
        text = ''.join(c for c in text if c in pair[0].id_of)
    assert_same(pair, text)


def test_control_token_has_its_id_and_no_spelling(pair):
    ours, theirs = pair
    assert theirs.eos_token_id == theirs.bos_token_id == ours.eot and len(theirs) == ours.n_vocab
    if ours.eot is not None:
        assert theirs.eos_token == theirs.decode([ours.eot]) == '<|endoftext|>'
        assert theirs.decode([ours.eot], skip_special_tokens=True) == ''


def test_inputs_are_what_both_models_take(pair):
    assert set(pair[1]('ab', return_tensors='pt')) == {'input_ids', 'attention_mask'}


@pytest.mark.parametrize('pair', ['bpe'], indirect=True)
def test_exported_merges_are_those_that_were_learned(pair):
    ours, theirs = pair
    merges = json.loads(theirs.backend_tokenizer.to_str())['model']['merges']
    spelled = theirs.convert_ids_to_tokens(range(256))
    for exported, learned in zip(merges, ours.spec['merges'], strict=True):
        assert exported == [''.join(spelled[b] for b in part.encode('latin-1')) for part in learned]


def test_character_that_the_model_never_saw_is_an_error(pair):
    if pair[0].eot is None:
        with pytest.raises(Exception, match='UNK'):
            pair[1]('\u0dde')


# ---- The same text in every engine ---------------------------------------------------------------
TEMPLATE = 'Q: {}\nA:\n'
WHO = TEMPLATE.replace('{}', 'who?')
WHAT = TEMPLATE.replace('{}', 'what?')
CHAT = [{'role': 'user', 'content': 'who?'}, {'role': 'assistant', 'content': 'me'},
        {'role': 'user', 'content': 'what?'}]
STORY = 'one two three four'
ELSEWHERE = 'one two nine eight'  # where no document begins


TUNED = ['gpt2-bpe', 'gpt2-gpt2', 'modern-bpe', 'modern-gpt2']  # architecture, tokenizer


@pytest.fixture(scope='module', params=[*TUNED, 'gpt2-char', 'modern-char'])
def learned(request, tmp_path_factory):
    """A folder with ckpt.pt, a model that knows the documents by heart, and with its export hf.

    What it continues 'one two' with depends on whether the end-of-text token comes before that.
    """
    arch, kind = request.param.split('-')
    texts = [STORY, WHO + 'me', WHAT + 'a bee', ELSEWHERE]
    if kind == 'char':
        tokenizer = folio.tokenizer.CharTokenizer(''.join(sorted(set(''.join(texts)))))
        rows = [torch.tensor(tokenizer.encode(STORY))]
    else:
        if kind == 'gpt2':
            shared('tiktoken')
            tokenizer = folio.tokenizer.load('gpt2')
        else:
            tokenizer = folio.tokenizer.train_bpe(texts * 5, 280)
        eot = [tokenizer.eot]
        story, who, what, elsewhere = (tokenizer.encode(text) + eot for text in texts)
        rows = [eot + story, eot + who, eot + who + what, elsewhere]
        rows = [torch.tensor(row) for row in rows]
    rows = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=2,
                          n_embd=32, arch=arch))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        _, loss = model(rows[:, :-1].clamp(min=0), rows[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp('learned')
    args = dataclasses.asdict(model.config)
    folio.checkpoint.save(str(folder / 'ckpt.pt'), {
        'model': model.state_dict(), 'model_args': args, 'tokenizer': tokenizer.spec,
        'template': None if kind == 'char' else TEMPLATE, 'config': {'dataset': kind}})
    export(folder, out_dir='.', to='hf')
    return folder


def sampled(folder, *options):
    text, _ = run('sample.py', '--start=one two', '--max_new_tokens=11', '--strategy=greedy',
                  '--device=cpu', '--dtype=float32', *options, cwd=folder)
    return text.removesuffix('\n')


def answered(folder, *options, questions='who?\nwhat?\n'):
    """Return what sample.py --chat answers to two questions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'stdin', io.StringIO(questions))
        text, _ = run('sample.py', '--chat=True', '--max_new_tokens=11', '--strategy=greedy',
                      '--device=cpu', '--dtype=float32', *options, cwd=folder)
    return text.split('\n')[:2]


def test_a_models_export_continues_a_prompt_alike(learned):
    assert sampled(learned, '--out_dir=.') == STORY
    assert sampled(learned, '--init_from=hf') == STORY
    inputs = load_tokenizer(learned / 'hf')('one two', return_tensors='pt')
    ids = load(learned / 'hf').generate(**inputs, max_new_tokens=11, do_sample=False)[0]
    assert load_tokenizer(learned / 'hf').decode(ids, skip_special_tokens=True) == STORY


@pytest.mark.parametrize('learned', TUNED, indirect=True)
def test_a_tuned_models_export_answers_alike(learned):
    tokenizer = folio.tokenizer.load(str(learned / 'hf'))
    assert answered(learned, '--out_dir=.') == ['me', 'a bee']
    assert answered(learned, '--init_from=hf') == ['me', 'a bee']
    theirs = load_tokenizer(learned / 'hf')
    expected = []
    for turn in (WHO + 'me', WHAT):
        expected += [tokenizer.eot, *tokenizer.encode(turn)]
    inputs = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors='pt',
                                        return_dict=True)
    assert inputs['input_ids'].tolist() == [expected]
    ids = load(learned / 'hf').generate(**inputs, max_new_tokens=11, do_sample=False)[0]
    assert theirs.decode(ids[len(expected):], skip_special_tokens=True) == 'a bee'


def test_a_template_of_any_characters_comes_back():
    template = 'Say "{}" in {{ x }} {% y %}, \\ é 日本:\n\t'
    config = {'bos_token': '<|endoftext|>'}
    assert template_of(script.to_chat_template(template), config, ['<|endoftext|>']) == template


def test_a_folder_saved_again_by_transformers_is_the_same(learned):
    load(learned / 'hf').save_pretrained(learned / 'again')
    load_tokenizer(learned / 'hf').save_pretrained(learned / 'again')
    before = folio.checkpoint.load(str(learned))
    after = folio.checkpoint.load(str(learned / 'again'))
    assert after['tokenizer'] == before['tokenizer'] and after['template'] == before['template']
    idx_BT = torch.tensor([[1, 2, 3, 4, 5]])
    logits_BTV, _ = GPT.from_pretrained(before).eval()(idx_BT, all_logits=True)
    again_BTV, _ = GPT.from_pretrained(after).eval()(idx_BT, all_logits=True)
    assert torch.equal(logits_BTV, again_BTV)
    assert sampled(learned, '--init_from=again') == STORY
    if after['template']:
        assert answered(learned, '--init_from=again') == ['me', 'a bee']


def test_pipeline_with_its_defaults_stays_in_the_context(learned):
    pipeline = transformers.pipeline('text-generation', model=str(learned / 'hf'), device='cpu')
    assert pipeline('one two', do_sample=False)[0]['generated_text'].startswith('one two three')


# ---- llama.cpp -----------------------------------------------------------------------------------
def serve(path):
    """Return llama.cpp's server of a .gguf, in this process."""
    xllamacpp = pytest.importorskip('xllamacpp')
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 64
    params.n_parallel = 1
    params.cpuparams.n_threads = 1
    return xllamacpp.Server(params)


@pytest.mark.parametrize('learned', ['gpt2-bpe', 'gpt2-gpt2'], indirect=True)
@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_llama_cpp_continues_and_answers_alike(learned, dtype):
    pytest.importorskip('gguf')
    tokenizer = folio.tokenizer.load(str(learned / 'hf'))
    export(learned, out_dir='.', to=f'{dtype}.gguf', dtype=dtype)
    server = serve(learned / f'{dtype}.gguf')
    done = server.handle_completions({'prompt': 'one two', 'max_tokens': 11, 'temperature': 0})
    assert done['choices'][0]['text'] == ' three four'
    assert done['usage']['prompt_tokens'] == 1 + len(tokenizer.encode('one two'))
    done = server.handle_chat_completions({'messages': CHAT, 'max_tokens': 11, 'temperature': 0})
    assert done['choices'][0]['message']['content'] == 'a bee'
    n_tokens = sum(1 + len(tokenizer.encode(turn)) for turn in (WHO + 'me', WHAT))
    assert done['usage']['prompt_tokens'] == n_tokens


def test_a_gguf_with_the_exact_gelu_comes_with_a_notice(tmp_path):
    pytest.importorskip('gguf')
    spec = folio.tokenizer.train_bpe([], 257).spec
    save_model(tmp_path / 'ckpt.pt', random_model(257, gelu='none'), spec)
    said = export(tmp_path, out_dir='.', to='a.gguf')
    assert 'llama.cpp computes the tanh form of GELU' in said


# ---- The script ----------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def trained_once(book_once, tmp_path_factory):
    folder = shutil.copytree(book_once, tmp_path_factory.mktemp('trained') / 'work')
    run('train.py', *TINY, '--arch=modern', cwd=folder)
    return folder


@pytest.fixture
def trained(trained_once, tmp_path):
    """Return a folder of the test's own with a run in out/."""
    return shutil.copytree(trained_once, tmp_path / 'work')


def test_the_model_card_says_how_to_load_the_model(trained, monkeypatch, capsys):
    export(trained, out_dir='out', to='hf')
    card = (trained / 'hf' / 'README.md').read_text()
    checkpoint = folio.checkpoint.load(str(trained / 'out' / 'ckpt.pt'))
    n_parameters = load(trained / 'hf').num_parameters()
    for fact in ['NanoChatForCausalLM: 2 layers, 2 heads, width 32, context of 32',
                 f'parameters: {n_parameters:,}', 'stored as float32', 'tokenizer: char',
                 'data set: book', 'trained for 30 steps',
                 f'{checkpoint["best_val_loss"]:.4f} nats',
                 'transformers 5', 'vllm serve hf --dtype=float32']:
        assert fact in card
    monkeypatch.chdir(trained)
    exec(card.split('```python\n')[1].split('```')[0], {})  # which a reader pastes
    assert capsys.readouterr().out.startswith('The')


def test_weights_are_stored_as_asked(trained):
    export(trained, out_dir='out', dtype='bfloat16')
    exported = load(trained / 'out' / 'hf').lm_head.weight
    checkpoint = folio.checkpoint.load(str(trained / 'out' / 'ckpt.pt'))
    trained_head = checkpoint['model']['lm_head.weight'][:len(exported)]
    assert exported.dtype == torch.bfloat16
    assert torch.equal(exported, trained_head.bfloat16())
    files = {'ckpt.pt', 'best.pt', 'log.jsonl', 'model.py', 'lock', 'hf'}
    assert set(os.listdir(trained / 'out')) == files


def test_an_export_is_never_written_over(trained):
    export(trained, out_dir='out', to='hf')
    kept = {path.name: path.read_bytes() for path in (trained / 'hf').iterdir()}
    said = export(trained, out_dir='out', to='hf', dtype='float16', status=2)
    assert 'hf is there already: remove it, or give another --to' in said
    assert {path.name: path.read_bytes() for path in (trained / 'hf').iterdir()} == kept
    (trained / 'empty').mkdir()
    export(trained, out_dir='out', to='empty/')
    assert (trained / 'empty' / 'config.json').exists()


def test_openai_weights_come_from_the_hub_though_a_transfer_breaks(tmp_path):
    gpt2_of_transformers(n_layer=1).save_pretrained(tmp_path / 'theirs')
    files = {name: (tmp_path / 'theirs' / name).read_bytes()
             for name in ('config.json', 'model.safetensors')}
    hub = Hub({'openai-community/gpt2-medium': files})
    hub.trouble = ['ok', 'cut']
    program = ('import sys\n'
               'from folio.configurator import report\n'
               'sys.excepthook = report\n'
               'from model import GPT\n'
               'from folio import checkpoint\n'
               'model = GPT.from_pretrained(checkpoint.load("gpt2-medium"))\n'
               'print(sum(p.double().sum().item() for p in model.parameters()))\n')
    environment = os.environ | hub.environment(tmp_path / 'hub') | {'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, '-c', program], env=environment, capture_output=True,
                          text=True, timeout=200)
    hub.server.shutdown()
    model = GPT.from_pretrained(folio.checkpoint.load(str(tmp_path / 'theirs')))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == sum(p.double().sum().item() for p in model.parameters())
    assert not hub.trouble  # all of it came


def test_no_space_left_leaves_nothing(trained):
    limit = 20000
    _, error = run('extras/export.py', '--out_dir=out', '--to=hf', cwd=trained, status=2,
                   preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert error.startswith('error: could not write hf') and error.count('\n') == 1
    assert not (trained / 'hf').exists()


def test_an_export_that_cannot_work_is_refused(trained):
    pytest.importorskip('gguf')
    spec = {'kind': 'char', 'chars': ''.join(map(chr, range(101)))}
    save_model(trained / 'window.pt', random_model(window=8), spec)
    save_model(trained / 'gpt2.pt', random_model(), spec)
    gpt2_of_transformers().save_pretrained(trained / 'theirs')
    before = {path: path.stat().st_mtime_ns for path in trained.rglob('*')}
    mistakes = [
        ({'out_dir': 'none'}, 'no checkpoint none/ckpt.pt'),
        ({'dtype': 'int8'}, 'bfloat16'),
        ({'to': 'book.txt'}, 'give another --to'),
        ({'to': 'theirs'}, 'give another --to'),
        ({'init_from': 'window.pt'}, '--window=0'),
        ({'init_from': 'theirs', 'to': 'new'}, "its 101 tokens are not GPT-2's 50257"),
        ({'to': 'new.gguf'}, 'llama.cpp does not have the architecture modern'),
        ({'init_from': 'gpt2.pt', 'to': 'new.gguf'}, 'llama.cpp has no tokenizer of characters'),
    ]
    for settings, message in mistakes:
        said = export(trained, status=2, **({'out_dir': 'out'} | settings))
        assert message in said
        assert said.count('\n') == 1
    assert {path: path.stat().st_mtime_ns for path in trained.rglob('*')} == before


@pytest.mark.parametrize('package, to', [('tokenizers', 'hf'), ('gguf', 'a.gguf')])
def test_without_a_package_the_command_that_installs_it_is_said(trained, package, to):
    (trained / 'shadow').mkdir()
    (trained / 'shadow' / f'{package}.py').write_text('raise ImportError')
    environment = os.environ | {'PYTHONPATH': str(trained / 'shadow')}
    _, error = run('extras/export.py', '--out_dir=out', f'--to={to}', cwd=trained, status=2,
                   env=environment)
    assert error == f'error: export needs a package: pip install {package}\n'
    assert not (trained / to).exists()


def test_a_nanogpt_checkpoint_is_exported_with_its_characters(tmp_path):
    """Its checkpoint has no tokenizer; the characters are in data/shakespeare_char/meta.pkl."""
    text = 'To be, or not to be'
    chars = sorted(set(text))
    ours = random_model(len(chars), bias=False, gelu='none')
    weights = ours.state_dict()
    for name in ('transformer.wte.weight', 'lm_head.weight'):
        weights[name] = weights[name][:len(chars)]
    args = {'n_layer': 3, 'n_head': 4, 'n_embd': 48, 'block_size': 32, 'bias': False,
            'vocab_size': len(chars), 'dropout': 0.0}
    torch.save({'model': weights, 'optimizer': {}, 'model_args': args, 'iter_num': 20,
                'best_val_loss': torch.tensor(3.5), 'config': {'dataset': 'shakespeare_char'}},
               tmp_path / 'ckpt.pt')
    data = tmp_path / 'data' / 'shakespeare_char'
    data.mkdir(parents=True)
    meta = {'vocab_size': len(chars), 'itos': dict(enumerate(chars)),
            'stoi': {c: i for i, c in enumerate(chars)}}
    (data / 'train.bin').touch()
    (data / 'meta.pkl').write_bytes(pickle.dumps(meta))
    export(tmp_path, out_dir='.', to='hf')
    tokenizer = load_tokenizer(tmp_path / 'hf')
    assert tokenizer.decode(tokenizer(text)['input_ids']) == text
    assert_same_logits(ours, load(tmp_path / 'hf'))
