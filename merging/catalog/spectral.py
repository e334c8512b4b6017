"""Spectral methods: they act on singular values and vectors, and give the same result in every space."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from merging.catalog.spec import PER_MODEL, Contract, LambdaAuto, Method, Paper

SPECTRAL = Contract(spaces=("core", "knots", "full"), dense_inputs=True)
SPACE_FREE = "Computed in the joint frame of the factors, which is exact: `space` makes no difference. "

PaperOnly: Any = Field(
    default=None,
    description="`paper`: the published scale, without calibration; `lambda` is then 1.0.",
)


class TsvParams(LambdaAuto):
    compat: Literal["paper"] | None = PaperOnly
    k: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Singular triplets kept of each model, at most its rank. `null`: all of them, or an even share "
            "where they would exceed the smaller side of the matrix."
        ),
        json_schema_extra=PER_MODEL,
    )
    isotropize: bool = Field(
        default=False,
        description=(
            "Finish by setting all non-zero singular values of the merged update to their mean; "
            "`lambda: auto` then aims at twice the mean norm."
        ),
    )


class IsoParams(LambdaAuto):
    compat: Literal["paper"] | None = PaperOnly
    iso_denominator: Literal["rank", "core", "full"] = Field(
        default="rank",
        description=(
            "What the mean of the singular values runs over: the non-zero ones, the directions that the "
            "models reach, or the smaller side of the matrix (the paper's). Immaterial under `lambda: auto`."
        ),
    )


class IsoCtsParams(IsoParams):
    common_space_fraction: float = Field(
        default=0.8,
        ge=0.0,
        le=1.0,
        description="Share of the directions that the common space gets; 1 is `iso_c`.",
    )


class CartParams(LambdaAuto):
    compat: Literal["paper"] | None = PaperOnly
    cart_rank: float = Field(
        default=0.08,
        gt=0.0,
        description=(
            "Rank kept of each centred update: below 1 a share of the directions that the models reach "
            "(rounded up), from 1 on the rank itself."
        ),
    )
    cart_scale: float = Field(
        default=1.0, ge=-1e6, le=1e6, description="Factor on the sum of the centred low-rank updates."
    )

    @field_validator("cart_rank")
    @classmethod
    def _whole(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("a rank of 1 or more must be a whole number")
        return value


ISO_PAPER = Paper(
    "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
    "2502.04959",
    "ICML 2025",
)

METHODS = (
    Method(
        name="tsv",
        title="TSV-Merge",
        summary="Whiten the singular vectors of all models against each other, keep their singular values.",
        paper=Paper(
            "Task Singular Vectors: Reducing Task Interference in Model Merging", "2412.00081", "CVPR 2025"
        ),
        contract=SPECTRAL,
        Params=TsvParams,
        kernel="merging.methods.tsv:tsv",
        auto_norm=1.7,
        presets={"paper": {}},
        notes=SPACE_FREE
        + "A model of weight 0 is left out altogether. Two copies of one model give that model.",
    ),
    Method(
        name="iso_c",
        title="Iso-C",
        summary="Add the updates, then set all singular values of the sum to their mean.",
        paper=ISO_PAPER,
        contract=SPECTRAL,
        Params=IsoParams,
        kernel="merging.methods.iso:iso_c",
        auto_norm=1.9,
        presets={"paper": {"iso_denominator": "full"}},
        notes=SPACE_FREE + "Null directions of the sum stay null.",
    ),
    Method(
        name="iso_cts",
        title="Iso-CTS",
        summary="Iso-C whose smallest directions make room for directions of the single models.",
        paper=ISO_PAPER,
        contract=SPECTRAL,
        Params=IsoCtsParams,
        kernel="merging.methods.iso:iso_cts",
        auto_norm=1.9,
        presets={"paper": {"iso_denominator": "full"}},
        notes=SPACE_FREE + "Null directions of the sum stay null.",
    ),
    Method(
        name="cart",
        title="CART",
        summary="The average of the updates plus low-rank approximations of their deviations from it.",
        paper=Paper("Revisiting Weight Averaging for Model Merging", "2412.12153", None),
        contract=SPECTRAL,
        Params=CartParams,
        kernel="merging.methods.cart:cart",
        auto_norm=1.4,
        presets={"paper": {}},
        notes=SPACE_FREE + "`cart_rank` is a share of the directions the models reach, not of the matrix.",
    ),
)
