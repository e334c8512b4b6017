"""What a recipe gives a method that looks at data, found and checked before any long work. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn

from merging.calibration.base_files import BaseFiles, find_base
from merging.calibration.dataset import Dataset, open_dataset, open_shared
from merging.calibration.heads import Head, check_width, open_head, own_head
from merging.calibration.settings import DEFAULT_SAMPLES, CalibrationSettings
from merging.calibration.statistics_file import StatisticsFile
from merging.catalog.spec import Method
from merging.errors import InputError
from merging.formats.adapter import Adapter
from merging.naming import task_names
from merging.recipe import DATA_KEYS, Recipe

ENTROPY = ("adarank",)
"""Methods that need samples and heads, and no statistics."""

MODEL_FEATURES = ("regmean", "mats")
"""Methods whose papers measure the inputs of each fine-tuned model, not those of the base model."""

MIN_SAMPLES = 8
"""Fewer samples of a task than these tell nothing about it."""

Resolve = Callable[[str], Path]


@dataclass(frozen=True)
class Inputs:
    """The opened inputs in the order of the models. What is not needed is None."""

    method: str
    settings: CalibrationSettings
    features: Literal["base", "model"]
    base: BaseFiles | None
    tokenizer: Path | None
    datasets: tuple[Dataset | None, ...]
    statistics: tuple[StatisticsFile | None, ...]
    heads: tuple[Head | None, ...]
    references: Mapping[str, str]
    base_reference: str | None = None

    @property
    def entropy(self) -> bool:
        """Whether the method minimises entropy rather than uses statistics."""
        return self.method in ENTROPY

    @property
    def digests(self) -> dict[str, str]:
        """References of the recipe -> digests of what they name, beside the models."""
        found = dict(self.references)
        if self.base is not None and self.base_reference is not None:
            found[self.base_reference] = self.base.digest
        return found

    def samples(self, task: int) -> int:
        """How many samples of a task are used."""
        dataset = self.datasets[task]
        assert dataset is not None
        default = len(dataset) if self.entropy else DEFAULT_SAMPLES
        return min(len(dataset), self.settings.samples or default)

    def permuted(self, order: Sequence[int]) -> Inputs:
        """The same for another order of the models."""
        return replace(
            self,
            datasets=tuple(self.datasets[i] for i in order),
            statistics=tuple(self.statistics[i] for i in order),
            heads=tuple(self.heads[i] for i in order),
        )

    def with_heads(self, recipe: Recipe, adapters: Sequence[Adapter], resolve: Resolve) -> Inputs:
        """With the head of every task, where the method needs them."""
        if not self.entropy:
            return self
        heads = []
        references = dict(self.references)
        for entry, adapter in zip(recipe.models, adapters, strict=True):
            head = (
                own_head(adapter)
                if entry.head is None
                else open_head(_file(_at(resolve, entry.head, "head")))
            )
            assert self.base is not None
            check_width(head, self.base.config)
            if entry.head is not None and head.digest is not None:
                references[entry.head] = head.digest
            heads.append(head)
        kinds = {head.file is None for head in heads}
        if len(kinds) > 1:
            fail(
                "heads_mixed",
                "some models bring their head and others have a head file",
                "Give head files for all models or for none.",
                "head",
            )
        return replace(self, heads=tuple(heads), references=references)

    def close(self) -> None:
        for opened in (*self.statistics, *(dataset.tensors for dataset in self.datasets if dataset)):
            if opened is not None:
                opened.close()


def refuse_data(recipe: Recipe, method: Method) -> None:
    """Raise ``data_not_used`` when a recipe gives data to a method that looks at none."""
    given = [key for entry in recipe.models for key in DATA_KEYS if getattr(entry, key) is not None]
    if recipe.calibration is not None:
        given.append("calibration")
    if given and not method.contract.data:
        fail(
            "data_not_used",
            f"{method.name} does not look at data, but the recipe gives {given[0]}",
            "Remove it, or choose a method that uses it.",
            given[0],
        )


def find_inputs(recipe: Recipe, method: Method, resolve: Resolve) -> Inputs:
    """Open what the recipe names; the heads come later, with the adapters.

    Raises :class:`InputError` with codes of the readers, and ``data_missing``, ``data_ambiguous``,
    ``base_model_required``, ``too_few_samples``.
    """
    settings = recipe.calibration or CalibrationSettings()
    entropy = method.name in ENTROPY
    datasets, references = _datasets(recipe, settings, resolve)
    statistics: list[StatisticsFile | None] = []
    for index, entry in enumerate(recipe.models):
        where = f"models[{index}]"
        if entry.statistics is not None and entropy:
            fail(
                "statistics_not_used",
                f"{where}: {method.name} needs samples, not statistics",
                "Give `data` instead of `statistics`.",
                f"{where}.statistics",
            )
        if entry.statistics is not None and datasets[index] is not None:
            fail("data_ambiguous", f"{where} gives both data and statistics", "Give one of them.", where)
        if entry.statistics is None and datasets[index] is None:
            what = "data" if entropy else "data or statistics"
            fail(
                "data_missing",
                f"{where}: {method.name} needs {what} for every model",
                f"Add `{what.partition(' ')[0]}` to the model.",
                where,
            )
        if entry.head is not None and not entropy:
            fail("data_not_used", f"{where}: {method.name} uses no head", "Remove it.", f"{where}.head")
        opened = None
        if entry.statistics is not None:
            opened = StatisticsFile(_file(_at(resolve, entry.statistics, "statistics")))
            references[entry.statistics] = opened.digest
        statistics.append(opened)
    base = None
    if any(datasets) or entropy:
        if recipe.base_model is None:
            fail(
                "base_model_required",
                f"{method.name} runs the base model on the samples",
                "Set `base_model`, or give `statistics` for every model.",
                "base_model",
            )
        base = find_base(_at(resolve, recipe.base_model, "base_model"))
    elif recipe.base_model is not None:
        with suppress(InputError):  # a name that is not at hand is only a name
            base = find_base(resolve(recipe.base_model))
    tokenizer = _tokenizer(settings, base, datasets, resolve)
    features = settings.features
    if features == "auto":
        features = "model" if method.name in MODEL_FEATURES else "base"
    if features == "model" and method.contract.initial:
        fail(
            "features_unavailable",
            f"{method.name} has no trained models to measure",
            "Use `features: base`.",
            "calibration.features",
        )
    none: tuple[None, ...] = (None,) * len(recipe.models)
    return Inputs(
        method=method.name,
        settings=settings,
        features=features,
        base=base,
        tokenizer=tokenizer,
        datasets=tuple(datasets),
        statistics=tuple(statistics),
        heads=none,
        references=references,
        base_reference=recipe.base_model,
    )


def _datasets(
    recipe: Recipe, settings: CalibrationSettings, resolve: Resolve
) -> tuple[list[Dataset | None], dict[str, str]]:
    references: dict[str, str] = {}
    named = [entry.data is not None for entry in recipe.models]
    if settings.data is not None and any(named):
        fail(
            "data_ambiguous",
            "the recipe gives calibration.data and data of single models",
            "Give one.",
            "calibration.data",
        )
    found: list[Dataset | None] = []
    if settings.data is not None:
        names = task_names([entry.model for entry in recipe.models])
        shared = open_shared(_at(resolve, settings.data, "data"), names)
        found = [shared[name] for name in names]
        references[settings.data] = "-".join(dataset.digest for dataset in shared.values())
    else:
        for entry in recipe.models:
            dataset = None if entry.data is None else open_dataset(_at(resolve, entry.data, "data"))
            if entry.data is not None and dataset is not None:
                references[entry.data] = dataset.digest
            found.append(dataset)
    for entry, dataset in zip(recipe.models, found, strict=True):
        if dataset is not None:
            _check_count(entry.model, dataset, settings)
    return found, references


def _check_count(label: str, dataset: Dataset, settings: CalibrationSettings) -> None:
    least = max(MIN_SAMPLES, settings.samples or 0)
    if len(dataset) < least:
        fail(
            "too_few_samples",
            f"there are {len(dataset)} samples for {label}; at least {least} are needed",
            "Add samples, or lower calibration.samples.",
            "calibration.samples",
        )


def _tokenizer(
    settings: CalibrationSettings,
    base: BaseFiles | None,
    datasets: Sequence[Dataset | None],
    resolve: Resolve,
) -> Path | None:
    if not any(dataset is not None and dataset.tensors is None for dataset in datasets):
        return None
    assert base is not None
    folder = base.folder if settings.tokenizer is None else _at(resolve, settings.tokenizer, "tokenizer")
    names = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")
    if not any((folder / name).is_file() for name in names):
        fail(
            "tokenizer_missing",
            f"{folder.name} has no tokenizer for the texts",
            "Set calibration.tokenizer, or give tensors instead of texts.",
            "calibration.tokenizer",
        )
    return folder


_NOT_FOUND = {
    "data": "dataset_not_found",
    "statistics": "statistics_not_found",
    "head": "head_not_found",
    "tokenizer": "tokenizer_missing",
    "base_model": "base_model_not_found",
}


def _at(resolve: Resolve, reference: str, key: str) -> Path:
    """Where something of the recipe lies that is no adapter. Raises the code of ``key`` if nowhere."""
    try:
        return resolve(reference)
    except InputError as error:
        if error.code != "model_not_found":
            raise
        raise InputError(
            _NOT_FOUND[key],
            f"{key}: there is nothing at {reference!r}",
            remedy="Paths are relative to the folder in which the merge is started.",
            where={"field": key, "file": reference},
        ) from None


def _file(path: Path) -> Path:
    """A file, or the only safetensors file of a folder."""
    if not path.is_dir():
        return path
    names = sorted(entry for entry in path.iterdir() if entry.suffix == ".safetensors")
    return names[0] if len(names) == 1 else path


def fail(code: str, message: str, remedy: str | None, field: str) -> NoReturn:
    """Refuse, naming the field of the recipe or the module."""
    raise InputError(code, message, remedy=remedy, where={"field": field})
