"""Checks in a forked child that has given up, or been given, something: its user, its mounts."""

from __future__ import annotations

import ctypes
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

NOBODY = 65534
_NEW_MOUNTS, _NEW_USER = 0x20000, 0x10000000  # of Linux's sched.h
_PRIVATE, _RECURSIVE = 1 << 18, 1 << 14  # of its mount.h


def in_child(check: Callable[[], None]) -> None:
    """Run ``check`` in a forked child; ``AssertionError`` with its traceback if it failed.

    What it imports for the first time it may not be able to read: call it once before.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # those of the parent are gone
            check()
        except BaseException:
            os.write(writer, traceback.format_exc()[-4000:].encode())
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as errors:
        said = errors.read()
    assert os.waitpid(child, 0)[1] == 0, said


def as_nobody(check: Callable[[], None]) -> None:
    """Run ``check`` in a child whose user may not do what root may; as it is, where nobody is."""

    def unprivileged() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        check()

    in_child(unprivileged)


def on_a_mount(folder: Path, size: str, check: Callable[[], None]) -> None:
    """Run ``check`` in a child for which an empty file system of ``size`` is mounted on ``folder``.

    The mount is the child's own and goes with it. ``PermissionError`` where the kernel has none for
    this user.
    """

    def mounted() -> None:
        kinds = _NEW_MOUNTS if os.geteuid() == 0 else _NEW_MOUNTS | _NEW_USER
        _call("unshare", kinds)
        _call("mount", b"none", b"/", None, _PRIVATE | _RECURSIVE, None)
        _call("mount", b"none", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode())
        assert os.path.ismount(folder)
        check()

    in_child(mounted)


def _call(name: str, *arguments: object) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
