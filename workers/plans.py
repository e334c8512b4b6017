"""The files that a split merge is made of, alike for a recipe and for a mergekit configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from merging.recipe import Recipe
from service.sources import Sources
from service.work import Configuration, Work

if TYPE_CHECKING:
    from merging.dense.plan import DensePlan
    from merging.dense.runner import ShardResult
    from merging.formats.tensor_set import TensorSet
    from merging.mergekit.plan import MergekitPlan

Resolve = Callable[[str], Path]
Tick = Callable[[str], None]


class Files(Protocol):
    """A planned merge, to be made file by file in several processes.

    ``key`` says everything that decides the bytes of the files, ``sizes`` how many tensors each of them has,
    ``nbytes`` how large they are together, ``steps`` how many tensors the passes over the whole model visit
    before, and ``final`` whether the files are those of the result.
    """

    @property
    def key(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def sizes(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def steps(self) -> int: ...

    @property
    def final(self) -> bool: ...

    def settle(self, threads: int, tick: Tick) -> dict[str, Any]:
        """Make the passes; what they found, JSON-able."""
        ...

    def inputs(self, index: int) -> list[tuple[str, str]]:
        """The weight files that a file is made of: reference of the model and path, each once."""
        ...

    def make(
        self, index: int, out: Path, settled: dict[str, Any], threads: int, tick: Tick
    ) -> ShardResult: ...

    def finish(
        self, parts: Sequence[ShardResult], out: Path, settled: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Complete the folder; the report and the sha256 of every file."""
        ...


@contextmanager
def planned(tenant: str, work: Work, sources: Sources, find: Resolve, shard_bytes: int) -> Iterator[Files]:
    """The plan of a merge of whole models; the digests of the inputs are those of their uploads."""
    from merging.dense.sums import known_digests

    sums = known_digests(_models(work), find, sources.sums(tenant, work))
    if isinstance(work, Configuration):
        from merging.mergekit.plan import prepare

        with prepare(work.document, resolve=find, shard_bytes=shard_bytes, sums=sums) as plan:
            yield _MergekitFiles(plan)
        return
    from merging.dense.plan import prepare_dense

    with prepare_dense(work, resolve=find, shard_bytes=shard_bytes, sums=sums) as dense:
        yield _DenseFiles(dense)


def can_be_split(work: Work, find: Resolve) -> bool:
    """Whether a merge is one of whole models."""
    from merging.dense.inputs import wants_dense

    return isinstance(work, Configuration) or wants_dense(work, find)


def _models(work: Work) -> list[str]:
    if isinstance(work, Recipe):
        return [*(entry.model for entry in work.models), *([work.base_model] if work.base_model else [])]
    return list(work.references().values())


class _DenseFiles:
    """A recipe for whole models."""

    def __init__(self, plan: DensePlan) -> None:
        from merging.dense.resume import attempt_key
        from merging.dense.runner import DenseRunner

        self._plan = plan
        self.key = attempt_key(plan)
        self.digest = plan.digest
        self.sizes = tuple(len(shard.jobs) for shard in plan.shards)
        self.nbytes = sum(shard.nbytes for shard in plan.shards)
        merged = sum(1 for job in plan.jobs if job.inputs)
        self.steps = (DenseRunner(plan).passes - 1) * merged
        self.final = plan.recipe.output.format != "lora"  # whose shards are put together

    def settle(self, threads: int, tick: Tick) -> dict[str, Any]:
        from merging.dense.runner import DenseRunner
        from merging.execute import single_threaded

        with single_threaded():
            return DenseRunner(self._plan, threads=threads, tick=tick).settle().to_dict()

    def inputs(self, index: int) -> list[tuple[str, str]]:
        from merging.formats.tensor_set import TensorSet

        plan = self._plan
        found: dict[tuple[str, str], None] = {}
        for job in plan.shards[index].jobs:
            for entry in job.inputs:
                model = plan.models[entry.model]
                if isinstance(model, TensorSet):
                    found[_home(model, entry.key)] = None
            if job.in_base and plan.base is not None:
                found[_home(plan.base, job.name)] = None
        return list(found)

    def make(self, index: int, out: Path, settled: dict[str, Any], threads: int, tick: Tick) -> ShardResult:
        from merging.dense.runner import DenseRunner
        from merging.dense.settled import Settled
        from merging.execute import single_threaded

        with single_threaded():
            runner = DenseRunner(self._plan, threads=threads, tick=tick)
            return runner.merge_shard(self._plan.shards[index], out, Settled.of(settled))

    def finish(
        self, parts: Sequence[ShardResult], out: Path, settled: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        from merging.dense.finish import finalise
        from merging.dense.settled import Settled

        return finalise(self._plan, parts, out, settled=Settled.of(settled))


class _MergekitFiles:
    """A mergekit configuration. No method of mergekit looks at a whole model first."""

    steps = 0
    final = True

    def __init__(self, plan: MergekitPlan) -> None:
        from merging.mergekit.merge import attempt_key

        self._plan = plan
        self.key = attempt_key(plan)
        self.digest = plan.digest
        self.sizes = tuple(len(shard.outputs) for shard in plan.shards)
        self.nbytes = sum(shard.nbytes for shard in plan.shards)

    def settle(self, threads: int, tick: Tick) -> dict[str, Any]:
        return {}

    def inputs(self, index: int) -> list[tuple[str, str]]:
        models: Mapping[str, TensorSet] = self._plan.models
        found = [
            _home(models[item.model], item.tensor)
            for output in self._plan.shards[index].outputs
            for item in output.inputs
        ]
        return list(dict.fromkeys(found))

    def make(self, index: int, out: Path, settled: dict[str, Any], threads: int, tick: Tick) -> ShardResult:
        from merging.execute import single_threaded
        from merging.mergekit.run import merge_shard

        with single_threaded():
            return merge_shard(self._plan, self._plan.shards[index], out, threads=threads, tick=tick)

    def finish(
        self, parts: Sequence[ShardResult], out: Path, settled: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        from merging.mergekit.finish import finish

        return finish(self._plan, parts, out)


def _home(model: TensorSet, tensor: str) -> tuple[str, str]:
    return model.label, model.file_of(tensor)
