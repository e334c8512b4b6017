"""Read PEFT LoRA folders (``adapter_config.json`` and ``adapter_model.safetensors``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from merging.formats.experts import MAX_EXPERTS, Expert, depth, layer_of, parameters_of
from merging.formats.guard import Header
from merging.formats.loaded import Adapter, Module
from merging.formats.peft_config import AdapterConfig, parse_adapter_config
from merging.formats.peft_keys import ParsedKey, Role, config_path, is_lora_key, parse_key
from merging.formats.shapes import DAMAGED, Shapes, common_dtype, fail, stored_twice
from merging.formats.source import CONFIG_NAME, Source
from merging.formats.tensors import TensorFile

# What PEFT saves beside the factors without naming it in modules_to_save.
_EMBEDDINGS = ("embed_tokens", "lm_head")
HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def recognises(source: Source, header: Header) -> bool:
    """Whether any tensor is named like a LoRA factor of PEFT."""
    return any(is_lora_key(key) for key in header.tensors)


def read(source: Source, header: Header, label: str) -> Adapter:
    """The adapter in a PEFT folder.

    Raises :class:`InputError`: ``adapter_config_missing``, ``several_adapters``, ``duplicate_module``,
    ``incomplete_pair``, ``empty_shard``, ``factor_shape``, ``rank_mismatch``, ``factor_dtype``,
    ``grouped_conv_unsupported``, ``conv_unsupported``, ``bias_unsupported``, ``unknown_tensor``,
    ``target_parameters_unsupported``, ``tucker_unsupported``, and the codes of the configuration.
    """
    file = source.weights.name
    if source.config is None:
        fail("adapter_config_missing", file, None,
             f"is a PEFT adapter without its {CONFIG_NAME}, which alone states alpha",
             remedy=f"Put {CONFIG_NAME} beside it and give the folder")  # fmt: skip
    config = parse_adapter_config(source.config, file=CONFIG_NAME)
    pairs, full, notes = _sort_keys(header, file)
    reader = _Reader(file, header, config)
    reader.check_full(full)
    reader.check_targets()
    modules: dict[str, Module] = {}
    for name, roles in sorted(pairs.items()):
        for module in reader.modules(name, roles):
            if module.name in modules:
                stored_twice(file, module.name)
            modules[module.name] = module
    reader.check_parameters(modules)
    warnings = [*source.notes, *config.notes, *notes, *_untargeted(modules, config)]
    silent = [name for name, module in modules.items() if module.scale == 0]
    if silent:
        warnings.append(f"lora_alpha is 0 for {len(silent)} modules, which therefore add nothing")
    return Adapter(
        label=label,
        path=source.folder,
        format="peft",
        files=source.files,
        weights=TensorFile(source.weights, header),
        modules=modules,
        full_keys=full,
        config=config,
        base_model=config.base_model_name_or_path or None,
        base_revision=config.revision or None,
        warnings=tuple(warnings),
    )


def _untargeted(modules: Mapping[str, Module], config: AdapterConfig) -> list[str]:
    """A warning when the configuration's list of targets leaves modules out, which PEFT would ignore."""
    if not isinstance(config.target_modules, tuple):
        return []
    targets = frozenset(config.target_modules)
    left_out = []
    for name, module in modules.items():
        if module.expert is not None:
            continue
        segments = config_path(name).split(".")
        if not any(".".join(segments[start:]) in targets for start in range(len(segments))):
            left_out.append(name)
    if not left_out:
        return []
    shown = ", ".join(left_out[:3])
    return [f"target_modules does not name {len(left_out)} of the modules ({shown}); PEFT would ignore them"]


def _sort_keys(header: Header, file: str) -> tuple[dict[str, dict[Role, str]], dict[str, str], list[str]]:
    """Group the keys: module -> role -> key, full tensor name -> key, and warnings."""
    pairs: dict[str, dict[Role, str]] = {}
    full: dict[str, str] = {}
    names: dict[str | None, str] = {}
    fragments: dict[str, int] = {}
    for key in header.tensors:
        if ".lora_mid." in key:
            fail("tucker_unsupported", file, key, f"holds {key}, a Tucker core, which PEFT does not know",
                 remedy="Give the single file without an adapter_config.json")  # fmt: skip
        parsed: ParsedKey = parse_key(key)
        if parsed.stripped:
            fragments[parsed.stripped] = fragments.get(parsed.stripped, 0) + 1
        if parsed.role is None:
            if parsed.path in full:
                stored_twice(file, parsed.path)
            full[parsed.path] = key
            continue
        names.setdefault(parsed.adapter_name, key)
        roles = pairs.setdefault(parsed.path, {})
        if len(names) > 1:
            shown = " and ".join(f"{name or '(none)'} in {key}" for name, key in names.items())
            fail("several_adapters", file, None, f"holds more than one adapter: {shown}",
                 remedy="Save one adapter per file")  # fmt: skip
        if parsed.role in roles:
            stored_twice(file, parsed.path)
        roles[parsed.role] = key
    notes = [f"'{name}.' was removed from {count} keys" for name, count in fragments.items()]
    return pairs, full, notes


