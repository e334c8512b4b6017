"""Models of the Hub in merges on this machine: the recipe is pinned to the commits of its references."""

from __future__ import annotations

import re

from merging.hub import snapshot
from merging.recipe import Recipe
from service.remote.imports import remote_models, renamed
from service.remote.references import COMMIT_PATTERN


def pinned_by_cache(recipe: Recipe) -> Recipe:
    """The recipe with ``hf://org/name@<commit>`` for each model of the Hub, which is downloaded by this.

    The client library keeps a snapshot in a folder named after its commit, so that what is in the cache can
    be pinned without a network. Raises the errors of :func:`merging.hub.snapshot`.
    """
    names = {}
    for text in remote_models(recipe):
        folder = snapshot(text)
        if re.match(COMMIT_PATTERN, folder.name):
            names[text] = f"{text.partition('@')[0]}@{folder.name}"
    return renamed(recipe, names)
