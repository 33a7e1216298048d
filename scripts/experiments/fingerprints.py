"""Digests of what the main jobs make, to see that a change of the code changes not a single byte.

Every row is a run of ``scripts/qat_llm.py`` on stories260K (16, 4 and 3 levels, static and token
inputs, rotated and not, one with static norms); the last rows come from ``scripts/qat_encoder.py``.
A row has the SHA-256 of the packed safetensors and the greedy text. Run it before and after a
change that must not move anything, on the same machine, and compare the two files:

    python scripts/experiments/fingerprints.py --data-dir data --out before.json
    python scripts/experiments/fingerprints.py --data-dir data --compare before.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--train_tokens", "4096", "--block_size", "128", "--calibration_samples", "8"]
TINY += ["--eval_window", "128", "--eval_windows", "4", "--prompt", "Once upon a time"]


def decoder_rows(data: Path) -> Iterator[tuple[str, list[str], dict[str, Any]]]:
    """The name, the arguments of ``qat_llm.py`` and the ``MaQDConfig`` of every decoder row."""
    story = ["--model", str(data / "models/stories260K"), *TINY]
    story += ["--dataset", str(data / "tinystories/train-sample.parquet"), "--eval_split", "train"]
    for levels, scaling, rotation in product((16, 4, 3), ("static", "token"), ("auto", None)):
        config = {
            "weight_levels": levels,
            "activation_levels": 255,
            "activation_scaling": scaling,
            "group_size": 32 if scaling == "token" else None,
            "rotation": rotation,
            "embedding_levels": 255,
            "overrides": {"*.down_proj": {"group_size": None}},  # its width is 172
        }
        turned = "rotated" if rotation else "plain"
        yield f"stories {levels} {scaling} {turned}", [*story, "--lbn_tolerance", "0"], config
    config = {"weight_levels": 16, "activation_levels": 255, "embedding_levels": 16}
    yield "stories 16 static norms", [*story, "--lbn_tolerance", "0.3"], config


def digest(paths: list[Path]) -> str:
    """The SHA-256 of the files' names and bytes, in the order of their names."""
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def run(repo: Path, script: str, arguments: list[str]) -> None:
    """Run one of the user's commands of ``repo``; its output is shown if it fails."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(repo)}
    done = subprocess.run(
        [sys.executable, str(repo / "scripts" / script), *arguments],
        cwd=repo,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{script} {' '.join(arguments)}\n{done.stdout[-3000:]}")


def fingerprints(repo: Path, data: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The digests of every row, by its name."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, arguments, config in decoder_rows(data):
            folder, settings = Path(scratch) / name.replace(" ", "-"), Path(scratch) / "config.json"
            settings.write_text(json.dumps(config), "utf-8")
            arguments = [*arguments, "--config", str(settings), "--output_dir", str(folder)]
            run(repo, "qat_llm.py", arguments)
            metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
            packed = sorted(folder.rglob("model*.safetensors"))
            norms = str(len(metrics["norms"]["static"]))
            yield name, {"packed": digest(packed), "text": metrics["sample"], "static norms": norms}
        folder = Path(scratch) / "encoder"
        sst2 = ["--dataset", str(data / "sst2"), "--train_rows", "256", "--eval_rows", "128"]
        sst2 += ["--max_length", "32", "--float_epochs", "1", "--weight_levels", "16", "3"]
        sst2 += ["--calibration_rows", "64", "--num_train_epochs", "1", "--seed", "0"]
        run(repo, "qat_encoder.py", [*sst2, "--output_dir", str(folder)])
        for model in sorted(folder.rglob("w*/model*.safetensors")):
            yield f"encoder {model.parent.name}", {"packed": digest([model])}


def main() -> None:
    """Print every row; with ``--compare`` exit with 1 if one differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="models/, tinystories/, sst2/")
    parser.add_argument("--repo", type=Path, default=ROOT, help="checkout whose scripts are run")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--compare", type=Path, help="JSON file of an earlier run")
    arguments = parser.parse_args()
    before = json.loads(arguments.compare.read_text("utf-8")) if arguments.compare else {}
    found, differing = {}, []
    for name, row in fingerprints(arguments.repo.resolve(), arguments.data_dir.resolve()):
        found[name] = row
        same = "" if not before else "  same" if before.get(name) == row else "  DIFFERS"
        differing += [name] if "DIFFERS" in same else []
        print(f"{name:32} {row['packed'][:16]} {row.get('text', '')[:40]!r}{same}", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    if differing:
        raise SystemExit(f"{len(differing)} of {len(found)} rows differ: {', '.join(differing)}")


if __name__ == "__main__":
    main()
