"""The native decode step: one call of the compiled library a token.

Imports ``nn``, ``kernels`` and below.

- ``forward``: what stands in the place of ``model.forward``, and when it answers;
- ``families``: which models the library runs, and what their parts are called;
- ``cache``: keys and values of the library inside a cache of transformers.
"""

from .forward import attach_native, unsupported, use_native

__all__ = ["attach_native", "unsupported", "use_native"]
