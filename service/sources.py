"""From the model references of a recipe to folders: pinned when a merge is requested, placed when it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from merging.errors import InputError
from merging.recipe import Recipe
from service.documents import MergeRecord, result_key
from service.errors import NotFound
from service.jobs import Jobs
from service.names import RESULTS, Reference, parse_reference
from service.registry import NO_WEIGHTS, Registry
from service.remote.imports import Imported, bring, renamed
from service.remote.references import Hubs, is_remote
from service.storage import Storage


class Sources:
    """What a recipe may name: revisions of the registry, and results of merges as ``merges/<id>``."""

    def __init__(
        self,
        registry: Registry,
        jobs: Jobs,
        storage: Storage,
        hubs: Hubs = Hubs(()),  # noqa: B008 (immutable)
        *,
        import_limit: int = 0,
    ) -> None:
        self._registry = registry
        self._jobs = jobs
        self._storage = storage
        self._hubs = hubs
        self._import_limit = import_limit

    def pin(self, tenant: str, recipe: Recipe) -> Recipe:
        """The recipe with every model reference made exact, so that later commits do not change it.

        Raises ``model_reference_invalid``, ``model_not_found``, ``revision_not_found``,
        ``merge_not_succeeded``.
        """
        pinned: dict[str, str] = {}
        for index, entry in enumerate(recipe.models):
            if entry.model not in pinned:
                pinned[entry.model] = self._pin(tenant, entry.model, f"models[{index}].model")
        return renamed(recipe, pinned)

    def _pin(self, tenant: str, text: str, field: str) -> str:
        where = {"field": field, "model": text}
        if is_remote(text):  # its commit is looked up by the worker
            return str(self._hubs.find(text, field=field))
        reference = parse_reference(text)
        if reference is None:
            raise InputError(
                "model_reference_invalid",
                f"{field}: {text!r} is not a model of this service",
                remedy="Upload it and name it ns/name[@revision], or name hf://org/name; local paths are for "
                "`merganser merge`",
                where=where,
            )
        try:
            if reference.ns == RESULTS:
                self._result(tenant, reference)
                return reference.model
            manifest = self._registry.manifest(tenant, reference)
        except NotFound as error:
            raise InputError(error.code, f"{field}: {error.message}", where=where) from error
        if manifest.format == NO_WEIGHTS:
            raise InputError(
                "model_has_no_weights",
                f"{field}: {manifest.model} holds no weights in the revision {manifest.revision}",
                remedy="Upload the adapter, or name a revision that has it",
                where=where,
            )
        return f"{manifest.model}@{manifest.revision}"

    def bring(self, recipe: Recipe, folder: Path, tick: Callable[[str], None]) -> Imported:
        """Download what lies on other hubs; for workers, never for requests. See :func:`imports.bring`."""
        return bring(recipe, self._hubs, folder, limit=self._import_limit, tick=tick)

    def place(
        self, tenant: str, recipe: Recipe, folder: Path, imported: Mapping[str, Path] = MappingProxyType({})
    ) -> Callable[[str], Path]:
        """Bring the inputs of a recipe into ``folder``; returns the function that finds each of them.

        The files are read-only. What was imported is where it is. Raises ``model_not_found`` for an input
        that is gone.
        """
        placed: dict[str, Path] = dict(imported)
        for entry in recipe.models:
            if entry.model in placed:
                continue
            reference = parse_reference(entry.model)
            if reference is None:
                raise _unknown(entry.model)
            target = folder / str(reference)  # what an error says of it is then readable
            target.mkdir(parents=True)
            self._place(tenant, reference, target)
            placed[entry.model] = target

        def find(reference: str) -> Path:
            if reference not in placed:
                raise _unknown(reference)
            return placed[reference]

        return find

    def _place(self, tenant: str, reference: Reference, target: Path) -> None:
        if reference.ns != RESULTS:
            self._registry.place(tenant, self._registry.manifest(tenant, reference), target)
            return
        record = self._result(tenant, reference)
        assert record.result is not None
        for entry in record.result.files:
            key = result_key(tenant, record.id, record.result.attempt, entry.path)
            self._storage.fetch(key, target / entry.path)

    def _result(self, tenant: str, reference: Reference) -> MergeRecord:
        record = self._jobs.find(tenant, reference.name)
        if record is None:
            raise NotFound("model_not_found", f"there is no merge {reference.name}")
        if record.result is None:
            raise InputError(
                "merge_not_succeeded",
                f"the merge {reference.name} has no result; its state is {record.state}",
                where={"model": reference.model},
            )
        return record


def _unknown(reference: str) -> InputError:
    return InputError(
        "model_not_found", f"there is no model {reference!r} in this service", where={"model": reference}
    )
