"""Magnitude pruning: keep the largest entries of each task vector, then add them up.

``delta = sum_t w_t trim(delta_t, density)``, entry by entry; the baseline of DARE (arXiv 2311.03099).
"""

from __future__ import annotations

from merging.entrywise import Entrywise
from merging.sparsify import Magnitude

magnitude_prune = Entrywise(Magnitude("complement"), election=False)
