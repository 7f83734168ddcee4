"""Dense and sparse tables: when which, and what a sparse one proposes."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from avatarl.ngram_tables import DENSE_VOCABULARY, ROOT, UNSEEN, DenseTable, SparseTable, build_table
from tests.avatarl.ngram_oracle import oracle, stored


@pytest.mark.parametrize(
    ("vocab_size", "context", "tokens", "kind"),
    [
        (DENSE_VOCABULARY, 4, 500, DenseTable),
        (DENSE_VOCABULARY + 1, 0, 50, SparseTable),
        (DENSE_VOCABULARY, 16, 20_000, SparseTable),  # some 300,000 rows
    ],
)
def test_the_rule(vocab_size, context, tokens, kind):
    """Catches a dense table of gigabytes, and a vocabulary stored in the way that is slow for it."""
    corpus = np.random.default_rng(0).integers(0, vocab_size, tokens)
    assert isinstance(build_table(corpus, vocab_size, context, 0.75, "cpu"), kind)


def random_table(vocab_size: int = 9, context: int = 3) -> tuple[list[int], SparseTable]:
    corpus = (np.random.default_rng(5).integers(0, vocab_size, (2, 150)).min(0)).tolist()
    with stored("sparse"):
        table = build_table(np.array(corpus), vocab_size, context, 0.75, "cpu")
    assert isinstance(table, SparseTable)
    return corpus, table


def test_entries_are_ordered_by_their_probability():
    """Catches entries by count alone, by the longest context alone, or with ties in any order."""
    corpus, table = random_table()
    contexts: dict[int, list[int]] = {ROOT: []}
    for row in range(ROOT, len(table.starts) - 1):
        first, stop = table.starts[row : row + 2].tolist()
        before, tokens = contexts[row], table.tokens[first:stop].tolist()
        p = oracle(corpus, 9, len(before), Fraction(3, 4), before)
        assert tokens == sorted(tokens, key=lambda w: (-p[w], w))
        seen = {b for *a, b in zip(*(corpus[i:] for i in range(len(before) + 1)), strict=False) if a == before}
        assert set(tokens) == (seen if before else set(range(9)))
        contexts |= {ROOT + 1 + e: [*before, w] for e, w in zip(range(first, stop), tokens, strict=True)}


@pytest.mark.parametrize("m", [1, 3, 20])
def test_candidates_have_their_mixed_mass_and_no_twins(m):
    """Catches a wrong suffix, a token proposed twice, and entries of the next row taken for a row's own."""
    corpus, table = random_table()
    tokens = torch.tensor(corpus[:60])
    columns = [torch.full_like(tokens, ROOT)]
    for _ in range(3):
        shorter = torch.cat([torch.tensor([UNSEEN if len(columns) > 1 else ROOT]), columns[0][:-1]])
        columns.insert(0, table.step(shorter, tokens))
    rows = torch.stack(columns, 1)  # (N, J)
    weights = torch.rand(rows.shape, generator=torch.Generator().manual_seed(0)) * (rows != UNSEEN)
    ids, mixed = (part.flatten(1) for part in table.candidates(rows, weights, m))
    proposed = mixed > -torch.inf
    everything = table.mix_at(rows, weights, torch.arange(9).expand(60, -1))
    for n in range(60):
        mine = ids[n][proposed[n]].long()
        assert len(mine) == len(set(mine.tolist()))
        lists = [table.tokens[table.starts[r] : min(table.starts[r + 1], table.starts[r] + m)] for r in rows[n]]
        assert set(mine.tolist()) == {int(w) for part in lists for w in part}
        if m == 20:  # every entry is a candidate: then its longest context is among them
            torch.testing.assert_close(mixed[n][proposed[n]], everything[n, mine])
        assert (mixed[n][proposed[n]] <= everything[n, mine] + 1e-5).all()
