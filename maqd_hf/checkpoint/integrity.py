"""Is what was loaded what was saved? A wrong weight must stop the load, not spoil the answers.

transformers fills what a checkpoint lacks with uninitialized memory or with new weights, and a
flipped bit gives a model that is only slightly wrong. ``FileCheck`` compares the files with their
``digest`` while a model is built and loaded from them, ``check_plan`` bounds what is built at all,
``check_shapes`` what gets memory; ``check_loaded`` looks at the model itself: every tensor of our
layers came from the file, and nothing else is new that should not be.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..kernels import release
from ..models.finding import modules_of
from ..models.names import Names
from ..nn.kinds import OURS, PACKED
from .digest import check_fields, check_tensors, read_digest
from .files import read_config

logger = logging.get_logger(__name__)


class FileCheck:
    """The check of a checkpoint's files, in the steps in which a loader gets to know them.

    Args:
        files: the weight files; ``config.json`` is read from their folder. None: the tensors were
            given as a ``state_dict`` and there is nothing to compare.

    Each step raises ``DigestError`` that names the field, module or tensor that differs.
    """

    def __init__(self, files: Sequence[str | Path] | None) -> None:
        self._files = [Path(file) for file in files or ()]
        self._config = read_config(self._files[0].parent) if self._files else {}
        self._digest = read_digest(self._config) if self._files else {}

    def check_architecture(self) -> None:
        """Compare the fields of the architecture, before anything is built from them."""
        if self._files:
            check_fields(self._config, self._digest, ours=False)

    def check_settings(self) -> None:
        """Compare our own settings and the list of modules, before tensors are loaded."""
        if self._files:
            check_fields(self._config, self._digest, ours=True)

    def check_tensors(self, model: nn.Module) -> None:
        """Compare the tensors, after loading, when the weight files are known to be whole."""
        if self._files:
            check_tensors(self._files, self._digest)


_LAYERS = re.compile(r"(?:num|n|encoder|decoder)_(?:\w+_)?layers?")
_MOST_LAYERS = 1000
_LATENT = ".weight_log_scale"


def check_plan(config: PreTrainedConfig, digest: dict[str, Any] | None) -> None:
    """Raise ``ValueError`` if ``config.json`` asks for more layers than the files can fill.

    It is called before a model is built: transformers builds as many layers as a file says, and an
    empty one, too, takes time and memory. No layer is without a tensor, so that there are no more
    layers than the ``digest`` lists tensors; without one, as in version 1, a thousand are allowed.
    """
    tensors = (digest or {}).get("tensors")
    most, why = _MOST_LAYERS, "which is more than any model has"
    if isinstance(tensors, str):
        most, why = len(tensors) // 8, "the number of tensors that its digest lists"
    for name, value in _numbers(config):
        if _LAYERS.fullmatch(name) and not 0 <= value <= most:
            raise ValueError(
                f"config.json: {name}={value} must be in 0..{most}, {why}: it was edited or "
                "damaged; download or save the checkpoint again"
            )
    saved = config.architectures
    if saved is not None and not (isinstance(saved, list) and all(type(n) is str for n in saved)):
        raise ValueError(
            f"config.json: architectures={saved!r:.200} must be a list of strings or null: it was "
            "edited or damaged; download or save the checkpoint again"
        )


def _numbers(config: PreTrainedConfig) -> Iterator[tuple[str, int]]:
    """The whole numbers in ``config`` and in the configs of its parts."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _numbers(value)
        elif isinstance(value, int):
            yield name, value


def check_files(files: Sequence[str | Path] | None) -> None:
    """Raise ``ValueError`` that names a weight file which is not there, or not whole;
    ``PermissionError`` for one that this user may not read, of which safetensors says the first."""
    for file in map(Path, files or ()):
        if file.exists() and not os.access(file, os.R_OK):
            raise PermissionError(
                errno.EACCES, "this user may not read it; change its permissions", str(file)
            )
        try:
            _names(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{file}, which config.json or an index.json beside it names, is no safetensors "
                f"file ({error}): it was damaged, cut or removed; download or save the checkpoint "
                "again"
            ) from None


def check_plain(files: Sequence[str | Path] | None) -> None:
    """Raise ``ValueError`` if the weight ``files`` are of a trainable MaQD model.

    It is called where ``config.json`` does not say so: transformers would load the latent weights
    as if they were the model, and leave out what quantizes them.
    """
    for file in map(Path, files or ()):
        names: list[str] = []
        with suppress(OSError, SafetensorError):  # which transformers will tell
            names = _names(file)
        ours = next((name for name in names if name.endswith(_LATENT)), None)
        if ours is not None:
            raise ValueError(
                f"{file} holds {ours}, as a MaQD model in training does, but quant_method in the "
                "quantization_config of config.json beside it is not 'maqd': it was edited or "
                "damaged; download or save the checkpoint again"
            )


def _names(file: Path) -> list[str]:
    """The tensors in a safetensors file; its header is read, its data are not."""
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


Forms = dict[str, tuple[tuple[int, ...], str]]
"""The shape and the type of every tensor, by its name."""


