"""State belongs to a call: threads get what one thread gets, and gradient checkpointing changes
nothing, however many forwards wait for a backward."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maqd_hf import MaQDConfig, pack_model, quantize_model, use_native
from maqd_hf.nn import ActivationQuantizer, LayerBatchNorm, MaQDLinear
from tests.support.calls import THREADS, ids_of, in_threads, padded
from tests.support.families import tiny


def converted(family: str, gate: float = 0.5, pack: bool = False, **settings: Any) -> nn.Module:
    """A QAT model in eval mode whose first tokens differ from all others in every layer."""
    model = tiny(family)
    quantize_model(model, MaQDConfig(**settings))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # in training mode too, all calls are alike
        if isinstance(module, ActivationQuantizer) and module.log_step is not None:
            module.set_step(0.02)
        if isinstance(module, LayerBatchNorm):
            module.running_log_ms.fill_(0.3)
            module.batches_seen.fill_(1)
            module.gate.fill_(gate)
    if pack:
        pack_model(model)
        use_native(model, False)
    return model.eval()


def forms(model: nn.Module) -> list[dict[str, Any]]:
    """Ways to call ``model``: many of one shape, so that masks of another call would fit."""
    left, right = padded([6, 3], 6, left=True), padded([2, 6], 6, left=False)
    found: list[dict[str, Any]] = [
        {"input_ids": ids_of(2, 6)},
        {"input_ids": ids_of(2, 6), "attention_mask": left},
        {"input_ids": ids_of(2, 6), "attention_mask": right},
        {"input_ids": ids_of(1, 9, seed=1)},
        {"input_ids": ids_of(3, 4, seed=2), "attention_mask": padded([4, 1, 2], 4, left=True)},
        {"inputs_embeds": model.get_input_embeddings()(ids_of(2, 6, seed=3)).detach()},
    ]
    if model.config.model_type in ("bert", "roberta"):
        return found
    packed = torch.tensor([[0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1]])  # two documents in a row
    with torch.no_grad():
        cache = model(ids_of(2, 3, seed=4)).past_key_values
    found.append({"input_ids": ids_of(2, 6), "position_ids": packed})
    found.append({"input_ids": ids_of(2, 6, seed=5), "past_key_values": cache})
    return found


def logits_of(model: nn.Module, form: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**copy.deepcopy(form)).logits


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads take turns a hundred times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def halt(model: nn.Module) -> threading.Barrier:
    """All threads wait for one another after they entered ``model``, before its first norm or
    quantized layer: each has handed in its masks, and none has used them."""
    barrier = threading.Barrier(THREADS)
    block = next(m for m in model.modules() if isinstance(m, nn.ModuleList))[0]

    def wait(*_: Any) -> None:
        barrier.wait(60)

    block.register_forward_pre_hook(wait)
    return barrier


STATES = {
    "packed, static steps and norms": {"gate": 1.0, "pack": True},
    "packed, group steps, norms per token": {
        "gate": 0.0,
        "pack": True,
        "activation_scaling": "group",
        "group_size": 16,
        "activation_levels": 15,
    },
    "static steps, gates half open": {},
    "token steps, gates open": {"gate": 1.0, "activation_scaling": "token"},
    "static steps, rotated, gates closed": {"gate": 0.0, "activation_levels": 15},
}


CASES = [("llama-tied", state) for state in STATES] + [
    (family, state)
    for family in ("gpt2", "opt", "bert")
    for state in ("packed, static steps and norms", "static steps, gates half open")
]


@pytest.mark.parametrize(("family", "state"), CASES)
def test_threads_get_what_one_thread_gets(family: str, state: str, hurried: None) -> None:
    model = converted(family, **STATES[state])
    calls = forms(model)
    wanted = [logits_of(model, form) for form in calls]
    barrier = halt(model)

    def work(thread: int) -> None:
        for turn in range(len(calls)):
            which = (thread + turn) % len(calls)
            got = logits_of(model, calls[which])
            assert torch.equal(got, wanted[which]), f"thread {thread}, form {which}"

    in_threads(work, barrier)


# ------------------------------------------------------------------------- gradient checkpointing


def by_transformers(model: nn.Module, reentrant: bool) -> None:
    new = getattr(model, "activation_checkpointing_enable", None)  # renamed in 5.2x
    (new or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})


def around(modules: list[nn.Module], reentrant: bool) -> None:
    """What a user does who checkpoints for himself."""

    def run(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return checkpoint(partial(own, **kwargs), *args, use_reentrant=reentrant)

    for module in modules:
        module.forward = partial(run, module.forward)


def around_blocks(model: nn.Module, reentrant: bool) -> None:
    around([m for name, m in model.named_modules() if name.endswith((".0", ".1"))], reentrant)


def around_layers(model: nn.Module, reentrant: bool) -> None:
    around([m for m in model.modules() if isinstance(m, MaQDLinear)], reentrant)


def one_in_another(model: nn.Module, reentrant: bool) -> None:
    around(
        [m for name, m in model.named_modules() if name.endswith((".mlp", ".output"))], reentrant
    )
    around_blocks(model, reentrant)


WAYS = {
    "by transformers": by_transformers,
    "around blocks": around_blocks,
    "around layers": around_layers,
    "one in another": one_in_another,
}


def gradients(
    model: nn.Module, calls: list[dict[str, Any]], backward: Callable[[list[Tensor]], None]
) -> dict[str, Tensor]:
    """The gradients of all parameters after a forward for each of ``calls``, and the buffers."""
    model.train()
    model.config.use_cache = False  # it would grow when a block is run again
    losses = [
        model(**form).logits.square().mean() * (index + 1) * (-1) ** index
        for index, form in enumerate(calls)
    ]
    backward(losses)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) > 20
    return found | dict(model.named_buffers())


def at_once(losses: list[Tensor]) -> None:
    torch.stack(losses).sum().backward()


def one_by_one(losses: list[Tensor]) -> None:
    for loss in losses:
        loss.backward()


def elsewhere(losses: list[Tensor]) -> None:
    """In another thread than the forwards, as on GPUs."""
    thread = threading.Thread(target=at_once, args=(losses,))
    thread.start()
    thread.join()


def twice(losses: list[Tensor]) -> None:
    torch.stack(losses).sum().backward(retain_graph=True)
    at_once(losses)


def assert_checkpointing_changes_nothing(
    start: nn.Module,
    way: Callable[[nn.Module, bool], None],
    reentrant: bool,
    calls: list[dict[str, Any]],
    backward: Callable[[list[Tensor]], None] = at_once,
) -> None:
    plain, checkpointed = copy.deepcopy(start), copy.deepcopy(start)
    way(checkpointed, reentrant)
    wanted, got = gradients(plain, calls, backward), gradients(checkpointed, calls, backward)
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-6, msg=name)


def test_layers_that_share_a_rounded_input_may_be_checkpointed_one_by_one() -> None:
    """q, k and v rotate and round their input once; run again, each does so for itself."""
    for settings in ({}, {"activation_scaling": "token"}):
        start = converted("llama-tied", activation_levels=15, **settings)
        calls = forms(start)[1:3]
        for backward in (at_once, twice):
            assert_checkpointing_changes_nothing(start, around_layers, False, calls, backward)


REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["new", "reentrant"])


@REENTRANT
@pytest.mark.parametrize(
    ("family", "way"),
    [("llama-tied", way) for way in WAYS]
    + [("gpt2", "by transformers"), ("bert", "by transformers"), ("bert", "around blocks")],
)
def test_forwards_before_a_backward_keep_their_masks(
    family: str, way: str, reentrant: bool
) -> None:
    start = converted(family)
    calls = forms(start)
    for several in ([0], [1, 2], [2, 1], [4, 0, 1]):
        chosen = [calls[which] for which in several]
        assert_checkpointing_changes_nothing(start, WAYS[way], reentrant, chosen)


@REENTRANT
@pytest.mark.parametrize("way", ["by transformers", "one in another"])
@pytest.mark.parametrize("backward", [one_by_one, elsewhere, twice])
def test_backward_may_come_in_parts_again_and_from_another_thread(
    way: str, reentrant: bool, backward: Callable[[list[Tensor]], None]
) -> None:
    start = converted("llama-tied")
    calls = forms(start)[:3]
    assert_checkpointing_changes_nothing(start, WAYS[way], reentrant, calls, backward)
