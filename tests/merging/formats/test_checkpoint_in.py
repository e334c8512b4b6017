"""Checkpoints as untrusted input: every broken or hostile one has its code, and nothing of it is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import HIDDEN, Q, base_tensors, write_checkpoint, write_index
from safetensors.torch import save_file

from merging.errors import InputError
from merging.formats.checkpoint_in import open_checkpoint
from merging.formats.shards import MAX_INDEX_BYTES

Break = Callable[[Path], Any]
INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def remapped(change: Callable[[dict[str, Any]], Any]) -> Break:
    """A change of the weight map."""

    def act(folder: Path) -> None:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        change(weight_map)
        write_index(folder, weight_map)

    return act


def named(name: object) -> Break:
    return remapped(lambda weight_map: weight_map.update({Q: name}))


def text(content: str | bytes) -> Break:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / INDEX).write_bytes(data)


def linked(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / ONE).rename(outside)
    (folder / ONE).symlink_to(outside)


def with_pipe(folder: Path) -> None:
    (folder / ONE).unlink()
    os.mkfifo(folder / ONE)


def twice(folder: Path) -> None:
    tensors = base_tensors()
    save_file({Q: tensors[Q], **dict(list(tensors.items())[1::2])}, str(folder / TWO))
    save_file({Q: tensors[Q], **dict(list(tensors.items())[0::2])}, str(folder / ONE))


def short(folder: Path) -> None:
    data = (folder / ONE).read_bytes()
    (folder / ONE).write_bytes(data[:-2])


def pickled(folder: Path) -> None:
    (folder / ONE).write_bytes(b"PK\x03\x04" + bytes(100))


BROKEN: dict[str, tuple[Break, str]] = {
    "up": (named("../secret.safetensors"), "checkpoint_index"),
    "absolute": (named("/etc/passwd"), "checkpoint_index"),
    "folder": (named("sub/model.safetensors"), "checkpoint_index"),
    "dots": (named("a..safetensors"), "checkpoint_index"),
    "hidden": (named(".model.safetensors"), "checkpoint_index"),
    "backslash": (named("a\\b.safetensors"), "checkpoint_index"),
    "nul": (named("a\0.safetensors"), "checkpoint_index"),
    "newline": (named("a.safetensors\n"), "checkpoint_index"),
    "other_suffix": (named("model.bin"), "checkpoint_index"),
    "number": (named(7), "checkpoint_index"),
    "list": (named([ONE]), "checkpoint_index"),
    "null": (named(None), "checkpoint_index"),
    "long": (named("a" * 300 + ".safetensors"), "checkpoint_index"),
    "wrong_shard": (remapped(lambda m: m.update({Q: TWO if m[Q] == ONE else ONE})), "checkpoint_index"),
    "unlisted": (remapped(lambda m: m.pop(Q)), "checkpoint_index"),
    "unknown_tensor": (remapped(lambda m: m.update({"ghost.weight": ONE})), "checkpoint_index"),
    "absent_file": (named("model-00003-of-00003.safetensors"), "safetensors_not_a_file"),
    "empty_map": (lambda folder: write_index(folder, {}), "checkpoint_index"),
    "too_many_shards": (
        lambda folder: write_index(folder, {f"t{i}": f"s{i}.safetensors" for i in range(3000)}),
        "checkpoint_index",
    ),
    "no_map": (text("{}"), "checkpoint_index"),
    "map_is_list": (text('{"weight_map": []}'), "checkpoint_index"),
    "not_an_object": (text("[]"), "checkpoint_index"),
    "not_json": (text("{"), "checkpoint_index"),
    "not_utf8": (text(b"\xff\xfe{}"), "checkpoint_index"),
    "nested": (text('{"weight_map":' + "[" * 200_000), "checkpoint_index"),
    "duplicate_key": (
        text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'),
        "checkpoint_index",
    ),
    "huge": (
        lambda folder: os.truncate(folder / INDEX, MAX_INDEX_BYTES + 1),
        "checkpoint_index",
    ),
    "in_two_shards": (twice, "checkpoint_index"),
    "two_models": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / ONE).read_bytes()),
        "checkpoint_index",
    ),
    "link": (linked, "link_outside_folder"),
    "pipe": (with_pipe, "safetensors_not_a_file"),
    "cut": (short, "safetensors_truncated"),
    "pickle_inside": (
        lambda folder: (folder / ONE).write_bytes(b"PK\x03\x04" + bytes(100)),
        "pickle_not_accepted",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused_by_name(tmp_path: Path, case: str) -> None:
    folder = write_checkpoint(tmp_path / "m", base_tensors(), shards=2)
    act, code = BROKEN[case]
    act(folder)
    with pytest.raises(InputError) as caught:
        open_checkpoint(folder)
    assert caught.value.code == code
    assert caught.value.where


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"])
def test_a_checkpoint_without_safetensors_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02")
    with pytest.raises(InputError) as caught:
        open_checkpoint(tmp_path)
    pickled = name.endswith((".bin", ".pth"))
    assert caught.value.code == ("pickle_not_accepted" if pickled else "checkpoint_not_found")


@pytest.mark.parametrize(
    ("extra", "config"),
    [
        ({"model.layers.0.self_attn.q_proj.weight_scale_inv": torch.ones(1)}, {}),
        ({"model.layers.0.self_attn.q_proj.weight.absmax": torch.ones(1)}, {}),
        (
            {"model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4": torch.ones(1)},
            {},
        ),
        ({"model.layers.0.self_attn.q_proj.qweight": torch.ones(1, dtype=torch.int32)}, {}),
        ({"model.layers.0.mlp.experts.gate_up_proj_blocks": torch.ones(1, dtype=torch.uint8)}, {}),
        ({"plain_f8.weight": torch.ones(2).to(torch.float8_e4m3fn)}, {}),
        ({}, {"quantization_config": {"quant_method": "gptq"}}),
        ({}, {"quantization_config": "fp8"}),
    ],
)
def test_quantised_checkpoints_are_refused_with_the_remedy(
    tmp_path: Path, extra: dict[str, torch.Tensor], config: dict[str, Any]
) -> None:
    write_checkpoint(tmp_path / "m", {**base_tensors(), **extra}, **config)
    with pytest.raises(InputError) as caught:
        open_checkpoint(tmp_path / "m", label="mine")
    assert caught.value.code == "quantised_base"
    assert "unquantised" in str(caught.value)
    assert caught.value.where["model"] == "mine"


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_the_tensors_are_those_of_the_files(tmp_path: Path, shards: int) -> None:
    tensors = base_tensors()
    write_checkpoint(tmp_path / "m", tensors, shards=shards)
    model = open_checkpoint(tmp_path / "m")
    assert set(model.infos) == set(tensors)
    raw = bytearray(2 * HIDDEN)
    model.read_into(Q, memoryview(raw), 2 * HIDDEN * 3)
    assert torch.equal(torch.frombuffer(raw, dtype=torch.bfloat16), tensors[Q][3])
    with pytest.raises(ValueError, match="no bytes"):
        model.read_into(Q, memoryview(raw), tensors[Q].numel() * 2 - 1)
    model.close()


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    tensors = base_tensors()
    one = open_checkpoint(write_checkpoint(tmp_path / "one", tensors))
    same = open_checkpoint(write_checkpoint(tmp_path / "same", tensors))
    config = open_checkpoint(write_checkpoint(tmp_path / "config", tensors, rms_norm_eps=1e-6))
    tensors[Q] = tensors[Q] + 1
    other = open_checkpoint(write_checkpoint(tmp_path / "other", tensors))
    assert one.digest == same.digest
    assert len({one.digest, config.digest, other.digest}) == 3


def test_a_file_that_changes_after_the_check_is_not_read(tmp_path: Path) -> None:
    from merging.errors import MergeFailure

    folder = write_checkpoint(tmp_path / "m", base_tensors())
    model = open_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    write_checkpoint(folder, base_tensors(seed=4))
    with pytest.raises(MergeFailure) as caught:
        model.read_into(Q, memoryview(bytearray(4)), 0)
    assert caught.value.code == "file_changed"


def test_diffusers_names_are_known(tmp_path: Path) -> None:
    save_file({"conv.weight": torch.ones(2, 3, 1, 1)}, str(tmp_path / "diffusion_pytorch_model.safetensors"))
    assert list(open_checkpoint(tmp_path).infos) == ["conv.weight"]


def test_an_index_may_name_the_single_file(tmp_path: Path) -> None:
    tensors = base_tensors()
    folder = write_checkpoint(tmp_path / "m", tensors)
    write_index(folder, dict.fromkeys(tensors, "model.safetensors"))
    assert set(open_checkpoint(folder).infos) == set(tensors)
