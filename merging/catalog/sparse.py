"""Further entry-wise methods: other ways to choose the entries that stay."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from merging.catalog.entrywise import (
    ENTRYWISE,
    DareDensity,
    SpaceParams,
    TrimRescale,
    VotingParams,
)
from merging.catalog.spec import PER_MODEL, LambdaAuto, Method, Paper

BandDensity: Any = Field(
    default=0.15,
    gt=0.0,
    le=1.0,
    description="Fraction of entries that is kept: those that come after the largest.",
    json_schema_extra=PER_MODEL,
)
Gamma: Any = Field(
    default=0.01,
    ge=0.0,
    lt=1.0,
    description="Fraction of entries that is left out because they are the largest.",
    json_schema_extra=PER_MODEL,
)
BandScope: Any = Field(default="tensor", description="Choose the entries per tensor or per row.")
BAND_COMPAT = (
    "`mergekit` reproduces its tensor-wise rule, `paper` the row-wise one of the authors' code; `lambda` is "
    "then 1.0."
)
Epsilon: Any = Field(
    default=0.15,
    validate_default=True,
    ge=0.0,
    le=0.5,
    description=(
        "Half the range of the keep probability: from `density - epsilon` for the smallest entry of a row to "
        "`density + epsilon` for the largest."
    ),
    json_schema_extra=PER_MODEL,
)
DellaRescale: Any = Field(
    default=True,
    description="Divide each kept entry by its keep probability (mergekit: match the L1 norm).",
)
MERGEKIT_TEXT = "`mergekit` reproduces its rules; `lambda` is then 1.0."


class BreadcrumbsParams(LambdaAuto, SpaceParams):
    compat: Literal["paper", "mergekit"] | None = Field(default=None, description=BAND_COMPAT)
    density: float = BandDensity
    gamma: float = Gamma
    trim_scope: Literal["tensor", "row"] = BandScope
    rescale: bool = TrimRescale


class BreadcrumbsTiesParams(VotingParams):
    compat: Literal["mergekit"] | None = Field(default=None, description=MERGEKIT_TEXT)
    density: float = BandDensity
    gamma: float = Gamma
    trim_scope: Literal["tensor", "row"] = BandScope
    rescale: bool = TrimRescale


def _check_range(epsilon: float, info: ValidationInfo) -> float:
    density = info.data.get("density")
    if density is not None and not (0.0 < density - epsilon and density + epsilon <= 1.0):
        raise ValueError(
            f"density - epsilon must be above 0 and density + epsilon at most 1; "
            f"density is {density}, epsilon {epsilon}"
        )
    return epsilon


class DellaLinearParams(LambdaAuto, SpaceParams):
    compat: Literal["mergekit"] | None = Field(default=None, description=MERGEKIT_TEXT)
    density: float = DareDensity
    epsilon: float = Epsilon
    rescale: bool = DellaRescale

    _range = field_validator("epsilon")(_check_range)


class DellaParams(VotingParams):
    compat: Literal["mergekit"] | None = Field(default=None, description=MERGEKIT_TEXT)
    density: float = DareDensity
    epsilon: float = Epsilon
    rescale: bool = DellaRescale

    _range = field_validator("epsilon")(_check_range)


class SceParams(LambdaAuto, SpaceParams):
    compat: Literal["mergekit"] | None = Field(default=None, description=MERGEKIT_TEXT)
    select_topk: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="Fraction of positions that is kept: those where the models differ most.",
    )


class ConsensusParams(LambdaAuto, SpaceParams):
    compat: Literal["paper"] | None = Field(
        default=None, description="`paper` takes Core Space factors as they are; `lambda` is then 1.0."
    )
    mask_lambda: float = Field(
        default=0.4,
        ge=0.0,
        le=1e6,
        description="A model claims an entry if its own part exceeds this multiple of the others' sum.",
        json_schema_extra=PER_MODEL,
    )
    min_agree: int = Field(
        default=2,
        ge=0,
        le=1_000_000,
        description="Models that must claim an entry for it to stay; at most as many as have the module.",
    )


BREADCRUMBS_PAPER = Paper(
    "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", "2312.06795", "ECCV 2024"
)
DELLA_PAPER = Paper("DELLA-Merging: Reducing Interference through Magnitude-Based Sampling", "2406.11617")

METHODS = (
    Method(
        name="breadcrumbs",
        title="Model Breadcrumbs",
        summary="Leave out the largest and the smallest entries of each task vector, then add.",
        paper=BREADCRUMBS_PAPER,
        contract=ENTRYWISE,
        Params=BreadcrumbsParams,
        kernel="merging.methods.breadcrumbs:breadcrumbs",
        auto_norm=1.2,
        presets={"paper": {"trim_scope": "row", "core_gauge": "asis"}},
    ),
    Method(
        name="breadcrumbs_ties",
        title="Breadcrumbs with sign election",
        summary="Leave out the largest and the smallest entries, then elect signs and average what agrees.",
        paper=BREADCRUMBS_PAPER,
        contract=ENTRYWISE,
        Params=BreadcrumbsTiesParams,
        kernel="merging.methods.breadcrumbs:breadcrumbs_ties",
        auto_norm=1.7,
        presets={"mergekit": {"agg": "sum"}},
    ),
    Method(
        name="della_linear",
        title="DELLA (linear)",
        summary="Drop entries at random, small ones more often, rescale the rest, add.",
        paper=DELLA_PAPER,
        contract=ENTRYWISE,
        Params=DellaLinearParams,
        kernel="merging.methods.della:della_linear",
        auto_norm=1.2,
    ),
    Method(
        name="della",
        title="DELLA",
        summary="Drop entries at random, small ones more often, then elect signs and average what agrees.",
        paper=DELLA_PAPER,
        contract=ENTRYWISE,
        Params=DellaParams,
        kernel="merging.methods.della:della",
        auto_norm=1.7,
        presets={"mergekit": {"normalize": True}},
    ),
    Method(
        name="sce",
        title="SCE (select, calculate, erase)",
        summary="Keep the positions of high variance, weight models by their energy there, elect signs.",
        paper=Paper("FuseChat: Knowledge Fusion of Chat Models", "2408.07990", "EMNLP 2025"),
        contract=ENTRYWISE,
        Params=SceParams,
        kernel="merging.methods.sce:sce",
        auto_norm=1.7,
    ),
    Method(
        name="consensus",
        title="Consensus task arithmetic",
        summary="Add the task vectors, but keep only entries that several models find important.",
        paper=Paper(
            "Localizing Task Information for Improved Model Merging and Compression",
            "2405.07813",
            "ICML 2024",
        ),
        contract=ENTRYWISE,
        Params=ConsensusParams,
        kernel="merging.methods.consensus:consensus",
        auto_norm=1.2,
        presets={"paper": {"core_gauge": "asis"}},
    ),
)
