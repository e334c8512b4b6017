"""Bad input to methods that look at data: one clear error each, before any long work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write_adapter
from safetensors.torch import load_file, save_file
from tiny_models import (
    HIDDEN,
    MODULES,
    VOCABULARY,
    write_base,
    write_head,
    write_texts,
    write_tokenizer,
)

import merging
from merging.calibration.write import write_statistics
from merging.errors import InputError

Recipe = dict[str, Any]


def refused(recipe: Recipe, tmp_path: Path, *, planned: bool = True) -> InputError:
    """The error; ``planned`` ones come from the plan already."""
    if not planned:
        merging.plan(recipe)
    with pytest.raises(InputError) as caught:
        merging.plan(recipe) if planned else merging.merge(recipe, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    return caught.value


# data sets

ROWS: dict[str, tuple[str, str]] = {
    "not JSON": ("{", "dataset_row_invalid"),
    "not an object": ("[1]", "dataset_row_invalid"),
    "no text": ('{"label": 1}', "dataset_row_invalid"),
    "empty text": ('{"text": ""}', "dataset_row_invalid"),
    "text of another type": ('{"text": 3}', "dataset_row_invalid"),
    "an unknown key": ('{"text": "w1", "image": "x"}', "dataset_row_invalid"),
    "a pair of another type": ('{"text": "w1", "text_pair": 3}', "dataset_row_invalid"),
    "a task in a file of one model": ('{"text": "w1", "task": "task0"}', "dataset_names_tasks"),
}


@pytest.mark.parametrize(("row", "code"), ROWS.values(), ids=ROWS.keys())
def test_a_bad_row_is_named_by_its_line(tiny: Recipe, tmp_path: Path, row: str, code: str) -> None:
    good = '{"text": "w1 w2"}\n' * 10
    path = tmp_path / "bad.jsonl"
    path.write_text(good + row + "\n" + good)
    tiny["models"][1]["data"] = str(path)
    error = refused({**tiny, "merge_method": "regmean"}, tmp_path)
    assert error.code == code
    assert "line 11" in error.message


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"", "dataset_empty"), (b"\n\n", "dataset_empty"), (b'{"text": "\xff"}', "dataset_not_text")],
)
def test_a_file_without_rows_of_text_is_refused(
    tiny: Recipe, tmp_path: Path, content: bytes, code: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    tiny["models"][0]["data"] = str(path)
    assert refused({**tiny, "merge_method": "regmean"}, tmp_path).code == code


def test_labels_are_never_read(tiny: Recipe, tmp_path: Path) -> None:
    for label in (0, "poisoned"):
        out = tmp_path / f"{label}"
        for t, entry in enumerate(tiny["models"]):
            entry["data"] = str(write_texts(tmp_path / f"{label}-{t}.jsonl", seed=100 + t, label=label))
        merging.merge({**tiny, "merge_method": "regmean"}, out)
    first, second = (load_file(tmp_path / f"{x}" / "adapter_model.safetensors") for x in (0, "poisoned"))
    # (the seed draws rows by the content of a file, and all of them are used here)
    assert all(torch.allclose(first[key], second[key], rtol=1e-3, atol=1e-5) for key in first)


TENSORS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "an unknown tensor": (
        {"input_ids": torch.ones(9, 4, dtype=torch.long), "labels": torch.ones(9)},
        "dataset_tensors_invalid",
    ),
    "ids that are not whole": ({"input_ids": torch.ones(9, 4)}, "dataset_tensors_invalid"),
    "no ids": ({"attention_mask": torch.ones(9, 4, dtype=torch.long)}, "dataset_tensors_invalid"),
    "shapes that differ": (
        {
            "input_ids": torch.ones(9, 4, dtype=torch.long),
            "attention_mask": torch.ones(9, 5, dtype=torch.long),
        },
        "dataset_tensors_invalid",
    ),
    "no samples": ({"input_ids": torch.ones(0, 4, dtype=torch.long)}, "dataset_empty"),
}


@pytest.mark.parametrize(("tensors", "code"), TENSORS.values(), ids=TENSORS.keys())
def test_tensors_must_be_inputs_of_a_model(
    tiny: Recipe, tmp_path: Path, tensors: dict[str, torch.Tensor], code: str
) -> None:
    save_file(tensors, str(tmp_path / "data.safetensors"))
    tiny["models"][0]["data"] = str(tmp_path / "data.safetensors")
    assert refused({**tiny, "merge_method": "regmean"}, tmp_path).code == code


@pytest.mark.parametrize("count", [1, 7])
def test_too_few_samples_are_refused(tiny: Recipe, tmp_path: Path, count: int) -> None:
    tiny["models"][2]["data"] = str(write_texts(tmp_path / "few.jsonl", count=count))
    error = refused({**tiny, "merge_method": "regmean"}, tmp_path)
    assert error.code == "too_few_samples"
    assert tiny["models"][2]["model"] in error.message


def test_more_samples_than_there_are_cannot_be_asked_for(tiny: Recipe, tmp_path: Path) -> None:
    recipe = {**tiny, "merge_method": "regmean", "calibration": {"samples": 41}}
    assert refused(recipe, tmp_path).code == "too_few_samples"


# one file for all tasks


@pytest.fixture
def shared(tiny: Recipe, tmp_path: Path) -> tuple[Recipe, Path]:
    path = tmp_path / "all.jsonl"
    lines = []
    for t, entry in enumerate(tiny["models"]):
        source = Path(entry.pop("data"))
        lines += [
            json.dumps({**json.loads(line), "task": f"task{t}"}) for line in source.read_text().splitlines()
        ]
    path.write_text("\n".join(lines))
    return {**tiny, "merge_method": "regmean", "calibration": {"data": str(path)}}, path


def test_one_file_may_hold_the_samples_of_all_tasks(shared: tuple[Recipe, Path]) -> None:
    assert merging.plan(shared[0]).estimate["calibration"]["samples"] == {"0": 40, "1": 40, "2": 40}


def test_samples_of_a_task_that_is_not_in_the_recipe_are_refused(
    shared: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, path = shared
    with path.open("a") as file:
        file.write('\n{"text": "w1", "task": "elsewhere"}')
    error = refused(recipe, tmp_path)
    assert error.code == "dataset_unknown_task"
    assert "elsewhere" in error.message
    assert "line 121" in error.message


def test_rows_of_a_shared_file_name_their_task(shared: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, path = shared
    with path.open("a") as file:
        file.write('\n{"text": "w1"}')
    assert refused(recipe, tmp_path).code == "dataset_without_task"


# what the recipe gives


def without(key: str) -> Callable[[Recipe], None]:
    return lambda recipe: recipe.pop(key, None)


def no_data(recipe: Recipe) -> None:
    recipe["models"][0].pop("data")


def both(recipe: Recipe) -> None:
    recipe["models"][0]["statistics"] = "stats.safetensors"


def twice(recipe: Recipe) -> None:
    recipe["calibration"] = {"data": recipe["models"][0]["data"]}


def other_method(recipe: Recipe) -> None:
    recipe["merge_method"] = "ties"


def a_head(recipe: Recipe) -> None:
    recipe["models"][0]["head"] = "head.safetensors"


def absent_data(recipe: Recipe) -> None:
    recipe["models"][0]["data"] = "absent.jsonl"


def auto_lambda(recipe: Recipe) -> None:
    recipe["parameters"] = {"lambda": "auto"}


def mats(recipe: Recipe) -> None:
    recipe["merge_method"] = "mats"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (no_data, "data_missing"),
        (both, "data_ambiguous"),
        (twice, "data_ambiguous"),
        (other_method, "data_not_used"),
        (a_head, "data_not_used"),
        (without("base_model"), "base_model_required"),
        (absent_data, "dataset_not_found"),
        (auto_lambda, "invalid_parameter"),
        (mats, "statistics_incomplete"),
    ],
)
def test_what_a_recipe_lacks_or_gives_in_vain_is_named(
    tiny: Recipe, tmp_path: Path, change: Callable[[Recipe], None], code: str
) -> None:
    recipe = {**tiny, "merge_method": "regmean"}
    change(recipe)
    assert refused(recipe, tmp_path).code == code


# the base model


def test_a_base_with_code_of_its_own_is_refused(tiny: Recipe, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    error = refused({**tiny, "base_model": str(base), "merge_method": "regmean"}, tmp_path)
    assert error.code == "base_model_remote_code"


def test_pickled_weights_are_refused(tiny: Recipe, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    error = refused({**tiny, "base_model": str(base), "merge_method": "regmean"}, tmp_path)
    assert error.code == "base_model_pickled"


def test_another_base_is_recognised_by_its_shapes(tiny: Recipe, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", hidden_size=32)
    error = refused({**tiny, "base_model": str(base), "merge_method": "regmean"}, tmp_path)
    assert error.code == "base_shape_mismatch"


def test_a_base_without_the_layers_is_refused(tiny: Recipe, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", num_hidden_layers=1)
    error = refused({**tiny, "base_model": str(base), "merge_method": "regmean"}, tmp_path)
    assert error.code == "module_not_in_base"


def test_texts_need_a_tokenizer(tiny: Recipe, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    (base / "tokenizer.json").unlink()
    error = refused({**tiny, "base_model": str(base), "merge_method": "regmean"}, tmp_path)
    assert error.code == "tokenizer_missing"


def test_the_tokenizer_of_another_model_is_refused(tiny: Recipe, tmp_path: Path) -> None:
    other = write_tokenizer(tmp_path / "tokenizer", (*VOCABULARY, "more", "words"))
    recipe = {**tiny, "merge_method": "regmean", "calibration": {"tokenizer": str(other)}}
    assert refused(recipe, tmp_path, planned=False).code == "tokenizer_mismatch"


def test_a_tokenizer_that_pads_otherwise_is_refused(tiny: Recipe, tmp_path: Path) -> None:
    """As long as that of the base, but of another model."""
    other = write_tokenizer(tmp_path / "tokenizer", ("[UNK]", "[PAD]", *VOCABULARY[2:]))
    recipe = {**tiny, "merge_method": "regmean", "calibration": {"tokenizer": str(other)}}
    assert refused(recipe, tmp_path, planned=False).code == "tokenizer_mismatch"


def test_ids_beyond_the_vocabulary_are_refused(tiny: Recipe, tmp_path: Path) -> None:
    ids = torch.full((20, 4), len(VOCABULARY), dtype=torch.long)
    save_file({"input_ids": ids}, str(tmp_path / "ids.safetensors"))
    tiny["models"][0]["data"] = str(tmp_path / "ids.safetensors")
    error = refused({**tiny, "merge_method": "regmean"}, tmp_path, planned=False)
    assert error.code == "token_out_of_range"


def test_sequences_beyond_the_positions_are_refused(tiny: Recipe, tmp_path: Path) -> None:
    save_file({"input_ids": torch.ones(20, 33, dtype=torch.long)}, str(tmp_path / "ids.safetensors"))
    tiny["models"][0]["data"] = str(tmp_path / "ids.safetensors")
    error = refused({**tiny, "merge_method": "regmean"}, tmp_path, planned=False)
    assert error.code == "sequence_too_long"


@pytest.mark.parametrize("method", ["regmean", "adarank"])
def test_nan_in_activations_is_found_first(tiny_heads: Recipe, tmp_path: Path, method: str) -> None:
    base = write_base(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["encoder.layer.1.output.dense.bias"][0] = torch.nan
    save_file(weights, str(base / "model.safetensors"), metadata={"format": "pt"})
    recipe = {**tiny_heads, "base_model": str(base), "merge_method": method}
    if method == "regmean":
        weights["encoder.layer.0.output.dense.bias"][0] = torch.nan
        save_file(weights, str(base / "model.safetensors"), metadata={"format": "pt"})
        for entry in recipe["models"]:
            entry.pop("head")
    assert refused(recipe, tmp_path, planned=False).code == "activations_not_finite"


# statistics


@pytest.fixture
def statistics(tiny: Recipe, tmp_path: Path) -> Recipe:
    """A recipe that uses statistics of the right base and models."""
    recipe = {**tiny, "merge_method": "regmean"}
    write_statistics(recipe, tmp_path / "stats")
    return merging.Recipe.load(tmp_path / "stats" / "recipe.yaml").plain()


def test_statistics_of_another_base_are_refused(statistics: Recipe, tmp_path: Path) -> None:
    other = write_base(tmp_path / "other", seed=9)
    error = refused({**statistics, "base_model": str(other)}, tmp_path)
    assert error.code == "statistics_base_mismatch"


def test_statistics_of_two_bases_are_refused(statistics: Recipe, tiny: Recipe, tmp_path: Path) -> None:
    other = write_base(tmp_path / "other", seed=9)
    write_statistics({**tiny, "base_model": str(other), "merge_method": "regmean"}, tmp_path / "more")
    del statistics["base_model"]
    statistics["models"][0]["statistics"] = str(tmp_path / "more" / "task0.safetensors")
    assert refused(statistics, tmp_path).code == "statistics_base_mismatch"


@pytest.mark.parametrize("how", ["two files", "a file and data"])
def test_statistics_of_tokens_and_of_samples_do_not_mix(
    statistics: Recipe, tiny: Recipe, tmp_path: Path, how: str
) -> None:
    first = statistics["models"][0]
    if how == "two files":
        recipe = {**tiny, "merge_method": "regmean", "calibration": {"rows": "samples"}}
        write_statistics(recipe, tmp_path / "more")
        first["statistics"] = str(tmp_path / "more" / "task0.safetensors")
    else:
        del first["statistics"]
        first["data"] = tiny["models"][0]["data"]
        statistics["calibration"] = {"rows": "samples"}
    assert refused(statistics, tmp_path).code == "statistics_rows_mismatch"


def test_statistics_of_another_task_are_refused(statistics: Recipe, tmp_path: Path) -> None:
    first, second = statistics["models"][:2]
    first["statistics"] = second["statistics"]
    error = refused(statistics, tmp_path)
    assert error.code == "statistics_model_mismatch"
    assert second["model"] in error.message


def test_statistics_of_an_adapter_that_is_not_in_the_recipe_are_refused(
    statistics: Recipe, tmp_path: Path
) -> None:
    other = write_adapter(tmp_path / "other", seed=77, rank=2, modules=MODULES)
    statistics["models"][0]["model"] = str(other)
    error = refused(statistics, tmp_path)
    assert error.code == "statistics_model_mismatch"
    assert "not in the recipe" in error.message


def test_statistics_of_the_base_are_not_taken_for_those_of_the_models(
    statistics: Recipe, tmp_path: Path
) -> None:
    error = refused({**statistics, "merge_method": "osrm_project"}, tmp_path)
    assert error.code == "statistics_features_mismatch"


def test_statistics_must_cover_the_layers(statistics: Recipe, tiny: Recipe, tmp_path: Path) -> None:
    few = dict(list(MODULES.items())[:2])
    for t, entry in enumerate(tiny["models"]):
        entry["model"] = str(write_adapter(tmp_path / f"few{t}", seed=t, rank=2, modules=few))
    write_statistics({**tiny, "merge_method": "osrm_project"}, tmp_path / "few-stats")
    for t, entry in enumerate(statistics["models"]):
        entry["statistics"] = str(tmp_path / "few-stats" / f"few{t}.safetensors")
    error = refused({**statistics, "merge_method": "osrm_project"}, tmp_path)
    assert error.code == "statistics_module_missing"


def test_adarank_needs_samples(statistics: Recipe, tmp_path: Path) -> None:
    error = refused({**statistics, "merge_method": "adarank"}, tmp_path)
    assert error.code == "statistics_not_used"


# heads


def head_of(width: int, classes: int) -> Callable[[Path], Path]:
    return lambda folder: write_head(folder / "head.safetensors", classes=classes, width=width)


def odd_head(folder: Path) -> Path:
    path = folder / "head.safetensors"
    save_file({"weight": torch.ones(3, HIDDEN), "scale": torch.ones(1)}, str(path))
    return path


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (head_of(HIDDEN, 1), "entropy_undefined"),
        (head_of(HIDDEN + 1, 3), "head_shape_mismatch"),
        (odd_head, "head_invalid"),
    ],
    ids=["regression", "another width", "not a head"],
)
def test_a_head_that_cannot_be_used_is_refused(
    tiny_heads: Recipe, tmp_path: Path, make: Callable[[Path], Path], code: str
) -> None:
    tiny_heads["models"][1]["head"] = str(make(tmp_path))
    assert refused({**tiny_heads, "merge_method": "adarank"}, tmp_path).code == code


@pytest.mark.parametrize(
    ("key", "code"),
    [
        ("data", "dataset_not_found"),
        ("statistics", "statistics_not_found"),
        ("head", "head_not_found"),
        ("tokenizer", "tokenizer_missing"),
        ("base_model", "base_model_not_found"),
    ],
)
def test_what_lies_nowhere_is_told_by_its_key(tiny: Recipe, tmp_path: Path, key: str, code: str) -> None:
    method = "adarank" if key == "head" else "regmean"
    if key in ("data", "statistics"):
        del tiny["models"][0]["data"]
    if key == "head":
        tiny["models"][0].update(head="nowhere")
    elif key == "base_model":
        tiny[key] = "nowhere"
    elif key == "tokenizer":
        tiny["calibration"] = {key: "nowhere"}
    else:
        tiny["models"][0][key] = "nowhere"
    error = refused({**tiny, "merge_method": method}, tmp_path)
    assert (error.code, error.where["field"]) == (code, key)


def test_missing_heads_are_named(tiny: Recipe, tmp_path: Path) -> None:
    error = refused({**tiny, "merge_method": "adarank"}, tmp_path)
    assert error.code == "heads_missing"
    assert error.where["model"] == tiny["models"][0]["model"]


def test_generation_has_no_entropy(tiny: Recipe, tmp_path: Path) -> None:
    for t, entry in enumerate(tiny["models"]):
        path = write_adapter(tmp_path / f"lm{t}", seed=t, rank=2, modules=MODULES, task_type="CAUSAL_LM")
        entry["model"] = str(path)
    assert refused({**tiny, "merge_method": "adarank"}, tmp_path).code == "entropy_undefined"


# size


def test_the_plan_bounds_samples_size_and_time(tiny: Recipe) -> None:
    recipe = {**tiny, "merge_method": "regmean"}
    told = merging.plan(recipe).estimate["calibration"]
    assert told["seconds"] >= 0
    # per layer: the shared input of q, k and v, that of the intermediate and that of the output layer
    grams = 2 * sum(n * (n + 1) for n in (16, 16, 24))
    assert told["statistics_bytes"] == 4 * grams
    sketch = merging.plan({**recipe, "calibration": {"statistic": "sketch", "sketch_rows": 2}})
    assert sketch.estimate["calibration"]["statistics_bytes"] == 4 * 2 * 3 * (16 + 16 + 24)


def test_memory_counts_the_whole_base_model(tiny: Recipe, tmp_path: Path) -> None:
    """The table of tokens takes part in no product, but it is loaded."""
    more = 5000
    base = write_base(tmp_path / "base", vocabulary=len(VOCABULARY) + more)
    found = [
        merging.plan({**tiny, "base_model": folder, "merge_method": "regmean"}).to_dict()["estimate"]
        for folder in (tiny["base_model"], str(base))
    ]
    grown = found[1]["memory_bytes"] - found[0]["memory_bytes"]
    assert grown == pytest.approx(4 * HIDDEN * more, rel=1e-3)


def test_memory_counts_the_matrices_that_are_solved(statistics: Recipe) -> None:
    """Without the samples there is no base model, but Gram matrices in float64 are."""
    estimate = merging.plan(statistics).to_dict()["estimate"]
    assert estimate["calibration"]["memory_bytes"] >= 3 * 8 * max(n for _, n in MODULES.values()) ** 2


def test_statistics_that_are_too_large_are_refused(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merging.calibration.outlook.MAX_STATISTICS_BYTES", 1000)
    error = refused({**tiny, "merge_method": "regmean"}, tmp_path)
    assert error.code == "statistics_too_large"
    assert "sketch" in (error.remedy or "")
