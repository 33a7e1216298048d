"""``save_model``: saving that cannot spoil what is already there."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from .switching import complete_extras, is_switched, move_in, new_staging, tidy

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)


def save_model(
    model: PreTrainedModel, path: str | Path, *extras: Any, max_shard_size: int | str = "5GB"
) -> Path:
    """``save_pretrained`` for ``model`` and ``extras`` (a tokenizer, ...), all or nothing.

    Killed at any moment, ``path`` loads as the whole old or the whole new model (``switching``
    says how). Other files in ``path`` stay; the weight files of the checkpoint that was there, and
    what an interrupted ``save_model`` left, are removed.

    Raises:
        OSError: the disk is full, ``path`` cannot be written, or somebody else saves there now.
            The message says whether ``path`` holds the old or the new model.
    """
    path = Path(path)
    folder = Path(os.path.realpath(path))
    made: list[Path] = []
    try:
        made = _make_folder(folder)
        with _only_writer(folder):
            _save(model, folder, extras, max_shard_size)
    except BaseException as error:
        new = folder.is_dir() and is_switched(folder)
        for directory in made:
            if directory.is_dir() and not any(directory.iterdir()):
                directory.rmdir()
        if not isinstance(error, Exception):  # an interrupt
            raise
        state = "holds the new model, but tidying up failed; the next save_model goes on with it"
        state = state if new else "was not saved and is as it was before"
        raise OSError(f"{path} {state}: {error}{_advice(error)}") from error
    return path


def _advice(error: Exception) -> str:
    """What to do about ``error``, where it does not say so itself."""
    if not isinstance(error, PermissionError):
        return ""
    who = f"user {os.geteuid()}" if hasattr(os, "geteuid") else "this user"
    return f" ({who} may not write there: save somewhere else, or change the permissions)"


def recover(folder: Path) -> None:
    """Complete what a loader can of a save that was interrupted in ``folder``, if one was.

    Where the folder cannot be written, or its writer is still at work, it is read as it is.
    """
    if is_switched(folder):
        with suppress(OSError), _only_writer(folder):
            complete_extras(folder)


def _save(model: Any, folder: Path, extras: tuple[Any, ...], max_shard_size: int | str) -> None:
    tidy(folder)
    staging = new_staging(folder)
    try:
        model.save_pretrained(staging, max_shard_size=max_shard_size)
        for extra in extras:
            extra.save_pretrained(staging)
        move_in(folder, staging)
    except BaseException:
        if not is_switched(folder):
            shutil.rmtree(staging, ignore_errors=True)
            tidy(folder)
        raise


def _make_folder(folder: Path) -> list[Path]:
    """Make ``folder`` and its parents; returns those that were not there, the innermost first."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError("it is a file; give the path of a folder")
    missing = [path for path in [folder, *folder.parents] if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
    return missing


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock of ``folder``; it ends with this process, however that ends.

    Where the file system has no locks one line in the log says so.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise BlockingIOError(
                    error.errno,
                    "another save_model is writing there; wait for it, or save somewhere else",
                ) from None
            logger.warning(f"{folder} cannot be locked ({error}): let nobody else save there now.")
        yield
    finally:
        os.close(handle)
