"""Laws of ``Calls`` on a model in small: which call a layer runs in, and who may come between."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from maqd_hf.kernels.fake_quantize import round_tokens
from maqd_hf.kernels.hadamard import hadamard
from maqd_hf.nn import BatchContext, LayerBatchNorm, LinearSpec, MaQDLinear, Masks, NormSpec
from maqd_hf.nn.calls import KEPT
from tests.support.calls import THREADS, ids_of, in_threads, padded
from tests.support.families import VOCABULARY


class Block(nn.Module):
    """A norm and a quantized layer that look at the masks."""

    def __init__(self, context: BatchContext) -> None:
        super().__init__()
        self.norm = LayerBatchNorm(8, NormSpec(first_token="own"), context=context)
        self.norm.gate.fill_(0.5)
        spec = LinearSpec(4, 255, first_token="own")
        self.linear = MaQDLinear(8, 8, spec=spec, context=context)
        self.linear.activation.set_step(0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class Small(nn.Module):
    """Ids and mask in, one block that may be checkpointed, a sum out."""

    def __init__(self) -> None:
        super().__init__()
        self.context = BatchContext()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.block = Block(self.context)
        self.inside: Callable[[], object] = lambda: None
        self.checkpointed = self.reentrant = False
        self.context.attach(self)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        self.inside()
        if self.checkpointed:
            y = checkpoint(self.block, x, use_reentrant=self.reentrant)
        else:
            y = self.block(x)
        return (x + y).square().sum()


def small_gradient(model: Small, losses: list[Tensor]) -> Tensor:
    (grad,) = torch.autograd.grad(torch.stack(losses).sum(), [model.embed.weight])
    return grad


IDS = ids_of(2, 6)
LEFT = padded([6, 3], 6, left=True)


def test_a_call_inside_a_call_leaves_the_outer_one_its_masks() -> None:
    model = Small().eval()
    alone = model(IDS, LEFT)
    assert not torch.equal(alone, model(IDS))

    def inner() -> None:
        model.inside = lambda: None
        model(IDS)

    model.inside = inner
    assert torch.equal(model(IDS, LEFT), alone)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_call_that_an_exception_ends_is_over(error: type[BaseException]) -> None:
    model = Small().eval()
    inner = copy.deepcopy(model)
    inner.block.norm.context = inner.context = model.context  # a base model in a model
    inner._forward_pre_hooks.clear()
    inner._forward_hooks.clear()
    model.context.attach(inner)
    alone = model(IDS)

    def fail() -> None:
        raise error

    inner.inside = fail
    model.inside = partial(inner, IDS, LEFT)
    with suppress(error):
        model(IDS, LEFT)
    if error is ValueError:
        assert model.context.masks == Masks()
    model.inside = lambda: None
    assert torch.equal(model(IDS), alone)


def test_a_failed_call_inside_a_call_gives_the_outer_one_back_its_masks() -> None:
    model = Small().eval()
    alone = model(IDS, LEFT)

    def inner() -> None:
        model.inside = fail
        with suppress(ValueError):
            model(IDS)

    def fail() -> None:
        raise ValueError

    model.inside = inner
    assert torch.equal(model(IDS, LEFT), alone)


def test_a_backward_inside_a_forward_keeps_to_its_own_call() -> None:
    model = Small()
    wanted = small_gradient(model, [model(IDS, LEFT)])
    model.checkpointed = True
    loss, found = model(IDS, LEFT), []
    model.inside = lambda: found or found.append(small_gradient(model, [loss]))
    model(IDS)
    torch.testing.assert_close(found[0], wanted)


def test_any_number_of_forwards_may_wait_for_their_backward() -> None:
    model = Small().eval()
    masks = [LEFT, None] * 50
    wanted = small_gradient(model, [model(IDS, mask) for mask in masks])
    model.checkpointed = True
    got = small_gradient(model, [model(IDS, mask) for mask in masks])
    torch.testing.assert_close(got, wanted)


def test_a_call_is_known_as_long_as_its_output_and_no_longer() -> None:
    model = Small().eval()
    outputs = [model(IDS, LEFT) for _ in range(2 * KEPT)]
    assert len(model.context._calls._known) == 2 * KEPT
    outputs.clear()
    gc.collect()
    assert len(model.context._calls._known) == KEPT
    with torch.no_grad():
        for _ in range(3):
            model(IDS, LEFT)
    assert len(model.context._calls._known) == KEPT


def test_a_model_goes_with_its_last_reference() -> None:
    model = Small()
    gone, output = weakref.ref(model), model(IDS, LEFT)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    output.backward()


def test_forwards_whose_outputs_nobody_kept_are_known() -> None:
    """Losses on hidden states that a hook took."""
    model, taken = Small().eval(), []
    model.block.linear.register_forward_hook(lambda module, args, output: taken.append(output))

    def run() -> Tensor:
        taken.clear()
        for mask in (LEFT, None, LEFT.flip(1)):
            model(IDS, mask)
        hidden = list(taken)
        return small_gradient(model, [y.square().sum() for y in hidden])

    wanted = run()
    model.checkpointed = True
    torch.testing.assert_close(run(), wanted)


def test_a_layer_outside_all_calls_knows_nothing_also_when_run_again() -> None:
    model = Small().eval()
    x = torch.randn(2, 6, 8, requires_grad=True)
    (wanted,) = torch.autograd.grad(model.block(x).square().sum(), [x])
    loss = model(IDS, LEFT)
    y = checkpoint(model.block, x, use_reentrant=False).square().sum()
    model.checkpointed = True
    (loss + model(IDS, LEFT.flip(1))).backward()
    (got,) = torch.autograd.grad(y, [x])
    assert torch.equal(got, wanted)


def losses_of_threads(model: Small, masks: list[Tensor | None]) -> list[Tensor]:
    """One loss of every thread; they follow one another, so that they may have one ident."""
    losses: list[Tensor] = []
    for mask in masks:
        thread = threading.Thread(target=lambda m=mask: losses.append(model(IDS, m)))
        thread.start()
        thread.join()
    return losses


@pytest.mark.parametrize("isa", ["reference", "best"])
def test_what_layers_share_keeps_no_tensor_for_its_backward(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be made inside a checkpointed stretch or have been made before it."""
    if isa == "best":
        monkeypatch.delenv("MAQD_KERNEL")
    x, kept = torch.randn(2, 3, 16, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda packed: packed):
        results = hadamard(x, 16), round_tokens(x, 15, 0.8), round_tokens(x, 255)
    assert all(y.requires_grad for y in results) and not kept


