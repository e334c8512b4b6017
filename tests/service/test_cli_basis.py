"""``merganser recover`` and ``extend`` on the basis of a real merge of the example adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

import merging
from service import cli


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    adapters = request.getfixturevalue("examples_dir") / "adapters"
    out = tmp_path_factory.mktemp("rmm") / "out"
    models = [{"model": str(adapters / name)} for name in ("icd", "langid", "supersense")]
    merging.merge({"merge_method": "rmm", "models": models}, out)
    return out


def products(folder: Path) -> dict[str, object]:
    with merging.load_adapter(folder) as adapter:
        return {name: adapter.factors(name) for name in adapter.modules}


def test_a_recovered_task_is_the_adapter_the_merge_wrote(
    merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["recover", str(merged / "basis.safetensors"), "icd", "--out", str(tmp_path / "icd")]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "icd")
    name = "adapter_model.safetensors"
    ours, theirs = load_file(str(tmp_path / "icd" / name)), load_file(str(merged / "icd" / name))
    key_A = next(key for key in ours if "lora_A" in key)
    key_B = key_A.replace("lora_A", "lora_B")
    recovered = ours[key_B].double() @ ours[key_A].double()
    written = theirs[key_B].double() @ theirs[key_A].double()
    assert (recovered - written).norm() <= 2e-2 * written.norm()  # both are stored in float16


def test_an_unknown_task_is_one_line_and_status_two(
    merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["recover", str(merged / "basis.safetensors"), "nobody", "--out", str(tmp_path / "x")]
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_an_added_task_can_be_recovered(
    merged: Path, tmp_path: Path, examples_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = str(examples_dir / "adapters" / "biblegenre")
    basis = str(merged / "basis.safetensors")
    assert cli.main(["extend", basis, more, "--out", str(tmp_path / "larger")]) == 0
    told = capsys.readouterr().err
    assert "biblegenre" in told
    assert "does not span this adapter" in told
    larger = str(tmp_path / "larger" / "basis.safetensors")
    assert cli.main(["recover", larger, "biblegenre", "--out", str(tmp_path / "again")]) == 0
    assert sorted(products(tmp_path / "again")) == sorted(products(Path(more)))
