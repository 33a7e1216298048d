"""Block-wise reconstruction: every block is trained to give the output of the float model's block.

Not in the paper. Between start values that see one matrix (``gptq``) and training that runs the
whole model, all parameters of one transformer block are trained together on its own output error,
block after block, each on inputs from the quantized ones before it. BRECQ (arXiv:2102.05426) and
EfficientQAT (arXiv:2407.11062) do so; unlike the former this trains latents, not roundings.

Three things differ from a plain loop over AdamW:

- First tokens do not count in the loss: the massive activations that pretrained models park there
  would own a squared error.
- A layer does not feel the length of its latent rows, which it standardizes, so they train at unit
  standard deviation and get their own back afterwards: one learning rate is then the same relative
  change in every row of every layer (rows of SmolLM2-135M lie between 0.001 and 0.8).
- A block that is no better on held-out samples after training than before keeps what it had.

At 4 levels half a correction gives 2.430 nats, a whole one 2.461 and none 2.560 (notebook:
"Block-wise reconstruction, its settings").
"""

from __future__ import annotations

import math
import random
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...nn import ActivationQuantizer
from ...nn.modes import evaluating
from ...nn.precision import fast_bf16
from ..blocks import (
    Batch,
    Batches,
    Call,
    Segment,
    as_batches,
    find_blocks,
    find_segments,
    run_model,
    watching,
)
from .store import BlockStore
from .training import BlockSettings, BlockTraining


@dataclass(frozen=True)
class BlockResult:
    """The squared error of a block's output on held-out samples, relative to the float output's.

    There is one ``before`` and one ``after`` training; ``kept`` says whether the trained values
    were better and stayed.
    """

    before: float
    after: float
    kept: bool


@dataclass
class BlockwiseReport:
    """What ``reconstruct_blocks`` did: ``blocks`` has the results by name, in calling order.

    ``repeated`` are blocks that are called more than once, ``tied`` are parameters left alone
    because other blocks or layers use them too.
    """

    blocks: dict[str, BlockResult] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        count = max(len(self.blocks), 1)
        before = sum(r.before for r in self.blocks.values()) / count
        after = sum(r.after for r in self.blocks.values()) / count
        lines = [
            f"block-wise: {len(self.blocks)} blocks, mean relative output error on held-out "
            f"samples {before:.2e}, trained {after:.2e}"
        ]
        unchanged = [name for name, result in self.blocks.items() if not result.kept]
        if unchanged:
            lines.append(f"  no better for training, as they were: {', '.join(unchanged)}")
        if self.repeated:
            lines.append(f"  called again, trained at the first call: {', '.join(self.repeated)}")
        if self.tied:
            lines.append(f"  used elsewhere too, left alone: {', '.join(self.tied)}")
        return "\n".join(lines)


