"""
Learn a byte-level BPE, in plain Python: count the pieces of a text, then make merge after merge.
    python -c "from folio import bpe; print(bpe.learn_merges({'low': 5, ' lower': 2}, n_merges=3))"

learn_merges_slowly is the algorithm to read, learn_merges the one to use: its merges are the same.

`regex` counts the pieces and knows newer letters of Unicode than tiktoken, which encodes them: some
merges are never used, because tiktoken cuts words with such letters at more places.
"""
import collections
import heapq
import itertools

import regex
from tqdm import tqdm

CHUNK_CHARS = 1_000_000  # about as many characters of a text are read or counted at a time
MAX_PIECES = 1_000_000  # distinct pieces to remember; learning from that many takes 1.2 GB
# A piece ends where white space follows another character, whatever comes later.
BORDER = regex.compile(r'(?<=\S)\s')
NO_TOKEN = -1  # in the row of learn_merges: no token here


# ---- Counting the pieces of a text ---------------------------------------------------------------

def count_pieces(texts, pattern):
    """Return {piece: how often it occurs} in an iterable of str, maybe a stream larger than memory.

    Whenever there are more than MAX_PIECES distinct pieces, the most frequent MAX_PIECES / 2 are
    kept and counting continues. pattern: a regular expression that finds the pieces.
    """
    find_pieces = regex.compile(pattern).findall
    counts = collections.Counter()
    for text in texts:
        for stretch in stretches(text):
            counts.update(find_pieces(stretch))
            # Rare pieces change few merges, and those of an endless stream would fill the memory.
            if len(counts) > MAX_PIECES:
                counts = collections.Counter(dict(counts.most_common()[:MAX_PIECES // 2]))
    return counts


def stretches(text):
    """Yield a text in stretches of about CHUNK_CHARS characters, without cutting a piece."""
    start = 0
    while len(text) - start > CHUNK_CHARS:
        border = BORDER.search(text, start + CHUNK_CHARS)
        if border is None:
            break
        yield text[start:border.start()]
        start = border.start()
    yield text[start:]


# ---- Learning the merges, the clear way ----------------------------------------------------------

def learn_merges_slowly(piece_counts, n_merges):
    """Return at most n_merges merges, pairs (left, right) of bytes, in the order they were made.

    piece_counts: {piece: how often it occurs}. The rule (Sennrich et al. 2016): cut every piece
    into bytes, which are the tokens 0 to 255. Make the most frequent pair of neighbours a token,
    replace it everywhere, and repeat, until there are enough merges or no pair occurs twice. Among
    equally frequent pairs the one with the lower left id wins, then the lower right id.

    >>> learn_merges_slowly({'low': 5, ' lower': 2, ' lowest': 3}, 3)
    [(b'l', b'o'), (b'lo', b'w'), (b' ', b'low')]
    """
    tokens = [bytes([i]) for i in range(256)]
    # Each distinct piece once, as a list of ids.
    pieces = {piece: list(piece.encode('utf-8')) for piece in piece_counts}
    merges = []
    while len(merges) < n_merges:
        pair_counts = collections.Counter()
        for piece, ids in pieces.items():
            for pair in itertools.pairwise(ids):
                pair_counts[pair] += piece_counts[piece]
        # The smallest of (-count, left, right): the most frequent, then the lowest ids.
        best = min(pair_counts, key=lambda pair: (-pair_counts[pair], pair), default=None)
        if best is None or pair_counts[best] < 2:
            break
        left, right = best
        merges.append((tokens[left], tokens[right]))
        for ids in pieces.values():
            replace_pair(ids, best, new=len(tokens))
        tokens.append(tokens[left] + tokens[right])
    return merges


def replace_pair(ids, pair, new):
    """Replace a pair by the id `new` wherever it occurs in a list of ids, in place, from the left.

    >>> ids = [7, 7, 7, 1, 7, 7]
    >>> replace_pair(ids, (7, 7), new=9)
    >>> ids
    [9, 7, 1, 9]
    """
    i = 0
    while i < len(ids) - 1:
        if (ids[i], ids[i + 1]) == pair:
            ids[i:i + 2] = [new]
        i += 1


# ---- The same merges, fast -----------------------------------------------------------------------

def learn_merges(piece_counts, n_merges):
    """Return the merges of learn_merges_slowly, without counting everything again for each of them.

    A merge changes little: the places where its pair occurs and their neighbours. So the pieces are
    laid in one row, in which a place is the byte where a pair begins, and each pair remembers how
    often it occurs and where. A pair's places are all found at once, from left to right, when the
    younger of its two tokens is made: later merges can take places away but never add one.
    """
    tokens = [bytes([i]) for i in range(256)]
    merges = []
    # The pair (left, right) is the number left * base + right: a faster key, and it sorts the same.
    base = 256 + n_merges

    # starts[i] is the token that starts at byte i, ends[i] the one that ends there. At first each
    # token is one byte, and they are the same.
    starts, weights = lay_in_a_row(piece_counts)
    ends = starts.copy()
    found = collections.defaultdict(list)  # {pair: places} of new pairs, not counted yet
    for place, (left, right) in enumerate(itertools.pairwise(starts)):
        if left != NO_TOKEN and right != NO_TOKEN:
            found[left * base + right].append(place)

    pair_counts = collections.defaultdict(int)
    places = {}  # {pair: places}; some may have lost the pair since
    heap = []  # (-count, pair): the most frequent pair is first, among equals the lowest
    # Show the bar only after two seconds: a small vocabulary is done by then.
    bar = tqdm(total=n_merges, desc='merging', unit=' merges', delay=2)
    while len(merges) < n_merges:
        # Count the new pairs. Added, not set, because a pair may have lost places before it was
        # counted: when aa becomes X, aaaa is X a a for a moment, and then X X, without X a.
        for pair, where in found.items():
            pair_counts[pair] += sum(weights[place] for place in where)
            if pair_counts[pair] > 1:
                places[pair] = where
                heapq.heappush(heap, (-pair_counts[pair], pair))

        best = pop_most_frequent(heap, pair_counts)
        if best is None:
            break
        bar.update()
        left, right = divmod(best, base)
        new = len(tokens)
        merges.append((tokens[left], tokens[right]))
        tokens.append(tokens[left] + tokens[right])
        left_length = len(tokens[left])
        new_length = len(tokens[new])

        # Replace the pair wherever it still occurs, and update the pairs around it.
        found = collections.defaultdict(list)
        for place in places.pop(best):
            middle = place + left_length
            if starts[place] != left or starts[middle] != right:
                continue  # one of the two is part of another token by now
            end = place + new_length
            before = ends[place - 1]
            after = starts[end]
            weight = weights[place]
            starts[place] = new
            starts[middle] = NO_TOKEN
            ends[end - 1] = new  # ends[middle - 1] stays wrong; nothing looks inside a token
            if before != NO_TOKEN:
                pair_counts[before * base + left] -= weight
                found[before * base + new].append(place - len(tokens[before]))
            if after != NO_TOKEN:
                pair_counts[right * base + after] -= weight
                found[new * base + after].append(place)
    bar.close()
    return merges


def lay_in_a_row(piece_counts):
    """Return two lists with an entry for every byte: the byte, and how often its piece occurs.

    NO_TOKEN stands before, between and after the pieces, so that no pair crosses their borders.
    """
    row = [NO_TOKEN]
    weights = [0]
    for piece, count in piece_counts.items():
        row += piece.encode('utf-8')
        row.append(NO_TOKEN)
        weights += [count] * (len(row) - len(weights))
    return row, weights


def pop_most_frequent(heap, pair_counts):
    """Take the most frequent pair off the heap and return it, or None if no pair occurs twice.

    The heap isn't told when a pair loses places, so an entry's count may be too high: then the pair
    goes back with its present count. Counts never grow, so the first correct entry is the answer.
    """
    while heap:
        negative_count, pair = heapq.heappop(heap)
        count = pair_counts[pair]
        if count == -negative_count:
            return pair
        if count > 1:
            heapq.heappush(heap, (-count, pair))
    return None
