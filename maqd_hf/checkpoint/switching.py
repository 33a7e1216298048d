"""One step from the old checkpoint in a folder to the new one.

1. The new files are written and flushed into a staging folder inside the folder, so that each can
   be moved by a rename, also on a mount point.
2. The new weights move beside the old ones under names of their own, ``model-maqd-ID...``.
3. One rename of ``config.json``, whose field ``transformers_weights`` names them, is the switch.
4. The other files move in, the old weights go, the usual names become links to the new weights, a
   last rename of ``config.json`` drops the field, and the own names and the staging folder go.

transformers loads the whole old model before 3 and the whole new one from then on. ``tidy`` undoes
what was cut off before 3 and completes what was cut off after it. Exchanging whole folders would be
one step as well, but mount points refuse it and it would move files that are not ours.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path

from .files import (
    CONFIG,
    TEMPORARY,
    WEIGHTS_FIELD,
    config_text,
    read_config,
    shards_of,
    write_durably,
)

_OWN = "model-maqd-"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def new_staging(folder: Path) -> Path:
    """An empty staging folder in ``folder``."""
    staging = folder / f"{TEMPORARY}{uuid.uuid4().hex[:12]}"
    staging.mkdir()
    return staging


def is_switched(folder: Path) -> bool:
    """Whether ``folder`` stands between step 3 and the end of step 4."""
    return _own_name(folder) is not None


def move_in(folder: Path, staging: Path) -> None:
    """Make the checkpoint in ``staging`` that of ``folder``; steps 2 to 4."""
    number = staging.name.removeprefix(TEMPORARY)
    weights = sorted(staging.glob("model*.safetensors"))
    _flush(staging)
    index = staging / _INDEX
    if index.exists():
        content = json.loads(index.read_text("utf-8"))
        content["weight_map"] = {
            tensor: _to_own(name, number) for tensor, name in content["weight_map"].items()
        }
        write_durably(folder / _to_own(_INDEX, number), config_text(content))
    for file in weights:
        file.rename(folder / _to_own(file.name, number))
    _flush_folder(folder)
    config = read_config(staging)
    own = config[WEIGHTS_FIELD] = _to_own(_INDEX if index.exists() else _SINGLE, number)
    write_durably(folder / CONFIG, config_text(config))
    _flush_folder(folder)
    _complete(folder, own)


def tidy(folder: Path) -> None:
    """Complete or undo what an interrupted save left in ``folder``; its writer must be gone."""
    own = _own_name(folder)
    if own is not None:
        _complete(folder, own)
    for left in [*folder.glob(f"{TEMPORARY}*"), *folder.glob(f"{_OWN}*")]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def complete_extras(folder: Path) -> None:
    """Move in the files beside weights and config that an interrupted save still has in staging.

    All that a loader may do: it has the weights open under their own names.
    """
    own = _own_name(folder)
    if own is None:
        return
    staging = folder / f"{TEMPORARY}{_number(own)}"
    for file in sorted(f for f in staging.rglob("*") if f.is_file()):
        relative = file.relative_to(staging)
        if str(relative) not in (CONFIG, _INDEX):
            (folder / relative.parent).mkdir(parents=True, exist_ok=True)
            file.replace(folder / relative)


# ------------------------------------------------------------------------------------- the steps


def _own_name(folder: Path) -> str | None:
    """What ``config.json`` calls the weights between step 3 and the end of step 4."""
    try:
        name = read_config(folder).get(WEIGHTS_FIELD)
    except (OSError, ValueError):
        return None
    return name if isinstance(name, str) and name.startswith(_OWN) else None


def _to_own(name: str, number: str) -> str:
    """``model-00001-of-00002.safetensors`` -> ``model-maqd-ID-00001-of-00002.safetensors``."""
    return f"{_OWN}{number}{name.removeprefix('model')}"


def _number(own: str) -> str:
    return own.removeprefix(_OWN).partition(".")[0].partition("-")[0]


def _complete(folder: Path, own: str) -> None:
    """Step 4, for the weights called ``own``. Each of its actions may have been done already."""
    complete_extras(folder)
    prefix = f"{_OWN}{_number(own)}"
    own_files = sorted(file.name for file in folder.glob(f"{prefix}*"))
    usual = {name: f"model{name.removeprefix(prefix)}" for name in own_files}
    for old in _weights_of(folder):
        if old.name not in usual.values():
            old.unlink(missing_ok=True)
    for name, target in usual.items():
        if name.endswith(".safetensors"):
            _link(folder / name, folder / target)
    if own.endswith(".json"):
        content = json.loads((folder / own).read_text("utf-8"))
        content["weight_map"] = {t: usual[name] for t, name in content["weight_map"].items()}
        write_durably(folder / _INDEX, config_text(content))
    _flush_folder(folder)
    config = read_config(folder)
    del config[WEIGHTS_FIELD]
    write_durably(folder / CONFIG, config_text(config))
    _flush_folder(folder)
    for name in usual:
        (folder / name).unlink()
    shutil.rmtree(folder / f"{TEMPORARY}{_number(own)}", ignore_errors=True)


def _weights_of(folder: Path) -> list[Path]:
    """The weight files of the checkpoint in ``folder`` under their usual names, an index last."""
    single, index = folder / _SINGLE, folder / _INDEX
    shards: list[Path] = []
    if index.exists():
        try:
            shards = [*shards_of(index), index]
        except (KeyError, TypeError, ValueError):  # damaged: its shards are not known
            shards = [index]
    return [*([single] if single.exists() else []), *shards]


def _link(file: Path, target: Path) -> None:
    """Make ``target`` hold what ``file`` holds, in one step; a copy where links are refused."""
    if target.exists() and target.samefile(file):
        return
    new = target.with_name(f"{TEMPORARY}{target.name}")
    new.unlink(missing_ok=True)
    try:
        os.link(file, new)
    except OSError:
        shutil.copyfile(file, new)
        _flush_file(new)
    os.replace(new, target)


# ------------------------------------------------------------------------------------ to the disk


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush_folder(path) if path.is_dir() else _flush_file(path)


def _flush_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_flush_folder = _flush_file  # both are flushed through a handle
