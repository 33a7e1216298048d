"""The files of a checkpoint: which they are, and ``seal``, which writes the digest of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import QUANT_METHOD
from .digest import make_digest

CONFIG = "config.json"
TEMPORARY = ".maqd-save-"
"""How the names of files and folders begin that exist only while a checkpoint is written."""
WEIGHTS_FIELD = "transformers_weights"
"""The field of ``config.json`` that may name the weight files; transformers reads it first."""


def read_config(folder: Path) -> dict[str, Any]:
    """The content of ``config.json`` in ``folder``; ``ValueError`` if it is no JSON object."""
    try:
        content = json.loads((folder / CONFIG).read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds weights but no {CONFIG}: a MaQD model is checked against the {CONFIG} "
            "beside its weights; download or save the checkpoint again"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{folder / CONFIG} is a JSON {type(content).__name__}, not an object")
    return content


def config_text(config: Mapping[str, Any]) -> str:
    """``config`` as transformers writes it."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def write_durably(path: Path, text: str) -> None:
    """Write ``path`` in one step: at any moment it holds all of the old or all of the new text."""
    new = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        with open(new, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def shards_of(index: Path) -> list[Path]:
    """The weight files that an index lists, all in its folder; ``ValueError`` if one is not."""
    content = json.loads(index.read_text("utf-8"))
    names = sorted(set(content["weight_map"].values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} lists {name!r}: it should be a .safetensors file beside it")
    return [index.parent / name for name in names]


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The weight files that a save has just written into ``folder``, or none.

    An earlier save may have left an index beside a single file: the one written last counts.
    """
    stem = f".{variant}" if variant else ""
    heads = [folder / f"model{stem}.safetensors", folder / f"model.safetensors.index{stem}.json"]
    present = [path for path in heads if path.exists()]
    if not present:
        return []
    newest = max(present, key=lambda path: path.stat().st_mtime_ns)
    return shards_of(newest) if newest.suffix == ".json" else [newest]


def seal(folder: str | Path, variant: str | None = None) -> None:
    """Write the digest of the MaQD checkpoint in ``folder`` into its ``config.json``.

    The weights can then be read by whoever can read the config; safetensors lets only their writer.
    Does nothing where there is none, as after an adapter alone was saved.
    """
    folder = Path(folder)
    files = weight_files(folder, variant)
    if not files or not (folder / CONFIG).exists():
        return
    config = read_config(folder)
    ours = config.get("quantization_config") or {}
    if ours.get("quant_method") == QUANT_METHOD and ours.get("modules") is not None:
        ours["digest"] = make_digest(config, files)
        write_durably(folder / CONFIG, config_text(config))
        for file in files:
            shutil.copymode(folder / CONFIG, file)
