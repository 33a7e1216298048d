"""The zero-shot accuracy on ARC-easy, PIQA and LAMBADA, scored as lm-evaluation-harness does.

    python -m scripts.bench.zero_shot --data-dir data \\
        --model smollm2-135m-instruct runs/packed-model
    python -m scripts.bench.zero_shot --data-dir data --questions 0 --peer "HQQ:4"

A choice's score is the sum of log p of its tokens after the prompt "Question: ... Answer:";
``acc`` takes the largest sum, ``acc_norm`` the largest sum divided by the choice's bytes. LAMBADA
counts a last word right when every token of it is the likeliest one. The first ``--questions`` of
each set are asked (0: all), the same ones for every model; the standard error is in the file.
``--peer`` quantizes the first model by a package of `quality_peers`, ``NAME:BITS``.

``--data-dir`` holds ``zeroshot/``: ``arc_easy_test``, ``piqa_validation`` (query, choices, label)
and ``lambada_openai_test`` (text), as parquet.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import maqd_hf  # noqa: F401  (registers the quantized models with transformers)
from maqd_hf.data.bundled import resolve_model
from maqd_hf.data.text import load_split, load_text, spread_samples, tokenize_blocks
from maqd_hf.evaluation.versions import package_versions
from maqd_hf.nn.modes import evaluating
from scripts.bench.quality_peers import quantize_peer

FILES = {"arc_easy": "arc_easy_test", "piqa": "piqa_validation", "lambada": "lambada_openai_test"}


@dataclass(frozen=True)
class Question:
    """A prompt and its possible continuations; ``answer`` is the index of the right one.

    ``sizes``: bytes of each choice as the set has it, without the space before it.
    """

    prompt: str
    continuations: list[str]
    sizes: list[int]
    answer: int


def multiple_choice(query: str, choices: list[str], label: int) -> Question:
    """A question of ARC or PIQA, whose right choice is number ``label``.

    >>> multiple_choice("Ice is", ["hot.", "cold."], 1)
    Question(prompt='Question: Ice is\\nAnswer:', continuations=[' hot.', ' cold.'], \
sizes=[4, 5], answer=1)
    """
    sizes = [len(choice.encode()) for choice in choices]
    continuations = [f" {choice}" for choice in choices]
    return Question(f"Question: {query}\nAnswer:", continuations, sizes, label)


def last_word(text: str) -> Question:
    """A question of LAMBADA: the last word of ``text``.

    >>> last_word("He was very tall")
    Question(prompt='He was very', continuations=[' tall'], sizes=[4], answer=0)
    """
    prompt, _, word = text.rpartition(" ")
    return Question(prompt, [f" {word}"], [len(word.encode())], 0)


def encode(tokenizer: Any, prompt: str, continuation: str) -> tuple[list[int], int]:
    """The ids of both together, and how many of them belong to the continuation.

    They are split where the prompt alone ends: a token that merges across that point belongs to the
    continuation.
    """
    whole = tokenizer(prompt + continuation).input_ids
    return whole, len(whole) - len(tokenizer(prompt).input_ids)


@dataclass(frozen=True)
class Score:
    """The score of one continuation.

    It has the sum of log p of the tokens, and whether each token was the likeliest.
    """

    log_likelihood: float
    greedy: bool


@torch.no_grad()
def score(model: nn.Module, tokenizer: Any, question: Question) -> list[Score]:
    """The scores of a question's continuations, run in one batch padded on the right."""
    pairs = [encode(tokenizer, question.prompt, text) for text in question.continuations]
    device = next(model.parameters()).device
    longest = max(len(ids) for ids, _ in pairs)
    ids = torch.zeros(len(pairs), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (tokens, _) in enumerate(pairs):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
    found = []
    for row, (tokens, count) in enumerate(pairs):
        end = len(tokens)
        log_p = logits[row, end - count - 1 : end - 1].float().log_softmax(-1).cpu()
        target = ids[row, end - count : end]
        total = log_p.gather(1, target[:, None]).sum(dtype=torch.float64)
        found.append(Score(float(total), bool((log_p.argmax(-1) == target).all())))
    return found


def outcome(question: Question, scores: list[Score]) -> dict[str, bool]:
    """Whether the answer is right, by each measure: acc, and acc_norm where there is a choice."""
    if len(scores) == 1:
        return {"acc": scores[0].greedy}
    sums = [s.log_likelihood for s in scores]
    normed = [s / size for s, size in zip(sums, question.sizes, strict=True)]
    return {
        "acc": sums.index(max(sums)) == question.answer,
        "acc_norm": normed.index(max(normed)) == question.answer,
    }


def accuracy(model: nn.Module, tokenizer: Any, questions: list[Question]) -> dict[str, Any]:
    """The share of right answers, its standard error, and the number of questions."""
    right: dict[str, int] = {}
    with evaluating(model):
        for question in tqdm(questions, leave=False):
            for name, correct in outcome(question, score(model, tokenizer, question)).items():
                right[name] = right.get(name, 0) + correct
    count = len(questions)
    found: dict[str, Any] = {"questions": count}
    for name, hits in right.items():
        share = hits / count
        found[name] = share
        found[f"{name}_stderr"] = math.sqrt(share * (1 - share) / max(count - 1, 1))
    return found


def load_questions(data_dir: Path, task: str, count: int) -> list[Question]:
    """The first ``count`` questions of a set (0: all)."""
    rows: Any = load_split(str(data_dir / "zeroshot" / f"{FILES[task]}.parquet"))
    rows = islice(rows, count or None)
    if task == "lambada":
        return [last_word(row["text"]) for row in rows]
    return [multiple_choice(row["query"], row["choices"], row["label"]) for row in rows]


@dataclass
class Arguments:
    """Command line."""

    data_dir: Path = field(metadata={"help": "Folder with zeroshot/, see above."})
    model: list[str] = field(
        default_factory=lambda: ["smollm2-135m-instruct"],
        metadata={"help": "Ids, folders or embedded models."},
    )
    peer: list[str] = field(default_factory=list, metadata={"help": "NAME:BITS, see above."})
    task: list[str] = field(default_factory=lambda: list(FILES), metadata={"help": "The sets."})
    questions: int = field(default=200, metadata={"help": "Questions of each set; 0: all."})
    results: Path = field(
        default=Path("results/zero_shot.json"),
        metadata={"help": "JSON; answers it already holds are not repeated."},
    )


def load_model(source: str, args: Arguments) -> tuple[Any, Any]:
    """The model and tokenizer behind a name of ``--model`` or ``--peer``."""
    folder = resolve_model(args.model[0] if source in args.peer else source)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    if source in args.peer:
        peer, _, bits = source.rpartition(":")
        text = args.data_dir / "wiki-sample" / "enwiki-2016-105-articles.parquet"
        blocks = tokenize_blocks(load_text(str(text), column="text"), tokenizer, 256)
        quantize_peer(peer, model.float(), int(bits), 64, spread_samples(blocks, 32), folder)
    return model, tokenizer


def main(args: Arguments) -> dict[str, Any]:
    """Ask what the results file does not hold yet; returns its content."""
    stored = json.loads(args.results.read_text("utf-8")) if args.results.exists() else {}
    runs: list[dict[str, Any]] = stored.get("runs", [])
    content = {"versions": package_versions(), "runs": runs}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    for source in [*args.model, *args.peer]:
        loaded: tuple[Any, Any] | None = None
        for task in args.task:
            questions = load_questions(args.data_dir, task, args.questions)
            name = source if source in args.peer else Path(source).name
            key = {"model": name, "task": task, "questions": len(questions)}
            if any(key.items() <= run.items() for run in runs):
                continue
            loaded = loaded or load_model(source, args)
            runs.append({**key, **accuracy(*loaded, questions)})
            args.results.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
            print(runs[-1], flush=True)
    return content


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    main(parsed)
