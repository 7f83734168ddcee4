"""Schedules of the method's weights: piecewise-linear in progress, tabulated once for the whole run.

The table lies on the device, one row a step, so that a step takes its values as 0-d tensors: no copy from the
host, no recompilation when a weight changes (DESIGN section 3, step 9).
"""

import numpy as np
import torch
from torch import Tensor

from avatarl.loss import LossSettings
from avatarl.trust import Trust
from config import MethodConfig


def tabulate(method: MethodConfig, steps: int) -> dict[str, np.ndarray]:
    """Every scheduled field of MethodConfig at each of `steps` steps: {name: (steps,) float32}.

    Progress runs from 0 at the first step to 1 at the last; beyond its outer knots a schedule is flat.
    `top_k` and `imagined_windows` are rounded to whole actions and windows.
    """
    progress = np.linspace(0.0, 1.0, steps)
    table = {}
    for name in method.SCHEDULED:
        at, values = zip(*method.knots(name), strict=True)
        table[name] = np.interp(progress, at, values).astype(np.float32)
    for name in ("top_k", "imagined_windows"):
        table[name] = np.rint(table[name])
    return table


class Schedules:
    """The scheduled weights of a run, on its device."""

    def __init__(self, method: MethodConfig, steps: int, device: torch.device | str) -> None:
        table = tabulate(method, steps)
        self._method = method
        self._column = {name: i for i, name in enumerate(table)}
        self._rows = torch.from_numpy(np.stack(list(table.values()), axis=1)).to(device)  # (steps, fields)
        self.k_varies = bool((table["top_k"] != method.top_k).any())
        self.ever_entropy = bool(table["entropy_coef"].any())
        self._imagined = table["imagined_windows"].astype(int).tolist()
        self.mean_imagined_windows = float(table["imagined_windows"].mean())

    def at(self, step: int) -> dict[str, Tensor]:
        """{field: 0-d float32} at `step`; past the end, the last row."""
        row = self._rows[min(step, len(self._rows) - 1)].unbind()
        return {name: row[i] for name, i in self._column.items()}

    def settings(self, step: int, trust: Trust | None = None) -> LossSettings:
        """What the loss needs at `step`, scheduled weights as 0-d tensors."""
        now, m = self.at(step), self._method
        return LossSettings(
            top_k=m.top_k,
            reality_weight=now["reality_weight"],
            critic_weight=now["critic_weight"],
            epsilon=now["epsilon"],
            sparsify=m.sparsify,
            normalize=m.normalize,
            reward_scale=m.reward_scale,
            reward_cap=m.reward_cap,
            entropy_coef=now["entropy_coef"],
            policy_weighting=m.policy_weighting,
            active_k=now["top_k"] if self.k_varies else None,
            use_entropy=self.ever_entropy,
            proposals=m.proposals,
            unproposed=m.unproposed,
            mean=m.mean,
            trust=trust,
        )

    def imagined_windows(self, step: int) -> int:
        """How many windows beside each of the corpus's are imagined at `step`: the host has to know."""
        return int(self._imagined[min(step, len(self._imagined) - 1)])
