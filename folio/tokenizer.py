"""
Turn text into tokens and back: by characters, by a byte-level BPE trained here, or by GPT-2's.
    python -c "from folio import tokenizer; print(tokenizer.load('data/book').encode('The'))"

Each tokenizer has
    encode(text) -> list of ids
    decode(ids) -> str
    decode_bytes(ids) -> bytes
    n_vocab: the number of ids
    eot: the id between documents, or None
    start: the id to begin a text with: eot, or a line end if there is none
    spec: a dictionary of plain values that `load` turns into the same tokenizer again

Text is only ever text: the characters <|endoftext|> in it are encoded as characters, never as the
control token. A byte-level BPE that others trained can be read from Hugging Face's files.
"""
import hashlib
import json
import os
import re

from folio.configurator import UserError, notice

EOT = '<|endoftext|>'
MOST_WHITE = 900_000  # white characters in a row; more are cut, or tiktoken would crash
GPT2_HASH = '42083fc7477d771d'  # of the ids of GPT-2's 50,256 tokens, see spec_hash

# GPT-2's pattern cuts a text into pieces, and no token reaches from one piece into the next. Pieces
# are endings like 's; words, numbers and punctuation, each with the space before it; white space.
# The look-ahead leaves the last of several spaces to the word that follows.
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class CharTokenizer:
    def __init__(self, chars):
        """chars: the characters of the vocabulary, in the order of their ids."""
        self.spec = {'kind': 'char', 'chars': chars}
        self.n_vocab = len(chars)
        self.eot = None
        self.start = max(0, chars.find('\n'))  # id 0 if there is no line end
        self.id_of = {c: i for i, c in enumerate(chars)}

    def encode(self, text):
        unknown = sorted(set(text) - self.id_of.keys())
        if unknown:
            shown = ' '.join(repr(c) for c in unknown[:20])
            raise UserError(
                f'this model knows {self.n_vocab} characters and never saw {shown}; leave them '
                'out, or prepare the data with --tokenizer=bpe, which knows every character')
        return [self.id_of[c] for c in text]

    def decode(self, ids):
        chars = self.spec['chars']
        return ''.join(chars[i] for i in ids)

    def decode_bytes(self, ids):
        return self.decode(ids).encode('utf-8', 'surrogatepass')


class BPETokenizer:
    def __init__(self, encoding, spec):
        """encoding: a tiktoken.Encoding. Its EOT ends a text, unless the spec names another."""
        self.encoding = encoding
        self.spec = spec
        self.n_vocab = encoding.n_vocab
        self.eot = spec['eot'] if 'eot' in spec else encoding.eot_token
        self.start = self.encode('\n')[0] if self.eot is None else self.eot

    def encode(self, text):
        # A row of MOST_WHITE white characters has one of them at one of these places.
        if not any(c.isspace() for c in text[MOST_WHITE - 1::MOST_WHITE]):
            return self.encoding.encode_ordinary(text)
        ids = []
        for part in re.split(rf'((?<!\s)\s{{{MOST_WHITE},}})', text):
            step = MOST_WHITE if part.isspace() else len(text)
            for start in range(0, len(part), step):
                ids += self.encoding.encode_ordinary(part[start:start + step])
        return ids

    def decode(self, ids):
        return self.encoding.decode(ids)

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes(ids)


def without_surrogates(text):
    """Return a text that UTF-8 can spell: half of a surrogate pair becomes U+FFFD.

    JSON may hold half a pair, and tiktoken replaces it in the same way.

    >>> without_surrogates('a\\ud83d')
    'a�'
    """
    try:
        text.encode('utf-8')
        return text
    except UnicodeEncodeError:
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


# ---- Loading and saving --------------------------------------------------------------------------

def load(source):
    """Return a tokenizer from 'gpt2', a spec, a tokenizer.json, or the folder that it is in.

    The tokenizer.json is one that `save` wrote, or Hugging Face's: see `read_hugging_face`.
    GPT-2's files are downloaded once by tiktoken, into TIKTOKEN_CACHE_DIR if that is set. Raises
    UserError if there is no tokenizer, or if it is damaged or of an unknown kind.
    """
    if source == 'gpt2':
        return load_gpt2()
    spec = source if isinstance(source, dict) else read_spec(source)
    try:
        vocab_size_of(spec)
        if spec['kind'] == 'char':
            return CharTokenizer(spec['chars'])
        if spec['kind'] == 'bpe':
            return load_bpe(spec)
        if spec['kind'] == 'hugging_face':
            return load_ranks(spec)
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(
            f'a damaged tokenizer ({type(e).__name__}: {e}); run prepare.py again') from e
    return load_gpt2()  # outside the try: if the download fails, no tokenizer is damaged


