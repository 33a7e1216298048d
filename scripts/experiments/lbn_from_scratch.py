"""The statistics that can be made static: the experiments behind ``maqd_hf.nn.norm``.

    python -m scripts.experiments.lbn_from_scratch  # embedded text, models from scratch
    python -m scripts.experiments.lbn_from_scratch --data-dir FOLDER  # and a pretrained model
    python -m scripts.experiments.lbn_from_scratch --table gpt2 --seeds 0 1 2

Every row trains one small model with unquantized weights and activations, so that only the norms
differ, and evaluates it twice: ``trained`` with the statistics it was trained with, ``static`` with
the running averages. Static statistics are free at inference; ``gap`` is what they cost. Results
go to a JSON file after every run, and runs found there are not repeated.

Frozen per-token statistics cost 0.70 nats, pooled ones 0.000 (notebook: "Which statistics can be
made static, from scratch").

``FOLDER`` holds ``text/tinyshakespeare.txt`` (bytes, models from scratch), ``models/stories260K``
and ``tinystories/`` (the pretrained Llama and its text).
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    get_cosine_schedule_with_warmup,
)

from maqd_hf import MaQDConfig, quantize_model
from maqd_hf.data.text import load_text, tokenize_blocks
from maqd_hf.functional import pooled_log_ms, token_log_ms
from maqd_hf.models.finding import gated_norms
from maqd_hf.nn import LayerBatchNorm
from maqd_hf.training.callbacks import GateSchedule

NEVER: dict[str, tuple[float, float]] = {}
AT_ONCE = {"*": (0.0, 0.0)}
FIRST_20_PERCENT = {"*": (0.0, 0.2)}
FIRST_40_PERCENT = {"*": (0.0, 0.4)}


# ---------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """One model to train.

    Args:
        table: "llama" and "gpt2" are trained from scratch, "pretrained" is converted.
        gates: glob pattern of norms -> fractions of the steps between which their gate opens;
            the last match wins, norms without a match keep their per-token statistics.
        source: open gates take "sample" statistics, pooled over the sample in the batch (LBN), or
            "running" ones, the average even in training, without a gradient.
        pooled_mean: LayerNorm only: subtract the sample's mean instead of each token's.
        spread_penalty: weight of the variance over tokens of log rms in the loss.
        config: other settings of ``MaQDConfig``.
    """

    table: Literal["llama", "gpt2", "pretrained"]
    name: str
    gates: dict[str, tuple[float, float]]
    source: Literal["sample", "running"] = "sample"
    pooled_mean: bool = False
    spread_penalty: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)


SHARED = {"lbn_final_norm": True, "first_token": "shared", "lbn_pooling": "mean"}
OWN = {"lbn_final_norm": True, "first_token": "own", "lbn_pooling": "geometric"}
ROWS = [
    Row("llama", "per token, then running average", NEVER, config=SHARED),
    Row("llama", "running average from the start", AT_ONCE, "running", config=SHARED),
    Row("llama", "per token annealed to running", FIRST_40_PERCENT, "running", config=SHARED),
    Row("llama", "LBN, mean", AT_ONCE, config=SHARED),
    Row("llama", "LBN, geometric", AT_ONCE, config=SHARED | {"lbn_pooling": "geometric"}),
    Row("llama", "LBN, geometric, first own", AT_ONCE, config=OWN),
    Row("llama", "LBN, mean, first own", AT_ONCE, config=SHARED | {"first_token": "own"}),
    Row("gpt2", "per token, then running average", NEVER, config=SHARED),
    Row("gpt2", "LBN, centered per token", AT_ONCE, config=SHARED),
    Row("gpt2", "LBN, mean pooled too", AT_ONCE, pooled_mean=True, config=SHARED),
    Row("gpt2", "LBN, geometric, first own", AT_ONCE, config=OWN),
    Row("pretrained", "plain fine-tuning", NEVER),
    Row("pretrained", "LBN, gate at once", AT_ONCE),
    Row("pretrained", "LBN, gate over 20 %", FIRST_20_PERCENT),
    Row("pretrained", "LBN, gate over 40 %", FIRST_40_PERCENT),
    Row("pretrained", "LBN, gate over 70 %", {"*": (0.0, 0.7)}),
    Row("pretrained", "40 %, every norm", FIRST_40_PERCENT, config=OWN),
    Row("pretrained", "40 %, mean", FIRST_40_PERCENT, config={"lbn_pooling": "mean"}),
    Row("pretrained", "40 %, first shared", FIRST_40_PERCENT, config={"first_token": "shared"}),
    Row("pretrained", "40 %, spread penalty 0.1", FIRST_40_PERCENT, spread_penalty=0.1),
    Row("pretrained", "40 %, attention norms only", {"*input_layernorm": (0.0, 0.4)}),
]


# ---------------------------------------------------------------------------------------- data


@dataclass
class Task:
    """A model to start from and tokens (blocks, block size) to train and evaluate on."""

    build: Callable[[], PreTrainedModel]
    train: Tensor
    evaluation: Tensor
    learning_rate: float
    batch_size: int


def byte_task(table: str, data_dir: Path | None, batch_size: int) -> Task:
    """A small model on bytes; every tenth block of 128 is kept for evaluation, 128 at most."""
    source = "embedded" if data_dir is None else str(data_dir / "text" / "tinyshakespeare.txt")
    text = "\n".join(load_text(source)["text"]).encode()[:4_000_000]
    blocks = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    blocks = blocks[: len(blocks) // 128 * 128].view(-1, 128)
    llama = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    gpt2 = GPT2Config(
        vocab_size=256,
        n_positions=128,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    builders: dict[str, Callable[[], PreTrainedModel]] = {
        "llama": lambda: LlamaForCausalLM(copy.deepcopy(llama)),
        "gpt2": lambda: GPT2LMHeadModel(copy.deepcopy(gpt2)),
    }
    held_out = torch.arange(len(blocks)) % 10 == 9
    kept = blocks[held_out]
    stride = max(1, len(kept) // 128)
    return Task(builders[table], blocks[~held_out], kept[::stride][:128], 1e-3, batch_size)


def stories_task(data_dir: Path, batch_size: int) -> Task:
    """stories260K on TinyStories, blocks of 256; the last 64 blocks are kept for evaluation."""
    folder = data_dir / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    blocks = tokenize_blocks(load_text(str(data_dir / "tinystories")), tokenizer, 256)
    ids = torch.tensor(blocks["input_ids"])
    return Task(
        lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        ids[:-64],
        ids[-64:],
        5e-4,
        batch_size,
    )


# ------------------------------------------------------------------------------------ training


def train_row(row: Row, task: Task, steps: int, seed: int) -> dict[str, float]:
    """Train ``row`` and return its losses in nats: ``trained``, ``static`` and their ``gap``."""
    torch.manual_seed(seed)
    model = task.build()
    config = MaQDConfig(
        weight_levels=None, activation_levels=None, norm_affine="fold", **row.config
    )
    quantize_model(model, config)
    norms = gated_norms(model)
    schedules = {
        norm: GateSchedule(*fractions)
        for name, norm in norms.items()
        for pattern, fractions in row.gates.items()
        if fnmatchcase(name, pattern)
    }
    spread = _hook(norms.values(), row)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.learning_rate, weight_decay=0.01)
    decay = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    for step in tqdm(range(steps), desc=f"{row.table}: {row.name}", leave=False):
        _set_mode(model, row.source)
        for norm, schedule in schedules.items():
            norm.gate.fill_(schedule.gate(step, steps))
        batch = task.train[torch.randint(len(task.train), (task.batch_size,))]
        loss = model(input_ids=batch, labels=batch).loss
        if row.spread_penalty:
            loss = loss + row.spread_penalty * spread.pop()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
    _set_mode(model, row.source)
    with _statistics_kept(model):
        trained = evaluate(model, task)
    model.eval()
    for norm in schedules or norms.values():
        norm.gate.fill_(1.0)
    static = evaluate(model, task)
    return {"trained": trained, "static": static, "gap": static - trained}


def _hook(norms: Iterable[LayerBatchNorm], row: Row) -> _Spread:
    """Put the hooks of ``row`` on ``norms``; returns the one that collects the penalty."""
    spread = _Spread()
    for norm in norms:
        if row.source == "running":
            norm.register_forward_pre_hook(_observe)
        if row.pooled_mean:
            norm.register_forward_pre_hook(_PooledMean(norm))
        if row.spread_penalty:
            norm.register_forward_pre_hook(spread)
    return spread


def _set_mode(model: nn.Module, source: str) -> None:
    """Training mode; norms that are to use the running average stay in eval mode."""
    model.train()
    if source == "running":
        for norm in gated_norms(model).values():
            norm.eval()


@torch.no_grad()
def evaluate(model: nn.Module, task: Task) -> float:
    """The mean loss per token on the evaluation blocks, in nats, in the mode the model is in."""
    batches = task.evaluation.split(task.batch_size)
    losses = [model(input_ids=b, labels=b).loss.item() * len(b) for b in batches]
    return sum(losses) / len(task.evaluation)


@contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards all buffers are what they were before."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    yield
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


# ------------------------------------------------- what the package does not offer, on purpose


@torch.no_grad()
def _observe(norm: nn.Module, args: tuple[Any, ...]) -> None:
    """Pre-hook: a norm in eval mode goes on averaging while the model trains."""
    assert isinstance(norm, LayerBatchNorm)
    if torch.is_grad_enabled():
        x = args[0] - args[0].mean(dim=-1, keepdim=True) if norm.spec.centered else args[0]
        norm._observe(pooled_log_ms(token_log_ms(x, norm.eps)), None)


class _PooledMean:
    """Pre-hook: subtract the mean of the sample (running: of all samples) from every token."""

    def __init__(self, norm: LayerBatchNorm) -> None:
        norm.spec = replace(norm.spec, centered=False)
        self.running = torch.zeros(1)

    def __call__(self, norm: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        if not norm.training:
            return (args[0] - self.running,)
        pooled = args[0].mean(dim=(1, 2), keepdim=True)
        if torch.is_grad_enabled():
            self.running.lerp_(pooled.detach().mean(), 0.05)
        return (args[0] - pooled,)


class _Spread:
    """Pre-hook: collect the variance over tokens (after the first) of the log mean square."""

    def __init__(self) -> None:
        self.terms: list[Tensor] = []

    def __call__(self, norm: nn.Module, args: tuple[Tensor]) -> None:
        assert isinstance(norm, LayerBatchNorm)
        if torch.is_grad_enabled():
            x = args[0] - args[0].mean(-1, keepdim=True) if norm.spec.centered else args[0]
            self.terms.append(token_log_ms(x[:, 1:], norm.eps).var(dim=1).mean())

    def pop(self) -> Tensor:
        """Mean over the norms of the last forward."""
        terms, self.terms = self.terms, []
        return torch.stack(terms).mean()


# ------------------------------------------------------------------------------------- command


@dataclass
class Arguments:
    """Command line."""

    data_dir: Path | None = field(
        default=None, metadata={"help": "See above; without it the embedded text is used."}
    )
    output: Path = field(
        default=Path("results/lbn_experiments.json"),
        metadata={"help": "JSON; runs it already holds are not repeated."},
    )
    table: list[str] = field(
        default_factory=lambda: ["llama", "gpt2", "pretrained"],
        metadata={"help": "The tables to fill."},
    )
    rows: str = field(default="*", metadata={"help": "Glob pattern of row names."})
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    steps: int = field(default=400, metadata={"help": "Training steps from scratch."})
    batch_size: int = field(default=4, metadata={"help": "Blocks of 128 bytes a training step."})
    pretrained_steps: int = field(default=200, metadata={"help": "Fine-tuning steps."})
    pretrained_batch_size: int = field(default=4, metadata={"help": "Blocks of 256 tokens."})


def load_task(table: str, arguments: Arguments) -> Task | None:
    """The task of a table, or None where it needs a folder that was not given."""
    if table != "pretrained":
        return byte_task(table, arguments.data_dir, arguments.batch_size)
    if arguments.data_dir is None:
        print("table 'pretrained' skipped: it needs --data-dir")
        return None
    return stories_task(arguments.data_dir, arguments.pretrained_batch_size)


def summarize(runs: list[dict[str, Any]]) -> str:
    """The runs as tables: mean over the seeds, and the range of the gap."""
    lines = []
    for table in dict.fromkeys(run["table"] for run in runs):
        lines += ["", f"{table:<34}{'trained':>9}{'static':>9}{'gap':>9}   seeds, gaps"]
        rows: dict[str, list[dict[str, Any]]] = {}
        for run in runs:
            if run["table"] == table:
                rows.setdefault(run["name"], []).append(run)
        for name, found in rows.items():
            values = [mean(run[key] for run in found) for key in ("trained", "static", "gap")]
            gaps = ", ".join(f"{run['gap']:.4f}" for run in found)
            numbers = "".join(f"{value:>9.3f}" for value in values)
            lines.append(f"{name:<34}{numbers}   {len(found)}: {gaps}")
    return "\n".join(lines)


def main(arguments: Arguments) -> list[dict[str, Any]]:
    """Train what the output file does not hold yet, write it after every run, print the tables."""
    stored = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    runs: list[dict[str, Any]] = list(stored)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for table in arguments.table:
        chosen = [row for row in ROWS if row.table == table]
        wanted = [row for row in chosen if fnmatchcase(row.name, arguments.rows)]
        task = load_task(table, arguments) if wanted else None
        if task is None:
            continue
        pretrained = table == "pretrained"
        steps = arguments.pretrained_steps if pretrained else arguments.steps
        data = "embedded" if arguments.data_dir is None else arguments.data_dir.name
        for seed in arguments.seeds:
            for row in wanted:
                shape = [task.batch_size, task.train.shape[1]]
                key = {**asdict(row), "seed": seed, "steps": steps, "batch": shape, "data": data}
                key = json.loads(json.dumps(key))  # tuples as the file has them
                if any(key.items() <= run.items() for run in runs):
                    continue
                started = time.perf_counter()
                losses = train_row(row, task, steps, seed)
                seconds = round(time.perf_counter() - started)
                runs.append({**key, **losses, "seconds": seconds})
                arguments.output.write_text(json.dumps(runs, indent=1) + "\n")
                print(f"{table}, {row.name}, seed {seed}: {losses} ({seconds} s)", flush=True)
    print(summarize(runs))
    return runs


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    main(parsed)
