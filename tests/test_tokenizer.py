"""folio/tokenizer.py and folio/bpe.py: text to tokens and back, and how a BPE is learned."""
import collections
import random
import subprocess
import sys

import pytest
import regex

import folio.tokenizer
from conftest import ROOT, shared
from folio import bpe
from folio.configurator import UserError

hypothesis = pytest.importorskip('hypothesis')
st = hypothesis.strategies
VALID_TEXT = st.text(st.characters(exclude_categories=['Cs']))  # all but lone surrogates
HARD = 'naïve café — 日本語 👩‍👩‍👧 \u0000 \u202e <|endoftext|> \r\n\t  x\u0301 ' + chr(0x10ffff)
TRAINED = folio.tokenizer.train_bpe(['the cat sat on the mat, the end. ' * 20, HARD * 3], 330)


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(VALID_TEXT)
def test_bpe_round_trips_any_unicode(text):
    ids = TRAINED.encode(text)
    assert TRAINED.decode(ids) == text
    assert TRAINED.decode_bytes(ids) == text.encode()
    assert TRAINED.eot not in ids


@hypothesis.settings(deadline=None)
@hypothesis.given(VALID_TEXT)
def test_char_round_trips_what_it_knows(text):
    tokenizer = folio.tokenizer.CharTokenizer(''.join(sorted(set(text))))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gpt2_is_gpt2():
    shared('tiktoken')
    tokenizer = folio.tokenizer.load('gpt2')
    assert tokenizer.encode('Hello world, hello!') == [15496, 995, 11, 23748, 0]
    assert tokenizer.n_vocab == 50257
    assert tokenizer.eot == 50256
    assert tokenizer.eot not in tokenizer.encode('<|endoftext|>')
    assert tokenizer.decode(tokenizer.encode(HARD)) == HARD


MOSTLY_WHITE = st.text("ab1 \n\t\x1c\x85\u2003.'s")


@pytest.mark.parametrize('tokenizer', [TRAINED, folio.tokenizer.CharTokenizer('ab\n😀é')],
                         ids=['bpe', 'char'])
def test_save_and_load_give_the_same_tokenizer(tmp_path, tokenizer):
    folio.tokenizer.save(tokenizer, tmp_path / 'tokenizer.json')
    for source in (str(tmp_path), str(tmp_path / 'tokenizer.json'), tokenizer.spec):
        again = folio.tokenizer.load(source)
        assert again.spec == tokenizer.spec
        assert again.encode('ab\nab') == tokenizer.encode('ab\nab')
        assert again.n_vocab == tokenizer.n_vocab
        assert again.eot == tokenizer.eot


def test_the_hash_of_a_tokenizer_is_that_of_its_ids_alone():
    spec = TRAINED.spec
    reordered = dict(reversed(spec.items()))
    assert folio.tokenizer.spec_hash(reordered) == folio.tokenizer.spec_hash(spec)
    shorter = spec | {'merges': spec['merges'][:-1]}
    assert folio.tokenizer.spec_hash(shorter) != folio.tokenizer.spec_hash(spec)


@pytest.mark.parametrize('source, says', [
    ({'kind': 'word'}, "unknown kind of tokenizer 'word'"),
    ({'kind': 'char'}, "a damaged tokenizer .KeyError: 'chars'"),
    ({'kind': 'bpe', 'pattern': '.', 'merges': 3}, 'a damaged tokenizer'),
    ('nowhere', 'no tokenizer in nowhere'),
])
def test_another_kind_of_tokenizer_is_one_line(source, says):
    with pytest.raises(UserError, match=says):
        folio.tokenizer.load(source)


def test_char_names_the_characters_it_never_saw():
    with pytest.raises(UserError, match="'x'.*'y'"):
        folio.tokenizer.CharTokenizer('abc').encode('abxy')


PIECES = st.dictionaries(st.text('aab ', max_size=12), st.integers(1, 5), max_size=12)


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(PIECES, st.integers(0, 40))
def test_the_fast_merges_are_the_slow_ones(piece_counts, n_merges):
    slow = bpe.learn_merges_slowly(piece_counts, n_merges)
    assert bpe.learn_merges(piece_counts, n_merges) == slow


def test_the_fast_merges_are_the_slow_ones_on_prose():
    text = shared('books/pride_and_prejudice.txt').read_text(encoding='utf-8')[:50_000]
    piece_counts = bpe.count_pieces([text], folio.tokenizer.SPLIT_PATTERN)
    slow = bpe.learn_merges_slowly(piece_counts, 200)
    assert len(slow) == 200
    assert bpe.learn_merges(piece_counts, 200) == slow


