"""``adapter_config.json`` of PEFT, read with a strict allow-list.

The file is untrusted: PEFT itself would import modules, unpickle caches and run regular expressions that
it names. Here only what changes the mathematics of a LoRA update is read, what cannot be merged is refused
by name, and an unknown field that is switched on is refused too, because a new field may well change the
mathematics. Semantics follow peft 0.21.2.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from merging.complaints import complaint
from merging.errors import InputError
from merging.formats.patterns import PatternTable

MAX_CONFIG_BYTES = 1 << 20

CONVERT = (
    "Convert it to a plain LoRA (peft.save_as_lora does so for many kinds), or merge it into its base model"
)

# Fields that do not change what a trained adapter adds to its base.
_IGNORED = frozenset({
    "auto_mapping", "corda_config", "eva_config", "inference_mode", "lora_dropout", "lora_ga_config",
    "loftq_config", "megatron_config", "megatron_core", "merge_weights", "qalora_group_size",
    "runtime_config", "velora_config",
})  # fmt: skip

# Field -> (code, what it means for a merge, remedy). Refused when switched on.
_REFUSED: Mapping[str, tuple[str, str, str | None]] = {
    "use_dora": (
        "dora_unsupported",
        "DoRA rescales the base weight, so its update is not low-rank and needs the base",
        CONVERT,
    ),
    "lora_bias": ("lora_bias_unsupported", "a bias on lora_B is not part of a low-rank update", CONVERT),
    "use_qalora": ("qalora_unsupported", "QA-LoRA's A sees pooled inputs", CONVERT),
    "use_bdlora": ("bdlora_unsupported", "BD-LoRA's factors are block-diagonal", CONVERT),
    "kasa_config": ("kasa_unsupported", "KaSA changes the base weights before training", CONVERT),
    "arrow_config": (
        "arrow_unsupported",
        "an Arrow router has no single update",
        "Merge the adapters that it routes to",
    ),
    "monteclora_config": ("monteclora_unsupported", "MonteCLoRA's factors are random", CONVERT),
    "alora_invocation_tokens": (
        "alora_unsupported",
        "an activated LoRA only acts on some tokens and cannot be merged",
        "Serve it beside the merged adapter",
    ),
    "layer_replication": (
        "layer_replication_unsupported",
        "its layer numbers refer to a replicated stack of layers",
        "Merge it into its base model first, and merge the checkpoints",
    ),
    "trainable_token_indices": (
        "trainable_tokens_unsupported",
        "trained token rows replace rows of the embedding",
        "Merge it into its base model first, and merge the checkpoints",
    ),
    "ensure_weight_tying": (
        "weight_tying_unsupported",
        "tied adapters are stored once and shared between layers",
        "Save the adapter with ensure_weight_tying off",
    ),
}

_AS_SAVED = "Send the file as PEFT's save_pretrained wrote it"

_SAFE_INIT = ("gaussian", "eva", "orthogonal", "mica")
_CHANGED_BASE_INIT = ("pissa", "olora", "corda", "lora_ga", "loftq")


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _printable(value: str) -> str:
    if not value.isprintable():
        raise ValueError("control characters are not accepted")
    return value


_Text = Annotated[str, Field(max_length=4096), AfterValidator(_printable)]
_Name = Annotated[str, Field(min_length=1, max_length=1024)]
_Names = Annotated[tuple[_Name, ...], BeforeValidator(_tuple), Field(max_length=100_000)]
_Rank = Annotated[int, Field(ge=1, le=1 << 20)]
_Alpha = Annotated[float, Field(allow_inf_nan=False, ge=-1e9, le=1e9)]
_Index = Annotated[int, Field(ge=0, le=1 << 20)]
_Indices = Annotated[tuple[_Index, ...], BeforeValidator(_tuple)]


class AdapterConfig(BaseModel):
    """What a LoRA adapter's configuration says, as far as it matters for a merge.

    ``rank_pattern`` and ``alpha_pattern`` keep the order of the file, which decides between patterns.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    peft_type: Literal["LORA"]
    r: _Rank = 8
    lora_alpha: _Alpha = 8
    use_rslora: bool = False
    rank_pattern: dict[str, _Rank] = {}
    alpha_pattern: dict[str, _Alpha] = {}
    target_modules: _Names | Annotated[str, Field(max_length=65_536)] | None = None
    exclude_modules: _Names | Annotated[str, Field(max_length=65_536)] | None = None
    layers_to_transform: _Indices | _Index | None = None
    layers_pattern: _Names | Annotated[str, Field(max_length=1024)] | None = None
    modules_to_save: _Names | None = None
    target_parameters: _Names | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    fan_in_fan_out: bool = False
    base_model_name_or_path: _Text | None = None
    revision: _Text | None = None
    task_type: _Text | None = None
    init_lora_weights: bool | str | None = True
    peft_version: _Text | None = None
    file: str = Field(default="adapter_config.json", exclude=True)
    notes: tuple[str, ...] = Field(default=(), exclude=True)

    @cached_property
    def _ranks(self) -> PatternTable:
        return PatternTable(self.rank_pattern, field="rank_pattern", file=self.file)

    @cached_property
    def _alphas(self) -> PatternTable:
        return PatternTable(self.alpha_pattern, field="alpha_pattern", file=self.file)

    def compile_patterns(self) -> None:
        """Check both pattern tables now rather than at the first look-up."""
        _ = self._ranks, self._alphas

    def rank_of(self, path: str) -> int:
        """The rank that the configuration states for a module path (without PEFT's prefix)."""
        return int(self._ranks.lookup(path, self.r))

    def scale_of(self, path: str) -> float:
        """``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA; rank and alpha are looked up independently."""
        alpha = float(self._alphas.lookup(path, self.lora_alpha))
        rank = self.rank_of(path)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def parse_adapter_config(data: bytes, *, file: str = "adapter_config.json") -> AdapterConfig:
    """Parse and check an ``adapter_config.json``.

    Raises :class:`InputError`: ``config_too_large``, ``config_not_json``, ``config_duplicate_key``,
    ``config_field`` (a wrong type or value), ``unknown_config_field``, ``peft_type_unsupported`` or the
    code of a feature that cannot be merged.
    """
    return check_adapter_config(load_json(data, file), file=file)


