"""The theatre: weights may be changed in place inside, and are bit for bit what they were on leaving.

    with SurgicalTheater(model, layers=[10, 11]) as theatre:
        operator.apply(action)                   # or anything else that writes into the fused QKV weights
        score = judge(model)
    print(theatre.saved_bytes)                   # of the copies: those weights alone, not the model

It is left by a return, an exception, Ctrl-C or a closed generator all the same. Weights are put back in place: the
parameter objects and their storage stay, so optimisers, DDP and compiled graphs go on with what they hold.

No graph crosses the door. Putting a weight back raises its version, so that `backward` outside, through a graph which
was built inside (or the other way round), is refused by autograd instead of mixing two sets of weights. Gradients
made and used inside are left alone. Under DDP every rank must operate alike, or replicas differ until they leave.
"""

import signal
import threading
from collections.abc import Sequence
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

from config import require

Layer = int | str

WRAPPERS = ("_orig_mod", "module", "student")
"""Where torch.compile, DDP and the objectives keep the model that they hold."""


def bare_model(model: nn.Module) -> nn.Module:
    """The model itself, out of torch.compile, DDP and objectives."""
    while inner := next((model._modules[name] for name in WRAPPERS if name in model._modules), None):
        model = inner
    return model


def projections(model: nn.Module, layers: Sequence[Layer]) -> list[nn.Linear]:
    """The fused QKV projections of `layers`: numbers of blocks (−1 is the last) or names of modules that hold one.

    Raises ConfigError for no layer, one that does not exist or comes twice, a model without such a projection, and
    for weights that FSDP has split.
    """
    require(len(layers) > 0, "layers", layers, "name at least one block")
    found = [projection(bare_model(model), layer) for layer in layers]
    for i, one in enumerate(found):
        require(
            all(one.weight is not other.weight for other in found[:i]), "layers", layers, f"{layers[i]} comes twice"
        )
        whole = not hasattr(one.weight, "full_tensor")
        require(whole, "layers", layers, "FSDP has split these weights; operate on a model that is whole on every rank")
    return found


def projection(model: nn.Module, layer: Layer) -> nn.Linear:
    """One fused QKV projection; see `projections`."""
    module: Any = model
    if isinstance(layer, str):
        try:
            module = model.get_submodule(layer)
        except AttributeError:
            require(False, "layers", layer, "the model has no module of that name, such as blocks.0")
    else:
        blocks: Any = getattr(model, "blocks", ())
        kind = type(model).__name__
        require(len(blocks) > 0, "layers", layer, f"{kind} has no blocks of attention to operate on")
        fix = f"{kind} has {len(blocks)} blocks, 0 to {len(blocks) - 1}; −1 is the last"
        require(-len(blocks) <= layer < len(blocks), "layers", layer, fix)
        module = blocks[layer]
    module = getattr(module, "attn", module)
    module = getattr(module, "qkv", module)
    weight = getattr(module, "weight", None)
    fused = isinstance(module, nn.Linear) and isinstance(weight, Tensor) and weight.shape[0] == 3 * weight.shape[1]
    require(fused, "layers", layer, "it holds no fused projection `qkv` of queries, keys and values, (3D, D)")
    return module


