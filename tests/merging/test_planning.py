"""Plans: everything that headers can tell, without reading a tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from adapters import MODULES, write_adapter

import merging
from merging.errors import InputError


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return [
        write_adapter(tmp_path / "a", seed=1, rank=4),
        write_adapter(tmp_path / "b", seed=2, rank=2),
    ]


def recipe(paths: list[Path], method: str = "svd", **more: Any) -> dict[str, Any]:
    return {"merge_method": method, "models": [{"model": str(path)} for path in paths], **more}


def test_a_plan_lists_modules_ranks_bytes_and_estimates(pair: list[Path]) -> None:
    plan = merging.plan(recipe(pair, "linear")).to_dict()
    assert json.loads(json.dumps(plan)) == plan
    assert [module["name"] for module in plan["modules"]] == sorted(MODULES)
    assert {tuple(module["ranks"]) for module in plan["modules"]} == {(4, 2)}
    assert {module["output_rank"] for module in plan["modules"]} == {6}
    assert plan["estimate"]["output_bytes"] == 4 * 6 * sum(m + n for m, n in MODULES.values())
    assert plan["estimate"]["seconds"] > 0
    assert plan["estimate"]["memory_bytes"] > 0


@pytest.mark.parametrize(
    ("method", "more", "rank"),
    [
        ("svd", {}, 4),
        ("svd", {"output": {"rank": 3}}, 3),
        ("linear", {"output": {"max_rank": 5}}, 5),
        ("ties", {"space": "core"}, 6),
        ("ties", {"space": "full"}, 16),
        ("ties", {"space": "full", "output": {"rank": 7}}, 7),
    ],
)
def test_the_planned_rank_bounds_the_rank_that_is_written(
    pair: list[Path], tmp_path: Path, method: str, more: dict[str, Any], rank: int
) -> None:
    data = recipe(pair, method, **more)
    assert merging.plan(data).output["rank"] == rank
    assert merging.merge(data, tmp_path / "out").report["summary"]["max_rank"] <= rank


def test_an_exact_full_space_merge_is_announced_as_large(pair: list[Path]) -> None:
    assert [w["code"] for w in merging.plan(recipe(pair, "ties")).warnings] == ["full_rank_output"]
    assert not merging.plan(recipe(pair, "ties", space="core")).warnings


def test_a_plan_reads_no_tensor_and_imports_no_torch(pair: list[Path]) -> None:
    code = (
        "import sys, json, merging; plan = merging.plan(json.loads(sys.argv[1]));"
        "assert 'torch' not in sys.modules; print(len(plan.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, json.dumps(recipe(pair))], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == str(len(MODULES))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"base_model_name_or_path": "org/other"}, "base_model_mismatch"),
        ({"modules": {**MODULES, "layers.1.v_proj": (13, 16)}}, "shape_mismatch"),
        ({"modules": {"layers.0.q_proj": (24, 16)}}, "missing_modules"),
        ({"use_dora": True}, "dora_unsupported"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    pair: list[Path], tmp_path: Path, change: dict[str, Any], code: str
) -> None:
    odd = write_adapter(tmp_path / "odd", seed=3, **change)
    with pytest.raises(InputError) as caught:
        merging.plan(recipe([*pair, odd]))
    assert caught.value.code == code


def test_a_model_that_is_not_there_is_named(pair: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        merging.plan(recipe([*pair, tmp_path / "nowhere"]))
    assert caught.value.code == "model_not_found"
    assert caught.value.where["model"] == str(tmp_path / "nowhere")


def test_references_go_through_the_resolver(pair: list[Path]) -> None:
    data = {"merge_method": "svd", "models": [{"model": "ns/a@1"}, {"model": "ns/b"}]}
    plan = merging.plan(data, resolve=lambda ref: pair[0] if ref == "ns/a@1" else pair[1])
    assert [model["model"] for model in plan.models] == ["ns/a@1", "ns/b"]