def forms(model: nn.Module) -> Forms:
    """The shape of every tensor of ``model``, and its type; all types of floats count as one."""

    def kind(tensor: Tensor) -> str:
        return "floats" if tensor.is_floating_point() else str(tensor.dtype)

    tensors = model.state_dict(keep_vars=True)
    return {name: (tuple(tensor.shape), kind(tensor)) for name, tensor in tensors.items()}


_HEAD_ELEMENTS = 2**24
"""Elements that a head of another shape than its file's may have: it is the user's to replace."""


def check_shapes(
    model: PreTrainedModel, expected: Forms, files: Sequence[str | Path] | None
) -> None:
    """Raise ``ValueError`` if a tensor of ``model``, of ``expected`` form, has another shape in its
    weight file.

    It is called while the model has no memory yet: transformers allocates what ``config.json`` asks
    for wherever the file holds something else, terabytes if it says so. A head that is not of ours
    may differ, since ``ignore_mismatched_sizes`` is for it.
    """
    ours = {name for name, _ in modules_of(model, *OURS)}
    base = model.base_model_prefix + "."
    bare = model.base_model is model  # without a head
    for file in map(Path, files or ()):
        with safe_open(file, "pt") as opened:
            shapes = {n: tuple(opened.get_slice(n).get_shape()) for n in list(opened.keys())}
        for saved, shape in shapes.items():
            names = (saved, base + saved, saved.removeprefix(base))
            name = next((n for n in names if n in expected), None)
            if name is None or expected[name][0] == shape:
                continue
            wanted = expected[name][0]
            head = not (bare or name.startswith(base) or name.rpartition(".")[0] in ours)
            if not head or prod(wanted) > _HEAD_ELEMENTS:
                raise _other_shape(f"{file}: ", name, shape, wanted, model)


def check_forms(model: nn.Module, expected: Forms) -> None:
    """Raise ``ValueError`` if a tensor has not the ``forms`` its layer was built with.

    transformers takes tensors of any shape and type once a quantizer is present.
    """
    for name, (shape, kind) in forms(model).items():
        wanted, wanted_kind = expected.get(name, (shape, kind))
        if shape != wanted:
            raise _other_shape("", name, shape, wanted, model)
        if kind != wanted_kind:
            raise ValueError(
                f"type mismatch: {name} holds {kind} in the checkpoint and {wanted_kind} in "
                f"{type(model).__name__}: the header of its .safetensors was edited; download or "
                "save it again"
            )


def _other_shape(
    where: str, name: str, shape: tuple[int, ...], wanted: tuple[int, ...], model: nn.Module
) -> ValueError:
    return ValueError(
        f"{where}shape mismatch: {name} is {shape} in the checkpoint and {wanted} in "
        f"{type(model).__name__}: its config.json and its .safetensors do not belong together; "
        "download or save it again"
    )


def check_loaded(model: nn.Module) -> None:
    """Raise ``ValueError`` unless all tensors of our layers came from the file, and are finite.

    Offloaded layers (on meta) cannot be looked at and are skipped.
    """
    for name, module in modules_of(model, *OURS):
        tensors = module.state_dict(keep_vars=True)
        if any(tensor.is_meta for tensor in tensors.values()):
            continue
        for tensor_name, tensor in tensors.items():
            _check_tensor(f"{name}.{tensor_name}", tensor)
        if isinstance(module, PACKED):
            release(module.weight)  # the file's pages are needed one layer at a time


def _came_from_file(tensor: Tensor) -> bool:
    return tensor.is_meta or bool(getattr(tensor, "_is_hf_initialized", False))


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not _came_from_file(tensor):
        raise ValueError(
            f"{name} is missing from the checkpoint: its config.json and its .safetensors do not "
            "belong together, or the file was cut; download or save it again"
        )
    uncalibrated = name.endswith("activation.log_step")  # NaN there says "not calibrated yet"
    if tensor.is_floating_point() and not uncalibrated and not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity: its .safetensors is damaged")


def check_new(model: PreTrainedModel) -> None:
    """Raise ``ValueError`` if transformers invented a tensor that the checkpoint should have had.

    Whoever loads into another class than the one that was saved asks for what only that class has,
    a head or a pooler; one line in the log names it. Nothing is new in the class that was saved,
    and nothing in the numbered layers of the base model in any.
    """
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    new = [
        name
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not _came_from_file(tensor) and not any(p.search(name) for p in ignored)
    ]
    saved = model.config.architectures or []
    asked_for = type(model).__name__ not in saved
    names = Names(model)
    for name in new:
        in_layer = re.match(r"[^/].*\.\d+\.", names.relative(name))
        if in_layer or not asked_for:
            raise ValueError(
                f"{name} is missing from the checkpoint, whose .safetensors {saved} saved: only a "
                "head or pooler that another class adds may be new in a converted model; download "
                "or save it again, or load it into the class that it has"
            )
    if new:
        logger.warning(
            f"{type(model).__name__} has tensors that {saved} did not save; they are new and have "
            f"to be trained: {new}"
        )
