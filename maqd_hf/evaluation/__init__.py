"""Measurements of models, and cards that say what was measured.

Imports ``config``, ``models``, ``decoding`` and below.

- ``perplexity``: the perplexity of a causal LM, with the sentence that says how it was measured;
- ``classification``: the classes that a sequence classifier gives to texts;
- ``cost``: the operations of a token around the matrix products;
- ``integer_block``: half a block of a packed model, run in integers alone;
- ``model_card``, ``run_report``, ``versions``: the card of a run, its plot and closing table, the
  packages it was made with.
"""

from .classification import classify
from .cost import inference_cost
from .perplexity import PerplexityResult, text_perplexity, token_perplexity

__all__ = [
    "PerplexityResult",
    "classify",
    "inference_cost",
    "text_perplexity",
    "token_perplexity",
]
