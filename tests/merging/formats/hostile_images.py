"""Broken, foreign and hostile LoRA files of image models: single files in a folder without configuration."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from formats.build import Case, Shapes, entries, pack

NAME = "lora_unet_a"
KOHYA: Shapes = {f"{NAME}.lora_down.weight": (2, 3), f"{NAME}.lora_up.weight": (4, 2), f"{NAME}.alpha": ()}
NAMED: Shapes = {"unet.a.q.lora_A.weight": (2, 3), "unet.a.q.lora_B.weight": (4, 2)}


def write_file(folder: Path, shapes: Shapes, *, dtype: str = "F32", name: str = "style.safetensors") -> None:
    """One safetensors file in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(pack(entries(shapes, dtype)))


def _case(name: str, shapes: Shapes, code: str, dtype: str = "F32") -> Case:
    return Case(f"image_{name}", partial(write_file, shapes=shapes, dtype=dtype), code)


def image_cases() -> Iterator[Case]:
    """All of them."""
    for tail, code in {
        "hada_w1_a": "loha_unsupported",
        "lokr_w1": "lokr_unsupported",
        "oft_blocks": "oft_unsupported",
        "oft_diag": "oft_unsupported",
        "dora_scale": "dora_unsupported",
        "on_input": "ia3_unsupported",
        "diff": "dense_delta_unsupported",
        "diff_b": "dense_delta_unsupported",
        "set_weight": "dense_delta_unsupported",
        "w_norm": "norm_delta_unsupported",
        "b_norm": "norm_delta_unsupported",
        "reshape_weight": "reshape_weight_unsupported",
        "lora_up.0.weight": "split_qkv_unsupported",
        "lora_down.1.weight": "split_qkv_unsupported",
    }.items():
        yield _case(f"kohya_{tail}", {**KOHYA, f"{NAME}_b.{tail}": (2, 2)}, code)
        yield _case(f"alone_{tail}", {f"{NAME}.{tail}": (2, 2)}, code)
        yield _case(f"named_{tail}", {**NAMED, f"unet.b.{tail}": (2, 2)}, code)
    glora = {f"{NAME}.{part}.weight": (2, 2) for part in ("a1", "a2", "b1", "b2")}
    yield _case("glora", glora, "glora_unsupported")
    yield _case("only_down", {f"{NAME}.lora_down.weight": (2, 3)}, "incomplete_pair")
    yield _case("only_alpha", {**KOHYA, f"{NAME}_b.alpha": ()}, "incomplete_pair")
    yield _case("misfit", {**KOHYA, f"{NAME}.lora_up.weight": (4, 3)}, "factor_shape")
    yield _case("core_misfit", {**KOHYA, f"{NAME}.lora_mid.weight": (2, 2, 3, 3)}, "factor_shape")
    conv = {f"{NAME}.lora_down.weight": (2, 3, 1, 1), f"{NAME}.lora_up.weight": (4, 2, 1, 1)}
    yield _case("core_unequal", {**conv, f"{NAME}.lora_mid.weight": (3, 2, 3, 3)}, "factor_shape")
    yield _case("core_flat", {**conv, f"{NAME}.lora_mid.weight": (2, 2)}, "factor_shape")
    yield _case("conv_3d", {k: (*shape, 1) for k, shape in conv.items()}, "conv_unsupported")
    yield _case("alpha_shape", {**KOHYA, f"{NAME}.alpha": (3,)}, "alpha_invalid")
    yield _case("alpha_empty", {**KOHYA, f"{NAME}.alpha": (0,)}, "alpha_invalid")
    yield _case("integers", KOHYA, "factor_dtype", dtype="I64")
    yield _case("empty_factor", {**KOHYA, f"{NAME}.lora_down.weight": (2, 0)}, "empty_shard")
    yield _case("foreign_tensor", {**KOHYA, "bundle_emb.x.clip_l": (2, 3)}, "unknown_tensor")
    yield _case("two_spellings", {**KOHYA, **NAMED}, "several_families")
    up = {"unet.a.q.lora_up.weight": (4, 2), "unet.a.q.lora_down.weight": (2, 3)}
    yield _case("module_twice", {**NAMED, **up}, "duplicate_module")
    names = {f"unet.a.{name}.lora_{part}.{name}.weight": (2, 2) for name in "xy" for part in "AB"}
    yield _case("two_adapter_names", names, "several_adapters")
    bare = {"double_blocks.0.qkv.lora_up.weight": (4, 2), "double_blocks.0.qkv.lora_down.weight": (2, 3)}
    yield _case("no_component", bare, "component_missing")
    language = {f"model.layers.0.q.lora_{part}.weight": (2, 2) for part in "AB"}
    yield _case("peft_without_configuration", language, "adapter_config_missing")
    yield _case(
        "numbered_processor", {"double_blocks.0.processor.qkv_lora1.up.weight": (4, 2)}, "unknown_format"
    )
