"""A killed merge of whole models goes on where it was: the same bytes, no finished shard made twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import base_tensors, read_all, recipe, tuned, write_checkpoint

import merging
from merging import Recipe
from merging.dense import spectral
from merging.dense.plan import prepare_dense
from merging.dense.resume import JOURNAL, SETTLED, Attempt, attempt_key
from merging.dense.runner import DenseRunner
from merging.errors import Cancelled, InputError, MergeFailure
from merging.formats.result_dir import lock_folder
from merging.preparing import local_path
from tests.running import alive

HERE = Path(__file__).parent
SHARD_BYTES = 700
PAUSE = 0.004
"""So long a child pauses after each tensor, in seconds."""


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    base = base_tensors()
    models = [write_checkpoint(tmp_path / f"m{i}", tuned(base, i + 1)) for i in range(2)]
    return recipe(write_checkpoint(tmp_path / "base", base), models, "dare_ties", seed=4)


class Warm:
    """A process that starts merges in children."""

    def __init__(self, folder: Path) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[2])}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "forking_child.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=folder,
        )  # fmt: skip

    def start(self, recipe_path: Path, out: Path, log: Path) -> int:
        assert self.process.stdin is not None
        log.write_bytes(b"")
        self.process.stdin.write(f"{recipe_path} {out} {log}\n")
        self.process.stdin.flush()
        return self._number()

    def wait(self) -> int:
        return self._number()

    def _number(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def warm(tmp_path: Path) -> Iterator[Warm]:
    one = Warm(tmp_path)
    yield one
    one.close()


def kill_and_rerun(warm: Warm, tmp_path: Path, data: dict[str, Any], times: int, seed: int) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(data))
    warm.start(path, tmp_path / "whole", tmp_path / "log")
    assert warm.wait() == 0
    expected = contents(tmp_path / "whole")
    total = (tmp_path / "log").stat().st_size
    with prepare_dense(Recipe.load(data), resolve=local_path, shard_bytes=SHARD_BYTES) as plan:
        largest = max(len(shard.jobs) for shard in plan.shards)
        assert len(plan.shards) > 5
    moments = random.Random(seed)
    landed = 0
    for trial in range(times):
        out = tmp_path / f"out-{trial}"
        pid = warm.start(path, out, tmp_path / "first")
        into(pid, tmp_path / "first", moments.uniform(0.0, total))
        with suppress(ProcessLookupError):  # it was faster this time
            os.kill(pid, signal.SIGKILL)
        landed += warm.wait() != 0
        warm.start(path, out, tmp_path / "second")
        assert warm.wait() == 0
        assert contents(out) == expected
        made = (tmp_path / "first").stat().st_size + (tmp_path / "second").stat().st_size
        whole = 0 if (tmp_path / "first").stat().st_size < total else total
        assert made <= total + max(largest, whole)
        assert leftovers(tmp_path) == []
    assert landed > times // 2


def into(pid: int, log: Path, moment: float) -> None:
    """Return in the middle of a merge: after so many tensors, and a part of the pause that follows each."""
    while log.stat().st_size < int(moment) and alive(pid):
        time.sleep(0.0005)
    time.sleep(PAUSE * (moment % 1))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_killed_at_random_moments(warm: Warm, tmp_path: Path, data: dict[str, Any]) -> None:
    kill_and_rerun(warm, tmp_path, data, times=5, seed=1)


@pytest.mark.slow
def test_killed_at_random_moments_twenty_times(warm: Warm, tmp_path: Path, data: dict[str, Any]) -> None:
    kill_and_rerun(warm, tmp_path, data, times=20, seed=2)


class Stop(BaseException):
    """What no code of ours catches, like the end of the process."""


def interrupted(data: dict[str, Any], out: Path, after: int, error: type[BaseException] = Stop) -> Path:
    """A merge that stops after some tensors; its attempt."""

    def tick(progress: Any) -> None:
        if progress.phase == "merge" and progress.done >= after:
            raise error

    with pytest.raises(error):
        merging.merge(data, out, device="cpu", threads=1, progress=tick, shard_bytes=SHARD_BYTES)
    assert not out.exists()
    found = [path for path in out.parent.iterdir() if path.name.startswith(f".{out.name}.attempt-")]
    return found[0] if found else Path()


def finish(data: dict[str, Any], out: Path) -> tuple[dict[str, bytes], int]:
    """The finished merge and the number of tensors that were made for it."""
    made = 0

    def tick(progress: Any) -> None:
        nonlocal made
        made += progress.phase == "merge"

    merging.merge(data, out, device="cpu", threads=1, progress=tick, shard_bytes=SHARD_BYTES)
    assert leftovers(out.parent) == []
    return contents(out), made


def test_finished_shards_are_taken_over(tmp_path: Path, data: dict[str, Any]) -> None:
    whole, total = finish(data, tmp_path / "whole")
    attempt = interrupted(data, tmp_path / "out", after=total - 2)
    done = len((attempt / JOURNAL).read_bytes().splitlines())
    assert done > 5
    again, made = finish(data, tmp_path / "out")
    assert again == whole
    assert 0 < made < total / 2


SETTLING = {
    "lambda": {"parameters": {"lambda": "auto"}},
    "thresholds": {"merge_method": "ties", "parameters": {"trim_scope": "global", "density": 0.3}},
    "all of them": {
        "merge_method": "ties",
        "parameters": {
            "trim_scope": "global", "density": 0.3, "compat": "paper", "lambda": "auto",
            "majority_sign_method": "normmass",
        },
        "prepare": {"equalize_norms": True},
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", SETTLING)
def test_passes_over_the_whole_model_are_not_made_again(
    tmp_path: Path, data: dict[str, Any], kind: str
) -> None:
    data = {**data, **SETTLING[kind]}
    whole, _ = finish(data, tmp_path / "whole")
    attempt = interrupted(data, tmp_path / "out", after=0)
    assert (attempt / SETTLED).exists()
    phases: list[str] = []
    merging.merge(
        *(data, tmp_path / "out"),
        device="cpu", threads=1, shard_bytes=SHARD_BYTES, progress=lambda at: phases.append(at.phase),
    )  # fmt: skip
    assert set(phases) == {"prepare", "merge", "publish"}
    assert contents(tmp_path / "out") == whole


def test_settled_findings_that_were_cut_short_are_found_again(tmp_path: Path, data: dict[str, Any]) -> None:
    data = {**data, **SETTLING["thresholds"]}
    whole, _ = finish(data, tmp_path / "whole")
    attempt = interrupted(data, tmp_path / "out", after=0)
    (attempt / SETTLED).write_bytes((attempt / SETTLED).read_bytes()[:-9])
    assert finish(data, tmp_path / "out")[0] == whole


@pytest.mark.parametrize("output", ["checkpoint", "lora"])
def test_killed_just_before_the_result_appears_nothing_is_made_again(
    tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    more = {"rank": 3} if output == "lora" else {}
    data = {**data, "output": {"format": output, **more}, "modules_to_save": "drop"}
    whole, _ = finish(data, tmp_path / "whole")

    def killed(attempt: Attempt) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "_ready", killed)
        with pytest.raises(Stop):
            finish(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found, made = finish(data, tmp_path / "out")
    assert (found, made) == (whole, 0)


def test_a_warning_of_the_passes_is_in_the_report(
    tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spectral, "EXACT_NUMEL", 1)
    data = {**data, "merge_method": "tsv", "parameters": {"lambda": "auto"}}
    result = merging.merge(data, tmp_path / "out", device="cpu", threads=1)
    assert "spectrum_cut" in [entry["code"] for entry in result.report["warnings"]]


@pytest.mark.parametrize("damage", ["journal", "zeros", "shard", "gone", "junk"])
def test_what_is_not_intact_is_made_again(tmp_path: Path, data: dict[str, Any], damage: str) -> None:
    whole, total = finish(data, tmp_path / "whole")
    attempt = interrupted(data, tmp_path / "out", after=total - 2)
    shard = sorted(attempt.glob("model-*.safetensors"))[1]
    if damage == "journal":
        lines = (attempt / JOURNAL).read_bytes()
        (attempt / JOURNAL).write_bytes(lines[:-10])  # cut short
    elif damage == "zeros":
        lines = (attempt / JOURNAL).read_bytes().splitlines(keepends=True)
        (attempt / JOURNAL).write_bytes(lines[0] + bytes(40) + b"\n" + b"".join(lines[1:]))
    elif damage == "shard":
        shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    elif damage == "gone":
        shard.unlink()
    else:
        (attempt / "model-00099-of-00099.safetensors.part").write_bytes(b"x")
        (attempt / "folder").mkdir()
    again, _ = finish(data, tmp_path / "out")
    assert again == whole


def test_another_merge_to_the_same_place_starts_anew(tmp_path: Path, data: dict[str, Any]) -> None:
    interrupted(data, tmp_path / "out", after=10)
    other = {**data, "seed": 5}
    found, _ = finish(other, tmp_path / "out")
    expected, _ = finish(other, tmp_path / "expected")
    assert found == expected


def test_changed_inputs_are_another_merge(tmp_path: Path, data: dict[str, Any]) -> None:
    interrupted(data, tmp_path / "out", after=10)
    write_checkpoint(tmp_path / "m0", tuned(base_tensors(), 77))
    found, _ = finish(data, tmp_path / "out")
    expected, _ = finish(data, tmp_path / "expected")
    assert found == expected


@pytest.mark.parametrize("error", [Cancelled, KeyboardInterrupt])
def test_a_cancelled_merge_leaves_nothing_an_interrupted_one_its_shards(
    tmp_path: Path, data: dict[str, Any], error: type[BaseException]
) -> None:
    attempt = interrupted(data, tmp_path / "out", after=10, error=error)
    assert attempt.name.startswith(".") == (error is KeyboardInterrupt)


def test_two_processes_do_not_write_one_result(tmp_path: Path, data: dict[str, Any]) -> None:
    attempt = interrupted(data, tmp_path / "out", after=10)
    handle = lock_folder(attempt)
    assert handle is not None
    try:
        with pytest.raises(MergeFailure) as caught:
            finish(data, tmp_path / "out")
        assert caught.value.code == "merge_in_progress"
    finally:
        os.close(handle)
    assert finish(data, tmp_path / "out")[0]


def test_an_existing_result_is_refused_before_any_work(tmp_path: Path, data: dict[str, Any]) -> None:
    finish(data, tmp_path / "out")
    with pytest.raises(InputError) as caught:
        merging.merge(data, tmp_path / "out", device="cpu")
    assert caught.value.code == "output_exists"
    merging.merge({**data, "seed": 8}, tmp_path / "out", device="cpu", overwrite=True)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("output", ["checkpoint", "delta", "lora"])
def test_shards_made_apart_are_one_result(tmp_path: Path, data: dict[str, Any], output: str) -> None:
    from merging.dense.finish import finalise
    from merging.dense.plan import shards
    from merging.dense.runner import ShardResult, merge_shard

    more = {"rank": 3} if output == "lora" else {}
    data = {**data, "output": {"format": output, **more}, "modules_to_save": "drop"}
    expected, _ = finish(data, tmp_path / "expected")
    parts, keys = [], []
    (tmp_path / "out").mkdir()
    with prepare_dense(Recipe.load(data), resolve=local_path, shard_bytes=SHARD_BYTES) as plan:
        count = len(shards(plan))
        sums = {model.label: model.digest for model in plan.models}
        assert plan.base is not None
        sums[plan.base.label] = plan.base.digest
    for index in reversed(range(count)):  # each as a process of its own would, without hashing the inputs
        with prepare_dense(Recipe.load(data), resolve=local_path, shard_bytes=SHARD_BYTES, sums=sums) as plan:
            keys.append(attempt_key(plan))
            done = merge_shard(plan, index, tmp_path / "out")
            parts.append(ShardResult.of(json.loads(json.dumps(done.to_dict()))))
            assert all("digest" not in model.__dict__ for model in plan.models)
    assert len(set(keys)) == 1
    with prepare_dense(Recipe.load(data), resolve=local_path, shard_bytes=SHARD_BYTES, sums=sums) as plan:
        with pytest.raises(MergeFailure) as caught:
            finalise(plan, parts[1:], tmp_path / "out")
        assert caught.value.code == "shards_incomplete"
        _, files = finalise(plan, parts, tmp_path / "out")
    found = contents(tmp_path / "out")
    assert found == expected
    assert set(files) == set(found)


def test_passes_over_the_whole_model_are_settled_once(tmp_path: Path, data: dict[str, Any]) -> None:
    from merging.dense.runner import merge_shard

    data = {**data, "parameters": {"lambda": "auto"}}
    expected, _ = finish(data, tmp_path / "expected")
    (tmp_path / "out").mkdir()
    with prepare_dense(Recipe.load(data), resolve=local_path, shard_bytes=SHARD_BYTES) as plan:
        settled = DenseRunner(plan).settle()
        for shard in plan.shards:
            merge_shard(plan, shard.index, tmp_path / "out", settled=settled)
    whole, apart = read_all(tmp_path / "expected"), read_all(tmp_path / "out")
    assert all(torch.equal(whole[name], apart[name]) for name in whole | apart)
    assert expected
