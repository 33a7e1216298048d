"""Tables of speed and memory."""

from __future__ import annotations

from typing import Any

from maqd_hf.evaluation.model_card import markdown_table
from scripts.bench.report.targets import aims, load_ratio, speed_targets

HEADERS = {
    "prefill": "prefill of {}, tokens a second",
    "continue": "next token after {}, ms",
    "score": "all logits of {}, tokens a second",
}
AIMS = "Ratios that were aimed at (`scripts/bench/report/targets.py`):"


def speed(result: dict[str, Any]) -> str:
    """Packed models and matrices beside what else could run them."""
    tables = []
    if result["missing_rivals"]:
        tables.append(f"Rivals not installed in this run: {', '.join(result['missing_rivals'])}.")
    running = [row for key in ("models", "busy", "large") for row in result.get(key, [])]
    tables += [*models(running), *machine(result), *compiled_decoding(result), *loading(result)]
    tables += [*agreement(result), *ceilings(result), *matrices(result)]
    return "\n\n".join([*tables, aims(speed_targets(result), AIMS)])


def speed_elsewhere(result: dict[str, Any]) -> str:
    """What was aimed at, on another machine."""
    return "\n\n".join([*machine(result), aims(speed_targets(result), AIMS)])


def speed_of_models(result: dict[str, Any]) -> str:
    """Whole models and matrices, on another machine."""
    tables = [*machine(result), *models(result.get("models", [])), *lengths(result)]
    tables += [*ceilings(result), *matrices(result)]
    return "\n\n".join([*tables, aims(speed_targets(result), AIMS)])


def machine(result: dict[str, Any]) -> list[str]:
    """What our kernels and llama.cpp's ran on."""
    build = ", ".join(result.get("llama_cpp_build", []))
    ours = result["kernels"]["linear"].removeprefix("native, ")
    return [f"Kernels: {ours}." + f" llama.cpp was built with {build}." * bool(build)]


def models(running: list[dict[str, Any]]) -> list[str]:
    """A table for every model, number of threads and of busy processes beside them."""
    tables = []
    for label, threads, busy in dict.fromkeys(
        (row["model"], row["threads"], row["busy"]) for row in running
    ):
        key = {"model": label, "threads": threads, "busy": busy}
        rows = [
            (
                row["name"],
                f"{row['tokens_per_second']:.0f}",
                f"{row['to_bf16']:.2f}x" if "to_bf16" in row else "",
                f"{row['batch_tokens_per_second']:.0f}" if "batch_tokens_per_second" in row else "",
                f"{row['prefill_tokens_per_second']:.0f}",
                f"{1000 * row['first_token_seconds']:.0f} ms",
                f"{row['load_seconds']:.1f} s",
                f"{row['peak_bytes'] / 2**20:.0f} MiB",
            )
            for row in running
            if key.items() <= row.items()
        ]
        header = (
            "", "tokens a second", "to bf16", "eight streams", "prefill, tokens a second",
            "first token after 16", "load", "memory above the framework's",
        )  # fmt: skip
        beside = f", beside {busy} processes that compute" if busy else ""
        text = f"`{label}`, one stream, {threads} thread(s){beside}."
        tables.append(f"{text}\n\n{markdown_table(header, rows)}")
    return tables


def lengths(result: dict[str, Any]) -> list[str]:
    """Prefills by length, the next token after them, and the logits of all tokens."""
    rows = result.get("lengths", [])
    if not rows:
        return []
    orders = list(dict.fromkeys(order for row in rows for order in row["seconds"]))
    header, cells = [""], [[row["name"]] for row in rows]
    for order in orders:
        kind, tokens = order.split()
        header.append(HEADERS[kind].format(f"{int(tokens):,}"))
        for row, line in zip(rows, cells, strict=True):
            seconds = row["seconds"].get(order)
            rate = seconds and (f"{1e3 * seconds:.1f}" if kind == "continue" else None)
            line.append(rate or (f"{int(tokens) / seconds:.0f}" if seconds else ""))
    text = f"One stream by its length, {rows[0]['threads']} thread(s)."
    return [f"{text}\n\n{markdown_table(header, cells)}"]