def read_spec(path):
    """Return the spec in a tokenizer.json, or in a folder with one. Raises UserError."""
    if os.path.isdir(path):
        path = file_in(path) or os.path.join(path, 'tokenizer.json')
    try:
        with open(path, encoding='utf-8') as f:
            spec = json.load(f)
        if os.path.basename(path) == 'vocab.json':
            spec = as_tokenizer_json(spec, os.path.dirname(path))
        if 'model' in spec:
            return read_hugging_face(spec, path)
        vocab_size_of(spec)
        return spec
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise UserError(
            f'no tokenizer in {path} ({e}); name gpt2, a tokenizer.json that prepare.py wrote, or '
            'what --help lists') from None


def vocab_size_of(spec):
    """Return the number of tokens of a spec, without loading it.

    Raises KeyError, TypeError or ValueError if it is not a spec.
    """
    if spec['kind'] == 'char':
        return len(spec['chars'])
    if spec['kind'] == 'bpe':
        return 256 + len(spec['merges']) + 1
    if spec['kind'] == 'hugging_face':
        return len(spec['ranks']) + len(spec['special'])
    if spec['kind'] == 'gpt2':
        return 50257
    raise ValueError(f'unknown kind of tokenizer {spec["kind"]!r}; choose from char, bpe, gpt2, '
                     'hugging_face')


def control_tokens(spec):
    """Return {text: id} of the tokens of a spec that are never encoded from a text."""
    if spec['kind'] == 'char':
        return {}
    return spec.get('special', {EOT: vocab_size_of(spec) - 1})


def load_bpe(spec):
    """Return the tokenizer of a spec of kind bpe: 256 bytes, then its merges, then EOT.

    Raises KeyError, TypeError or ValueError for a damaged spec.
    """
    import tiktoken
    # A token's id is its place in this list. tiktoken joins the pair with the lowest id first.
    tokens = [chr(i) for i in range(256)]
    tokens += [left + right for left, right in spec['merges']]
    encoding = tiktoken.Encoding(
        'folio',
        pat_str=spec['pattern'],
        mergeable_ranks={token.encode('latin-1'): rank for rank, token in enumerate(tokens)},
        special_tokens={EOT: len(tokens)})
    return BPETokenizer(encoding, spec)


def load_ranks(spec):
    """Return the tokenizer of a spec of kind hugging_face: any byte-level BPE, tokens by ids.

    spec: {pattern, ranks, special, eot}; ranks and special are {token: id}, eot is an id or None.
    The pair that spells the token with the lowest id is joined first.
    """
    import tiktoken
    encoding = tiktoken.Encoding(
        'folio',
        pat_str=spec['pattern'],
        mergeable_ranks={token.encode('latin-1'): i for token, i in spec['ranks'].items()},
        special_tokens=spec['special'])
    return BPETokenizer(encoding, spec)


def load_gpt2():
    """Return GPT-2's tokenizer, downloaded by tiktoken if need be. Raises UserError."""
    import tiktoken
    try:
        return BPETokenizer(tiktoken.get_encoding('gpt2'), {'kind': 'gpt2'})
    except (OSError, ValueError) as e:
        # The errors of requests are OSErrors; a damaged file is a ValueError.
        raise UserError(
            "GPT-2's tokenizer could not be downloaded: go online once, or set TIKTOKEN_CACHE_DIR "
            f'to a folder that has it ({type(e).__name__})') from e


def save(tokenizer, path):
    """Write the spec as JSON; a byte of a merge becomes the Latin-1 character of that number."""
    with open(path, 'w', encoding='utf-8') as f:
        json.dump(tokenizer.spec, f)


