"""Run the adaptation of AdaRank on a base model: checkpoints, progress, and a watch for collapse."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from merging.calibration.adapting import Adaptation, State, entropy
from merging.calibration.classifier import EncoderClassifier
from merging.catalog.data import AdarankParams
from merging.errors import MergeError
from merging.formats.guard import check_safetensors
from merging.formats.tensors import TensorFile
from merging.formats.writer import TensorSpec, write_safetensors
from merging.methods.adarank import Components

if TYPE_CHECKING:
    from merging.calibration.plane import Calibration, Steps

WATCHED = 128
"""Samples per task whose predictions are looked at before and after."""

COLLAPSED = 0.7
"""A task has collapsed when it uses less than this fraction of the classes it used at the start."""

KEY = "merganser.checkpoint"
_TENSORS = ("z", "lam", "first_z", "second_z", "first_lam", "second_lam")

Warn = Callable[[str, str], None]


def adapt(
    calibration: Calibration,
    components: Sequence[Components],
    params: AdarankParams,
    seed: int,
    warn: Warn,
    steps: Steps,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What each component is multiplied by, per module, and what the report tells of the run."""
    prepared, device = calibration.prepared, calibration.device
    here = [part.to(device, torch.float32) for part in components]
    classifier = EncoderClassifier(calibration.inputs, prepared.labels, here, seed, params.batch_size, device)
    checkpoint = Checkpoint(calibration.checkpoint, _identity(calibration, components))
    state, before = checkpoint.load(warn)
    run = Adaptation(here, params, classifier, state)
    if before is None:
        before = look(classifier, run)
    steps_done = run.state.step
    for _ in range(steps_done):
        steps.tick("adapt", f"step {steps_done} of {params.steps}, from the checkpoint")
    while run.state.step < params.steps and not run.settled():
        run.advance()
        if run.state.step % params.checkpoint_every == 0:
            checkpoint.save(run.state, before)
        steps.tick("adapt", f"step {run.state.step} of {params.steps}, entropy {_mean(run.state):.4f}")
    after = look(classifier, run)
    _warn_of_collapse(before, after, prepared.labels, warn)
    return run.factors(), _facts(run, params, before, after, prepared.labels)


def look(classifier: EncoderClassifier, run: Adaptation) -> list[dict[str, float]]:
    """How each task is predicted now: the mean entropy, and how many classes are in use."""
    cores = run.cores()
    found = []
    for task in range(run.tasks):
        logits = classifier.predictions(task, WATCHED, cores).double().cpu()
        counts = torch.bincount(logits.argmax(-1), minlength=logits.shape[-1]).double()
        shares = counts / counts.sum()
        spread = -(shares * shares.clamp_min(1e-300).log()).sum()
        found.append(
            {
                "entropy": float(entropy(logits).mean()),
                "classes": logits.shape[-1],
                "classes_in_use": math.exp(float(spread)),
                "largest_class": float(shares.max()),
            }
        )
    return found


class Checkpoint:
    """The state of a run in a file; ``identity`` says of which run. Without a path it keeps nothing."""

    def __init__(self, path: Path | None, identity: str) -> None:
        self._path = path
        self._identity = identity

    def load(self, warn: Warn) -> tuple[State | None, list[dict[str, float]] | None]:
        """The state and the first look of an earlier attempt at the same run, if there is one."""
        if self._path is None or not self._path.is_file():
            return None, None
        try:
            header = check_safetensors(self._path)
            kept = json.loads(header.metadata.get(KEY, "{}"))
            if kept.get("identity") != self._identity:
                warn("checkpoint_ignored", "the checkpoint is of another merge; the adaptation starts anew")
                return None, None
            file = TensorFile(self._path, header)
            z, lam, *moments = (file.tensor(name) for name in _TENSORS)
            file.close()
            state = State(z, lam, moments, kept["step"], kept["losses"], kept["entropies"])
        except (MergeError, KeyError, ValueError, TypeError):
            warn("checkpoint_ignored", "the checkpoint cannot be read; the adaptation starts anew")
            return None, None
        return state, kept["before"]

    def save(self, state: State, before: list[dict[str, float]]) -> None:
        """Replace the file by the state, in one step."""
        if self._path is None:
            return
        tensors = dict(zip(_TENSORS, (state.z, state.lam, *state.moments), strict=True))
        specs = [TensorSpec(name, "F64", tuple(tensor.shape)) for name, tensor in tensors.items()]
        kept = {
            "identity": self._identity,
            "step": state.step,
            "losses": state.losses,
            "entropies": state.entropies,
            "before": before,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_name(f"{self._path.name}.part")
        with suppress(FileNotFoundError):
            part.unlink()
        write_safetensors(part, specs, tensors.values(), {KEY: json.dumps(kept)})
        os.replace(part, self._path)


def _identity(calibration: Calibration, components: Sequence[Components]) -> str:
    """What a run depends on: a checkpoint of another run must not be taken for its own."""
    prepared, inputs = calibration.prepared, calibration.inputs
    assert inputs.base is not None
    digests = {
        label: adapter.digest for label, adapter in zip(prepared.labels, prepared.adapters, strict=True)
    }
    told = {
        "recipe": prepared.recipe.digest({**inputs.digests, **digests}),
        "base": inputs.base.digest,
        "heads": [head.digest for head in inputs.heads if head is not None],
        "sizes": [[part.name, len(part.S)] for part in components],
        "device": calibration.device.type,
        "torch": str(torch.__version__),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _mean(state: State) -> float:
    return sum(state.entropies[-1]) / len(state.entropies[-1])


def _warn_of_collapse(
    before: Sequence[Mapping[str, float]],
    after: Sequence[Mapping[str, float]],
    labels: Sequence[str],
    warn: Warn,
) -> None:
    for label, then, now in zip(labels, before, after, strict=True):
        if now["classes_in_use"] < COLLAPSED * then["classes_in_use"]:
            warn(
                "predictions_collapsed",
                f"the predictions for {label} fell from {then['classes_in_use']:.1f} classes in use to "
                f"{now['classes_in_use']:.1f}: lower entropy is not better accuracy here. Set "
                "`diversity: 1`, or use fewer steps.",
            )


def _facts(
    run: Adaptation,
    params: AdarankParams,
    before: Sequence[Mapping[str, float]],
    after: Sequence[Mapping[str, float]],
    labels: Sequence[str],
) -> dict[str, Any]:
    """For the report: the course of the entropy, what is kept, and the predictions before and after."""
    factors = run.factors()
    entropies = run.state.entropies
    modules: dict[str, Any] = {
        part.name: {
            "components": len(part.S),
            "kept": [
                int(((part.task.cpu() == t) & (factors[part.name] != 0)).sum()) for t in range(run.tasks)
            ],
            "lambda": run.state.lam[index].tolist(),
        }
        for index, part in enumerate(run.components)
    }
    return {
        "steps": run.state.step,
        "stopped_early": run.state.step < params.steps,
        "kept": sum(sum(module["kept"]) for module in modules.values()),
        "components": sum(len(part.S) for part in run.components),
        "entropy": [round(sum(row) / len(row), 6) for row in entropies],
        "tasks": [
            {"model": label, "before": dict(then), "after": dict(now)}
            for label, then, now in zip(labels, before, after, strict=True)
        ],
        "modules": modules,
    }
