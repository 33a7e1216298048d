"""What this package is meant to reach, and what the files in results/ say of it.

`speed_targets` reads what ``scripts.bench.speed`` wrote (every target is a ratio of two figures of
the same run), `quality_targets` what ``scripts.bench.quality`` wrote, `encoder_targets` what
``scripts/qat_encoder.py`` wrote, `batch_size_targets` what ``scripts.experiments.lbn_batch_size``
wrote and `static_norm_targets` what ``scripts.experiments.lbn_pretrained`` wrote. A target that was
missed is shown with what limits it, as far as we know; one whose competitor is missing is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from maqd_hf.evaluation.model_card import markdown_table

# What these reasons rest on, by hand (Zen 4, 2 cores, one day): 2048 x 2048 at 2 bits takes 23 us,
# of which the call 5; 4096 x 4096 runs at 98 % of the byte dot product's rate on one thread. A
# token's native step takes 2.35 ms on one thread and 1.7 on two, its 54 MiB at the bandwidth
# measured 1.6, `generate()` outside 0.7. On another day, when memory was slow, the step took 2.9 ms
# on either. Of a prefill on one thread, products are 61 % and attention 24 % (`perf`, that day).
# Xeon with AMX, 2 cores: matrices from 4096 x 4096 on are read at 33 GB/s in every storage, more
# than memory gives; of a prefill on one thread products are 39 % and attention 39 %.
_CALL = (
    "larger matrices run at the rate of the machine's byte dot product, or of the cache that all "
    "cores share; at 2048 x 2048 the call from Python and waking the second thread show"
)
_PEAK = (
    "bytes are multiplied at the rate the machine has for them, at most twice that for bfloat16, "
    "and inputs and results are float32"
)
_PREFILL = (
    "most of the time goes to products at the rate of the byte dot product and to attention "
    "at that of float32"
)
_DECODE = (
    "codes and head of a token come from memory, which two threads read not twice as fast, and "
    "`generate()` adds its own Python"
)
_TRITS = (
    "five codes take as many products as ten of 2 bits, and products are what takes the time of "
    "one token; so ternary weights are kept in 2 bits, unless no cache holds their model"
)
_SHARE = "the threads wait for whichever the scheduler left behind a busy process"
_FORWARD = "the rest is transformers' own Python around the layers; the native step has none"
_GROWTH = (
    "keys and values come from memory at the rate it has, and a token without a past takes less "
    "than half of llama.cpp's time"
)
_LONGER = (
    "falls with the tokens, of which a million were allowed, and with those of the calibration"
)
_PICTURES = "the constants: pictures differ more than texts do"
_NOISE = "a point is the standard error of 2,000 texts, and seeds differ by more"
_POOLED = (
    "static norms bear less speed: of one size, at the fastest rate tried, which is the best for "
    "both; at the usual rate, and at other sizes, they are nearer or ahead"
)
_TRAINED = "falls with the training (`scripts/experiments/lbn_from_scratch.py`)"
_SHORT = "far too short: published removals of norms (`nn/norm.py`) train a thousand times as long"


@dataclass(frozen=True)
class Target:
    """``found`` should be at least ``wanted`` or, with ``most``, at most; both in ``unit``."""

    what: str
    wanted: float
    found: float
    limit: str = ""
    most: bool = False
    unit: str = "x"

    @property
    def met(self) -> bool:
        return self.found <= self.wanted if self.most else self.found >= self.wanted

    def cells(self) -> tuple[str, str, str, str]:
        """What, wanted, found, and whether that is enough."""
        sign = "at most" if self.most else "at least"
        verdict = "met" if self.met else f"missed: {self.limit}" if self.limit else "missed"
        digits = {"x": 2, " nats": 3}.get(self.unit, 1)
        return (
            self.what,
            f"{sign} {self.wanted:g}{self.unit}",
            f"{self.found:.{digits}f}{self.unit}",
            verdict,
        )


def aims(targets: Sequence[Target], text: str) -> str:
    """A table of what was aimed at beside what came out, under a line of ``text``."""
    rows = [target.cells() for target in targets]
    return f"{text}\n\n" + markdown_table(("", "aim", "found", ""), rows)


# --------------------------------------------------------------------------------------- speed


def _matrices(rows: list[dict[str, Any]]) -> Iterator[Target]:
    seconds = {(r["name"], r["rows"], r["tokens"]): r["seconds"] for r in rows if "rows" in r}
    large = sorted({count for _, count, _ in seconds if count >= 2048})
    for what, wanted, ours, rival, tokens, limit in (
        ("one token, 2 bit, to llama.cpp TQ2_0", 2.5, "2", "llama.cpp TQ2_0", 1, _CALL),
        ("one token, 2 bit, to torch bf16", 10, "2", "torch bf16", 1, _CALL),
        ("one token, 4 bit, to llama.cpp Q4_0", 1.2, "4", "llama.cpp Q4_0", 1, _CALL),
        ("one token, 1.6 bit, to 2 bit", 0.87, "1.6", "maqd 2 bit", 1, _TRITS),
        ("512 tokens, 2 bit, to torch bf16", 2, "2", "torch bf16", 512, _PEAK),
        ("512 tokens, 4 bit, to torch bf16", 2, "4", "torch bf16", 512, _PEAK),
    ):
        pairs = [((rival, n, tokens), (f"maqd {ours} bit", n, tokens)) for n in large]
        ratios = [seconds[a] / seconds[b] for a, b in pairs if a in seconds and b in seconds]
        if ratios:
            yield Target(f"{what}, worst of {len(ratios)} matrices", wanted, min(ratios), limit)
    ceiling = next((r["bytes_per_second"] for r in rows if r["name"] == "ceilings"), None)
    single = [r for r in rows if r["name"] == "maqd 8 bit" and r["tokens"] == 1]
    if ceiling and single:
        largest = max(single, key=lambda r: r["rows"] * r["columns"])
        size = largest["rows"] * largest["columns"] / 2**20
        what = f"one token, 8 bit, {size:.0f} MiB of weights, to the bandwidth measured"
        yield Target(what, 0.8, largest["bytes_per_second"] / ceiling)


_TWO, _FOUR = "maqd 2 bit, 8-bit head", "maqd 4 bit, 8-bit head"
_GROUPS = "maqd 4 bit g64"
_OWN, _SMALL_HEAD = f"{_TWO}, the model's own forward", "maqd 2 bit, 4-bit head"


def _models(report: dict[str, Any], threads: int) -> Iterator[Target]:
    rows = {r["name"]: r for r in report["models"] if r["threads"] == threads}
    rivals = [row for name, row in rows.items() if name.startswith("llama.cpp")]
    busy = {r["name"]: r for r in report.get("busy", []) if r["threads"] == threads}
    tokens, prefill = "tokens_per_second", "prefill_tokens_per_second"
    best = {key: max((row[key] for row in rivals), default=None) for key in (tokens, prefill)}
    plain, q4 = (rows.get(name, {}).get(tokens) for name in ("transformers bf16", "llama.cpp Q4_0"))
    at = f"{threads} thread(s)"
    for what, wanted, name, key, rival, limit in (
        ("own forward, 2 bit, to bf16", 3, _OWN, tokens, plain, _FORWARD),
        ("decode, 2 bit, to the best llama.cpp", 2.5, _TWO, tokens, best[tokens], _DECODE),
        ("decode, 2 bit, 4-bit head, to the same", 2.5, _SMALL_HEAD, tokens, best[tokens], _DECODE),
        ("decode, 4 bit, to llama.cpp Q4_0", 1.6, _FOUR, tokens, q4, _DECODE),
        ("prefill, 2 bit, to the best llama.cpp", 3, _TWO, prefill, best[prefill], _PREFILL),
    ):
        if rival and name in rows:
            yield Target(f"{what}, {at}", wanted, rows[name][key] / rival, limit)
    if _TWO in busy and _TWO in rows:
        share = busy[_TWO][tokens] / rows[_TWO][tokens]
        yield Target(f"decode, 2 bit, beside busy processes, to alone, {at}", 0.3, share, _SHARE)


def _lengths(rows: list[dict[str, Any]]) -> Iterator[Target]:
    """What the table of lengths says of "maqd 4 bit g64", by ratios of seconds."""
    found = {row["name"]: row["seconds"] for row in rows}
    ours, own = found.pop(_GROUPS, {}), found.pop(f"{_GROUPS}, the model's own forward", {})
    eight = found.pop(f"{_GROUPS}, keys and values in 8 bits", {})
    plain = found.pop("transformers float32", {})
    for order, seconds in ours.items():
        kind, tokens = order.split()
        if kind != "continue" and order in own:
            yield Target(f"{order}, 4 bit, to the model's own forward", 1, own[order] / seconds)
        best = min((of[order] for of in found.values() if order in of), default=None)
        if kind == "prefill" and best and tokens in ("512", "8192"):
            wanted = 1.5 if tokens == "512" else 1.2
            yield Target(f"{order}, 4 bit, to the best llama.cpp", wanted, best / seconds, _PREFILL)
        if kind == "score" and order in plain and int(tokens) >= 512:
            yield Target(f"{order}, 4 bit, to float32", 1, plain[order] / seconds)
    short, long = "continue 16", "continue 8192"
    growths = [of[long] / of[short] for of in found.values() if long in of]
    for name, seconds in (("floats", ours), ("8 bits", eight)):
        if growths and long in seconds:
            grows = seconds[long] / seconds[short] / min(growths)
            what = f"growth of a token's time to 8,192 positions, cache in {name}, to llama.cpp's"
            yield Target(what, 1.3, grows, _GROWTH, most=True)


def load_ratio(row: dict[str, Any], import_seconds: float) -> float:
    """Importing the framework and loading a model, to importing it and reading the same bytes."""
    return float((import_seconds + row["load_seconds"]) / (import_seconds + row["read_seconds"]))


def _others(report: dict[str, Any]) -> Iterator[Target]:
    for row in report.get("compiled", [])[1:]:
        what = f"compiled decode, 2 bit, to bf16 compiled, {row['threads']} thread(s)"
        yield Target(what, 4, row["to_bf16"])
    found = next((r for r in report.get("models", []) if r["name"] == _TWO), None)
    if found:
        load = load_ratio(found, report["import_seconds"])
        yield Target("load, 2 bit, to reading the bytes and importing", 1.5, load, most=True)
        memory = found["peak_bytes"] / found["file_bytes"]
        yield Target("peak memory, 2 bit, to the packed file", 1.3, memory, most=True)
    large = next((r for r in report.get("large", []) if r["name"] == _TWO), None)
    if large:
        what = "memory of a random Llama of 1 B, 2 bit"
        yield Target(what, 1.2, large["peak_bytes"] / 1e9, most=True, unit=" GB")


def speed_targets(report: dict[str, Any]) -> list[Target]:
    """Those that the tables of ``report`` say something of: the JSON of ``scripts.bench.speed``."""
    found = list(_matrices(report.get("matrices", [])))
    for threads in sorted({row["threads"] for row in report.get("models", [])}):
        found += _models(report, threads)
    return [*found, *_lengths(report.get("lengths", [])), *_others(report)]


# ------------------------------------------------------------------------------------- quality

QUALITY_AIMS = {
    "MaQD M=16 a row, static": 5,
    "MaQD M=16 g64": 3,
    "MaQD M=8 g64": 12,
    "MaQD M=4 g64": 45,
    "MaQD M=3 g64": 70,
    "MaQD M=16 g64, 4-bit inputs g64": 15,
}
"""Rows of ``scripts.bench.quality``: at most so many per cent above the float perplexity."""


def headline(run: dict[str, Any]) -> bool:
    """Whether a run of ``scripts.bench.quality`` is a peer's, or of a row aimed at or its start."""
    return run["method"] != "MaQD" or run["name"].replace(" start", "") in QUALITY_AIMS


