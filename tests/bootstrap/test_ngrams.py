"""The dense n-gram tables against counting by hand, at every length, and the file that they are kept in."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avatarl.ngram import NgramCritic
from bootstrap.ngrams import NgramTables, check_tables, load_tables
from config import ConfigError
from tests.avatarl.ngram_oracle import oracle

TRAIN_CHARACTERS = 1_003_854  # nine tenths of tinyshakespeare, as in DESIGN's table
TEXT = np.random.default_rng(3).integers(0, 5, 400)


@st.composite
def cases(draw):
    """(text, V, longest, tokens (B, T)), a text of two different tokens at least; contexts need not occur in it."""
    vocab_size = draw(st.integers(2, 6))
    token = st.integers(0, vocab_size - 1)
    longest = draw(st.integers(0, 3))
    text = [0, 1, *draw(st.lists(token, min_size=longest, max_size=40))]
    width = draw(st.integers(1, 5))
    tokens = draw(st.lists(st.lists(token, min_size=width, max_size=width), min_size=1, max_size=3))
    return text, vocab_size, longest, torch.tensor(tokens)


@settings(deadline=None, max_examples=60)
@given(case=cases(), discount=st.sampled_from([Fraction(1, 4), Fraction(3, 4)]))
def test_every_length_is_the_formula(case, discount):
    """Catches a wrong row, count or fallback, and a sequence that reads one token too many or too few."""
    text, vocab_size, longest, tokens = case
    tables = NgramTables.build(np.array(text), vocab_size, longest, float(discount))
    ids = torch.arange(vocab_size).flip(0).expand(len(tokens), -1)
    for length in range(longest + 1):
        found = tables.for_sequence(tokens, length)
        rows = tokens.tolist()
        expected = [[oracle(text, vocab_size, length, discount, row[: t + 1]) for t in range(len(row))] for row in rows]
        torch.testing.assert_close(found, torch.tensor([[[float(x) for x in p] for p in row] for row in expected]))
        torch.testing.assert_close(tables.probs(tokens, length), found[:, -1], rtol=0, atol=0)
        torch.testing.assert_close(tables.prob(tokens, length, ids), found[:, -1].flip(-1), rtol=0, atol=0)


def test_the_reference_is_add_one():
    """Catches a reference that is infinite where a pair never occurred, or that counts the wrong way round."""
    tables = NgramTables.build(TEXT, 7, 1)  # tokens 5 and 6 never occur
    pairs = [tuple(pair) for pair in zip(TEXT[:-1].tolist(), TEXT[1:].tolist(), strict=True)]
    context = torch.arange(7)[:, None]
    for given_token, log_p in enumerate(tables.log_reference(context)):
        counts = torch.tensor([pairs.count((given_token, w)) for w in range(7)])
        torch.testing.assert_close(log_p.exp(), (counts + 1) / (counts.sum() + 7))
    unigram = torch.tensor(np.bincount(TEXT, minlength=7) + 1) / (len(TEXT) + 7)
    torch.testing.assert_close(tables.log_reference(context, length=0)[3].exp(), unigram)
    assert tables.log_reference(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 7)
    with pytest.raises(ValueError, match="0 and 1"):
        tables.log_reference(context, length=2)


def test_tables_reach_the_ladder(shakespeare):
    """Catches tables that depart from DESIGN section 3's reference, or from the n-gram critic, at real size."""
    points = np.frombuffer(shakespeare.encode("utf-32-le"), np.uint32)
    characters = np.unique(points, return_inverse=True)[1]
    train, val = characters[:TRAIN_CHARACTERS], torch.from_numpy(characters[TRAIN_CHARACTERS:])
    tables = NgramTables.build(train, 65)
    assert tables.memory == tables.table.nbytes + tables.reference.nbytes < 75e6
    gold = val[1:, None]
    for length, ce, accuracy in ((1, 2.4865, 27.0), (2, 2.0560, 38.1), (3, 1.7896, 47.2)):
        p = tables.for_sequence(val[None, :-1], length)[0]
        assert -p.gather(1, gold)[9:].log().mean().item() == pytest.approx(ce, abs=5e-4)
        assert 100 * (p.argmax(1) == val[1:])[9:].float().mean().item() == pytest.approx(accuracy, abs=0.1)
    window = val[None, 500:600]
    critic = NgramCritic(train, 65, context=3).opinion(window).full().exp()
    torch.testing.assert_close(tables.for_sequence(window, 3)[0], critic, atol=1e-6, rtol=1e-4)