def test_forwards_of_threads_that_cannot_be_told_apart_are_refused() -> None:
    """Every thread numbers its nodes from 0: the forwards have the same numbers."""
    model = Small().eval()
    wanted = small_gradient(model, [model(IDS, LEFT)])
    model.checkpointed = True
    loss, _ = losses_of_threads(model, [LEFT, LEFT.clone()])
    torch.testing.assert_close(small_gradient(model, [loss]), wanted)
    loss, _ = losses_of_threads(model, [LEFT, None])
    with pytest.raises(RuntimeError, match="train a model in one thread"):
        small_gradient(model, [loss])


# ----------------------------------------------------------------- compilers, exporters, wrappers


def with_compiled_block(model: Small) -> Small:
    model = copy.deepcopy(model)
    model.block = torch.compile(model.block, backend="aot_eager", fullgraph=True)
    return model


def test_a_compiled_block_reads_the_masks_of_the_call_it_is_in() -> None:
    model = Small().eval()
    compiled = with_compiled_block(model)
    for mask in (LEFT, None, LEFT.flip(1)):
        torch.testing.assert_close(compiled(IDS, mask), model(IDS, mask))


@pytest.mark.parametrize("reentrant", [False, True], ids=["new", "reentrant"])
def test_a_compiled_block_that_is_run_again_has_the_masks_of_its_forward(reentrant: bool) -> None:
    model = Small().eval()
    compiled = with_compiled_block(model)
    compiled.checkpointed, compiled.reentrant = True, reentrant
    for run in (model, compiled):
        torch.stack([run(IDS, mask) for mask in (LEFT, None, LEFT.flip(1))]).sum().backward()
    torch.testing.assert_close(compiled.embed.weight.grad, model.embed.weight.grad)
    alone = torch.randn(2, 6, 8)
    with torch.no_grad():
        torch.testing.assert_close(compiled.block(alone), model.block(alone))


def test_exported_and_traced_models_have_masks() -> None:
    model = Small().eval()
    other = LEFT.flip(1)
    exported = torch.export.export(model, (IDS, LEFT)).module()
    traced = torch.jit.trace(model, (IDS, LEFT))
    assert model.context.masks == Masks()
    for run in (exported, traced):
        for mask in (LEFT, other):
            torch.testing.assert_close(run(IDS, mask), model(IDS, mask))
    assert not torch.equal(model(IDS, LEFT), model(IDS, other))


def test_replicas_share_a_context_and_not_their_masks() -> None:
    """As ``DataParallel`` makes them: shallow copies of all modules, each run by a thread."""
    model = Small().eval()
    masks = [LEFT, None, LEFT.flip(1), torch.ones(2, 6)]
    wanted = [model(IDS, mask) for mask in masks]
    barrier = threading.Barrier(THREADS)
    replicas = []
    for _ in range(THREADS):
        replica = model._replicate_for_data_parallel()
        for name, module in model.named_children():
            setattr(replica, name, module)
        replica.inside = lambda: barrier.wait(60)
        replicas.append(replica)

    def work(thread: int) -> None:
        assert torch.equal(replicas[thread](IDS, masks[thread]), wanted[thread])

    in_threads(work, barrier)


def test_hooks_of_accelerate_change_nothing() -> None:
    """They stand between the entrance and the layers, and may move a layer to another device."""
    model = Small().eval()
    wanted = model(IDS, LEFT)
    for module in (model, model.block.linear):
        add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))
    assert torch.equal(model(IDS, LEFT), wanted)
    with model.context.given(Masks(LEFT.bool(), LEFT.bool())):
        masks = model.context.masks_for(torch.empty(2, 6, 8, device="meta"))
    assert {mask.device.type for mask in masks} == {"meta"}


def test_wrappers_of_distributed_training_change_nothing(tmp_path: Path) -> None:
    """In one process: DDP, and FSDP's own wrapper for checkpointing."""
    model, several = Small().eval(), (LEFT, None, LEFT.flip(1))
    wanted = small_gradient(model, [model(IDS, mask) for mask in several])
    wrapped = copy.deepcopy(model)
    wrapped.block = checkpoint_wrapper(wrapped.block)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(wrapped, find_unused_parameters=True)
        torch.stack([parallel(IDS, mask) for mask in several]).sum().backward()
        torch.testing.assert_close(wrapped.embed.weight.grad, wanted)
    finally:
        torch.distributed.destroy_process_group()
