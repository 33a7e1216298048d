"""Text that the model writes itself, to train on where there is no other: data-free quantisation.

Not in the paper; as in LLM-QAT (arXiv:2305.17888), where sampling from the model's own distribution
served better than greedy text. Here the first token of every sample is drawn uniformly and all
others from the model as they are, without a temperature; a sample goes on after an end of text.

What it costs to have no text: SmolLM2-135M, 4 levels, groups of 64, calibrated on 8,192 tokens and
trained on 32,768, WikiText-2 / IMDB perplexity (float 32.3 / 47.9): 100.8 / 120.6 on its own text,
65.6 / 90.7 on text of the kinds measured. stories260K loses 0.12 nats the same way
(`scripts/experiments/ablations.py`), and 0.38 on Wikipedia, which it was not made for.
"""

from __future__ import annotations

import copy
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from .text import cut_blocks

GENERATED = "generated"


@torch.no_grad()
def generated_blocks(
    model: Any,
    tokens: int,
    block_size: int,
    *,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> Dataset:
    """``tokens`` tokens (rounded up to whole blocks) that ``model``, a causal LM, writes itself.

    The columns are those of ``tokenize_blocks``: ``input_ids`` and ``labels``, equal, each
    ``block_size`` integers. The same ``seed`` gives the same text on the same machine; the global
    random state is left as it was.

    Raises:
        ValueError: fewer than two tokens a block, none wanted, or a model that cannot generate.
    """
    if block_size < 2 or tokens < 1 or batch_size < 1:
        raise ValueError(
            f"block_size={block_size}, tokens={tokens}, batch_size={batch_size}: want at least "
            "2, 1 and 1"
        )
    if not getattr(model, "can_generate", lambda: False)():
        raise ValueError(f"{type(model).__name__} does not generate text: give a causal LM")
    settings = copy.deepcopy(model.generation_config)
    special = settings.eos_token_id
    settings.update(
        eos_token_id=None,
        max_length=None,
        max_new_tokens=block_size - 1,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    settings.pad_token_id = special[0] if isinstance(special, list) else special
    blocks = -(-tokens // block_size)
    rows: list[list[int]] = []
    own = model.generation_config
    model.generation_config = settings  # where generate() looks up what it is given as None
    try:
        with (
            torch.random.fork_rng(devices=[]),
            tqdm(total=blocks, desc="writing", unit="block", disable=not progress) as bar,
        ):
            torch.manual_seed(seed)
            while len(rows) < blocks:
                count = min(batch_size, blocks - len(rows))
                first = torch.randint(0, model.config.vocab_size, (count, 1)).to(model.device)
                written: Tensor = model.generate(first, attention_mask=torch.ones_like(first))
                rows += written.tolist()
                bar.update(count)
    finally:
        model.generation_config = own
    flat = pa.array([token for row in rows for token in row], pa.int32())
    return cut_blocks(flat, block_size)
