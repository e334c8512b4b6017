"""Base models of images whose files name layers otherwise than the model in memory, and their adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write_adapter
from safetensors.torch import load_file, save_file
from tiny_models import write_head

import merging
from merging.errors import InputError

HIDDEN, INNER, LAYERS = 16, 24, 2
ATTENTION = ("query", "key", "value")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe without a method: a vision transformer, and adapters that name layers as its files do."""
    from transformers import ViTConfig, ViTForImageClassification

    folder = tmp_path_factory.mktemp("pictures")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=INNER,
        image_size=8, patch_size=4, num_channels=1, initializer_range=0.3,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder / "base")
    modules = {
        f"vit.encoder.layer.{layer}.attention.attention.{name}": (HIDDEN, HIDDEN)
        for layer in range(LAYERS)
        for name in ATTENTION
    } | {f"vit.encoder.layer.{layer}.intermediate.dense": (INNER, HIDDEN) for layer in range(LAYERS)}
    models = []
    for t in range(2):
        data = folder / f"pictures{t}.safetensors"
        generator = torch.Generator().manual_seed(t)
        save_file({"pixel_values": torch.randn(16, 1, 8, 8, generator=generator)}, str(data))
        path = write_adapter(folder / f"vit{t}", seed=t, rank=2, modules=modules)
        models.append({"model": str(path), "data": str(data)})
        write_head(folder / f"head{t}.safetensors", classes=3, seed=t, width=HIDDEN)
    return {"base_model": str(folder / "base"), "models": models, "output": {"dtype": "float32"}}


def test_layers_are_found_by_the_names_of_the_files(pictures: dict[str, Any], tmp_path: Path) -> None:
    heads = [Path(pictures["base_model"]).with_name(f"head{t}.safetensors") for t in range(2)]
    models = [{**entry, "head": str(head)} for entry, head in zip(pictures["models"], heads, strict=True)]
    parameters = {"steps": 8, "batch_size": 16, "lr": 0.02}
    calibration = {"head": {"pooling": "first", "normalize": True}}
    recipe = {**pictures, "models": models, "parameters": parameters, "calibration": calibration}
    told = merging.merge({**recipe, "merge_method": "adarank"}, tmp_path / "ada").report["calibration"]
    assert told["entropy"][-1] < told["entropy"][0]
    for method in ("regmean", "osrm_project"):
        merging.merge({**pictures, "merge_method": method}, tmp_path / method)


def test_a_start_has_the_names_that_training_knows(pictures: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import ViTForImageClassification

    models = [{"model": f"task-{t}", "data": entry["data"]} for t, entry in enumerate(pictures["models"])]
    parameters = {"r": 2, "target_modules": ["query", "value"]}
    recipe = {**pictures, "merge_method": "osrm_init", "models": models, "parameters": parameters}
    merging.merge(recipe, tmp_path / "starts")
    base = ViTForImageClassification.from_pretrained(pictures["base_model"])
    model = PeftModel.from_pretrained(base, tmp_path / "starts" / "task-0", is_trainable=True)
    read = load_file(tmp_path / "starts" / "task-0" / "adapter_model.safetensors")
    loaded = {
        key.replace(".default", ""): value for key, value in model.state_dict().items() if "lora_A" in key
    }
    assert len(loaded) == 2 * LAYERS
    assert all(torch.equal(value, read[key]) for key, value in loaded.items())


@pytest.mark.parametrize(
    "tensors",
    [
        {"pixel_values": torch.zeros(16, 3, 8, 8)},
        {"pixel_values": torch.zeros(16, 1, 4, 4)},
        {"input_ids": torch.zeros(16, 5, dtype=torch.int64)},
    ],
    ids=["channels", "size", "tokens"],
)
@pytest.mark.parametrize("method", ["adarank", "regmean"])
def test_samples_that_the_model_cannot_take_are_refused(
    pictures: dict[str, Any], tmp_path: Path, tensors: dict[str, torch.Tensor], method: str
) -> None:
    save_file(tensors, str(tmp_path / "wrong.safetensors"))
    models = [dict(entry) for entry in pictures["models"]]
    models[1]["data"] = str(tmp_path / "wrong.safetensors")
    if method == "adarank":
        for t, entry in enumerate(models):
            entry["head"] = str(Path(pictures["base_model"]).with_name(f"head{t}.safetensors"))
    seen: list[str] = []
    recipe = {**pictures, "merge_method": method, "models": models}
    with pytest.raises(InputError) as caught:
        merging.merge(recipe, tmp_path / "out", progress=lambda step: seen.append(step.phase))
    assert caught.value.code == "samples_do_not_fit"
    assert {"calibrate", "adapt"}.isdisjoint(seen)


def test_a_head_needs_all_that_it_stands_on(tmp_path: Path) -> None:
    """A BERT classifier reads a pooler: one drawn at random would make every prediction meaningless."""
    from test_adaptation import adarank, write_classifier
    from transformers import BertModel

    recipe = write_classifier(tmp_path)
    base = BertModel.from_pretrained(recipe["base_model"], add_pooling_layer=False)
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match="pooler") as caught:
        merging.merge(adarank(recipe, steps=3), tmp_path / "out")
    assert caught.value.code == "head_incomplete"
