"""Statistics of activations: what is summed and written; data and statistics give one result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from golden import assert_close
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import MODULES
from torch import Tensor

import merging
from merging.calibration.settings import CalibrationSettings
from merging.calibration.statistics import GramSum, Sketch, Watch
from merging.calibration.statistics_file import METADATA_KEY, StatisticsFile
from merging.calibration.write import write_statistics
from merging.errors import InputError


def reference_rows(recipe: dict[str, Any], task: int, *, tuned: bool) -> dict[str, list[Tensor]]:
    """The inputs of every layer, one tensor of tokens per sample, from transformers and PEFT themselves."""
    from peft import PeftModel
    from transformers import AutoModel, AutoTokenizer

    base = AutoModel.from_pretrained(recipe["base_model"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(recipe["base_model"])
    model = PeftModel.from_pretrained(base, recipe["models"][task]["model"]) if tuned else base
    found: dict[str, list[Tensor]] = {name: [] for name in MODULES}
    modules = dict(model.named_modules())
    for name in MODULES:
        module = modules[f"base_model.model.{name}"] if tuned else modules[name]

        def keep(_module: Any, args: Any, name: str = name) -> None:
            found[name].append(args[0][0])

        module.register_forward_pre_hook(keep)
    lines = Path(recipe["models"][task]["data"]).read_text().splitlines()
    with torch.no_grad():
        for line in lines:
            text = line.split('"')[3]
            model(**tokenizer(text, return_tensors="pt"))
    return found


def measured(recipe: dict[str, Any], folder: Path, **settings: Any) -> dict[str, StatisticsFile]:
    """Statistics by task name."""
    recipe = {"merge_method": "osrm_project", **recipe, "calibration": {"batch_size": 7, **settings}}
    return {path.stem: StatisticsFile(path) for path in write_statistics(recipe, folder)}


@pytest.mark.parametrize("features", ["base", "model"])
@pytest.mark.parametrize("rows", ["tokens", "samples"])
def test_a_gram_is_that_of_the_inputs_without_padding(
    tiny: dict[str, Any], tmp_path: Path, features: str, rows: str
) -> None:
    files = measured(tiny, tmp_path / "out", features=features, rows=rows)
    expected = reference_rows(tiny, 1, tuned=features == "model")
    file = files["task1"]
    for name, parts in expected.items():
        X = torch.cat(parts) if rows == "tokens" else torch.stack([part.mean(0) for part in parts])
        assert file.info.rows == len(X)
        assert_close(file.gram(name), X.T @ X / len(X), 1e-5)
        assert_close(file.mean(name), X.mean(0), 1e-5)


def test_layers_that_read_one_input_share_its_statistics(tiny: dict[str, Any], tmp_path: Path) -> None:
    file = measured(tiny, tmp_path / "out")["task0"]
    sources = {name: module.source for name, module in file.info.modules.items()}
    for layer in range(2):
        start = f"encoder.layer.{layer}.attention.self"
        assert len({sources[f"{start}.{name}"] for name in ("query", "key", "value")}) == 1
    assert len(set(sources.values())) == 6
    with safe_open(str(file.path), "pt") as handle:
        assert len(handle.keys()) == 12


def test_the_size_of_a_batch_changes_nothing_but_rounding(tiny: dict[str, Any], tmp_path: Path) -> None:
    one = measured(tiny, tmp_path / "one", batch_size=1)["task0"]
    many = measured(tiny, tmp_path / "many", batch_size=40)["task0"]
    for name in MODULES:
        assert_close(one.gram(name), many.gram(name), 1e-5)


def test_the_same_recipe_gives_the_same_bytes(tiny: dict[str, Any], tmp_path: Path) -> None:
    first = measured(tiny, tmp_path / "first")
    second = measured(tiny, tmp_path / "second")
    assert {name: file.digest for name, file in first.items()} == {
        name: file.digest for name, file in second.items()
    }


def test_a_number_of_samples_is_drawn_by_the_seed(tiny: dict[str, Any], tmp_path: Path) -> None:
    grams = []
    for seed in (0, 1, 0):
        out = tmp_path / f"{len(grams)}"
        file = measured({**tiny, "seed": seed}, out, samples=10)["task0"]
        assert file.info.samples == 10
        grams.append(file.gram(next(iter(MODULES))))
    assert torch.equal(grams[0], grams[2])
    assert not torch.equal(grams[0], grams[1])


@pytest.mark.parametrize("statistic", ["gram", "sketch"])
def test_statistics_merge_like_the_data_they_are_of(
    tiny: dict[str, Any], tmp_path: Path, statistic: str
) -> None:
    recipe = {
        **tiny,
        "merge_method": "regmean",
        "calibration": {"statistic": statistic, "sketch_rows": 100, "rows": "samples"},
    }
    write_statistics(recipe, tmp_path / "stats")
    from_data = merging.merge(recipe, tmp_path / "data")
    from_file = merging.merge(tmp_path / "stats" / "recipe.yaml", tmp_path / "file")
    weights = "adapter_model.safetensors"
    left, right = load_file(tmp_path / "data" / weights), load_file(tmp_path / "file" / weights)
    assert all(torch.equal(left[key], right[key]) for key in left)
    told = from_file.report["calibration"]["tasks"]
    assert told == from_data.report["calibration"]["tasks"]


def test_statistics_need_neither_the_base_nor_the_samples(tiny: dict[str, Any], tmp_path: Path) -> None:
    recipe = {**tiny, "merge_method": "regmean"}
    write_statistics(recipe, tmp_path / "stats")
    alone = merging.Recipe.load(tmp_path / "stats" / "recipe.yaml").plain()
    del alone["base_model"]
    report = merging.merge(alone, tmp_path / "out").report
    assert report["calibration"]["features"] == "model"


@pytest.mark.parametrize("rows", ["tokens", "samples"])
def test_padding_does_not_count_in_a_list_of_all_tokens_either(rows: str) -> None:
    """Some models drop the axis of samples on the way."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, generator=generator)
    found = []
    for shaped in (x, x.reshape(12, 5)):
        watch = Watch("task", CalibrationSettings.model_validate({"rows": rows}), looking=False)
        watch.mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
        watch.start("layer", 5, torch.device("cpu"))
        watch("layer", shaped, shaped)
        found.append(watch.sums["layer"].matrix())
    assert torch.equal(found[0], found[1])


