"""Which contexts speak to the mixed critic: not only the last n tokens, but words, lines and gaps.

    contexts = Contexts(vocab_size, longest=6, strings=["\\n", " ", "!", …])
    keys = contexts.keys(stream)            # (B, S) int64 -> (B, S, J) int64, of what ends with each token

A context is a key: a hash of what it looks at, in [0, 2^KEY_BITS). The J kinds are the last 1, 2, … `longest`
tokens; the four before the last one; and, where every token is a character, the letters of the current word (of what
stands between words, the last two characters) alone and with the word before it, the two words before it, or only
the second of these, small and capital letters alike; and how far the line has come, with the last two characters.
Where tokens are pieces of words, the pieces of the current word, alone and with those of the word before it; a word
begins with every token that does not begin with a letter (but with a space, say). Such contexts are what compressors
of text mix (Mahoney, 2005, of PAQ). All look back over REACH characters or PIECES_REACH pieces at most.

Hashes of stretches are differences of running polynomials modulo 2^64 (Karp and Rabin, 1987), so that nothing goes
token by token. Shapes: B streams of S tokens, J kinds of context.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from checks import require

REACH = 64
PIECES_REACH = 24
KEY_BITS = 51  # so that a key and a token of up to 4,096 fit into one number
LINE_STEP = 4  # columns of a line that count as one
BASE = 0x5851F42D4C957F2D  # odd
INVERSE = pow(BASE, -1, 2**64)
SPREAD = -0x61C8864680B583EB  # 2^64 divided by the golden ratio, as a signed number
NOTHING = -1  # the key of a context that cannot be told


class Contexts:
    """The kinds of context for a vocabulary, and which shorter one each of them falls back on.

    strings (V,) say what each token stands for; without them there are no words and no lines. names (J,): what each
    kind looks at; fallbacks (J,): the kind that speaks where this one has seen nothing, −1 for no context at all.
    """

    def __init__(self, vocab_size: int, longest: int, strings: Sequence[str] = ()) -> None:
        fix = f"name what each of the {vocab_size:,} tokens stands for, or none"
        require(len(strings) in (0, vocab_size), "the strings of a vocabulary", len(strings), fix)
        draw = torch.Generator().manual_seed(vocab_size)
        self._values = torch.randint(-(2**63), 2**63 - 1, (vocab_size,), generator=draw)
        self._folded, self._letters, self._newlines, self._begins = self._values, None, None, None
        self.longest = longest
        names = [f"last {n}" for n in range(1, longest + 1)] + ["gap"]
        fallbacks = [*range(-1, longest - 1), min(2, longest) - 1]
        self.reach = max(longest, 5)
        if strings and all(len(s) == 1 for s in strings):
            self.reach = REACH
            first = {s: i for i, s in reversed(list(enumerate(strings)))}
            same = [first.get(s.lower(), i) for i, s in enumerate(strings)]
            self._folded = self._values[torch.tensor(same)]
            self._letters = torch.tensor([s.isalpha() or s in "'’" for s in strings])
            self._newlines = torch.tensor([s == "\n" for s in strings])
            names += ["word", "word, 1 before", "word, 2 before", "word, 2nd before", "line"]
            fallbacks += [min(3, longest) - 1] + [min(4, longest) - 1] * 3 + [min(2, longest) - 1]
        elif strings:
            self.reach = max(longest, PIECES_REACH)
            self._begins = torch.tensor([not s[:1].isalpha() for s in strings])
            names += ["word", "word, 1 before"]
            fallbacks += [min(2, longest) - 1, min(3, longest) - 1]
        self.names, self.fallbacks = tuple(names), tuple(fallbacks)
        self.settings = (vocab_size, tuple(strings), self.names, self.fallbacks, self.reach, LINE_STEP)
        """What decides what a context sees, in plain types."""

    def to(self, device: torch.device | str) -> "Contexts":
        """The same on `device`, in place."""
        self._values, self._folded = self._values.to(device), self._folded.to(device)
        if self._letters is not None and self._newlines is not None:
            self._letters, self._newlines = self._letters.to(device), self._newlines.to(device)
        if self._begins is not None:
            self._begins = self._begins.to(device)
        return self

    def keys(self, stream: Tensor, first: Tensor | None = None, last: int | None = None) -> Tensor:
        """Keys of all contexts that end with the `last` tokens of stream (B, S), all by default: (B, last, J) int64.

        first (B,): where each row's text begins; what stands before is not looked at. None: with its first token.
        NOTHING is the key of no context.
        """
        size = stream.shape[1]
        end = torch.arange(size - (last or size) + 1, size + 1, device=stream.device).expand(len(stream), -1)
        start = (end - self.reach).clamp_min(0)  # the text that may be looked at is [start, end)
        if first is not None:
            start = torch.maximum(start, torch.minimum(first[:, None], end - 1))
        exact = _Hashes(self._values[stream])
        found = [exact.of(torch.maximum(end - n, start), end) for n in range(1, self.longest + 1)]
        found.append(exact.of(torch.maximum(end - 5, start), torch.maximum(end - 1, start)))
        if self._letters is not None and self._newlines is not None:
            pair = exact.of(torch.maximum(end - 2, start), end)
            found += self._words(stream, start, end, pair)
            found.append(self._line(stream, start, end, pair))
        if self._begins is not None:
            begins = _ends(self._begins[stream])
            begin = torch.maximum(begins.gather(1, end) - 1, start)
            found += [exact.of(begin, end), exact.of(torch.maximum(begins.gather(1, begin) - 1, start), end)]
        salted = [torch.where(key == NOTHING, key, _finish(key + _signed(j * SPREAD))) for j, key in enumerate(found)]
        return torch.stack(salted, -1)

    def _words(self, stream: Tensor, start: Tensor, end: Tensor, pair: Tensor) -> list[Tensor]:
        """Four keys (B, n) each, of the current word and those before it, for what stands in [start, end)."""
        assert self._letters is not None
        letter, folded = self._letters[stream], _Hashes(self._folded[stream])
        gaps, words = _ends(~letter), _ends(letter)  # where the last token so far that is no letter, or is one, ends

        def before(ends: Tensor, stop: Tensor) -> Tensor:
            return torch.maximum(ends.gather(1, stop), start)

        begin = before(gaps, end)
        word = torch.where(begin < end, folded.of(begin, end), _finish(pair))
        ahead = []
        for _ in range(2):
            stop = before(words, begin)
            begin = torch.minimum(before(gaps, stop), stop)
            ahead.append(_finish(folded.of(begin, stop)))
        one, two = ahead
        return [word, word + _finish(one), word + _finish(one + SPREAD) + two, word + two * BASE]

    def _line(self, stream: Tensor, start: Tensor, end: Tensor, pair: Tensor) -> Tensor:
        """A key (B, n) of the place in the line; NOTHING where its beginning is out of sight, but not out of reach."""
        assert self._newlines is not None
        begin = _ends(self._newlines[stream]).gather(1, end)
        unseen = begin <= start
        column = torch.where(unseen, self.reach, end - begin).clamp_max(self.reach - LINE_STEP) // LINE_STEP
        return torch.where(unseen & (end - start < self.reach), NOTHING, pair + _finish(column + 1))


def _ends(marked: Tensor) -> Tensor:
    """Where the last marked token (B, S) before each place ends, 0 for none: (B, S + 1) int64."""
    end = torch.arange(1, marked.shape[1] + 1, device=marked.device)
    found = torch.where(marked, end, 0).cummax(1).values
    return torch.cat((torch.zeros_like(found[:, :1]), found), 1)


class _Hashes:
    """Hashes of stretches of streams (B, S) whose tokens have these values."""

    def __init__(self, values: Tensor) -> None:
        size = values.shape[1]
        self._up, down = _powers(BASE, size, values.device), _powers(INVERSE, size, values.device)
        running = (values * down).cumsum(1)
        self._running = torch.cat((torch.zeros_like(running[:, :1]), running), 1)  # (B, S + 1)

    def of(self, start: Tensor, stop: Tensor) -> Tensor:
        """A hash of the tokens in [start, stop), (B, S) each: (B, S) int64; the same wherever they stand."""
        inside = self._running.gather(1, stop) - self._running.gather(1, start)
        return inside * self._up[(stop - 1).clamp_min(0)]


def _powers(base: int, size: int, device: torch.device) -> Tensor:
    """base^0 … base^(size − 1) modulo 2^64: (size,) int64."""
    factors = torch.full((size,), _signed(base), device=device)
    factors[:1] = 1
    return factors.cumprod(0)


def _signed(number: int) -> int:
    """The same modulo 2^64, as an int64."""
    return (number + 2**63) % 2**64 - 2**63


def _finish(key: Tensor) -> Tensor:
    """Spread what differs over all bits; a number in [0, 2^KEY_BITS)."""
    key = (key ^ (key >> 29)) * SPREAD
    return (key ^ (key >> 32)) & (2**KEY_BITS - 1)
