"""What judges know, position by position."""

import numpy as np
import pytest
import torch

from avatarl.ngram import NgramCritic
from experiments import fair_weights, judges
from experiments.judges import measure
from tests.tiny_train import here


def test_a_judge_is_measured_at_every_position_of_the_text():
    """Catches seams that cut contexts, a token skipped or judged twice, and hits taken for confidence."""
    draw = np.random.default_rng(0)
    train, val = draw.choice(5, 400, p=[0.5, 0.2, 0.1, 0.1, 0.1]), draw.integers(0, 5, 50)
    critic, context = NgramCritic(train, 5, context=3), 3
    found = measure("three", critic, train, val, context, seconds=1.0, size=16)
    nll, hits, favourite = [], [], []
    for end in range(1, len(val)):
        seen = torch.from_numpy(val[None, max(0, end - context) : end])
        log_p = critic.opinion(seen, None).full()[-1]
        nll.append(-float(log_p[val[end]]))
        hits.append(int(log_p.argmax()) == val[end])
        favourite.append(float(log_p.max().exp()))
    assert found.val_ce == pytest.approx(np.mean(nll), rel=1e-5)
    assert found.accuracy == pytest.approx(np.mean(hits))
    assert found.sure == pytest.approx(np.mean(favourite) - np.mean(hits), abs=1e-6)
    assert found.sure > 0.05  # the text has none of what was learned


@pytest.mark.parametrize("study", [judges, fair_weights], ids=["judges", "fair weights"])
def test_the_embedded_text_is_no_ground_for_figures(study, tmp_path):
    """Catches a table in results/ of a text that differs between versions of Python."""
    outcome = here("--corpus", "pydoc", "--out", str(tmp_path / "out"), main=study.main)
    assert outcome.code == 2 and "studies refuse the text embedded in Python" in outcome.errors[0]
    assert not (tmp_path / "out").exists()