class _Reader(Shapes):
    """Shapes, ranks and scales of one file."""

    def __init__(self, file: str, header: Header, config: AdapterConfig) -> None:
        super().__init__(file, header.tensors)
        self.config = config
        self.experts = 0

    def modules(self, name: str, roles: Mapping[Role, str]) -> list[Module]:
        """The module of a pair, or one for each expert if it adapts a bare parameter."""
        targets = self.config.target_parameters or ()
        parameters = parameters_of(layer_of(name), targets)
        if not parameters:
            if depth(name):
                self.fail("target_parameters_unsupported", name,
                          f"wraps a bare parameter that {CONFIG_NAME} does not name",
                          remedy="Name it in target_parameters")  # fmt: skip
            return [self.module(name, roles, config_path(name), 1)]
        if depth(name) >= len(parameters) or self.config.fan_in_fan_out:
            self.fail("target_parameters_unsupported", name, "does not fit target_parameters "
                      f"({', '.join(targets[:10])})", remedy=DAMAGED)  # fmt: skip
        settings = {(self.config.rank_of(path), self.config.scale_of(path)) for path in parameters}
        if len(settings) > 1:
            self.fail("target_parameters_unsupported", name, "has parameters of different rank or alpha, and "
                      "the file does not say which is which",
                      remedy="Give the parameters of one layer the same rank and alpha")  # fmt: skip
        rank = settings.pop()[0]
        stored = self.tensors[roles["A"]].shape if "A" in roles else ()
        count = max(1, (stored[0] if stored else 1) // rank)
        self.experts += count
        if self.experts > MAX_EXPERTS:
            self.fail("target_parameters_unsupported", name, f"brings the experts to more than {MAX_EXPERTS}",
                      remedy="Check r, which tells how many experts a pair of factors is for")  # fmt: skip
        pair = self.module(name, roles, parameters[0], count)
        if pair.kind != "linear":
            self.fail(
                "target_parameters_unsupported", name, f"adapts a parameter as {pair.kind}", remedy=DAMAGED
            )
        experts = (Expert(name, index, count) for index in range(count))
        return [replace(pair, name=expert.name, rank=rank, expert=expert) for expert in experts]

    def check_targets(self) -> None:
        """A parameter without its layer could be anywhere."""
        for target in self.config.target_parameters or ():
            if "." not in target:
                fail("target_parameters_unsupported", CONFIG_NAME, None,
                     f"has {target[:200]!r} in target_parameters, which names no layer",
                     remedy="Write it as layer.parameter")  # fmt: skip

    def check_parameters(self, modules: Mapping[str, Module]) -> None:
        """Every entry of ``target_parameters`` must name a layer that is there."""
        layers = sorted({module.expert.layer for module in modules.values() if module.expert is not None})
        for target in self.config.target_parameters or ():
            if not any(parameters_of(layer, (target,)) for layer in layers):
                fail("target_parameters_unsupported", self.file, None,
                     f"holds nothing for {target[:200]!r} of target_parameters",
                     remedy="Name only the parameters that were trained")  # fmt: skip

    def module(self, name: str, roles: Mapping[Role, str], path: str, count: int) -> Module:
        """Check the pair of a module (``count`` experts); ``path`` is its name in the patterns."""
        embedding = "embedding_A" in roles or "embedding_B" in roles
        expected: tuple[Role, Role] = ("embedding_A", "embedding_B") if embedding else ("A", "B")
        missing = [role for role in expected if role not in roles]
        if missing or len(roles) != 2:
            self.fail("incomplete_pair", name, "has " + ", ".join(f"lora_{r}" for r in roles)
                      + f" but needs exactly lora_{expected[0]} and lora_{expected[1]}",
                      remedy=DAMAGED)  # fmt: skip
        key_A, key_B = roles[expected[0]], roles[expected[1]]
        info_A, info_B = self.factor(name, key_A), self.factor(name, key_B)
        if embedding or len(info_A.shape) == len(info_B.shape) == 2:
            m, n, rank = self.linear(name, info_A.shape, info_B.shape)
            shape: tuple[int, ...] = (n, m) if embedding or self.config.fan_in_fan_out else (m, n)
        else:
            rank, shape = self.conv(name, info_A.shape, info_B.shape)
            m, n = shape[0], math.prod(shape[1:])
        stated = self.config.rank_of(path) * count
        if stated != rank:
            self.fail("rank_mismatch", name, f"has rank {rank} in the weights and {stated} in "
                      f"{CONFIG_NAME}", remedy="Correct r or rank_pattern; PEFT sorts the patterns when it "
                      "saves, so each module should be hit by one only")  # fmt: skip
        kinds = {True: "embedding", False: "linear" if len(shape) == 2 else "conv2d"}
        return Module(
            name=name,
            kind=kinds[embedding],  # type: ignore[arg-type]
            m=m,
            n=n,
            rank=rank,
            scale=self.config.scale_of(path),
            dtype=common_dtype(info_A.dtype, info_B.dtype),
            weight_shape=shape,
            fan_in_fan_out=self.config.fan_in_fan_out and len(shape) == 2 and not embedding,
            key_A=key_A,
            key_B=key_B,
        )

    def check_full(self, full: Mapping[str, str]) -> None:
        """Every other tensor must be one that the configuration explains."""
        saved = (
            *(self.config.modules_to_save or ()),
            *HEADS.get(self.config.task_type or "", ()),
            *_EMBEDDINGS,
        )
        unknown: list[str] = []
        for name, key in full.items():
            dotted = f".{name}"
            if any(f".{module}." in dotted for module in saved):
                if 0 in self.tensors[key].shape:
                    self.fail("empty_shard", name, "is empty",
                              remedy="Gather the full parameters before save_pretrained")  # fmt: skip
            elif name.endswith(".bias") and self.config.bias != "none":
                self.fail("bias_unsupported", name, f"is a trained bias (bias: {self.config.bias}); "
                          "biases replace those of the base and cannot be merged as a LoRA",
                          remedy="Train with bias none")  # fmt: skip
            else:
                unknown.append(key)
        if unknown:
            shown = ", ".join(unknown[:10])
            fail("unknown_tensor", self.file, unknown[0], f"holds {len(unknown)} tensors that "
                 f"{CONFIG_NAME} does not explain: {shown}",
                 remedy="Name their modules in modules_to_save, or remove them")  # fmt: skip
