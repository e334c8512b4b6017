"""mergekit's methods on the entries of one tensor, with its roundings, its epsilons and its zero rules.

Every function gives the merged tensor flat, in the dtype of the work. Formulas: ``docs/mergekit.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merging.errors import MergeFailure
from merging.mergekit import sce, slerp, sparsify
from merging.mergekit.entries import Entries
from merging.mergekit.methods import MergekitMethod
from merging.mergekit.schedule import Output
from merging.mergekit.sparsify import Sparsifier

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class Work:
    """One tensor to merge: its row of the schedule, its method, seed and the keys of its inputs' content."""

    output: Output
    method: MergekitMethod
    seed: int
    keys: tuple[str, ...]

    def deltas(self) -> list[int]:
        """The inputs that are not the base."""
        return [i for i in range(len(self.output.inputs)) if i != self.output.base]


def merge(work: Work, tensors: Sequence[Tensor]) -> Tensor:
    """The output tensor, in its dtype and shape. Raises ``mergekit_buffer`` if inputs to copy differ."""
    output = work.output
    if output.copy:
        return _copied(output, tensors)
    entries = Entries.of(tensors, TORCH[output.dtype])
    merged = torch.empty(entries.size, dtype=TORCH[output.out_dtype])
    if entries.size:
        _METHODS.get(work.method.name, _family)(work, entries, merged)
    return merged.view(output.shape)


def _copied(output: Output, tensors: Sequence[Tensor]) -> Tensor:
    if any(not torch.equal(tensor, tensors[0]) for tensor in tensors[1:]):
        raise MergeFailure(
            "mergekit_buffer",
            f"{output.name} is not made of real numbers to merge and differs between the models",
            remedy="Make it equal in all models.",
            where={"module": output.name},
        )
    return tensors[0].clone()


def _linear(work: Work, entries: Entries, merged: Tensor) -> None:
    """The weighted sum in float32 (or float64), divided by the sum of the weights if normalised."""
    values = work.output.values
    dtype = torch.float64 if entries.dtype == torch.float64 else torch.float32
    weights = torch.tensor([each["weight"] for each in values.inputs], dtype=torch.float32).to(dtype)
    if entries.dtype == torch.float64:
        weights = torch.tensor([each["weight"] for each in values.inputs], dtype=dtype)
    total = weights.sum() if values.shared["normalize"] else None
    for start, stop in entries.spans():
        found = torch.zeros(stop - start, dtype=dtype)
        for index, weight in enumerate(weights):
            found.addcmul_(entries.rows(index, start, stop), weight)
        if total is not None:
            found.div_(total)
        merged[start:stop] = found.to(entries.dtype)


def _passthrough(work: Work, entries: Entries, merged: Tensor) -> None:
    """The only input, times ``scale`` if that is given."""
    scale = work.output.values.inputs[0]["scale"]
    for start, stop in entries.spans():
        rows = entries.rows(0, start, stop)
        merged[start:stop] = rows if scale is None else rows * scale


def _slerp(work: Work, entries: Entries, merged: Tensor) -> None:
    base = work.output.base
    assert base is not None
    t = torch.tensor(work.output.values.shared["t"], dtype=torch.float32)
    slerp.merge(t, entries, base, 1 - base, merged)


def _sce(work: Work, entries: Entries, merged: Tensor) -> None:
    base = work.output.base
    assert base is not None
    sce.merge(entries, base, work.deltas(), work.output.values.shared["select_topk"], merged)


def _family(work: Work, entries: Entries, merged: Tensor) -> None:
    """Sparsify each task vector, weigh, add (or elect signs and add what agrees), divide, add to the base.

    Weights multiply before the election, a sum of zero elects plus, and the divisor is the sum of the
    weights of what agrees.
    """
    output, dtype = work.output, entries.dtype
    base, deltas, shared = output.base, work.deltas(), output.values.shared
    assert base is not None
    if not deltas:
        for start, stop in entries.spans():
            merged[start:stop] = entries.rows(base, start, stop)
        return
    sparsifiers = [sparsifier(work, entries, index) for index in deltas]
    weights = torch.tensor([output.values.inputs[i]["weight"] for i in deltas], dtype=dtype).unsqueeze(1)
    plain = bool((weights == 1.0).all())
    total = weights.sum(0)
    total[total.abs() < 1e-8] = 1
    for start, stop in entries.spans():
        rows = entries.rows(base, start, stop)
        y = torch.empty((len(deltas), stop - start), dtype=dtype)
        for row, index, sparse in zip(y, deltas, sparsifiers, strict=True):
            torch.sub(entries.rows(index, start, stop), rows, out=row)
            if sparse is not None:
                row.copy_(sparse.apply(row, start))
        if not plain:
            y.mul_(weights)
        if work.method.election:
            mixed = _elected(y, weights, normalize=shared["normalize"])
        else:
            mixed = y.sum(0)
            if shared["normalize"]:
                mixed.div_(total)
        if shared["lambda"] != 1.0:
            mixed.mul_(shared["lambda"])
        merged[start:stop] = mixed.add_(rows)


def _elected(y: Tensor, weights: Tensor, *, normalize: bool) -> Tensor:
    positive = y.sum(0).ge_(0.0)
    agree = torch.where(positive.bool(), y > 0, y < 0).to(y.dtype)
    mixed = (y * agree).sum(0)
    if not normalize:
        return mixed
    divisor = agree.mul_(weights).sum(0)
    return mixed.div_(divisor.masked_fill_(divisor == 0, 1))


def sparsifier(work: Work, entries: Entries, index: int) -> Sparsifier | None:
    """What drops entries of one task vector; ``None`` where everything stays."""
    method, values = work.method, work.output.values.inputs[index]
    base, density, size = work.output.base, values["density"], entries.size
    assert base is not None
    if method.sparsify is None or density >= 1.0:
        return None
    key = (work.seed, work.keys[index], work.output.name)
    made: Sparsifier
    if method.sparsify == "band":
        kept = int(density * size)
        start = max(0, size - kept - int(values["gamma"] * size))
        if kept == 0:
            return sparsify.Nothing(entries.dtype)
        made = sparsify.Band(entries, index, base, start, start + kept)
    elif density <= 0.0:
        return sparsify.Nothing(entries.dtype)
    elif method.sparsify == "magnitude":
        made = sparsify.Largest(entries, index, base, max(1, int(density * size)))
    elif method.sparsify == "random":
        made = sparsify.Random(entries, density, key)
    else:
        made = sparsify.RankedRandom(entries, density, values["epsilon"], key)
    return made.match_l1(entries, index, base) if work.output.values.shared["rescale"] else made


_METHODS = {"linear": _linear, "passthrough": _passthrough, "slerp": _slerp, "sce": _sce}
