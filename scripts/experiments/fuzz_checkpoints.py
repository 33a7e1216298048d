"""Damaged and forged checkpoints: nothing may crash, hang, or load with another output unnoticed.

Small checkpoints of every format (packed and QAT, one file and shards, decoder and encoder) are
changed where their structure can be changed: a value of ``config.json``, of the index or of a
safetensors header, an offset, bytes of a tensor, the length of a file. Hypothesis draws the
changes.

- A *damaged* checkpoint keeps its digest. It must be refused, or load with the very same output.
- A *forged* one gets a digest that fits it. It may load with another output, and nothing worse.

A refusal by this package is a ``ValueError`` or ``OSError`` whose sentence names a file, module or
field. What transformers or safetensors refuse before this package is asked is counted apart.

    python -m scripts.experiments.fuzz_checkpoints --mutants 2000
    .ci/sanitize-fuzz --mutants 200000          # under AddressSanitizer
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.utils import logging

from maqd_hf import MaQDConfig, pack_model, quantize_model, save_model
from maqd_hf.calibration import calibrate_activations
from maqd_hf.checkpoint.digest import make_digest

SECONDS, GIBIBYTES = 20, 4
"""What one checkpoint may take to be refused or loaded, beside what the process held before."""
IDS = torch.arange(2, 14).unsqueeze(0)
SUMMARY = "summary: "

# ------------------------------------------------------------------------------ what is changed


def _tiny(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 48}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    if kind == "encoder":
        return BertModel(BertConfig(**sizes)).eval()
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).eval()


def write_originals(root: Path) -> None:
    """The checkpoints that are changed: a folder each under ``root``."""
    grids: dict[str, dict[str, Any]] = {
        "packed": {"weight_levels": 16, "activation_levels": 255, "embedding_levels": 255},
        "sharded": {"weight_levels": 3, "group_size": 16, "activation_scaling": "token"},
        "trainable": {"weight_levels": 4, "activation_levels": 15, "embedding_levels": 16},
        "encoder": {"weight_levels": 16, "activation_levels": 255},
    }
    for kind, grid in grids.items():
        model = _tiny(kind)
        quantize_model(model, MaQDConfig(**grid))
        calibrate_activations(model, [{"input_ids": IDS}], progress=False)
        if kind != "trainable":
            pack_model(model)
        shards = "12KB" if kind == "sharded" else "5GB"
        save_model(model, root / kind, max_shard_size=shards)


def load(folder: Path) -> nn.Module:
    """The model of ``folder``, by the class its kind is used with."""
    kind = AutoModel if folder.name == "encoder" else AutoModelForCausalLM
    return kind.from_pretrained(folder)


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    """What ``model`` says of a few tokens; a decoder also of one more, from its cache."""
    first = model(IDS)
    if not hasattr(first, "logits"):
        return first.last_hidden_state
    second = model(IDS[:, :1], past_key_values=first.past_key_values)
    return torch.cat([first.logits, second.logits], dim=1)


# ---------------------------------------------------------------------------------- the changes

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 5, 7, 16, 48, 64, 255, 256, 257, 65_536, 2**31, 2**40),
    *(
        -(2**31),
        2**63,
        0.0,
        -0.5,
        1e-30,
        1e308,
        float("inf"),
        float("nan"),
        "",
        "a",
        "silu",
        "relu",
    ),
    *("static", "token", "group", "maqd", "packed", "qat", "float16", "gelu", "llama", "gpt2"),
    *("../../../etc/passwd", "\\u0000", "F32", "I32", "BF16", "U8", [], [0], [1, 2], {}, {"a": 1}),
)
REMOVE = "<remove>"


def paths(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON tree but its root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = []
    for key, value in items:
        found.append((*at, key))
        if isinstance(value, (dict, list)):
            found += paths(value, (*at, key))
    return found


def edit(tree: Any, where: int, value: Any) -> None:
    """Put ``value`` at one of the places of ``tree``, or take away what is there."""
    places = paths(tree)
    *above, last = places[where % len(places)]
    for key in above:
        tree = tree[key]
    if value == REMOVE:
        del tree[last]
    else:
        tree[last] = value


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(path: Path, header: dict[str, Any], data: bytes) -> None:
    """The file of this header and data."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def change_json(path: Path, draw: dict[str, Any]) -> None:
    """One or two values of a JSON file."""
    tree = json.loads(path.read_text("utf-8"))
    for where, value in zip(draw["where"], draw["values"], strict=True):
        edit(tree, where, value)
    path.write_text(json.dumps(tree), "utf-8")


