"""Write README's table and docs/results.md from the JSON files in results/.

    python -m scripts.bench.report.render            # rewrite both
    python -m scripts.bench.report.render --check    # exit 1 if they are not what results/ say

README.md has one table of six rows, docs/results.md everything. No number in either is typed by
hand; where each file comes from stands below its table. The pictures are drawn by ``plots``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bench.report.jobs import architectures, main_job, training_cost
from scripts.bench.report.norms import batch_sizes, norms, pretrained_norms, static_inference
from scripts.bench.report.quality import (
    ablations,
    block_wise,
    encoders,
    post_training,
    quality,
    zero_shot,
)
from scripts.bench.report.speed import speed, speed_elsewhere, speed_of_models
from scripts.bench.report.summary import six_rows

ROOT = Path(__file__).resolve().parents[3]
BEGIN, END = "<!-- table -->", "<!-- /table -->"


@dataclass(frozen=True)
class Section:
    """A part of the results: its files, the command that wrote them, their tables and pictures.

    ``pictures``: (text in its place, file in docs/plots), shown where the file is there.
    """

    title: str
    files: str
    command: str
    show: Callable[[Any], str]
    pictures: tuple[tuple[str, str], ...] = ()

    def render(self, root: Path) -> list[str]:
        """Paragraphs; none where there is no result."""
        paths = sorted((root / "results").glob(self.files))
        found = [json.loads(path.read_text("utf-8")) for path in paths]
        if not found:
            return []
        content = self.show(found if "*" in self.files else found[0])
        drawn = [
            f"![{text}](plots/{name})"
            for text, name in self.pictures
            if (root / "docs" / "plots" / name).exists()
        ]
        source = f"The numbers are in `results/{self.files}`, written by `{self.command}`."
        return [f"## {self.title}", content, *drawn, source]


SECTIONS = [
    Section("The main job", "main_job.json", "python scripts/qat_llm.py", main_job),
    Section(
        "Quality against the peers",
        "quality.json",
        "python -m scripts.bench.quality --data-dir ...",
        quality,
        (
            ("perplexity on WikiText-2 against bits a weight", "quality.png"),
            ("perplexity on film reviews against bits a weight", "quality_imdb.png"),
            ("loss of the trained rows, step by step", "loss.png"),
        ),
    ),
    Section(
        "Zero-shot", "zero_shot.json", "python -m scripts.bench.zero_shot --data-dir ...", zero_shot
    ),
    Section(
        "Speed",
        "speed.json",
        "python -m scripts.bench.speed --output results/speed.json",
        speed,
        (("operations a second against operations for every byte of weights", "roofline.png"),),
    ),
    Section(
        "Speed, a CPU without AMX",
        "speed-avx512.json",
        "python -m scripts.bench.speed --output results/speed-avx512.json",
        speed_elsewhere,
    ),
    Section(
        "Speed, a CPU with AVX2 alone",
        "speed-avx2.json",
        "python -m scripts.bench.speed --output results/speed-avx2.json",
        speed_of_models,
    ),
    Section("Without training", "ptq-*.json", "python scripts/quantize_ptq.py", post_training),
    Section(
        "Static norms",
        "lbn_experiments.json",
        "python -m scripts.experiments.lbn_from_scratch",
        norms,
    ),
    Section(
        "Batch sizes",
        "lbn_batch.json",
        "python -m scripts.experiments.lbn_batch_size",
        batch_sizes,
        (("loss against the mini-batch size", "lbn_batch.png"),),
    ),
    Section(
        "Static norms, pretrained",
        "lbn_pretrained.json",
        "python -m scripts.experiments.lbn_pretrained",
        pretrained_norms,
    ),
    Section(
        "What static norms save",
        "static_inference.json",
        "python -m scripts.experiments.static_inference",
        static_inference,
    ),
    Section("Encoders", "encoders.json", "python scripts/qat_encoder.py --dataset ...", encoders),
    Section(
        "Architectures",
        "architectures.json",
        "python -m scripts.experiments.architectures",
        architectures,
    ),
    Section(
        "One setting at a time",
        "ablations.json",
        "python -m scripts.experiments.ablations --data-dir ...",
        ablations,
    ),
    Section(
        "Block by block", "blockwise.json", "python -m scripts.experiments.blockwise", block_wise
    ),
    Section(
        "What training costs", "training.json", "python -m scripts.bench.training", training_cost
    ),
]
HEAD = """# Results

Everything on this page is written by `python -m scripts.bench.report.render` from the JSON files
that the measurements left in `results/`. The machine was shared and gave two cores; times are only
as good as that. A target that was missed stands here with what limits it."""


def results_page(root: Path) -> str:
    """All sections whose result is there."""
    paragraphs = [part for section in SECTIONS for part in section.render(root)]
    return "\n\n".join([HEAD, *paragraphs]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite or check both files; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--root", type=Path, default=ROOT)
    args = parser.parse_args(arguments)
    readme = args.root / "README.md"
    before, _, rest = readme.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = {
        readme: f"{before}{BEGIN}\n{six_rows(args.root)}\n{END}{after}",
        args.root / "docs" / "results.md": results_page(args.root),
    }
    stale = [p for p, text in wanted.items() if not p.exists() or p.read_text("utf-8") != text]
    for path in stale:
        if args.check:
            print(f"{path} differs from results/: run python -m scripts.bench.report.render")
        else:
            path.write_text(wanted[path], "utf-8")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
