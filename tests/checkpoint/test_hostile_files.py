"""Checkpoints that are damaged, and such that a hand has forged with a digest that fits.

Two thousand of them, drawn by Hypothesis, are loaded by ``scripts/experiments/fuzz_checkpoints.py``
in processes of their own, so that a crash is counted and not suffered.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.experiments import fuzz_checkpoints as fuzz

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found() -> tuple[dict[str, int], str]:
    """The counts of two thousand changed checkpoints, and what was said of the wrong ones."""
    command = [sys.executable, "-W", "ignore", "-m", "scripts.experiments.fuzz_checkpoints"]
    environment = {k: v for k, v in os.environ.items() if k != "MAQD_KERNEL"} | {
        "PYTHONPATH": str(ROOT)
    }
    done = subprocess.run(
        [*command, "--mutants", "2000"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    (summary,) = (line for line in lines if line.startswith(fuzz.SUMMARY))
    return json.loads(summary.removeprefix(fuzz.SUMMARY)), done.stdout[-4000:] + done.stderr[-1000:]


@pytest.mark.slow
def test_no_changed_file_crashes_hangs_misleads_or_is_refused_unclearly(
    found: tuple[dict[str, int], str],
) -> None:
    counts, said = found
    assert counts.get("wrong", 0) == 0, said


@pytest.mark.slow
def test_enough_files_of_each_sort_were_tried_that_the_law_means_something(
    found: tuple[dict[str, int], str],
) -> None:
    counts, _ = found
    assert sum(n for name, n in counts.items() if ":" in name) >= 2000
    assert counts["damaged: refused"] > 200
    assert counts["forged: refused"] > 100
    assert counts["forged: changed"] > 50  # these ran to the end on other numbers


def test_the_judge_calls_a_changed_tensor_changed(tmp_path: Path) -> None:
    fuzz.write_originals(tmp_path)
    folder = tmp_path / "packed"
    wanted = fuzz.state(fuzz.load(folder))
    assert fuzz.attempt(folder, wanted)[0] == "same"
    (weights,) = folder.glob("*.safetensors")
    header, data = fuzz.read_header(weights)
    begin, _ = header["model.layers.0.mlp.up_proj.weight"]["data_offsets"]
    fuzz.write_header(weights, header, data[:begin] + bytes([data[begin] ^ 1]) + data[begin + 1 :])
    assert fuzz.attempt(folder, wanted)[0] == "refused"
    assert fuzz.sign(folder)
    assert fuzz.attempt(folder, wanted)[0] == "changed"
