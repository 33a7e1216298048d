"""The packed product on a GPU: checked first, then timed beside what else could run it.

    python -m scripts.bench.gpu --output results/gpu.json
    python -m scripts.bench.gpu --tiles      # also other block sizes than maqd_hf.kernels.gpu's

First the kernels are held against the torch reference on the GPU: a wrong one ends the run. Then
microseconds a matrix at 1, 8 and 512 tokens, twice: `graph`, the GPU's own time in a CUDA graph
(null where a rival cannot be captured), and `eager`, one call after the other from Python. Every
competitor has copies of its weight that together exceed the L2 cache twice over (64 at most), and
all take turns. Rivals: torch in bfloat16, torchao's int4 and bitsandbytes' nf4; one that is missing
or fails is named. Without a GPU, or without Triton, the command says so and exits with 1.
"""

import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import HfArgumentParser

from maqd_hf import kernels
from maqd_hf.evaluation.versions import package_versions
from maqd_hf.functional import quantize
from maqd_hf.kernels import GpuWeight, gpu
from maqd_hf.nn import LinearSpec, MaQDLinear, PackedLinear

DEVICE = torch.device("cuda", 0)
# (rows, columns): SmolLM2-135M's attention, key/value, up, down and head; then 4096-wide models'
SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576)]
SHAPES += [(4096, 4096), (11008, 4096), (4096, 11008)]
FEW_TILES = list(product([16], [16, 32, 64], [32, 64, 128], [2, 4], [3, 5]))
MANY_TILES = list(product([64, 128], [64, 128], [32], [4, 8], [3, 4]))


@dataclass
class Arguments:
    """Command line."""

    tokens: list[int] = field(default_factory=lambda: [1, 8, 512])
    rounds: int = field(default=20, metadata={"help": "Turns that every competitor takes."})
    tiles: bool = field(default=False, metadata={"help": "Also time other block sizes."})
    output: str | None = None


def gpu_weight(layer: PackedLinear) -> GpuWeight:
    """The weight of a layer on a GPU as the kernel reads it."""
    return cast(GpuWeight, layer.native_weight())


@torch.no_grad()
def check() -> int:
    """The number of cases that agree with the torch reference.

    Codes of activations have to agree exactly, outputs up to the rounding of their type;
    ``SystemExit`` names the first case that does not.
    """
    torch.manual_seed(0)
    limits = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
    shapes = ((67, 21, None), (576, 192, 64), (512, 80, 128), (4096, 256, None))
    levels = (2, 3, 4, 7, 16, 255, 256)
    cases = list(product(levels, (None, 16, 255), limits, (1, 5, 40, 300), shapes))
    for m, activations, dtype, tokens, (columns, rows, group_size) in cases:
        spec = LinearSpec(m, activations, "token", group_size=group_size)
        trained = MaQDLinear.from_linear(nn.Linear(columns, rows), spec, start="range")
        layer = PackedLinear.from_qat(trained).to(DEVICE)
        x = torch.randn(tokens, columns, device=DEVICE).to(dtype)
        name = f"{spec}, {dtype}, {tokens} tokens, {rows} x {columns}"
        if not kernels.native_serves(x, layer.weight, m, layer.weight_scale.shape[1]):
            raise SystemExit(f"not served by the GPU kernel: {name}")
        got = layer(x).float()
        os.environ["MAQD_KERNEL"] = "reference"
        expected = layer(x.float())
        del os.environ["MAQD_KERNEL"]
        error = float((got - expected).norm() / expected.norm().clamp(min=1e-3))
        if not error < limits[dtype]:
            raise SystemExit(f"wrong by {error:.1e}: {name}")
        if activations:
            codes, step, _ = gpu_weight(layer).quantize(x, torch.zeros(1, device=DEVICE))
            wanted = quantize(x.float(), activations, step[:, None]).int() - activations // 2
            if not torch.equal(codes[:, :columns].int(), wanted):
                raise SystemExit(f"other activation codes: {name}")
    return len(cases)


def packed(rows: int, columns: int, levels: int, spec: LinearSpec) -> PackedLinear:
    """A layer of random codes: every word is valid where M is 4, 16 or 256."""
    spec = replace(spec, weight_levels=levels)
    layer = PackedLinear(columns, rows, False, spec, device=DEVICE)
    layer.weight.random_(-(2**31), 2**31 - 1)
    for tensor in (layer.weight_scale, layer.weight_offset, layer.activation_step):
        if tensor is not None:
            tensor.uniform_(0.01, 0.02)
    return layer


def torchao_int4(rows: int, columns: int) -> nn.Module:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layer = nn.Sequential(torch_bf16(rows, columns))
    quantize_(layer, Int4WeightOnlyConfig(group_size=64, int4_packing_format="tile_packed_to_4d"))
    return layer


def bitsandbytes_nf4(rows: int, columns: int) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    layer: nn.Module = Linear4bit(columns, rows, False, torch.bfloat16, quant_type="nf4")
    return layer.to(DEVICE)


def torch_bf16(rows: int, columns: int) -> nn.Module:
    return nn.Linear(columns, rows, bias=False, device=DEVICE, dtype=torch.bfloat16)


