"""Laws of ``import maqd_hf``: it offers its names, and imports late what only few of them need."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import maqd_hf
from scripts.bench import import_time

LATE = {"datasets", "transformers.trainer", "maqd_hf.training", "maqd_hf.calibration"}


def modules_after(code: str) -> set[str]:
    """The names of the modules that a fresh Python has after running ``code``."""
    code = f"{code}\nimport sys, json; print(json.dumps(list(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(json.loads(found.stdout.splitlines()[-1]))


def test_every_public_name_is_there() -> None:
    assert set(maqd_hf.__all__) <= set(dir(maqd_hf))
    assert all(getattr(maqd_hf, name).__module__.startswith("maqd_hf.") for name in maqd_hf.__all__)
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        _ = maqd_hf.train


def test_what_only_training_needs_is_imported_when_it_is_asked_for() -> None:
    assert not LATE & modules_after("import maqd_hf")
    assert modules_after("from maqd_hf import MaQDTrainer") >= LATE


def test_imports_are_timed_in_fresh_processes_and_written(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(import_time, "IMPORTS", {"little": "import json", "nothing": "pass"})
    path = tmp_path / "times.json"
    report = import_time.main(import_time.Arguments(rounds=1, output=path))
    assert json.loads(path.read_text("utf-8")) == report
    assert all(0 < value < 10 for value in report["seconds"].values())
    assert "| little | " in capsys.readouterr().out
