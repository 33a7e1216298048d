"""Products of one matrix in every way at hand: packed layers, and the rivals of `speed_rivals`.

A part of `scripts.bench.speed`. Competitors take turns; every call is one matrix product of float
inputs, from Python.
"""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from maqd_hf.kernels import NativeWeight
from maqd_hf.kernels.loader import arena
from maqd_hf.nn import LinearSpec, MaQDLinear, PackedLinear
from maqd_hf.packing import pack_codes
from scripts.bench.speed_rivals import GROUP, MIB, Calls, bits_of, rivals

SHAPES = [(1536, 576), (2048, 2048), (4096, 4096), (11008, 4096)]


def take_turns(work: Calls, rounds: int) -> dict[str, list[float]]:
    """The seconds of one call of each, ``rounds`` times in turn.

    Short calls are repeated until they take 20 ms.
    """
    repeats = {}
    for name, call in work.items():
        call()
        began = time.perf_counter()
        call()
        repeats[name] = max(1, int(0.02 / (time.perf_counter() - began + 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, call in work.items():
            began = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            seconds[name].append((time.perf_counter() - began) / repeats[name])
    return seconds


# ------------------------------------------------------------------------------------- ceilings


def read_bandwidth(threads: int, rounds: int) -> float:
    """The bytes per second of reading memory far beyond all caches, on every thread at once.

    Dot products of numbers on huge pages are the quickest reader at hand.
    """
    count = 64 * MIB
    data = [arena.zeros(4 * count).view(torch.float32) for _ in range(threads)]
    best, before = 0.0, torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(max(rounds, 5)):
            began = time.perf_counter()
            list(pool.map(lambda part: torch.dot(part, part), data))
            best = max(best, threads * 4 * count / (time.perf_counter() - began))
    torch.set_num_threads(before)
    return best


def compute_ceiling(rounds: int) -> float:
    """The multiplications per second of an 8-bit packed matrix in the caches, for 512 tokens."""
    call = partial(packed_layer(1024, 1024, 256, None), torch.randn(512, 1024))
    return 512 * 1024 * 1024 / min(take_turns({"8 bit": call}, rounds)["8 bit"])


# ---------------------------------------------------------------------------------- competitors


def packed_layer(rows: int, columns: int, levels: int, group_size: int | None) -> PackedLinear:
    spec = LinearSpec(levels, 255, "token", group_size=group_size)
    linear = nn.Linear(columns, rows, bias=False)
    return PackedLinear.from_qat(MaQDLinear.from_linear(linear, spec, start="range"))


def competitors(rows: int, columns: int, x: Tensor) -> tuple[Calls, dict[str, str]]:
    """One layer in every way at hand, each a call without arguments; and who is missing, why."""
    calls: Calls = {}
    for name, levels in (("1.6", 3), ("2", 4), ("3", 8), ("4", 16), ("8", 256)):
        words = pack_codes(torch.randint(0, levels, (rows, columns)), levels)
        scale = torch.ones(rows, 1)
        weight = NativeWeight(words, levels, columns, scale, None, None, 255, name)
        calls[f"maqd {name} bit"] = partial(weight, x, None)
    for levels, bits in ((4, 2), (16, 4)):
        layer = packed_layer(rows, columns, levels, GROUP)
        calls[f"maqd {bits} bit, groups of {GROUP}"] = partial(layer, x)
    others, missing = rivals(rows, columns, x)
    return calls | others, missing


# ---------------------------------------------------------------------------------------- table


@torch.no_grad()
def matrices(tokens: list[int], rounds: int) -> list[dict[str, Any]]:
    """A row for each shape, number of tokens and competitor.

    The last row has the machine's two ceilings, and why each of the rivals ``missing`` is missing.
    """
    found: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    threads = torch.get_num_threads()
    bandwidth, compute = read_bandwidth(threads, rounds), compute_ceiling(rounds)
    for rows, columns in SHAPES:
        for count in tokens:
            x = torch.randn(count, columns)
            calls, absent = competitors(rows, columns, x)
            missing |= absent
            seconds = take_turns(calls, rounds)
            medians = {name: statistics.median(times) for name, times in seconds.items()}
            for name, median in medians.items():
                row: dict[str, Any] = {"rows": rows, "columns": columns, "tokens": count}
                row |= {"name": name, "threads": threads, "seconds": median}
                row["to_bf16"] = medians["torch bf16"] / median
                row["operations_per_second"] = 2 * rows * columns * count / median
                bits = float(name.split()[1]) if "maqd" in name else bits_of(name)
                if bits:
                    row["bytes_per_second"] = rows * columns * bits / 8 / median
                found.append(row)
                print(f"{rows:>6}x{columns:<6}{count:>4}  {name:34}{median * 1e6:>12.1f} us "
                      f"{row['to_bf16']:>8.2f}x bf16 "
                      f"{row.get('bytes_per_second', 0) / 1e9:>7.1f} GB/s")  # fmt: skip
    print(f"reads {bandwidth / 1e9:.1f} GB/s, multiplies {compute / 1e9:.0f} G/s")
    for name, why in missing.items():
        print(f"missing: {name}, {why}")
    found.append({"name": "ceilings", "threads": threads, "bytes_per_second": bandwidth,
                  "operations_per_second": 2 * compute, "missing": missing})  # fmt: skip
    return found
