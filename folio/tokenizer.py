"""
Tokenizers: characters, a byte-level BPE trained here, and GPT-2's.
    python tokenizer.py my.txt gpt2 data/book        # how well does each tokenizer fit that text?

Each has encode(text) -> list of ids, decode(ids) -> str, decode_bytes(ids) -> bytes, n_vocab, eot (the id between
documents, or None), start (the id to begin a text with: eot or a line end) and spec: a dictionary of plain values that
`load` turns into the same tokenizer again.
Text is only ever text: the characters <|endoftext|> in it are encoded as characters, never as the control token.
"""
import functools
import hashlib
import itertools
import json
import os
import sys

import numpy as np
import tiktoken

from folio import bpe
from folio.configurator import UserError, report

EOT = '<|endoftext|>'
CUT = '<|cut|>'  # where a text is cut before it is encoded; no model ever sees it
LOOKAHEAD = r'\s+(?!\S)|'
SPLIT_PATTERN = rf"""'(?:[sdmt]|ll|ve|re)| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{LOOKAHEAD}\s+"""  # GPT-2's
IS_WHITE = np.zeros(0x3002, dtype=bool)  # by code point: Unicode's White_Space, which is tiktoken's \s, not Python's
IS_WHITE[[*range(9, 14), 32, 0x85, 0xa0, 0x1680, *range(0x2000, 0x200b), 0x2028, 0x2029, 0x202f, 0x205f, 0x3000]] = True


class CharTokenizer:
    def __init__(self, chars):
        """chars: the characters of the vocabulary, in the order of their ids."""
        self.spec = {'kind': 'char', 'chars': chars}
        self.n_vocab, self.eot, self.start = len(chars), None, max(0, chars.find('\n'))
        self.id_of = {c: i for i, c in enumerate(chars)}

    def encode(self, text):
        unknown = sorted(set(text) - self.id_of.keys())
        if unknown:
            raise UserError(f'this model knows {self.n_vocab} characters and never saw '
                            f'{" ".join(map(repr, unknown[:20]))}; leave them out, or prepare the data with '
                            '--tokenizer=bpe, which knows every character')
        return [self.id_of[c] for c in text]

    def decode(self, ids):
        return ''.join(self.spec['chars'][i] for i in ids)

    def decode_bytes(self, ids):
        return self.decode(ids).encode('utf-8', 'surrogatepass')


class BPETokenizer:
    def __init__(self, encoding, spec):
        """encoding: a tiktoken.Encoding whose one special token is EOT."""
        self.encoding, self.spec = encoding, spec
        self.n_vocab, self.eot, self.start = encoding.n_vocab, encoding.eot_token, encoding.eot_token

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def encode_documents(self, texts):
        """A list of str as one array of uint32, an end-of-text token before each: encode's tokens, made faster.

        tiktoken is fast with a pattern that does not look ahead. This one does so in one place: of white space before
        other text, the last character begins a new piece. So the text is cut there, by a token that is then removed.
        """
        other_pattern = self.spec.get('pattern', SPLIT_PATTERN) != SPLIT_PATTERN
        if other_pattern or not texts or any(CUT in t or EOT in t for t in texts):
            return np.array([i for t in texts for i in [self.eot, *self.encode(t)]], dtype=np.uint32)
        text = ''.join(EOT + t for t in texts)
        codes = (np.frombuffer(text[i:i + 2**20].encode('utf-32-le'), '<u4') for i in range(0, len(text), 2**20))
        white = np.concatenate([IS_WHITE.take(some, mode='clip') for some in codes])
        white[np.cumsum([len(EOT) + len(t) for t in texts], dtype=int)[:-1]] = True  # what ends a document stays whole
        cuts = np.flatnonzero(white[:-2] & white[1:-1] & ~white[2:]) + 1
        text = CUT.join(text[a:b] for a, b in itertools.pairwise([0, *cuts.tolist(), len(text)]))
        ids = self.without_lookahead.encode_to_numpy(text, allowed_special='all')
        return ids[ids != self.n_vocab] if len(cuts) else ids

    @functools.cached_property
    def without_lookahead(self):
        return tiktoken.Encoding('pieces', pat_str=SPLIT_PATTERN.replace(LOOKAHEAD, ''), special_tokens={
            EOT: self.eot, CUT: self.n_vocab}, mergeable_ranks=self.encoding._mergeable_ranks)

    def decode(self, ids):
        return self.encoding.decode(ids)

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes(ids)


