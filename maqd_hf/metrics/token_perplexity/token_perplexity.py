"""Perplexity over tokens as an `evaluate` measurement: sum of NLL over sum of tokens.

The Hub's own ``perplexity`` averages the perplexities of texts and takes only a model id; this one
takes a model in memory, float or packed, and says in its result what was measured.

`evaluate` reads the imports of this file line by line, so keep each on one line.
"""

from typing import Any

import datasets
import evaluate
from transformers import AutoModelForCausalLM, AutoTokenizer

import maqd_hf  # noqa: F401  registers the quantized models with transformers
from maqd_hf.evaluation.perplexity import text_perplexity

_DESCRIPTION = "Perplexity of a causal language model: exp(sum of NLL / number of tokens)."
_INPUTS = """
Args:
    predictions: list of texts.
    model: a causal LM in memory, or an id or folder for from_pretrained.
    tokenizer: the model's tokenizer; None loads it from the id or folder.
    window: positions per window, 512 by default.
    stride: tokens between the starts of windows; None is the window (disjoint windows).
    batch_size: windows per forward pass.
    add_bos: start each window with BOS; None does what the tokenizer does.
    join: put between texts; None scores each text on its own.
    max_windows: score no more than so many windows.
    device: where a model given by id or folder is put; None leaves it where it was loaded.
Returns:
    perplexity, nll_sum, tokens, bits_per_byte, tokens_per_second, and protocol: one sentence that
    says what was measured.
"""


class TokenPerplexity(evaluate.Measurement):
    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(
        self,
        predictions: list[str],
        model: Any = None,
        tokenizer: Any = None,
        window: int = 512,
        stride: int | None = None,
        batch_size: int = 1,
        add_bos: bool | None = None,
        join: str | None = "\n\n",
        max_windows: int | None = None,
        device: str | None = None,
    ) -> dict[str, Any]:
        if model is None:
            raise ValueError("Pass model=: a causal LM in memory, or its id or folder.")
        if isinstance(model, str):
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
            model = AutoModelForCausalLM.from_pretrained(model)
            if device is not None:
                model.to(device)
        if tokenizer is None:
            raise ValueError("Pass tokenizer=: it cannot be found from a model in memory.")
        result = text_perplexity(
            model,
            tokenizer,
            predictions,
            window,
            stride,
            join=join,
            add_bos=add_bos,
            batch_size=batch_size,
            max_windows=max_windows,
            progress=True,
        )
        return {
            "perplexity": result.perplexity,
            "nll_sum": result.nll_sum,
            "tokens": result.tokens,
            "bits_per_byte": result.bits_per_byte,
            "tokens_per_second": result.tokens_per_second,
            "protocol": result.protocol,
        }
