"""The versions of the packages that a result was made with."""

from __future__ import annotations

import platform
from importlib.metadata import version


def package_versions() -> dict[str, str]:
    """The versions of this package, of those it rests on and of Python, by name.

    >>> sorted(package_versions())
    ['datasets', 'maqd_hf', 'python', 'torch', 'transformers']
    """
    names = ("maqd_hf", "torch", "transformers", "datasets")
    return {name: version(name) for name in names} | {"python": platform.python_version()}
