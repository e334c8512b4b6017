"""DARE (arXiv 2311.03099): drop entries at random and rescale the rest.

Each entry of a task vector survives with probability ``density`` and is multiplied by ``1 / density``, so
the expected task vector is unchanged. ``dare_linear`` adds the results with the weights; ``dare_ties``
elects signs and averages the entries that agree, as TIES does after its trimming.
"""

from __future__ import annotations

from merging.entrywise import Entrywise
from merging.sparsify import Random

dare_linear = Entrywise(Random(), election=False)
dare_ties = Entrywise(Random(), election=True)
