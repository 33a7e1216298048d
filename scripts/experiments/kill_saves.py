"""Kill ``save_model`` at random points: is the folder then the whole old or the whole new model?

Each round a child process saves one of two models over the other in one folder and is ended by
SIGKILL: every other time at a random moment, else just before a random one of its calls to the file
system, so that the short switch from old to new is hit as often as the long writing. The parent
then loads the folder with plain ``from_pretrained`` and compares every tensor, the generation
settings and a file of the tokenizer's kind; at the end one more save must leave nothing behind.

    python scripts/experiments/kill_saves.py --kills 200

The models are tiny Llamas, trainable and packed, in one file and in many shards.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from maqd_hf import pack_model, quantize_model, save_model

WATCHED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link")


@dataclass
class Version:
    """A model, and what tells its folder from that of another."""

    model: Any
    mark: int

    def save_pretrained(self, folder: Path) -> None:
        """Write a file beside the model's own, as a tokenizer does."""
        (Path(folder) / "mark.txt").write_text(str(self.mark))

    def is_in(self, folder: Path) -> bool:
        """Whether ``folder`` loads as this model, whole."""
        found = AutoModelForCausalLM.from_pretrained(folder)
        tensors = found.state_dict()
        return (
            all(torch.equal(t, tensors[n]) for n, t in self.model.state_dict().items())
            and found.generation_config.max_new_tokens == self.mark
            and (folder / "mark.txt").read_text() == str(self.mark)
        )


def make_version(mark: int, packed: bool) -> Version:
    """A tiny Llama of its own weights; ``mark`` also stands in its generation settings."""
    torch.manual_seed(mark)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.generation_config = GenerationConfig(max_new_tokens=mark)
    quantize_model(model, weight_levels=16, activation_scaling="token", embedding_levels=255)
    if packed:
        pack_model(model)
    return Version(model, mark)


def save(version: Version, folder: Path, shard_size: str) -> None:
    save_model(version.model, folder, version, max_shard_size=shard_size)


# ------------------------------------------------------------------------------------- the child


def run_child(work: Callable[[], None], kill_at: int | None, after: float | None) -> bool:
    """Fork, do ``work`` there, and kill it before its file call ``kill_at`` or ``after`` seconds.

    Returns whether the child was killed before its work was done.
    """
    child = os.fork()
    if child == 0:
        logging.disable_progress_bar()  # killed with a bar's lock in hand it would stop the parent
        if kill_at is not None:
            count_calls(lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == kill_at else None)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the child failed by itself")
    return os.WIFSIGNALED(status)


def count_calls(tell: Callable[[int], None]) -> None:
    """Call ``tell`` with 1, 2, ... before each watched call to the file system from now on."""
    count = 0

    def hook(event: str, _: Any) -> None:
        nonlocal count
        if event in WATCHED:
            count += 1
            tell(count)

    sys.addaudithook(hook)


def measure(work: Callable[[], None]) -> tuple[int, float]:
    """The calls to the file system that ``work`` makes, and its seconds, measured in a child."""
    reader, writer = os.pipe()

    def measured() -> None:
        calls: list[int] = []
        count_calls(calls.append)
        start = time.perf_counter()
        work()
        os.write(writer, f"{len(calls)} {time.perf_counter() - start}".encode())

    run_child(measured, None, None)
    calls, seconds = os.read(reader, 100).split()
    os.close(reader)
    os.close(writer)
    return int(calls), float(seconds)


# ------------------------------------------------------------------------------------- the rounds


def kill_saves(folder: Path, packed: bool, shard_size: str, kills: int, seed: int) -> Counter[str]:
    """Kill ``kills`` saves into ``folder``; how many left it "old", "new", or "broken"."""
    dice, counts = random.Random(seed), Counter[str]()
    versions = [make_version(1, packed), make_version(2, packed)]
    save(versions[0], folder, shard_size)
    calls, seconds = measure(lambda: save(versions[1], folder, shard_size))
    present = 1
    while counts.total() < kills:
        new = versions[1 - present]
        at_call = counts.total() % 2 == 0
        kill_at = dice.randint(1, calls) if at_call else None
        after = None if at_call else dice.uniform(0, seconds)
        if not run_child(partial(save, new, folder, shard_size), kill_at, after):
            present = 1 - present  # it was done sooner
            continue
        if versions[present].is_in(folder):
            counts["old"] += 1
        elif new.is_in(folder):
            counts["new"] += 1
            present = 1 - present
        else:
            counts["broken"] += 1
    save(versions[1 - present], folder, shard_size)
    assert versions[1 - present].is_in(folder)
    counts["left behind"] = sum("maqd" in file.name for file in folder.iterdir())
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable_progress_bar()
    kinds = list(product(("trainable", "packed"), ("50GB", "8KB")))
    total = Counter[str]()
    for i, (state, shard_size) in enumerate(kinds):
        kills = args.kills // len(kinds) + (i < args.kills % len(kinds))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            counts = kill_saves(path, state == "packed", shard_size, kills, args.seed + i)
        total += counts
        print(f"{state}, shards of {shard_size}: {dict(counts)}", flush=True)
    print(f"killed {args.kills}: {total['old']} old, {total['new']} new, {total['broken']} broken")
    raise SystemExit(bool(total["broken"] or total["left behind"]))


if __name__ == "__main__":
    main()
