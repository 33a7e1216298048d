"""Saving that cannot spoil what is already there."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel


def save_model(
    model: PreTrainedModel, path: str | Path, *extras: Any, max_shard_size: int | str = "5GB"
) -> Path:
    """``save_pretrained`` for ``model`` and ``extras`` (a tokenizer, ...), all or nothing.

    Everything is written to a new folder beside ``path`` and moved in when it is complete, so a
    full disk or an interrupt leaves an existing checkpoint as it was. Other files in ``path`` stay,
    but weight files of an earlier checkpoint that the new one does not have are removed.

    Raises:
        OSError: the disk is full or ``path`` cannot be written; ``path`` is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        try:
            model.save_pretrained(staging, max_shard_size=max_shard_size)
            for extra in extras:
                extra.save_pretrained(staging)
        except Exception as error:  # the safetensors library raises a class of its own
            raise OSError(f"{path} was not saved and is as it was before: {error}") from error
        path.mkdir(exist_ok=True)
        new = {file.relative_to(staging) for file in staging.rglob("*") if file.is_file()}
        for file in sorted(new):
            (path / file.parent).mkdir(parents=True, exist_ok=True)
            (staging / file).replace(path / file)
        for old in [*path.glob("model*.safetensors"), path / "model.safetensors.index.json"]:
            if old.relative_to(path) not in new:
                old.unlink(missing_ok=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return path
