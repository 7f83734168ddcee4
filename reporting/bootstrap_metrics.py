"""What the keys bootstrap/… of metrics.jsonl mean: rewards, samples and opponents of the bootstrapping runs."""

from reporting.metric import Metric

BOOTSTRAP_METRICS: dict[str, Metric] = {
    "bootstrap/accuracy": Metric(
        "Training accuracy",
        "%",
        "Share of the batch's decisions at which the policy's likeliest character is the one that came next.",
        "higher",
        noisy=True,
    ),
    "bootstrap/sample_accuracy": Metric(
        "Samples that are gold",
        "%",
        "Share of the sampled actions that are the character that came next, drawn by the acting policy.",
        "higher",
        noisy=True,
    ),
    "bootstrap/reward_mean": Metric(
        "Mean of all rewards",
        "",
        "Plain mean of r over all V actions, whatever the policy thinks of them: it belongs to the corpus and says "
        "nothing of growth; the expected reward does.",
        noisy=True,
    ),
    "bootstrap/reward_exact": Metric(
        "Reward: exact match",
        "",
        "What the policy expects of the hard signal, times its weight: P(gold).",
        "higher",
        noisy=True,
    ),
    "bootstrap/reward_ngram": Metric(
        "Reward: n-gram credit",
        "",
        "What the policy expects of the partial credit by n-grams of orders 1 to 4, times its weight.",
        noisy=True,
    ),
    "bootstrap/reward_confidence": Metric(
        "Reward: confidence bonus",
        "",
        "What the policy expects of the bonus for being sure and right, times its weight: π(gold)², whether or not "
        "accuracy grows.",
        noisy=True,
    ),
    "bootstrap/reward_soft": Metric(
        "Reward: soft signal",
        "",
        "What the policy expects of the n-grams' leave-one-out probabilities, times their weight.",
        noisy=True,
    ),
    "bootstrap/reward_stage": Metric(
        "Reward: curriculum",
        "",
        "What the policy expects of the rewards of the curriculum's stages so far, times their weight.",
        noisy=True,
    ),
    "bootstrap/stage": Metric("Stage", "", "Number of the curriculum's present stage, from 0."),
    "bootstrap/frequency_kl": Metric(
        "KL of the frequencies",
        "nats",
        "KL of the policy's mean distribution over the batch to the corpus's character frequencies.",
        "lower",
        noisy=True,
    ),
    "bootstrap/kl": Metric(
        "KL(π ‖ bigram)",
        "nats",
        "How far the policy is from the add-one-smoothed bigram, exact over the vocabulary, averaged over decisions.",
        noisy=True,
    ),
    "bootstrap/group_std": Metric(
        "Spread inside groups",
        "",
        "Standard deviation of the rewards of a context's samples, averaged over contexts: where it is 0, the group "
        "teaches nothing.",
        noisy=True,
    ),
    "bootstrap/masked": Metric(
        "Masked decisions",
        "%",
        "Share of decisions left out of the policy's loss for too little entropy.",
        noisy=True,
    ),
    "bootstrap/outside_band": Metric(
        "Outside the entropy band",
        "%",
        "Share of decisions with less or more entropy than the band allows.",
        "lower",
        noisy=True,
    ),
    "bootstrap/value": Metric(
        "Own value",
        "",
        "Expected reward of the student under its own policy, before the opponent is taken into account.",
        "higher",
        noisy=True,
    ),
    "bootstrap/opponent_value": Metric(
        "Opponent's value",
        "",
        "Expected reward of the opponent on the same contexts.",
        noisy=True,
    ),
    "bootstrap/win_rate": Metric(
        "Win rate",
        "%",
        "Share of decisions at which the student expects more reward than its opponent.",
        noisy=True,
    ),
    "bootstrap/decisions_per_second": Metric(
        "Decisions",
        "decisions/s",
        "Decisions judged per second of training time; each character of each sample is one, and each player's count.",
        "higher",
        noisy=True,
    ),
}
