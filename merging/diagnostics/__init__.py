"""Diagnostics before and after a merge, per module and for the whole model, without an ``m x n`` matrix.

``spectra``  figures of a spectrum; ``inputs``  the inputs among themselves; ``entries``  sampled signs;
``against``  the merged update against its inputs; ``facts``  all of it for a batch; ``telling`` and ``whole``
JSON data of a module and of the whole model.

What each number means and where it comes from: docs/diagnostics.md.
"""

from __future__ import annotations

from merging.diagnostics.facts import SAMPLE, Facts, measure

__all__ = ["SAMPLE", "Facts", "measure"]
