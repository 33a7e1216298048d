"""A walk through a transformer, block by block, with the inputs a forward would give each block.

Calibration needs the inputs of one block at a time, for all samples, while the blocks before it are
already quantized. A forward over the whole model for every block would cost the square of the
depth, so the arguments of all blocks (masks, rotary embeddings: small, mostly shared) are captured
once and only the hidden states are passed on by hand. Where a model does something between two
blocks (the output of one is not the input of the next: an encoder followed by a decoder), a new
``Segment`` starts and is captured by a forward of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..nn import ActivationQuantizer, LayerBatchNorm, MaQDLinear, Masks, rotate
from ..nn.precision import fast_bf16

Batch = dict[str, Tensor]
Batches = Tensor | Iterable[Tensor | Mapping[str, Any]]
"""Token ids (samples, tokens), or batches of them: (batch, tokens) or a tokenizer's mapping."""

_BATCH_BYTES = 256 << 20  # most bytes of a batch's largest tensor; several such live at once


class _Stop(Exception):
    """Ends a forward once everything that is wanted from it is known."""


def as_batches(data: Batches, model: nn.Module, batch_size: int | None = None) -> list[Batch]:
    """Calibration data as keyword arguments of ``model``, on its device, without labels.

    ``batch_size``: samples in a batch when ``data`` is one tensor; None: as many as let the widest
    layer's input, and the scores of eager attention, take 256 MiB (8,192 tokens of a model of 1
    billion parameters).

    Raises:
        ValueError: there is nothing in ``data``, or a batch is not (batch, tokens).
    """
    device = next(model.parameters()).device
    items: Iterable[Tensor | Mapping[str, Any]] = data
    if isinstance(data, Tensor):
        items = data.split(batch_size or _samples_at_once(model, data.shape[-1]))
    batches: list[Batch] = []
    for item in items:
        batch = {"input_ids": item} if isinstance(item, Tensor) else dict(item)
        tensors = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
        tensors.pop("labels", None)
        shapes = {tuple(v.shape) for k, v in tensors.items() if k == "input_ids"}
        if any(len(shape) != 2 for shape in shapes) or not tensors:
            raise ValueError(
                f"a calibration batch holds { ({k: tuple(v.shape) for k, v in tensors.items()}) }: "
                "pass token ids (batch, tokens), or mappings with input_ids like a tokenizer's"
            )
        if all(v.numel() for v in tensors.values()):
            batches.append(tensors)
    if not batches:
        raise ValueError("the calibration data is empty: pass at least one batch of token ids")
    return batches


