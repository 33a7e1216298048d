"""The digest of a checkpoint: what its files held when they were written, piece by piece.

It stands in ``config.json`` under ``quantization_config.digest`` and covers every tensor of the
weight files (name, type, shape, bytes) and every field of ``config.json`` but the ``EXEMPT`` ones::

    {"config": {"hidden_size": "1c291ca3", ...}, "modules": "9b0e42d7...", "tensors": "41d2...",
     "whole": "..."}

``modules`` and ``tensors`` hold eight hexadecimal digits a piece in the order of the pieces' names,
``whole`` guards the three. Files are compared and not models, so that a checkpoint may be loaded
into another class, in another dtype, or in part, and is still checked as a whole.

The sums are no cryptography: they find accidents and mixtures, not a forger. A QAT model of 194 MB
in the page cache is checked in 7 to 9 % of the processor time that loading it takes.
"""

from __future__ import annotations

import json
import mmap
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

EXEMPT = {
    "transformers_version": "says who wrote the file, nothing reads it",
    "_name_or_path": "says where the model came from, nothing reads it",
    "transformers_weights": "names the weight files, whose content is in the digest",
    "use_cache": "how a call computes, not what",
    "attn_implementation": "which code computes the same attention",
    "_attn_implementation": "which code computes the same attention",
    "experts_implementation": "which code computes the same experts",
    "_experts_implementation": "which code computes the same experts",
    "output_attentions": "what a call returns beside the same output",
    "output_hidden_states": "what a call returns beside the same output",
    "return_dict": "in which form a call returns the same output",
    "bos_token_id": "a setting of generation",
    "eos_token_id": "a setting of generation",
    "id2label": "names of classes",
    "label2id": "names of classes",
    "problem_type": "which loss a classifier trains with",
}
"""Fields of ``config.json`` that may be edited after saving, each with the reason. What
is given to ``from_pretrained`` (a dtype, a number of labels) is not in the file and not checked."""

_WORDS, _LONG = 1 << 14, 1 << 20


class DigestError(ValueError):
    """A checkpoint is not what was saved."""


# ------------------------------------------------------------------------------------ the pieces


def tensor_sum(data: memoryview) -> int:
    """32 bits of ``data``: CRC-32 of what is shorter than 1 MiB.

    Longer data are rows of 16,384 words of 32 bits; what goes into the CRC-32 is the sum of the
    rows and the sum of its prefixes, modulo 2**32 in each word (Fletcher's checksum, with 16,384
    lanes). One changed word always changes the first, two exchanged rows the second.

    >>> tensor_sum(memoryview(b"123456789")) == zlib.crc32(b"123456789")
    True
    """
    if len(data) < _LONG:
        return zlib.crc32(data)
    rows = len(data) // (4 * _WORDS)
    total, prefixes = np.zeros((2, _WORDS), "<u4")
    for row in np.frombuffer(data, "<u4", rows * _WORDS).reshape(rows, _WORDS):
        total += row
        prefixes += total
    rest = zlib.crc32(data[4 * rows * _WORDS :])
    return zlib.crc32(total.tobytes() + prefixes.tobytes(), rest)


def tensor_sums(files: Sequence[Path]) -> dict[str, str]:
    """Tensor name -> eight hexadecimal digits, of all tensors in the safetensors ``files``.

    Raises:
        DigestError: a file is no safetensors file, or two of them hold the same tensor.
    """
    sums: dict[str, str] = {}
    for path in files:
        if path.suffix != ".safetensors":
            raise DigestError(f"{path} should be a .safetensors file, as MaQD models are saved")
        for name, value in _sums_of_file(path):
            if name in sums:
                raise DigestError(f"{name} stands in several files, {path.name} among them")
            sums[name] = value
    return dict(sorted(sums.items()))


def _sums_of_file(path: Path) -> Iterator[tuple[str, str]]:
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8:start])
    header.pop("__metadata__", None)
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        number = tensor_sum(memoryview(mapped)[start + begin : start + end])
        yield name, _sum([name, entry["dtype"], entry["shape"], number])
        if end - begin >= _LONG and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)  # these pages would count as memory of the process


def _sum(value: Any) -> str:
    text = json.dumps(_plain(value), sort_keys=True, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x}"


