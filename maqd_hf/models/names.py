"""Names of modules: the same for every head of a base model, and short forms of many of them."""

from __future__ import annotations

import re

from torch import nn


class Names:
    """Module names relative to the base model, "/name" outside it; the same for every head.

    A checkpoint written from ``ForCausalLM`` and loaded as ``AutoModel`` (or the other way round)
    then means the same modules.
    """

    def __init__(self, model: nn.Module) -> None:
        prefix = getattr(model, "base_model_prefix", "")
        nested = bool(prefix) and hasattr(model, prefix)
        self.prefix = f"{prefix}." if nested else ""

    def relative(self, name: str) -> str:
        """The name in a config of a full module name."""
        if name.startswith(self.prefix):
            return name[len(self.prefix) :]
        return f"/{name}"

    def absolute(self, name: str) -> str:
        """The full module name of a name in a config."""
        return name[1:] if name.startswith("/") else f"{self.prefix}{name}"


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def collapse(names: list[str], star: bool = False) -> list[str]:
    """Merge names that differ in layer numbers only.

    Their first numbers become ranges; with ``star`` all numbers become "*".

    >>> collapse(["layers.0.up", "layers.1.up", "layers.2.up", "head"])
    ['layers.{0-2}.up', 'head']
    >>> collapse(["layers.0.up", "layers.1.up", "head"], star=True)
    ['layers.*.up', 'head']
    """
    if star:
        return list(dict.fromkeys(_NUMBER.sub("*", name) for name in names))
    groups: dict[str, list[int]] = {}
    for name in names:
        numbers = _NUMBER.findall(name)
        groups.setdefault(_NUMBER.sub("{}", name, count=1), []).extend(map(int, numbers[:1]))
    return [
        pattern.replace("{}", "{" + _ranges(sorted(numbers)) + "}") if numbers else pattern
        for pattern, numbers in groups.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """Sorted numbers as text, such as "0-2,5"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)
