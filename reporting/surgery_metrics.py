"""What the numbers of a surgeon mean: `surgery/…` of metrics.jsonl (DESIGN section 9)."""

from reporting.metric import Metric

SURGERY_METRICS: dict[str, Metric] = {
    "surgery/gain": Metric(
        "Gain of the tried edit",
        "nats",
        "By how much the best proposal lowers the held-out windows' cross-entropy: mean of the paired differences.",
        "higher",
    ),
    "surgery/gain_noise": Metric(
        "Noise of the gain",
        "nats",
        "Standard error of those differences. An edit is kept when its gain exceeds accept.z times this.",
    ),
    "surgery/accepted": Metric("Edits kept", "", "How many edits were committed to the weights so far."),
    "surgery/reward": Metric(
        "Surgeon's reward",
        "nats/character",
        "Quality of what the operated models write minus that of what the unoperated one writes, mean over a round's "
        "candidates; with surgery.reward one_token the difference in log π of the next token.",
        "higher",
        noisy=True,
    ),
    "surgery/reward_best": Metric(
        "Best candidate's reward", "nats/character", "The largest reward of a round.", "higher", noisy=True
    ),
    "surgery/reward_std": Metric(
        "Spread of rewards", "nats/character", "Standard deviation of the reward over a round's candidates.", noisy=True
    ),
    "surgery/likelihood": Metric(
        "Reward: likelihood",
        "nats/character",
        "The part of the mean reward that is the judge's log-likelihood per character.",
        noisy=True,
    ),
    "surgery/diversity": Metric(
        "Reward: diversity",
        "",
        "Difference in distinct-2, the share of a text's pairs of tokens that are different ones, before its weight.",
        noisy=True,
    ),
    "surgery/repetition": Metric(
        "Reward: repetition",
        "",
        "Difference in the share of a text's runs of four tokens that were there before in it, before its weight.",
        noisy=True,
    ),
    "surgery/action_size": Metric(
        "Action magnitude",
        "",
        "Mean absolute change of a singular value, as a share of it; 0.1 is the limit, 0.05 what chance proposes.",
        noisy=True,
    ),
    "surgery/q_value": Metric(
        "Q-value",
        "nats/character",
        "What the agent's critics (the lower of two) expect of a round's actions, in the reward's unit.",
        noisy=True,
    ),
    "surgery/alpha": Metric("Entropy weight α", "", "SAC's weight of its entropy, which it tunes itself.", log=True),
    "surgery/critic_loss": Metric(
        "Surgeon's critic loss", "", "Squared error of the agent's Q-values, rewards scaled by agent.reward-scale.",
        "lower", noisy=True,
    ),
    "surgery/actor_loss": Metric(
        "Surgeon's actor loss", "", "What the agent's policy minimises: entropy term minus Q-value.", noisy=True
    ),
    "surgery/seconds": Metric(
        "Time of an operation", "s", "Seconds of a round: proposals, their evaluation, learning, the trial.", "lower"
    ),
}  # fmt: skip
