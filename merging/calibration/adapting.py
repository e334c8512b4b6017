"""Entropy minimisation over masks and coefficients: the optimisation of AdaRank, on any frozen classifier.

The classifier is a function of a task, a step and the merged cores; it returns logits. All numbers that are
learned stand in two flat tensors, so that the state of a run is a handful of tensors, whatever the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from merging.catalog.data import AdarankParams
from merging.errors import MergeFailure
from merging.methods.adarank import Components, kept

PATIENCE_WINDOW = 10
"""Steps over which the entropy is averaged before early stopping looks at it."""


class Classifier(Protocol):
    """Frozen base, frozen heads. ``cores[name]`` is the merged core of a module."""

    def logits(self, task: int, step: int, cores: dict[str, Tensor]) -> Tensor:
        """``(batch, classes)`` of the samples that ``task`` shows at ``step``."""
        ...


@dataclass
class State:
    """All that a run needs to go on: a copy of it is a checkpoint.

    ``z`` are the mask logits of all modules end to end, ``lam (modules, T)`` the coefficients; ``moments``
    are those of Adam for both; ``losses`` and ``entropies (step, T)`` tell the past.
    """

    z: Tensor
    lam: Tensor
    moments: list[Tensor]
    step: int = 0
    losses: list[float] = field(default_factory=list)
    entropies: list[list[float]] = field(default_factory=list)


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy (nats) of the softmax of each row, ``(batch,)``."""
    logs = torch.log_softmax(logits, dim=-1)
    return -(logs.exp() * logs).sum(-1)


def mean_entropy(logits: Tensor) -> Tensor:
    """Entropy of the mean prediction of the batch: large when all classes occur."""
    logs = torch.log_softmax(logits, dim=-1)
    mean = torch.logsumexp(logs, dim=0) - math.log(len(logits))
    return -(mean.exp() * mean).sum()


class Adaptation:
    """A run of the optimisation. :meth:`advance` makes one step; :meth:`factors` are the answer so far."""

    def __init__(
        self,
        components: Sequence[Components],
        params: AdarankParams,
        classifier: Classifier,
        state: State | None = None,
    ) -> None:
        self.components = list(components)
        self.params = params
        self.classifier = classifier
        self._sizes = [len(part.S) for part in self.components]
        self.tasks = len(self.components[0].prior)
        self.state = state or self.start()

    def start(self) -> State:
        """The state before the first step."""
        z = torch.cat([part.start for part in self.components])
        lam = torch.stack([part.prior for part in self.components])
        return State(z, lam, [torch.zeros_like(x) for x in (z, z, lam, lam)])

    def advance(self) -> float:
        """One step of Adam on the loss of one batch of every task; the loss before the step."""
        state = self.state
        z = state.z.clone().requires_grad_()
        lam = state.lam.clone().requires_grad_(self.params.learn_lambda)
        cores = self._cores(z, lam)
        # The cores are leaves for the tasks: their graphs are freed one by one, and the gradients add up.
        leaves = {name: core.detach().requires_grad_() for name, core in cores.items()}
        total = 0.0
        entropies = []
        for task in range(self.tasks):
            logits = self.classifier.logits(task, state.step, leaves)
            loss = own = entropy(logits).mean()
            if self.params.diversity > 0.0:
                loss = own - self.params.diversity * mean_entropy(logits)
            self._check(loss, task)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            entropies.append(float(own.detach()))
        gradients = [leaves[name].grad for name in cores]
        torch.autograd.backward(list(cores.values()), gradients)
        state.step += 1
        state.losses.append(total)
        state.entropies.append(entropies)
        assert z.grad is not None
        self._adam(state.z, z.grad, state.moments[0], state.moments[1], self.params.lr)
        if self.params.learn_lambda:
            assert lam.grad is not None
            rate = self.params.lr if self.params.lambda_lr is None else self.params.lambda_lr
            self._adam(state.lam, lam.grad, state.moments[2], state.moments[3], rate)
        return total

    def cores(self) -> dict[str, Tensor]:
        """The merged core of every module as it is now, without a gradient."""
        with torch.no_grad():
            return self._cores(self.state.z, self.state.lam)

    def factors(self) -> dict[str, Tensor]:
        """What each component of each module is multiplied by: its coefficient, or zero."""
        with torch.no_grad():
            parts = zip(self.components, self._factors(self.state.z, self.state.lam), strict=True)
            return {part.name: factors for part, factors in parts}

    def settled(self) -> bool:
        """Whether the entropy has not fallen for ``patience`` steps."""
        patience = self.params.patience
        total = [sum(row) for row in self.state.entropies]
        if patience == 0 or len(total) < patience + PATIENCE_WINDOW:
            return False
        means = [
            sum(total[end - PATIENCE_WINDOW : end]) / PATIENCE_WINDOW
            for end in range(PATIENCE_WINDOW, len(total) + 1)
        ]
        return min(means[-patience:]) >= min(means[:-patience], default=math.inf)

    def _factors(self, z: Tensor, lam: Tensor) -> list[Tensor]:
        mask = kept(z, self.params.mask_temperature)
        return [
            lam[index][part.task.to(lam.device)] * own
            for index, (part, own) in enumerate(
                zip(self.components, torch.split(mask, self._sizes), strict=True)
            )
        ]

    def _cores(self, z: Tensor, lam: Tensor) -> dict[str, Tensor]:
        parts = zip(self.components, self._factors(z, lam), strict=True)
        return {part.name: part.core(factors.to(part.S)) for part, factors in parts}

    def _adam(self, value: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rate: float) -> None:
        """Adam (arXiv 1412.6980) with betas 0.9 and 0.999, eps 1e-8, no weight decay; in place."""
        beta1, beta2, step = 0.9, 0.999, self.state.step
        first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (second / (1 - beta2**step)).sqrt_().add_(1e-8)
        value.addcdiv_(first, scale, value=-rate / (1 - beta1**step))

    def _check(self, loss: Tensor, task: int) -> None:
        if not bool(torch.isfinite(loss)):
            raise MergeFailure(
                "entropy_not_finite",
                f"the entropy of task {task} is not finite at step {self.state.step}",
                remedy="Lower `lr`, or look at the head and the samples of that task.",
            )


Tell = Callable[[int, int, str], None]
"""Takes the steps done, the steps in all, and a message; may raise to stop."""
