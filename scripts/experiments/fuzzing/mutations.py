"""What is changed in a checkpoint: values of its JSON, of a header, bytes, tensors, whole files.

A draw says all of it in plain values, so that it can be printed and made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import strategies as st

from maqd_hf.checkpoint.digest import make_digest, whole_of

from .originals import GRIDS

Draw = dict[str, Any]

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 5, 7, 16, 48, 64, 255, 256, 257, 65_536, 2**31, 2**40),
    *(-(2**31), 2**63, 10**400, 0.0, -0.5, 1e-30, 1e308, float("inf"), float("nan")),
    *("", "a", "silu", "relu", "gelu", "static", "token", "group", "maqd", "packed", "qat"),
    *("float16", "llama", "gpt2", "../../../etc/passwd", "\\u0000", "F32", "I32", "BF16", "U8"),
    *([], [0], [1, 2], {}, {"a": 1}),
)
REMOVE = "<remove>"


def _draw(random: Random) -> Draw:
    """One change, every part of it equally likely."""
    numbers = [random.randrange(2**31) for _ in range(6)]
    return {
        "kind": random.choice(list(GRIDS)),
        "file": random.choice(["config", "config", "index", "weights", "weights"]),
        "change": numbers[0],
        "shard": numbers[1],
        "forged": random.choice(["no", "no", "whole", "all", "all"]),
        "where": numbers[2:4],
        "values": random.choices([REMOVE, REMOVE, *VALUES], k=2),
        "bytes": [1 + numbers[4] % 255, numbers[5] % 256],
        "twice": random.random() < 0.5,
    }


DRAWS = st.randoms(use_true_random=True).map(_draw)

# -------------------------------------------------------------------------------------- of JSON


def paths(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON tree but its root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = []
    for key, value in items:
        found.append((*at, key))
        if isinstance(value, (dict, list)):
            found += paths(value, (*at, key))
    return found


def edit(tree: Any, where: int, value: Any) -> None:
    """Put ``value`` at one of the places of ``tree``, or take away what is there."""
    places = paths(tree)
    *above, last = places[where % len(places)]
    for key in above:
        tree = tree[key]
    if value == REMOVE:
        del tree[last]
    else:
        tree[last] = value


def change_json(path: Path, draw: Draw) -> None:
    """One or two values of a JSON file."""
    tree = json.loads(path.read_text("utf-8"))
    for where, value in _edits(draw):
        edit(tree, where, value)
    path.write_text(json.dumps(tree), "utf-8")


def change_settings(path: Path, draw: Draw) -> None:
    """One or two values of what ``config.json`` says of the quantized layers."""
    tree = json.loads(path.read_text("utf-8"))
    for where, value in _edits(draw):
        edit(tree["quantization_config"], where, value)
    path.write_text(json.dumps(tree), "utf-8")


def _edits(draw: Draw) -> list[tuple[int, Any]]:
    edits = list(zip(draw["where"], draw["values"], strict=True))
    return edits if draw["twice"] else edits[:1]


# ------------------------------------------------------------------------------- of safetensors


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(path: Path, header: dict[str, Any], data: bytes) -> None:
    """The file of this header and data."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def change_header(path: Path, draw: Draw) -> None:
    """One or two values of a safetensors header."""
    header, data = read_header(path)
    for where, value in _edits(draw):
        edit(header, where, value)
    write_header(path, header, data)


def _tensors(header: dict[str, Any], draw: Draw) -> tuple[str, str]:
    """The names of two tensors."""
    names = [name for name in header if name != "__metadata__"]
    a, b = (names[where % len(names)] for where in draw["where"])
    return a, b


def exchange_tensors(path: Path, draw: Draw) -> None:
    """Two tensors with each other's bytes (and, where they differ, sizes)."""
    header, data = read_header(path)
    a, b = _tensors(header, draw)
    header[a], header[b] = header[b], header[a]
    write_header(path, header, data)


def rename_tensor(path: Path, draw: Draw) -> None:
    """A tensor under a name that the model does not have, or without its bytes' true name."""
    header, data = read_header(path)
    a, b = _tensors(header, draw)
    header[f"{b}_" if draw["twice"] else a.replace("weight", "bias")] = header.pop(a)
    write_header(path, header, data)


def reshape_tensor(path: Path, draw: Draw) -> None:
    """The same bytes of a tensor in another shape."""
    header, data = read_header(path)
    entry = header[_tensors(header, draw)[0]]
    entry["shape"] = [1, *entry["shape"]] if draw["twice"] else entry["shape"][::-1]
    write_header(path, header, data)


def retype_tensor(path: Path, draw: Draw) -> None:
    """The same bytes of a tensor as another type of the same size."""
    header, data = read_header(path)
    entry = header[_tensors(header, draw)[0]]
    others = {"F32": ("I32", "U32"), "I32": ("F32", "U32"), "F16": ("BF16", "I16")}
    entry["dtype"] = others.get(entry["dtype"], ("F16", "I16"))[draw["twice"]]
    write_header(path, header, data)


# ------------------------------------------------------------------------------------- of files


def change_bytes(path: Path, draw: Draw) -> None:
    """One or two bytes anywhere in a file."""
    content = bytearray(path.read_bytes())
    for where, flip in zip(draw["where"], draw["bytes"], strict=True):
        content[where % len(content)] ^= flip
    path.write_bytes(content)


def cut(path: Path, draw: Draw) -> None:
    """The file's beginning alone."""
    content = path.read_bytes()
    path.write_bytes(content[: draw["where"][0] % len(content)])


def drop(path: Path, draw: Draw) -> None:
    """No such file."""
    path.unlink()


INDEX: tuple[Callable[..., None], ...] = (change_json, change_json, change_bytes, cut)
CONFIG = (*INDEX, change_settings, change_settings, change_settings)
WEIGHTS: tuple[Callable[..., None], ...] = (
    *(change_header, change_header, exchange_tensors, rename_tensor, reshape_tensor),
    *(retype_tensor, change_bytes, change_bytes, cut, drop),
)


def mutate(folder: Path, draw: Draw) -> str:
    """Change the checkpoint in ``folder`` as ``draw`` says; what was changed, in words."""
    weights = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if draw["file"] == "weights":
        path, changes = weights[draw["shard"] % len(weights)], WEIGHTS
    elif draw["file"] == "index" and index.exists():
        path, changes = index, INDEX
    else:
        path, changes = folder / "config.json", CONFIG
    change = changes[draw["change"] % len(changes)]
    try:
        change(path, draw)
    except (KeyError, IndexError, TypeError):  # the second edit met what the first had left
        return f"{change.__name__} of {path.name}, half"
    return f"{change.__name__} of {path.name}"


def forge(folder: Path, how: str) -> bool:
    """Give the checkpoint a digest that fits "all" of it, or its "whole" alone; whether it does."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
        ours = config["quantization_config"]
        if how == "whole":
            ours["digest"]["whole"] = whole_of(ours["digest"])
        else:
            ours.pop("digest", None)
            ours["digest"] = make_digest(config, sorted(folder.glob("*.safetensors")))
        path.write_text(json.dumps(config), "utf-8")
    except Exception:  # a file that cannot be read cannot be signed
        return False
    return how == "all"
