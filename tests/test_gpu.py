"""What only a GPU can show: steps that never wait for it, its fused loss, its curve."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import train_core
from avatarl.critics import DenseOpinion
from avatarl.loss import LossSettings, fused_avatarl_loss, judge, reinforce_loss
from tests.avatarl.builders import method, random_case
from tests.tiny_train import trained

pytestmark = pytest.mark.gpu


@contextlib.contextmanager
def waiting_refused(first: int) -> Iterator[list[int]]:
    """Within the block, a step from `first` on that is not logged fails where the host waits for the GPU."""
    learn, watched = train_core.learn, []

    def checked(job, micros, measure):
        if measure or job.state.step < first:
            return learn(job, micros, measure)
        torch.cuda.set_sync_debug_mode("error")
        try:
            watched.append(job.state.step)
            return learn(job, micros, measure)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_core, "learn", checked)
        yield watched


CRITICS: dict[str, dict[str, Any]] = {
    "n-gram": {"critic_kind": "ngram"},
    "mixed": {"critic_kind": "mixed"},
    "cached": {"critic_kind": "ngram", "critic_cache": True},
    "moving average": {"critic_kind": "self", "critic_past": "ema"},
    "twin": {"critic_kind": "self", "critic_past": "twin"},
    "student context": {"critic_kind": "ngram", "method_context": "student"},
}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("critic", CRITICS)
def test_a_step_never_waits_for_the_gpu(place, critic, optimizer):
    """Catches a host synchronisation anywhere in a step whose metrics are not logged."""
    with waiting_refused(first=2) as watched:
        trained("run", run_device="cuda", log_every=6, train_steps=12, optim_name=optimizer, **CRITICS[critic])
    assert watched == [2, 3, 4, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("windows", [0, 2])
def test_the_curve_is_a_cpus(place, dtype, windows):
    """Catches a GPU that learns or imagines something else: losses of 20 steps agree within the products' precision."""
    losses = []
    for device in ("cpu", "cuda"):
        own = {"critic_kind": "mixed", "method_imagined_windows": windows} if windows else {}
        run = trained(device, run_device=device, run_dtype=dtype, train_steps=20, **own)
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses.append(torch.tensor([line["train/loss"] for line in lines if "train/loss" in line]))
    tolerance = 2e-2 if dtype == "bfloat16" or windows else 1e-3  # a token drawn at the edge may be its neighbour
    torch.testing.assert_close(*losses, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("beta", [0.0, 0.01])
@pytest.mark.parametrize("weighting", ["reinforce", "expected"])
@pytest.mark.parametrize("vocabulary", [65, 5000])
def test_the_compiled_loss_is_the_definition(vocabulary, weighting, beta):
    """Catches a fused kernel that computes something else than float64 on a CPU."""
    n, width = 192, 32
    case = random_case(n, vocabulary)
    draws = torch.Generator().manual_seed(1)
    hidden, head = (torch.randn(rows, width, generator=draws, dtype=torch.float64) for rows in (n, vocabulary))
    m = method(top_k=16, entropy_coef=beta, policy_weighting=weighting)
    logits = (hidden @ head.T).requires_grad_()
    actions, _, reward = judge(logits.detach(), DenseOpinion(case.critic), case.gold, m)
    exact = reinforce_loss(logits, actions, reward, entropy_coef=beta, policy_weighting=weighting)
    (by_logits,) = torch.autograd.grad(exact, logits)
    ours, ours_head = (t.float().cuda().requires_grad_() for t in (hidden, head))
    opinion, gold = DenseOpinion(case.critic.float().cuda()), case.gold.cuda()
    settings = LossSettings(**{f: getattr(m, f) for f in LossSettings._fields if hasattr(m, f)})
    torch.set_float32_matmul_precision("highest")
    loss, _ = fused_avatarl_loss(ours, ours_head, opinion, gold, settings=settings, chunk_size=64, measure=False)
    found = torch.autograd.grad(loss, (ours, ours_head))
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
    for one, other in zip(found, (by_logits @ head, by_logits.T @ hidden), strict=True):
        assert (one.double().cpu() - other).norm() < 1e-3 * other.norm()