def _samples_at_once(model: nn.Module, tokens: int) -> int:
    """How many samples of so many tokens keep the largest tensor within ``_BATCH_BYTES``."""
    width = max((m.in_features for m in model.modules() if isinstance(m, nn.Linear)), default=8192)
    if isinstance(model, PreTrainedModel):
        config = model.config.get_text_config()  # itself, or the part that reads text
        if config._attn_implementation == "eager":
            width = max(width, getattr(config, "num_attention_heads", 1) * tokens)
    return max(1, _BATCH_BYTES // (4 * width * max(1, tokens)))


def one_sample(batch: Batch) -> Batch:
    """The first sample of ``batch``."""
    count = len(next(iter(batch.values())))
    return {k: v[:1] if len(v) == count else v for k, v in batch.items()}


def counted_tokens(batch: Batch, skip_first: bool) -> Tensor | None:
    """Which tokens count, (batch, tokens) bool: no padding, and with ``skip_first`` no first ones.

    None means that all do. A sample of one token keeps it: without it nothing would be left.
    """
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    if tokens is None:
        return None
    mask = batch.get("attention_mask")
    valid = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if mask is not None and mask.shape == valid.shape:
        valid = mask.bool()
    if not skip_first:
        return valid
    rest = valid & (valid.cumsum(dim=1) > 1)
    return torch.where(rest.any(dim=1, keepdim=True), rest, valid)


def rows_of(x: Tensor, counted: Tensor | None) -> Tensor:
    """The rows (tokens, D) of ``x`` (..., D) that count, float32; all if the mask does not fit."""
    if counted is not None and x.shape[:-1] == counted.shape:
        x = x[counted]
    return x.detach().reshape(-1, x.shape[-1]).float()


def input_rows(layer: MaQDLinear, x: Tensor, counted: Tensor | None) -> Tensor:
    """``rows_of`` the input ``x`` of ``layer``, in the basis of its weight."""
    return rotate(rows_of(x, counted), layer.rotation)


@contextmanager
def float_activations(model: nn.Module) -> Iterator[None]:
    """For a while, layers leave their inputs float (their steps may not be known yet)."""
    layers = [m for m in model.modules() if isinstance(m, MaQDLinear)]
    quantizers = [layer.activation for layer in layers]
    try:
        for layer in layers:
            layer.activation = nn.Identity()
        yield
    finally:
        for layer, quantizer in zip(layers, quantizers, strict=True):
            layer.activation = quantizer


@contextmanager
def float_weights(block: nn.Module) -> Iterator[None]:
    """For a while, the linear layers below ``block`` multiply with their latent weights."""
    layers = [m for m in block.modules() if isinstance(m, MaQDLinear)]
    steps = [layer.weight_step for layer in layers]
    try:
        for layer in layers:
            layer.weight_step = None
        yield
    finally:
        for layer, step in zip(layers, steps, strict=True):
            layer.weight_step = step


def bfloat16_products(model: nn.Module) -> torch.autocast:
    """Autocast to bfloat16 where the processor is fast at it and the model is float32.

    It caches no weights, as they change meanwhile.
    """
    first = next(model.parameters())
    pays = fast_bf16(first.device) and first.dtype == torch.float32
    return torch.autocast(first.device.type, torch.bfloat16, pays, cache_enabled=False)


@contextmanager
def watching(modules: Iterable[nn.Module], see: Callable[..., Any]) -> Iterator[None]:
    """For a while, call ``see(module, args, kwargs)`` before every forward of ``modules``."""
    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_pre_hook(see, with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def standing_in(forwards: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """For a while, modules do what ``forwards`` says, a function of their args and kwargs."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = lambda *args, _forward=forward, **kwargs: _forward(args, kwargs)
        yield
    finally:
        for module, own in before.items():
            del module.forward
            if own is not None:
                module.forward = own


def run_model(model: nn.Module, batch: Batch) -> Any:
    """Run a forward without a key/value cache, which replayed blocks would go on filling."""
    accepted = inspect.signature(model.forward).parameters
    options = {"use_cache": False} if "use_cache" in accepted else {}
    return model(**batch, **options)


def run_body(model: nn.Module, batch: Batch) -> None:
    """Run a forward for the sake of its hooks, up to the input of the head.

    The logits would be the largest tensor of all, and nobody looks at them.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()

    def stop(*_: Any) -> None:
        raise _Stop

    with watching([] if head is None else [head], stop), suppress(_Stop):
        run_model(model, batch)


def find_blocks(model: nn.Module) -> dict[nn.Module, str]:
    """The blocks of a model, with their names: members of its outermost module lists.

    Lists without quantized layers do not count.
    """
    blocks: dict[nn.Module, str] = {}
    lists: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(p) for p in lists):
            continue
        if any(isinstance(m, MaQDLinear) for m in module.modules()):
            lists.append(name + ".")
            blocks.update({child: f"{name}.{i}" for i, child in enumerate(module)})
    return blocks


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _first_tensor(output: Any) -> Tensor:
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor


@dataclass
class Call:
    """One call of a block in a forward.

    ``rest`` holds, per batch, its arguments except for the hidden states.
    """

    block: nn.Module
    rest: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


class Segment:
    """Consecutive block calls, each fed with the output of the one before.

    ``hidden`` holds, per batch, the states that enter the next call; ``start`` is the number of
    block calls before this segment; ``plain`` says that blocks return hidden states alone.
    """

    def __init__(self, model: nn.Module, start: int, plain: bool) -> None:
        self.model, self.start, self.plain = model, start, plain
        self.calls: list[Call] = []
        self.hidden: list[Tensor] = []
        self.contexts = {
            m.context: None
            for m in model.modules()
            if isinstance(m, LayerBatchNorm | ActivationQuantizer)
        }
        self.masks: list[list[Masks]] = []

    def capture(self, batches: list[Batch]) -> None:
        """Run the model as it is now up to the last call and keep the arguments of the calls.

        Where blocks return nothing but hidden states, these cannot reach the arguments of the next
        block by another way, so the blocks of this segment pass them through: capturing is free.
        """
        for batch in batches:
            seen = 0

            def see(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                nonlocal seen
                index, seen = seen - self.start, seen + 1
                if index < 0:
                    return
                if index == 0:
                    self.hidden.append(_hidden(args, kwargs))
                    self.masks.append([context.masks for context in self.contexts])
                rest = {k: v for k, v in kwargs.items() if args or k != "hidden_states"}
                self.calls[index].rest.append((args[1:], rest))
                if index == len(self.calls) - 1:
                    raise _Stop

            passing = self._pass_through if self.plain else nullcontext
            with watching(find_blocks(self.model), see), passing(), suppress(_Stop):
                run_model(self.model, batch)

    def _pass_through(self) -> AbstractContextManager[None]:
        """For a while, the blocks of this segment return their hidden states unchanged."""
        return standing_in({call.block: _hidden for call in self.calls})

    def run(self, call: Call, index: int, hidden: Tensor) -> Tensor:
        """The output of ``call`` for batch ``index`` with these hidden states."""
        args, kwargs = call.rest[index]
        with ExitStack() as stack:
            for context, masks in zip(self.contexts, self.masks[index], strict=True):
                stack.enter_context(context.given(masks))
            return _first_tensor(call.block(hidden, *args, **kwargs))

    def input_of(self, layer: nn.Module, call: Call, index: int) -> Tensor | None:
        """The input of ``layer`` in ``call`` for batch ``index``; None if it is not reached."""
        found: list[Tensor] = []

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["input"])
            raise _Stop

        with watching([layer], see), suppress(_Stop):
            self.run(call, index, self.hidden[index])
        return found[0] if found else None

    def advance(self, call: Call) -> None:
        """Move the hidden states behind ``call``, whose captured arguments are dropped."""
        self.hidden = [self.run(call, index, hidden) for index, hidden in enumerate(self.hidden)]
        call.rest.clear()

    def release(self) -> None:
        """Free the captured states and masks."""
        self.hidden.clear()
        self.masks.clear()


class Entries:
    """The states that enter the blocks of a model in its forwards, which can start at any of them.

    What a change inside a block costs is then measured without the blocks before it. ``usable``
    says whether a forward that starts in the middle gave the same output, bit for bit: not where
    blocks return more than hidden states, or hand something on by another way.
    """

    def __init__(self, model: nn.Module, batches: list[Batch]) -> None:
        self.model, self.batches = model, batches
        self.names = list(find_blocks(model).values())
        self._blocks = list(find_blocks(model))
        self._entering: list[dict[nn.Module, Tensor]] = []
        self.usable = self._capture()

    def block_of(self, name: str) -> int:
        """The position of the block that the module ``name`` stands in; 0 where it is in none."""
        inside = (i for i, block in enumerate(self.names) if name.startswith(f"{block}."))
        return next(inside, 0)

    def run(self, index: int, block: int) -> Any:
        """The output of the model for batch ``index``, its blocks from number ``block`` on run."""
        if not block or not self.usable:
            return run_model(self.model, self.batches[index])
        before, entering = self._blocks[:block], self._entering[index][self._blocks[block]]
        with standing_in(dict.fromkeys(before, lambda *_: entering)):
            return run_model(self.model, self.batches[index])

    def _capture(self) -> bool:
        def see(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._entering[-1].setdefault(block, _hidden(args, kwargs))

        outputs = []
        for batch in self.batches:
            self._entering.append({})
            with watching(self._blocks, see):
                outputs.append(run_model(self.model, batch))
        if any(list(entering) != self._blocks for entering in self._entering):
            return False  # blocks in another order, or not all of them
        self.usable = True
        try:
            again = self.run(0, len(self._blocks) // 2)
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):
            return False  # these blocks return more than a tensor
        return torch.equal(_first_tensor(again), _first_tensor(outputs[0]))


def find_segments(model: nn.Module, batch: Batch) -> list[Segment]:
    """The segments in which ``model`` calls its blocks, found by a forward of one sample."""
    order: list[tuple[nn.Module, bool]] = []
    last: list[Tensor] = []
    plain = True

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = _hidden(args, kwargs)
        order.append((block, bool(last) and hidden is last[-1]))

    def after(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal plain
        plain = plain and isinstance(output, Tensor)
        last[:] = [_first_tensor(output)]

    blocks = find_blocks(model)
    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_hook(after).remove)
        stack.enter_context(watching(blocks, before))
        run_body(model, one_sample(batch))
    segments: list[Segment] = []
    for position, (block, continues) in enumerate(order):
        if not continues:
            segments.append(Segment(model, position, plain))
        segments[-1].calls.append(Call(block))
    return segments
