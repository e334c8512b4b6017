"""The inputs of a method that looks at data against the modules that are to be merged. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merging.calibration.base_files import TRANSPOSED, BaseFiles
from merging.calibration.inputs import Inputs, fail
from merging.formats.adapter import Adapter, Module


def check_inputs(
    inputs: Inputs,
    adapters: Sequence[Adapter],
    modules: Mapping[str, Sequence[int]],
    *,
    whole: bool = True,
) -> None:
    """Check the inputs against the modules that are to be merged.

    Unless the weights of the base must be ``whole``, only their headers may be there; its digest is then not
    compared.

    Raises ``statistics_base_mismatch``, ``statistics_model_mismatch``, ``statistics_module_missing``,
    ``statistics_incomplete``, ``module_not_in_base``, ``base_shape_mismatch``,
    ``calibration_kind_unsupported``.
    """
    _check_statistics(inputs, adapters, whole)
    described = {name: adapters[present[0]].modules[name] for name, present in modules.items()}
    if inputs.base is not None:
        check_base(inputs.base, described)
    for name, module in described.items():
        if module.kind != "linear" or module.expert is not None:
            fail(
                "calibration_kind_unsupported",
                f"module {name} is {module.kind}; data can only be gathered for the inputs of linear layers",
                "Merge it with a method that needs no data.",
                name,
            )
        for file in inputs.statistics:
            if file is None:
                continue
            known = file.info.modules.get(name)
            if known is None or (known.m, known.n) != (module.m, module.n):
                what = "nothing" if known is None else f"a layer of {known.m} x {known.n}"
                fail(
                    "statistics_module_missing",
                    f"{file.path.name} has {what} for {name}",
                    "Compute the statistics with a recipe of these models.",
                    name,
                )


def _check_statistics(inputs: Inputs, adapters: Sequence[Adapter], whole: bool) -> None:
    files = [file for file in inputs.statistics if file is not None]
    bases = {file.info.base for file in files}
    if inputs.base is not None and files and (whole or inputs.base.complete):
        bases.add(inputs.base.digest)
    if len(bases) > 1:
        fail(
            "statistics_base_mismatch",
            "the statistics are of another base model",
            "Compute them with the base model of the recipe.",
            "statistics",
        )
    rows = {file.info.row for file in files}
    if any(inputs.datasets):
        rows.add(inputs.settings.rows)
    if len(rows) > 1:
        fail(
            "statistics_rows_mismatch",
            "for some tasks a row of the statistics is a token, for others a sample",
            "Compute them with one setting of calibration.rows.",
            "calibration.rows",
        )
    own = {adapter.digest: adapter.label for adapter in adapters} if inputs.features == "model" else {}
    for file, adapter in zip(inputs.statistics, adapters, strict=True):
        if file is None:
            continue
        if file.info.features != inputs.features:
            fail(
                "statistics_features_mismatch",
                f"{file.path.name} holds features of the {file.info.features}, "
                f"but {inputs.method} is to use those of the {inputs.features}",
                f"Set calibration.features: {file.info.features}, or compute them anew.",
                "statistics",
            )
        if inputs.features == "model" and file.info.model != adapter.digest:
            known = own.get(file.info.model or "")
            what = f"of {known}" if known else "of an adapter that is not in the recipe"
            fail(
                "statistics_model_mismatch",
                f"{file.path.name}, given for {adapter.label}, is {what}",
                "Give each model the statistics of its own task.",
                "statistics",
            )
        if inputs.method == "mats" and not file.has_output_grams():
            fail(
                "statistics_incomplete",
                f"{file.path.name} has no Gram matrices of output gradients",
                None,
                "statistics",
            )
    if inputs.method == "mats" and len(files) < len(adapters):
        fail(
            "statistics_incomplete",
            "mats needs Gram matrices of output gradients, which only a statistics file can bring",
            "Use regmean with `data`.",
            "statistics",
        )


def check_base(base: BaseFiles, modules: Mapping[str, Module]) -> None:
    """Raise ``module_not_in_base`` or ``base_shape_mismatch``.

    Some models have other names in their files than in memory; where no layer is found, loading decides.
    """
    keys = {name: base_key(base, name) for name in modules}
    if not any(keys.values()):
        return
    for name, module in modules.items():
        key = keys[name]
        if key is None:
            fail(
                "module_not_in_base",
                f"the base model {base.folder.name} has no layer {name}",
                "Give the base model that the adapters were trained on.",
                name,
            )
        shape = base.tensors[key].shape
        wanted = (module.n, module.m) if base.model_type in TRANSPOSED else (module.m, module.n)
        if shape != wanted:
            fail(
                "base_shape_mismatch",
                f"{name} is {module.m} x {module.n}, but the base has {shape}",
                "Give the base model that the adapters were trained on.",
                name,
            )


def base_key(base: BaseFiles, name: str) -> str | None:
    """The key of a layer's weight in the files of a base, whose names may have a prefix more or less."""
    parts = name.split(".")
    for start in range(min(3, len(parts))):
        key = ".".join(parts[start:]) + ".weight"
        if key in base.tensors:
            return key
    ending = f".{name}.weight"
    found = [key for key in base.tensors if key.endswith(ending) and key.count(".") <= ending.count(".") + 1]
    return found[0] if len(found) == 1 else None
