"""Whole models that take turns at generating text, for `scripts.bench.speed`.

Every competitor is a process of its own that loads one model and then does what a pipe asks.
"""

from __future__ import annotations

import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from maqd_hf import MaQDConfig, pack_model, quantize_model, use_native
from maqd_hf.data.bundled import embedded_gguf
from maqd_hf.decoding.forward import CACHE_NAME
from maqd_hf.kernels.key_values import KeyValueType

LLAMA_CPP = {"Q8_0": 7, "Q4_0": 2, "TQ2_0": 37}  # llama.cpp's numbers of its file types
MODELS: tuple[tuple[int, int | None, int, str], ...] = (  # levels, group, head's levels, name
    (3, None, 255, "ternary, 8-bit head"),
    (4, None, 255, "2 bit, 8-bit head"),
    (4, 64, 255, "2 bit g64, 8-bit head"),
    (4, None, 16, "2 bit, 4-bit head"),
    (16, None, 255, "4 bit, 8-bit head"),
    (16, 64, 255, "4 bit g64, 8-bit head"),
    (256, 64, 255, "8 bit g64, 8-bit head"),
    (8, 64, 255, "3 bit g64, 8-bit head"),
    (3, 64, 255, "ternary g64, 8-bit head"),
)
OWN = ("2 bit, 8-bit head", "4 bit, 8-bit head")  # also through the model's own forward
PROMPT, NEW, PREFILL, BATCH = 16, 64, 512, 8
LENGTHS, STEPS = (16, 512, 2048, 8192), 8  # of the table of lengths
MIB = 2**20


class TransformersModel:
    """A transformers model of a folder, run by ``generate()`` and ``forward``."""

    def __init__(
        self, source: str, native: bool | None, dtype: str, kv_cache: KeyValueType = "float32"
    ) -> None:
        began = time.perf_counter()
        self.model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
        if native is not None:
            use_native(self.model, native, kv_cache=kv_cache)
        self.load_seconds = time.perf_counter() - began
        self.model.generation_config.eos_token_id = None  # nobody stops early
        vocabulary = self.model.config.vocab_size
        self.ids = torch.randint(5, vocabulary, (1, max(LENGTHS)), generator=torch.Generator())
        self.cache: Any = None

    @torch.no_grad()
    def prefill(self, tokens: int = PREFILL) -> None:
        self.cache = self.model(self.ids[:, :tokens], use_cache=True, logits_to_keep=1)[CACHE_NAME]

    @torch.no_grad()
    def score(self, tokens: int) -> None:
        """Logits of all tokens, as a perplexity wants them."""
        self.model(self.ids[:, :tokens], use_cache=False)

    @torch.no_grad()
    def continue_text(self) -> float:
        """Seconds of a token after those of the last `prefill`: the median of ``STEPS``."""
        seconds = []
        for i in range(STEPS):
            began = time.perf_counter()
            options = {CACHE_NAME: self.cache, "use_cache": True, "logits_to_keep": 1}
            self.model(self.ids[:, i : i + 1], **options)
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    @torch.no_grad()
    def decode(self, new: int, batch: int = 1) -> None:
        prompt = self.ids[:, : PROMPT * batch].view(batch, PROMPT)
        options = {"max_new_tokens": new, "do_sample": False}
        self.model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


class LlamaCpp:
    """llama.cpp on a GGUF file, token by token by the largest logit, without its sampler."""

    def __init__(self, source: str, threads: int) -> None:
        import llama_cpp

        began = time.perf_counter()
        self.model = llama_cpp.Llama(
            source, n_ctx=max(LENGTHS) + 2 * STEPS, n_batch=512, n_threads=threads,
            n_threads_batch=threads, verbose=False,
        )  # fmt: skip
        self.load_seconds = time.perf_counter() - began
        self.logits = partial(llama_cpp.llama_get_logits, self.model.ctx)
        self.vocabulary = self.model.n_vocab()
        self.ids = torch.randint(5, self.vocabulary, (max(LENGTHS),)).tolist()

    def prefill(self, tokens: int = PREFILL) -> None:
        self.model.reset()
        self.model.eval(self.ids[:tokens])

    def continue_text(self) -> float:
        """Seconds of a token after those of the last `prefill`: the median of ``STEPS``."""
        seconds = []
        for i in range(STEPS):
            began = time.perf_counter()
            self.model.eval([self.ids[i]])
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    def decode(self, new: int) -> None:
        import numpy as np

        self.model.reset()
        tokens = self.ids[:PROMPT]
        for _ in range(new):
            self.model.eval(tokens)
            logits = np.ctypeslib.as_array(self.logits(), shape=(self.vocabulary,))
            tokens = [int(logits.argmax())]


