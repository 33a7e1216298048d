"""What a saved model says of itself, and whether what was loaded is what was saved.

Imports ``config``, ``models`` and below.

- ``layout``: ``config.modules`` from a model, and the model's layers from ``config.modules``;
- ``files``, ``digest``: which files there are, and sums of all they hold;
- ``integrity``, ``version1``: the checks of a loader, and those of the format before this one;
- ``saving``, ``switching``: ``save_model``, all or nothing, and the step from old to new.
"""

from .saving import save_model

__all__ = ["save_model"]
