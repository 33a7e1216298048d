"""What C and Python spell twice: the structures and entries of the compiled library."""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from maqd_hf import kernels
from maqd_hf.kernels import abi, loader
from tests.kernels.test_crowd import Crowd
from tests.support.taken import InputStruct

PACKAGE = Path(abi.__file__).parents[1]
CSRC = PACKAGE / "kernels/csrc"
HEADER = (CSRC / "maqd.h").read_text("utf-8")
NUMBERS = {
    "float": ctypes.c_float,
    "int64_t": ctypes.c_int64,
    "int32_t": ctypes.c_int32,
    "void": None,
}


def compile_c(*arguments):
    compiler = shutil.which(os.environ.get("CC") or "cc")
    assert compiler, "no C compiler"
    subprocess.run([compiler, "-std=gnu11", *arguments], check=True)


def kind_of(declaration):
    """(name, ctypes type) of a C parameter, member or function without its parameters."""
    found = re.fullmatch(r"(?:const )?(\w+)\s*(\*?)\s*(\w+)", declaration.strip())
    assert found, declaration
    kind, star, name = found.groups()
    if star:
        return name, ctypes.c_char_p if kind == "char" else ctypes.c_void_p
    return name, NUMBERS.get(kind, kind)


def structures(header):
    """{C name: the text between its braces} of every structure."""
    text = re.sub(r"/\*.*?\*/", "", header, flags=re.S)
    found = re.findall(r"typedef struct \{([^{}]*)\} (\w+);", text)
    return {name: body for body, name in found}


def declared(body):
    """[(member, ctypes type or C name of another structure)] of a structure."""
    found = []
    for line in filter(None, map(str.strip, body.split(";"))):
        kind, names = re.fullmatch(r"((?:const )?\w+) (.*)", line, flags=re.S).groups()
        found += [kind_of(f"{kind} {each}") for each in names.split(",")]
    return found


def entries(header):
    """{name: (what it returns, [what it takes])} of every function that a header declares."""
    text = re.sub(r"/\*.*?\*/|^#.*?$", "", header, flags=re.S | re.M)
    text = re.sub(r"(typedef struct|enum) \{.*?\}[^;]*;", "", text, flags=re.S)
    found = {}
    for before, inside in re.findall(r"([^;()]+)\(([^)]*)\);", text):
        name, returned = kind_of(before)
        inside = "" if inside == "void" else inside
        found[name] = returned, [kind_of(each)[1] for each in filter(None, inside.split(","))]
    return found


def spelled(kind):
    """A ctypes type as ``kind_of`` says it."""
    if issubclass(kind, ctypes.Structure):
        return kind.__doc__.split("``")[1]
    pointer = not issubclass(kind, ctypes._SimpleCData)
    return ctypes.c_void_p if pointer else kind


def members(struct):
    return [(name, spelled(kind)) for name, kind in struct._fields_]


def test_structures_have_the_same_members_in_c_and_python():
    theirs = {name: declared(body) for name, body in structures(HEADER).items()}
    ours = {struct.__doc__.split("``")[1]: members(struct) for struct in abi.STRUCTS}
    assert theirs == ours
    assert list(theirs) == list(ours), "maqd_struct_size counts in this order"


@pytest.mark.parametrize("struct", [Crowd, InputStruct])
def test_inner_structures_that_tests_spell_have_the_same_members(struct):
    inner = structures((CSRC / "internal.h").read_text("utf-8"))
    assert declared(inner[struct.__doc__.split("``")[1]]) == members(struct)


def test_entries_take_and_return_the_same_in_c_and_python():
    assert entries(HEADER) == abi.ENTRIES


def test_every_entry_is_called():
    """Nothing is offered that the package does not use."""
    sources = [path.read_text("utf-8") for path in PACKAGE.rglob("*.py") if path.stem != "abi"]
    sources.append((PACKAGE / "kernels/abi.py").read_text("utf-8").partition("def mismatch")[2])
    for name in abi.ENTRIES:
        assert any(name in source for source in sources), name


