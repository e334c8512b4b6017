"""From the model references of a recipe to folders: pinned when a merge is requested, placed when it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from merging.calibration.references import data_references
from merging.errors import InputError
from merging.mergekit.detect import claims
from merging.recipe import Recipe
from service.data_uploads import looks_at_data, starts_from_nothing
from service.documents import FileEntry, MergeRecord, result_key
from service.errors import NotFound
from service.jobs import Jobs
from service.names import RESULTS, Reference, parse_reference
from service.outlines import DENSE
from service.registry import NO_WEIGHTS, Registry
from service.remote.imports import Imported, bring, renamed
from service.remote.references import Hubs, is_remote
from service.storage import Storage
from service.work import Configuration, Work, output_format


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

    def read(self, tenant: str, document: Mapping[str, Any]) -> Work:
        """The recipe or the mergekit configuration that a document is. Raises their errors."""
        if claims(document, lambda model: self._is_checkpoint(tenant, model)):
            return Configuration.read(document)
        return Recipe.load(document)

    def _is_checkpoint(self, tenant: str, text: str) -> bool:
        reference = parse_reference(text)
        if reference is None:
            return False
        try:
            if reference.ns == RESULTS:
                return output_format(self._result(tenant, reference).recipe) == "checkpoint"
            return self._registry.manifest(tenant, reference).format == "checkpoint"
        except (InputError, NotFound):
            return False  # whoever pins it says what is wrong

    def pin_configuration(self, tenant: str, configuration: Configuration) -> Configuration:
        """The same as :meth:`pin`. Raises its errors, and ``mergekit_remote_model``."""
        names: dict[str, str] = {}
        for field, text in configuration.references().items():
            if is_remote(text):
                raise InputError(
                    "mergekit_remote_model",
                    f"{field}: models of mergekit configurations are not brought from other hubs",
                    remedy="Upload it and name it ns/name[@revision], or use `merganser merge`",
                    where={"field": field, "model": text},
                )
            if text not in names:
                names[text] = self._pin(tenant, text, field)
        return configuration.renamed(names)

    def pin(self, tenant: str, recipe: Recipe) -> Recipe:
        """The recipe with every model reference made exact, so that later commits do not change it.

        Raises ``model_reference_invalid``, ``model_not_found``, ``revision_not_found``,
        ``merge_not_succeeded``.
        """
        pinned: dict[str, str] = {}
        for index, entry in enumerate(recipe.models):
            if entry.model not in pinned and not starts_from_nothing(recipe):
                pinned[entry.model] = self._pin(tenant, entry.model, f"models[{index}].model")
        base = self._pin_base(tenant, recipe, list(pinned.values()))
        data = {text: self._pin_data(tenant, text, field) for field, text in data_references(recipe).items()}
        return renamed(recipe, {**pinned, **base, **data})

    def _pin_data(self, tenant: str, text: str, field: str) -> str:
        if is_remote(text):
            raise InputError(
                "model_reference_invalid",
                f"{field}: samples, statistics and heads are not brought from other hubs",
                remedy="Upload them and name them ns/name[@revision]",
                where={"field": field, "model": text},
            )
        return self._pin(tenant, text, field)

    def _pin_base(self, tenant: str, recipe: Recipe, models: list[str]) -> dict[str, str]:
        """The base model, where the merge reads it. For adapters it is only a name and stays as it is."""
        base = recipe.base_model
        if base is None:
            return {}
        if is_remote(base):
            return {base: str(self._hubs.find(base, field="base_model"))}
        if not self._reads_base(tenant, recipe, models):
            return {}
        return {base: self._pin(tenant, base, "base_model")}

    def _reads_base(self, tenant: str, recipe: Recipe, models: list[str]) -> bool:
        """Whether a merge of these pinned models reads the base, which then is one of this service."""
        if parse_reference(recipe.base_model or "") is None:
            return False
        reads = recipe.output.format == "checkpoint" or looks_at_data(recipe)
        return reads or any(self._is_whole(tenant, model) for model in models)

    def _is_whole(self, tenant: str, pinned: str) -> bool:
        reference = parse_reference(pinned)
        if reference is None:
            return False
        if reference.ns == RESULTS:
            return output_format(self._result(tenant, reference).recipe) != "lora"
        return self._registry.manifest(tenant, reference).format in DENSE

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

    def bring(self, tenant: str, recipe: Recipe, folder: Path, tick: Callable[[str], None]) -> Imported:
        """Download what lies on other hubs; for workers, never for requests. See :func:`imports.bring`."""

        def demand(size: int) -> None:
            self._storage.demand_scratch(folder.parent, size)

        return bring(tenant, recipe, self._hubs, folder, limit=self._import_limit, tick=tick, demand=demand)

    def place(
        self,
        tenant: str,
        work: Work,
        folder: Path,
        imported: Mapping[str, Path] = MappingProxyType({}),
        *,
        outlines: bool = False,
    ) -> Callable[[str], Path]:
        """Bring the inputs of a merge into ``folder``; returns the function that finds each of them.

        The files are read-only. What was imported is where it is. With ``outlines`` the weights of whole
        models may be there by their headers only. Raises ``model_not_found`` for an input that is gone.
        """
        placed: dict[str, Path] = dict(imported)
        for name in self._named(tenant, work):
            if name in placed:
                continue
            reference = parse_reference(name)
            if reference is None:
                raise _unknown(name)
            target = folder / str(reference)  # what an error says of it is then readable
            target.mkdir(parents=True)
            self._place(tenant, reference, target, outlines=outlines)
            placed[name] = target

        def find(reference: str) -> Path:
            if reference not in placed:
                raise _unknown(reference)
            return placed[reference]

        return find

    def _named(self, tenant: str, recipe: Work) -> list[str]:
        """The references to be placed: the models, the base where it is read, and data."""
        if isinstance(recipe, Configuration):
            return list(recipe.references().values())
        models = [] if starts_from_nothing(recipe) else [entry.model for entry in recipe.models]
        base = parse_reference(recipe.base_model or "")
        # a pinned one is read; the result of a merge has no revision to tell by
        read = base is not None and (base.revision or self._reads_base(tenant, recipe, models))
        return [*models, *([str(base)] if read else []), *data_references(recipe).values()]

    def sums(self, tenant: str, recipe: Work) -> dict[str, dict[str, str]]:
        """The sha256 of every file of the placed inputs, by reference and path: known since the upload."""
        found = {}
        for name in dict.fromkeys(self._named(tenant, recipe)):
            reference = parse_reference(name)
            if reference is not None:
                entries = self._files(tenant, reference)
                found[name] = {entry.path: entry.sha256 for entry in entries}
        return found

    def fetch(self, tenant: str, name: str, path: str, folder: Path) -> None:
        """Bring one file of an input that was placed in ``folder``, in place of its outline."""
        reference = parse_reference(name)
        if reference is not None and reference.ns != RESULTS:
            self._registry.fetch(tenant, self._registry.manifest(tenant, reference), path, folder)

    def complete(self, tenant: str, work: Work, find: Callable[[str], Path]) -> None:
        """Bring what was placed by its header only."""
        for name in dict.fromkeys(self._named(tenant, work)):
            reference = parse_reference(name)
            if reference is None or reference.ns == RESULTS:
                continue
            manifest = self._registry.manifest(tenant, reference)
            for path in self._registry.outlined(manifest):
                self._registry.fetch(tenant, manifest, path, find(name))

    def _files(self, tenant: str, reference: Reference) -> tuple[FileEntry, ...]:
        if reference.ns != RESULTS:
            return self._registry.manifest(tenant, reference).files
        result = self._result(tenant, reference).result
        assert result is not None
        return result.files

    def _place(self, tenant: str, reference: Reference, target: Path, *, outlines: bool) -> None:
        if reference.ns != RESULTS:
            manifest = self._registry.manifest(tenant, reference)
            self._registry.place(tenant, manifest, target, outlines=outlines)
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
