"""Compare models, float or quantized, on the same text: perplexity, size and speed.

    python scripts/evaluate_model.py --model smollm2-135m-instruct ./my-packed-model
    python scripts/evaluate_model.py --model A B --dataset Salesforce/wikitext \
        --dataset_config_name wikitext-2-raw-v1 --max_windows 24 --output results.json
    python scripts/evaluate_model.py --task classification --model ./my-encoder \
        --dataset sst2.parquet --text_column text --label_column label

A model is an id on the Hub, a folder, or the name of a model inside a package
(`maqd_hf.data.bundled`). All models see the same windows, one after the other in one process; the
ratio is to the first one.
`evaluate.load(maqd_hf.metrics.path("token_perplexity"))` gives the same perplexity in Python.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import evaluate
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
)

import maqd_hf  # registers the quantized models with transformers
import maqd_hf.metrics
from maqd_hf.convert.size import model_size
from maqd_hf.data.bundled import resolve_model
from maqd_hf.data.text import EMBEDDED, load_labeled, load_text
from maqd_hf.evaluation.classification import classify
from maqd_hf.evaluation.perplexity import text_perplexity
from maqd_hf.evaluation.versions import package_versions

MIB = 2**20
JOINS = {"blank_line": "\n\n", "newline": "\n", "nothing": "", "separate": None}


@dataclass
class Arguments:
    """Command line."""

    model: list[str] = field(metadata={"help": "Ids, folders or embedded models, compared."})
    task: Literal["perplexity", "classification"] = "perplexity"
    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer for all models; default: each its own."}
    )
    dataset: str = field(
        default=EMBEDDED, metadata={"help": "'embedded', a file, a folder or a Hub id."}
    )
    dataset_config_name: str | None = None
    dataset_split: str = "test"
    text_column: str | None = field(default=None, metadata={"help": "Default: the obvious one."})
    label_column: str = "label"
    window: int = field(default=512, metadata={"help": "Positions per window, or per text."})
    stride: int | None = field(default=None, metadata={"help": "Default: window (disjoint)."})
    max_windows: int | None = field(default=None, metadata={"help": "Default: the whole text."})
    max_texts: int | None = field(default=None, metadata={"help": "Classify only the first."})
    join: Literal["blank_line", "newline", "nothing", "separate"] = field(
        default="blank_line",
        metadata={"help": "Between texts; 'separate': no window crosses from text to text."},
    )
    add_bos: bool | None = field(
        default=None, metadata={"help": "true or false; default: as the tokenizer does."}
    )
    batch_size: int = 1
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = field(default=None, metadata={"help": "Default: a GPU if there is one."})
    output: str | None = field(default=None, metadata={"help": "Write the results as JSON here."})


def perplexity(args: Arguments, model: Any, tokenizer: Any) -> dict[str, Any]:
    """The perplexity of a causal LM on the text, with all that was measured beside it."""
    texts = load_text(
        args.dataset,
        split=args.dataset_split,
        column=args.text_column,
        config_name=args.dataset_config_name,
    )
    result = text_perplexity(
        model,
        tokenizer,
        (row["text"] for row in texts),
        args.window,
        args.stride,
        join=JOINS[args.join],
        add_bos=args.add_bos,
        batch_size=args.batch_size,
        max_windows=args.max_windows,
        progress=True,
    )
    derived = {
        "perplexity": result.perplexity,
        "tokens_per_second": result.tokens_per_second,
    }
    return derived | asdict(result)


def accuracy(args: Arguments, model: Any, tokenizer: Any) -> dict[str, Any]:
    """The accuracy of a classifier on the labeled texts, with its speed."""
    data = load_labeled(
        args.dataset,
        split=args.dataset_split,
        text_column=args.text_column,
        label_column=args.label_column,
        config_name=args.dataset_config_name,
    )
    data = data.select(range(min(len(data), args.max_texts or len(data))))
    found = classify(
        model,
        tokenizer,
        data["text"],
        max_length=args.window,
        batch_size=args.batch_size,
        progress=True,
    )
    metric = evaluate.load(maqd_hf.metrics.path("accuracy"))
    return metric.compute(predictions=found.classes, references=data["label"]) | {
        "texts": len(data),
        "tokens": found.tokens,
        "seconds": found.seconds,
        "tokens_per_second": found.tokens_per_second,
        "protocol": f"share of {len(data)} texts with the right class, each cut at "
        f"{args.window} tokens.",
    }


TASKS = {
    "perplexity": (AutoModelForCausalLM, perplexity),
    "classification": (AutoModelForSequenceClassification, accuracy),
}


def evaluate_one(args: Arguments, name: str, device: str) -> tuple[dict[str, Any], Any]:
    """The measurements of one model, and its vocabulary: models with another do not compare."""
    auto_class, measure = TASKS[args.task]
    folder = resolve_model(name)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(args.tokenizer or name))
    model = auto_class.from_pretrained(folder, dtype=args.dtype).to(device)
    size = model_size(model)
    row = {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        **measure(args, model, tokenizer),
        "bits_per_weight": size.bits_per_weight,
        "file_bytes": size.file_bytes,
    }
    return row, tokenizer.get_vocab()


def print_table(rows: list[dict[str, Any]], score: str) -> None:
    """Print one line for each model; the ratio is to the first."""
    header = ("model", score, "ratio", "bits/weight", "MiB", "tokens/s")
    lines = [
        (
            row["model"],
            f"{row[score]:.4g}" if row[score] >= 1e4 else f"{row[score]:.4f}",
            f"{row['ratio_to_first']:.4f}",
            f"{row['bits_per_weight']:.3f}",
            f"{row['file_bytes'] / MIB:.2f}",
            f"{row['tokens_per_second']:.1f}",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    for line in (header, *lines):
        first, *rest = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join([line[0].ljust(len(first)), *rest]))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure all models, print the table and return the report."""
    parser = HfArgumentParser(Arguments, description=__doc__)  # type: ignore[arg-type]
    (args,) = parser.parse_args_into_dataclasses(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    score = "accuracy" if args.task == "classification" else "perplexity"
    rows: list[dict[str, Any]] = []
    first_vocabulary = None
    for name in args.model:
        row, vocabulary = evaluate_one(args, name, device)
        first_vocabulary = first_vocabulary or vocabulary
        row["same_tokenizer_as_first"] = vocabulary == first_vocabulary
        first = (rows or [row])[0][score]
        row["ratio_to_first"] = row[score] / first if first else float("nan")
        rows.append(row)
    print_table(rows, score)
    print(rows[0]["protocol"])
    if score == "perplexity" and not all(row["same_tokenizer_as_first"] for row in rows):
        print("The tokenizers differ: compare bits_per_byte (in --output), not perplexity.")
    report = {
        "arguments": asdict(args),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
        "results": rows,
    }
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


if __name__ == "__main__":
    main()
