"""The curriculum's states and rewards against reading and counting by hand; promotion; its place in a checkpoint."""

import functools
from collections import Counter, defaultdict
from collections.abc import Hashable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bootstrap import curriculum as module
from bootstrap.curriculum import (
    SEEN_BY,
    STAGES,
    WINDOW,
    Curriculum,
    StageStatistics,
    check_stages,
    frequency_kl,
    stage_rewards,
)
from bootstrap.patterns import MOST_HEADING, Alphabet, pattern_states, powers_of, syllable_steps
from config import ConfigError

PLAY = (
    "WHITE:\nIt is the west, \nBe so it is.\n\nWEBER:\nWhat is it? A wheel!\n\nWHITE:\nIt is there. "
    "Thee, it is so.\n\nWEBER:\nAre these bears hers?\nWhite is it, the rose: \nTo see it rot.\n\n"
) * 3
CHARACTERS = "".join(sorted({*PLAY, "'", "z"}))


@functools.cache
def play() -> StageStatistics:
    """What the stages know of PLAY."""
    return StageStatistics.build(ids(PLAY)[0], CHARACTERS)


def ids(text: str) -> torch.Tensor:
    """One row of text: (1, T)."""
    return torch.tensor([[CHARACTERS.index(c) for c in text]])


def is_word(c: str) -> bool:
    return c.isalpha() or c == "'"


def word_by_hand(text: str) -> Hashable:
    """What `words` may see of a text that ends here."""
    word = text[len(text.rstrip("".join(filter(is_word, CHARACTERS)))) :]
    if not word or word == text:
        return text[-1], "last character"
    return word, "word"


def punctuation_by_hand(text: str) -> Hashable:
    word = text[len(text.rstrip("".join(filter(is_word, CHARACTERS)))) :]
    capitals = sum(c.isupper() for c in word)
    case = 0 if not word else 1 if not capitals else 3 if capitals == len(word) > 1 else 2
    ended = text.rstrip()[-1:] in (".", "!", "?")
    return text[-1], ended, case, line_by_hand(text)[0], text[-1] == "\n"


def line_by_hand(text: str) -> tuple[int, str]:
    """How the last line began, and what stands in it: 0 out of sight, 1 after characters, 2 after an empty line."""
    start = text.rfind("\n")
    if start < 1:
        return 0, ""
    return 2 if text[start - 1] == "\n" else 1, text[start + 1 :]


def syllables_by_hand(line: str) -> int:
    count, word = 0, ""
    for c in [*line, None]:
        if c is not None and is_word(c):
            word += c
            continue
        groups = "".join("v" if x.lower() in "aeiouy" else " " for x in word).split()
        silent = (
            len(groups) > 1 and word[-1:] in ("e", "E") and groups[-1] == "v" and word[-2:-1].lower() not in "aeiouy"
        )
        count += len(groups) - (silent and c is not None)
        word = ""
    return count


def pattern_by_hand(text: str) -> Hashable:
    kind, line = line_by_hand(text)
    if kind == 0:
        return text[-1], "last character"
    if kind == 2 and len(line) <= 32:
        return line, "heading"
    return text[-1], min(len(line) // 4, 20), min(syllables_by_hand(line), 15)


BY_HAND = {"words": word_by_hand, "punctuation": punctuation_by_hand, "patterns": pattern_by_hand}


@pytest.mark.parametrize("stage", SEEN_BY)
@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.text(CHARACTERS, min_size=1, max_size=60), min_size=1, max_size=3), start=st.integers(0, 60))
def test_states_are_what_a_reader_would_say(stage, rows, start):
    """Catches two states taken for one or one for two: wrong boundaries, capitals, columns, syllables, or a row that
    sees another's characters."""
    rows = [*rows, PLAY[start : start + 60], PLAY[start : start + 7]]
    width = min(map(len, rows))
    rows = [row[:width] for row in rows]
    found = SEEN_BY[stage](torch.cat([ids(row) for row in rows]), Alphabet.build(CHARACTERS))
    assert_told_apart(stage, rows, found)


