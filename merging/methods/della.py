"""DELLA (arXiv 2406.11617): drop entries at random, the small ones of a row more often than the large ones.

The entries of a row of ``n`` are ranked by magnitude, ``k = 0`` for the smallest. An entry survives with
probability ``p_k = density - epsilon + 2 epsilon k / (n - 1)`` and is divided by it, so the expected task
vector is unchanged; mergekit instead multiplies the task so that its L1 norm stays (``compat: mergekit``).
``della_linear`` adds the results with the weights, ``della`` elects signs and averages what agrees.

Masks are keyed by seed, input and module. In KnOTS and Core Space a row is a singular direction.
"""

from __future__ import annotations

from merging.entrywise import Entrywise
from merging.sparsify import RankedRandom

della_linear = Entrywise(RankedRandom(), election=False)
della = Entrywise(RankedRandom(), election=True)