class SurgicalTheater:
    """A context manager inside which the QKV weights of `layers` may be changed in place; see the top of this file.

    Theatres may be nested within a thread, over the same weights too. Raises ConfigError for layers that it cannot
    have, and on entering RuntimeError while another thread's theatre is open over one of these weights or this
    theatre is open already. Once closed it may be entered again. DESIGN section 9.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        self._projections = projections(model, layers)
        self._beds: list[Bed] = []
        self._entered = False
        self.saved_bytes = 0
        """Bytes of the copies that the theatre holds while it is open; known from entering on."""

    @property
    def weights(self) -> list[Tensor]:
        """The weights that are restored, (3D, D) each."""
        return [p.weight for p in self._projections]

    def __enter__(self) -> "SurgicalTheater":
        if self._entered:
            raise RuntimeError("this theatre is open already; make another to nest them")
        try:
            self._entered = True
            _door.close()
            with _gate:
                check_free(self.weights)
                self._beds = [Bed(p) for p in self._projections]
                for bed in self._beds:
                    _open.setdefault(bed.place, []).append(bed)
            self.saved_bytes = sum(bed.saved.nbytes for bed in self._beds)
            if threading.current_thread() is threading.main_thread():
                _door.pass_on()
        except BaseException:
            self.__exit__()
            raise
        return self

    def restore(self) -> None:
        """Put the weights back without leaving: ready for the next operation."""
        for bed in self._beds:
            bed.restore()

    def __exit__(self, *error: object) -> None:
        if not self._entered:
            return
        try:
            self.restore()
        except BaseException:  # a signal that the door does not know, with a handler that raises: once more
            self.restore()
            raise
        finally:
            with _gate:
                for bed in self._beds:
                    leave(bed)
            self._beds, self._entered = [], False
            _door.open()


class Bed:
    """One weight and what it was."""

    def __init__(self, owner: nn.Linear) -> None:
        self.owner, self.weight, self.thread = owner, owner.weight, threading.get_ident()
        self.home = owner.weight.data  # the same storage, in case someone assigns another to `.data`
        self.place = storage_of(owner.weight)
        self.saved = owner.weight.detach().clone()

    @torch.no_grad()
    def restore(self) -> None:
        """The same parameter in the same storage with the same bits."""
        if self.owner.weight is not self.weight:
            self.owner.weight = self.weight
        if storage_of(self.weight) != self.place:
            self.weight.data = self.home
        self.weight.copy_(self.saved)


def storage_of(weight: Tensor) -> int:
    """Where a weight lies, which is the same for every view and wrapper of it."""
    return weight.untyped_storage().data_ptr()


_gate = threading.Lock()
_open: dict[int, list[Bed]] = {}
"""Beds by the place of their weight, outermost first."""


def check_free(weights: Sequence[Tensor]) -> None:
    """Raise RuntimeError where another thread operates on one of these weights."""
    here = threading.get_ident()
    if any(bed.thread != here for weight in weights for bed in _open.get(storage_of(weight), [])):
        raise RuntimeError("another thread operates on these weights: wait until it has left its theatre, or clone")


def leave(bed: Bed) -> None:
    """Close one bed; a theatre that was opened inside and outlives it restores to what this one did."""
    beds = _open.get(bed.place, [])
    if bed not in beds:
        return
    above = beds.index(bed) + 1
    if above < len(beds):
        beds[above].saved = bed.saved
    beds.remove(bed)
    if not beds:
        del _open[bed.place]


class Door:
    """Ctrl-C and SIGTERM wait while a theatre is being entered or left, and are passed on right after.

    Without it an interrupt between two weights, or before the first line of `__exit__`, would leave them operated.
    Python runs handlers in the main thread alone, and a signal without one ends the process: nothing to do then.
    """

    def __init__(self) -> None:
        self._waiting: list[int] = []
        self._handlers: dict[int, Any] = {}

    def close(self) -> None:
        """Stand between the signals and whoever handled them so far.

        Takes no lock: up to here an interrupt is raised at once, and could be between taking it and knowing so.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler) and handler != self.receive:
                self._handlers[number] = handler
                signal.signal(number, self.receive)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Keep what would interrupt `__enter__` or `__exit__`; pass anything else on."""
        inner = frame
        while inner is not None:
            if inner.f_code in CRITICAL:
                self._waiting.append(number)
                return
            inner = inner.f_back
        self._handlers[number](number, frame)

    def pass_on(self) -> None:
        """Hand over what waited: the first, if its handler raises."""
        waiting, self._waiting = self._waiting, []
        for number in waiting:
            self._handlers[number](number, None)

    def open(self) -> None:
        """Step aside where no theatre is left, unless someone else stands in front by now; then pass on."""
        main = threading.main_thread()
        if threading.current_thread() is not main:
            return
        if not any(bed.thread == main.ident for beds in list(_open.values()) for bed in beds):
            for number, handler in self._handlers.items():
                if signal.getsignal(number) == self.receive:
                    signal.signal(number, handler)
        self.pass_on()


_door = Door()
CRITICAL: frozenset[CodeType] = frozenset((SurgicalTheater.__enter__.__code__, SurgicalTheater.__exit__.__code__))