def test_too_large_a_table_points_to_the_suffix_array():
    """Catches gigabytes that are asked for without a word, and a limit that leaves the reader alone."""
    check_tables(65, 3)
    with pytest.raises(ConfigError, match=r"= 4: with 65 tokens .* at most 3, or the suffix array"):
        NgramTables.build(TEXT, 65, 4)
    with pytest.raises(ConfigError, match=r"with 50,257 tokens .* at most 0, or the suffix array") as error:
        check_tables(50_257, 1)
    assert "--bootstrap.soft suffix" in str(error.value) and "bootstrap.kl-coef" in str(error.value)
    with pytest.raises(ConfigError, match="use 0 or more tokens"):
        check_tables(65, -1)


def test_a_text_of_one_character_is_refused():
    """Catches a run on text that has nothing to teach, which ends with a perfect student of nothing."""
    with pytest.raises(ConfigError, match="nothing to learn"):
        NgramTables.build(np.full(50, 3), 5, 2)
    with pytest.raises(ConfigError, match="at least 4"):
        NgramTables.build(np.array([0, 1, 0]), 5, 3)


def test_longer_contexts_than_there_are_tables_for():
    """Catches a lookup that reads beyond the table, or rows of another length."""
    tables = NgramTables.build(TEXT, 5, 1)
    with pytest.raises(ValueError, match="0 to 1 tokens"):
        tables.for_sequence(torch.zeros(1, 4, dtype=torch.int64), 2)


BUILT: list[tuple] = []


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of TEXT's tables; building anew is counted in BUILT."""
    build = NgramTables.build
    BUILT.clear()

    def counted(*words, **options):
        BUILT.append(words)
        return build(*words, **options)

    monkeypatch.setattr(NgramTables, "build", counted)
    load_tables(TEXT, 5, 2, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    return path


def again(path: Path, text: np.ndarray = TEXT, **options: float) -> NgramTables:
    return load_tables(text, 5, 2, path.parent, **options)


def test_stored_tables_are_read_back(stored):
    """Catches a cache that is never hit, or that gives other numbers than building."""
    tables = again(stored)
    assert len(BUILT) == 1
    fresh = NgramTables.build(TEXT, 5, 2)
    assert torch.equal(tables.table, fresh.table) and torch.equal(tables.reference, fresh.reference)
    assert [p.name for p in stored.parent.iterdir()] == [stored.name]


def test_other_texts_and_settings_have_files_of_their_own(stored):
    """Catches tables of one corpus handed to another."""
    other = TEXT.copy()
    other[7] = (other[7] + 1) % 5
    assert not torch.equal(again(stored, other).table, again(stored).table)
    again(stored, discount=0.5)
    assert len(BUILT) == 3 and len(list(stored.parent.iterdir())) == 3


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "empty"])
def test_a_damaged_file_is_rebuilt(stored, damage):
    """Catches a run that dies of, or believes, a file that a full disk or another program left."""
    good = again(stored).table.clone()
    content = bytearray(stored.read_bytes())
    if damage == "flipped":
        content[-9] ^= 1
    elif damage == "foreign":
        load_tables(TEXT, 5, 2, stored.parent.parent / "other", discount=0.5)
        content = bytearray(next((stored.parent.parent / "other").iterdir()).read_bytes())
    else:
        content = content[: 0 if damage == "empty" else len(content) // 2]
    stored.unlink()
    stored.write_bytes(content)
    before = len(BUILT)
    assert torch.equal(again(stored).table, good) and len(BUILT) == before + 1
    assert torch.equal(again(stored).table, good) and len(BUILT) == before + 1


def test_a_folder_that_cannot_be_written_to_costs_nothing_else(tmp_path):
    """Catches a run that needs its cache, and a temporary file that stays behind."""
    (tmp_path / "file").write_text("")
    tables = load_tables(TEXT, 5, 2, tmp_path / "file")
    assert torch.equal(tables.table, NgramTables.build(TEXT, 5, 2).table)
