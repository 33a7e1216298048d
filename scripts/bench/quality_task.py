"""The rows and arguments of `scripts.bench.quality`, its float model and its texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from maqd_hf.data.bundled import SMOLLM2, resolve_model
from maqd_hf.data.self_written import generated_blocks
from maqd_hf.data.text import EMBEDDED, load_text, spread_samples, tokenize_blocks
from maqd_hf.evaluation.perplexity import text_perplexity
from maqd_hf.functional import SURROGATES
from maqd_hf.nn import ActivationScaling, FirstToken
from maqd_hf.training.rates import SCALE_RATE, learning_rate
from scripts.bench.quality_peers import PEERS

# ---------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """One way to quantize.

    Args:
        method: "float", "MaQD", a rule of ``quality_rules`` or a peer of ``quality_peers``.
        levels: of the weights.
        group: inputs that share a scale; None: one scale a row.
        activations: levels of the inputs, None: float.
        scaling: ``activation_scaling`` as in ``MaQDConfig``.
        start: MaQD only: "range" (round to nearest, nothing clipped), "search", "gptq".
        norm_affine: MaQD only, as in ``MaQDConfig``.
        rotation: MaQD only, as in ``MaQDConfig``.
        smoothing: MaQD only, with start "gptq": whether channels are smoothed first.
        surrogate, weight_offset, first_token: MaQD only, as in ``MaQDConfig``.
        bfloat16_latents: MaQD only, latents rounded after every step.
        scale_rate: MaQD only, learning rate of the scales in units of the latents'.
        own_text: calibrated and trained on text that the float model writes.
        learning_rates: rates of the distillation, of which the best one counts; none: not trained.
    """

    name: str
    method: str
    levels: int | None = None
    group: int | None = 64
    activations: int | None = None
    scaling: ActivationScaling = "token"
    start: Literal["range", "search", "gptq"] = "gptq"
    norm_affine: Literal["keep", "fold"] = "keep"
    rotation: int | Literal["auto"] | None = "auto"
    smoothing: bool = True
    surrogate: str = "clip"
    weight_offset: bool = True
    first_token: FirstToken = "own"
    bfloat16_latents: bool = False
    scale_rate: float = SCALE_RATE
    own_text: bool = False
    learning_rates: tuple[float, ...] = ()

    @property
    def trained(self) -> bool:
        return bool(self.learning_rates)


def _llm_rows() -> list[Row]:
    """The rows of table ``llm``: start values, then trained rows, then peers."""
    rates: dict[int, tuple[float, ...]] = {n: (learning_rate(n),) for n in (256, 16, 8, 4, 3)}
    return [*_start_rows(), *_trained_rows(rates), *_peer_rows(rates)]


def _start_rows() -> list[Row]:
    """The float model, and rows that are not trained."""
    rows = [Row("float", "float")]
    for levels in (16, 8, 4, 3):
        rows.append(Row(f"round to nearest M={levels} g64", "MaQD", levels, 64, 255, start="range"))
        rows.append(Row(f"MaQD start M={levels} g64", "MaQD", levels, 64, 255))
    absorbed = Row("", "MaQD", 16, 64, 255, norm_affine="fold", rotation=None, smoothing=False)
    rows += [
        replace(absorbed, name="round to nearest M=16 g64, gamma absorbed", start="range"),
        replace(absorbed, name="MaQD start M=16 g64, gamma absorbed"),
    ]
    plain = Row("", "MaQD", 16, 64, 255)
    not_rotated = replace(plain, rotation=None)
    few = replace(plain, activations=15, scaling="group")
    few_name = "MaQD start M=16 g64, 4-bit inputs g64"
    rows += [
        replace(not_rotated, name="MaQD start M=16 g64, not rotated"),
        replace(not_rotated, name="round to nearest M=16 g64, not rotated", start="range"),
        replace(plain, name="MaQD start M=4 g64, not smoothed", levels=4, smoothing=False),
        replace(plain, name="MaQD start M=4 g64, not rotated", levels=4, rotation=None),
        replace(few, name="MaQD start M=16 g64, 4-bit inputs", scaling="token"),
        replace(few, name=few_name),
        replace(few, name=f"{few_name}, not rotated", rotation=None),
        replace(few, name=f"{few_name}, not smoothed", smoothing=False),
    ]
    return rows


def _trained_rows(rates: Mapping[int, tuple[float, ...]]) -> list[Row]:
    """MaQD and other rules, distilled at ``rates`` by levels."""
    rows = [
        Row(f"MaQD M={levels} g64", "MaQD", levels, 64, 255, learning_rates=rates[levels])
        for levels in (4, 16, 8, 3, 256)
    ]
    not_rotated = Row("", "MaQD", 16, 64, 255, rotation=None)
    few = Row("", "MaQD", 16, 64, 15, "group")
    coarse = (learning_rate(16, few.activations),)
    twice = (*rates[4], 2 * rates[4][0])  # on a small model other rules liked it faster than ours
    return [
        *rows,
        Row("MaQD M=16 a row, static", "MaQD", 16, None, 255, "static", learning_rates=rates[16]),
        replace(not_rotated, name="MaQD M=16 g64, not rotated", learning_rates=rates[16]),
        replace(few, name="MaQD M=16 g64, 4-bit inputs g64", learning_rates=coarse),
        replace(few, name="MaQD M=16 g64, 4-bit inputs", scaling="token", learning_rates=coarse),
        *_one_setting_changed(),
        Row("SEQ M=4 g64", "SEQ", 4, 64, 255, learning_rates=twice),
        Row("LSQ M=4 g64", "LSQ", 4, 64, 255, learning_rates=twice),
        Row("BitNet M=3", "BitNet", 3, None, 255, learning_rates=rates[3]),
    ]


def _peer_rows(rates: Mapping[int, tuple[float, ...]]) -> list[Row]:
    """Other packages, of which those with QAT are trained at ``rates`` by levels."""
    rows = []
    for peer, widths in PEERS.items():
        for bits in widths:
            rates_of = rates[2**bits] if "QAT" in peer else ()
            inputs = 255 if "8-bit inputs" in peer or "QAT" in peer else None
            rows.append(
                Row(f"{peer} {bits} bit", peer, 2**bits, 64, inputs, learning_rates=rates_of)
            )
    return rows


def _one_setting_changed() -> list[Row]:
    """Rows that change what ``experiments/ablations.py`` changes on a small model."""
    name, rates = "MaQD M=16 g64, 4-bit static inputs", (learning_rate(16, 15),)
    static = Row(name, "MaQD", 16, 64, 15, "static", learning_rates=rates)
    others = [surrogate for surrogate in SURROGATES if surrogate != static.surrogate]
    plain = Row("MaQD M=4 g64", "MaQD", 4, 64, 255, learning_rates=(learning_rate(4),))
    return [
        static,
        *(replace(static, name=f"{name}, {other}", surrogate=other) for other in others),
        replace(static, name=f"{name}, first tokens like others", first_token="shared"),
        replace(plain, name=f"{plain.name}, latents in bfloat16", bfloat16_latents=True),
        replace(plain, name=f"{plain.name}, scales fixed", scale_rate=0.0),
        replace(plain, name=f"{plain.name}, scales at the latents' rate", scale_rate=1.0),
        replace(plain, name=f"{plain.name}, no offset", weight_offset=False),
        replace(plain, name=f"{plain.name}, its own text", own_text=True),
        replace(plain, name="MaQD M=4 a row", group=None),
    ]


def _rule_rows() -> list[Row]:
    """The rows of table ``rules``."""
    rates = (3e-4, 1e-3, 3e-3, 1e-2)
    wanted = {16: ["LSQ"], 4: ["LSQ", "SEQ"], 3: ["LSQ", "SEQ", "BitNet"]}
    rows = [Row("float", "float")]
    for levels, others in wanted.items():
        rows += [
            Row(f"{rule} M={levels}", rule, levels, None, 255, learning_rates=rates)
            for rule in others
        ]
        ours = Row(
            f"MaQD M={levels}", "MaQD", levels, None, 255, rotation=None, learning_rates=rates
        )
        rows += [
            replace(ours, name=f"{ours.name}, search", start="search"),
            replace(ours, name=f"{ours.name}, gptq"),
        ]
    return rows


OWN_TEXT = "text the float model wrote"  # in a results file
TABLES = {"llm": _llm_rows(), "rules": _rule_rows()}


@dataclass
class Arguments:
    """Command line."""

    model: str = field(default=EMBEDDED, metadata={"help": "Id, folder or 'embedded' (SmolLM2)."})
    data_dir: Path | None = field(default=None, metadata={"help": "See above."})
    results: Path = field(
        default=Path("results/quality.json"),
        metadata={"help": "JSON; runs it already holds are not repeated."},
    )
    table: list[str] = field(default_factory=lambda: ["llm"], metadata={"help": "llm, rules."})
    rows: list[str] = field(
        default_factory=lambda: ["*"],
        metadata={"help": "Glob patterns of row names, run in the order of the patterns."},
    )
    tokens: int = field(default=65_536, metadata={"help": "Training tokens of a row."})
    block_size: int = field(default=256, metadata={"help": "Tokens of a training sample."})
    batch_size: int = field(default=1, metadata={"help": "Samples an optimizer step."})
    samples: int = field(default=128, metadata={"help": "Blocks to calibrate on."})
    window: int = field(default=512, metadata={"help": "Tokens of an evaluation window."})
    windows: int = field(default=24, metadata={"help": "Windows of each text."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Table rules."})
    models: Path | None = field(default=None, metadata={"help": "Keep packed models here."})
    checkpoints: Path | None = field(
        default=None, metadata={"help": "Keep those of unfinished trainings here, and continue."}
    )
    save_steps: int = field(
        default=200, metadata={"help": "Optimizer steps between two checkpoints."}
    )


# ---------------------------------------------------------------------------------------- task


@dataclass
class Text:
    """Rows of a text to measure on; ``join`` as in ``text_perplexity``."""

    name: str
    rows: list[str]
    join: str | None = "\n\n"


class Task:
    """A float model, blocks of tokens to calibrate and train on, and texts to measure on."""

    def __init__(self, table: str, args: Arguments) -> None:
        self.table, self.args, self.data = table, args, args.data_dir
        self.small = table == "rules"
        self.seeds = args.seeds if self.small else [0]
        if self.small:
            self.name = "stories260K"
            folder = str(self._folder_of_data() / "models" / self.name)
        else:
            self.name = SMOLLM2 if args.model == EMBEDDED else Path(args.model).name
            folder = resolve_model(SMOLLM2 if args.model == EMBEDDED else args.model)
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.train, self.texts = self._texts()
        parts = [tokenize_blocks(t, self.tokenizer, args.block_size) for t in self.train.values()]
        # Every text gives as many blocks as the shortest one has.
        size = min(map(len, parts))
        parts = [part.shuffle(seed=0).select(range(size)) for part in parts]
        self.blocks: Dataset = concatenate_datasets(parts).shuffle(seed=0)
        self.said: dict[bytes, Tensor] = {}
        self.started: tuple[Any, dict[str, Tensor]] | None = None

    def _folder_of_data(self) -> Path:
        """``--data-dir``, which some tables cannot do without."""
        if self.data is None:
            raise ValueError(f"table {self.table!r} needs --data-dir, a folder of models and texts")
        return self.data

    def _texts(self) -> tuple[dict[str, Dataset], list[Text]]:
        """The texts to train on, by name, and those to measure on."""
        if self.small:
            stories = load_text(str(self._folder_of_data() / "tinystories"))
            held_out = stories.select(range(len(stories) - 200, len(stories)))
            train = {"tinystories": stories.select(range(len(stories) - 200))}
            return train, [Text("tinystories", held_out["text"], None)]
        if self.data is None:
            held_out = load_text(EMBEDDED, split="test")
            return {"embedded": load_text(EMBEDDED)}, [Text("embedded", held_out["text"])]
        wiki = self.data / "wikitext-2"
        imdb = load_text(str(self.data / "imdb" / "train.parquet")).shuffle(seed=0)
        measured = min(200, len(imdb) // 2)
        rest = range(measured, min(measured + 2000, len(imdb)))
        articles = str(self.data / "wiki-sample" / "enwiki-2016-105-articles.parquet")
        train = {
            "wikitext-2 validation": load_text(
                str(wiki / "wikitext-2-tokens-validation.parquet"), join=""
            ),
            "wikipedia": load_text(articles, column="text"),
            "imdb, other reviews": imdb.select(rest),
        }
        return train, [
            Text("wikitext", load_text(str(wiki / "wikitext-2-raw-test.parquet"))["text"], ""),
            Text("imdb", imdb.select(range(measured))["text"]),
        ]

    @cached_property
    def own_blocks(self) -> Dataset:
        """Text that the float model writes, as many tokens as a run calibrates or trains on."""
        args = self.args
        wanted = max(args.tokens, args.samples * args.block_size)
        return generated_blocks(self.teacher, wanted, args.block_size)

    def blocks_for(self, row: Row) -> Dataset:
        """The blocks that a row is calibrated and trained on."""
        return self.own_blocks if row.own_text else self.blocks

    def calibration_ids(self, row: Row) -> Tensor:
        """The ids (samples, tokens) that a row is calibrated on."""
        return spread_samples(self.blocks_for(row), self.args.samples)

    def measure(self, model: PreTrainedModel) -> dict[str, dict[str, Any]]:
        """The perplexity of each text, its mean loss in nats, and how it was measured."""
        found = {}
        for text in self.texts:
            result = text_perplexity(
                model,
                self.tokenizer,
                text.rows,
                self.args.window,
                join=text.join,
                batch_size=4,
                max_windows=self.args.windows if text.join is not None else None,
            )
            found[text.name] = {
                "perplexity": result.perplexity,
                "nats": result.nll_sum / result.tokens,
                "tokens": result.tokens,
                "protocol": result.protocol,
            }
        return found

    def key(self, row: Row, seed: int, rate: float | None) -> dict[str, Any]:
        """The settings that tell a run from others: two runs with the same key are one."""
        settings = asdict(row)
        for told_below in ("learning_rates", "scale_rate", "own_text"):
            del settings[told_below]
        if row.method != "MaQD":
            for ours in ("start", "norm_affine", "rotation", "smoothing"):
                del settings[ours]
        for changed in ("surrogate", "weight_offset", "first_token", "bfloat16_latents"):
            if settings[changed] == getattr(Row, changed):  # named where it is not the usual one
                del settings[changed]
        args = self.args
        key: dict[str, Any] = {"table": self.table, "model": self.name, **settings}
        key["data"] = "embedded" if self.data is None else self.data.name
        key |= {"window": args.window, "windows": args.windows}
        if row.method != "float":
            key |= {"block_size": args.block_size, "samples": args.samples}
            key["train"] = OWN_TEXT if row.own_text else "; ".join(self.train)
        if rate is not None:
            key |= {"tokens": args.tokens, "batch_size": args.batch_size}
            key |= {"learning_rate": rate, "seed": seed}
            key["scale_learning_rate"] = row.scale_rate * rate
        return key

    def checkpoints(self, key: dict[str, Any]) -> Path | None:
        """Where the run with this key leaves its checkpoints, if they are wanted."""
        if self.args.checkpoints is None:
            return None
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.args.checkpoints / digest[:16]


@contextmanager
def remembering(teacher: PreTrainedModel, said: dict[bytes, Tensor]) -> Iterator[None]:
    """For a while, keep in ``said`` the base model's states of a sample: all rows train on them."""
    forward = teacher.base_model.forward

    def remembered(input_ids: Tensor, **kwargs: Any) -> BaseModelOutputWithPast:
        keys = [row.numpy(force=True).tobytes() for row in input_ids]
        if any(key not in said for key in keys):
            said.update(zip(keys, forward(input_ids=input_ids, **kwargs)[0], strict=True))
        return BaseModelOutputWithPast(last_hidden_state=torch.stack([said[k] for k in keys]))

    teacher.base_model.forward = remembered
    try:
        yield
    finally:
        del teacher.base_model.forward
