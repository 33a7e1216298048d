"""Checkpoints that are damaged, and such that a hand has forged with a digest that fits.

Two thousand of them, drawn by Hypothesis, are loaded by ``scripts/experiments/fuzz_checkpoints.py``
in processes of their own, so that a crash is counted and not suffered.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maqd_hf.kernels import loader
from maqd_hf.kernels.decoder import NativeDecoder
from maqd_hf.kernels.native import NativeWeight
from scripts.experiments import fuzz_checkpoints as fuzz
from scripts.experiments.fuzzing import judge, mutations, originals

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found() -> tuple[dict[str, int], str]:
    """The counts of two thousand changed checkpoints, and what was said of the wrong ones."""
    command = [sys.executable, "-W", "ignore", "-m", "scripts.experiments.fuzz_checkpoints"]
    command += ["--mutants", "2000", "--processes", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    (summary,) = (line for line in done.stdout.splitlines() if line.startswith(fuzz.SUMMARY))
    return json.loads(summary.removeprefix(fuzz.SUMMARY)), done.stdout[-4000:] + done.stderr[-1000:]


def test_no_changed_file_crashes_hangs_misleads_or_is_refused_unclearly(
    found: tuple[dict[str, int], str],
) -> None:
    counts, said = found
    assert counts.get("wrong", 0) == 0, said


def test_enough_files_of_each_sort_were_tried_that_the_law_means_something(
    found: tuple[dict[str, int], str],
) -> None:
    counts, _ = found
    assert sum(n for name, n in counts.items() if ":" in name) >= 2000
    assert counts["damaged: refused"] > 200
    assert counts["forged: refused"] > 100
    assert counts["forged: changed"] > 30  # these ran to the end on other numbers


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("originals")
    originals.write_originals(root)
    return root


def test_the_judge_calls_a_changed_tensor_changed(roots: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(roots / "packed", tmp_path / "packed"))
    wanted = judge.state(judge.load(folder))
    assert judge.attempt(folder, wanted)[0] == "same"
    (weights,) = folder.glob("*.safetensors")
    header, data = mutations.read_header(weights)
    begin, _ = header["model.layers.0.mlp.up_proj.weight"]["data_offsets"]
    changed = data[:begin] + bytes([data[begin] ^ 1]) + data[begin + 1 :]
    mutations.write_header(weights, header, changed)
    assert judge.attempt(folder, wanted)[0] == "refused"
    assert not mutations.forge(folder, "whole")
    assert judge.attempt(folder, wanted)[0] == "refused"
    assert mutations.forge(folder, "all")
    assert judge.attempt(folder, wanted)[0] == "changed"


class _Sizes(TorchDispatchMode):
    """Notes the most elements that a tensor with memory has had."""

    most = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = call(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.most = max(self.most, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("kind", sorted(originals.GRIDS))
def test_sizes_that_no_file_holds_are_refused_before_memory_is_given(
    kind: str, roots: Path, tmp_path: Path
) -> None:
    wanted = judge.state(judge.load(roots / kind))
    config = json.loads((roots / kind / "config.json").read_text("utf-8"))
    ends = ("_size", "_heads", "_dim", *(["_embeddings"] if kind == "encoder" else []))
    sizes = [n for n in config if n.endswith(ends) and type(config[n]) is int]
    assert len(sizes) > 4
    for name in sizes:
        folder = Path(shutil.copytree(roots / kind, tmp_path / name))
        path = folder / "config.json"
        path.write_text(json.dumps(config | {name: config[name] * 2**12}), "utf-8")
        mutations.forge(folder, "all")
        with _Sizes() as seen:
            outcome, said = judge.attempt(folder, wanted)
        assert outcome.startswith("refused"), (name, said)
        assert seen.most < 2**20, name


@pytest.mark.skipif(loader.library() is None, reason="no compiled library here")
@pytest.mark.parametrize("kind", sorted(originals.GRIDS.keys() - {"trainable"}))
def test_what_loads_is_run_by_the_compiled_library(
    kind: str, roots: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MAQD_KERNEL", raising=False)
    ran: list[str] = []
    served = NativeWeight if kind == "encoder" else NativeDecoder
    call = served.__call__

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = call(self, *args, **kwargs)
        ran.append(kind)
        return result

    monkeypatch.setattr(served, "__call__", noted)
    judge.output(judge.load(roots / kind))
    assert len(ran) >= 2
