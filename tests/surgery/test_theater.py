"""The theatre: whatever happens inside, outside no bit has changed."""

import signal
import sys
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from checks import ConfigError
from surgery import theater
from surgery.theater import SurgicalTheater, projections
from tests.surgery.patients import VOCAB, WIDTH, bits, patient, unchanged

TOKENS = torch.arange(10).view(1, 10) % VOCAB


def ruin(model: nn.Module, layers=(0, 2)) -> None:
    """Overwrite the QKV weights, NaN and −0 included."""
    with torch.no_grad():
        for p in projections(model, layers):
            p.weight.mul_(-1.7)
            p.weight[-1] = float("nan")  # of the values: some CPUs' attention swallows a NaN among the queries
            p.weight[1] = -0.0


@pytest.fixture
def model():
    """A patient that ends the test as it began it, with no theatre open and no handler left behind."""
    one, handler = patient(), signal.getsignal(signal.SIGINT)
    with torch.no_grad():
        one.blocks[0].attn.qkv.weight[3] = -0.0
    before, places = bits(one), [p.data_ptr() for p in one.parameters()]
    yield one
    assert unchanged(one, before)
    assert places == [p.data_ptr() for p in one.parameters()]
    assert not theater._open and signal.getsignal(signal.SIGINT) is handler


def test_a_return_restores(model):
    """Catches weights that stay operated after a normal end, and a theatre that lets no operation happen."""

    def operated() -> torch.Tensor:
        with SurgicalTheater(model, [0, 2]):
            ruin(model)
            return model(TOKENS)

    assert operated().isnan().any() and not model(TOKENS).isnan().any()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_restores_and_goes_on(model, error):
    """Catches errors that are swallowed, and ways out that are no Exception."""
    with pytest.raises(error), SurgicalTheater(model, [0, 2]):
        ruin(model)
        raise error


def test_a_closed_generator_restores(model):
    """Catches a generator that is dropped half-way and leaves its patient open."""

    def rounds():
        with SurgicalTheater(model, [0, 2]):
            ruin(model)
            yield

    going = rounds()
    next(going)
    assert model(TOKENS).isnan().any()
    going.close()


