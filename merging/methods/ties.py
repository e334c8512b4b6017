"""TIES-Merging (arXiv 2306.01708): trim, elect sign, disjoint merge.

1. Trim: of each task keep the fraction ``density`` of entries with the largest magnitude.
2. Elect: per entry, the sign of the (weighted) sum over tasks.
3. Merge: the mean of the entries that have the elected sign; entries trimmed away count for nothing.

Default rules: ``int(density * N)`` entries per tensor with ties kept, zero sums vote +, weights multiply
the task vectors before the vote, the divisor is the number of agreeing tasks. ``compat`` changes these to
the peers' (docs/methods/ties.md). In Core Space and KnOTS the same rule acts on their coordinates.
"""

from __future__ import annotations

from merging.entrywise import Entrywise
from merging.sparsify import Magnitude

ties = Entrywise(Magnitude("inclusive"), election=True)
