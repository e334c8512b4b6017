"""The command line as a user meets it: exit statuses, messages, and what goes to which stream."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from merging.errors import InputError, MergeFailure
from service import cli
from service.cli_errors import run_reporting

LOCAL_COMMANDS = ("merge", "plan", "methods", "inspect")
CLIENT_COMMANDS = ("submit", "push", "pull")
SERVER_COMMANDS = ("up", "serve", "worker")


@pytest.fixture
def recipe(tmp_path: Path, examples_dir: Path) -> Iterator[Path]:
    """A valid recipe over two of the example adapters."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "merge_method: ties\n"
        "space: core\n"
        "models:\n"
        f"  - model: {examples_dir / 'adapters' / 'icd'}\n"
        f"  - model: {examples_dir / 'adapters' / 'langid'}\n"
    )
    return path


def error_line(captured: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr; nothing may be on stdout."""
    out, err = captured.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("merganser: error: ")
    return lines[0]


# help and usage


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in (*LOCAL_COMMANDS, *CLIENT_COMMANDS, *SERVER_COMMANDS):
        assert f"\n    {command} " in text


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "commands:" in capsys.readouterr().out


@pytest.mark.parametrize("command", [*LOCAL_COMMANDS, *CLIENT_COMMANDS, *SERVER_COMMANDS])
def test_every_command_has_its_own_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: merganser {command}")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["merge"],
        ["merge", "recipe.yaml"],
        ["merge", "recipe.yaml", "--out", "x", "--threads", "none"],
        ["merge", "recipe.yaml", "--out", "x", "--threads", "0"],
        ["inspect"],
        ["methods", "--jsn"],
        ["methods", "--js"],
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert error_line(capsys).endswith("[usage]")


def test_help_is_quick() -> None:
    """CPU time of a whole process, so that a busy machine does not matter."""
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "service", "--help"], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime) < 0.5


# how errors end


def raising(error: Exception) -> int:
    def command() -> int:
        raise error

    return run_reporting(command, debug=False)


def test_bad_input_is_status_2_and_carries_code_and_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(InputError("some_code", "the file x is bad", remedy="Mend it.")) == 2
    assert error_line(capsys) == "merganser: error: the file x is bad. Mend it [some_code]"


def test_a_failure_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(MergeFailure("disk_full", "no space left")) == 1
    assert error_line(capsys).endswith("[disk_full]")


def test_a_message_of_several_lines_becomes_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(InputError("some_code", "first\n  second")) == 2
    assert "first second" in error_line(capsys)


def test_an_unforeseen_error_is_status_1_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(KeyError("x")) == 1
    assert error_line(capsys).endswith("[internal_error]")


def test_debug_adds_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(tmp_path / "absent.yaml"), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_closed_pipe_ends_quietly() -> None:
    done = subprocess.run(
        f"{sys.executable} -m service methods --json | true",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stderr == ""


# methods


def test_methods_json_is_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    listed = json.loads(out)
    assert {"linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"} <= {
        entry["name"] for entry in listed
    }
    for entry in listed:
        assert {"name", "title", "summary", "paper", "contract", "parameters", "defaults"} <= entry.keys()
        assert entry["parameters"]["properties"].keys() == entry["defaults"].keys()


def test_one_method_shows_its_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods", "ties"]) == 0
    text = capsys.readouterr().out
    assert "density" in text
    assert "arxiv.org/abs/2306.01708" in text


def test_an_unknown_method_is_bad_input_with_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods", "tiess"]) == 2
    line = error_line(capsys)
    assert "ties" in line
    assert line.endswith("[unknown_method]")


# plan


def test_plan_json_is_pure_json(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(recipe), "--json"]) == 0
    out, _ = capsys.readouterr()
    assert isinstance(json.loads(out), dict)


def test_plan_names_modules_and_the_output_rank(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(recipe)]) == 0
    text = capsys.readouterr().out
    assert "36" in text
    assert "32" in text


def test_plan_refuses_an_unknown_key(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text(recipe.read_text() + "densty: 0.5\n")
    assert cli.main(["plan", str(recipe)]) == 2
    line = error_line(capsys)
    assert "densty" in line
    assert line.endswith("[recipe_unknown_key]")


# inspect


def test_inspect_tells_ranks_modules_and_base(examples_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(examples_dir / "adapters" / "icd")]) == 0
    text = capsys.readouterr().out
    assert "sentence-transformers/all-MiniLM-L6-v2" in text
    assert "1536 x 384" in text


def test_inspect_json_describes_every_module(examples_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(examples_dir / "adapters" / "icd"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["format"] == "peft"
    assert data["ranks"] == [16]
    assert data["scales"] == [1.0]
    assert len(data["modules"]) == 36
    assert data["parameters"] == sum(m["rank"] * (m["m"] + m["n"]) for m in data["modules"])


def test_inspect_of_several_relates_every_pair(
    examples_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("icd", "langid", "supersense")
    assert cli.main(["inspect", *(str(examples_dir / "adapters" / name) for name in names), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [Path(adapter["path"]).name for adapter in data["adapters"]] == list(names)
    cosine = data["comparison"]["summary"]["cosine"]
    assert [cosine[i][i] for i in range(3)] == [1.0, 1.0, 1.0]
    assert cosine[0][1] == cosine[1][0]


def test_inspect_of_several_has_one_line_per_pair(
    examples_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(examples_dir / "adapters" / name) for name in ("icd", "langid", "supersense")]
    assert cli.main(["inspect", *folders]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("MODEL  ") and "COSINE" in line)
    pairs = [tuple(line.split()[:2]) for line in lines[header + 1 : header + 4]]
    assert pairs == [(folders[0], folders[1]), (folders[0], folders[2]), (folders[1], folders[2])]
    assert lines[header + 4] == ""


def test_inspect_refuses_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(tmp_path / "absent")]) == 2
    assert error_line(capsys).endswith("[adapter_not_found]")


# merge


def test_merge_writes_the_directory_and_prints_its_path_only(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out_dir = tmp_path / "merged"
    assert cli.main(["merge", str(recipe), "--out", str(out_dir)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{out_dir}\n"
    assert "merged in" in err
    names = {path.name for path in out_dir.iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "merge.yaml",
        "report.json",
    } <= names


def test_merge_refuses_an_existing_result(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out_dir = tmp_path / "merged"
    out_dir.mkdir()
    (out_dir / "precious").write_text("keep me")
    assert cli.main(["merge", str(recipe), "--out", str(out_dir), "--quiet"]) == 2
    assert error_line(capsys).endswith("[output_exists]")
    assert (out_dir / "precious").read_text() == "keep me"


def test_bad_input_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("merge_method: ties\nmodels: []\n")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "service", "merge", str(bad), "--out", "x"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "torch" not in imported
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.yaml"]
