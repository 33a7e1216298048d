"""The processor time of importing the package, beside that of what every user of a model imports.

    python -m scripts.bench.import_time
    python -m scripts.bench.import_time --rounds 20 --output import_time.json

Every import runs in a fresh process, all imports take turns, and the least processor time of all
rounds counts: busy neighbors lengthen it least. A first round, which may have to compile modules to
bytecode, is not counted. ``seconds`` are those of the whole process, the start of Python included.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from maqd_hf.evaluation.model_card import markdown_table
from maqd_hf.evaluation.versions import package_versions

IMPORTS = {
    "torch and transformers": "import torch, transformers",
    "the same, and any of its models": "import torch; from transformers import PreTrainedModel",
    "`maqd_hf`": "import maqd_hf",
    "transformers' trainer": "from transformers import Trainer",
    "`maqd_hf` and its trainer": "from maqd_hf import MaQDTrainer",
}


@dataclass
class Arguments:
    """Command line."""

    rounds: int = field(default=10, metadata={"help": "Turns that count."})
    output: Path | None = field(default=None, metadata={"help": "JSON file to write."})


def seconds(code: str) -> float:
    """The processor time of a fresh Python that runs ``code``, in its own and the system's code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(arguments: Arguments) -> dict[str, Any]:
    """Measure, print a table and write what was asked for."""
    least = dict.fromkeys(IMPORTS, float("inf"))
    for round_number in range(arguments.rounds + 1):
        for name, code in IMPORTS.items():
            found = seconds(code)
            if round_number:
                least[name] = min(least[name], found)
    rows = [(name, f"{value:.2f}") for name, value in least.items()]
    print(markdown_table(("import", "seconds of a processor"), rows))
    report = {
        "arguments": asdict(arguments) | {"output": None},
        "versions": package_versions(),
        "seconds": least,
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return report


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    main(parsed)
