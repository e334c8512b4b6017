"""From a configuration to a table: each output tensor with its inputs and its evaluated parameters.

Everything that headers can tell is decided here, before a tensor is read. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from merging.errors import InputError
from merging.mergekit import settings
from merging.mergekit.config import MergekitConfig, Settings, Slice, Source
from merging.mergekit.layout import Layout, layout, tied_to
from merging.mergekit.methods import Param, Values
from merging.mergekit.ranges import check_ranges, promoted

FLOATS = ("F16", "BF16", "F32", "F64")


class Info(Protocol):
    """What a header says of a tensor."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


Headers = Mapping[str, Mapping[str, Info]]
"""The tensors of every model by its reference."""


@dataclass(frozen=True)
class Input:
    """One input of an output tensor."""

    model: str
    tensor: str


@dataclass(frozen=True)
class Output:
    """An output tensor: ``base`` is the index of the base among the inputs, if the method looks at it.

    ``dtype`` is that of the arithmetic, ``out_dtype`` that of the file. ``copy`` marks a tensor that is not
    merged: its inputs must agree.
    """

    name: str
    shape: tuple[int, ...]
    inputs: tuple[Input, ...]
    base: int | None
    values: Values
    dtype: str
    out_dtype: str
    copy: bool = False


@dataclass(frozen=True)
class Schedule:
    """The whole work. ``donor`` gives config and tokenizer; ``layers`` is their number if slices set it."""

    config: MergekitConfig
    outputs: tuple[Output, ...]
    donor: str
    layers: int | None
    warnings: tuple[str, ...]


def schedule(config: MergekitConfig, headers: Headers) -> Schedule:
    """Raises :class:`InputError` ``mergekit_*`` naming the model, tensor or parameter."""
    return _Scheduler(config, headers).schedule()


