"""Model Breadcrumbs (arXiv 2312.06795): leave out the outliers and the noise of each task vector, then merge.

Of the ``N`` entries of a tensor the ``int(gamma N)`` largest in magnitude are left out, the next
``int(density N)`` stay, the rest is left out too; where both fractions exceed the whole, fewer of the largest
are left out. ``breadcrumbs`` adds the results with the weights, ``breadcrumbs_ties`` elects signs and
averages what agrees. Equal magnitudes at the ends of the band stay.

``trim_scope: row`` is the rule of the authors' code: the same per row, where ``int(gamma n) = 0`` leaves out
none of the largest. mergekit zeroes a whole tensor when ``int(gamma N) = 0``; here it is left out of nothing.
"""

from __future__ import annotations

from merging.entrywise import Entrywise
from merging.sparsify import Band

breadcrumbs = Entrywise(Band(), election=False)
breadcrumbs_ties = Entrywise(Band(), election=True)
