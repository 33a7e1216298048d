"""The native decode step: one call of the compiled library a token.

Imports ``nn``, ``kernels`` and below.

- ``forward``: what stands in the place of ``model.forward``;
- ``families``: which models the library runs, and where they keep their parts;
- ``identity``: whether a model runs the installed code alone;
- ``plan``: what the library is given of a model, every number checked against the others;
- ``snapshot``: whether the model has changed since;
- ``call``: the calls that the library answers;
- ``answer``: its answers, and whether the model itself gives the same;
- ``cache``: keys and values of the library inside a cache of transformers.
"""

from .forward import attach_native, unsupported, use_native

__all__ = ["attach_native", "unsupported", "use_native"]