def load(source):
    """A tokenizer from 'gpt2', from a spec, from the tokenizer.json that `save` wrote, or from a data folder.

    GPT-2's files are downloaded once by tiktoken, into TIKTOKEN_CACHE_DIR if that is set. Raises UserError.
    """
    if source == 'gpt2':
        source = {'kind': 'gpt2'}
    if not isinstance(source, dict):
        path = os.path.join(source, 'tokenizer.json') if os.path.isdir(source) else source
        try:
            with open(path, encoding='utf-8') as f:
                source = json.load(f)
        except (OSError, ValueError) as e:
            raise UserError(f'no tokenizer in {path} ({e}); it may be gpt2, or a tokenizer.json that '
                            'prepare.py wrote') from None
    try:
        if source['kind'] == 'char':
            return CharTokenizer(source['chars'])
        if source['kind'] == 'bpe':
            tokens = [bytes([i]) for i in range(256)]
            tokens += [(left + right).encode('latin-1') for left, right in source['merges']]
            ranks = {token: rank for rank, token in enumerate(tokens)}
            return BPETokenizer(tiktoken.Encoding('folio', pat_str=source['pattern'], mergeable_ranks=ranks,
                                                  special_tokens={EOT: len(tokens)}), source)
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f'a damaged tokenizer ({type(e).__name__}: {e}); run prepare.py again') from e
    if source['kind'] != 'gpt2':
        raise UserError(f'unknown kind of tokenizer {source["kind"]!r}; choose from char, bpe, gpt2')
    try:
        return BPETokenizer(tiktoken.get_encoding('gpt2'), {'kind': 'gpt2'})
    except (OSError, ValueError) as e:  # requests' errors are OSErrors; a damaged file is a ValueError
        raise UserError("GPT-2's tokenizer could not be downloaded: go online once, or set TIKTOKEN_CACHE_DIR to a "
                        f'folder that has it ({type(e).__name__})') from e


def save(tokenizer, path):
    """Write the spec as JSON; the bytes of a merge are written as Latin-1 characters, one a byte."""
    with open(path, 'w', encoding='utf-8') as f:
        json.dump(tokenizer.spec, f)


def spec_hash(spec):
    """A fingerprint: equal for two tokenizers that give the same ids."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


# ---- Training a BPE --------------------------------------------------------------------------------------------------

def train_bpe(texts, vocab_size, apply=map):
    """A byte-level BPE of at most vocab_size tokens (256 bytes, merges, EOT) learned from an iterable of str.

    Rule (Sennrich et al. 2016): cut the text into pieces, encode them with the vocabulary so far, make the most
    frequent adjacent pair a token, repeat, until the vocabulary is full or no pair occurs twice. Among equally frequent
    pairs the one with the lower left id wins, then the lower right id. No two pairs spell one token: what stands
    between two ends of tokens is encoded as it would be alone, so the same bytes there are always the same tokens.
    Of texts with over a million distinct pieces the rarest do not count (see bpe.count_pieces). apply: a map that may
    use many processes; the merges do not depend on it. Raises UserError for a vocab_size under 257.
    """
    if vocab_size < 257:
        raise UserError(f'vocab_size is {vocab_size}; a byte-level BPE needs at least 257: 256 bytes and {EOT}')
    merges = bpe.learn_merges(bpe.count_pieces(texts, SPLIT_PATTERN, apply), vocab_size - 257)
    return load({'kind': 'bpe', 'pattern': SPLIT_PATTERN,
                 'merges': [[token.decode('latin-1') for token in pair] for pair in merges]})


# ---- Fertility -------------------------------------------------------------------------------------------------------

def fertility(text, n_tokens):
    """'x tokens a word, y bytes a token': how finely a tokenizer cuts a text; a word is what white space separates."""
    words, size = max(1, len(text.split())), len(text.encode('utf-8', 'surrogatepass'))
    return f'{n_tokens / words:.2f} tokens a word, {size / max(1, n_tokens):.2f} bytes a token'


if __name__ == '__main__':
    sys.excepthook = report
    if '--help' in sys.argv:
        sys.exit(print(__doc__.strip()))
    if len(sys.argv) < 3:
        raise UserError('usage: python tokenizer.py TEXT_FILE TOKENIZER [TOKENIZER …]; '
                        'a tokenizer is gpt2 or a data folder')
    try:
        with open(sys.argv[1], encoding='utf-8') as text_file:
            sample = text_file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{sys.argv[1]} is no UTF-8 text that can be read: {error}') from None
    for name in sys.argv[2:]:
        tokenizer = load(name)
        ids = tokenizer.encode(sample)
        print(f'{name}: vocabulary of {tokenizer.n_vocab:,}, {len(ids):,} tokens, {fertility(sample, len(ids))}')
