"""A frozen base with merged updates and the tasks' frozen heads: logits of unlabeled samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from merging.calibration.base import Base, Kind, first_pass
from merging.calibration.heads import Head
from merging.calibration.inputs import Inputs
from merging.calibration.samples import Samples, draw, encode, load_tokenizer
from merging.calibration.settings import HeadSettings
from merging.errors import InputError
from merging.methods.adarank import Components
from merging.rules import task_generator


class TaskHead:
    """The frozen head of one task on the base model: separate weights, or the adapter's own tensors."""

    def __init__(self, head: Head, settings: HeadSettings, base: Base, label: str) -> None:
        self.label = label
        self.settings = settings
        self._base = base
        self.replaced: dict[str, Tensor] = {}
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if head.file is not None:
            weight, bias = head.linear()
            self.weight = weight.to(base.device)
            self.bias = None if bias is None else bias.to(base.device)
            return
        for name, tensor in head.tensors().items():
            own = base.own_name(name)
            if own is None:
                raise InputError(
                    "head_not_in_base",
                    f"{label} brings {name}, which a classifier of the base model does not have",
                    remedy="Give a head file for the model.",
                    where={"model": label, "field": "head"},
                )
            self.replaced[own] = tensor.to(base.device)

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """``(batch, classes)`` in float32."""
        output = self._base.run(batch, self.replaced)
        if self.weight is None:
            found: Tensor = output.logits
            return found
        features = pooled(output, batch.get("attention_mask"), self.settings)
        return linear(self.settings.scale * features, self.weight, self.bias)


def pooled(output: Any, mask: Tensor | None, settings: HeadSettings) -> Tensor:
    """One feature vector per sample, ``(batch, d)``."""
    if settings.pooling == "pooler":
        features: Tensor = output.pooler_output
    else:
        hidden: Tensor = output.last_hidden_state
        hidden = hidden.flatten(2).mT if hidden.ndim == 4 else hidden  # feature maps of images
        if settings.pooling in ("first", "last"):
            place = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
            last = settings.pooling == "last"
            if mask is not None:  # padding may stand on either side
                place = place.masked_fill(mask.to(hidden.device) == 0, -1 if last else hidden.shape[1])
            chosen = place.max(1).values if last else place.min(1).values
            features = hidden[torch.arange(len(hidden), device=hidden.device), chosen]
        elif mask is None:
            features = hidden.mean(1)
        else:
            weight = mask.to(hidden).unsqueeze(-1)
            features = (hidden * weight).sum(1) / weight.sum(1).clamp_min(1.0)
    return normalize(features, dim=-1) if settings.normalize else features


class EncoderClassifier:
    """The classifier of a merge: its samples, base and heads; the merged updates act by hooks."""

    def __init__(
        self, inputs: Inputs, labels: Sequence[str], components: Sequence[Components], seed: int,
        batch_size: int, device: torch.device,
    ) -> None:  # fmt: skip
        assert inputs.base is not None
        self.seed = seed
        self.batch_size = batch_size
        sizes = {part.name: (part.U.shape[0], part.V.shape[1]) for part in components}
        self.base = Base(inputs.base, sizes, device, _kind(inputs))
        if inputs.settings.head.pooling == "pooler" and any("pooler" in key for key in self.base.missing):
            raise InputError(
                "base_model_incomplete",
                f"base model {inputs.base.folder.name} has no pooler",
                remedy="Choose another calibration.head.pooling.",
                where={"field": "calibration.head.pooling"},
            )
        tokenizer = None if inputs.tokenizer is None else load_tokenizer(inputs.tokenizer, self.base)
        self.samples: list[Samples] = []
        self.heads: list[TaskHead] = []
        self._digests = []
        for task, label in enumerate(labels):
            dataset, head = inputs.datasets[task], inputs.heads[task]
            assert dataset is not None
            assert head is not None
            chosen = draw(dataset, inputs.samples(task), seed)
            self.samples.append(
                encode(label, dataset, chosen, tokenizer, self.base, inputs.settings.max_length)
            )
            self.heads.append(TaskHead(head, inputs.settings.head, self.base, label))
            self._check_own(self.heads[-1])
            self._digests.append(dataset.digest)
        self._frames = {part.name: (part.U, part.V) for part in components}
        self._check()

    def logits(self, task: int, step: int, cores: dict[str, Tensor]) -> Tensor:
        """Logits of the batch that ``task`` shows at ``step``."""
        return self._logits(task, self.indices(task, step), cores)

    def predictions(self, task: int, count: int, cores: dict[str, Tensor]) -> Tensor:
        """Logits of the first ``count`` samples of a task, without a gradient."""
        total = min(count, len(self.samples[task]))
        with torch.no_grad():
            parts = [
                self._logits(task, range(start, min(start + self.batch_size, total)), cores)
                for start in range(0, total, self.batch_size)
            ]
        return torch.cat(parts)

    def indices(self, task: int, step: int) -> list[int]:
        """The samples of one batch: every epoch in a new order, which depends on nothing but the seed."""
        count = len(self.samples[task])
        size = min(self.batch_size, count)
        per_epoch = count // size
        epoch, place = divmod(step, per_epoch)
        generator = task_generator(self.seed, self._digests[task], f"epoch {epoch}")
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        return order[place * size : (place + 1) * size]

    def _logits(self, task: int, indices: Sequence[int], cores: dict[str, Tensor]) -> Tensor:
        def update(name: str, x: Tensor, y: Tensor) -> Tensor:
            U, V = self._frames[name]
            return y + ((x @ V.mT) @ cores[name].mT) @ U.mT

        batch = self.samples[task].batch(indices)
        with self.base.hooked(update):
            return self.heads[task].logits(batch)

    def _check_own(self, head: TaskHead) -> None:
        """Whatever the logits pass through is of the base model or of the adapter, and not drawn anew."""
        if head.weight is not None:
            return
        drawn = [key for key in self.base.missing if key not in head.replaced and "position_ids" not in key]
        if drawn:
            raise InputError(
                "head_incomplete",
                f"{head.label} brings no {drawn[0]}, and base model {self.base.files.folder.name} has none",
                remedy="Train with it in modules_to_save, or give a head file and calibration.head.pooling.",
                where={"model": head.label, "field": "head"},
            )

    def _check(self) -> None:
        """One batch of every task through the base alone: heads fit, and all is finite."""
        for task, head in enumerate(self.heads):
            size = min(self.batch_size, len(self.samples[task]))
            batch = self.samples[task].batch(range(size))
            with torch.no_grad():
                with first_pass(head.label):
                    self.base.run(batch)
                try:
                    logits = head.logits(batch)
                except RuntimeError as error:
                    problem = " ".join(str(error).split())[:200]
                    raise InputError(
                        "head_shape_mismatch",
                        f"the head of {head.label} does not fit the base model: {problem}",
                        where={"model": head.label, "field": "head"},
                    ) from error
            if logits.ndim != 2 or not bool(torch.isfinite(logits).all()):
                raise InputError(
                    "activations_not_finite",
                    f"the predictions for {head.label} are NaN or infinite on its samples",
                    where={"model": head.label},
                )


def _kind(inputs: Inputs) -> Kind:
    if all(head is not None and head.file is not None for head in inputs.heads):
        return "body"
    images = any(dataset is not None and dataset.is_images for dataset in inputs.datasets)
    return "image_classifier" if images else "text_classifier"
