"""What becomes of a changed checkpoint: refused, loaded as it was, or loaded as something else."""

from __future__ import annotations

import faulthandler
import os
import re
import traceback
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from .originals import IDS

SECONDS = 20
"""What one checkpoint may take to be refused or loaded; a process that takes longer is ended."""

_OURS = f"{os.sep}maqd_hf{os.sep}"
_FILE = re.compile(r"\.json|\.safetensors")
_FIELD = re.compile(r"\w+=|\w+\.\w+|'[^']+'")
_MEMORY = re.compile(r"(?i)not enough memory|allocate memory|out of memory")

State = tuple[dict[str, Tensor], Tensor]


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


def refusal(error: Exception, loaded: bool) -> str:
    """What an error is: "refused" by a clear sentence, "refused elsewhere", "unclear" or "memory".

    While a file is loaded every error below this package is its own affair, but for the loader of
    transformers in our wrapper. Once a model is ``loaded``, its own forward may run inside ours,
    and fails as it would alone.
    """
    said = str(error)
    if isinstance(error, MemoryError) or _MEMORY.search(said):
        return "memory"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame.name for frame in frames if _OURS in frame.filename]
    if _OURS not in frames[-1].filename:
        below = not loaded and set(ours) - {"_load_pretrained_model"}
        return "unclear" if below else "refused elsewhere"
    clear = isinstance(error, (ValueError, OSError)) and _FILE.search(said) and _FIELD.search(said)
    return "refused" if clear else "unclear"


def attempt(folder: Path, wanted: State) -> tuple[str, str]:
    """What became of loading ``folder``, and the words of an error."""
    loaded = False
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
        model = load(folder)
        loaded = True
        found = state(model)
    except Exception as error:
        return refusal(error, loaded), f"{type(error).__name__}: {error}"
    finally:
        faulthandler.cancel_dump_traceback_later()
    return ("same" if equal(found, wanted) else "changed"), ""
