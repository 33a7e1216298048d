"""The folder of a run that may be killed at any time and goes on when it is started again.

``arguments.json`` holds the settings, ``metrics.json`` everything measured so far and the seconds
of every stage that is done. Both are written beside and renamed, so each is whole at any time.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SETTINGS, METRICS = "arguments.json", "metrics.json"
PART = ".part"  # ends the name of a file that is being written


class RunDirectory:
    """Stages and measurements of one run; only the ``first`` of several processes writes.

    Args:
        folder: where the run is; ``open`` makes it.
        first: whether this process is the one that writes.
    """

    def __init__(self, folder: Path, first: bool = True) -> None:
        self.folder, self.first = folder, first
        self.path = folder / METRICS
        self.refresh()

    def refresh(self) -> None:
        """Read ``metrics.json`` again, as another process may have written it."""
        self.metrics: dict[str, Any] = _read(self.path)
        self._began = time.perf_counter() - self.metrics.get("seconds", {}).get("total", 0.0)

    def open(
        self, settings: dict[str, Any], free: Collection[str] = (), overwrite: bool = False
    ) -> None:
        """Begin a run with ``settings``, or go on with the one that has them.

        A folder whose run has not finished a stage is begun anew, with whatever settings.

        Args:
            settings: nested, as JSON holds them; ``free``: names of those that may differ.
            overwrite: delete what is in the folder.

        Raises:
            ValueError: the folder holds something else, or a run with other settings, which the
                message names.
        """
        settings = json.loads(json.dumps(settings))
        if overwrite and self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / SETTINGS).exists():
            self._check_empty()
        elif self.stages:
            self._check_settings(settings, free)
        else:
            self.path.unlink(missing_ok=True)
        _write(self.folder / SETTINGS, settings)
        self.refresh()

    def _check_empty(self) -> None:
        if any(not path.name.endswith(PART) for path in self.folder.iterdir()):
            raise ValueError(
                f"{self.folder} is not empty and holds no run (there is no {SETTINGS}): choose "
                "another --output_dir, or replace it with --overwrite"
            )

    def _check_settings(self, settings: dict[str, Any], free: Collection[str]) -> None:
        theirs, ours = (_flat(s) for s in (_read(self.folder / SETTINGS), settings))
        changed = [
            f"{name.rpartition('.')[2]} was {theirs[name]!r} and is now {ours[name]!r}"
            for name in theirs
            if name in ours and theirs[name] != ours[name] and name.rpartition(".")[2] not in free
        ]
        if changed:
            raise ValueError(
                f"{self.folder} holds a run with other settings: {'; '.join(changed)}. Give the "
                "same to continue it, choose another --output_dir, or begin anew with --overwrite"
            )

    @property
    def stages(self) -> list[str]:
        """The stages that are done and left something."""
        return [
            title for title in self.metrics.get("seconds", {}) if title not in ("load", "total")
        ]

    def record(self, **values: Any) -> None:
        """Add to what was measured."""
        self.metrics.update(values)
        if self.first:
            seconds = self.metrics.setdefault("seconds", {})
            seconds["total"] = round(time.perf_counter() - self._began, 1)
            _write(self.path, self.metrics)

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Announce a stage; if it ends without an error, it is done."""
        if self.first:
            print(f"\n== {title}", flush=True)
        began = time.perf_counter()
        yield
        seconds = self.metrics.setdefault("seconds", {})
        seconds[title] = round(time.perf_counter() - began, 1)
        self.record()


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        nested = _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else None
        found.update({f"{prefix}{name}": value} if nested is None else nested)
    return found


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def _write(path: Path, values: dict[str, Any]) -> None:
    beside = path.with_name(path.name + PART)
    beside.write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    beside.replace(path)
