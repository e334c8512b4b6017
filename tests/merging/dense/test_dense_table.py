"""Which tensors are merged, copied, dropped or refused, and what lies beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import (
    CONFIG,
    HIDDEN,
    NORM,
    VOCAB,
    Q,
    base_tensors,
    read_all,
    recipe,
    tuned,
    write_checkpoint,
)
from torch import Tensor

import merging
from merging.errors import InputError, MergeFailure

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"


def pair(
    tmp_path: Path, base: dict[str, Tensor], change: dict[str, Tensor | None], **config: Any
) -> tuple[Path, Path]:
    """A base and a fine-tune of it with some tensors replaced, added, or (None) left out."""
    tensors: dict[str, Tensor | None] = {**tuned(base, 1), **change}
    held = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    one = write_checkpoint(tmp_path / "base", base, **config)
    return one, write_checkpoint(tmp_path / "model", held, **config)


def refusal(tmp_path: Path, base: Path, model: Path, **more: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        merging.plan(recipe(base, [model], **more))
    return caught.value


@pytest.mark.parametrize("method", ["linear", "ties", "tsv"])
def test_what_is_not_floating_point_is_copied_from_the_base(tmp_path: Path, method: str) -> None:
    tensors = base_tensors()
    buffers = {
        "model.position_ids": torch.arange(7).unsqueeze(0),
        "model.flags": torch.tensor([True, False]),
        "model.small": torch.tensor([3, -4], dtype=torch.int8),
        "model.nothing": torch.empty(0, dtype=torch.bfloat16),
    }
    changed = {"model.position_ids": torch.zeros(1, 7, dtype=torch.int64), "model.flags": torch.ones(2) > 0}
    base, model = pair(tmp_path, {**tensors, **buffers}, changed)
    done = merging.merge(recipe(base, [model], method), tmp_path / "out", device="cpu")
    result = read_all(tmp_path / "out")
    for name, tensor in buffers.items():
        assert torch.equal(result[name], tensor), name
        assert result[name].dtype == tensor.dtype
    assert done.report["summary"]["copied"] == len(buffers)


def test_scalars_and_higher_dimensions_are_merged(tmp_path: Path) -> None:
    tensors = {
        "logit_scale": torch.tensor(2.0),
        "conv.weight": torch.randn(4, 3, 3, 3),
        "experts.gate_up": torch.randn(2, 5, 6),
    }
    for method in ("linear", "ties", "della", "iso_c"):
        folder = tmp_path / method
        base, model = pair(folder, tensors, {})
        merging.merge(recipe(base, [model], method), folder / "out", device="cpu")
        result = read_all(folder / "out")
        assert {name: tensor.shape for name, tensor in result.items()} == {
            name: tensor.shape for name, tensor in tensors.items()
        }
        if method == "linear":
            wanted = read_all(model)
            assert all(torch.allclose(result[name], wanted[name], atol=1e-6) for name in wanted)


def test_a_missing_tensor_is_an_error_or_counts_as_unchanged(tmp_path: Path) -> None:
    base, model = pair(tmp_path, base_tensors(torch.float32), {Q: None})
    error = refusal(tmp_path, base, model)
    assert error.code == "missing_tensors"
    assert error.where["tensor"] == Q
    merging.merge(recipe(base, [model], missing_modules="zero"), tmp_path / "out", device="cpu")
    assert torch.equal(read_all(tmp_path / "out")[Q], read_all(base)[Q])


def test_a_tensor_that_the_base_lacks_is_refused(tmp_path: Path) -> None:
    base, model = pair(tmp_path, base_tensors(), {"model.extra.weight": torch.ones(2, 2)})
    assert refusal(tmp_path, base, model).code == "extra_tensors"


def test_saved_buffers_of_other_versions_do_not_disturb(tmp_path: Path) -> None:
    base, model = pair(tmp_path, base_tensors(), {INV_FREQ: torch.ones(3)})
    merging.merge(recipe(base, [model]), tmp_path / "out", device="cpu")
    assert INV_FREQ not in read_all(tmp_path / "out")
    other, plain = pair(tmp_path / "2", {**base_tensors(), INV_FREQ: torch.ones(3)}, {INV_FREQ: None})
    merging.merge(recipe(other, [plain]), tmp_path / "out2", device="cpu")
    assert torch.equal(read_all(tmp_path / "out2")[INV_FREQ], torch.ones(3))


def test_buffers_are_not_rounded_to_the_dtype_of_the_result(tmp_path: Path) -> None:
    base, model = pair(tmp_path, {**base_tensors(), INV_FREQ: torch.full((3,), 1 / 3)}, {})
    data = recipe(base, [model], output={"format": "checkpoint", "dtype": "float16"})
    merging.merge(data, tmp_path / "out", device="cpu")
    assert torch.equal(read_all(tmp_path / "out")[INV_FREQ], torch.full((3,), 1 / 3))


def test_a_pickled_model_beside_another_is_told_how_checkpoints_are_converted(tmp_path: Path) -> None:
    base, model = pair(tmp_path, base_tensors(), {})
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        merging.merge(recipe(base, [model, pickled]), tmp_path / "out", device="cpu")
    assert caught.value.code == "pickle_not_accepted"
    assert "save_pretrained" in (caught.value.remedy or "")


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({EMBEDDING: torch.ones(VOCAB + 3, HIDDEN)}, "27 and 24 entries"),
        ({Q: torch.ones(HIDDEN, HIDDEN + 1)}, "one architecture"),
        ({NORM: torch.ones(HIDDEN, 1)}, "one architecture"),
    ],
)
def test_other_shapes_are_refused_with_both_named(
    tmp_path: Path, change: dict[str, Tensor | None], hint: str
) -> None:
    base, model = pair(tmp_path, base_tensors(), change)
    error = refusal(tmp_path, base, model)
    assert error.code == "tensor_shape_mismatch"
    assert hint in str(error)


def test_a_tensor_of_another_kind_is_refused(tmp_path: Path) -> None:
    base, model = pair(tmp_path, base_tensors(), {NORM: torch.ones(HIDDEN, dtype=torch.int64)})
    assert refusal(tmp_path, base, model).code == "tensor_kind_mismatch"


def test_another_architecture_is_refused_unless_allowed(tmp_path: Path) -> None:
    base, model = pair(tmp_path, base_tensors(), {})
    (model / "config.json").write_text(json.dumps({**CONFIG, "model_type": "mistral"}))
    assert refusal(tmp_path, base, model).code == "architecture_mismatch"
    assert merging.plan(recipe(base, [model], allow_base_mismatch=True))


def test_a_tied_head_is_merged_once(tmp_path: Path) -> None:
    tensors = base_tensors()
    del tensors[HEAD]
    base, model = pair(tmp_path, tensors, {HEAD: torch.ones(VOCAB, HIDDEN)}, tie_word_embeddings=True)
    done = merging.merge(recipe(base, [model]), tmp_path / "out", device="cpu")
    assert HEAD not in read_all(tmp_path / "out")
    assert any("tied" in entry["message"] for entry in done.report["warnings"])


def test_a_tied_head_in_the_file_of_the_base_is_left_out(tmp_path: Path) -> None:
    tensors = base_tensors()
    tensors[HEAD] = tensors[EMBEDDING].clone()
    base, model = pair(tmp_path, tensors, {HEAD: None}, tie_word_embeddings=True)
    merging.merge(recipe(base, [model]), tmp_path / "out", device="cpu")
    assert HEAD not in read_all(tmp_path / "out")
    assert EMBEDDING in read_all(tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "slerp", "iso_c"])
def test_numbers_that_are_none_are_refused_by_name(tmp_path: Path, method: str, value: float) -> None:
    bad = base_tensors(torch.float32)[Q]
    bad[2, 3] = value
    base, model = pair(tmp_path, base_tensors(torch.float32), {Q: bad})
    models = [model, write_checkpoint(tmp_path / "good", tuned(read_all(base), 5))]
    with pytest.raises((InputError, MergeFailure)) as caught:
        merging.merge(recipe(base, models, method), tmp_path / "out", device="cpu")
    assert caught.value.code == "non_finite_tensor"
    assert caught.value.where["model"] == str(model)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_overflow_of_the_output_is_told(tmp_path: Path) -> None:
    base, model = pair(tmp_path, base_tensors(torch.float32), {NORM: torch.full((HIDDEN,), 1e5)})
    data = recipe(base, [model], output={"format": "checkpoint", "dtype": "float16"})
    with pytest.raises(MergeFailure) as caught:
        merging.merge(data, tmp_path / "out", device="cpu")
    assert caught.value.code == "result_overflow"


def test_an_empty_tensor_is_cast_too(tmp_path: Path) -> None:
    empty = {"a": torch.empty(0, 3, dtype=torch.bfloat16), "b": torch.empty(4, 0, dtype=torch.bfloat16)}
    base, model = pair(tmp_path, {**base_tensors(), **empty}, {})
    data = recipe(base, [model], output={"format": "checkpoint", "dtype": "float32"})
    merging.merge(data, tmp_path / "out", device="cpu")
    result = read_all(tmp_path / "out")
    assert {name: (result[name].shape, result[name].dtype) for name in empty} == {
        name: (tensor.shape, torch.float32) for name, tensor in empty.items()
    }


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": 7, "model_type": ["x"], "tie_word_embeddings": "no"},
        {"architectures": None, "model_type": None, "auto_map": []},
        {"architectures": [{}], "torch_dtype": 3},
    ],
)
def test_odd_configurations_do_not_stop_a_merge(tmp_path: Path, config: dict[str, Any]) -> None:
    base, model = pair(tmp_path, base_tensors(), {}, **config)
    for output in ({"format": "checkpoint", "dtype": "float32"}, {"format": "lora", "rank": 2}):
        data = recipe(base, [model], output=output, modules_to_save="drop")
        assert merging.merge(data, tmp_path / output["format"], device="cpu").files


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"),
    [("float32", torch.float32), ("float16", torch.float16), ("bfloat16", torch.bfloat16)],
)
def test_the_dtype_of_the_result_is_asked_for(tmp_path: Path, dtype: str, torch_dtype: torch.dtype) -> None:
    base, model = pair(tmp_path, base_tensors(torch.float32), {})
    data = recipe(base, [model], output={"format": "checkpoint", "dtype": dtype})
    merging.merge(data, tmp_path / "out", device="cpu")
    assert {tensor.dtype for tensor in read_all(tmp_path / "out").values()} == {torch_dtype}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype


def test_models_of_several_precisions_are_merged_in_the_widest(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", base_tensors(torch.float32))
    half = write_checkpoint(tmp_path / "half", tuned(base_tensors(torch.bfloat16), 1))
    wide = write_checkpoint(tmp_path / "wide", tuned(base_tensors(torch.float64), 2))
    merging.merge(recipe(base, [half, wide]), tmp_path / "out", device="cpu")
    b, x, y = (read_all(path)[Q].double() for path in (base, half, wide))
    assert torch.equal(read_all(tmp_path / "out")[Q], (x + y - b).float())


def test_config_and_tokenizer_come_from_the_base_and_code_does_not(tmp_path: Path) -> None:
    base, model = pair(tmp_path, base_tensors(), {}, auto_map={"AutoModel": "modeling.Evil"})
    texts = {"tokenizer.json": "{}", "generation_config.json": '{"a": 1}', "chat_template.jinja": "x"}
    for name, text in {**texts, "modeling.py": "import os", "notes.txt": "no"}.items():
        (base / name).write_text(text)
    (model / "tokenizer.json").write_text("other")
    done = merging.merge(recipe(base, [model]), tmp_path / "out", device="cpu")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {*texts, "config.json", "model.safetensors", "README.md", "merge.yaml", "report.json"}
    assert names == set(done.files)
    assert {name: (tmp_path / "out" / name).read_text() for name in texts} == texts
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert "remote_code_left" in {entry["code"] for entry in done.report["warnings"]}


def test_links_out_of_the_base_are_not_followed(tmp_path: Path) -> None:
    base, model = pair(tmp_path, base_tensors(), {})
    (tmp_path / "secret").write_text("secret")
    (base / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError) as caught:
        merging.merge(recipe(base, [model]), tmp_path / "out", device="cpu")
    assert caught.value.code == "link_outside_folder"


def test_the_index_names_every_tensor_and_the_sizes(tmp_path: Path) -> None:
    base, model = pair(tmp_path, base_tensors(), {})
    merging.merge(recipe(base, [model]), tmp_path / "out", device="cpu", shard_bytes=900)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = base_tensors()
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in tensors.values())
    assert len(set(index["weight_map"].values())) > 3
    for name in set(index["weight_map"].values()):
        held = [tensor for tensor, file in index["weight_map"].items() if file == name]
        size = sum(2 * tensors[tensor].numel() for tensor in held)
        assert size <= 900 or len(held) == 1


def test_the_result_is_a_base_and_an_input_again(tmp_path: Path) -> None:
    base, model = pair(tmp_path, base_tensors(torch.float32), {})
    merging.merge(recipe(base, [model]), tmp_path / "one", device="cpu", shard_bytes=2000)
    data = recipe(tmp_path / "one", [model])
    merging.merge(data, tmp_path / "two", device="cpu")
    first, second = read_all(tmp_path / "one"), read_all(tmp_path / "two")
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_the_recipe_of_the_result_gives_the_same_bytes(tmp_path: Path) -> None:
    base, model = pair(tmp_path, base_tensors(), {})
    other = write_checkpoint(tmp_path / "other", tuned(base_tensors(), 8))
    one = merging.merge(recipe(base, [model, other], "ties"), tmp_path / "one", device="cpu")
    two = merging.merge(tmp_path / "one" / "merge.yaml", tmp_path / "two", device="cpu")
    assert one.files == two.files


def test_the_plan_tells_what_headers_tell(tmp_path: Path) -> None:
    base, model = pair(tmp_path, base_tensors(), {})
    plan = merging.plan(recipe(base, [model], "ties")).to_dict()
    assert json.loads(json.dumps(plan)) == plan
    assert plan["output"]["files"] == ["model.safetensors"]
    assert plan["estimate"]["output_bytes"] == sum(2 * tensor.numel() for tensor in base_tensors().values())
    assert plan["models"][0]["format"] == "checkpoint"
    assert len(plan["modules"]) == len(base_tensors())


def test_many_warnings_of_one_kind_are_counted(tmp_path: Path) -> None:
    base, model = pair(tmp_path, base_tensors(), {})
    data = recipe(base, [model], output={"format": "lora", "rank": 2}, modules_to_save="drop")
    done = merging.merge(data, tmp_path / "out", device="cpu")
    dropped = [entry for entry in done.report["warnings"] if entry["code"] == "full_tensors_dropped"]
    assert len(dropped) == 6
    assert dropped[-1]["message"] == "and 1 more of this kind"


def test_a_sum_that_is_far_too_long_is_warned_of(tmp_path: Path) -> None:
    base, model = pair(tmp_path, base_tensors(), {})
    other = write_checkpoint(tmp_path / "other", tuned(base_tensors(), 8))
    long = merging.merge(
        recipe(base, [model, other], parameters={"weight": 3.0}), tmp_path / "1", device="cpu"
    )
    fine = merging.merge(recipe(base, [model, other]), tmp_path / "2", device="cpu")
    codes = [[entry["code"] for entry in done.report["warnings"]] for done in (long, fine)]
    assert codes == [["large_merged_norm"], []]


def test_tsv_takes_its_even_share_without_a_word(tmp_path: Path) -> None:
    base, model = pair(tmp_path, base_tensors(torch.float32), {})
    other = write_checkpoint(tmp_path / "other", tuned(read_all(base), 8))
    done = merging.merge(recipe(base, [model, other], "tsv"), tmp_path / "out", device="cpu")
    assert "tsv_truncated" not in {entry["code"] for entry in done.report["warnings"]}
