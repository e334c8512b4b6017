"""Merge kohya and diffusers files: exact, in the family of the inputs, the same bytes again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write_adapter
from formats.image_files import Layer, deltas, kohya_layers, layer, write_kohya, write_named
from safetensors import safe_open
from torch import Tensor

import merging
from merging.errors import InputError

NAMED = ("transformer.blocks.0.attn.to_q", "transformer.conv_in", "text_encoder.layers.0.mlp.fc1")


def named_layers(seed: int, rank: int) -> dict[str, Layer]:
    """Two components, one convolution."""
    return {
        NAMED[0]: layer(12, 8, rank, seed=seed),
        NAMED[1]: layer(16, 5, rank + 1, kernel=3, seed=seed + 1),
        NAMED[2]: layer(10, 7, rank, seed=seed + 2),
    }


def recipe(paths: list[Path], method: str = "linear", **more: Any) -> dict[str, Any]:
    return {"merge_method": method, "models": [{"model": str(path)} for path in paths], **more}


def metadata(path: Path) -> dict[str, str]:
    with safe_open(str(path), "pt") as handle:
        found: dict[str, str] = handle.metadata()
    return found


def assert_sum(found: Mapping[str, Tensor], parts: list[Mapping[str, Tensor]]) -> None:
    assert list(found) == sorted(parts[0])
    for name, delta in found.items():
        torch.testing.assert_close(delta, sum(part[name] for part in parts), rtol=1e-5, atol=1e-6)


@pytest.fixture
def kohya(tmp_path: Path) -> list[Path]:
    """Two files that differ in rank and alpha."""
    return [
        write_kohya(tmp_path / "a.safetensors", kohya_layers(seed=1, rank=4), alpha=2.0),
        write_kohya(tmp_path / "b.safetensors", kohya_layers(seed=20, rank=3), alpha=None),
    ]


@pytest.fixture
def named(tmp_path: Path) -> list[Path]:
    """Two files of diffusers, one of them with alpha tensors."""
    return [
        write_named(tmp_path / "x" / "pytorch_lora_weights.safetensors", named_layers(1, 3)),
        write_named(tmp_path / "y" / "any_name.safetensors", named_layers(30, 2), alpha=1.0),
    ]


def test_kohya_in_kohya_out(kohya: list[Path], tmp_path: Path) -> None:
    result = merging.merge(recipe(kohya), tmp_path / "out")
    assert sorted(result.files) == ["README.md", "lora.safetensors", "merge.yaml", "report.json"]
    one = {name: own.delta(2 / 4) for name, own in kohya_layers(seed=1, rank=4).items()}
    two = {name: own.delta(1.0) for name, own in kohya_layers(seed=20, rank=3).items()}
    assert_sum(deltas(tmp_path / "out"), [one, two])
    with safe_open(str(tmp_path / "out/lora.safetensors"), "pt") as handle:
        alphas = [key for key in handle.keys() if key.endswith(".alpha")]  # noqa: SIM118
        assert len(alphas) == len(one)
        # one number for all: the most common rank, though the small convolutions have rank 6
        assert {(float(handle.get_tensor(key)), handle.get_tensor(key).ndim) for key in alphas} == {(7.0, 0)}
        assert handle.get_tensor("lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight").shape[0] == 6


def test_a_tucker_core_becomes_a_plain_convolution(tmp_path: Path) -> None:
    layers = [
        {"lora_unet_conv": layer(6, 5, 3, kernel=3, tucker=True, seed=1)},
        {"lora_unet_conv": layer(6, 5, 2, kernel=3, seed=2)},
    ]
    paths = [write_kohya(tmp_path / f"{i}.safetensors", own, alpha=1.0) for i, own in enumerate(layers)]
    merging.merge(recipe(paths), tmp_path / "out")
    parts = [{name: own[name].delta(1 / own[name].rank) for name in own} for own in layers]
    assert_sum(deltas(tmp_path / "out"), parts)
    with safe_open(str(tmp_path / "out/lora.safetensors"), "pt") as handle:
        assert handle.get_tensor("lora_unet_conv.lora_down.weight").shape == (5, 5, 3, 3)
        assert handle.get_tensor("lora_unet_conv.lora_up.weight").shape == (6, 5, 1, 1)


def test_diffusers_in_diffusers_out(named: list[Path], tmp_path: Path) -> None:
    result = merging.merge(recipe(named), tmp_path / "out")
    assert "pytorch_lora_weights.safetensors" in result.files
    assert "adapter_config.json" not in result.files
    one = {name: own.delta(1.0) for name, own in named_layers(1, 3).items()}
    two = {name: own.delta(1 / own.rank) for name, own in named_layers(30, 2).items()}
    assert_sum(deltas(tmp_path / "out"), [one, two])
    header = metadata(tmp_path / "out/pytorch_lora_weights.safetensors")
    config = json.loads(header["lora_adapter_metadata"])
    assert (config["transformer.r"], config["text_encoder.r"]) == (7, 5)
    assert config["transformer.rank_pattern"] == config["transformer.alpha_pattern"]
    assert header["format"] == "pt"
    assert "library_name: diffusers" in (tmp_path / "out/README.md").read_text()


def test_names_of_the_original_models_get_no_configuration(tmp_path: Path) -> None:
    paths = [
        write_named(tmp_path / f"{i}.safetensors", {"diffusion_model.a.q": layer(6, 6, 2, seed=i)})
        for i in range(2)
    ]
    merging.merge(recipe(paths), tmp_path / "out")
    assert "lora_adapter_metadata" not in metadata(tmp_path / "out/pytorch_lora_weights.safetensors")
    assert list(deltas(tmp_path / "out")) == ["diffusion_model.a.q"]


@pytest.mark.parametrize("family", ["kohya", "named"])
@pytest.mark.parametrize("method", ["linear", "svd", "ties", "tsv"])
def test_the_same_bytes_again_from_any_order_and_place(
    family: str, method: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    paths: list[Path] = request.getfixturevalue(family)
    moved = []
    for index, path in enumerate(paths):
        moved.append(tmp_path / f"moved-{index}.safetensors")
        shutil.copy(path, moved[-1])
    output = {"rank": 3}
    one = merging.merge(recipe(paths, method, output=output), tmp_path / "one", threads=1)
    two = merging.merge(recipe(moved[::-1], method, output=output), tmp_path / "two", threads=2)
    again = merging.merge(tmp_path / "one/merge.yaml", tmp_path / "again")
    weights = next(name for name in one.files if name.endswith(".safetensors"))
    assert one.files[weights] == two.files[weights]
    assert one.files == again.files
    written = (tmp_path / "one" / weights).read_bytes()
    assert hashlib.sha256(written).hexdigest() == one.files[weights]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_merging_a_result_alone_gives_it_back(dtype: str, kohya: list[Path], tmp_path: Path) -> None:
    merging.merge(recipe(kohya, output={"dtype": dtype}), tmp_path / "one")
    merging.merge(recipe([tmp_path / "one"]), tmp_path / "two")
    one, two = deltas(tmp_path / "one"), deltas(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=1e-7)


def test_uniform_rank_holds_in_every_family(named: list[Path], tmp_path: Path) -> None:
    merging.merge(recipe(named, output={"uniform_rank": True}), tmp_path / "out")
    with merging.load_adapter(tmp_path / "out") as adapter:
        assert {module.rank for module in adapter.modules.values()} == {7}


def refusal(data: dict[str, Any], out: Path) -> InputError:
    with pytest.raises(InputError) as planned:
        merging.plan(data)
    with pytest.raises(InputError) as caught:
        merging.merge(data, out)
    assert caught.value.code == planned.value.code
    assert not out.exists()
    return caught.value


def test_families_are_not_mixed(kohya: list[Path], named: list[Path], tmp_path: Path) -> None:
    peft = write_adapter(tmp_path / "peft")
    assert refusal(recipe([kohya[0], named[0]]), tmp_path / "out").code == "mixed_families"
    assert refusal(recipe([peft, named[0]]), tmp_path / "out").code == "mixed_families"


def test_one_model_under_two_names_is_refused(tmp_path: Path) -> None:
    paths = [
        write_named(tmp_path / f"{name}.safetensors", {f"{name}.a.q": layer(6, 6, 2)})
        for name in ("transformer", "diffusion_model")
    ]
    data = recipe(paths, missing_modules="zero")
    assert refusal(data, tmp_path / "out").code == "mixed_spellings"


def test_a_text_encoder_beside_original_names_is_fine(tmp_path: Path) -> None:
    layers = {"diffusion_model.a.q": layer(6, 6, 2), "text_encoder.b.q": layer(6, 6, 2)}
    merging.merge(recipe([write_named(tmp_path / "a.safetensors", layers)]), tmp_path / "out")
    assert list(deltas(tmp_path / "out")) == sorted(layers)


def test_what_needs_the_names_of_the_base_is_refused(kohya: list[Path], tmp_path: Path) -> None:
    delta = recipe(kohya, output={"format": "delta"})
    assert refusal(delta, tmp_path / "out").code == "family_output_unsupported"
    assert refusal(recipe(kohya, "rmm"), tmp_path / "out").code == "family_method_unsupported"


HEADERS = (
    {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_v2": "False",
        "ss_tag_frequency": '{"private": 1}',
        "sshs_model_hash": "abc",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.license": "CC-BY-4.0",
        "modelspec.hash_sha256": "0xabc",
        "modelspec.title": "Sepia",
        "modelspec.resolution": "1024x1024",
    },
    {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "lycoris.kohya",
        "ss_output_name": "ink",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.license": "OpenRAIL++",
        "modelspec.resolution": "512x512",
    },
    {"modelspec.merged_from": "Chalk, Sepia", "modelspec.license": "CC-BY-4.0"},
)


def with_headers(folder: Path, headers: tuple[Mapping[str, str], ...]) -> list[Path]:
    return [
        write_kohya(folder / f"{i}.safetensors", kohya_layers(seed=i), metadata=header)
        for i, header in enumerate(headers)
    ]


def test_header_metadata_is_kept_joined_rewritten_or_dropped_on_purpose(tmp_path: Path) -> None:
    merging.merge(recipe(with_headers(tmp_path, HEADERS)), tmp_path / "out")
    header = metadata(tmp_path / "out/lora.safetensors")
    own = {key: value for key, value in header.items() if not key.startswith("merganser.")}
    assert own == {
        "format": "pt",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "Dynamic",
        "ss_network_alpha": "8",
        "ss_network_args": '{"conv_alpha": "8", "conv_dim": "6"}',
        "ss_v2": "False",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.license": "CC-BY-4.0; OpenRAIL++",
        "modelspec.merged_from": "Chalk, Sepia, ink",
    }


@pytest.mark.parametrize("key", ["ss_base_model_version", "modelspec.architecture"])
def test_other_bases_are_refused_unless_allowed(key: str, tmp_path: Path) -> None:
    data = recipe(with_headers(tmp_path, ({key: "sd_v1"}, {key: "flux1"})))
    assert refusal(data, tmp_path / "out").code == "base_model_mismatch"
    result = merging.merge({**data, "allow_base_mismatch": True}, tmp_path / "out")
    assert any("different" in warning["message"] for warning in result.report["warnings"])
    assert key not in metadata(tmp_path / "out/lora.safetensors")


def test_hostile_header_metadata_does_not_travel(tmp_path: Path) -> None:
    bad = {"modelspec.license": "mit\nline", "modelspec.author": "x" * 5000, "ss_output_name": "a\x1b[31m"}
    merging.merge(recipe(with_headers(tmp_path, (bad,))), tmp_path / "out")
    header = metadata(tmp_path / "out/lora.safetensors")
    assert "modelspec.license" not in header
    assert "modelspec.author" not in header
    assert header["modelspec.merged_from"].startswith("sha256:")
