"""Measuring models, and telling what was measured.

Imports ``config``, ``models``, ``decoding`` and below.

- ``perplexity``: of a causal LM, with the sentence that says how it was measured;
- ``classification``: what a sequence classifier says of texts;
- ``cost``: operations a token around the matrix products;
- ``integer_block``: a block of a packed model in integers alone;
- ``model_card``, ``versions``: the card of a run, and the packages it was made with.
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