@pytest.fixture
def interruptible():
    """SIGINT as at a keyboard: a process that a shell started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_real_interrupt_at_every_line_of_the_doors(model):
    """Catches the moment between two weights, or before the first line of `__exit__`, at which Ctrl-C ruins a model.

    SIGINT is raised at each line and call of theater.py in turn, until a run has fewer of them.
    """
    before, where, hits = bits(model), theater.__file__, 0
    for moment in range(1, 2000):
        seen, fired = 0, False

        def trace(frame, event, argument, moment=moment):
            nonlocal seen, fired
            if frame.f_code.co_filename != where:
                return None
            seen += 1
            if seen == moment and not fired:
                fired = True
                signal.raise_signal(signal.SIGINT)
            return trace

        caught = False
        old = sys.gettrace()
        sys.settrace(trace)
        try:
            with SurgicalTheater(model, [0, 2]):
                ruin(model)
        except KeyboardInterrupt:
            caught = True
        finally:
            sys.settrace(old)
        assert unchanged(model, before), moment
        assert not theater._open, moment
        if not fired:
            break
        hits += caught
    else:
        pytest.fail("the theatre never ended")
    assert hits >= moment - 2 > 50  # an interrupt is delayed, not lost


def test_a_handler_of_the_callers_hears_of_an_interrupt_once(model):
    """Catches a request to stop (training/signals.py) that is lost, heard twice, or ends the evaluation."""
    heard = []
    old = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        with SurgicalTheater(model, [0]), SurgicalTheater(model, [0]):
            signal.raise_signal(signal.SIGINT)
            ruin(model, [0])
        assert heard == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, old)


def test_nested_theatres_restore_to_their_own_begin(model):
    """Catches an inner theatre that restores too much, and an outer one that restores too little."""
    with SurgicalTheater(model, [0, 2]):
        with torch.no_grad():
            model.blocks[0].attn.qkv.weight.add_(1)
        middle = bits(model)
        with SurgicalTheater(model, [0, 1]) as inner:
            ruin(model, [0, 1])
            inner.restore()
            assert unchanged(model, middle)
            ruin(model, [0, 1])
        assert unchanged(model, middle)


def test_theatres_left_in_the_wrong_order(model):
    """Catches an inner theatre that outlives the outer one and brings its operated weights back."""
    before = bits(model)
    outer, inner = SurgicalTheater(model, [0]), SurgicalTheater(model, [0])
    outer.__enter__()
    ruin(model, [0])
    inner.__enter__()
    outer.__exit__()
    assert unchanged(model, before)
    ruin(model, [0])
    inner.__exit__()
    outer.__exit__()  # nothing is left to do


def test_a_theatre_can_be_entered_again_but_not_twice_at_once(model):
    """Catches copies of operated weights that are taken for the original."""
    theatre = SurgicalTheater(model, [0, 2])
    for _ in range(2):
        with theatre:
            ruin(model)
            with pytest.raises(RuntimeError, match="open already"):
                theatre.__enter__()


def test_another_thread_waits(model):
    """Catches two threads that operate on the same weights, each saving what the other changed; and a lasting ban."""
    said: list[str] = []

    def operate(layers) -> None:
        try:
            with SurgicalTheater(model, layers):
                said.append("operated")
        except RuntimeError as error:
            said.append(str(error))

    def run(layers) -> str:
        thread = threading.Thread(target=operate, args=(layers,))
        thread.start()
        thread.join()
        return said[-1]

    with SurgicalTheater(nn.Sequential(model)[0], [0]):
        assert "another thread" in run([2, 0])
        assert run([1]) == "operated"
    assert run([0]) == "operated"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_operated_and_restored(model, backend):
    """Catches compiled code that keeps the weights it was made with, or a wrapper that hides the blocks."""
    before = model(TOKENS).detach()
    compiled: Any = torch.compile(model, backend=backend)
    with torch.no_grad():
        assert torch.allclose(compiled(TOKENS), before, atol=1e-5)
        with SurgicalTheater(compiled, [0, 2]):
            model.blocks[2].attn.qkv.weight.mul_(3)
            operated = model(TOKENS)
            assert torch.allclose(compiled(TOKENS), operated, atol=1e-5)
        assert not torch.allclose(operated, before, atol=1e-2)
        assert torch.allclose(compiled(TOKENS), before, atol=1e-5)
    torch.compiler.reset()


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_wrapped_model_is_operated_and_trains_on(model, group):
    """Catches a wrapper that hides the blocks, and parameters that DDP or the optimiser no longer hold."""
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    before = bits(model)
    with SurgicalTheater(wrapped, [-1]) as theatre:
        ruin(wrapped, [2])
        assert wrapped(TOKENS).isnan().any()
    assert theatre.weights[0] is model.blocks[2].attn.qkv.weight and unchanged(model, before)
    with SurgicalTheater(model, [0, 1, 2]):  # takes the step of those weights back
        wrapped(TOKENS).square().mean().backward()
        others = [p for p in model.parameters() if all(p is not w for w in theatre.weights)]
        saved = [p.detach().clone() for p in others]
        optimizer.step()
        assert not unchanged(model, before)
        with torch.no_grad():
            for p, value in zip(others, saved, strict=True):
                p.copy_(value)


def test_the_copies_are_of_the_target_weights_alone(model):
    """Catches a theatre that copies the model, and bytes that are reported and not held."""
    theatre = SurgicalTheater(model, [1, "blocks.2.attn"])
    assert theatre.saved_bytes == 0
    with theatre:
        held = sum(bed.saved.untyped_storage().nbytes() for bed in theatre._beds)
        assert theatre.saved_bytes == held == 2 * 3 * WIDTH * WIDTH * 4
    assert not theatre._beds and theatre.saved_bytes == held


def test_replaced_weights_are_put_back(model):
    """Catches an assignment that leaves another storage or another parameter in the model."""
    linear, before = model.blocks[0].attn.qkv, bits(model)
    weight, place = linear.weight, linear.weight.data_ptr()

    def put_back() -> bool:
        return linear.weight is weight and weight.data_ptr() == place and unchanged(model, before)

    with SurgicalTheater(model, [0]):
        linear.weight.data = torch.ones_like(linear.weight)
    assert put_back()
    with SurgicalTheater(model, [0]):
        linear.weight = nn.Parameter(torch.ones_like(linear.weight))
    assert put_back()
    with torch.inference_mode(), SurgicalTheater(model, [0]):
        linear.weight.mul_(2)
    assert put_back()


def test_no_graph_crosses_the_door(model):
    """Catches gradients that are silently those of other weights than the ones they go to."""
    with SurgicalTheater(model, [1]):
        ruin(model, [1])
        loss = model(TOKENS).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([3], "3 blocks, 0 to 2"),
        ([-4], "3 blocks"),
        ([], "at least one block"),
        ([1, 1], "comes twice"),
        ([1, "blocks.1"], "comes twice"),
        ([2, -1], "comes twice"),
        (["blocks.7"], "no module of that name"),
        (["blocks.0.mlp"], "no fused projection"),
        (["wte"], "no fused projection"),
    ],
)
def test_layers_that_cannot_be_are_named(model, layers, says):
    """Catches a typo that operates elsewhere."""
    with pytest.raises(ConfigError, match=says):
        SurgicalTheater(model, layers)


def test_models_without_the_projection_are_refused():
    """Catches an AttributeError from the depth, or an operation on any linear layer that is found."""
    with pytest.raises(ConfigError, match="Linear has no blocks"):
        SurgicalTheater(nn.Linear(4, 12), [0])
    strange = patient()
    strange.blocks[0].attn.qkv = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(ConfigError, match="fused projection"):
        SurgicalTheater(strange, [0])


def test_a_failed_entry_leaves_nothing(model):
    """Catches a theatre that fails to open and bars the weights for good."""
    theatre, linear = SurgicalTheater(model, [0, 2]), model.blocks[2].attn.qkv
    weight = linear.weight
    linear.register_parameter("weight", None)
    with pytest.raises(AttributeError):
        theatre.__enter__()
    assert not theater._open
    linear.weight = weight