def rss(which: str) -> int:
    """The bytes of memory of this process, now ("VmRSS") or at most ("VmHWM"); 0 if unknown."""
    status = Path("/proc/self/status")
    return int(status.read_text().split(f"{which}:")[1].split()[0]) * 1024 if status.exists() else 0


def warm_up(kind: str) -> None:
    """Load a tiny float model and let it write, so that its framework has imported everything.

    Seconds and memory are then those of the model that is measured.
    """
    if kind == "llama.cpp":
        import llama_cpp  # noqa: F401

        return
    sizes: dict[str, Any] = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(folder)
        TransformersModel(folder, None, "float32").decode(2)


def serve(kind: str, source: str, options: dict[str, Any], pipe: Connection) -> None:
    """Run a competitor in a process of its own: do what the pipe asks, answer with seconds."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    threads = options.pop("threads")
    torch.set_num_threads(threads)
    warm_up(kind)
    before = rss("VmRSS")
    if kind == "llama.cpp":
        runner: Any = LlamaCpp(source, threads)
    else:
        runner = TransformersModel(source, **options)
    runner.decode(2)
    peak = rss("VmHWM") - before
    files = [Path(source)] if kind == "llama.cpp" else list(Path(source).glob("*.safetensors"))
    began = time.perf_counter()
    size = sum(len(file.read_bytes()) for file in files)
    read = time.perf_counter() - began
    pipe.send({"load_seconds": runner.load_seconds, "peak_bytes": peak,
               "file_bytes": size, "read_seconds": read})  # fmt: skip
    orders: dict[str, Callable[[], float | None]] = {
        **{f"prefill {n}": partial(runner.prefill, n) for n in LENGTHS},
        "continue": runner.continue_text,
        "prefill": runner.prefill,
        "first": partial(runner.decode, 1),
        "decode": partial(runner.decode, NEW),
    }
    if kind != "llama.cpp":
        orders["first of 8"] = partial(runner.decode, 1, BATCH)
        orders["decode 8"] = partial(runner.decode, NEW, BATCH)
        orders |= {f"score {n}": partial(runner.score, n) for n in LENGTHS}
    while (order := pipe.recv()) is not None:
        began = time.perf_counter()
        own = orders[order]() if order in orders else None
        pipe.send((own or time.perf_counter() - began) if order in orders else None)


def burn() -> None:
    """Keep a core busy."""
    x = torch.randn(64, 64)
    torch.set_num_threads(1)
    while True:
        x = (x @ x).clamp(-1, 1)


def model_sources(folder: Path, config: Any, float_model: str | None) -> dict[str, Any]:
    """The (kind, source, options) of every competitor by name; files are made in ``folder``."""
    if float_model is None:
        float_model = str(folder / "float")
        build(config).bfloat16().save_pretrained(float_model)
    found: dict[str, Any] = {
        "transformers bf16": ("hf", float_model, {"native": None, "dtype": "bfloat16"})
    }
    for levels, group, head, name in MODELS:
        target = folder / name.replace(" ", "-").replace(",", "")
        model = build(config)
        settings = MaQDConfig(
            weight_levels=levels,
            group_size=group,
            embedding_levels=head,
            activation_scaling="token",
        )
        quantize_model(model, settings, start="range")
        pack_model(model)
        model.save_pretrained(target)
        found[f"maqd {name}"] = ("hf", str(target), {"native": True, "dtype": "float32"})
        if name in OWN:
            own = {"native": False, "dtype": "float32"}
            found[f"maqd {name}, the model's own forward"] = ("hf", str(target), own)
    return found


def build(config: Any) -> Any:
    """A model with random weights, whose rotary tables and norms are the usual ones."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)


