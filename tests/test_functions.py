"""Functions fit a screen, in the package, in the scripts and in the tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_LINES = 40  # of a body, without the docstring
EXEMPT = {
    "maqd_hf/kernels/gpu_kernels.py: multiply",  # Triton compiles a kernel as one function
    "maqd_hf/training/trainer.py: __init__",  # half of it hands on the arguments of Trainer
}


def long_functions(where: str, source: str) -> Iterator[str]:
    """``where: name`` of every function of ``source`` whose body is too long."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.body[-1].end_lineno:
            documented = ast.get_docstring(node) is not None and len(node.body) > 1
            first = node.body[1] if documented else node.body[0]
            if node.body[-1].end_lineno - first.lineno >= MAX_LINES:
                yield f"{where}: {node.name}"


def test_a_long_body_is_named_whatever_its_docstring() -> None:
    body = "    x = 1\n" * MAX_LINES
    documented = f'def fits():\n    """Text\n{chr(10) * 50}    """\n{body}'
    assert not [*long_functions("a.py", documented)]
    nested = "def outer():\n    pass\n\ndef long():\n    if x:\n" + "        y = 1\n" * MAX_LINES
    assert [*long_functions("a.py", nested)] == ["a.py: long"]


def test_every_function_fits_a_screen() -> None:
    paths = [p for folder in ("maqd_hf", "scripts", "tests") for p in (ROOT / folder).rglob("*.py")]
    found = {
        name
        for path in paths
        for name in long_functions(path.relative_to(ROOT).as_posix(), path.read_text("utf-8"))
    }
    assert found == EXEMPT