def encode_merge_by_merge(tokenizer, text):
    id_of = {bytes([i]): i for i in range(256)}
    pieces = [list(piece.encode()) for piece in regex.findall(folio.tokenizer.SPLIT_PATTERN, text)]
    for merge in tokenizer.spec['merges']:
        left, right = [token.encode('latin-1') for token in merge]
        new = len(id_of)
        for ids in pieces:
            bpe.replace_pair(ids, (id_of[left], id_of[right]), new)
        id_of[left + right] = new
    return [i for ids in pieces for i in ids]


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(st.lists(st.text('aab c\n', max_size=60), max_size=4), VALID_TEXT)
def test_a_text_is_encoded_by_its_merges_in_their_order(texts, other):
    """Texts that it was trained on, and others."""
    for text in [*texts, other]:
        for tokenizer in (folio.tokenizer.train_bpe(texts, 290), TRAINED):
            assert tokenizer.encode(text) == encode_merge_by_merge(tokenizer, text)


def test_merges_make_different_tokens():
    """`load` refuses such a spec: a token is looked up by its bytes."""
    rng = random.Random(0)
    for _ in range(300):
        pieces = [''.join(rng.choices('aab', k=rng.randint(1, 40))) for _ in range(20)]
        merges = bpe.learn_merges(collections.Counter(pieces), n_merges=200)
        tokens = [left + right for left, right in merges]
        assert len(set(tokens)) == len(tokens) > 10


def test_the_merges_of_a_novel_are_those_of_rustbpe():
    rustbpe = pytest.importorskip('rustbpe')
    text = shared('books/pride_and_prejudice.txt').read_text(encoding='utf-8')
    piece_counts = bpe.count_pieces([text], folio.tokenizer.SPLIT_PATTERN)
    merges = bpe.learn_merges(piece_counts, 4000)
    theirs = rustbpe.Tokenizer()
    theirs.train_from_iterator(iter([text]), 4256, pattern=folio.tokenizer.SPLIT_PATTERN)
    ranks = sorted(theirs.get_mergeable_ranks(), key=lambda entry: entry[1])
    their_tokens = [bytes(token) for token, _ in ranks[256:]]
    assert [left + right for left, right in merges] == their_tokens


@hypothesis.settings(deadline=None)
@hypothesis.given(st.one_of(VALID_TEXT, MOSTLY_WHITE))
def test_a_long_text_has_its_pieces_however_it_is_cut(text):
    whole = collections.Counter(regex.findall(folio.tokenizer.SPLIT_PATTERN, text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, 'CHUNK_CHARS', 2)
        assert bpe.count_pieces([text], folio.tokenizer.SPLIT_PATTERN) == whole


def test_the_rarest_of_too_many_pieces_are_forgotten(monkeypatch):
    texts = [f' the {i} cat' for i in range(1000)]
    exact = bpe.count_pieces(texts, folio.tokenizer.SPLIT_PATTERN)
    assert len(exact) == 1002
    assert exact[' the'] == exact[' cat'] == 1000
    monkeypatch.setattr(bpe, 'CHUNK_CHARS', 100)
    monkeypatch.setattr(bpe, 'MAX_PIECES', 1002)
    assert bpe.count_pieces(texts, folio.tokenizer.SPLIT_PATTERN) == exact
    monkeypatch.setattr(bpe, 'MAX_PIECES', 50)
    kept = bpe.count_pieces(texts, folio.tokenizer.SPLIT_PATTERN)
    assert len(kept) <= 50
    assert kept[' the'] == kept[' cat'] == 1000


@pytest.mark.slow
def test_memory_of_training_does_not_grow_with_the_text():
    """A stream that is longer by 27 MB takes at most 8 MB more."""
    peaks = []
    for n in (30, 300):
        code = ('import resource\n'
                'from folio import tokenizer\n'
                "text = ' '.join(map(str, range(20000)))\n"
                f'tokenizer.train_bpe((text[i:] for i in range({n})), 300)\n'
                'print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)')
        command = [sys.executable, '-c', code]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 8, peaks


@pytest.mark.slow
def test_bpe_compresses_like_hugging_face_tokenizers():
    hf = pytest.importorskip('tokenizers')
    parquet = pytest.importorskip('pyarrow.parquet')
    texts = parquet.read_table(shared('textbooks/train-00000-of-00004.parquet'))['text'].to_pylist()
    ours = folio.tokenizer.train_bpe(texts, 8000)
    theirs = hf.Tokenizer(hf.models.BPE())
    theirs.pre_tokenizer = hf.pre_tokenizers.Sequence([
        hf.pre_tokenizers.Split(hf.Regex(folio.tokenizer.SPLIT_PATTERN), 'isolated'),
        hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    theirs.train_from_iterator(texts, hf.trainers.BpeTrainer(
        vocab_size=8000, special_tokens=['<|endoftext|>'], show_progress=False,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet()))
    assert ours.n_vocab == theirs.get_vocab_size() == 8000
    n_ours = sum(len(ours.encode(text)) for text in texts)
    n_theirs = sum(len(encoding.ids) for encoding in theirs.encode_batch(texts))
    assert n_ours == pytest.approx(n_theirs, rel=0.01)
    assert all(ours.decode(ours.encode(text)) == text for text in texts)


@pytest.mark.parametrize('texts', [['abcd'], []], ids=str)
def test_training_stops_where_nothing_repeats(texts):
    assert folio.tokenizer.train_bpe(texts, 1000).n_vocab == 257


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(UserError, match='257'):
        folio.tokenizer.train_bpe(['abcd'], 256)
