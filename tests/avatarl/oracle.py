"""The method of DESIGN section 3 once more, written from the page: floats, dictionaries and loops.

Slow and obvious on purpose; nothing here is shared with avatarl/. One position is a list `z` of V student
logits, a list `log_p_c` of V critic log-probabilities and the token `gold`. `m` is anything with the fields of
MethodConfig. Actions are sets of tokens, everything about them a dictionary from token to value.
"""

import math
from typing import Any, NamedTuple


class Judged(NamedTuple):
    """What steps 1 to 4 say about one position."""

    actions: set[int]
    p_ref: dict[int, float]
    rewards: dict[int, float]


def top(values: list[float], k: int) -> list[int]:
    """The k largest, best first, ties to the lowest id."""
    return sorted(range(len(values)), key=lambda token: (-values[token], token))[:k]


def action_set(z: list[float], log_p_c: list[float], gold: int, k: int) -> set[int]:
    """Step 1."""
    return {*top(z, k), *top(log_p_c, k), gold}


def reality(actions: set[int], gold: int, epsilon: float) -> dict[int, float]:
    """Step 2."""
    if actions == {gold}:
        return {gold: 1.0}
    return {a: 1 - epsilon if a == gold else epsilon / (len(actions) - 1) for a in actions}


def consensus(actions: set[int], gold: int, log_p_c: list[float], m: Any) -> dict[int, float]:
    """Step 3."""
    p_r = reality(actions, gold, m.epsilon)
    p_c = {a: max(math.exp(log_p_c[a]), 1e-9) for a in actions}
    if getattr(m, "mean", "geometric") == "arithmetic":
        plausible = sum(p_c.values())
        s = {a: m.reality_weight * p_r[a] + m.critic_weight * p_c[a] / plausible for a in actions}
    else:
        s = {a: p_r[a] ** m.reality_weight * p_c[a] ** m.critic_weight for a in actions}
    total = sum(s.values())
    return {a: value / total for a, value in s.items()}


def rewards(p_ref: dict[int, float], gold: int, m: Any) -> dict[int, float]:
    """Step 4."""
    kept = set(p_ref)
    if m.sparsify == "above_mean":
        kept = {a for a, p in p_ref.items() if p > 1 / len(p_ref)} or {gold}
    r = {a: p if a in kept else 0.0 for a, p in p_ref.items()}
    if m.normalize == "sum":
        total = sum(r.values())
        return {a: value / total for a, value in r.items()}
    r = {a: m.reward_scale * value for a, value in r.items()}
    largest = max(r.values())
    if largest > m.reward_cap:
        r = {a: value * m.reward_cap / largest for a, value in r.items()}
    return r


def judge(z: list[float], log_p_c: list[float], gold: int, m: Any) -> Judged:
    """Steps 1 to 4."""
    actions = action_set(z, log_p_c, gold, m.top_k)
    p_ref = consensus(actions, gold, log_p_c, m)
    if getattr(m, "unproposed", "consensus") == "gold" and gold not in {*top(z, m.top_k), *top(log_p_c, m.top_k)}:
        p_ref = {a: float(a == gold) for a in p_ref}
    return Judged(actions, p_ref, rewards(p_ref, gold, m))


def margin(p_ref: dict[int, float]) -> float:
    """How far the consensus is from a tie with its mean; below rounding, float32 may decide otherwise."""
    return min(abs(p * len(p_ref) - 1) for p in p_ref.values())


def log_softmax(z: list[float]) -> list[float]:
    """Over the full vocabulary."""
    largest = max(z)
    log_sum = largest + math.log(sum(math.exp(x - largest) for x in z))
    return [x - log_sum for x in z]


def entropy(z: list[float]) -> float:
    """Over the full vocabulary."""
    return -sum(math.exp(x) * x for x in log_softmax(z))


def loss(z: list[float], r: dict[int, float], m: Any) -> float:
    """Steps 5 and 6 at one position."""
    log_pi = log_softmax(z)
    if m.policy_weighting == "reinforce":
        gain = sum(value * log_pi[a] for a, value in r.items())
    else:
        gain = sum(value * math.exp(log_pi[a]) for a, value in r.items())
    return -gain - m.entropy_coef * entropy(z)


def gradient(z: list[float], r: dict[int, float], m: Any) -> list[float]:
    """∂loss/∂z by the closed form: R π − r, or π (Σ π r − r), and β π (log π + H) for the entropy."""
    log_pi = log_softmax(z)
    pi = [math.exp(x) for x in log_pi]
    total, expected = sum(r.values()), sum(pi[a] * value for a, value in r.items())
    h = entropy(z)
    found = []
    for j in range(len(z)):
        if m.policy_weighting == "reinforce":
            slope = total * pi[j] - r.get(j, 0.0)
        else:
            slope = pi[j] * (expected - r.get(j, 0.0))
        found.append(slope + m.entropy_coef * pi[j] * (log_pi[j] + h))
    return found


def advantages(r: dict[int, float]) -> dict[int, float]:
    """Step 7: rewards centred and scaled within the action set."""
    mean = sum(r.values()) / len(r)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in r.values()) / len(r))
    return {a: (value - mean) / (deviation + 1e-6) for a, value in r.items()}


def group_loss(z: list[float], old_z: list[float], r: dict[int, float], clip_ratio: float) -> float:
    """Step 7 at one position, for logits z now and old_z when the actions were judged."""
    log_pi, old = log_softmax(z), log_softmax(old_z)
    total = 0.0
    for a, advantage in advantages(r).items():
        ratio = math.exp(log_pi[a] - old[a])
        clipped = min(max(ratio, 1 - clip_ratio), 1 + clip_ratio)
        total -= math.exp(old[a]) * min(ratio * advantage, clipped * advantage)
    return total


def metrics(z: list[float], log_p_c: list[float], gold: int, m: Any) -> dict[str, float]:
    """The numbers of section 6 at one position, under their names without train/."""
    actions, _, r = judge(z, log_p_c, gold, m)
    log_pi = log_softmax(z)
    pi = [math.exp(x) for x in log_pi]
    mass, critic_mass = sum(pi[a] for a in actions), sum(math.exp(log_p_c[a]) for a in actions)
    kl = 0.0
    for a in actions:
        p = math.exp(log_p_c[a]) / critic_mass
        kl += p * (math.log(p) - math.log(pi[a] / mass))
    return {
        "reward": sum(pi[a] * value for a, value in r.items()),
        "p_gold": pi[gold],
        "gold_rank": 1 + sum(x > z[gold] for x in z),
        "gold_kept": float(r[gold] > 0),
        "action_mass": mass,
        "action_count": len(actions),
        "overlap": len({*top(z, m.top_k)} & {*top(log_p_c, m.top_k)}) / m.top_k,
        "entropy": entropy(z),
        "critic_kl": kl,
    }