def quality_targets(runs: list[dict[str, Any]]) -> list[Target]:
    """Perplexity to float of the ``runs`` of table ``llm``, on the worse text, in per cent; of
    several runs of a row the best."""
    runs = [run for run in runs if run["table"] == "llm"]
    base: dict[str, Any] = next((run["texts"] for run in runs if run["method"] == "float"), {})
    found = []
    for name, wanted in QUALITY_AIMS.items():
        costs: dict[float, dict[str, Any]] = {}
        for run in (run for run in runs if run["name"] == name):
            ratios = [t["perplexity"] / base[n]["perplexity"] for n, t in run["texts"].items()]
            costs[100 * (max(ratios) - 1)] = run
        if costs:
            least = min(costs)
            best = costs[least]
            alike = (run for run in costs.values() if run["samples"] == best["samples"])
            longest = max(run["tokens"] for run in alike)
            what = f"{name}, {best['tokens']:,} tokens"
            limit = _LONGER if best["tokens"] == longest else f"{longest:,} tokens were no better"
            found.append(Target(what, wanted, least, limit, most=True, unit=" %"))
    return found


def encoder_targets(rows: list[dict[str, Any]]) -> list[Target]:
    """Accuracy lost to float with 8-bit inputs, in points."""
    found = []
    for row in rows:
        wanted = {16: 0.5, 4: 1.5}.get(row["weight_levels"])
        if wanted is not None and row["activation_levels"] == 255:
            lost = 100 * (row["accuracy"]["float"] - row["accuracy"]["packed"])
            what = f"{row['model']} on {row['dataset']}, M={row['weight_levels']}, accuracy lost"
            found.append(Target(what, wanted, lost, most=True, unit=" points"))
    return found