def test_long_headings_are_paragraphs():
    """Catches paragraphs that are learnt by heart, or names that are forgotten before their end."""
    rows = [f"o\n\nA {word} is s" + "o" * 40 for word in ("wheel", "white")]
    found = pattern_states(torch.cat([ids(row) for row in rows]), Alphabet.build(CHARACTERS))
    assert_told_apart("patterns", rows, found)
    apart = (found[0] != found[1]).nonzero()[:, 0].tolist()
    assert apart == list(range(7, MOST_HEADING + 3))  # from the word's third letter on; place 2 ends the empty line


def assert_told_apart(stage: str, rows: list[str], found: torch.Tensor) -> None:
    """States (B, T) differ exactly where a reader would say other things of the text up to there."""
    by_hand = [BY_HAND[stage](row[: t + 1]) for row in rows for t in range(len(row))]
    assert (found >= 0).all()
    pairs = set(zip(found.flatten().tolist(), by_hand, strict=True))
    assert len(pairs) == len({state for state, _ in pairs}) == len({said for _, said in pairs})


@pytest.mark.parametrize("stage", SEEN_BY)
def test_rewards_are_shares_by_counting(stage):
    """Catches counts shifted by one, a blend with the wrong bigram, and states that a short window sees otherwise."""
    text = [CHARACTERS.index(c) for c in PLAY]
    statistics = StageStatistics.build(np.array(text), CHARACTERS)
    after: dict[Hashable, Counter] = defaultdict(Counter)
    short = len(PLAY[: (len(PLAY) - 1) // WINDOW * WINDOW])
    for size, count in ((len(PLAY) - 1, len(PLAY) - 1), (WINDOW, short)):
        for i in range(count):
            after[BY_HAND[stage](PLAY[i // size * size : i + 1])][text[i + 1]] += 1
    row = PLAY[100:160]
    bigram = statistics.tables.for_sequence(ids(row), 1)[0]
    for t, found in enumerate(stage_rewards(stage, statistics, ids(row))[0]):
        counts = torch.tensor([after[BY_HAND[stage](row[: t + 1])][a] for a in range(len(CHARACTERS))])
        total, kinds = counts.sum(), (counts > 0).sum()
        if stage == "words":
            expected = counts / total.clamp_min(1)
        else:
            expected = (counts + kinds * bigram[t]) / (total + kinds) if total >= module.LEAST_SEEN else bigram[t]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("stage", STAGES)
def test_rewards_lie_between_0_and_1(stage):
    """Catches a reward that grows without bound, or that pays more than there is, for any text."""
    statistics = play()
    tokens = torch.randint(len(CHARACTERS), (7, 40), generator=torch.Generator().manual_seed(0))
    rewards = stage_rewards(stage, statistics, tokens)
    assert rewards.shape == (7, 40, len(CHARACTERS)) and rewards.dtype == torch.float32
    assert (rewards >= 0).all() and (rewards <= 1).all() and (rewards.sum(-1) < 1 + 1e-5).all()


def after(statistics: StageStatistics, stage: str, text: str) -> dict[str, float]:
    """What a stage pays for each character after a text."""
    return dict(zip(CHARACTERS, stage_rewards(stage, statistics, ids(text))[0, -1].tolist(), strict=True))


def test_stages_teach_what_they_are_called():
    """Catches a stage that rewards something else: words finished, names and their colon, capitals after sentences."""
    statistics = play()
    said = after(statistics, "words", "is whe")
    assert said["e"] == 1  # wheel; no other word goes on like that
    assert after(statistics, "words", "is wrz")["z"] == 0
    assert sum(after(statistics, "words", "ithe zz").values()) == 0  # no word of the corpus: nothing to earn
    assert after(statistics, "patterns", "is so.\n\nWHI")["T"] > 0.5
    assert after(statistics, "patterns", "is so.\n\nWHITE")[":"] > after(statistics, "patterns", "so it WHITE")[":"]
    capitals = [
        sum(v for c, v in after(statistics, "punctuation", t).items() if c.isupper()) for t in ("so. ", "so it ")
    ]
    assert capitals[0] > 2 * capitals[1]
    assert after(statistics, "frequencies", "a")["i"] == pytest.approx(PLAY.count("i") / len(PLAY), abs=0.02)


def test_the_iambic_hint(shakespeare):
    """Catches syllables that are counted wrongly: Shakespeare's lines of speech end at ten more often than at six."""
    characters = "".join(sorted(set(shakespeare)))
    tokens = torch.tensor([characters.index(c) for c in shakespeare[:300_000]])[None]
    alphabet = Alphabet.build(characters)
    steps = syllable_steps(tokens, alphabet)[0]
    ends = torch.nonzero(alphabet.newline[tokens[0]])[:, 0]
    counts = np.diff(steps.cumsum(0)[ends].numpy(), prepend=0)
    assert Counter(counts[counts > 3].tolist()).most_common(1)[0][0] == 10
    statistics = StageStatistics.build(tokens[0], characters, ["patterns"])
    line = "\n\nA:\nI am, I am, I am, I am, I am, I am, I am, I am,"
    row = torch.tensor([[characters.index(c) for c in line]])
    newline = stage_rewards("patterns", statistics, row)[0, [i for i, c in enumerate(line) if c == ","], 0]
    assert newline.argmax() == 4  # the fifth comma: ten syllables


def test_eight_characters_say_what_they_can():
    """Catches a state that reaches back before its window, and positions that depend on their row's place."""
    statistics = play()
    windows = ids(PLAY)[0].unfold(0, 8, 1)
    for stage in STAGES:
        together = stage_rewards(stage, statistics, windows)
        alone = torch.cat([stage_rewards(stage, statistics, row[None]) for row in windows[::29]])
        assert torch.equal(together[::29], alone)


def test_frequencies_pull_towards_the_corpus():
    """Catches a reward with the wrong sign: what the policy neglects must pay more than what it overdoes."""
    statistics = play()
    share = statistics.frequencies
    skewed = torch.softmax(torch.randn(len(CHARACTERS), generator=torch.Generator().manual_seed(1)), 0)
    rewards = stage_rewards("frequencies", statistics, ids("it"), skewed)[0, 0]
    assert ((rewards > 0.5) == (share > skewed)).all()
    torch.testing.assert_close(
        stage_rewards("frequencies", statistics, ids("it"), share)[0, 1], torch.full_like(share, 0.5)
    )
    assert frequency_kl(share.log()[None], statistics).abs() < 1e-6
    found = frequency_kl(torch.stack([skewed, share]).log(), statistics)
    mean = (skewed + share) / 2
    torch.testing.assert_close(found, (mean * (mean / share).log()).sum())


def make(stages: str = "frequencies bigrams words", **options) -> Curriculum:
    options = {"window": 4, "tolerance": 0.01, "min_steps": 8, "max_steps": 30} | options
    return Curriculum(play(), stages.split(), **options)


def lasts(curriculum: Curriculum, rewards) -> int:
    """After how many steps the present stage is over."""
    return next(i for i, reward in enumerate(rewards, 1) if curriculum.observe(torch.tensor(reward)))


def test_stages_end_at_their_plateau():
    """Catches promotion while the reward still rises, too early, or never, and a history that the next one inherits."""
    curriculum = make()
    rising = [0.1 + 0.05 * i for i in range(12)]
    assert lasts(curriculum, [*rising, *[0.7] * 20]) == 20  # at 16 the last window still is above that before
    assert curriculum.current == "bigrams" and curriculum.stage == 1
    assert lasts(curriculum, [0.4] * 40) == 8
    assert not any(curriculum.observe(0.4) for _ in range(50)) and curriculum.current == "words"
    assert lasts(make(), [0.1 * 1.2**i for i in range(40)]) == 30  # rises for ever
    assert lasts(make(min_steps=13), [0.5] * 40) == 16
    assert lasts(make(), [0.5 - 0.01 * i for i in range(40)]) == 8  # falls


def test_stages_that_are_over_count_on():
    """Catches weights that don't sum to 1, and a stage that is forgotten, or kept although it should be replaced."""
    curriculum, tokens = make(), ids(PLAY[:40])
    torch.testing.assert_close(curriculum.rewards(tokens), stage_rewards("frequencies", curriculum.statistics, tokens))
    lasts(curriculum, [0.5] * 9)
    lasts(curriculum, [0.5] * 9)
    assert curriculum.weights() == pytest.approx({"frequencies": 1 / 7, "bigrams": 2 / 7, "words": 4 / 7})
    parts = [w * stage_rewards(name, curriculum.statistics, tokens) for name, w in curriculum.weights().items()]
    torch.testing.assert_close(curriculum.rewards(tokens), sum(parts))
    torch.testing.assert_close(curriculum.own_rewards(tokens), 7 / 4 * parts[-1])
    curriculum.carry = 0.0
    assert curriculum.weights() == {"words": 1.0}


@settings(deadline=None, max_examples=20)
@given(at=st.integers(0, 40), values=st.lists(st.floats(0, 1), min_size=41, max_size=41))
def test_a_resumed_curriculum_goes_on(at, values):
    """Catches a resume that starts the stage again, or that judges its plateau by other steps."""
    whole, first = make(), make()
    told = [whole.observe(v) for v in values]
    again = [first.observe(v) for v in values[:at]]
    second = make()
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()}, strict=False)
    again += [second.observe(v) for v in values[at:]]
    assert again == told and second.current == whole.current
    assert torch.equal(second.history, whole.history) and torch.equal(second.progress, whole.progress)


def test_bad_stages_are_named():
    """Catches a misspelt stage that is silently left out, and bounds that no stage can keep."""
    with pytest.raises(ConfigError, match=r"bootstrap.stages = 'word': no such stage; did you mean words\?"):
        check_stages(["bigrams", "word"])
    with pytest.raises(ConfigError, match="named twice"):
        check_stages(["words", "words"])
    with pytest.raises(ConfigError, match="name one or more of frequencies"):
        make("")
    with pytest.raises(ConfigError, match="stage-max-steps = 30"):
        make(min_steps=31)
    with pytest.raises(ConfigError, match=r"use --data\.tokenizer char"):
        StageStatistics.build(np.array([0, 1, 0]), ["a", "the"])
    with pytest.raises(ConfigError, match="nothing to learn"):
        StageStatistics.build(np.zeros(20, np.int64), CHARACTERS)


def test_the_rarest_states_go_first(monkeypatch):
    """Catches a table that outgrows the machine, or one that keeps what hardly ever occurs."""
    monkeypatch.setattr(module, "TABLE_ENTRIES", 20 * len(CHARACTERS))
    table = StageStatistics.build(ids(PLAY)[0], CHARACTERS, ["words"])
    assert len(table.stages["words"].rewards) == 20 + len(CHARACTERS) and set(table.stages) == {"words"}
    assert after(table, "words", ".\nIt is")[" "] > 0.5


def test_powers_undo_each_other():
    """Catches an inverse that is none, with which equal words at other places differ."""
    powers, inverse = powers_of(0x9E3779B97F4A7C15, 300)
    assert ((powers.astype(np.uint64) * inverse.astype(np.uint64)) == 1).all() and powers[0] == 1


@pytest.mark.gpu
def test_gpu_agrees():
    """Catches tables that stay on the CPU when the curriculum is moved, and states that differ between devices."""
    tokens = ids(PLAY)[0].unfold(0, 40, 17)
    ours, reference = make(" ".join(STAGES)).to("cuda"), make(" ".join(STAGES))
    for _ in STAGES:
        torch.testing.assert_close(ours.rewards(tokens.cuda()).cpu(), reference.rewards(tokens))
        assert ours.stage.is_cuda and ours.current == reference.current
        for curriculum in (ours, reference):
            for _ in range(8):
                curriculum.observe(torch.tensor(0.5))
