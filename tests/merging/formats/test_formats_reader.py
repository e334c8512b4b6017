"""Reading adapters: places, spellings, shapes, warnings, values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from formats.build import CONFIG, PAIR, PREFIX, Shapes, entries, pack, write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st

from merging.errors import InputError
from merging.formats.adapter import open_adapter

A, B = PAIR


def renamed(old: str, new: str) -> Shapes:
    return {key.replace(old, new): shape for key, shape in PAIR.items()}


@pytest.mark.parametrize(
    "shapes",
    [
        renamed("", ""),
        renamed(".weight", ".default.weight"),
        renamed(".weight", ".my-name.weight"),
        renamed(PREFIX, ""),
        renamed(PREFIX, PREFIX + PREFIX),
        renamed(PREFIX, "module." + PREFIX),
        renamed(PREFIX, PREFIX + "module."),
        renamed(PREFIX, "_fsdp_wrapped_module." + PREFIX),
        renamed("layers.", "layers._orig_mod."),
        renamed(".q.", "._checkpoint_wrapped_module.q."),
        renamed(".q.", "._fsdp_wrapped_module.q._orig_mod."),
    ],
    ids=lambda shapes: next(iter(shapes)),
)
def test_every_spelling_of_a_key_gives_the_same_module(shapes: Shapes, tmp_path: Path) -> None:
    adapter = open_adapter(write_adapter(tmp_path / "a", shapes))
    assert list(adapter.modules) == ["layers.0.q"]
    module = adapter.modules["layers.0.q"]
    assert (module.m, module.n, module.rank, module.scale, module.dtype) == (4, 3, 2, 2.0, "F32")
    assert (module.key_A, module.key_B) == tuple(shapes)


def test_removed_wrappers_are_reported(tmp_path: Path) -> None:
    adapter = open_adapter(write_adapter(tmp_path / "a", renamed("layers.", "_orig_mod.layers.")))
    assert adapter.warnings == ("'_orig_mod.' was removed from 2 keys",)


def test_modules_come_sorted_whatever_the_order_in_the_file(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in (10, 2, 1):
        shapes |= renamed("layers.0", f"layers.{layer}")
    adapter = open_adapter(write_adapter(tmp_path / "a", shapes))
    assert list(adapter.modules) == ["layers.1.q", "layers.10.q", "layers.2.q"]


def test_an_adapter_one_folder_down_is_found(tmp_path: Path) -> None:
    write_adapter(tmp_path / "top" / "default")
    adapter = open_adapter(tmp_path / "top")
    assert adapter.path == tmp_path / "top" / "default"
    assert adapter.label == "default"


def test_the_weights_file_may_be_named_instead_of_its_folder(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a")
    assert open_adapter(tmp_path / "a" / "adapter_model.safetensors").label == "a"


def test_a_lone_weights_file_has_no_alpha(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(pack(entries(PAIR)))
    with pytest.raises(InputError) as caught:
        open_adapter(path)
    assert caught.value.code == "adapter_config_missing"


@pytest.mark.parametrize("name", ["nothing", "a.gguf", "a.pt"])
def test_paths_that_are_no_adapter(name: str, tmp_path: Path) -> None:
    if name != "nothing":
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError) as caught:
        open_adapter(tmp_path / name)
    assert caught.value.code == ("pickle_not_accepted" if name == "a.pt" else "adapter_not_found")


def test_links_within_a_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    write_adapter(snapshot)
    for file in sorted(snapshot.iterdir()):
        shutil.move(file, blobs / f"{file.name}-blob")
        file.symlink_to(Path("../../blobs") / f"{file.name}-blob")
    assert open_adapter(snapshot).modules


def test_a_pickle_beside_the_weights_is_ignored_with_a_warning(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a")
    (tmp_path / "a" / "training_args.bin").write_bytes(b"\x80\x04x")
    assert "training_args.bin was ignored" in open_adapter(tmp_path / "a").warnings[0]


def test_an_alpha_of_zero_is_a_warning(tmp_path: Path) -> None:
    adapter = open_adapter(write_adapter(tmp_path / "a", lora_alpha=0))
    assert adapter.modules["layers.0.q"].scale == 0
    assert "add nothing" in adapter.warnings[0]
    assert not any(part.count_nonzero() for part in adapter.factors("layers.0.q"))


def test_defaults_of_peft_are_a_warning(tmp_path: Path) -> None:
    adapter = open_adapter(write_adapter(tmp_path / "a", drop=("lora_alpha",)))
    assert adapter.modules["layers.0.q"].scale == 4.0
    assert "no lora_alpha" in adapter.warnings[0]


def test_modules_that_peft_would_ignore_are_a_warning(tmp_path: Path) -> None:
    adapter = open_adapter(write_adapter(tmp_path / "a", target_modules=["k"]))
    assert "PEFT would ignore" in adapter.warnings[0]


def test_fields_that_do_not_matter_are_accepted(tmp_path: Path) -> None:
    fields = {
        "auto_mapping": {"base_model_class": "X", "parent_library": "os"},
        "megatron_core": "os",
        "eva_config": {"rho": 2},
        "lora_dropout": 0.1,
        "inference_mode": True,
        "runtime_config": {"a": 1},
        "init_lora_weights": "gaussian",
        "use_dora": False,
        "qalora_group_size": 16,
        "a_field_of_the_future": None,
        "another": False,
        "layers_to_transform": [0],
        "layers_pattern": "layers",
        "exclude_modules": ["k"],
        "revision": "main",
    }
    adapter = open_adapter(write_adapter(tmp_path / "a", **fields))
    assert adapter.warnings == ()
    assert (adapter.base_model, adapter.base_revision) == ("example/base", "main")


def test_patterns_rule_the_rank_and_scale_of_a_module(tmp_path: Path) -> None:
    shapes = {
        **PAIR,
        f"{PREFIX}layers.1.q.lora_A.weight": (5, 3),
        f"{PREFIX}layers.1.q.lora_B.weight": (4, 5),
    }
    fields = {"rank_pattern": {"layers.1.q": 5}, "alpha_pattern": {"layers.1.*": 10}}
    modules = open_adapter(write_adapter(tmp_path / "a", shapes, **fields)).modules
    assert [(m.rank, m.scale) for m in modules.values()] == [(2, 2.0), (5, 2.0)]


@pytest.mark.parametrize(
    ("shape_A", "shape_B", "tails", "expected"),
    [
        ((2, 3), (4, 2), ("lora_A.weight", "lora_B.weight"), ("linear", 4, 3, (4, 3))),
        ((2, 9), (4, 2), ("lora_embedding_A", "lora_embedding_B"), ("embedding", 4, 9, (9, 4))),
        ((2, 3, 3, 5), (4, 2, 1, 1), ("lora_A.weight", "lora_B.weight"), ("conv2d", 4, 45, (4, 3, 3, 5))),
        ((2, 3, 1, 1), (4, 2, 1, 1), ("lora_A.weight", "lora_B.weight"), ("conv2d", 4, 3, (4, 3, 1, 1))),
    ],
)
def test_kinds_of_layers(
    shape_A: tuple[int, ...],
    shape_B: tuple[int, ...],
    tails: tuple[str, str],
    expected: tuple[str, int, int, tuple[int, ...]],
    tmp_path: Path,
) -> None:
    shapes = {f"{PREFIX}x.{tails[0]}": shape_A, f"{PREFIX}x.{tails[1]}": shape_B}
    adapter = open_adapter(write_adapter(tmp_path / "a", shapes, target_modules=["x"]))
    module = adapter.modules["x"]
    assert (module.kind, module.m, module.n, module.weight_shape) == expected
    left, right = adapter.factors("x")
    assert (left.shape, right.shape) == ((module.m, 2), (2, module.n))


def test_full_tensors_need_an_explanation_in_the_configuration(tmp_path: Path) -> None:
    shapes = {
        **PAIR,
        f"{PREFIX}classifier.weight": (2, 3),
        f"{PREFIX}classifier.dense.bias": (2,),
        f"{PREFIX}model.embed_tokens.weight": (5, 3),
    }
    saved = open_adapter(write_adapter(tmp_path / "a", shapes, modules_to_save=["classifier"]))
    assert list(saved.full_tensors) == [
        "classifier.dense.bias",
        "classifier.weight",
        "model.embed_tokens.weight",
    ]
    assert open_adapter(write_adapter(tmp_path / "b", shapes, task_type="SEQ_CLS")).full_tensors
    with pytest.raises(InputError) as caught:
        open_adapter(write_adapter(tmp_path / "c", shapes, task_type="CAUSAL_LM"))
    assert caught.value.code == "unknown_tensor"
    assert "classifier" in caught.value.message


def test_bias_setting_without_bias_tensors_is_harmless(tmp_path: Path) -> None:
    assert open_adapter(write_adapter(tmp_path / "a", bias="all")).modules


def test_an_unknown_family_is_named_as_such(tmp_path: Path) -> None:
    kohya = {"lora_unet_a.lora_down.weight": (2, 3), "lora_unet_a.lora_up.weight": (4, 2)}
    folder = write_adapter(tmp_path / "a", kohya)  # with a configuration, so it claims to be PEFT's
    with pytest.raises(InputError) as caught:
        open_adapter(folder)
    assert caught.value.code == "unknown_format"
    assert "lora_unet_a" in caught.value.message


def test_the_smallest_configuration(tmp_path: Path) -> None:
    keep = {"peft_type", "r", "lora_alpha"}
    adapter = open_adapter(write_adapter(tmp_path / "a", drop=tuple(set(CONFIG) - keep)))
    assert (adapter.base_model, adapter.base_revision, adapter.warnings) == (None, None, ())


@settings(max_examples=300, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_bytes_never_escape_as_another_error(
    changes: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = write_adapter(tmp_path_factory.mktemp("damaged"), {**PAIR, f"{PREFIX}head.weight": (2,)})
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    data = bytearray(config.read_bytes() + weights.read_bytes())
    size = config.stat().st_size
    for place, byte in changes:
        data[place % (len(data) - 64)] = byte  # the last bytes are numbers, where any byte is allowed
    config.write_bytes(data[:size])
    weights.write_bytes(data[size:])
    try:
        adapter = open_adapter(folder)
    except InputError as error:
        json.dumps(error.to_dict(), ensure_ascii=False).encode()
        return
    for name, module in adapter.modules.items():
        left, right = adapter.factors(name)
        assert (left.shape, right.shape) == ((module.m, module.rank), (module.rank, module.n))