def change_header(path: Path, draw: dict[str, Any]) -> None:
    """One or two values of a safetensors header."""
    header, data = read_header(path)
    for where, value in zip(draw["where"], draw["values"], strict=True):
        edit(header, where, value)
    write_header(path, header, data)


def exchange_tensors(path: Path, draw: dict[str, Any]) -> None:
    """Two tensors with each other's bytes (and, where they differ, sizes)."""
    header, data = read_header(path)
    names = [name for name in header if name != "__metadata__"]
    a, b = (names[where % len(names)] for where in draw["where"])
    header[a], header[b] = header[b], header[a]
    write_header(path, header, data)


def change_bytes(path: Path, draw: dict[str, Any]) -> None:
    """One or two bytes anywhere in a file."""
    content = bytearray(path.read_bytes())
    for where, flip in zip(draw["where"], draw["bytes"], strict=True):
        content[where % len(content)] ^= flip
    path.write_bytes(content)


def cut(path: Path, draw: dict[str, Any]) -> None:
    """The file's beginning alone."""
    content = path.read_bytes()
    path.write_bytes(content[: draw["where"][0] % len(content)])


def drop(path: Path, draw: dict[str, Any]) -> None:
    """No such file."""
    path.unlink()


TEXT: tuple[Callable[..., None], ...] = (change_json, change_json, change_json, change_bytes, cut)
BINARY: tuple[Callable[..., None], ...] = (
    *(change_header, change_header, exchange_tensors),
    *(change_bytes, change_bytes, cut, drop),
)


def _draw(random: Random) -> dict[str, Any]:
    """One change, every part of it equally likely."""
    numbers = [random.randrange(2**31) for _ in range(6)]
    return {
        "kind": random.choice(["packed", "sharded", "trainable", "encoder"]),
        "file": random.choice(["config", "config", "index", "weights", "weights"]),
        "change": numbers[0],
        "shard": numbers[1],
        "forged": random.random() < 0.5,
        "where": numbers[2:4],
        "values": random.choices([REMOVE, REMOVE, *VALUES], k=2),
        "bytes": [1 + numbers[4] % 255, numbers[5] % 256],
        "twice": random.random() < 0.5,
    }


DRAWS = st.randoms(use_true_random=True).map(_draw)


def mutate(folder: Path, draw: dict[str, Any]) -> str:
    """Change the checkpoint in ``folder`` as ``draw`` says; what was changed, in words."""
    weights = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if draw["file"] == "config" or (draw["file"] == "index" and not index.exists()):
        path, changes = folder / "config.json", TEXT
    elif draw["file"] == "index":
        path, changes = index, TEXT
    else:
        path, changes = weights[draw["shard"] % len(weights)], BINARY
    change = changes[draw["change"] % len(changes)]
    if change in (change_json, change_header) and not draw["twice"]:
        draw = draw | {"where": draw["where"][:1], "values": draw["values"][:1]}
    try:
        change(path, draw)
    except (KeyError, IndexError, TypeError):  # the second edit met what the first had left
        return f"{change.__name__} of {path.name}, half"
    return f"{change.__name__} of {path.name}"


