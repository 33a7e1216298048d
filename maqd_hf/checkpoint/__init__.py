"""What a saved model says of itself, and whether what was loaded is what was saved.

Imports ``config``, ``models`` and below.

- ``layout``: ``config.modules`` from a model, and the model's layers from ``config.modules``;
- ``integrity``: checksums, shapes, missing tensors;
- ``saving``: ``save_model``, all or nothing.
"""

from .saving import save_model

__all__ = ["save_model"]