A8, STATIC = LinearSpec(activation_scaling="token"), LinearSpec(activation_scaling="static")
GROUPS = LinearSpec(activation_scaling="token", group_size=64)
A16 = LinearSpec(activation_levels=None)
# bits a weight, which decide the number of copies, and how to make one layer
MAKERS: dict[str, tuple[float, Callable[[int, int], nn.Module]]] = {
    "torch bf16": (16, torch_bf16),
    "maqd W2 A8": (2, partial(packed, levels=4, spec=A8)),
    "maqd W2 A8, groups of 64": (2, partial(packed, levels=4, spec=GROUPS)),
    "maqd W4 A8": (4, partial(packed, levels=16, spec=A8)),
    "maqd W4 A8, static steps": (4, partial(packed, levels=16, spec=STATIC)),
    "maqd W4 A8, groups of 64": (4, partial(packed, levels=16, spec=GROUPS)),
    "maqd W8 A8": (8, partial(packed, levels=256, spec=A8)),
    "maqd W2 A16": (2, partial(packed, levels=4, spec=A16)),
    "maqd W4 A16": (4, partial(packed, levels=16, spec=A16)),
    "torchao int4, groups of 64": (4, torchao_int4),
    "bitsandbytes nf4": (4, bitsandbytes_nf4),
}


def passes(layers: Sequence[Callable[[Tensor], Any]], x: Tensor) -> None:
    """Call every layer once."""
    for layer in layers:
        layer(x)


def captured(work: Callable[[], None]) -> Callable[[], None] | None:
    """``work`` as a CUDA graph; None where it cannot be captured."""
    work()  # what is compiled at a first call is compiled now
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def take_turns(
    works: Mapping[str, Callable[[], None]], calls: dict[str, int], rounds: int
) -> dict[str, float]:
    """The median microseconds of one of the ``calls`` that each work makes."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            if turn:
                found[name].append(begin.elapsed_time(end) * 1000 / calls[name])
    return {name: statistics.median(times) for name, times in found.items()}


@torch.no_grad()
def matrix(rows: int, columns: int, args: Arguments) -> Iterator[dict[str, Any]]:
    """One row of the table for each number of tokens."""
    cache = getattr(torch.cuda.get_device_properties(DEVICE), "L2_cache_size", 64 << 20)
    layers: dict[str, list[nn.Module]] = {}
    failed = {}
    for name, (bits, make) in MAKERS.items():
        copies = min(64, int(2 * cache // (rows * columns * bits / 8)) + 1)
        try:
            layers[name] = [make(rows, columns) for _ in range(copies)]
            layers[name][0](torch.ones(1, columns, device=DEVICE, dtype=torch.bfloat16))
        except Exception as problem:  # a rival that is missing or another version: named
            if name.startswith(("maqd", "torch bf16")):
                raise
            layers.pop(name, None)
            failed[name] = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
    calls = {name: len(copies) for name, copies in layers.items()}
    for tokens in args.tokens:
        x = torch.randn(tokens, columns, device=DEVICE, dtype=torch.bfloat16)
        eager = {name: partial(passes, copies, x) for name, copies in layers.items()}
        graphs = {name: captured(work) for name, work in eager.items()}
        kept = {name: work for name, work in graphs.items() if work}
        graph_times = take_turns(kept, calls, args.rounds)
        eager_times = take_turns(eager, calls, max(3, args.rounds // 4))
        row: dict[str, Any] = {"rows": rows, "columns": columns, "tokens": tokens, "copies": calls}
        row["microseconds"] = {
            name: {"graph": graph_times.get(name), "eager": eager_times[name]} for name in layers
        }
        if args.tiles:
            names = ("maqd W2 A8", "maqd W4 A8", "maqd W4 A16")
            row["tiles"] = {name: other_tiles(layers[name], x, args.rounds) for name in names}
        yield row | {"failed": failed}


def other_tiles(layers: list[nn.Module], x: Tensor, rounds: int) -> dict[str, float]:
    """The microseconds of the five best block sizes for these layers and tokens."""
    works = {}
    step = cast(PackedLinear, layers[0])._native_step(x)
    for sizes in FEW_TILES if len(x) <= 16 else MANY_TILES:
        calls = [
            partial(gpu_weight(cast(PackedLinear, layer)), step=step, tiles=gpu.Tiles(*sizes))
            for layer in layers
        ]
        works[str(sizes)] = captured(partial(passes, calls, x))
    kept = {sizes: work for sizes, work in works.items() if work}
    times = take_turns(kept, dict.fromkeys(kept, len(layers)), max(3, rounds // 4))
    return dict(sorted(times.items(), key=lambda item: item[1])[:5])


def main(argv: Sequence[str] | None = None) -> int:
    parser = HfArgumentParser(Arguments, description=__doc__)  # type: ignore[arg-type]
    (args,) = parser.parse_args_into_dataclasses(argv)
    if problem := gpu.missing(DEVICE):
        print(f"no GPU to measure: {problem}", file=sys.stderr)
        return 1
    os.environ.pop("MAQD_KERNEL", None)
    packages = [name for name in ("triton", "torchao", "bitsandbytes") if find_spec(name)]
    report: dict[str, Any] = {
        "arguments": asdict(args),
        "device": torch.cuda.get_device_name(DEVICE),
        "versions": package_versions() | {name: version(name) for name in packages},
        "checked": check(),
        "matrices": [],
    }
    print(f"{report['device']}: {report['checked']} cases agree with the torch reference")
    for rows, columns in SHAPES:
        for row in matrix(rows, columns, args):
            report["matrices"].append(row)
            print(f"{rows} x {columns}, {row['tokens']} tokens: {row['microseconds']}", flush=True)
            if args.output:
                Path(args.output).write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