def sign(folder: Path) -> bool:
    """Give the checkpoint a digest that fits it; whether that could be done."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
        config["quantization_config"].pop("digest", None)
        digest = make_digest(config, sorted(folder.glob("*.safetensors")))
        config["quantization_config"]["digest"] = digest
        path.write_text(json.dumps(config), "utf-8")
    except Exception:  # a file that cannot be read cannot be signed
        return False
    return True


# -------------------------------------------------------------------------------- what comes out

NAMES_SOMETHING = re.compile(r"\.json|\.safetensors|\w+=|\w+\.\w+|'\w+'")


def refusal(error: BaseException, loaded: bool) -> str:
    """What an error is: "refused" by a clear sentence, "refused elsewhere" or "unclear".

    While a file is loaded every error below this package is its own affair. Once a model is
    ``loaded``, its own forward may run inside ours, and fails as it would alone.
    """
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}maqd_hf{os.sep}" in frame.filename]
    if loaded and f"{os.sep}maqd_hf{os.sep}" not in frames[-1].filename:
        return "refused elsewhere"
    if not ours or f"{os.sep}maqd_hf{os.sep}" not in frames[-1].filename:
        return "unclear" if ours else "refused elsewhere"
    said = str(error)
    clear = isinstance(error, (ValueError, OSError)) and len(said) > 30
    return "refused" if clear and NAMES_SOMETHING.search(said) else "unclear"


State = tuple[dict[str, Tensor], Tensor]


def state(model: nn.Module) -> State:
    """Every tensor of ``model`` and what it says."""
    return dict(model.state_dict()), output(model)


def equal(found: State, wanted: State) -> bool:
    """The same tensors, bit for bit, and so the same output but for the order of its sums, which
    torch chooses by where in memory a tensor lies."""
    (tensors, said), (others, expected) = found, wanted
    if tensors.keys() != others.keys() or said.shape != expected.shape:
        return False
    same = all(
        torch.equal(tensors[name].nan_to_num(), others[name].nan_to_num()) for name in others
    )
    return same and torch.allclose(said, expected, rtol=1e-4, atol=1e-6)


def attempt(folder: Path, wanted: State) -> tuple[str, str]:
    """What became of loading ``folder``, and the words of an error."""
    signal.alarm(SECONDS)
    loaded = False
    try:
        model = load(folder)
        loaded = True
        found = state(model)
    except (KeyboardInterrupt, TimeoutError):
        raise
    except Exception as error:
        return refusal(error, loaded), f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    return ("same" if equal(found, wanted) else "changed"), ""


def run(root: Path, mutants: int, number: int, now: Path) -> Counter[str]:
    """Change, load and judge; ``now`` always holds the draw at hand, for the parent to report."""
    wanted = {folder.name: state(load(folder)) for folder in root.iterdir() if folder.is_dir()}
    counts: Counter[str] = Counter()

    @seed(number)
    @settings(
        max_examples=mutants,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(DRAWS)
    def one(draw: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / draw["kind"]
            shutil.copytree(root / draw["kind"], folder)
            what = mutate(folder, draw)
            forged = draw["forged"] and sign(folder)
            now.write_text(json.dumps(draw, default=str), "utf-8")
            outcome, said = attempt(folder, wanted[draw["kind"]])
        wrong = outcome == "unclear" or (outcome == "changed" and not forged)
        counts[f"{'forged' if forged else 'damaged'}: {outcome}"] += 1
        if wrong:
            counts["wrong"] += 1
            print(f"{outcome}: {draw['kind']}, {what}, {draw}: {said[:600]}", flush=True)

    one()
    return counts


def work(root: Path, mutants: int, number: int) -> Counter[str]:
    """``run`` in processes of their own: one that dies is reported, and the next goes on."""
    total: Counter[str] = Counter()
    chunk = 0
    while (left := mutants - sum(n for k, n in total.items() if ":" in k)) > 0:
        now, chunk = root / "now.json", chunk + 1
        command = [
            sys.executable,
            "-m",
            "scripts.experiments.fuzz_checkpoints",
            "--root",
            str(root),
        ]
        command += ["--mutants", str(min(left, 5000)), "--seed", str(number * 1000 + chunk)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        lines = done.stdout.splitlines()
        print(*(line for line in lines if not line.startswith(SUMMARY)), sep="\n", flush=True)
        found = [line for line in lines if line.startswith(SUMMARY)]
        if done.returncode == 0 and found:
            total += Counter(json.loads(found[-1][len(SUMMARY) :]))
            continue
        print(f"died with {done.returncode} at {now.read_text('utf-8')}", flush=True)
        total += Counter({"any: crashed or hung": 1, "wrong": 1})
        if chunk > 50:
            break
    return total


def _give_up(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def main() -> None:
    """Print the counts; exit with 1 if anything crashed, hung, loaded changed or was unclear."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mutants", type=int, default=2000, help="changed checkpoints to try")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--root", type=Path, help="originals, as the parent process wrote them")
    arguments = parser.parse_args()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    if arguments.root:
        signal.signal(signal.SIGALRM, _give_up)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        if "asan" not in os.environ.get("LD_PRELOAD", ""):  # which reserves terabytes of addresses
            resource.setrlimit(resource.RLIMIT_AS, (held + GIBIBYTES * 2**30,) * 2)
        counts = run(arguments.root, arguments.mutants, arguments.seed, arguments.root / "now.json")
        print(SUMMARY + json.dumps(counts))
        return
    with tempfile.TemporaryDirectory() as root:
        write_originals(Path(root))
        counts = work(Path(root), arguments.mutants, arguments.seed)
    print(SUMMARY + json.dumps(dict(sorted(counts.items()))))
    raise SystemExit(1 if counts["wrong"] else 0)


if __name__ == "__main__":
    main()
