"""
Turn text into tokens and back: by characters, by a byte-level BPE trained here, or by GPT-2's.
    python -c "from folio import tokenizer; print(tokenizer.load('data/book').encode('The'))"

Each tokenizer has
    encode(text) -> list of ids
    decode(ids) -> str
    decode_bytes(ids) -> bytes
    n_vocab: the number of ids
    eot: the id between documents, or None
    start: the id to begin a text with: eot, or where there is none a line end
    spec: a dictionary of plain values that `load` turns into the same tokenizer again

Text is only ever text: the characters <|endoftext|> in it are encoded as characters, never as the
control token.
"""
import hashlib
import json
import os
import re


from folio.configurator import UserError, notice

EOT = '<|endoftext|>'
MOST_WHITE = 900_000  # white characters in a row; more are cut, or tiktoken would crash

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
        """encoding: a tiktoken.Encoding whose one special token is EOT."""
        self.encoding = encoding
        self.spec = spec
        self.n_vocab = encoding.n_vocab
        self.eot = encoding.eot_token
        self.start = encoding.eot_token

    def encode(self, text):
        # A row of that length has a character at one of these places.
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
    """Return a tokenizer from 'gpt2', a spec, a tokenizer.json that `save` wrote, or its folder.

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
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(
            f'a damaged tokenizer ({type(e).__name__}: {e}); run prepare.py again') from e
    return load_gpt2()  # outside the try: if the download fails, no tokenizer is damaged


def read_spec(path):
    """Return the spec in a tokenizer.json, or in that of a data folder. Raises UserError."""
    if os.path.isdir(path):
        path = os.path.join(path, 'tokenizer.json')
    try:
        with open(path, encoding='utf-8') as f:
            spec = json.load(f)
        vocab_size_of(spec)
        return spec
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise UserError(
            f'no tokenizer in {path} ({e}); it may be gpt2, or a tokenizer.json that prepare.py '
            'wrote') from None


def vocab_size_of(spec):
    """Return the number of tokens of a spec, without loading it.

    Raises KeyError, TypeError or ValueError for what is not a spec.
    """
    if spec['kind'] == 'char':
        return len(spec['chars'])
    if spec['kind'] == 'bpe':
        return 256 + len(spec['merges']) + 1
    if spec['kind'] == 'gpt2':
        return 50257
    raise ValueError(f'unknown kind of tokenizer {spec["kind"]!r}; choose from char, bpe, gpt2')


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

    >>> fertility('to be or not to be', 9)
    '1.50 tokens a word, 2.00 bytes a token'
    """
    n_words = max(1, len(text.split()))
    n_bytes = len(text.encode('utf-8', 'surrogatepass'))
    return (f'{n_tokens / n_words:.2f} tokens a word, '
            f'{n_bytes / max(1, n_tokens):.2f} bytes a token')
