"""One direction of imports, read from the source with `ast`; nothing is imported here.

`ROOMS` names every room of the package in order: a room may import itself and those of the groups
before it; rooms of one group may import each other as long as no cycle arises. A room that is not
named there is a violation, so that none falls to a default. `maqd_hf/__init__.py` comes after all
rooms, and after the package what uses it like any user: `scripts`, and the folders in `metrics`,
which `evaluate` loads by their path.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "maqd_hf"
ROOMS = (
    {"functional", "packing"},
    {"data"},
    {"kernels"},
    {"nn"},
    {"config", "models", "decoding"},
    {"checkpoint", "calibration", "evaluation"},
    {"convert", "training"},
    {"export", "hf_quantizer", "trainer"},
    {""},  # maqd_hf/__init__.py
    {"metrics"},
)
WITHOUT_TRANSFORMERS = {"functional", "packing", "kernels", "nn"}
MAX_ROOT_FILES = 6
# The only imports that may stand inside a function: packages of the optional extras.
OPTIONAL_EXTRAS = {"gensim", "gguf", "matplotlib", "onnx", "onnxruntime", "peft", "triton"}
MAX_LINES = 450
SOURCES = {".py", ".c", ".h", ".inc", ".cpp", ".cu", ".md"}


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """`maqd_hf.nn.linear` -> `nn`; the package itself -> ``."""
    return module.partition(".")[2].partition(".")[0]


def place(room: str) -> int | None:
    """The group of ``ROOMS`` that a room stands in; None if it is not named there."""
    return next((i for i, group in enumerate(ROOMS) if room in group), None)


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
    files: dict[str, set[str]] = {}
    rooms: dict[str, set[str]] = {}
    for module, path in paths.items():
        where = path.relative_to(root).as_posix()
        tree = ast.parse(path.read_text("utf-8"))
        files[module], here = set(), room(module)
        if place(here) is None:
            found.append(f"{where} is in a room that ROOMS does not name")
        for name, line, local in imports(tree, module, path.name == "__init__.py", set(paths)):
            top = name.partition(".")[0]
            if top in {"scripts", "tests"}:
                found.append(f"{where}:{line} imports {name}, which is outside the package")
            if top == "transformers" and here in WITHOUT_TRANSFORMERS:
                found.append(f"{where}:{line} imports transformers below the config")
            if local and top not in OPTIONAL_EXTRAS:
                found.append(f"{where}:{line} imports {name} inside a function")
            if top == PACKAGE:
                files[module].add(name)
                if room(name) != here:
                    rooms.setdefault(here, set()).add(room(name))
                if (place(room(name)) or 0) > (place(here) or 0):
                    found.append(f"{where}:{line} imports {name} from a later room")
    found += [*cycles("files", files), *cycles("rooms", rooms), *sizes(root)]
    return found


def cycles(what: str, graph: dict[str, set[str]]) -> Iterator[str]:
    """One line if `graph` (name -> imported names) has a cycle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield f"import cycle of {what}: {' <- '.join(error.args[1])}"


def sizes(root: Path) -> Iterator[str]:
    """Files that are too long to be read in ten minutes, and a crowded package root."""
    package = root / PACKAGE
    for path in sorted(package.rglob("*")):
        if path.suffix in SOURCES:
            lines = len(path.read_text("utf-8").splitlines())
            if lines > MAX_LINES:
                yield f"{path.relative_to(root).as_posix()} has {lines} lines"
    at_root = sorted(path.name for path in package.glob("*.py"))
    if len(at_root) > MAX_ROOT_FILES:
        yield f"{len(at_root)} Python files stand in the package root: {', '.join(at_root)}"


def test_the_package_keeps_the_rules() -> None:
    root = Path(__file__).parents[1]
    assert (root / PACKAGE).is_dir()
    assert violations(root) == []


