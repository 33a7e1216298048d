"""README and the pages of docs/ keep what they promise: examples run, names and commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from maqd_hf import MaQDConfig, pack_model, quantize_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "model_cards" / "README.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if "notebook" not in str(page)),
]
FOLDERS = (
    "maqd_hf/",
    "scripts/",
    "tests/",
    "docs/",
    "results/",
    "model_cards/",
    ".ci/",
    ".github/",
)


def example(name: str) -> str:
    """The code under the marker of ``name`` in README.md, as it is printed."""
    (code,) = re.findall(rf"<!-- example: {name} -->\n```python\n(.*?)```", README, re.DOTALL)
    return str(code)


def run(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to run in; transformers prefers what lies here to an id on the Hub."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_example_that_makes_a_model_runs_as_printed(
    here, tiny_llama, byte_tokenizer, sample_text
):
    code = example("make")
    (name,) = re.findall(r'^name = "(.*?)"', code, re.MULTILINE)
    tiny_llama.config.num_hidden_layers = 1
    type(tiny_llama)(tiny_llama.config).save_pretrained(here / name)
    byte_tokenizer.save_pretrained(here / name)
    (here / "my_text.txt").write_text(sample_text[:2_000], "utf-8")
    run(code)
    before, after = ((here / f / "model.safetensors").stat().st_size for f in (name, "packed"))
    assert after < before / 2
    run(example("use").replace("runs/smollm2-135m-4bit/model", "packed"))


def test_the_example_that_uses_a_model_runs_as_printed(here, tiny_llama, byte_tokenizer, capsys):
    code = example("use")
    (folder,) = re.findall(r'"(runs/.*?)"', code)
    quantize_model(tiny_llama, MaQDConfig(activation_scaling="token"))
    pack_model(tiny_llama)
    tiny_llama.save_pretrained(here / folder)
    byte_tokenizer.save_pretrained(here / folder)
    run(code)
    assert "The city was founded in" in capsys.readouterr().out


def test_readme_is_short():
    assert len(README.encode()) <= 12_000


def test_readme_has_the_two_commands_that_ci_extracts():
    for marker in ("main", "test"):
        (command,) = re.findall(rf"<!-- ci:{marker} -->\n```bash\n(.*?)```", README, re.DOTALL)
        assert len(command.splitlines()) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_link_and_command_of_a_page_exists(page):
    text = page.read_text("utf-8")
    named = [word for word in re.findall(r"`([\w./-]+)`", text) if word.startswith(FOLDERS)]
    named += re.findall(r"\bpython (scripts/\w+\.py)", text)
    named += [f"{m.replace('.', '/')}.py" for m in re.findall(r"\bpython -m (scripts[\w.]*)", text)]
    missing = [name for name in named if not (ROOT / name).exists()]
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", re.sub(r"```.*?```", "", text, flags=re.S))
    missing += [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_every_name_in_the_path_of_a_tensor_is_defined_in_its_file():
    text = (ROOT / "docs" / "method.md").read_text("utf-8")
    rows = re.findall(r"^\| `([\w/]+\.(?:py|c|h|inc))` \| `([\w.]+)` \|", text, re.MULTILINE)
    assert len(rows) > 15
    for path, name in rows:
        code = (ROOT / path).read_text("utf-8")
        for part in name.split("."):
            assert re.search(rf"(def |class |^|\W){part}\s*[(:=]", code, re.MULTILINE), (path, name)


def test_every_room_has_a_page_of_the_reference():
    rooms = {p.name for p in (ROOT / "maqd_hf").iterdir() if (p / "__init__.py").exists()}
    rooms |= {p.stem for p in (ROOT / "maqd_hf").glob("*.py")} - {"__init__"}
    pages = {p.stem: p.read_text("utf-8") for p in (ROOT / "docs" / "reference").glob("*.md")}
    assert pages.keys() - {"index"} == rooms
    assert all(f"::: maqd_hf.{room}\n" in pages[room] for room in rooms)
