"""The entry-wise methods from files to files: reproducible bytes, order, missing modules, low precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import MODULES, products, write_adapter
from entrywise_tools import SETTINGS, SPACES

import merging
from merging.errors import InputError


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Adapters of different ranks; one is bfloat16."""
    return [
        write_adapter(tmp_path / "a", seed=1, rank=4, alpha=8),
        write_adapter(tmp_path / "b", seed=2, rank=2, alpha=3, dtype=torch.bfloat16),
        write_adapter(tmp_path / "c", seed=3, rank=6, alpha=6),
    ]


def recipe(paths: list[Path], method: str, **more: Any) -> dict[str, Any]:
    return {"merge_method": method, "models": [{"model": str(path)} for path in paths], **more}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", SETTINGS)
def test_same_bytes_in_any_order_and_for_any_number_of_threads(
    three: list[Path], tmp_path: Path, method: str, space: str
) -> None:
    data = recipe(three, method, space=space, parameters=SETTINGS[method], output={"rank": 5}, seed=7)
    data["models"][0]["parameters"] = {"weight": 0.7}
    first = merging.merge(data, tmp_path / "one", threads=1, device="cpu")
    data["models"] = data["models"][::-1]
    second = merging.merge(data, tmp_path / "two", threads=2, device="cpu")
    assert first.recipe_digest == second.recipe_digest
    name = "adapter_model.safetensors"
    assert first.files[name] == second.files[name]


@pytest.mark.gpu
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", [*SETTINGS, "slerp"])
def test_a_cuda_device_gives_the_same_products(
    three: list[Path], tmp_path: Path, method: str, space: str
) -> None:
    models = three[:2] if method == "slerp" else three
    data = recipe(models, method, space=space, parameters=SETTINGS.get(method, {}))
    merging.merge(data, tmp_path / "cpu", device="cpu")
    merging.merge(data, tmp_path / "cuda", device="cuda")
    expected, found = products(tmp_path / "cpu"), products(tmp_path / "cuda")
    for name, delta in expected.items():
        assert float((found[name] - delta).norm()) <= 1e-4 * float(delta.norm())


def test_slerp_knows_which_model_comes_first(three: list[Path], tmp_path: Path) -> None:
    data = recipe(three[:2], "slerp", parameters={"t": 0.2})
    forward = merging.merge(data, tmp_path / "forward")
    data["models"] = data["models"][::-1]
    backward = merging.merge(data, tmp_path / "backward")
    assert forward.recipe_digest != backward.recipe_digest
    merging.merge({**data, "parameters": {"t": 0.8}}, tmp_path / "mirrored")
    one, two, same = (products(tmp_path / name) for name in ("forward", "backward", "mirrored"))
    for name, delta in one.items():
        torch.testing.assert_close(same[name], delta, rtol=1e-4, atol=1e-6)
        assert float((two[name] - delta).norm()) > 0.1 * float(delta.norm())


@pytest.mark.parametrize("method", SETTINGS)
def test_a_module_that_one_model_has_is_merged_from_that_model(
    three: list[Path], tmp_path: Path, method: str
) -> None:
    extra = "layers.2.q_proj"
    four = write_adapter(tmp_path / "d", seed=4, rank=3, alpha=3, modules={**MODULES, extra: (10, 12)})
    parameters = {**SETTINGS[method], "lambda": 1.0}
    if "density" in parameters:
        parameters["density"] = 0.8
    parameters |= {"select_topk": 1.0} if method == "sce" else {}
    data = recipe([*three, four], method, missing_modules="zero", parameters=parameters)
    merging.merge(data, tmp_path / "out")
    merged, alone = products(tmp_path / "out")[extra], products(four)[extra]
    retention = float((merged * alone).sum() / (alone * alone).sum())
    assert 0.3 < retention < 1.3


@pytest.mark.parametrize("method", SETTINGS)
def test_models_that_were_never_trained_merge_to_an_adapter_of_zeros(tmp_path: Path, method: str) -> None:
    paths = [write_adapter(tmp_path / str(i), seed=i, zero=True) for i in range(2)]
    result = merging.merge(recipe(paths, method, parameters=SETTINGS[method]), tmp_path / "out")
    for delta in products(tmp_path / "out").values():
        assert bool((delta == 0).all())
    assert result.report["summary"]["norm"] == 0.0


def test_what_is_out_of_range_for_one_model_is_refused_by_its_name(three: list[Path], tmp_path: Path) -> None:
    data = recipe(three, "della", parameters={"density": 0.5})
    data["models"][1]["parameters"] = {"density": 0.9}
    with pytest.raises(InputError) as caught:
        merging.merge(data, tmp_path / "out")
    assert caught.value.code == "invalid_parameter"
    assert caught.value.where["field"] == "models[1].parameters.epsilon"
    assert not (tmp_path / "out").exists()
