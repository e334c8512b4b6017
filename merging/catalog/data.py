"""Methods that look at data: statistics of activations, or unlabeled samples and the models' heads."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from merging.catalog.spec import PER_MODEL, Contract, Method, NumberLambda, Paper


class _GramParams(NumberLambda):
    weight: float = Field(
        default=1.0,
        ge=0.0,
        le=1e6,
        description="Importance of the model: a factor on its Gram matrices.",
        json_schema_extra=PER_MODEL,
    )
    ridge: float = Field(
        default=1e-6,
        ge=0.0,
        le=1e3,
        description=(
            "Added to every Gram matrix, in units of its mean diagonal. In directions that no sample reaches "
            "the result is then the mean of the models."
        ),
    )


class RegmeanParams(_GramParams):
    off_diagonal: float = Field(
        default=0.9,
        ge=0.0,
        le=1.0,
        description="Factor on the off-diagonal entries of the Gram matrices (the paper's alpha).",
    )


class MatsParams(_GramParams):
    off_diagonal: float = Field(
        default=1.0, ge=0.0, le=1.0, description="Factor on the off-diagonal entries of the input Grams."
    )
    iterations: int = Field(
        default=100, ge=0, le=10_000, description="Largest number of steps of the conjugate gradient."
    )
    tolerance: float = Field(
        default=1e-5,
        ge=0.0,
        lt=1.0,
        description="Stop a module when its residual is below this fraction of the right side.",
    )


class OsrmParams(NumberLambda):
    statistic: Literal["covariance", "mean"] = Field(
        default="covariance",
        description=(
            "What stands for the features of the other tasks: all of them (the paper), or one mean vector "
            "per task (what the released code does)."
        ),
    )


class OsrmInitParams(OsrmParams):
    r: int = Field(default=8, ge=1, le=65536, description="Rank of the adapters.")
    target_modules: list[str] = Field(
        default=["query", "value", "q_proj", "v_proj"],
        min_length=1,
        max_length=1000,
        description="Endings of the names of the layers that get an adapter.",
    )
    tie_break: Literal["own_energy", "lowest"] = Field(
        default="own_energy",
        description=(
            "Which of the directions that the other tasks never reach: those that carry most energy of the "
            "own task, or simply the last ones of the decomposition."
        ),
    )
    a_scale: float = Field(default=1.0, gt=0.0, le=1e3, description="Length of the rows of A.")


class OsrmProjectParams(OsrmParams):
    mode: Literal["soft", "complement"] = Field(
        default="soft",
        description=(
            "`soft` balances what the own task loses against what the others no longer see; `complement` "
            "removes the leading directions of the others."
        ),
    )
    beta: float = Field(
        default=0.3,
        ge=0.0,
        le=1e6,
        description="`soft`: weight of the other tasks against the own one; 0 changes nothing.",
    )
    directions: int = Field(
        default=8, ge=0, le=65536, description="`complement`: how many directions are removed."
    )
    ridge: float = Field(
        default=1e-3,
        gt=0.0,
        le=1e3,
        description="`soft`: pull towards the factor as it was, in units of the mean diagonal of the Grams.",
    )
    normalize: bool = Field(
        default=True,
        description=(
            "Divide the statistics of each task by their trace and take the mean over the other tasks, so "
            "that tasks count alike and `beta` means the same for any number of them."
        ),
    )


class AdarankParams(NumberLambda):
    weight: float = Field(
        default=1.0,
        ge=-1e6,
        le=1e6,
        description="Factor on the starting coefficient of the model.",
        json_schema_extra=PER_MODEL,
    )
    origin: Literal["task_arithmetic", "cart"] = Field(
        default="task_arithmetic",
        description="What the components are added to: the base model, or the mean of the models.",
    )
    prior: float | None = Field(
        default=None,
        ge=-1e3,
        le=1e3,
        description=(
            "Coefficient of every model in every module at the start. `null`: 0.3 for `task_arithmetic`, 1.0 "
            "for `cart`."
        ),
    )
    init_rank: float | None = Field(
        default=None,
        ge=0.0,
        le=65536,
        description=(
            "Components of each model that are on at the start: a whole number of them, or below 1 a share "
            "of those that are not zero. `null`: all for `task_arithmetic`, 0.16 for `cart`, where all would "
            "give the mean."
        ),
    )
    steps: int = Field(default=200, ge=0, le=1_000_000, description="Steps of Adam.")
    batch_size: int = Field(default=16, ge=1, le=4096, description="Samples per task and step.")
    lr: float = Field(default=1e-3, gt=0.0, le=10.0, description="Learning rate of the masks.")
    lambda_lr: float | None = Field(
        default=None,
        ge=0.0,
        le=10.0,
        description="Learning rate of the coefficients; `null`: that of the masks.",
    )
    learn_lambda: bool = Field(default=True, description="Whether the coefficients are learned too.")
    mask_temperature: float = Field(
        default=10.0, gt=0.0, le=1e6, description="A component is on where sigmoid(logit / this) > 1/2."
    )
    diversity: float = Field(
        default=0.0,
        ge=0.0,
        le=100.0,
        description=(
            "Weight of the entropy of the mean prediction of a batch, which is rewarded: it keeps the "
            "predictions from collapsing onto few classes. 0 is the published objective."
        ),
    )
    patience: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="Stop when the entropy has not fallen for so many steps (mean over 10); 0: never.",
    )
    checkpoint_every: int = Field(
        default=20, ge=1, le=1_000_000, description="Steps between two checkpoints."
    )


REGMEAN = Paper("Dataless Knowledge Fusion by Merging Weights of Language Models", "2212.09849")
MATS = Paper("Merging by Matching Models in Task Parameter Subspaces", "2312.04339")
OSRM = Paper("Unraveling LoRA Interference: Orthogonal Subspaces for Robust Model Merging", "2505.22934")
ADARANK = Paper("AdaRank: Adaptive Rank Pruning for Enhanced Model Merging", "2503.22178")

METHODS = (
    Method(
        name="regmean",
        title="RegMean",
        summary="The update whose outputs are nearest to those of each model on its own inputs.",
        paper=REGMEAN,
        contract=Contract(data=True),
        Params=RegmeanParams,
        kernel="merging.methods.regmean:regmean",
        notes="Needs the Gram matrix of the inputs of every layer, from samples or from a statistics file.",
    ),
    Method(
        name="mats",
        title="MaTS (matching models in their task subspaces)",
        summary="As RegMean, in the metric of block-wise Fisher matrices; solved by conjugate gradient.",
        paper=MATS,
        contract=Contract(data=True),
        Params=MatsParams,
        kernel="merging.methods.regmean:mats",
        notes=(
            "Needs input Grams and Grams of the gradients at the outputs of every layer; the latter can only "
            "come from a statistics file. The result is dense: set `output.rank` for a small adapter."
        ),
    ),
    Method(
        name="osrm_init",
        title="OSRM initialisation",
        summary="Starting adapters whose input directions carry least energy of the other tasks; B is zero.",
        paper=OSRM,
        contract=Contract(outputs=("lora",), min_models=2, multi_output=True, data=True, initial=True),
        Params=OsrmInitParams,
        kernel="merging.methods.osrm_init:osrm_init",
        notes=(
            "Comes before fine-tuning: `model` is only the name of a task, and one adapter per task is "
            "written to train from."
        ),
    ),
    Method(
        name="osrm_project",
        title="OSRM projection",
        summary="Turns the input directions of trained adapters away from what the other tasks use.",
        paper=OSRM,
        contract=Contract(outputs=("lora",), min_models=2, multi_output=True, data=True),
        Params=OsrmProjectParams,
        kernel="merging.methods.osrm_project:osrm_project",
        notes="Writes one adapter per model, of the same rank; merge them with any method.",
    ),
    Method(
        name="adarank",
        title="AdaRank",
        summary="Learns which singular components of each model to keep, by minimising prediction entropy.",
        paper=ADARANK,
        contract=Contract(min_models=2, needs_base=True, data=True),
        Params=AdarankParams,
        kernel="merging.methods.adarank:adarank",
        notes=(
            "Needs the base model, unlabeled samples of every task and a classification head per task. "
            "Labels are never used. See the page on calibration for what it can and cannot do."
        ),
    ),
)
