"""Content digests of the inputs of a dense merge for a caller who knows what is in their files. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from merging.dense.inputs import Resolve, open_model


def known_digests(
    names: Iterable[str], resolve: Resolve, sums: Mapping[str, Mapping[str, str]]
) -> dict[str, str]:
    """The digest of each named model by its reference; reads headers only.

    ``sums`` gives the sha256 (hex) of every file of an input, by the reference of the input and the path
    of the file in its folder. An input that it does not name is left out.
    """
    found: dict[str, str] = {}
    for name in names:
        if name not in sums or name in found:
            continue
        folder, known = resolve(name), sums[name]
        model = open_model(folder, name)
        try:
            found[name] = model.digest_by(lambda path: _sum(known, folder, path))  # noqa: B023 (called here)
        finally:
            model.close()
    return found


def _sum(known: Mapping[str, str], folder: Path, path: Path) -> str:
    return known[path.relative_to(folder).as_posix()]
