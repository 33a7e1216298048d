"""`evaluate` modules that ship with the package and load without the Hub.

>>> import evaluate
>>> metric = evaluate.load(path("accuracy"))
>>> metric.compute(predictions=[1, 0], references=[1, 1])
{'accuracy': 0.5}
"""

from pathlib import Path

_FOLDER = Path(__file__).parent


def path(name: str) -> str:
    """Folder of a shipped `evaluate` module, for ``evaluate.load``.

    Raises:
        ValueError: no such module; the message lists those there are.

    >>> import evaluate
    >>> metric = evaluate.load(path("token_perplexity"))
    """
    folder = _FOLDER / name
    if not (folder / f"{name}.py").is_file():
        names = sorted(f.parent.name for f in _FOLDER.glob("*/*.py") if f.stem == f.parent.name)
        raise ValueError(f"No metric {name!r}; maqd_hf ships: {', '.join(names)}.")
    return str(folder)