def check_adapter_config(raw: Mapping[str, Any], *, file: str) -> AdapterConfig:
    """Check the fields of a configuration that is parsed already; raises as :func:`parse_adapter_config`."""
    kind = raw.get("peft_type")
    if kind != "LORA":
        shown = "none" if kind is None else str(kind)[:80]
        _fail("peft_type_unsupported", file, "peft_type", f"peft_type {shown} cannot be merged",
              remedy=f"Only LoRA adapters (peft_type LORA) are accepted. {CONVERT}")  # fmt: skip
    for field, (code, why, remedy) in _REFUSED.items():
        if raw.get(field):
            _fail(code, file, field, f"{field} is set: {why}", remedy=remedy)
    _check_init(raw.get("init_lora_weights"), file)
    known: dict[str, Any] = {}
    for field, value in raw.items():
        if field in AdapterConfig.model_fields and field not in ("file", "notes"):
            # null stands for the default, as in PEFT's own files
            if value is not None:
                known[field] = value
        elif value and field not in _IGNORED and field not in _REFUSED:
            _fail("unknown_config_field", file, field[:200], f"the field {field[:80]!r} is not known "
                  "and may change what the adapter means",
                  remedy="Remove the field if it does not change the weights")  # fmt: skip
    notes = []
    if "lora_alpha" not in known:
        notes.append(f"{file} has no lora_alpha; PEFT's default of 8 was taken")
    if "r" not in known:
        notes.append(f"{file} has no r; PEFT's default of 8 was taken")
    if raw.get("velora_config"):
        notes.append(f"{file} names velora_config, which only concerns training and was ignored")
    try:
        config = AdapterConfig(**known, file=file, notes=tuple(notes))
    except ValidationError as error:
        found = complaint(error)
        _fail("config_field", file, found.field[:200], found.sentence[:400], remedy="Correct the field")
    config.compile_patterns()
    return config


def load_json(data: bytes, file: str) -> dict[str, Any]:
    """An untrusted JSON object with unique keys and finite numbers, or a ``config_*`` error."""
    if len(data) > MAX_CONFIG_BYTES:
        _fail("config_too_large", file, None, f"{len(data)} bytes, the limit is {MAX_CONFIG_BYTES}",
              remedy=_AS_SAVED)  # fmt: skip

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            twice = next(key for key, count in counts.items() if count > 1)
            _fail("config_duplicate_key", file, twice[:200], f"{twice[:80]!r} is stated twice",
                  remedy="Remove the one that is wrong")  # fmt: skip
        return result

    try:
        raw = json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=unique,
            parse_constant=_reject_number,
            parse_int=lambda text: int(text) if len(text) <= 19 else _reject_number(text),
        )
        json.dumps(raw, ensure_ascii=False).encode()  # a lone surrogate could not be reported or stored
    except (ValueError, RecursionError) as error:
        detail = "too deeply nested" if isinstance(error, RecursionError) else str(error)[:120]
        _fail("config_not_json", file, None, f"not valid JSON ({detail})", remedy=_AS_SAVED)
    if not isinstance(raw, dict):
        _fail("config_not_json", file, None, "not a JSON object", remedy=_AS_SAVED)
    return raw


def _reject_number(text: str) -> NoReturn:
    raise ValueError(f"the number {text[:20]} is not accepted")


def _check_init(value: object, file: str) -> None:
    """Some initialisations change the base weights, so B·A is not relative to the published base."""
    if value is None or isinstance(value, bool) or value in _SAFE_INIT:
        return
    text = str(value)
    for name in _CHANGED_BASE_INIT:
        if text == name or (name == "pissa" and text.startswith("pissa_niter_")):
            _fail(f"init_{name}_unsupported", file, "init_lora_weights",
                  f"init_lora_weights {text[:40]!r} means that training started from changed base "
                  "weights, so the factors do not apply to the published base",
                  remedy="Save it with path_initial_model_for_weight_conversion, which converts it "
                  "to a plain LoRA")  # fmt: skip
    _fail("init_lora_weights_unknown", file, "init_lora_weights",
          f"init_lora_weights {text[:40]!r} is not known",
          remedy="If training started from the published base weights, set it to true")  # fmt: skip


def _fail(code: str, file: str, field: str | None, what: str, *, remedy: str | None = None) -> NoReturn:
    where = {"file": file} | ({"field": field.encode("ascii", "backslashreplace").decode()} if field else {})
    raise InputError(code, f"{file}: {what}", remedy=remedy, where=where) from None
