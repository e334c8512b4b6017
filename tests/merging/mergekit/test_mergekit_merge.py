"""mergekit configurations from end to end: ``merging.merge``, ``merging.plan`` and the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit_tools import Checkpoints, cases, reference
from safetensors.torch import load_file, save_file

import merging
from benchmarks.checkpoint_inputs import SHAPES, write_checkpoints
from benchmarks.mergekit_golden import placed
from merging.engine import Progress
from merging.errors import InputError, MergeFailure
from merging.mergekit.detect import claimed
from merging.preparing import local_path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    folder = tmp_path_factory.mktemp("checkpoints")
    write_checkpoints(folder, SHAPES["tiny"])
    return Checkpoints(folder)


def merge(document: Any, checkpoints: Checkpoints, out: Path, **more: Any) -> merging.MergeResult:
    return merging.merge(document, out, resolve=lambda name: checkpoints.folder / name, threads=1, **more)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_configuration_file_becomes_a_checkpoint(checkpoints: Checkpoints, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(cases()["ties"]))
    result = merge(config, checkpoints, tmp_path / "out")
    assert sorted(bytes_of(result.path)) == sorted(result.files)
    assert {"config.json", "tokenizer.json", "merge.yaml", "report.json", "README.md"} <= set(result.files)
    wanted = reference("ties")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights(result.path).items())


def test_the_kept_configuration_gives_the_same_bytes_again(checkpoints: Checkpoints, tmp_path: Path) -> None:
    first = merge(cases()["della"], checkpoints, tmp_path / "first")
    again = merge(first.path / "merge.yaml", checkpoints, tmp_path / "again")
    assert bytes_of(again.path) == bytes_of(first.path)


def test_threads_and_shards_change_no_number(checkpoints: Checkpoints, tmp_path: Path) -> None:
    one = merge(cases()["dare_ties"], checkpoints, tmp_path / "one")
    many = merging.merge(
        cases()["dare_ties"],
        tmp_path / "many",
        resolve=lambda name: checkpoints.folder / name,
        threads=3,
        shard_bytes=2000,
    )
    assert len(list(many.path.glob("*.safetensors"))) > 2
    index = json.loads((many.path / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(weights(one.path))
    first, second = weights(one.path), weights(many.path)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_the_seed_decides_what_is_dropped(checkpoints: Checkpoints, tmp_path: Path) -> None:
    document = cases()["dare_linear"]
    found = [merge({**document, "seed": seed}, checkpoints, tmp_path / str(seed)) for seed in (1, 2)]
    first, second = (weights(result.path) for result in found)
    assert not torch.equal(first["lm_head.weight"], second["lm_head.weight"])
    assert found[0].recipe_digest != found[1].recipe_digest


def test_an_interrupted_merge_goes_on_where_it_was(checkpoints: Checkpoints, tmp_path: Path) -> None:
    whole = merge(cases()["sce"], checkpoints, tmp_path / "whole", shard_bytes=3000)
    seen: list[int] = []

    def stop(step: Progress) -> None:
        seen.append(step.done)
        if step.done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(cases()["sce"], checkpoints, tmp_path / "out", shard_bytes=3000, progress=stop)
    resumed: list[int] = []
    merge(
        cases()["sce"],
        checkpoints,
        tmp_path / "out",
        shard_bytes=3000,
        progress=lambda step: resumed.append(step.done),
    )
    assert next(done for done in resumed if done) > 10
    assert bytes_of(tmp_path / "out") == bytes_of(whole.path)


def test_a_frankenmerge_loads_in_transformers(checkpoints: Checkpoints, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    result = merge(cases()["frankenmerge"], checkpoints, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(result.path)
    assert len(model.model.layers) == 4
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_a_plain_document_of_whole_models_is_for_mergekit(
    checkpoints: Checkpoints,
) -> None:
    plain = {"merge_method": "linear", "models": [{"model": "base"}, {"model": "tuned-0"}]}
    plain["parameters"] = {"weight": 0.5}

    def is_claimed(document: dict[str, Any]) -> bool:
        return claimed(document, lambda name: checkpoints.folder / name) is not None

    assert is_claimed(plain)
    assert is_claimed({**plain, "compat": "mergekit", "seed": 3})
    assert not is_claimed({**plain, "output": {"format": "checkpoint"}})
    assert not is_claimed({**plain, "parameters": {"weight": 0.5, "trim_scope": "global"}})
    assert not is_claimed({**plain, "merge_method": "tsv"})


def test_a_recipe_of_adapters_with_compat_stays_a_recipe(examples_dir: Path) -> None:
    adapters = sorted(path for path in (examples_dir / "adapters").iterdir() if path.is_dir())[:2]
    recipe = {"merge_method": "ties", "compat": "mergekit", "models": [{"model": str(p)} for p in adapters]}
    assert claimed(recipe, local_path) is None


def test_vocabularies_that_differ_are_refused_if_a_tokenizer_is_asked_for(tmp_path: Path) -> None:
    write_checkpoints(tmp_path, SHAPES["tiny"])
    path = tmp_path / "tuned-1" / "tokenizer.json"
    path.write_text(path.read_text().replace('"t3"', '"other"'))
    document = cases()["ties"]
    with pytest.raises(InputError) as error:
        merge(document, Checkpoints(tmp_path), tmp_path / "out")
    assert error.value.code == "mergekit_vocabulary"
    assert "tuned-1" in error.value.message
    del document["tokenizer_source"]
    merge(document, Checkpoints(tmp_path), tmp_path / "out")


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.model"])
def test_vocabularies_are_compared_in_the_files_that_all_models_have(tmp_path: Path, name: str) -> None:
    folders = write_checkpoints(tmp_path, SHAPES["tiny"])
    for folder in folders:
        (folder / name).write_text('{"a": 0, "b": 1}')
    (tmp_path / "tuned-0" / "tokenizer.json").unlink()
    merge(cases()["ties"], Checkpoints(tmp_path), tmp_path / "out")
    for other, text in ((name, '{"a": 1, "b": 0}'), ("added_tokens.json", '{"c": 2}')):
        before = (tmp_path / "tuned-2" / other).read_text() if other == name else "{}"
        (tmp_path / "tuned-2" / other).write_text(text)
        with pytest.raises(InputError) as error:
            merge(cases()["ties"], Checkpoints(tmp_path), tmp_path / "refused")
        assert error.value.code == "mergekit_vocabulary"
        (tmp_path / "tuned-2" / other).write_text(before)


def test_the_tokenizer_of_a_named_model_comes_with_the_result(tmp_path: Path) -> None:
    for folder in write_checkpoints(tmp_path, SHAPES["tiny"]):
        (folder / "chat_template.jinja").write_text(folder.name)
        (folder / "generation_config.json").write_text(json.dumps({"of": folder.name}))
    told = {}
    for source in ("base", "union", "tuned-1"):
        document = {**cases()["ties"], "tokenizer_source": source}
        out = merge(document, Checkpoints(tmp_path), tmp_path / f"out-{source}").path
        told[source] = (out / "chat_template.jinja").read_text()
        assert json.loads((out / "generation_config.json").read_text()) == {"of": "base"}
    assert told == {"base": "base", "union": "base", "tuned-1": "tuned-1"}


def test_a_tokenizer_source_that_is_not_there_is_named(checkpoints: Checkpoints, tmp_path: Path) -> None:
    document = {**cases()["ties"], "tokenizer_source": "nobody"}
    with pytest.raises(InputError) as error:
        merging.merge(
            document, tmp_path / "out", resolve=lambda name: local_path(str(checkpoints.folder / name))
        )
    assert error.value.code == "model_not_found"
    assert "hf://" in (error.value.remedy or "")


def test_a_model_that_is_not_there_is_named_with_how_the_hub_is_spelled(tmp_path: Path) -> None:
    document = {**cases()["linear"], "models": [{"model": "org/name", "parameters": {"weight": 1}}]}
    with pytest.raises(InputError) as error:
        merging.plan(document)
    assert error.value.code == "model_not_found"
    assert "org/name" in error.value.message
    assert "hf://" in (error.value.remedy or "")


def test_an_input_that_is_not_finite_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    paths = write_checkpoints(tmp_path, SHAPES["tiny"])
    file = next(iter(sorted(paths[2].glob("*.safetensors"))))
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][3, 1] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(MergeFailure) as error:
        merge(cases()["linear"], Checkpoints(tmp_path), tmp_path / "out")
    assert error.value.code == "non_finite_tensor"
    assert error.value.where == {"model": "tuned-1", "tensor": "model.embed_tokens.weight"}
    assert not (tmp_path / "out").exists()


def test_the_plan_tells_files_and_warnings_without_torch(checkpoints: Checkpoints) -> None:
    code = (
        "import sys, yaml, merging\n"
        f"document = yaml.safe_load({yaml.safe_dump(cases()['slerp'])!r})\n"
        "document['parameters']['density'] = 0.5\n"
        "from pathlib import Path\n"
        f"folder = Path({str(checkpoints.folder)!r})\n"
        "plan = merging.plan(document, resolve=lambda name: folder / name).to_dict()\n"
        "assert 'torch' not in sys.modules\n"
        "print(plan['method'], plan['output']['files'], [w['message'] for w in plan['warnings']])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == (
        "slerp ['model.safetensors'] ['slerp does not read the parameter density; it is ignored']\n"
    )


def test_the_command_line_runs_a_configuration_as_it_is(checkpoints: Checkpoints, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(placed(cases()["task_arithmetic"], checkpoints.folder)))
    argv = [sys.executable, "-m", "service", "merge", str(config), "--out", str(tmp_path / "out"), "--quiet"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wanted = reference("task_arithmetic")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights(tmp_path / "out").items())
    config.write_text(config.read_text() + "\nmodules: {}\n")
    refused = subprocess.run([*argv, "--overwrite"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "mergekit_unsupported" in refused.stderr


def test_slerp_in_float64_takes_its_place_in_float64(tmp_path: Path) -> None:
    for name, value in (("base", 1.0), ("other", 4.0)):
        (tmp_path / name).mkdir()
        save_file(
            {"x": torch.full((2, 2), value, dtype=torch.float64)}, tmp_path / name / "model.safetensors"
        )
    document = {
        "merge_method": "slerp", "base_model": "base", "models": [{"model": "other"}],
        "parameters": {"t": 0.59}, "dtype": "float64",
    }  # fmt: skip
    out = merge(document, Checkpoints(tmp_path), tmp_path / "out").path
    assert weights(out)["x"].tolist() == [[(1 - 0.59) * 1.0 + 0.59 * 4.0] * 2] * 2