def _plain(value: Any) -> Any:
    """``value`` without exempt fields, and with 1.0 for 1: JSON does not tell them apart."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if k not in EXEMPT}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    whole = isinstance(value, float) and value.is_integer()
    return int(value) if whole else value


def _pieces(config: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """The sums of the fields of a ``config.json`` and of the entries of its ``modules``."""
    ours = dict(config["quantization_config"])
    ours.pop("digest", None)
    modules = ours.pop("modules", None) or {}
    fields = {k: v for k, v in config.items() if k != "quantization_config"}
    fields |= {f"quantization_config.{k}": v for k, v in ours.items()}
    return (
        {k: _sum(v) for k, v in sorted(_plain(fields).items())},
        {k: _sum([k, v]) for k, v in sorted(modules.items())},
    )


# ------------------------------------------------------------------------------------- to write


def make_digest(config: Mapping[str, Any], files: Sequence[Path]) -> dict[str, Any]:
    """The digest of a ``config.json`` and the weight ``files`` beside it."""
    fields, modules = _pieces(config)
    tensors = tensor_sums(files)
    digest: dict[str, Any] = {
        "config": fields,
        "modules": "".join(modules.values()),
        "tensors": "".join(tensors.values()),
    }
    return digest | {"whole": whole_of(digest)}


def whole_of(digest: Mapping[str, Any]) -> str:
    """The field ``whole`` of a digest with these other fields."""
    text = json.dumps([digest[k] for k in ("config", "modules", "tensors")], sort_keys=True)
    return blake2b(text.encode(), digest_size=16).hexdigest()


# ------------------------------------------------------------------------------------- to check


def read_digest(config: Mapping[str, Any]) -> dict[str, Any]:
    """The digest in a ``config.json``; ``DigestError`` if there is none or it was edited."""
    digest = config.get("quantization_config", {}).get("digest")
    if digest is None:
        raise DigestError(
            "config.json holds no digest: the save was cut off, or config.json was edited; save "
            "the model again"
        )
    known = {"config": dict, "modules": str, "tensors": str, "whole": str}
    whole = isinstance(digest, dict) and digest.keys() == known.keys()
    typed = whole and all(isinstance(digest[name], kind) for name, kind in known.items())
    if not typed or digest["whole"] != whole_of(digest):
        raise DigestError(
            "the digest in config.json does not agree with itself: it was edited or damaged; "
            "download or save the checkpoint again"
        )
    return dict(digest)


def check_fields(config: Mapping[str, Any], digest: Mapping[str, Any], ours: bool) -> None:
    """Raise ``DigestError`` that names what differs in a ``config.json`` from when it was saved.

    ``ours``: the fields of ``quantization_config`` and its modules; else those of the architecture.
    """
    fields, modules = _pieces(config)
    names = [k for k in {**digest["config"], **fields} if k.startswith("quantization_") == ours]
    for name in names:
        if name not in fields:
            raise _differs(f"{name} was removed from config.json")
        if name not in digest["config"]:
            raise _differs(f"{name} was added to config.json")
        if fields[name] != digest["config"][name]:
            value: Any = config
            for key in name.split(".", 1):
                value = value[key]
            raise _differs(f"{name}={value!r} is not what was saved")
    if ours:
        settings = "{} is not what was saved: its settings in config.json differ"
        _check_list("modules", modules, digest["modules"], settings.format)


def check_tensors(files: Sequence[Path], digest: Mapping[str, Any]) -> None:
    """Raise ``DigestError`` that names a tensor which the weight ``files`` hold otherwise."""
    _check_list("tensors", tensor_sums(files), digest["tensors"], _of_module)


def _check_list(
    what: str, found: Mapping[str, str], saved: str, describe: Callable[[str], str]
) -> None:
    if "".join(found.values()) == saved:
        return
    known = {saved[i : i + 8] for i in range(0, len(saved), 8)}
    strange = [name for name, value in found.items() if value not in known]
    count = f"{len(found)} {what} are there, {len(saved) // 8} were saved"
    if not strange:
        raise _differs(count)
    others = f", nor are {len(strange) - 1} more" if len(strange) > 1 else ""
    raise _differs(f"{describe(strange[0])}{others} ({count})")


def _of_module(tensor: str) -> str:
    module, _, leaf = tensor.rpartition(".")
    return f"{module or leaf} is not what was saved: its tensor {leaf!r} differs"


def _differs(what: str) -> DigestError:
    return DigestError(
        f"digest mismatch: {what}; config.json or a file beside it was damaged or edited, or "
        "belongs to another save: download or save the checkpoint again"
    )
