"""The recipe: what to merge and how. The recipe is the artifact; everything else follows from it.

A superset of mergekit's configuration in its own vocabulary. Parsing is strict: unknown keys, wrong
types, duplicate keys and YAML aliases are errors that name the key. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from merging.calibration.settings import CalibrationSettings
from merging.complaints import complaint, misplaced
from merging.errors import InputError

MAX_RECIPE_BYTES = 1 << 20
MAX_MODELS = 1000

Space = Literal["full", "knots", "core"]
DATA_KEYS = ("data", "statistics", "head")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelEntry(_Strict):
    """One input: a reference and the parameters that override the global ones for it.

    ``data`` (samples), ``statistics`` and ``head`` (a file each) are for methods that look at data.
    """

    model: str = Field(min_length=1, max_length=1024)
    parameters: dict[str, Any] = Field(default_factory=dict)
    data: str | None = Field(default=None, min_length=1, max_length=1024)
    statistics: str | None = Field(default=None, min_length=1, max_length=1024)
    head: str | None = Field(default=None, min_length=1, max_length=1024)


class Output(_Strict):
    """What to write.

    ``rank: null`` means exact (for ``svd``: the largest rank among the inputs); ``energy`` keeps the
    smallest rank whose share of the squared Frobenius norm is at least that fraction; ``max_rank`` is a
    ceiling on top of either; ``uniform_rank`` zero-pads every module to one rank for serving engines.
    """

    format: Literal["lora", "delta", "checkpoint"] = "lora"
    rank: int | None = Field(default=None, ge=1, le=65536)
    energy: float | None = Field(default=None, gt=0.0, le=1.0, allow_inf_nan=False)
    max_rank: int | None = Field(default=None, ge=1, le=65536)
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    uniform_rank: bool = False

    @model_validator(mode="after")
    def _one_rank_rule(self) -> Output:
        if self.rank is not None and self.energy is not None:
            raise ValueError("give rank or energy, not both")
        if self.uniform_rank and self.format != "lora":
            raise ValueError(f"uniform_rank is for format: lora, and format is {self.format!r}")
        return self


class Prepare(_Strict):
    """Steps before the method, the same for every method.

    ``balance`` rewrites each adapter in the canonical factors of its own SVD, so that no method sees how the
    training split the product; ``equalize_norms`` scales each model's whole update to the mean norm.
    """

    balance: bool = False
    equalize_norms: bool = False


class TakeFrom(_Strict):
    """Copy the fully trained modules (``modules_to_save``) from one of the models."""

    take: str = Field(min_length=1)


class Recipe(_Strict):
    """A merge recipe. Load one with :meth:`load`; see ``docs/recipes.md``."""

    merge_method: str = Field(min_length=1, max_length=64)
    space: Space | None = None
    base_model: str | None = None
    models: tuple[ModelEntry, ...] = Field(min_length=1, max_length=MAX_MODELS)
    parameters: dict[str, Any] = Field(default_factory=dict)
    prepare: Prepare = Field(default_factory=Prepare)
    output: Output = Field(default_factory=Output)
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    missing_modules: Literal["error", "zero"] = "error"
    modules_to_save: Literal["error", "drop", "average"] | TakeFrom = "error"
    allow_base_mismatch: bool = False
    calibration: CalibrationSettings | None = None

    @classmethod
    def load(cls, source: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
        """A recipe from a mapping or from the path of a YAML or JSON file.

        Raises :class:`InputError` with a ``recipe_*`` code that names the key.
        """
        if isinstance(source, Recipe):
            return source
        data, name = read_document(source)
        return cls._validate(data, name)

    @classmethod
    def parse(cls, text: str, *, name: str = "recipe") -> Recipe:
        """A recipe from YAML text (JSON is YAML)."""
        return cls._validate(parse_document(text, name), name)

    @classmethod
    def _validate(cls, data: dict[Any, Any], name: str) -> Recipe:
        data = _fold_compat(data, name)
        try:
            text = json.dumps(data, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            field, what = next(misplaced(data), ("it", "what JSON cannot hold"))
            raise InputError(
                "recipe_type",
                f"{name}: {field} is {what}; text, finite numbers, lists and mappings are accepted",
                where={"file": name, "field": field},
            ) from error
        try:
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            raise validation_error(error, name) from error

    def to_yaml(self) -> str:
        """YAML that loads back to an equal recipe."""
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True)

    def plain(self) -> dict[str, Any]:
        """JSON data that loads back to an equal recipe; what concerns data is there only if it is used."""
        data = self.model_dump(mode="json", exclude_none=False)
        for entry in data["models"]:
            for key in DATA_KEYS:
                if entry[key] is None:
                    del entry[key]
        if data["calibration"] is None:
            del data["calibration"]
        return data

    def canonical(self, inputs: Mapping[str, str], *, ordered: bool = False) -> dict[str, Any]:
        """The recipe with each model replaced by its content digest, models sorted.

        ``inputs`` maps the reference of each model to the digest of its content. Two recipes with equal
        canonical forms describe the same result. ``ordered`` keeps the order of the models, for methods to
        which it matters.
        """
        data = self.plain()
        models = [
            {"digest": inputs[entry.model], "parameters": entry.parameters, **_digests(entry, inputs)}
            for entry in self.models
        ]
        if not ordered:
            models.sort(key=lambda entry: json.dumps(entry, sort_keys=True))
        data["models"] = models
        if isinstance(self.modules_to_save, TakeFrom):
            take = self.modules_to_save.take
            data["modules_to_save"] = {"take": inputs.get(take, take)}
        base = self.base_model
        if base is not None and (self.calibration is not None or any(map(_has_data, self.models))):
            data["base_model"] = inputs.get(base, base)
        if self.calibration is not None and self.calibration.data is not None:
            data["calibration"]["data"] = inputs.get(self.calibration.data, self.calibration.data)
        return data

    def digest(self, inputs: Mapping[str, str], *, ordered: bool = False) -> str:
        """sha256 (hex) of the canonical form."""
        canonical = self.canonical(inputs, ordered=ordered)
        text = json.dumps(canonical, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _has_data(entry: ModelEntry) -> bool:
    return any(getattr(entry, key) is not None for key in DATA_KEYS)


def _digests(entry: ModelEntry, inputs: Mapping[str, str]) -> dict[str, str]:
    """The digests of the files of data that a model names."""
    named = {key: getattr(entry, key) for key in DATA_KEYS}
    return {key: inputs.get(value, value) for key, value in named.items() if value is not None}


def read_document(source: Mapping[str, Any] | str | Path) -> tuple[dict[Any, Any], str]:
    """The document of a mapping or of a YAML or JSON file, not yet validated, and its name."""
    if isinstance(source, Mapping):
        return dict(source), "recipe"
    path = Path(source)
    try:
        size = path.stat().st_size
        if size > MAX_RECIPE_BYTES:
            raise InputError(
                "recipe_too_large",
                f"recipe {path} has {size} bytes; the limit is {MAX_RECIPE_BYTES}",
                where={"file": str(path)},
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            "recipe_unreadable",
            f"recipe {path} cannot be read: {error}",
            where={"file": str(path)},
        ) from error
    return parse_document(text, str(path)), str(path)


def parse_document(text: str, name: str) -> dict[Any, Any]:
    """The mapping in YAML text (JSON is YAML). Raises ``recipe_not_yaml`` or ``recipe_not_a_mapping``."""
    try:
        data = yaml.load(text, Loader=_Loader)  # a SafeLoader without aliases
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise InputError(
            "recipe_not_yaml", f"{name} is not valid YAML: {problem}", where={"file": name}
        ) from error
    if not isinstance(data, dict):
        raise InputError(
            "recipe_not_a_mapping",
            f"{name} must be a mapping with keys such as merge_method and models",
            where={"file": name},
        )
    return data


def validation_error(error: ValidationError, name: str) -> InputError:
    """The first complaint of pydantic as one clear error that names the field."""
    found = complaint(error)
    field = found.field
    if found.kind == "extra_forbidden":
        return InputError(
            "recipe_unknown_key",
            f"{name}: unknown key {field!r}",
            remedy="Remove it or correct its spelling.",
            where={"file": name, "field": field},
        )
    code = "recipe_missing_key" if found.kind == "missing" else "recipe_invalid_value"
    return InputError(code, f"{name}: {found.sentence}", where={"file": name, "field": field})


def _fold_compat(data: dict[Any, Any], name: str) -> dict[Any, Any]:
    """``compat`` may stand at the top level or among the parameters; it is kept among them."""
    if "compat" not in data:
        return data
    data = dict(data)
    compat = data.pop("compat")
    if compat is None:
        return data
    parameters = data.get("parameters") or {}
    if not isinstance(parameters, dict):
        return data  # the validation names the wrong type
    if parameters.get("compat", compat) != compat:
        raise InputError(
            "recipe_invalid_value",
            f"{name}: compat is given twice with different values",
            where={"file": name, "field": "compat"},
        )
    data["parameters"] = {**parameters, "compat": compat}
    return data


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases (no exponential documents), duplicates or octal surprises."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("anchors and aliases are not supported")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, bool] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.YAMLError("a key must be plain text")
            key = self.construct_object(key_node)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"the key {key_node.value!r} must be text")
            if key in seen:
                raise yaml.YAMLError(f"duplicate key {key!r}")
            seen[key] = True
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-3 as text; users mean the number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)
