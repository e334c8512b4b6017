"""rank_pattern and alpha_pattern: the same answers as PEFT, in bounded time."""

from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from merging.errors import InputError
from merging.formats.patterns import PatternTable
from merging.formats.peft_config import parse_adapter_config

PATHS = [
    "q",
    "my_q",
    "layers.0.q",
    "layers.1.q",
    "layers.10.q",
    "layers.11.q",
    "layers.1.my_q",
    "model.layers.1.q",
    "model.layers.1.self_attn.q_proj",
    "layersX1Xq",
    "a-b.q",
]
PATTERNS = [
    "q",
    "layers.1.q",
    r"layers\.1\.q",
    r"^layers\.1\.q",
    "^layers.1.q",
    "layers.1.*",
    "layers.1",
    "model.layers.1.self_attn",
    r"layers\.\d.q",
    "self_attn.q_proj",
    r".*\.q",
    "q|my_q",
    "layers.(0|1).q$",
    "layers.1.q$",
    ".",
    "a-b.q",
    r"a\-b\.q",
    "q_proj",
    "",
]


def peft_lookup(patterns: dict[str, int], path: str, default: int) -> int:
    return patterns.get(get_pattern_key(list(patterns), path), default)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_pattern_hits_as_in_peft(pattern: str, path: str) -> None:
    table = PatternTable({pattern: 2}, field="rank_pattern", file="f")
    assert table.lookup(path, 1) == peft_lookup({pattern: 2}, path, 1)


@settings(max_examples=500, deadline=None)
@given(patterns=st.lists(st.sampled_from(PATTERNS), unique=True, max_size=6), path=st.sampled_from(PATHS))
def test_the_first_pattern_in_order_wins_as_in_peft(patterns: list[str], path: str) -> None:
    table = {pattern: place + 2 for place, pattern in enumerate(patterns)}
    assert PatternTable(table, field="f", file="f").lookup(path, 1) == peft_lookup(table, path, 1)


piece = st.sampled_from(
    ["a", "b", "1", ".", r"\.", "^", "$", "*", "+", "?", "(", ")", "|", "[ab]", r"\d", "{2}"]
)


@settings(max_examples=800, deadline=None)
@given(
    pattern=st.lists(piece, max_size=7).map("".join),
    path=st.lists(st.sampled_from(["a", "b", "1", "ab", "a1"]), min_size=1, max_size=4).map(".".join),
)
def test_any_accepted_pattern_means_what_peft_takes_it_for(pattern: str, path: str) -> None:
    try:
        table = PatternTable({pattern: 2}, field="f", file="f")
    except InputError:
        return
    assert table.lookup(path, 1) == peft_lookup({pattern: 2}, path, 1)


def test_a_table_of_every_module_is_fast() -> None:
    """Ten thousand modules with a pattern each, spelled as our own results spell them."""
    paths = [f"model.layers.{i}.mlp.experts.{j}.down_proj" for i in range(100) for j in range(100)]
    table = PatternTable({f"^{re.escape(path)}": i for i, path in enumerate(paths)}, field="f", file="f")
    assert [table.lookup(path, -1) for path in paths] == list(range(10_000))
    plain = PatternTable({path: i for i, path in enumerate(paths)}, field="f", file="f")
    assert [plain.lookup(path, -1) for path in paths] == list(range(10_000))


@pytest.mark.parametrize(
    ("fields", "path", "rank", "scale"),
    [
        ({"r": 8, "lora_alpha": 16}, "x.q", 8, 2.0),
        ({"r": 16, "lora_alpha": 8, "use_rslora": True}, "x.q", 16, 2.0),
        ({"r": 8, "lora_alpha": 16, "rank_pattern": {"q": 4}}, "x.q", 4, 4.0),
        ({"r": 8, "lora_alpha": 16, "rank_pattern": {"k": 4}}, "x.q", 8, 2.0),
        ({"r": 8, "lora_alpha": 16, "alpha_pattern": {"q": 4}}, "x.q", 8, 0.5),
        ({"r": 9, "lora_alpha": 3, "use_rslora": True, "rank_pattern": {"q": 4}}, "x.q", 4, 1.5),
        ({"lora_alpha": 4}, "x.q", 8, 0.5),
        ({"r": 4}, "x.q", 4, 2.0),
        ({"r": 4, "lora_alpha": 2.5}, "x.q", 4, 0.625),
    ],
)
def test_the_scale_rule(fields: dict[str, object], path: str, rank: int, scale: float) -> None:
    config = parse_adapter_config(json.dumps({"peft_type": "LORA", **fields}).encode())
    assert config.rank_of(path) == rank
    assert math.isclose(config.scale_of(path), scale)
