"""Linear methods: weighted sums, exact or truncated."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from merging.catalog.spec import Compat, Contract, Method, MethodParams, Paper

TASK_ARITHMETIC = Paper("Editing Models with Task Arithmetic", "2212.04089", "ICLR 2023")


class LinearParams(MethodParams):
    normalize: bool = Field(
        default=False, description="Divide by the sum of the weights: a weighted mean instead of a sum."
    )
    compat: Compat | None = Field(
        default=None,
        description="Accepted for symmetry: peers' `cat`, `svd` and `task_arithmetic` agree with ours.",
    )


class SlerpParams(MethodParams):
    t: float = Field(
        default=0.5, ge=0.0, le=1.0, description="Place on the arc: 0 is the first model, 1 the second."
    )
    compat: Literal["mergekit"] | None = Field(
        default=None, description="`mergekit` interpolates on a line where the cosine exceeds 0.9995."
    )


METHODS = (
    Method(
        name="linear",
        title="Weighted sum (task arithmetic)",
        summary="Add the weighted updates. Exact: the factors are concatenated.",
        paper=TASK_ARITHMETIC,
        contract=Contract(spaces=("full", "knots", "core"), dense_inputs=True),
        Params=LinearParams,
        kernel="merging.methods.linear:linear",
        auto_norm=1.2,
        notes="PEFT's `cat`; the same in every space. PEFT's `linear` adds cross terms and is not this.",
    ),
    Method(
        name="svd",
        title="Truncated SVD of the weighted sum",
        summary="The best low-rank approximation of the weighted sum, from small cores.",
        paper=TASK_ARITHMETIC,
        contract=Contract(spaces=("full", "knots", "core"), dense_inputs=True),
        Params=LinearParams,
        kernel="merging.methods.linear:svd",
        auto_norm=1.2,
        notes="`output.rank: null` means the largest rank among the inputs, as in PEFT.",
    ),
    Method(
        name="slerp",
        title="Spherical interpolation",
        summary="Move along the arc from the first task vector to the second.",
        paper=Paper("Animating Rotation with Quaternion Curves", venue="SIGGRAPH 1985"),
        contract=Contract(
            min_models=2, max_models=2, spaces=("full", "knots", "core"), ordered=True, dense_inputs=True
        ),
        Params=SlerpParams,
        kernel="merging.methods.slerp:slerp",
        auto_norm=1.0,
        notes="On task vectors, per module, the same in every space; exact, as concatenated factors.",
    ),
)
