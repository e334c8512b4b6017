"""mergekit's methods on the entries of one tensor, with its roundings, its epsilons and its zero rules.

Every function hands out the merged tensor flat, in the dtype of the work. Formulas: ``docs/mergekit.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merging.errors import MergeFailure
from merging.mergekit import sce, slerp, sparsify
from merging.mergekit.cuts import keep_band, keep_largest
from merging.mergekit.entries import DeltaMagnitudes, Entries, Rows, added, votes
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


Emit = Callable[[int, Tensor], None]
"""Takes finished entries from an index on, in the dtype of the work. Blocks come in order."""


def merge(work: Work, inputs: Sequence[Rows], emit: Emit) -> None:
    """Hand the output tensor to ``emit`` piece by piece. Raises ``mergekit_buffer`` where copies differ."""
    output = work.output
    if output.copy:
        emit(0, _copied(output, inputs))
        return
    entries = Entries.of(inputs, output.shape, TORCH[output.dtype])
    if output.base is not None and not work.deltas():
        for start, stop in entries.spans():
            emit(start, entries.rows(output.base, start, stop))
    elif entries.size:
        _METHODS.get(work.method.name, _family)(work, entries, emit)


def _copied(output: Output, inputs: Sequence[Rows]) -> Tensor:
    first = inputs[0].read(0, inputs[0].size).clone()
    if any(not torch.equal(rows.read(0, rows.size), first) for rows in inputs[1:]):
        raise MergeFailure(
            "mergekit_buffer",
            f"{output.name} is not made of real numbers to merge and differs between the models",
            remedy="Make it equal in all models.",
            where={"module": output.name},
        )
    return first


def _linear(work: Work, entries: Entries, emit: Emit) -> None:
    """The weighted sum in float32 (or float64), divided by the sum of the weights if normalised."""
    values = work.output.values
    dtype = torch.float64 if entries.dtype == torch.float64 else torch.float32
    weights = torch.tensor([each["weight"] for each in values.inputs], dtype=dtype)
    total = weights.sum() if values.shared["normalize"] else None
    for start, stop in entries.spans():
        found = torch.zeros(stop - start, dtype=dtype)
        for index, weight in enumerate(weights):
            found.addcmul_(entries.rows(index, start, stop), weight)
        if total is not None:
            found.div_(total)
        emit(start, found.to(entries.dtype))


def _passthrough(work: Work, entries: Entries, emit: Emit) -> None:
    """The only input, times ``scale`` if that is given."""
    scale = work.output.values.inputs[0]["scale"]
    for start, stop in entries.spans():
        rows = entries.rows(0, start, stop)
        emit(start, rows if scale is None else rows * scale)


def _slerp(work: Work, entries: Entries, emit: Emit) -> None:
    base = work.output.base
    assert base is not None
    dtype = torch.float64 if entries.dtype == torch.float64 else torch.float32
    t = torch.tensor(work.output.values.shared["t"], dtype=dtype)
    slerp.merge(t, entries, base, 1 - base, emit)


def _sce(work: Work, entries: Entries, emit: Emit) -> None:
    base = work.output.base
    assert base is not None
    sce.merge(entries, base, work.deltas(), work.output.values.shared["select_topk"], emit)


def _family(work: Work, entries: Entries, emit: Emit) -> None:
    """Sparsify the task vectors, weigh, add (or elect signs and add what agrees), divide, add to the base.

    Weights multiply before the election, a sum of zero elects plus, and the divisor is the sum of the
    weights of what agrees.
    """
    output, dtype = work.output, entries.dtype
    base, deltas, shared = output.base, work.deltas(), output.values.shared
    assert base is not None
    sparsifiers = prepared(work, entries)
    weights = torch.tensor([output.values.inputs[i]["weight"] for i in deltas], dtype=dtype).unsqueeze(1)
    plain = bool((weights == 1.0).all())
    total = weights.sum(0)
    total[total.abs() < 1e-8] = 1
    for start, stop in entries.spans():
        rows = entries.rows(base, start, stop)
        y = torch.empty((len(deltas), stop - start), dtype=dtype)
        for row, index in zip(y, deltas, strict=True):
            torch.sub(entries.rows(index, start, stop), rows, out=row)
            if index in sparsifiers:
                row.copy_(sparsifiers[index].apply(row, start))
        if not plain:
            y.mul_(weights)
        if work.method.election:
            mixed = _elected(y, weights, normalize=shared["normalize"])
        else:
            mixed = added(y).to(dtype)
            if shared["normalize"]:
                mixed.div_(total)
        if shared["lambda"] != 1.0:
            mixed.mul_(shared["lambda"])
        emit(start, mixed.add_(rows))


def _elected(y: Tensor, weights: Tensor, *, normalize: bool) -> Tensor:
    """``y`` is used up. Signs are turned so that what agrees is positive, which rounds the same."""
    dtype = y.dtype
    y = y.float() if dtype.itemsize == 2 else y
    sign = votes(added(y))
    agreeing = y.mul_(sign).clamp_min_(0.0)
    mixed = added(agreeing).mul_(sign).to(dtype)
    if not normalize:
        return mixed
    divisor = added(agreeing.gt_(0.0).mul_(weights.to(y.dtype))).to(dtype)
    return mixed.div_(divisor.add_(divisor.clone().eq_(0.0)))


def prepared(work: Work, entries: Entries) -> dict[int, Sparsifier]:
    """What drops entries of the task vectors, by input; inputs that stay whole have none."""
    method, base = work.method, work.output.base
    assert base is not None
    values = work.output.values.inputs
    sparse = [i for i in work.deltas() if method.sparsify is not None and values[i]["density"] < 1.0]
    kept = {i: int(values[i]["density"] * entries.size) for i in sparse}
    made: dict[int, Sparsifier] = {
        i: sparsify.Nothing(entries.dtype)
        for i in sparse
        if (kept[i] == 0 if method.sparsify == "band" else values[i]["density"] <= 0.0)
    }
    some = [i for i in sparse if i not in made]
    magnitudes = [DeltaMagnitudes(entries, i, base) for i in some]
    if method.sparsify == "magnitude" and some:
        cuts = keep_largest(magnitudes, [max(1, kept[i]) for i in some])
        made |= {i: sparsify.Largest(entries.dtype, cut) for i, cut in zip(some, cuts, strict=True)}
    elif method.sparsify == "band" and some:
        starts = [max(0, entries.size - kept[i] - int(values[i]["gamma"] * entries.size)) for i in some]
        ends = [(start, start + kept[i]) for start, i in zip(starts, some, strict=True)]
        bands = keep_band(magnitudes, ends)
        made |= {i: sparsify.Band(entries.dtype, *band) for i, band in zip(some, bands, strict=True)}
    for i in some:
        key, density = (work.seed, work.keys[i], work.output.name), values[i]["density"]
        if method.sparsify == "random":
            made[i] = sparsify.Random(entries.dtype, density, key)
        elif method.sparsify == "ranked_random":
            epsilon = values[i]["epsilon"]
            made[i] = sparsify.RankedRandom(entries.dtype, entries.width, density, epsilon, key)
    if work.output.values.shared["rescale"] and some:
        sparsify.match_l1(entries, base, {i: made[i] for i in some})
    return made


_METHODS = {"linear": _linear, "passthrough": _passthrough, "slerp": _slerp, "sce": _sce}
