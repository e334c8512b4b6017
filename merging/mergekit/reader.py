"""Read a mergekit configuration strictly: what is not understood is refused by name. No torch here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from merging.errors import InputError
from merging.mergekit import settings
from merging.mergekit.config import DTYPES, IGNORED, TOP_LEVEL, MergekitConfig, Settings, Slice, Source
from merging.mergekit.methods import MergekitMethod, known, param_names

MAX_SOURCES = 1000
MAX_SLICES = 10_000


def parse(data: Mapping[str, Any], name: str = "configuration") -> MergekitConfig:
    """Raises :class:`InputError` with a ``mergekit_*`` code that names the key."""
    reader = _Reader(name)
    reader.only(data, "", (*TOP_LEVEL, *IGNORED))
    if data.get("compat") not in (None, "mergekit"):
        raise reader.wrong("compat", "can only be mergekit in a mergekit configuration")
    method = known(reader.text(data, "merge_method", ""))
    reader.method = method
    base = reader.model(data["base_model"], "base_model") if data.get("base_model") is not None else None
    parameters = reader.settings(data.get("parameters"), "parameters")
    given = [key for key in ("models", "slices") if data.get(key)]
    if len(given) != 1:
        raise reader.wrong("models", "or slices must be given, exactly one of them")
    whole = given == ["models"]
    slices = (reader.models(data["models"], base),) if whole else reader.slices(data["slices"])
    seed = data.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise reader.wrong("seed", "must be a whole number from 0 on")
    return MergekitConfig(
        method,
        slices,
        whole,
        base,
        reader.dtype(data, "dtype"),
        reader.dtype(data, "out_dtype"),
        reader.tokenizer(data),
        parameters,
        seed,
        tuple(dict.fromkeys(reader.warnings)),
        data,
    )


class _Reader:
    def __init__(self, name: str) -> None:
        self.name = name
        self.method: MergekitMethod | None = None
        self.warnings: list[str] = []

    def wrong(self, field: str, problem: str, code: str = "mergekit_invalid", **more: str) -> InputError:
        where = {"file": self.name, "field": field}
        return InputError(code, f"{self.name}: {field} {problem}", where=where, remedy=more.get("remedy"))

    def only(self, data: Mapping[str, Any], field: str, keys: tuple[str, ...]) -> None:
        for key in data:
            if key in keys:
                continue
            path = f"{field}.{key}" if field else str(key)
            if key in _UNSUPPORTED:
                problem, remedy = _UNSUPPORTED[key]
                raise self.wrong(path, problem, "mergekit_unsupported", remedy=remedy)
            raise self.wrong(
                path,
                "is not a key of mergekit's configuration",
                "mergekit_unknown_key",
                remedy=_closest(str(key), keys),
            )

    def mapping(self, value: Any, field: str) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise self.wrong(field, "must be a mapping")
        return value

    def entries(self, value: Any, field: str, limit: int) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise self.wrong(field, "must be a list with at least one entry")
        if len(value) > limit:
            raise self.wrong(field, f"has {len(value)} entries; the limit is {limit}")
        return value

    def text(self, data: Mapping[str, Any], key: str, field: str) -> str:
        path = f"{field}.{key}" if field else key
        value = data.get(key)
        if not isinstance(value, str) or not 0 < len(value) <= 1024:
            raise self.wrong(path, "must be given, as text")
        return value

    def model(self, value: Any, field: str) -> str:
        """A reference ``path`` or ``path@revision``; ``+adapter`` is refused by name."""
        if isinstance(value, Mapping):
            raise self.wrong(
                field,
                "is a mapping; models are named by text here",
                "mergekit_unsupported",
                remedy="Write the path, or path@revision.",
            )
        if not isinstance(value, str) or not 0 < len(value) <= 1024:
            raise self.wrong(field, "must name a model, as text")
        if "+" in value:
            raise self.wrong(
                field,
                f"names an adapter on top of a model ({value!r})",
                "mergekit_lora_reference",
                remedy="List the adapter as a model of a recipe that has this base_model.",
            )
        return value

    def models(self, value: Any, base: str | None) -> Slice:
        sources = []
        for i, item in enumerate(self.entries(value, "models", MAX_SOURCES)):
            field = f"models[{i}]"
            entry = self.mapping(item, field)
            self.only(entry, field, ("model", "parameters"))
            model = self.model(entry.get("model"), f"{field}.model")
            sources.append(Source(model, None, self.settings(entry.get("parameters"), f"{field}.parameters")))
        if base is not None and base not in [source.model for source in sources]:
            sources.append(Source(base, None))
        return self.checked(Slice(tuple(sources), base), "models")

    def slices(self, value: Any) -> tuple[Slice, ...]:
        found = []
        for i, item in enumerate(self.entries(value, "slices", MAX_SLICES)):
            field = f"slices[{i}]"
            entry = self.mapping(item, field)
            self.only(entry, field, ("sources", "base_model", "parameters"))
            sources = [
                self.source(source, f"{field}.sources[{j}]")
                for j, source in enumerate(
                    self.entries(entry.get("sources"), f"{field}.sources", MAX_SOURCES)
                )
            ]
            lengths = [stop - start for start, stop in (source.layers or (0, 0) for source in sources)]
            if len(set(lengths)) != 1:
                raise self.wrong(field, f"takes different numbers of layers from its sources: {lengths}")
            base = entry.get("base_model")
            base = self.model(base, f"{field}.base_model") if base is not None else None
            settings_ = self.settings(entry.get("parameters"), f"{field}.parameters")
            found.append(self.checked(Slice(tuple(sources), base, settings_), field))
        return tuple(found)

    def source(self, value: Any, field: str) -> Source:
        entry = self.mapping(value, field)
        self.only(entry, field, ("model", "layer_range", "parameters"))
        model = self.model(entry.get("model"), f"{field}.model")
        layers = entry.get("layer_range")
        if (
            not isinstance(layers, list)
            or len(layers) != 2
            or not all(isinstance(x, int) and not isinstance(x, bool) for x in layers)
        ):
            raise self.wrong(f"{field}.layer_range", "must be [first, last + 1], two whole numbers")
        start, stop = layers
        if not 0 <= start < stop <= 100_000:
            raise self.wrong(f"{field}.layer_range", f"[{start}, {stop}] is empty or out of range")
        return Source(model, (start, stop), self.settings(entry.get("parameters"), f"{field}.parameters"))

    def checked(self, part: Slice, field: str) -> Slice:
        names = [source.model for source in part.sources]
        for name in names:
            if names.count(name) > 1:
                raise self.wrong(
                    field,
                    f"names the model {name!r} twice",
                    "mergekit_duplicate_model",
                    remedy="Name it once, with the sum of its weights.",
                )
        return part

    def settings(self, value: Any, field: str) -> Settings:
        if value is None:
            return {}
        found = {}
        method = self.method
        assert method is not None
        for key, item in self.mapping(value, field).items():
            path = f"{field}.{key}"
            if key not in param_names():
                raise self.wrong(
                    path,
                    "is not a parameter of any method of mergekit",
                    "mergekit_unknown_parameter",
                    remedy=_closest(str(key), sorted(param_names())),
                )
            setting = settings.parse(item, path)
            param = next((param for param in method.params if param.name == key), None)
            if param is None:
                self.warnings.append(f"{method.name} does not read the parameter {key}; it is ignored")
                continue
            for scalar in setting.scalars():
                try:
                    (settings.number if param.kind == "number" else settings.truth)(scalar)
                except ValueError as error:
                    raise self.wrong(
                        path, f"cannot be {scalar!r}: {error}", "mergekit_parameter_value"
                    ) from None
            found[key] = setting
        return found

    def dtype(self, data: Mapping[str, Any], key: str) -> str | None:
        value = data.get(key)
        if value is None:
            return None
        value = value.removeprefix("torch.") if isinstance(value, str) else value
        if not isinstance(value, str) or value not in DTYPES:
            raise self.wrong(
                key, f"cannot be {value!r}", "mergekit_dtype", remedy=f"Use one of {', '.join(DTYPES)}."
            )
        return DTYPES[value]

    def tokenizer(self, data: Mapping[str, Any]) -> str | None:
        source, block = data.get("tokenizer_source"), data.get("tokenizer")
        if source is not None and block is not None:
            raise self.wrong("tokenizer", "and tokenizer_source are both given")
        if block is not None:
            block = self.mapping(block, "tokenizer")
            self.only(block, "tokenizer", ("source",))
            source = block.get("source", "union")
        if source is None or source in ("base", "union"):
            return source
        return self.model(source, "tokenizer_source")


def _closest(word: str, words: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1)
    return f"Did you mean {near[0]}?" if near else "Remove it."


_UNSUPPORTED = {
    "modules": (
        "merges the parts of a multi-part model one by one, which is not offered here",
        "Merge single-part models with `models` or `slices`.",
    ),
    "chat_template": (
        "would rewrite the tokenizer's chat template, which is not offered here",
        "Remove it; the tokenizer's files are copied as they are. Edit chat_template.jinja afterwards.",
    ),
    "tokens": (
        "sets embeddings token by token, which is not offered here",
        "Remove it; models whose vocabularies agree need none.",
    ),
    "pad_to_multiple_of": (
        "pads the vocabulary, which is not offered here",
        "Remove it, or resize the embeddings afterwards with transformers.",
    ),
    "residual_weight": ("is not read by mergekit 0.1.5 either", "Remove it."),
}