def reconstruct_blocks(
    model: nn.Module,
    teacher: nn.Module,
    data: Batches,
    *,
    learning_rate: float | None = None,
    scale_learning_rate: float = 1e-4,
    epochs: int = 2,
    batch_size: int = 1,
    gradient_clip: float = 0.3,
    correction: float = 0.5,
    relative_tokens: bool = False,
    skip_first: bool = True,
    autocast: bool | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> BlockwiseReport:
    """Train the blocks of a quantized model, one at a time, to give the float blocks' outputs.

    Args:
        model: a QAT model with start values, after ``calibrate``; changed in place.
        teacher: the float model it was made from, same class, dtype and attention implementation.
        data: token ids (samples, tokens), or batches (ids, or a tokenizer's mappings). The last
            eighth of the batches (at least one, unless there is only one) is held out.
        learning_rate: rate of the latents, as a share of their row's standard deviation; None: by
            the layer's levels. Offset and bias move by the same share of the root mean square of
            the layer's weight.
        scale_learning_rate: rate of weight scales and static activation steps, both logarithms.
        epochs: passes over the data for every block; the rates fall to 0 along a cosine.
        batch_size: samples in an optimizer step when ``data`` is one tensor.
        gradient_clip: largest norm of the gradient of the error relative to that before training.
        correction: 1: the target is the float model's own output, so that a block also makes up
            for errors it was given; 0: what the float block makes of the block's quantized inputs;
            between: both, mixed.
        relative_tokens: divide each token's error by its own size, so that loud tokens count no
            more than others.
        skip_first: first tokens do not count; padding never does.
        autocast: multiply in bfloat16; None: where the processor is fast at it and the model is
            float32.
        seed: seed of the order of the batches.
        folder: every finished block is saved there. A run that is started again with the same
            arguments, data and model loads the blocks it finds there instead of training them.
        progress: show a bar.

    All parameters of a block are trained, in eval mode (no dropout, norms keep their running
    statistics); gradients and optimizer state exist for one block at a time, hidden states of model
    and teacher for all of ``data``. The arguments of a block beside the hidden states (masks, an
    encoder's states) are those of the quantized model. A block that is called more than once is
    trained at its first call.

        quantize_model(model, config)
        calibrate(model, token_ids)
        reconstruct_blocks(model, teacher, token_ids)

    Raises:
        ValueError: nothing to train, model and teacher do not fit, activation steps are not
            calibrated, an error is not finite (names the block), or ``folder`` holds another run.
    """
    _check(model, teacher)
    batches = as_batches(data, model, batch_size)
    device = next(model.parameters()).device.type
    if autocast is None:
        autocast = fast_bf16(device) and {p.dtype for p in model.parameters()} == {torch.float32}
    settings = BlockSettings(
        learning_rate,
        scale_learning_rate,
        epochs,
        gradient_clip,
        correction,
        relative_tokens,
        skip_first,
        autocast,
        seed,
    )
    store = None if folder is None else BlockStore(Path(folder), asdict(settings), batches)
    narrow = torch.autocast(device, torch.bfloat16, autocast, cache_enabled=False)  # weights change
    with evaluating(model), evaluating(teacher), narrow:
        walk = _Walk(model, teacher, batches, settings, store)
        walk.all_blocks(find_segments(model, batches[0]), progress)
    return walk.report


def _check(model: nn.Module, teacher: nn.Module) -> None:
    """Raise ``ValueError`` for a pair of models that ``reconstruct_blocks`` cannot train."""
    blocks = find_blocks(model)
    if not blocks:
        raise ValueError("the model has no quantized blocks: convert it with quantize_model first")
    if find_blocks(teacher):
        raise ValueError("the teacher is quantized: give the float model, loaded again")
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if any(id(p) in trained for p in teacher.parameters()):
        raise ValueError(
            "the teacher shares trainable parameters with the model, so it would change with it: "
            "load it again, or copy.deepcopy it before quantize_model"
        )
    modules = dict(teacher.named_modules(remove_duplicate=False))
    missing = [name for name in blocks.values() if name not in modules]
    if missing:
        raise ValueError(f"the teacher has no {missing[0]}: give a model of the same class")
    for what in ("_attn_implementation", "hidden_size"):
        ours, theirs = (getattr(getattr(m, "config", None), what, None) for m in (model, teacher))
        if ours != theirs:
            raise ValueError(f"the teacher has {what}={theirs!r}, the model {ours!r}")
    for name, module in model.named_modules():
        if isinstance(module, ActivationQuantizer) and not module.calibrated:
            raise ValueError(f"{name} has no step yet: run calibrate_activations first")


class _Reached(Exception):
    """Ends a forward of the teacher at the block that is looked for."""


class _Walk:
    """Trains the blocks one after the other, the teacher's hidden states beside the model's."""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        batches: list[Batch],
        settings: BlockSettings,
        store: BlockStore | None,
    ) -> None:
        self.teacher, self.batches, self.settings, self.store = teacher, batches, settings, store
        self.names = find_blocks(model)
        self.partner = {block: teacher.get_submodule(name) for block, name in self.names.items()}
        self.report = BlockwiseReport()
        used = Counter(id(p) for block in self.names for p in block.parameters())
        inside = {module for block in self.names for module in block.modules()}
        used.update(
            id(p)
            for module in model.modules()
            if module not in inside
            for p in module.parameters(recurse=False)
        )
        self.tied = {key for key, count in used.items() if count > 1}

    def all_blocks(self, segments: list[Segment], progress: bool) -> None:
        """Train the blocks of all segments."""
        total = sum(len(segment.calls) for segment in segments)
        with tqdm(total=total, desc="block-wise", unit="block", disable=not progress) as bar:
            for segment in segments:
                segment.capture(self.batches)
                floats = self.float_inputs(segment)
                for call in segment.calls:
                    floats = self.reconstruct(segment, call, floats)
                    if self.report.blocks:
                        last = list(self.report.blocks.values())[-1]
                        bar.set_postfix_str(f"error {last.before:.1e} -> {last.after:.1e}")
                    bar.update()
                segment.release()

    def float_inputs(self, segment: Segment) -> list[Tensor]:
        """Per batch, the hidden states that enter the first block of ``segment`` in the teacher."""
        found: list[Tensor] = []
        calls = 0

        def see(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal calls
            calls += 1
            if calls > segment.start:
                found.append(args[0] if args else kwargs["hidden_states"])
                raise _Reached

        for batch in self.batches:
            calls = 0
            with watching(self.partner.values(), see), suppress(_Reached):
                run_model(self.teacher, batch)
        shapes = {(x.shape, x.dtype) for x in found}
        if shapes != {(x.shape, x.dtype) for x in segment.hidden}:
            raise ValueError(
                f"the teacher's hidden states are {shapes}, not the model's: load both with the "
                "same dtype, from the same checkpoint"
            )
        return found

    def reconstruct(self, segment: Segment, call: Call, floats: list[Tensor]) -> list[Tensor]:
        """Train one block, move the model's hidden states behind it and return the teacher's."""
        name, float_call = self.names[call.block], Call(self.partner[call.block], call.rest)
        share = self.settings.correction
        later = [segment.run(float_call, i, h) for i, h in enumerate(floats)] if share else floats
        if name in self.report.blocks:
            if name not in self.report.repeated:
                self.report.repeated.append(name)
        else:
            targets = later
            if share < 1:
                local = [segment.run(float_call, i, h) for i, h in enumerate(segment.hidden)]
                targets = [torch.lerp(a, b, share) for a, b in zip(local, later, strict=True)]
            self._fill(BlockTraining(segment, call, targets, self.batches, self.settings), name)
        segment.advance(call)
        return later

    def _fill(self, block: BlockTraining, name: str) -> None:
        """Train the block, or load what an earlier run made of it."""
        parameters = dict(block.module.named_parameters())
        tied = [key for key, p in parameters.items() if p.requires_grad and id(p) in self.tied]
        self.report.tied += [f"{name}.{key}" for key in tied]
        trained = {k: p for k, p in parameters.items() if p.requires_grad and k not in tied}
        known = self.store.load(name, trained) if self.store else None
        if known is not None:
            result = BlockResult(**known)
        else:
            start = {key: p.detach().clone() for key, p in trained.items()}
            before = block.error()
            if not math.isfinite(before):
                raise ValueError(f"{name}: its output error is {before}; model or data is broken")
            block.train(trained, before, random.Random(f"{self.settings.seed} {name}"))
            after = block.error()
            result = BlockResult(before, after, after < before)
            if not result.kept:
                result = BlockResult(before, before, False)
                for key, p in trained.items():
                    p.copy_(start[key])
            if self.store:
                self.store.save(name, trained, asdict(result))
        self.report.blocks[name] = result
