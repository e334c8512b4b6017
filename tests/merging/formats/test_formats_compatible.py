"""Checks across adapters, from headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from formats.build import PAIR, PREFIX, Shapes, write_adapter

from merging.errors import InputError
from merging.formats.adapter import Adapter, open_adapter
from merging.formats.compatible import check_compatible
from merging.recipe import TakeFrom

HEAD = f"{PREFIX}head.weight"


def layers(*numbers: int) -> Shapes:
    return {key.replace("0", str(n)): shape for n in numbers for key, shape in PAIR.items()}


def make(folder: Path, *many: tuple[Shapes, dict[str, Any]]) -> list[Adapter]:
    return [
        open_adapter(write_adapter(folder / f"task-{i}", shapes, **fields), label=f"task-{i}")
        for i, (shapes, fields) in enumerate(many)
    ]


def code_of(adapters: list[Adapter], **choices: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        check_compatible(adapters, **choices)
    return caught.value


def test_the_table_says_who_has_what_sorted_by_module(tmp_path: Path) -> None:
    adapters = make(tmp_path, (layers(2, 10), {}), (layers(1, 10), {}))
    table = check_compatible(adapters, missing_modules="zero")
    assert list(table.modules.items()) == [
        ("layers.1.q", (1,)),
        ("layers.10.q", (0, 1)),
        ("layers.2.q", (0,)),
    ]
    assert "count as zero: layers.1.q, layers.2.q" in table.warnings[0]


def test_ranks_and_scales_may_differ(tmp_path: Path) -> None:
    wide = {f"{PREFIX}layers.0.q.lora_A.weight": (5, 3), f"{PREFIX}layers.0.q.lora_B.weight": (4, 5)}
    table = check_compatible(make(tmp_path, (PAIR, {}), (wide, {"r": 5, "use_rslora": True})))
    assert table.modules == {"layers.0.q": (0, 1)}
    assert table.warnings == ()


def test_missing_modules_are_listed_up_to_ten(tmp_path: Path) -> None:
    error = code_of(make(tmp_path, (layers(*range(20)), {}), (layers(0), {})))
    assert error.code == "missing_modules"
    assert error.where["model"] == "task-1"
    assert error.message.count("layers.") == 11  # the first is named twice
    assert error.message.endswith(", ...")


@pytest.mark.parametrize(
    ("one", "other", "code"),
    [
        ({}, {"base_model_name_or_path": "other/base"}, "base_model_mismatch"),
        ({"revision": "a"}, {"revision": "b"}, "base_model_mismatch"),
        ({"revision": "a"}, {}, "base_model_mismatch"),
        ({}, {"fan_in_fan_out": True}, "layer_mismatch"),
    ],
)
def test_what_does_not_belong_together(
    one: dict[str, Any], other: dict[str, Any], code: str, tmp_path: Path
) -> None:
    assert code_of(make(tmp_path, (PAIR, one), (PAIR, other))).code == code


def test_different_bases_can_be_allowed(tmp_path: Path) -> None:
    adapters = make(tmp_path, (PAIR, {}), (PAIR, {"base_model_name_or_path": "other/base"}))
    table = check_compatible(adapters, allow_base_mismatch=True)
    assert (table.base_model, table.base_revision) == (None, None)
    assert "other/base (task-1)" in table.warnings[0]


@pytest.mark.parametrize("other", [{}, {"revision": "main"}, {"base_model_name_or_path": "example/base/"}])
def test_the_common_base_is_known(other: dict[str, Any], tmp_path: Path) -> None:
    table = check_compatible(make(tmp_path, (PAIR, {"revision": None}), (PAIR, other)))
    assert (table.base_model, table.base_revision) == ("example/base", None)
    assert table.warnings == ()


def test_an_unnamed_base_is_a_warning(tmp_path: Path) -> None:
    table = check_compatible(make(tmp_path, (PAIR, {}), (PAIR, {"base_model_name_or_path": None})))
    assert table.base_model == "example/base"
    assert "do not name their base model: task-1" in table.warnings[0]


def test_shapes_must_agree(tmp_path: Path) -> None:
    other = {f"{PREFIX}layers.0.q.lora_A.weight": (2, 7), f"{PREFIX}layers.0.q.lora_B.weight": (4, 2)}
    error = code_of(make(tmp_path, (PAIR, {}), (other, {})))
    assert error.code == "shape_mismatch"
    assert "(4, 3) in task-0 and (4, 7) in task-1" in error.message


def test_kinds_must_agree(tmp_path: Path) -> None:
    conv = {
        f"{PREFIX}layers.0.q.lora_A.weight": (2, 3, 1, 1),
        f"{PREFIX}layers.0.q.lora_B.weight": (4, 2, 1, 1),
    }
    error = code_of(make(tmp_path, (PAIR, {}), (conv, {})))
    assert error.code == "layer_mismatch"
    assert "a linear in task-0 and a conv2d in task-1" in error.message


def test_resized_vocabularies_are_named(tmp_path: Path) -> None:
    def embedding(size: int) -> Shapes:
        return {f"{PREFIX}e.lora_embedding_A": (2, size), f"{PREFIX}e.lora_embedding_B": (4, 2)}

    error = code_of(make(tmp_path, (embedding(100), {}), (embedding(103), {})))
    assert error.code == "shape_mismatch"
    assert "a vocabulary of 100 in task-0 and of 103 in task-1" in error.message


SAVE = {"modules_to_save": ["head"]}
WITH_HEAD: Shapes = {**PAIR, HEAD: (2, 3)}


def test_fully_trained_tensors_need_a_choice(tmp_path: Path) -> None:
    error = code_of(make(tmp_path, (PAIR, {}), (WITH_HEAD, SAVE)))
    assert error.code == "modules_to_save_choice"
    assert error.where["model"] == "task-1"


def test_fully_trained_tensors_can_be_dropped(tmp_path: Path) -> None:
    table = check_compatible(make(tmp_path, (PAIR, {}), (WITH_HEAD, SAVE)), modules_to_save="drop")
    assert (dict(table.full_tensors), table.modules_to_save) == ({}, ())
    assert "head.weight" in table.warnings[0]


def test_fully_trained_tensors_can_be_averaged(tmp_path: Path) -> None:
    adapters = make(tmp_path, (WITH_HEAD, SAVE), (WITH_HEAD, SAVE))
    table = check_compatible(adapters, modules_to_save="average")
    assert table.full_tensors["head.weight"].sources == (0, 1)
    assert table.full_tensors["head.weight"].shape == (2, 3)
    assert table.modules_to_save == ("head",)


@pytest.mark.parametrize("choice", [{"take": "task-1"}, TakeFrom(take="task-1")])
def test_fully_trained_tensors_can_be_taken_from_one_model(choice: Any, tmp_path: Path) -> None:
    table = check_compatible(make(tmp_path, (PAIR, {}), (WITH_HEAD, SAVE)), modules_to_save=choice)
    assert {name: full.sources for name, full in table.full_tensors.items()} == {"head.weight": (1,)}
    assert table.modules_to_save == ("head",)


@pytest.mark.parametrize("choice", ["average", {"take": "task-0"}, {"take": "nobody"}])
def test_a_choice_that_cannot_be_met_is_an_error(choice: Any, tmp_path: Path) -> None:
    adapters = make(tmp_path, (PAIR, {}), (WITH_HEAD, SAVE))
    assert code_of(adapters, modules_to_save=choice).code == "modules_to_save_missing"


def test_heads_of_different_size_have_no_average(tmp_path: Path) -> None:
    adapters = make(tmp_path, (WITH_HEAD, SAVE), ({**PAIR, HEAD: (5, 3)}, SAVE))
    assert code_of(adapters, modules_to_save="average").code == "shape_mismatch"


def test_implicit_heads_of_a_task_stay_loadable(tmp_path: Path) -> None:
    """PEFT adds the classifier of a SEQ_CLS adapter by itself, so the configuration need not name it."""
    shapes = {**PAIR, f"{PREFIX}classifier.weight": (2, 3)}
    (adapter,) = make(tmp_path, (shapes, {"task_type": "SEQ_CLS"}))
    table = check_compatible([adapter], modules_to_save="average")
    assert (table.modules_to_save, table.task_type) == (("classifier",), "SEQ_CLS")


def test_no_adapters_is_an_error() -> None:
    assert code_of([]).code == "no_adapters"
