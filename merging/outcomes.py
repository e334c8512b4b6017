"""What comes out of a batch: the merged updates cut into modules, each measured against its inputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from merging.diagnostics import SAMPLE, Facts, measure
from merging.lowrank import ThinSVD
from merging.updates import LowRank, UpdateStack


@dataclass(frozen=True)
class Outcome:
    """The merged update of one module and how it relates to the inputs.

    ``B (m, r)`` and ``A (r, n)`` are on the CPU, unscaled by ``lambda``; ``None`` stands for an identity.
    ``input_norms``, ``inner`` (with the merged update) are per task of ``tasks``, in float64. ``facts`` holds
    the diagnostics.
    """

    name: str
    tasks: tuple[int, ...]
    ranks: tuple[int, ...]
    m: int
    n: int
    rank: int
    B: Tensor | None
    A: Tensor | None
    norm: float
    discarded: float
    input_norms: tuple[float, ...]
    inner: tuple[float, ...]
    facts: Facts


@dataclass(frozen=True)
class Split:
    """A module of a multi-output merge: one outcome per task, and what is kept beside the adapters.

    ``facts`` are numbers of the module; those per task stand in a tuple in the order of ``outcomes``.
    ``inputs`` are the diagnostics of the inputs among themselves.
    """

    name: str
    outcomes: tuple[Outcome, ...]
    artefact: dict[str, Tensor]
    facts: dict[str, float | tuple[float, ...]]
    inputs: Facts


def outcomes(
    stack: UpdateStack,
    update: LowRank,
    ranks: Tensor,
    discarded: Tensor,
    *,
    seed: int,
    svd: ThinSVD | None = None,
    weights: Tensor | None = None,
    sample: int = SAMPLE,
) -> list[Outcome]:
    """Cut a batch into modules and measure each against its inputs.

    ``svd`` as in :class:`Compressed`, ``weights`` as in :class:`Merged`.
    """
    measured = measure(stack, update, svd=svd, weights=weights, seed=seed, sample=sample)
    B = None if update.B is None else update.B.cpu()
    A = None if update.A is None else update.A.cpu()
    found = []
    for g, (name, facts) in enumerate(zip(stack.names, measured, strict=True)):
        rank = int(ranks[g])
        assert facts.merged is not None
        found.append(
            Outcome(
                name=name,
                tasks=stack.tasks,
                ranks=stack.ranks,
                m=stack.m,
                n=stack.n,
                rank=rank,
                B=None if B is None else B[g, :, :rank],
                A=None if A is None else A[g, :rank],
                norm=float(facts.merged.norm2.sqrt()),
                discarded=float(discarded[g]),
                input_norms=tuple(facts.inputs.gram.diagonal().clamp_min(0.0).sqrt().tolist()),
                inner=tuple(facts.merged.products.tolist()),
                facts=facts,
            )
        )
    return found
