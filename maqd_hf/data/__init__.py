"""Text and models to work on. Imports nothing of this package.

- ``text``: rows of text, labeled or not, from files, folders, the Hub or packages, and blocks of
  tokens that are cut from them;
- ``bundled``: models and text that come inside ordinary packages;
- ``self_written``: text that the float model writes itself.
"""

from .bundled import resolve_model
from .self_written import generated_blocks
from .text import load_labeled, load_text, spread_samples, tokenize_blocks

__all__ = [
    "generated_blocks",
    "load_labeled",
    "load_text",
    "resolve_model",
    "spread_samples",
    "tokenize_blocks",
]