class Other:
    """A library whose structures take other sizes, or one that lacks an entry."""

    def __init__(self, sizes, lacks=""):
        self.sizes, self.lacks = sizes, lacks

    def __getattr__(self, name):
        if name == self.lacks:
            raise AttributeError(name)
        return lambda index: self.sizes[index] if index < len(self.sizes) else 0


def sizes():
    return [ctypes.sizeof(struct) for struct in abi.STRUCTS]


def test_a_library_of_other_structures_does_not_fit():
    assert abi.mismatch(Other(sizes())) is None
    for i in range(len(abi.STRUCTS)):
        other = sizes()
        other[i] += 8
        assert str(other) in abi.mismatch(Other(other))
    assert "bytes" in abi.mismatch(Other(sizes()[:-1]))
    assert "bytes" in abi.mismatch(Other([*sizes(), 8]))
    assert abi.mismatch(Other(sizes(), "maqd_linear")) == "it lacks maqd_linear"


@pytest.fixture
def fresh(monkeypatch):
    """The loader before it has looked for a library, and again afterwards."""
    cached = (loader.library, loader.isas)
    monkeypatch.delenv(loader.LIBRARY_VARIABLE, raising=False)
    for function in cached:
        function.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for function in cached:
        function.cache_clear()


@pytest.fixture
def other_library(tmp_path):
    """A library with every entry, whose `maqd_norm` has one member more."""
    header = HEADER.replace("int64_t features;", "int64_t features, more;", 1)
    assert header != HEADER
    sizes = ", ".join(f"sizeof({name})" for name in structures(header))
    stubs = "\n".join(f"void {name}(void) {{}}" for name in abi.ENTRIES if "size" not in name)
    types = "\n".join(f"typedef struct {{{body}}} {n};" for n, body in structures(header).items())
    (tmp_path / "other.c").write_text(
        f"#include <stdint.h>\n{types}\n{stubs}\n"
        f"int64_t maqd_struct_size(int32_t i) {{ int64_t s[] = {{{sizes}, 0}}; return s[i]; }}\n",
        "utf-8",
    )
    library = tmp_path / "_native.so"
    compile_c("-shared", "-fPIC", str(tmp_path / "other.c"), "-o", str(library))
    return library


def test_a_named_library_from_other_sources_is_refused(other_library, fresh):
    fresh.setenv(loader.LIBRARY_VARIABLE, str(other_library))
    with pytest.raises(RuntimeError, match=r"built from other sources.*its structures \(Weight"):
        loader.library()


def test_an_installed_library_from_other_sources_leaves_the_reference(other_library, fresh):
    """With a warning: a checkout that was updated and not built anew goes on, slower."""
    fresh.delenv("MAQD_KERNEL", raising=False)
    fresh.setattr(loader, "__file__", str(other_library.parent / "loader.py"))
    with pytest.warns(RuntimeWarning, match="built from other sources.*build_ext"):
        assert loader.library() is None
    assert loader.chosen_isa() is None and kernels.info()["linear"] == "torch reference"
    assert "other sources" in kernels.info()["why"]


@pytest.mark.parametrize("header", sorted(CSRC.glob("*.h")), ids=lambda path: path.name)
def test_every_header_compiles_alone(header, tmp_path):
    twice = tmp_path / "twice.c"
    twice.write_text(f'#include "{header}"\n' * 2, "utf-8")
    compile_c("-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fsyntax-only", str(twice))


def test_what_is_included_and_no_header_is_called_inc():
    """A header has a guard; a template, which needs what stands before it, has none."""
    for path in sorted(CSRC.iterdir()):
        guarded = f"#ifndef MAQD{'_' + path.stem.upper() if path.stem != 'maqd' else ''}_H\n"
        assert path.suffix in {".c", ".h", ".inc"}, path.name
        assert (guarded in path.read_text("utf-8")) == (path.suffix == ".h"), path.name
    built = (PACKAGE.parent / "setup.py").read_text("utf-8")
    assert 'csrc/*.h"' in built and 'csrc/*.inc"' in built, "a change there must build anew"
