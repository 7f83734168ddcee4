"""What the text before a position looks like, as one integer a position: the states that the curriculum's stages see.

    alphabet = Alphabet.build(characters)
    word_states(tokens, alphabet)           # (B, T) int64 -> (B, T) int64: the current word so far
    punctuation_states(tokens, alphabet)    # the last character, and how word, sentence and line stand
    pattern_states(tokens, alphabet)        # a speaker's name so far, or the column and syllables of the line

Equal integers of one function mean equal states. Everything between a boundary and a position is found by cumulative
maxima and sums over the row, so that no loop runs over rows or positions, and generated text costs what the corpus's
own does. A state knows nothing from before its row: in eight characters often neither the word's beginning nor the
line's is in sight, and the state then says so. A text is one long row.

A stretch of characters from s to t becomes an integer by a polynomial over them modulo 2^64, from one cumulative sum:
(Σ_{i ≤ t} c_i M^i − Σ_{i < s} c_i M^i) M^{−s}, M odd. Two of the some 10^5 stretches that a corpus has, or that a
student invents, share one by a chance below 10^-8; none shares one with a state that is no stretch.

Shapes: B rows of T tokens, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from avatarl.ngram_index import look_up
from checks import require

MULTIPLIER = 0x9E3779B97F4A7C15  # odd
SENTENCE_ENDS, VOWELS = ".!?", "aeiouyàáâäæèéêëìíîïòóôöœùúûü"
COLUMN_STEP, MOST_COLUMNS = 4, 20  # columns of a line are told apart by fours, up to 80
MOST_SYLLABLES = 15
MOST_HEADING = 32  # characters of a line after an empty one that are remembered: names, not paragraphs


class Alphabet(NamedTuple):
    """What kind of character each token is: (V,) bool each."""

    word: Tensor  # letters and apostrophes
    upper: Tensor
    vowel: Tensor
    e: Tensor
    newline: Tensor
    space: Tensor
    ends_sentence: Tensor

    @staticmethod
    def build(characters: Sequence[str], device: torch.device | str = "cpu") -> "Alphabet":
        """From what each token stands for. Raises ConfigError where one is not a single character."""
        longest = max(characters, key=len, default="")
        fix = "its stages see characters; use --data.tokenizer char"
        require(len(longest) == 1, "the curriculum's tokens", longest, fix)

        def those(matching: Callable[[str], bool]) -> Tensor:
            return torch.tensor([matching(c) for c in characters], device=device)

        return Alphabet(
            word=those(lambda c: c.isalpha() or c in "'’"),
            upper=those(str.isupper),
            vowel=those(lambda c: c.lower() in VOWELS),
            e=those(lambda c: c in "eE"),
            newline=those(lambda c: c == "\n"),
            space=those(str.isspace),
            ends_sentence=those(lambda c: c in SENTENCE_ENDS),
        )


def word_states(tokens: Tensor, alphabet: Alphabet) -> Tensor:
    """The current word so far; of one whose beginning is not in sight, and between two words, the last token alone.

    The two differ: a letter is in a word. (B, T) int64 → (B, T) int64.
    """
    inside = look_up(alphabet.word, tokens)
    before = last_true(~inside)  # the place before the word
    return torch.where(inside & (before >= 0), stretch(tokens, before + 1), tokens)


def punctuation_states(tokens: Tensor, alphabet: Alphabet) -> Tensor:
    """The last token, whether the last token but spaces ends a sentence, the word's case, and how the line began.

    Case: no word, lower case, a capital first, or capitals alone. Line: not in sight, begun, begun after an empty line,
    begun right here. (B, T) int64 → (B, T) int64.
    """
    inside, upper = look_up(alphabet.word, tokens), look_up(alphabet.upper, tokens)
    place = torch.arange(tokens.shape[1], device=tokens.device)
    solid = last_true(~look_up(alphabet.space, tokens))
    ended = taken(look_up(alphabet.ends_sentence, tokens), solid) & (solid >= 0)
    before = last_true(~inside)
    capitals = count_since(upper, before)
    case = torch.where(inside, 1 + (capitals > 0).long() + ((capitals > 1) & (capitals == place - before)), 0)
    line, _ = line_states(tokens, alphabet)
    fresh = look_up(alphabet.newline, tokens)
    return packed((tokens, len(alphabet.word)), (ended, 2), (case, 4), (line, 3), (fresh, 2))


def pattern_states(tokens: Tensor, alphabet: Alphabet) -> Tensor:
    """The line so far, after an empty one (a heading, such as a speaker's name); else its column and syllables.

    Columns and syllables come with the last token. Of a line whose beginning is not in sight there is it alone.
    (B, T) int64 → (B, T) int64.
    """
    line, start = line_states(tokens, alphabet)
    place = torch.arange(tokens.shape[1], device=tokens.device)
    length = place - start
    column = (length // COLUMN_STEP).clamp_max(MOST_COLUMNS)
    syllables = count_since(syllable_steps(tokens, alphabet), start).clamp(0, MOST_SYLLABLES)
    placed = packed(
        (tokens, len(alphabet.word)),
        (torch.ones_like(tokens), 2),
        (column, MOST_COLUMNS + 1),
        (syllables, MOST_SYLLABLES + 1),
    )
    in_sight = torch.where((line == 2) & (length <= MOST_HEADING), stretch(tokens, start.clamp_min(0) + 1), placed)
    return torch.where(start < 0, tokens, in_sight)


def line_states(tokens: Tensor, alphabet: Alphabet) -> tuple[Tensor, Tensor]:
    """How the line of each token began, and the place before it: (B, T) int64 each.

    0: not in sight, or right after the row's first token, so that what came before is not known. 1: after a line with
    characters. 2: after an empty one. A newline is the place before the line that it begins.
    """
    newline = look_up(alphabet.newline, tokens)
    start = last_true(newline)
    empty = newline & newline.roll(1, 1)  # of place 0, whose neighbour is not known, nothing is said
    kind = torch.where(start > 0, 1 + taken(empty, start).long(), 0)
    return kind, torch.where(start > 0, start, -1)


def syllable_steps(tokens: Tensor, alphabet: Alphabet) -> Tensor:
    """What each token adds to an estimate of the syllables so far: (B, T) int64.

    +1 where a group of vowels begins; −1 behind a word that ends in a silent e: after a consonant, with a vowel before.
    """
    inside = look_up(alphabet.word, tokens)
    vowel = look_up(alphabet.vowel, tokens) & inside
    before = last_true(~inside)
    first = torch.arange(tokens.shape[1], device=tokens.device) - before == 1
    begins = vowel & (first | ~vowel.roll(1, 1))
    groups = count_since(begins, before)
    lone_e = look_up(alphabet.e, tokens) & begins & (groups > 1)
    silent = ~inside & lone_e.roll(1, 1)
    silent[:, 0] = False
    return begins.long() - silent.long()


def last_true(mask: Tensor) -> Tensor:
    """The place of the last True up to and with each place of mask (B, T), −1 for none: (B, T) int64."""
    place = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, place, -1).cummax(1).values


def taken(values: Tensor, places: Tensor) -> Tensor:
    """values (B, T) at `places` (B, T) of the same row; the first one's where a place is −1."""
    return values.gather(1, places.clamp_min(0))


def count_since(amounts: Tensor, places: Tensor) -> Tensor:
    """The sum of amounts (B, T) after `places` (B, T), −1 being before the first, up to each place: (B, T) int64."""
    sums = amounts.long().cumsum(1)
    return sums - torch.where(places >= 0, taken(sums, places), 0)


def stretch(tokens: Tensor, starts: Tensor) -> Tensor:
    """An integer for the tokens from `starts` (B, T) up to each place: (B, T) int64, in [2^62, 2^63)."""
    powers, inverse = (torch.from_numpy(p).to(tokens.device) for p in powers_of(MULTIPLIER, tokens.shape[1] + 1))
    sums = torch.cat((tokens.new_zeros(len(tokens), 1), ((tokens + 1) * powers[:-1]).cumsum(1)), 1)  # (B, T + 1)
    return scrambled((sums[:, 1:] - sums.gather(1, starts)) * inverse[starts])


@functools.lru_cache(maxsize=4)
def powers_of(multiplier: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """M^0, M^1, … and M^0, M^−1, … modulo 2^64, as int64: (count,) each."""
    rows = []
    for base in (multiplier, pow(multiplier, -1, 2**64)):
        factors = np.full(count, base, np.uint64)
        factors[0] = 1
        rows.append(np.multiply.accumulate(factors).view(np.int64))  # unsigned products wrap as they should
    return rows[0], rows[1]


def packed(*fields: tuple[Tensor, int]) -> Tensor:
    """One integer for several (values (B, T) in [0, size), size): (B, T) int64, below 2^62."""
    total = torch.zeros_like(fields[0][0])
    for values, size in fields:
        total = total * size + values
    return total


def scrambled(values: Tensor) -> Tensor:
    """Every bit moved by every other: xor-shifts and products (Vigna's SplitMix64), int64 → in [2^62, 2^63)."""
    values = (values ^ ((values >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    values = (values ^ ((values >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return (values ^ (values >> 31)) & (2**62 - 1) | 2**62