# ---------------------------------------------------------------------------------------- norms

_STATIC = {"lbn", "lbn, fixed end", "lbn, eased in", "static", "static, fixed end"}
"""Ways to train norms of which all, or all but one, are static."""


def at_best_rate(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of every family, norm and batch size at its best learning rate: that of the best
    mean over the seeds. A rate tried with fewer seeds than another does not count."""
    groups: dict[tuple[str, str, int], dict[float, list[dict[str, Any]]]] = {}
    for row in rows:
        group = groups.setdefault((row["family"], row["norm"], row["batch_size"]), {})
        group.setdefault(row["learning_rate"], []).append(row)

    def worth(tried: list[dict[str, Any]]) -> tuple[int, float]:
        return len(tried), mean(row.get("accuracy", -row["loss"]) for row in tried)

    return [row for group in groups.values() for row in max(group.values(), key=worth)]


def batch_size_targets(rows: list[dict[str, Any]]) -> list[Target]:
    """Static norms to float ones, of models trained from scratch: what is lost at the worst batch
    size, in points or nats, by the better way to train static norms. Means over the seeds; a way
    counts that was tried at every size and seed of the float norm."""
    found = []
    rows = at_best_rate(rows)
    for family in dict.fromkeys(row["family"] for row in rows):
        runs: dict[str, dict[tuple[int, int, int], float]] = {}
        points = False
        for row in (row for row in rows if row["family"] == family):
            points = "accuracy" in row
            key = row["batch_size"], row["seed"], row["samples"]
            runs.setdefault(row["norm"], {})[key] = (
                -100 * row["accuracy"] if points else row["loss"]
            )
        base = runs.get("float", {})
        sizes, seeds = {size for size, *_ in base}, {seed for _, seed, _ in base}
        lost: dict[str, float] = {}
        for way, run in runs.items():
            if way in _STATIC and base and base.keys() <= run.keys():
                worse = [[run[k] - base[k] for k in base if k[0] == size] for size in sizes]
                lost[way] = max(map(mean, worse))
        if lost:
            way = min(lost, key=lambda name: lost[name])
            what = f"{family} from scratch, `{way}` to float norms, worst of {len(sizes)} sizes"
            if len(seeds) > 1:
                what += f", mean of {len(seeds)} seeds"
            wanted, unit = (0.3, " points") if points else (0.01, " nats")
            limit = {"vit": _PICTURES, "llama": _POOLED, "bert": _NOISE}.get(family, "")
            found.append(Target(what, wanted, lost[way], limit, most=True, unit=unit))
    return found


def static_norm_targets(rows: list[dict[str, Any]]) -> list[Target]:
    """Loss of pretrained models with static norms over the same training without, nats."""
    found = []
    for base in (row for row in rows if row["norms"] == "per token"):
        same = [r for r in rows if all(r[k] == base[k] for k in ("model", "steps", "seed"))]
        whole = [row["loss"] for row in same if row["norms"] in _STATIC]
        where = f"{base['model']}, {base['steps']} steps"
        cases = [(f"all {base['gated']} norms static", min(whole))] if whole else []
        for row in (row for row in same if row["norms"] == "selected"):
            cases.append((f"{len(row['static'])} of {row['gated']} selected", row["loss"]))
        for case, loss in cases:
            what = f"{where}, {case}, to norms per token"
            lost = loss - base["loss"]
            limit = {"smollm2-135m-instruct": _SHORT}.get(base["model"], _TRAINED)
            found.append(Target(what, 0.03, lost, limit, most=True, unit=" nats"))
    return found
