"""kohya, diffusers and AI-toolkit files: every spelling stands for the dense update it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from formats.build import entries, pack
from formats.hostile_images import KOHYA, NAMED
from formats.image_files import deltas, kohya_layers, layer, write_kohya, write_named
from hypothesis import given, settings
from hypothesis import strategies as st

from merging.errors import InputError
from merging.formats.adapter import open_adapter

PATH = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert list(found) == sorted(wanted)
    for name, delta in wanted.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("alpha", "scale"), [(2.0, 0.5), (4.0, 1.0), (-1.0, -0.25), (None, 1.0), (0.0, 1.0)])
def test_kohya_scale_is_alpha_over_rank_and_none_or_zero_is_the_rank(
    alpha: float | None, scale: float, tmp_path: Path
) -> None:
    layers = kohya_layers(rank=4)
    path = write_kohya(tmp_path / "style.safetensors", layers, alpha=alpha)
    assert_equal(deltas(path), {name: own.delta(scale) for name, own in layers.items()})
    warnings = open_adapter(path).warnings
    assert len(warnings) == (alpha == 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32])
def test_alpha_of_any_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    path = write_kohya(tmp_path / "a.safetensors", kohya_layers(rank=4), alpha=3.0, alpha_dtype=dtype)
    assert {module.scale for module in open_adapter(path).modules.values()} == {0.75}


def test_kohya_kinds_and_shapes(tmp_path: Path) -> None:
    adapter = open_adapter(write_kohya(tmp_path / "style.safetensors", kohya_layers()))
    assert (adapter.format, adapter.label) == ("kohya", "style")
    conv = adapter.modules["lora_unet_down_blocks_0_resnets_0_conv1"]
    assert (conv.kind, conv.weight_shape, conv.n) == ("conv2d", (6, 10, 3, 3), 90)
    assert adapter.modules["lora_unet_down_blocks_0_to_out_0"].kind == "linear"


@pytest.mark.parametrize("alpha", [None, 1.5])
def test_a_tucker_core_is_exact(alpha: float | None, tmp_path: Path) -> None:
    layers = {"lycoris_conv": layer(6, 5, 3, kernel=3, tucker=True)}
    path = write_kohya(tmp_path / "a.safetensors", layers, alpha=alpha)
    assert_equal(deltas(path), {"lycoris_conv": layers["lycoris_conv"].delta((alpha or 3) / 3)})
    assert open_adapter(path).modules["lycoris_conv"].weight_shape == (6, 5, 3, 3)


SPELLINGS = {
    "up_down": (f"{PATH}.to_q", ".lora_down.weight", ".lora_up.weight"),
    "processor": (f"{PATH}.processor.to_q", "_lora.down.weight", "_lora.up.weight"),
    "processor_out": (f"{PATH}.processor.to_out", "_lora.down.weight", "_lora.up.weight"),
    "peft": (f"{PATH}.to_q", ".lora_A.weight", ".lora_B.weight"),
    "dotted": (f"{PATH}.to_q", ".lora.down.weight", ".lora.up.weight"),
    "bare": (f"{PATH}.to_q", ".lora_A", ".lora_B"),
    "linear_layer": (f"{PATH}.to_q", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "adapter_name": (f"{PATH}.to_q", ".lora_A.default.weight", ".lora_B.default.weight"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_means_the_same_with_scale_one(spelling: str, tmp_path: Path) -> None:
    name, tail_A, tail_B = SPELLINGS[spelling]
    own = layer(12, 8, 3)
    path = write_named(tmp_path / "a.safetensors", {name: own}, tails=(tail_A, tail_B))
    target = f"{PATH}.to_out.0" if spelling == "processor_out" else f"{PATH}.to_q"
    assert_equal(deltas(path), {target: own.delta(1.0)})
    assert open_adapter(path).format == "diffusers"


@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if not name.startswith("processor")])
def test_alpha_tensors_count_in_every_spelling(spelling: str, tmp_path: Path) -> None:
    name, tail_A, tail_B = SPELLINGS[spelling]
    own = layer(12, 8, 4)
    path = write_named(tmp_path / "a.safetensors", {name: own}, tails=(tail_A, tail_B), alpha=1.0)
    assert_equal(deltas(path), {name: own.delta(0.25)})


@pytest.mark.parametrize(
    "component",
    ["unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "diffusion_model"],
)
def test_components(component: str, tmp_path: Path) -> None:
    own = layer(12, 8, 4)
    assert_equal(
        deltas(write_named(tmp_path / "a.safetensors", {f"{component}.b.0.to_q": own})),
        {f"{component}.b.0.to_q": own.delta(1.0)},
    )


def test_the_oldest_files_leave_the_unet_out(tmp_path: Path) -> None:
    own = layer(12, 8, 4)
    name = PATH.removeprefix("unet.") + ".processor.to_k"
    path = write_named(tmp_path / "a", {name: own}, tails=("_lora.down.weight", "_lora.up.weight"))
    path = path.rename(tmp_path / "a.safetensors")
    assert_equal(deltas(path), {f"{PATH}.to_k": own.delta(1.0)})
    assert "unet" in open_adapter(path).warnings[0]


def test_diffusers_zero_alpha_adds_nothing_and_is_reported(tmp_path: Path) -> None:
    path = write_named(tmp_path / "a.safetensors", {"unet.a.q": layer(6, 6, 2)}, alpha=0.0)
    assert not deltas(path)["unet.a.q"].any()
    assert "add nothing" in open_adapter(path).warnings[0]


def test_the_configuration_in_the_header_states_ranks_and_scales(tmp_path: Path) -> None:
    layers = {
        "transformer.blocks.0.to_q": layer(12, 8, 4),
        "transformer.blocks.0.to_k": layer(12, 8, 2, seed=1),
        "text_encoder.layers.0.fc": layer(12, 8, 3, seed=2),
    }
    config = {
        "transformer.r": 4,
        "transformer.lora_alpha": 8,
        "transformer.rank_pattern": {"to_k": 2},
        "transformer.alpha_pattern": {"blocks.0.to_k": 6},
        "transformer.base_model_name_or_path": None,
        "transformer.target_modules": ["to_q", "to_k"],
        "text_encoder.r": 3,
        "text_encoder.lora_alpha": 3,
        "text_encoder.use_rslora": True,
    }
    path = write_named(tmp_path / "pytorch_lora_weights.safetensors", layers, config=config)
    scales = {
        "transformer.blocks.0.to_q": 2.0,
        "transformer.blocks.0.to_k": 3.0,
        "text_encoder.layers.0.fc": 3**0.5,
    }
    wanted = {name: own.delta(scales[name]) for name, own in layers.items()}
    assert_equal(deltas(path), wanted)
    assert_equal(deltas(tmp_path), wanted)  # the folder names the same file


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"unet.r": 3, "unet.lora_alpha": 3}, "rank_mismatch"),
        ({"unet.r": 2, "unet.use_dora": True}, "dora_unsupported"),
        ({"unet.r": 2, "unet.mystery": 1}, "unknown_config_field"),
        ({"unet.r": 2, "unet.peft_type": "LOHA"}, "peft_type_unsupported"),
        ({"r": 2}, "config_field"),
        ({"nothing.r": 2}, "config_field"),
        ({"unet.r": 2, "unet.rank_pattern": {"(?=a)": 2}}, "pattern_unsupported"),
    ],
)
def test_a_bad_configuration_in_the_header(config: dict[str, Any], code: str, tmp_path: Path) -> None:
    path = write_named(tmp_path / "a.safetensors", {"unet.a.q": layer(6, 6, 2)}, config=config)
    with pytest.raises(InputError) as caught:
        open_adapter(path)
    assert caught.value.code == code


def test_alpha_and_configuration_must_not_contradict(tmp_path: Path) -> None:
    config = {"unet.r": 2, "unet.lora_alpha": 2}
    own = {"unet.a.q": layer(6, 6, 2)}
    assert open_adapter(write_named(tmp_path / "a.safetensors", own, config=config, alpha=2.0)).modules
    with pytest.raises(InputError) as caught:
        open_adapter(write_named(tmp_path / "b.safetensors", own, config=config, alpha=1.0))
    assert caught.value.code == "alpha_conflict"


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 1e30, (1.0, 1.0), True])
def test_alpha_must_be_one_finite_number(alpha: object, tmp_path: Path) -> None:
    own = layer(6, 6, 2)
    tensors = {
        "lora_unet_a.lora_down.weight": own.A,
        "lora_unet_a.lora_up.weight": own.B,
        "lora_unet_a.alpha": torch.tensor(alpha),
    }
    from safetensors.torch import save_file

    save_file(tensors, str(tmp_path / "a.safetensors"))
    with pytest.raises(InputError) as caught:
        open_adapter(tmp_path / "a.safetensors")
    assert caught.value.code == "alpha_invalid"


def test_a_folder_with_several_files_needs_a_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_kohya(tmp_path / f"{name}.safetensors", kohya_layers())
    with pytest.raises(InputError) as caught:
        open_adapter(tmp_path)
    assert caught.value.code == "several_adapters"
    assert open_adapter(tmp_path / "a.safetensors").label == "a"


def test_damaged_factors_are_found_when_they_are_read(tmp_path: Path) -> None:
    layers = {"lora_unet_a": layer(6, 5, 3, kernel=3, tucker=True)}
    mid = layers["lora_unet_a"].mid
    assert mid is not None
    mid[0, 0, 0, 0] = float("nan")
    with (
        open_adapter(write_kohya(tmp_path / "a.safetensors", layers)) as adapter,
        pytest.raises(InputError) as caught,
    ):
        adapter.factors("lora_unet_a")
    assert caught.value.code == "non_finite_tensor"


TAILS = ("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "lora_A.weight", "lora_B", "diff")
NAMES = ("lora_unet_a", "unet.a", "lora_.b", "unet", "x.processor.to_q_lora", "", ".", "unet..lora")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_names_and_shapes_are_read_or_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shape = st.lists(st.integers(0, 3), max_size=4).map(tuple)
    key = st.builds("{}.{}".format, st.sampled_from(NAMES), st.sampled_from(TAILS))
    shapes = data.draw(st.dictionaries(key, shape, min_size=1, max_size=6))
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    path.write_bytes(pack(entries({**data.draw(st.sampled_from(({}, KOHYA, NAMED))), **shapes})))
    try:
        with open_adapter(path) as adapter:
            for name, module in adapter.modules.items():
                B, A = adapter.factors(name)
                assert (B.shape, A.shape) == ((module.m, module.rank), (module.rank, module.n))
    except InputError as error:
        refused = error.message
    else:
        refused = ""
    assert all(character.isprintable() for character in refused)
