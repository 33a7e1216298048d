"""How many forked children of a threaded process never answer: plain torch and packed layers.

    python -m scripts.experiments.forked_children --forks 300 --output forked.json

Three threads compute and end, the process forks, and the child computes the same in one thread. One
that has not answered after ``--patience`` seconds is counted as hung and killed. Linux and macOS
alone can fork.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM

from maqd_hf import MaQDConfig, pack_model, quantize_model, use_native
from maqd_hf.evaluation.model_card import markdown_table


@dataclass
class Arguments:
    """Command line."""

    forks: int = field(default=300, metadata={"help": "Children of every kind."})
    patience: float = field(default=5.0, metadata={"help": "Seconds until a child is given up."})
    output: Path | None = field(default=None, metadata={"help": "JSON file to write."})


def works() -> dict[str, Callable[[], Tensor]]:
    """What parents and children compute, by name."""
    torch.manual_seed(0)
    left, right = torch.randn(400, 64), torch.randn(64, 300)
    config = LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    config.num_attention_heads = config.num_key_value_heads = 4
    model = LlamaForCausalLM(config).eval()
    settings = MaQDConfig(weight_levels=16, embedding_levels=255, activation_scaling="token")
    quantize_model(model, settings)
    pack_model(model)
    ids = torch.randint(3, 300, (4, 100))

    def logits(native: bool) -> Tensor:
        use_native(model, native)
        return model(input_ids=ids).logits

    return {
        "a product of two matrices of plain torch": lambda: left @ right,
        "a packed model, native step": lambda: logits(True),
        "a packed model, its own forward": lambda: logits(False),
    }


def answered(child: int, patience: float) -> bool:
    """Whether a child ends in time with its parent's answer; one that does not is killed."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if status:
                raise SystemExit("A child computed something else than its parent.")
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def hung(work: Callable[[], Tensor], arguments: Arguments) -> int:
    """The number of children that never answer."""
    wanted, count = work(), 0
    for _ in range(arguments.forks):
        threads = [threading.Thread(target=torch.no_grad()(work)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            os._exit(0 if torch.equal(work(), wanted) else 1)
        count += not answered(child, arguments.patience)
    return count


@torch.no_grad()
def main(arguments: Arguments) -> dict[str, int]:
    """Count, print a table and write what was asked for."""
    torch.set_num_threads(2)
    counts = {name: hung(work, arguments) for name, work in works().items()}
    rows = [(name, f"{count} of {arguments.forks}") for name, count in counts.items()]
    print(markdown_table(("computed", "hung"), rows))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(counts, indent=1) + "\n")
    return counts


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    main(parsed)
