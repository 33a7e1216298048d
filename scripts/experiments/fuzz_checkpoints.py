"""Damaged and forged checkpoints: nothing may crash, hang, or load with another output unnoticed.

Small checkpoints of every format (``fuzzing.originals``: packed and QAT, one file and shards,
decoder and encoder, and format version 1) are changed where their structure can be changed
(``fuzzing.mutations``), and loaded, and what loads is run by the compiled library
(``fuzzing.judge``). Hypothesis draws the changes.

- A *damaged* checkpoint keeps its digest, or has one that only agrees with itself. It must be
  refused, or load with the very same output.
- A *forged* one gets a digest that fits it. It may load with another output, and nothing worse.
  So may one of version 1, which had no digest.

A refusal by this package is a ``ValueError`` or ``OSError`` whose sentence names a file and a
module, tensor or field. What transformers or safetensors refuse before this package is asked is
counted apart. A checkpoint may take ``SECONDS`` and, beside what the process held before,
``GIBIBYTES``.

    python -m scripts.experiments.fuzz_checkpoints --mutants 2000
    .ci/sanitize-fuzz --mutants 200000 --processes 2      # the library under AddressSanitizer
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from transformers.utils.logging import disable_progress_bar

from .fuzzing.judge import attempt, load, state
from .fuzzing.mutations import DRAWS, Draw, forge, mutate
from .fuzzing.originals import write_originals

GIBIBYTES = 1
CHUNK, DEATHS = 5000, 10
"""The mutants that one process tries, and how many processes may die before it is given up."""
SUMMARY = "summary: "


def say(counts: Counter[str]) -> None:
    """One line of ``counts`` that the parent process, or a test, reads."""
    print(SUMMARY + json.dumps(dict(sorted(counts.items()))), flush=True)


def tried(counts: Counter[str]) -> int:
    """The number of mutants in ``counts``."""
    return sum(n for name, n in counts.items() if ":" in name)


def joined(a: Counter[str], b: Counter[str]) -> Counter[str]:
    """The sum of two counts, and of their peaks the higher one."""
    return Counter({**(a + b), "peak MiB": max(a["peak MiB"], b["peak MiB"])})


def run(root: Path, mutants: int, number: int, now: Path) -> None:
    """Change, load and judge; ``now`` always holds the draw at hand, for the parent to report."""
    wanted = {folder.name: state(load(folder)) for folder in root.iterdir() if folder.is_dir()}
    counts: Counter[str] = Counter()

    @seed(number)
    @settings(
        max_examples=mutants,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(DRAWS)
    def one(draw: Draw) -> None:
        kind = draw["kind"]
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / kind
            shutil.copytree(root / kind, folder)
            what = mutate(folder, draw)
            forged = draw["forged"] != "no" and forge(folder, draw["forged"])
            free = forged or kind == "version1"
            now.write_text(json.dumps(draw), "utf-8")
            outcome, said = attempt(folder, wanted[kind])
        counts[f"{'forged' if free else 'damaged'}: {outcome}"] += 1
        if outcome in ("unclear", "memory") or (outcome == "changed" and not free):
            counts["wrong"] += 1
            print(f"{outcome}: {kind}, {what}, {draw}: {said[:600]}", flush=True)
        if tried(counts) % 500 == 0:
            say(counts | peak())

    one()
    say(counts | peak())


def peak() -> Counter[str]:
    """The most memory that this process has held."""
    return Counter({"peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024})


def work(root: Path, mutants: int, number: int) -> Counter[str]:
    """``run`` in processes of their own: one that dies is reported, and the next goes on."""
    total: Counter[str] = Counter()
    for death in range(DEATHS):
        now, start = root / f"now{number}.json", time.monotonic()
        command = [sys.executable, "-W", "ignore", "-m", "scripts.experiments.fuzz_checkpoints"]
        command += ["--root", str(root), "--mutants", str(mutants - tried(total))]
        command += ["--seed", str(number * DEATHS + death)]
        environment = {k: v for k, v in os.environ.items() if k != "MAQD_KERNEL"}
        environment.setdefault("OMP_NUM_THREADS", "1")
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        *_, last = [json.dumps({}), *(x for x in done.stdout.splitlines() if x.startswith(SUMMARY))]
        found = Counter(json.loads(last.removeprefix(SUMMARY)))
        for line in done.stdout.splitlines():
            if not line.startswith(SUMMARY):
                print(line, flush=True)
        milliseconds = 1000 * (time.monotonic() - start) / max(1, tried(found))
        print(f"{number}: {milliseconds:.1f} ms a mutant, {found['peak MiB']} MiB", flush=True)
        total = joined(total, found)
        if done.returncode == 0:
            break
        print(f"died with {done.returncode} at {now.read_text('utf-8')}", flush=True)
        total += Counter({"any: crashed or hung": 1, "wrong": 1})
    return total


def limit_memory() -> None:
    """Refuse this process more than it holds and ``GIBIBYTES``.

    A sanitizer reserves terabytes of addresses; ``.ci/sanitize-fuzz`` gives it a limit of its own.
    """
    if "asan" not in os.environ.get("LD_PRELOAD", ""):
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + GIBIBYTES * 2**30,) * 2)


def main() -> None:
    """Print the counts; exit with 1 if anything crashed, hung, loaded changed or was unclear."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mutants", type=int, default=2000, help="changed checkpoints to try")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--processes", type=int, default=1, help="to work in")
    parser.add_argument("--root", type=Path, help="originals, as the parent process wrote them")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    disable_progress_bar()
    if arguments.root:
        limit_memory()
        now = arguments.root / f"now{arguments.seed // DEATHS}.json"
        run(arguments.root, arguments.mutants, arguments.seed, now)
        return
    share = min(CHUNK, -(-arguments.mutants // arguments.processes))
    sizes = [min(share, arguments.mutants - at) for at in range(0, arguments.mutants, share)]
    numbers = [1000 * arguments.seed + i for i in range(len(sizes))]
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(arguments.processes) as pool:
        write_originals(Path(root))
        for found in pool.map(work, [Path(root)] * len(sizes), sizes, numbers):
            counts = joined(counts, found)
    say(counts)
    raise SystemExit(1 if counts["wrong"] else 0)


if __name__ == "__main__":
    main()