def spec_hash(spec):
    """Return a fingerprint of a spec, or of another JSON value: 16 hexadecimal digits."""
    text = json.dumps(spec, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---- Hugging Face's files ------------------------------------------------------------------------

# How export.py writes a CharTokenizer: each character is a word of its own.
EACH_CHARACTER = {'type': 'Split', 'pattern': {'Regex': r'[\s\S]'}, 'behavior': 'Isolated',
                  'invert': False}


def byte_characters():
    """Return GPT-2's 256 characters: a printable byte as it is, chr(256), chr(257) … for others."""
    characters = []
    n_others = 0
    for b in range(256):
        if chr(b).isprintable() and chr(b) != ' ':
            characters.append(chr(b))
        else:
            characters.append(chr(256 + n_others))
            n_others += 1
    return characters


BYTE_CHARACTERS = byte_characters()
BYTE_OF = {character: b for b, character in enumerate(BYTE_CHARACTERS)}


def spell(token):
    """Return bytes as the text that stands for them in a vocabulary, a character for each byte.

    >>> spell(b' the')
    'Ġthe'
    """
    return ''.join(BYTE_CHARACTERS[b] for b in token)


def unspell(text):
    """Return the bytes of a token of a vocabulary as Latin-1 text, as in our specs; see `spell`."""
    return ''.join(chr(BYTE_OF[character]) for character in text)


def file_in(folder):
    """Return the path of the tokenizer in a Hugging Face folder, or None if it has none."""
    for name in ('tokenizer.json', 'vocab.json'):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return path
    return None


def read_json(path):
    """Return what a JSON file holds; {} if there is no such file."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding='utf-8') as f:
        return json.load(f)


def as_tokenizer_json(vocab, folder):
    """Return a tokenizer.json made of the vocab.json and merges.txt of an older GPT2Tokenizer."""
    with open(os.path.join(folder, 'merges.txt'), encoding='utf-8') as f:
        lines = f.read().split('\n')
    merges = [line for line in lines if line and not line.startswith('#version')]
    special = read_json(os.path.join(folder, 'added_tokens.json'))
    added = [{'content': token, 'id': i, 'special': True} for token, i in special.items()]
    return {'model': {'type': 'BPE', 'vocab': vocab, 'merges': merges}, 'added_tokens': added,
            'pre_tokenizer': {'type': 'ByteLevel', 'add_prefix_space': False}}


def read_hugging_face(saved, path):
    """Return the spec of Hugging Face's tokenizer.json, given its contents and its path.

    The kind is char, bpe or gpt2 if the tokens are the same, whoever wrote the file. Raises
    UserError for anything but a byte-level BPE or a token for each character.
    """
    config = read_json(os.path.join(os.path.dirname(path), 'tokenizer_config.json'))
    try:
        if saved['model']['type'] == 'WordLevel' and saved['pre_tokenizer'] == EACH_CHARACTER:
            id_of = saved['model']['vocab']
            return {'kind': 'char', 'chars': ''.join(sorted(id_of, key=id_of.get))}
        return bpe_of_hugging_face(saved, config)
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f'{path} cannot be read here, as it is not a byte-level BPE like '
                        f"GPT-2's ({type(e).__name__}: {e})") from None


def bpe_of_hugging_face(saved, config):
    """Return the spec of a byte-level BPE. Raises KeyError, TypeError or ValueError if it is not.

    saved, config: the contents of tokenizer.json and tokenizer_config.json.
    """
    if saved['model']['type'] != 'BPE':
        raise ValueError(f'it is a {saved["model"]["type"]}')
    if saved.get('normalizer'):
        raise ValueError('it changes the text')
    pattern = pattern_of(saved['pre_tokenizer'])
    added = {}
    for token in saved['added_tokens']:
        if not token['special']:
            raise ValueError(f'{token["content"]!r} was added to it, to be found in texts')
        added[token['content']] = token['id']
    id_of = saved['model']['vocab'] | added
    if sorted(id_of.values()) != list(range(len(id_of))):
        raise ValueError('its ids have gaps')
    pairs = []
    for pair in saved['model']['merges']:
        if isinstance(pair, str):  # as tokenizers wrote them before version 0.20
            pair = pair.split(' ')
        pairs.append(pair)

    # tokenizers joins the pair that is first in its list, tiktoken the one whose token has the
    # lowest id. A token that is neither a byte nor made by a merge never comes from a text.
    made = [id_of[left + right] for left, right in pairs]
    if made != sorted(made):
        raise ValueError('its merges are not in the order of their tokens')
    bytes_first = [id_of[character] for character in BYTE_CHARACTERS] + made
    ranks = {chr(b): i for b, i in enumerate(bytes_first[:256])}
    ranks |= {unspell(left + right): i for (left, right), i in zip(pairs, made)}
    in_texts = set(ranks.values())
    special = {token: i for token, i in id_of.items() if i not in in_texts}
    if saved['model'].get('ignore_merges') and special != added:
        raise ValueError('it has tokens that no merge makes')

    if special == {EOT: len(ranks)}:
        if bytes_first == list(range(len(ranks))):
            merges = [[unspell(left), unspell(right)] for left, right in pairs]
            return {'kind': 'bpe', 'pattern': pattern, 'merges': merges}
        if pattern == SPLIT_PATTERN and spec_hash(ranks) == GPT2_HASH:
            return {'kind': 'gpt2'}
    eot = special.get(token_named('eos_token', config))
    return {'kind': 'hugging_face', 'pattern': pattern, 'ranks': ranks, 'special': special,
            'eot': eot}


def token_named(name, config):
    """Return the text of eos_token or bos_token in a tokenizer_config.json; without one, EOT."""
    token = config.get(name, EOT)
    if isinstance(token, dict):
        return token['content']
    return token


def pattern_of(pre_tokenizer):
    """Return the regular expression by which a byte-level BPE cuts texts into pieces.

    pre_tokenizer: of a tokenizer.json. Raises ValueError if it does something else to the text.
    """
    steps = [pre_tokenizer]
    if pre_tokenizer['type'] == 'Sequence':
        steps = pre_tokenizer['pretokenizers']
    *splits, byte_level = steps
    has_its_own = byte_level.get('use_regex', True)  # GPT-2's
    if byte_level['type'] != 'ByteLevel' or byte_level['add_prefix_space']:
        raise ValueError('it does not cut texts as GPT-2 does')
    if not splits and has_its_own:
        return SPLIT_PATTERN
    if len(splits) == 1 and not has_its_own:
        split = splits[0]
        if split['type'] == 'Split' and split['behavior'] == 'Isolated' and not split['invert']:
            return split['pattern']['Regex']
    raise ValueError('it does not cut texts by one pattern')


# ---- Training a BPE ------------------------------------------------------------------------------

def train_bpe(texts, vocab_size):
    """Return a byte-level BPE of at most vocab_size tokens, learned from an iterable of str.

    The vocabulary is 256 bytes, the merges that bpe.learn_merges_slowly defines, and EOT. Learning
    stops early when no pair occurs twice any more. If the texts have over a million distinct
    pieces, the rarest are not counted (see bpe.count_pieces). Raises UserError for a vocab_size
    under 257.

    No two merges spell the same token. At any time during the learning, the bytes between two
    borders of tokens are cut as they would be on their own, so the same bytes are always the same
    tokens. Therefore `load` can look a token up by its bytes.
    """
    from folio import bpe
    n_fixed = 256 + 1  # the bytes and EOT
    if vocab_size < n_fixed:
        raise UserError(
            f'vocab_size is {vocab_size}; a byte-level BPE needs at least 257: 256 bytes and {EOT}')
    piece_counts = bpe.count_pieces(texts, SPLIT_PATTERN)
    merges = bpe.learn_merges(piece_counts, vocab_size - n_fixed)
    if n_fixed + len(merges) < vocab_size:
        notice(f'the BPE has {n_fixed + len(merges):,} tokens, not {vocab_size:,}: no pair of them '
               'occurs twice in the text any more')
    # JSON has no bytes: see `save`.
    as_text = [[left.decode('latin-1'), right.decode('latin-1')] for left, right in merges]
    return load({'kind': 'bpe', 'pattern': SPLIT_PATTERN, 'merges': as_text})


def fertility(text, n_tokens):
    """Return a line that says how finely a tokenizer cuts a text. White space separates words.

    For a script without white space, compare the tokens per character.

    >>> fertility('to be or not to be', 9)
    '1.50 tokens a word, 0.50 a character, 2.00 bytes a token'
    """
    n_words = max(1, len(text.split()))
    n_bytes = len(text.encode('utf-8', 'surrogatepass'))
    return (f'{n_tokens / n_words:.2f} tokens a word, {n_tokens / max(1, len(text)):.2f} a '
            f'character, {n_bytes / max(1, n_tokens):.2f} bytes a token')