def llama_cpp_sources(folder: Path) -> dict[str, Any]:
    """The embedded GGUF file requantized to llama.cpp's types."""
    if not find_spec("llama_cpp"):
        return {}
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    found: dict[str, Any] = {}
    for name, number in LLAMA_CPP.items():
        target = folder / f"{name}.gguf"
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize, options.nthread = number, True, 2
        source = str(embedded_gguf()).encode()
        if llama_cpp.llama_model_quantize(source, str(target).encode(), options) == 0:
            found[f"llama.cpp {name}"] = ("llama.cpp", str(target), {})
    return found


@contextmanager
def runners(sources: dict[str, Any], threads: int) -> Iterator[dict[str, tuple[Connection, Any]]]:
    """A process for every competitor: the pipe to it and what it said when its model was loaded."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    spawn, found = get_context("spawn"), {}
    policy = os.environ.get("OMP_WAIT_POLICY")
    for name, (kind, source, options) in sources.items():
        if kind == "llama.cpp":  # its threads wait by spinning: four times as fast as asleep
            os.environ.pop("OMP_WAIT_POLICY", None)
        pipe, theirs = spawn.Pipe()
        job = (kind, source, {**options, "threads": threads}, theirs)
        spawn.Process(target=serve, args=job, daemon=True).start()
        if policy is not None:
            os.environ["OMP_WAIT_POLICY"] = policy
        theirs.close()
        found[name] = (pipe, pipe.recv())
    yield found
    for pipe, _ in found.values():
        pipe.send(None)


Times = dict[str, dict[str, list[float]]]


def race(
    found: dict[str, tuple[Connection, Any]], rounds: int, orders: Sequence[str], times: Times
) -> None:
    """Let all competitors take turns at every order, and add their seconds to ``times``."""
    for _ in range(rounds):
        for order in orders:
            for name, (pipe, _) in found.items():
                pipe.send(order)
                if (seconds := pipe.recv()) is not None:
                    times.setdefault(name, {}).setdefault(order, []).append(seconds)


def compete(
    sources: dict[str, Any], threads: int, rounds: int, busy: int
) -> dict[str, dict[str, Any]]:
    """All competitors in turn, each in its own process: medians of what they did."""
    others = [get_context("spawn").Process(target=burn, daemon=True) for _ in range(busy)]
    orders = ["prefill", "first", "decode", *([] if busy else ["first of 8", "decode 8"])]
    times: Times = {}
    with runners(sources, threads) as found:
        for process in others:
            process.start()
        race(found, 1, orders, {})  # warms up
        race(found, rounds, orders, times)
        for process in others:
            process.kill()
    return {name: said | _figures(times[name]) for name, (_, said) in found.items()}


def _figures(times: dict[str, list[float]]) -> dict[str, float]:
    """The rates of a competitor by the medians of its seconds."""
    medians = {order: statistics.median(values) for order, values in times.items()}
    result = {
        "prefill_tokens_per_second": PREFILL / medians["prefill"],
        "first_token_seconds": medians["first"],
        "tokens_per_second": (NEW - 1) / (medians["decode"] - medians["first"]),
    }
    if "decode 8" in medians:
        seconds = medians["decode 8"] - medians["first of 8"]
        result["batch_tokens_per_second"] = BATCH * (NEW - 1) / seconds
    return result


def by_length(sources: dict[str, Any], threads: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of every competitor by length: of a prefill, of the next token after it, and of all
    logits. The longest are measured once."""
    times: Times = {}
    with runners(sources, threads) as found:
        race(found, 1, [f"prefill {PREFILL}", f"score {PREFILL}"], {})  # warms up
        for tokens in LENGTHS:
            few = rounds if tokens <= PREFILL else 1
            after: Times = {}
            race(found, few, [f"prefill {tokens}", "continue"], after)
            race(found, few, [f"score {tokens}"] * (tokens <= PREFILL), after)
            for name, seconds in after.items():
                told = {
                    f"continue {tokens}" if k == "continue" else k: v for k, v in seconds.items()
                }
                times.setdefault(name, {}).update(told)
    return {
        name: {order: statistics.median(seconds) for order, seconds in of.items()}
        for name, of in times.items()
    }