class _Scheduler:
    def __init__(self, config: MergekitConfig, headers: Headers) -> None:
        self.config = config
        self.headers = headers
        self.layouts = {model: layout(headers[model], model) for model in config.models}
        self.warnings = list(config.warnings)
        self.outputs: list[Output] = []

    def schedule(self) -> Schedule:
        config = self.config
        for index, part in enumerate(config.slices):
            self._check(part, index)
        first, last = config.slices[0], config.slices[-1]
        one = self._layout(first)
        for name in one.before:
            self._add(name, [(source, name) for source in first.sources], first, 0.0)
        layers = None
        if config.whole:
            for prefix in one.stacks:
                self._stack(first, prefix)
        else:
            layers = self._slices()
        two = self._layout(last)
        for name in two.after:
            self._add(name, [(source, name) for source in last.sources], last, 0.0)
        donor = config.base_model or config.models[0]
        if config.whole:
            self._nothing_left()
        return Schedule(config, tuple(self.outputs), donor, layers, tuple(dict.fromkeys(self.warnings)))

    def _check(self, part: Slice, index: int) -> None:
        """The structural contract of the method."""
        method = self.config.method
        where = {"field": "models" if self.config.whole else f"slices[{index}]"}
        names = [source.model for source in part.sources]
        if method.base == "required" and self._base(part) not in names:
            raise InputError(
                "mergekit_base_required",
                f"{method.name} needs a base model among the inputs of {where['field']}",
                remedy="Set base_model; in slices list it as a source too.",
                where=where,
            )
        count = len(names)
        if count < method.min_inputs or (method.max_inputs is not None and count > method.max_inputs):
            # the methods with a limit have a fixed number
            raise InputError(
                "mergekit_input_count",
                f"{method.name} takes {method.max_inputs} models, the base included; "
                f"{where['field']} has {count}",
                remedy="Give each slice that many models, or use a method that takes more, such as `linear`.",
                where=where,
            )

    def _base(self, part: Slice) -> str | None:
        return part.base_model or self.config.base_model

    def _layout(self, part: Slice) -> Layout:
        """That of the base, or of the first source."""
        base = self._base(part)
        names = [source.model for source in part.sources]
        return self.layouts[base if base in names and base is not None else names[0]]

    def _stack(self, part: Slice, prefix: str) -> None:
        """Every layer of one stack, all models layer by layer."""
        layers = self._layout(part).stacks[prefix].layers
        for source in part.sources:
            other = self.layouts[source.model].stacks.get(prefix)
            if other is None or len(other.layers) != len(layers):
                has = len(other.layers) if other else 0
                raise InputError(
                    "mergekit_layers",
                    f"{source.model} has {has} layers {prefix}.*, others have {len(layers)}",
                    remedy="Say with `slices` which layers to merge.",
                    where={"model": source.model, "module": prefix},
                )
        for i, rests in enumerate(layers):
            t = i / (len(layers) - 1) if len(layers) > 1 else 1.0
            for rest in rests:
                name = f"{prefix}.{i}.{rest}"
                self._add(name, [(source, name) for source in part.sources], part, t)

    def _slices(self) -> int:
        """The layers of every slice, one after the other; how many there are."""
        out = 0
        prefix = self._only_stack()
        for part in self.config.slices:
            for source in part.sources:
                self._check_range(source, prefix)
            start, stop = part.sources[0].layers or (0, 0)
            for offset in range(stop - start):
                t = offset / (stop - start - 1) if stop - start > 1 else 1.0
                layer = start + offset
                for rest in self.layouts[part.sources[0].model].stacks[prefix].layers[layer]:
                    found = [
                        (source, f"{prefix}.{(source.layers or (0, 0))[0] + offset}.{rest}")
                        for source in part.sources
                    ]
                    self._add(f"{prefix}.{out}.{rest}", found, part, t)
                out += 1
        return out

    def _only_stack(self) -> str:
        prefixes = sorted({prefix for found in self.layouts.values() for prefix in found.stacks})
        if len(prefixes) != 1:
            raise InputError(
                "mergekit_layers",
                f"slices need models with one stack of layers; these have {prefixes or 'none'}",
                remedy="Use `models`.",
                where={"field": "slices"},
            )
        return prefixes[0]

    def _check_range(self, source: Source, prefix: str) -> None:
        layers = len(self.layouts[source.model].stacks[prefix].layers)
        if source.layers is not None and source.layers[1] > layers:
            raise InputError(
                "mergekit_layers",
                f"layer_range {list(source.layers)} goes beyond the {layers} layers of {source.model}",
                where={"model": source.model, "field": "layer_range"},
            )

    def _add(self, name: str, wanted: list[tuple[Source, str]], part: Slice, t: float) -> None:
        inputs = self._present(name, wanted)
        infos = [self.headers[item.model][item.tensor] for item in inputs]
        shape = self._shape(name, inputs)
        dtypes = sorted({info.dtype for info in infos})
        copy = not all(dtype in FLOATS for dtype in dtypes) or name.endswith("rotary_emb.inv_freq")
        unmerged = [dtype for dtype in dtypes if dtype.startswith("F") and dtype not in FLOATS]
        if unmerged:
            raise InputError(
                "mergekit_dtype",
                f"{name} has the dtype {unmerged[0]}, which cannot be merged",
                remedy="Dequantise the model first.",
                where={"module": name},
            )
        if copy and len(dtypes) > 1:
            raise self._mismatch("mergekit_buffer", name, f"has different dtypes: {', '.join(dtypes)}")
        dtype = dtypes[0] if copy else self.config.dtype or promoted(dtypes)
        out_dtype = dtype if copy else self.config.out_dtype or dtype
        base = self._base(part) if self.config.method.base == "required" else None
        models = [item.model for item in inputs]
        position = models.index(base) if base in models and base is not None else None
        values = Values() if copy else self._values(name, inputs, part, position, t)
        self.outputs.append(Output(name, shape, tuple(inputs), position, values, dtype, out_dtype, copy))

    def _present(self, name: str, wanted: list[tuple[Source, str]]) -> list[Input]:
        found = []
        for source, tensor in wanted:
            names = self.headers[source.model]
            tied = tensor if tensor in names else tied_to(tensor, names)
            if tied is None:
                raise InputError(
                    "mergekit_tensor_missing",
                    f"{source.model} has no tensor {tensor}, which {name} is made of",
                    remedy="Merge models of one architecture.",
                    where={"model": source.model, "module": tensor},
                )
            found.append(Input(source.model, tied))
        return found

    def _shape(self, name: str, inputs: list[Input]) -> tuple[int, ...]:
        shapes = [self.headers[item.model][item.tensor].shape for item in inputs]
        if any(shape != shapes[0] for shape in shapes):
            told = ", ".join(
                f"{list(shape)} in {item.model}" for shape, item in zip(shapes, inputs, strict=True)
            )
            raise self._mismatch("mergekit_shape_mismatch", name, f"has different shapes: {told}")
        return shapes[0]

    def _values(self, name: str, inputs: list[Input], part: Slice, base: int | None, t: float) -> Values:
        method, config = self.config.method, self.config
        scopes = [config.parameters] if config.whole else [part.parameters, config.parameters]
        shared = {
            param.name: self._value(param, scopes, name, t, None)
            for param in method.params
            if param.scope == "shared"
        }
        own = {source.model: source.parameters for source in part.sources}
        each = []
        for i, item in enumerate(inputs):
            each.append(
                {
                    param.name: self._value(param, [own[item.model], *scopes], item.tensor, t, item.model)
                    for param in method.params
                    if param.scope == "input" or (param.scope == "non_base" and i != base)
                }
            )
        values = Values(shared, tuple(each))
        check_ranges(method.name, name, values)
        return values

    def _value(self, param: Param, scopes: list[Settings], tensor: str, t: float, model: str | None) -> Any:
        cast = settings.number if param.kind == "number" else settings.truth
        for scope in scopes:
            if param.name in scope:
                value = scope[param.name].at(tensor, t, cast)
                if value is not None:
                    return value
        if param.required:
            of = f" of {model}" if model else ""
            raise InputError(
                "mergekit_parameter_missing",
                f"{self.config.method.name} needs the parameter {param.name}{of} for {tensor}",
                remedy=f"Give {param.name} a value there, or in the global parameters.",
                where={"field": f"parameters.{param.name}", "module": tensor}
                | ({"model": model} if model else {}),
            )
        return param.default

    def _nothing_left(self) -> None:
        """Every tensor of every model must have gone somewhere."""
        used = {(item.model, item.tensor) for output in self.outputs for item in output.inputs}
        for model in self.config.models:
            extra = sorted(name for name in self.headers[model] if (model, name) not in used)
            if extra:
                raise InputError(
                    "mergekit_tensor_extra",
                    f"{model} has {len(extra)} tensors the others do not have, such as {extra[0]}",
                    remedy="Merge models of one architecture.",
                    where={"model": model, "module": extra[0]},
                )

    def _mismatch(self, code: str, name: str, problem: str) -> InputError:
        remedy = "Merge models of one architecture and vocabulary; resize the embeddings beforehand."
        return InputError(code, f"{name} {problem}", remedy=remedy, where={"module": name})
