"""Task vectors and adapters as inputs, and as what comes out of whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import products, write_adapter
from checkpoint_files import (
    HIDDEN,
    INNER,
    NORM,
    SHAPES,
    VOCAB,
    Q,
    base_tensors,
    read_all,
    recipe,
    tuned,
    write_checkpoint,
    write_task_vector,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import merging
from merging.errors import InputError

MODULES = {
    name.removesuffix(".weight"): shape
    for name, shape in SHAPES.items()
    if name.endswith("_proj.weight") and len(shape) == 2
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "base", base_tensors(torch.float32))


def adapters(tmp_path: Path, count: int = 2, **more: Any) -> list[Path]:
    return [
        write_adapter(tmp_path / f"a{i}", seed=i + 1, rank=3 + i, modules=MODULES, **more)
        for i in range(count)
    ]


def folded(base: Path, adapter: Path, folder: Path) -> Path:
    """The adapter added to the base, as a full fine-tune."""
    tensors = read_all(base)
    for name, delta in products(adapter).items():
        key = f"{name}.weight"
        tensors[key] = (tensors[key].double() + delta).to(tensors[key].dtype)
    return write_checkpoint(folder, tensors)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert set(one) == set(other)
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


@pytest.mark.parametrize(
    "method", ["linear", "ties", "magnitude_prune", "breadcrumbs", "consensus", "tsv", "cart"]
)
def test_full_fine_tunes_equal_the_route_of_the_adapters(tmp_path: Path, base: Path, method: str) -> None:
    given = adapters(tmp_path)
    whole = [folded(base, path, tmp_path / f"f{i}") for i, path in enumerate(given)]
    settings = {"lambda": 0.7}
    if method == "cart":
        settings["cart_rank"] = 2  # a share would be of the reach, which rounding makes full
    if method == "tsv":
        settings["k"] = 3
    space = {"space": "full"} if method != "linear" else {}
    one = recipe(base, given, method, parameters=settings, **space)
    two = recipe(base, whole, method, parameters=settings)
    merging.merge(one, tmp_path / "one", device="cpu")
    merging.merge(two, tmp_path / "two", device="cpu")
    first, second, start = (read_all(path) for path in (tmp_path / "one", tmp_path / "two", base))
    moved = distance(first, start)
    for name in first:
        # an entry at a threshold may fall on the other side
        far = (first[name].double() - second[name].double()).abs() > 2e-5 * moved
        assert int(far.sum()) <= 0.01 * far.numel() + 1, name


def test_adapters_and_checkpoints_mix(tmp_path: Path, base: Path) -> None:
    given = adapters(tmp_path)
    whole = [given[0], folded(base, given[1], tmp_path / "f1")]
    merging.merge(recipe(base, whole, "ties"), tmp_path / "mixed", device="cpu")
    both = [folded(base, path, tmp_path / f"g{i}") for i, path in enumerate(given)]
    merging.merge(recipe(base, both, "ties"), tmp_path / "dense", device="cpu")
    # The adapter adds nothing to vectors and embeddings, and neither did its fine-tune.
    start = read_all(base)
    mixed, dense = read_all(tmp_path / "mixed"), read_all(tmp_path / "dense")
    for name, tensor in mixed.items():
        assert float((tensor - dense[name]).abs().gt(1e-5).double().mean()) <= 0.02, name
        if name.removesuffix(".weight") not in MODULES:
            assert torch.equal(tensor, start[name]), name


@pytest.mark.parametrize("space", ["core", "knots"])
def test_adapters_become_a_checkpoint_in_any_space(tmp_path: Path, base: Path, space: str) -> None:
    given = adapters(tmp_path)
    data = recipe(base, given, "ties", space=space)
    done = merging.merge(data, tmp_path / "out", device="cpu")
    merging.merge({**data, "output": {"dtype": "float32"}}, tmp_path / "adapter", device="cpu")
    expected = read_all(folded(base, tmp_path / "adapter", tmp_path / "folded"))
    assert distance(read_all(tmp_path / "out"), expected) < 1e-6
    assert done.report["method"] == "ties"
    assert done.report["space"] == space
    again = merging.merge(tmp_path / "out" / "merge.yaml", tmp_path / "again", device="cpu")
    assert again.files["model.safetensors"] == done.files["model.safetensors"]
    assert merging.plan(data).to_dict()["output"]["format"] == "checkpoint"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("method", ["drm_h", "lora_lego", "lore", "svd"])
def test_methods_on_factors_write_checkpoints_too(tmp_path: Path, base: Path, method: str) -> None:
    given = [write_adapter(tmp_path / f"a{i}", seed=i, rank=3, modules=MODULES) for i in range(2)]
    data = recipe(base, given, method)
    merging.merge(data, tmp_path / "out", device="cpu")
    merging.merge({**data, "output": {"dtype": "float32"}}, tmp_path / "adapter", device="cpu")
    expected = read_all(folded(base, tmp_path / "adapter", tmp_path / "folded"))
    assert distance(read_all(tmp_path / "out"), expected) < 1e-6


def test_merged_full_tensors_of_adapters_replace_those_of_the_base(tmp_path: Path, base: Path) -> None:
    given = []
    for i in range(2):
        folder = write_adapter(tmp_path / f"a{i}", seed=i, modules=MODULES, modules_to_save=["lm_head"])
        file = folder / "adapter_model.safetensors"
        head = torch.full((VOCAB, HIDDEN), float(i))
        save_file({**load_file(file), "base_model.model.lm_head.weight": head}, str(file), {"format": "pt"})
        given.append(folder)
    data = recipe(base, given)
    with pytest.raises(InputError) as caught:
        merging.merge(data, tmp_path / "refused", device="cpu")
    assert caught.value.where["field"] == "modules_to_save" or "modules_to_save" in str(caught.value)
    merging.merge({**data, "modules_to_save": "average"}, tmp_path / "out", device="cpu")
    head = read_all(tmp_path / "out")["lm_head.weight"]
    assert torch.allclose(head, torch.full_like(head, 0.5), atol=1e-6)
    merging.merge({**data, "modules_to_save": "drop"}, tmp_path / "dropped", device="cpu")
    assert torch.equal(read_all(tmp_path / "dropped")["lm_head.weight"], read_all(base)["lm_head.weight"])


@pytest.mark.parametrize(
    ("modules", "code"),
    [
        ({"model.layers.7.self_attn.q_proj": (HIDDEN, HIDDEN)}, "unmatched_modules"),
        ({"model.layers.0.self_attn.q_proj": (HIDDEN, HIDDEN + 1)}, "tensor_shape_mismatch"),
    ],
)
def test_adapters_that_do_not_fit_the_base_are_refused(
    tmp_path: Path, base: Path, modules: dict[str, tuple[int, int]], code: str
) -> None:
    stray = write_adapter(tmp_path / "stray", modules=modules)
    whole = write_checkpoint(tmp_path / "m", tuned(read_all(base), 1))
    for models in ([stray, whole], [stray]):
        with pytest.raises(InputError) as caught:
            merging.plan(recipe(base, models))
        assert caught.value.code == code


def test_a_task_vector_is_a_difference_that_can_be_merged_again(tmp_path: Path, base: Path) -> None:
    models = [write_checkpoint(tmp_path / f"m{i}", tuned(read_all(base), i + 1)) for i in range(2)]
    merging.merge(recipe(base, models), tmp_path / "whole", device="cpu")
    vectors = []
    for i, path in enumerate(models):
        merging.merge(
            recipe(base, [path], output={"format": "delta"}),
            tmp_path / f"d{i}",
            device="cpu",
            shard_bytes=3000,
        )
        vectors.append(tmp_path / f"d{i}")
    assert (vectors[0] / "delta.safetensors.index.json").exists()
    merging.merge(recipe(base, vectors), tmp_path / "sum", device="cpu")
    assert distance(read_all(tmp_path / "sum"), read_all(tmp_path / "whole")) < 1e-6


def test_the_header_of_a_task_vector_says_what_it_is_and_of_which_base(tmp_path: Path, base: Path) -> None:
    model = write_checkpoint(tmp_path / "m", tuned(read_all(base), 1))
    done = merging.merge(recipe(base, [model], output={"format": "delta"}), tmp_path / "d", device="cpu")
    with safe_open(tmp_path / "d" / "delta.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["merge.kind"] == "task_vector"
    assert metadata["merge.base_sha256"] == done.report["base"]["digest"]
    other = write_checkpoint(tmp_path / "other", tuned(read_all(base), 9))
    with pytest.raises(InputError) as caught:
        merging.merge(recipe(other, [tmp_path / "d"]), tmp_path / "out", device="cpu")
    assert caught.value.code == "base_mismatch"
    data = recipe(other, [tmp_path / "d"], allow_base_mismatch=True)
    merging.merge(data, tmp_path / "out", device="cpu")


def test_task_vectors_alone_need_no_base(tmp_path: Path) -> None:
    parts = [
        write_task_vector(tmp_path / "one", {"x.weight": torch.ones(3, 4), "y.weight": torch.ones(2, 2)}),
        write_task_vector(tmp_path / "two", {"x.weight": 2 * torch.ones(3, 4)}),
    ]
    data = recipe(None, parts, output={"format": "delta"})
    merging.merge(data, tmp_path / "out", device="cpu")
    result = read_all(tmp_path / "out")
    assert torch.equal(result["x.weight"], 3 * torch.ones(3, 4))
    assert torch.equal(result["y.weight"], torch.ones(2, 2))
    with pytest.raises(InputError) as caught:
        merging.plan({**data, "output": {"format": "checkpoint"}})
    assert caught.value.code == "base_model_required"


def test_a_file_without_the_mark_is_no_task_vector(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "unmarked"
    folder.mkdir()
    save_file({Q: torch.ones(HIDDEN, HIDDEN)}, str(folder / "delta.safetensors"))
    with pytest.raises(InputError) as caught:
        merging.plan(recipe(base, [folder]))
    assert caught.value.code == "task_vector_unmarked"


def test_a_task_vector_may_hold_some_tensors(tmp_path: Path, base: Path) -> None:
    part = write_task_vector(tmp_path / "part", {NORM: torch.full((HIDDEN,), 0.25)})
    merging.merge(recipe(base, [part]), tmp_path / "out", device="cpu")
    start, result = read_all(base), read_all(tmp_path / "out")
    assert torch.allclose(result.pop(NORM), start.pop(NORM) + 0.25)
    assert distance(start, result) == 0.0


def test_half_precision_differences_are_written_in_float32(tmp_path: Path) -> None:
    tensors = base_tensors(torch.float16)
    base = write_checkpoint(tmp_path / "base", tensors)
    model = write_checkpoint(tmp_path / "m", tuned(tensors, 1))
    merging.merge(recipe(base, [model], output={"format": "delta"}), tmp_path / "d", device="cpu")
    assert {tensor.dtype for tensor in read_all(tmp_path / "d").values()} == {torch.float32}


@pytest.mark.parametrize("output", [{"rank": 4}, {"energy": 0.8}, {"energy": 0.9, "max_rank": 3}])
def test_an_adapter_is_extracted_and_its_loss_told(
    tmp_path: Path, base: Path, output: dict[str, Any]
) -> None:
    tensors = tuned(read_all(base), 1)
    vectors = {name: x for name, x in read_all(base).items() if name.removesuffix(".weight") not in MODULES}
    model = write_checkpoint(tmp_path / "m", {**tensors, **vectors})
    data = recipe(base, [model], output={"format": "lora", **output})
    done = merging.merge(data, tmp_path / "out", device="cpu")
    found, start = products(tmp_path / "out"), read_all(base)
    for name in MODULES:
        key = f"{name}.weight"
        delta = tensors[key].double() - start[key].double()
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        entry = done.report["modules"][key]
        rank = entry["rank"]
        best = U[:, :rank] * S[:rank] @ Vh[:rank]
        kept = float((S[:rank] ** 2).sum() / (S**2).sum())
        if "rank" in output:
            assert rank == 4
        elif "max_rank" in output:
            assert rank <= 3
        else:
            assert kept >= 0.8 - 1e-6
            assert float((S[: rank - 1] ** 2).sum() / (S**2).sum()) < 0.8
        assert float((found[name] - best).norm()) <= 1e-4 * float(delta.norm())
        assert entry["discarded_energy"] == pytest.approx(1.0 - kept, abs=1e-5)


def test_vectors_and_embeddings_that_changed_need_a_choice(tmp_path: Path, base: Path) -> None:
    model = write_checkpoint(tmp_path / "m", tuned(read_all(base), 1))
    data = recipe(base, [model], output={"format": "lora", "rank": 4})
    with pytest.raises(InputError) as caught:
        merging.merge(data, tmp_path / "refused", device="cpu")
    assert caught.value.code == "full_tensors_changed"
    done = merging.merge({**data, "modules_to_save": "drop"}, tmp_path / "dropped", device="cpu")
    assert "full_tensors_dropped" in {entry["code"] for entry in done.report["warnings"]}
    merging.merge({**data, "modules_to_save": "average"}, tmp_path / "kept", device="cpu")
    kept = load_file(tmp_path / "kept" / "adapter_model.safetensors")
    wanted = read_all(tmp_path / "m")
    for name in (NORM, "model.embed_tokens.weight"):
        assert torch.allclose(kept[f"base_model.model.{name}"], wanted[name], atol=1e-6)
    with merging.load_adapter(tmp_path / "kept") as adapter:
        assert NORM in adapter.full_tensors
        assert len(adapter.modules) == len(MODULES) + 1  # the head too


def test_an_adapter_of_whole_models_needs_a_rank(tmp_path: Path, base: Path) -> None:
    model = write_checkpoint(tmp_path / "m", tuned(read_all(base), 1))
    with pytest.raises(InputError) as caught:
        merging.plan(recipe(base, [model], output={"format": "lora"}))
    assert caught.value.code == "rank_required"


@pytest.mark.parametrize("field", ["rank", "energy", "max_rank"])
def test_a_rank_is_for_adapters(tmp_path: Path, base: Path, field: str) -> None:
    model = write_checkpoint(tmp_path / "m", tuned(read_all(base), 1))
    value = 0.5 if field == "energy" else 2
    with pytest.raises(InputError) as caught:
        merging.plan(recipe(base, [model], output={"format": "checkpoint", field: value}))
    assert caught.value.code == "rank_without_lora"


def test_uniform_rank_pads_every_module(tmp_path: Path, base: Path) -> None:
    model = write_checkpoint(tmp_path / "m", tuned(read_all(base), 1))
    output = {"format": "lora", "energy": 0.7, "uniform_rank": True}
    data = recipe(base, [model], output=output, modules_to_save="drop")
    merging.merge(data, tmp_path / "out", device="cpu")
    with merging.load_adapter(tmp_path / "out") as adapter:
        assert len({module.rank for module in adapter.modules.values()}) == 1


def test_models_that_store_their_weights_transposed_give_no_adapter(tmp_path: Path) -> None:
    tensors = base_tensors(torch.float32)
    base = write_checkpoint(tmp_path / "base", tensors, model_type="gpt2")
    model = write_checkpoint(tmp_path / "m", tuned(tensors, 1), model_type="gpt2")
    with pytest.raises(InputError) as caught:
        merging.plan(recipe(base, [model], output={"format": "lora", "rank": 2}))
    assert caught.value.code == "extraction_unsupported"
    assert merging.plan(recipe(base, [model]))


@pytest.mark.parametrize("block", [None, 1])
def test_adapters_of_embeddings_and_transposed_weights_lie_as_the_base_stores_them(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, block: int | None
) -> None:
    if block is not None:  # one row at a time
        monkeypatch.setattr("merging.dense.blocks.STREAM_BUDGET", 6)
    g = torch.Generator().manual_seed(3)
    embedding = tmp_path / "embedding"
    write_adapter(embedding, modules={"model.embed_tokens": (HIDDEN, VOCAB)}, rank=2, alpha=6)
    A, B = torch.randn(2, VOCAB, generator=g), torch.randn(HIDDEN, 2, generator=g)
    prefix = "base_model.model.model.embed_tokens"
    factors = {f"{prefix}.lora_embedding_A": A, f"{prefix}.lora_embedding_B": B}
    save_file(factors, str(embedding / "adapter_model.safetensors"))
    name = "model.layers.0.mlp.down_proj"
    transposed = write_adapter(
        tmp_path / "t", modules={name: (INNER, HIDDEN)}, rank=2, alpha=6, fan_in_fan_out=True
    )
    start = read_all(base)
    for adapter, key, delta in (
        (embedding, "model.embed_tokens.weight", 3.0 * (B @ A).T),
        (transposed, f"{name}.weight", products(transposed)[name].T.float()),
    ):
        whole = write_checkpoint(tmp_path / f"{adapter.name}-whole", start)
        out = tmp_path / f"{adapter.name}-out"
        merging.merge(recipe(base, [adapter, whole]), out, device="cpu")
        assert torch.allclose(read_all(out)[key], start[key] + delta, atol=1e-5)


def test_single_files_of_any_name_are_models(tmp_path: Path) -> None:
    tensors = base_tensors(torch.float32)
    paths = [tmp_path / name for name in ("start.safetensors", "one-fp32.safetensors", "two.safetensors")]
    for path, content in zip(paths, (tensors, tuned(tensors, 1), tuned(tensors, 2)), strict=True):
        save_file(content, str(path))
    data = recipe(paths[0], paths[1:], parameters={"weight": 0.5})
    merging.merge(data, tmp_path / "out", device="cpu")
    found = read_all(tmp_path / "out")
    wanted = 0.5 * (load_file(paths[1])[Q] + load_file(paths[2])[Q])
    assert torch.allclose(found[Q], wanted, atol=1e-6)


def test_a_single_file_of_an_adapter_is_an_adapter(tmp_path: Path, base: Path) -> None:
    folder = write_adapter(tmp_path / "a", modules=MODULES)
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes((folder / "adapter_model.safetensors").read_bytes())
    with pytest.raises(InputError) as caught:
        merging.plan(recipe(base, [bare]))
    assert caught.value.code == "adapter_config_missing"
    save_file({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, str(bare))
    with pytest.raises(InputError) as caught:
        merging.plan(recipe(base, [bare]))
    assert caught.value.code not in ("extra_tensors", "missing_tensors")


@pytest.mark.parametrize("act", [merging.plan, lambda data: merging.merge(data, "never", device="cpu")])
def test_methods_with_several_results_write_no_checkpoint(tmp_path: Path, base: Path, act: Any) -> None:
    given = [write_adapter(tmp_path / f"a{i}", seed=i, rank=3, modules=MODULES) for i in range(2)]
    with pytest.raises(InputError) as caught:
        act(recipe(base, given, "rmm"))
    assert caught.value.code == "output_not_supported"


def test_adapters_need_a_base_to_become_a_checkpoint(tmp_path: Path) -> None:
    given = [write_adapter(tmp_path / f"a{i}", seed=i, modules=MODULES) for i in range(2)]
    for method in ("linear", "ties", "tsv"):
        for act in (merging.plan, lambda data: merging.merge(data, tmp_path / "out", device="cpu")):
            with pytest.raises(InputError) as caught:
                act(recipe(None, given, method))
            assert caught.value.code == "base_model_required"
