"""One direction of imports, read from the source with `ast`; nothing is imported here.

Each entry of `LAYERS` may import itself and what stands before it. A module that is not named
there belongs to the last layer: it may import the whole package, but nothing below may import it.
`maqd_hf/__init__.py` comes after all modules, and after the package what uses it like any user:
`scripts`, and the folders in `metrics`, which `evaluate` loads by their path.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "maqd_hf"
LAYERS = (
    {"functional", "packing", "search"},
    {"kernels"},
    {"nn"},
    {"config", "probing", "matching", "folding"},
    {"building", "report", "size", "conversion"},
)
LAST = len(LAYERS)
WITHOUT_TRANSFORMERS = {"functional", "packing", "search", "kernels", "nn"}
# The only imports that may stand inside a function: packages of the optional extras.
OPTIONAL_EXTRAS = {"gensim", "gguf", "matplotlib", "onnx", "onnxruntime", "peft", "triton"}
MAX_LINES = 450
SOURCES = {".py", ".c", ".h", ".cpp", ".cu", ".md"}


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def component(module: str) -> str:
    """`maqd_hf.nn.linear` -> `nn`; the package itself -> ``."""
    return module.partition(".")[2].partition(".")[0]


def layer(module: str) -> int:
    name = component(module)
    if module.startswith(f"{PACKAGE}.metrics."):
        return LAST + 2
    if not name:
        return LAST + 1
    return next((i for i, names in enumerate(LAYERS) if name in names), LAST)


def imports(
    tree: ast.Module, module: str, is_package: bool, modules: set[str]
) -> Iterator[tuple[str, int, bool]]:
    """Every imported module: its absolute name, the line, and whether it is inside a function."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    local = {id(n) for f in ast.walk(tree) if isinstance(f, functions) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = module.split(".")[: None if is_package else -1]
                anchor = anchor[: len(anchor) - node.level + 1]
                base = ".".join([*anchor, *filter(None, [base])])
            submodules = {f"{base}.{alias.name}" for alias in node.names}
            names = sorted({name if name in modules else base for name in submodules})
        else:
            continue
        yield from ((name, node.lineno, id(node) in local) for name in names)


def violations(root: Path) -> list[str]:
    """What the tree under `root` (with `maqd_hf` in it) does against the rules, one line each."""
    found: list[str] = []
    paths = {module_name(p, root): p for p in sorted((root / PACKAGE).rglob("*.py"))}
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        where = path.relative_to(root).as_posix()
        tree = ast.parse(path.read_text("utf-8"))
        graph[module] = set()
        for name, line, local in imports(tree, module, path.name == "__init__.py", set(paths)):
            top = name.partition(".")[0]
            if top in {"scripts", "tests"}:
                found.append(f"{where}:{line} imports {name}, which is outside the package")
            if top == "transformers" and component(module) in WITHOUT_TRANSFORMERS:
                found.append(f"{where}:{line} imports transformers below the config")
            if local and top not in OPTIONAL_EXTRAS:
                found.append(f"{where}:{line} imports {name} inside a function")
            if top == PACKAGE:
                graph[module].add(name)
                if layer(name) > layer(module):
                    found.append(f"{where}:{line} imports {name} from a later layer")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"import cycle: {' <- '.join(error.args[1])}")
    for path in sorted((root / PACKAGE).rglob("*")):
        if path.suffix in SOURCES:
            lines = len(path.read_text("utf-8").splitlines())
            if lines > MAX_LINES:
                found.append(f"{path.relative_to(root).as_posix()} has {lines} lines")
    return found


def test_the_package_keeps_the_rules() -> None:
    root = Path(__file__).parents[1]
    assert (root / PACKAGE).is_dir()
    assert violations(root) == []


LEGAL = {
    "__init__.py": "from maqd_hf.trainer import Trainer\nfrom .config import Config",
    "functional.py": "import torch",
    "packing.py": "from maqd_hf import functional",
    "kernels/__init__.py": "from . import reference\nfrom .. import packing",
    "kernels/reference.py": "def f():\n    import triton",
    "nn/__init__.py": "from maqd_hf.nn.linear import Linear",
    "nn/linear.py": "from ..kernels import f\nfrom maqd_hf.functional import g",
    "config.py": "import transformers",
    "matching.py": "from .config import Config",
    "conversion.py": "import maqd_hf.nn.linear\nfrom maqd_hf.matching import match",
    "trainer.py": "from maqd_hf.conversion import quantize_model\nfrom .data import text",
    "data.py": "import datasets",
    "metrics/__init__.py": "from pathlib import Path",
    "metrics/loss/loss.py": "import maqd_hf",
}


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, "utf-8")


def test_a_legal_tree_passes(tmp_path: Path) -> None:
    write_tree(tmp_path, LEGAL)
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("functional.py", "import maqd_hf.kernels", "functional.py:1 imports maqd_hf.kernels from"),
        ("packing.py", "from .nn import x", "packing.py:1 imports maqd_hf.nn from a later"),
        (
            "nn/linear.py",
            "from .. import config",
            "linear.py:1 imports maqd_hf.config from a later",
        ),
        ("nn/linear.py", "import maqd_hf.data", "linear.py:1 imports maqd_hf.data from a later"),
        ("conversion.py", "from .trainer import x", "imports maqd_hf.trainer from a later layer"),
        ("trainer.py", "from maqd_hf import Trainer", "imports maqd_hf from a later layer"),
        ("trainer.py", "from scripts.qat import main", "imports scripts.qat, which is outside"),
        ("nn/linear.py", "from transformers.x import y", "imports transformers below the config"),
        ("kernels/reference.py", "def f():\n    import transformers", "transformers below"),
        ("trainer.py", "def f():\n    import json", "trainer.py:2 imports json inside a function"),
        ("data.py", "class A:\n  async def f(s):\n    from . import config", "inside a function"),
        ("trainer.py", "import maqd_hf.metrics.loss.loss", "loss.loss from a later layer"),
        ("data.py", "from .trainer import x", "import cycle: "),
        ("functional.py", "from .packing import x", "import cycle: "),
        ("nn/linear.py", "from . import Linear", "import cycle: "),
        ("data.py", "\n" * (MAX_LINES + 1), f"data.py has {MAX_LINES + 1} lines"),
        ("kernels/matmul.c", "//\n" * (MAX_LINES + 1), "matmul.c has"),
    ],
)
def test_a_violation_is_named(tmp_path: Path, name: str, source: str, expected: str) -> None:
    write_tree(tmp_path, LEGAL | {name: source})
    found = violations(tmp_path)
    assert any(expected in line for line in found), found
