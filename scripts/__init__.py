"""Commands: the user's (the files here), benchmarks (``bench``), experiments (``experiments``).

The files are run as ``python scripts/qat_llm.py``, the packages' modules as
``python -m scripts.bench.quality``.
"""

from . import torch_environment  # noqa: F401  (before torch)
