"""The operation: the r largest singular values of a fused QKV weight are scaled, each by a factor near 1.

    operator = Operator(model, layers=[10, 11], rank=4)
    with SurgicalTheater(model, operator.layers):
        operator.apply(action)                   # (L, r): one number per layer and singular direction, |a| ≤ LIMIT

With W = Σ σᵢ uᵢ vᵢᵀ the weight becomes W' = W + Σ aᵢ σᵢ uᵢ vᵢᵀ over the r largest σ. As σᵢ uᵢ = W vᵢ, only the right
singular vectors are needed: they come from the eigenvectors of WᵀW in float64, which for the largest σ is exact to
float32's precision and decomposes a D × D matrix instead of a 3D × D one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from config import require
from surgery.theater import Layer, projections

LIMIT = 0.1
"""The most by which a singular value may change, as a share of it (DESIGN section 9)."""


class Directions(NamedTuple):
    """What an operation needs to know of one weight (3D, D), in its type and on its device."""

    values: Tensor  # (r,), the largest singular values, falling
    right: Tensor  # (r, D), their right singular vectors
    left: Tensor  # (3D, r), their left singular vectors, each times its value


class Fingerprint(NamedTuple):
    """Sums of a weight's bits by row and by column: it changes with any one bit, and with the order of rows."""

    rows: Tensor
    columns: Tensor

    def of_same(self, other: "Fingerprint") -> bool:
        """Whether both belong to the same bits."""
        return all(a.device == b.device and torch.equal(a, b) for a, b in zip(self, other, strict=True))


def fingerprint(weight: Tensor) -> Fingerprint:
    """The fingerprint of a weight (3D, D).

    Versions are cheaper and not to be trusted: writing through `.data` leaves them as they are, and a theatre raises
    them while it restores every bit.
    """
    weight = weight.detach().contiguous()
    packed = weight.shape[1] * weight.element_size() % 8 == 0
    bits = weight.view(torch.int64 if packed else torch.uint8)
    return Fingerprint(bits.sum(1), bits.sum(0))  # integers wrap: exact, and the same in any order


def decompose(weight: Tensor, rank: int) -> Directions:
    """The `rank` largest singular values of weight (3D, D) and their vectors.

    Raises RuntimeError for a weight that is not finite.
    """
    with torch.autocast(weight.device.type, enabled=False):
        exact = weight.detach().to("cpu" if weight.device.type == "mps" else weight.device).double()
        gram = exact.mT @ exact  # (D, D)
        if not gram.isfinite().all():
            raise RuntimeError("a weight is not finite: it has no singular values to scale")
        right = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(-1)  # (D, r); eigenvalues rise
        left = exact @ right  # (3D, r)
    return Directions(left.norm(dim=0).to(weight), right.mT.to(weight).contiguous(), left.to(weight).contiguous())


class Operator:
    """Scales the `rank` largest singular values of the fused QKV weights of `layers`. DESIGN section 9.

    Singular vectors are kept until a weight has changed, by whatever means, and are then made anew: they are those of
    the weights as they stand, operated or not. Raises ConfigError for layers that it cannot have (see
    `theater.projections`) and for a rank that the weights lack.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], rank: int) -> None:
        self.layers, self.rank = list(layers), rank
        self.projections = projections(model, layers)
        most = min(p.weight.shape[1] for p in self.projections)
        require(1 <= rank <= most, "rank", rank, f"use 1 to {most}, the width of the model")
        self._known: dict[int, tuple[Fingerprint, Directions]] = {}

    def of(self, model: nn.Module) -> "Operator":
        """The same operation on another model, such as a clone: vectors of equal weights need not be made again."""
        other = Operator(model, self.layers, self.rank)
        other._known = dict(self._known)
        return other

    @property
    def shape(self) -> tuple[int, int]:
        """(L, r) of an action."""
        return len(self.projections), self.rank

    def directions(self) -> list[Directions]:
        """Each layer's singular values and vectors, of its weight as it is now."""
        return [self._directions(i, p.weight) for i, p in enumerate(self.projections)]

    def _directions(self, layer: int, weight: Tensor) -> Directions:
        print_ = fingerprint(weight)
        known = self._known.get(layer)
        if known is None or not known[0].of_same(print_):
            self._known.pop(layer, None)
            known = self._known[layer] = print_, decompose(weight, self.rank)
        return known[1]

    def checked(self, actions: Tensor | np.ndarray, *, batch: bool = False) -> Tensor:
        """An action (L, r), or with `batch` several (M, L, r), as numbers beside the weights.

        Raises ConfigError for another shape and for numbers beyond the limit: they are refused, not clipped, since an
        agent would otherwise be told that an action did what another one does.
        """
        values = torch.as_tensor(actions).detach()
        values = values if values.is_floating_point() else values.float()
        names = "actions (M, L, r)" if batch else "action (L, r)"
        fits = values.ndim == 2 + batch and values.shape[-2:] == self.shape and len(values) > 0
        require(fits, f"shape of {names}", tuple(values.shape), f"L, r = {self.shape}")
        largest = values.abs().max().item()
        rounding = max(torch.finfo(t).eps for t in (values.dtype, torch.float32))  # float32's 0.1 is more than 0.1
        within = largest <= LIMIT * (1 + rounding)  # not for NaN either
        require(within, f"largest number of {names}", largest, f"use numbers from −{LIMIT} to {LIMIT}")
        return values.to(self.projections[0].weight)

    @torch.no_grad()
    def apply(self, action: Tensor | np.ndarray) -> None:
        """Operate in place on the weights as they are: undone inside a theatre, kept outside of one.

        action (L, r). A layer whose row is zero is not touched: the zero action changes no bit. A second action in
        the same theatre scales what the first one left. Raises ConfigError as `checked` does, before any change.
        """
        action = self.checked(action)
        for projection, row, known in zip(self.projections, action, self.directions(), strict=True):
            if row.any():
                projection.weight.addmm_(known.left * row, known.right)