def test_a_sketch_is_exact_while_it_is_small_and_bounded_after() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(200, 12, generator=generator) * torch.logspace(0, -2, 12)
    exact = Sketch.empty(12, 200, torch.device("cpu"))
    small = Sketch.empty(12, 6, torch.device("cpu"))
    gram = GramSum.empty(12, torch.device("cpu"))
    for rows in X.split(17):
        for total in (exact, small, gram):
            total.add(rows)
    assert_close(exact.matrix().T @ exact.matrix(), gram.matrix(), 1e-5)
    assert small.matrix().shape == (6, 12)
    lost = torch.linalg.eigvalsh((gram.matrix() - small.matrix().T @ small.matrix()).double())
    energy = float(gram.matrix().trace())
    assert float(lost.min()) > -1e-5 * energy
    assert float(lost.max()) <= energy / 6 + 1e-6


# the file


@pytest.fixture
def written(tiny: dict[str, Any], tmp_path: Path) -> Path:
    return measured(tiny, tmp_path / "stats")["task0"].path


def rewrite(path: Path, change: Any) -> Path:
    """The file with ``change(tensors, metadata)`` applied."""
    with safe_open(str(path), "pt") as handle:
        metadata = dict(handle.metadata())
    tensors = load_file(str(path))
    change(tensors, metadata)
    other = path.with_name("changed.safetensors")
    save_file(tensors, str(other), metadata=metadata)
    return other


def drop_tensor(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors.pop(sorted(tensors)[0])


def add_tensor(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors["extra"] = torch.zeros(2)


def cut_tensor(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    key = next(key for key in sorted(tensors) if key.endswith(".gram"))
    tensors[key] = tensors[key][:, :-1].contiguous()


def no_description(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    del metadata[METADATA_KEY]


def wrong_description(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata[METADATA_KEY] = metadata[METADATA_KEY].replace('"version":1', '"version":2')


@pytest.mark.parametrize(
    "change",
    [drop_tensor, add_tensor, cut_tensor, no_description, wrong_description],
    ids=lambda f: f.__name__,
)
def test_a_file_that_is_not_what_it_says_is_refused(written: Path, change: Any) -> None:
    with pytest.raises(InputError) as caught:
        StatisticsFile(rewrite(written, change))
    assert caught.value.code == "statistics_invalid"


def test_nan_in_a_file_is_found_when_it_is_read(written: Path) -> None:
    name = "encoder.layer.0.intermediate.dense"

    def poison(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        tensors[f"{name}.gram"][0, 0] = torch.nan

    file = StatisticsFile(rewrite(written, poison))
    with pytest.raises(InputError) as caught:
        file.gram(name)
    assert caught.value.code == "statistics_not_finite"


def test_reading_a_header_needs_no_torch(written: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from merging.calibration.statistics_file import StatisticsFile;"
        f"print(StatisticsFile({str(written)!r}).info.samples, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["40", "False"]