def matrices(result: dict[str, Any]) -> list[str]:
    """One product in every way, a table for every number of tokens."""
    tables = []
    measured = [row for row in result.get("matrices", []) if "seconds" in row]
    for tokens in dict.fromkeys(row["tokens"] for row in measured):
        chosen = [row for row in measured if row["tokens"] == tokens]
        shapes = list(dict.fromkeys((row["rows"], row["columns"]) for row in chosen))
        cells = {(row["name"], (row["rows"], row["columns"])): row["seconds"] for row in chosen}
        rows = [
            (name, *(f"{1e6 * cells[name, s]:,.0f}" if (name, s) in cells else "" for s in shapes))
            for name in dict.fromkeys(row["name"] for row in chosen)
        ]
        text = f"One matrix, {tokens} token(s), {chosen[0]['threads']} threads, microseconds."
        tables.append(f"{text}\n\n{markdown_table(['', *(f'{a} x {b}' for a, b in shapes)], rows)}")
    return tables


def agreement(result: dict[str, Any]) -> list[str]:
    """How often the native decode step writes what the model's own forward writes."""
    lines = []
    for row in result.get("agreement", []):
        levels = row["activation_levels"]
        kind = f"{levels} activation levels" if levels else "float activations"
        gaps = sorted(row["gaps"])
        middle = gaps[len(gaps) // 2] if gaps else 0
        parted = f"; median gap of the two best logits where others part: {middle:.2g}"
        lines.append(
            f"Greedy text of the native decode step and of the model's own forward, "
            f"{kind}: {row['equal']} of {row['prompts']} prompts give the same "
            f"{row['new_tokens']} tokens"
            f"{parted if gaps else ''}."
        )
    return lines


def compiled_decoding(result: dict[str, Any]) -> list[str]:
    """Decoding under torch.compile."""
    rows = [
        (row["name"], f"{1e3 * row['token_seconds']:.1f}", f"{row['to_bf16']:.2f}x")
        for row in result.get("compiled", [])
    ]
    if not rows:
        return []
    threads = result["compiled"][0]["threads"]
    text = f"`torch.compile(fullgraph=True)`, static cache, {threads} threads."
    return [f"{text}\n\n{markdown_table(['', 'ms a token', 'to bf16'], rows)}"]


def loading(result: dict[str, Any]) -> list[str]:
    """What loading costs beside reading the same bytes and importing the framework."""
    if "import_seconds" not in result:
        return []
    row = next(row for row in result["models"] if row["name"] == "maqd 2 bit, 8-bit head")
    return [
        f"Importing torch and transformers takes {result['import_seconds']:.1f} s, reading the "
        f"{row['file_bytes'] / 2**20:.0f} MiB of the 2-bit model {row['read_seconds']:.2f} s, "
        f"loading it {row['load_seconds']:.2f} s: "
        f"{load_ratio(row, result['import_seconds']):.2f} times both."
    ]


def ceilings(result: dict[str, Any]) -> list[str]:
    """The machine's bandwidth and arithmetic, and how near one token and many come to them."""
    rows = result.get("matrices", [])
    found = next((row for row in rows if row["name"] == "ceilings"), None)
    if not found:
        return []
    large = [row for row in rows if row.get("rows") == 11008 and row["tokens"] == 1]
    shares = []
    for row in large:
        if row["name"].startswith("maqd") and "groups" not in row["name"]:
            share = row["bytes_per_second"] / found["bytes_per_second"]
            shares.append(f"{row['name'].removeprefix('maqd ')} {share:.0%}")
    absent = "; ".join(f"{name} ({why})" for name, why in found.get("missing", {}).items())
    return [
        f"In the same run {found['threads']} threads read memory at "
        f"{found['bytes_per_second'] / 1e9:.0f} GB/s and multiply 8-bit numbers at "
        f"{found['operations_per_second'] / 2e9:.0f} billion a second. One token at 11008 x 4096 "
        f"uses of that bandwidth (above 100 %: weights stay in the cache): {', '.join(shares)}."
        f"{' Not timed: ' * bool(absent)}{absent}"
    ]