def test_every_room_of_the_package_says_what_it_may_import() -> None:
    package = Path(__file__).parents[1] / PACKAGE
    for folder in (path.parent for path in package.glob("*/__init__.py")):
        if folder.name != "metrics":
            text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))) or ""
            assert "mports" in text, folder.name
            named = set(re.findall(r"``(\w+)``", text))
            files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
            assert files <= named, (folder.name, sorted(files - named))


LEGAL = {
    "__init__.py": "from maqd_hf.training import Trainer\nfrom .config import Config",
    "functional.py": "import torch",
    "packing.py": "from maqd_hf import functional",
    "data/__init__.py": "import datasets",
    "kernels/__init__.py": "from . import reference\nfrom .. import packing",
    "kernels/reference.py": "def f():\n    import triton",
    "nn/__init__.py": "from maqd_hf.nn.linear import Linear",
    "nn/linear.py": "from ..kernels import f\nfrom maqd_hf.functional import g",
    "config.py": "import transformers",
    "models/names.py": "from ..nn import Linear",
    "convert/__init__.py": "from .quantize import quantize",
    "convert/quantize.py": "import maqd_hf.nn.linear\nfrom maqd_hf.models.names import match",
    "training/__init__.py": "from .trainer import Trainer",
    "training/trainer.py": "from maqd_hf.calibration import calibrate\nfrom ..data import text",
    "calibration/__init__.py": "from ..config import Config",
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
        ("nn/linear.py", "from .. import config", "imports maqd_hf.config from a later room"),
        ("kernels/reference.py", "from ..nn import x", "imports maqd_hf.nn from a later room"),
        ("data/text.py", "from ..evaluation import x", "text.py:1 imports maqd_hf.evaluation from"),
        ("nn/linear.py", "import maqd_hf.training", "linear.py:1 imports maqd_hf.training from"),
        ("convert/quantize.py", "import maqd_hf.hf_quantizer", "maqd_hf.hf_quantizer from a later"),
        ("training/trainer.py", "from maqd_hf import Trainer", "imports maqd_hf from a later room"),
        ("training/trainer.py", "from scripts.qat import main", "imports scripts.qat, which is"),
        ("nn/linear.py", "from transformers.x import y", "imports transformers below the config"),
        ("kernels/reference.py", "def f():\n    import transformers", "transformers below"),
        ("training/trainer.py", "def f():\n    import json", "imports json inside a function"),
        ("config.py", "class A:\n  async def f(s):\n    from . import nn", "inside a function"),
        ("training/trainer.py", "import maqd_hf.metrics.loss.loss", "loss.loss from a later room"),
        ("training/callbacks.py", "from . import Trainer", "import cycle of files: "),
        ("models/names.py", "from ..decoding import x", "import cycle of rooms: "),
        ("functional.py", "from .packing import x", "import cycle of files: "),
        ("nn/linear.py", "from . import Linear", "import cycle of files: "),
        ("attic/old.py", "import torch", "old.py is in a room that ROOMS does not name"),
        ("helpers.py", "import torch", "helpers.py is in a room that ROOMS does not name"),
        ("data/text.py", "\n" * (MAX_LINES + 1), f"text.py has {MAX_LINES + 1} lines"),
        ("kernels/matmul.c", "//\n" * (MAX_LINES + 1), "matmul.c has"),
    ],
)
def test_a_violation_is_named(tmp_path: Path, name: str, source: str, expected: str) -> None:
    more = {"decoding/__init__.py": "from ..models import names"} if "rooms" in expected else {}
    more |= {"training/trainer.py": "from .callbacks import x"} if "callbacks" in name else {}
    write_tree(tmp_path, LEGAL | more | {name: source})
    found = violations(tmp_path)
    assert any(expected in line for line in found), found


def test_a_crowded_root_is_named(tmp_path: Path) -> None:
    write_tree(tmp_path, LEGAL | {f"more{i}.py": "" for i in range(MAX_ROOT_FILES)})
    assert any("stand in the package root" in line for line in violations(tmp_path))
