"""Named systems with coordinates of their own: DRM, LoRA-LEGO, LoRE-Merging, RMM."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from merging.catalog.spec import PER_MODEL, Contract, LambdaAuto, Method, MethodParams, NumberLambda, Paper


class DrmParams(LambdaAuto):
    weight: float = Field(
        default=1.0,
        ge=-1e6,
        le=1e6,
        description="Factor on the model's entries after the sign election, before the mean.",
        json_schema_extra=PER_MODEL,
    )
    density: float = Field(
        default=0.2,
        gt=0.0,
        le=1.0,
        description=(
            "Fraction of normalised entries that is kept, over all models of a module together (1 - the "
            "paper's drop rate). At 1 nothing is pruned; the decomposition and the election still run."
        ),
    )
    disjoint_mean: bool = Field(
        default=True,
        description="Divide each entry by the number of models that still have it, not by all models.",
    )
    rank_rtol: float = Field(
        default=0.01,
        ge=0.0,
        lt=1.0,
        description="Singular values of the stack up to this fraction of the largest are cut off.",
    )


class LegoParams(MethodParams):
    weight: float = Field(
        default=1.0,
        ge=0.0,
        le=1e6,
        description="Sample weight of the model's units in the clustering and in the centroids; 0 omits it.",
        json_schema_extra=PER_MODEL,
    )
    k: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="Number of clusters, which is the output rank. `null`: the largest rank of the inputs.",
    )
    features: Literal["raw", "unit_halves"] = Field(
        default="raw",
        description=(
            "What is clustered: the vectors [a; b] as they are, or with the a half and the b half each "
            "divided by its norm. The centroids are always means of the vectors as they are."
        ),
    )
    norm: Literal["inf", "l2"] = Field(default="inf", description="The norm of `param_reweight`.")
    param_reweight: bool = Field(
        default=True, description="Stretch each centroid to the mean norm of its members."
    )
    output_reweight: bool = Field(
        default=True, description="Multiply the result by sqrt(mean input rank / k)."
    )
    canonicalize: bool = Field(
        default=True,
        description=(
            "Balance the halves of each unit and choose its sign by its best match in the first model, so "
            "that the result does not depend on how an adapter splits b*a."
        ),
    )


class LoreParams(MethodParams):
    weight: float = Field(
        default=1.0,
        ge=-1e6,
        le=1e6,
        description="Share of the model's low-rank part in the final combination, divided by the sum.",
        json_schema_extra=PER_MODEL,
    )
    mu: float = Field(
        default=0.1, ge=0.0, le=1e6, description="Threshold that each sweep takes off the singular values."
    )
    mu_mode: Literal["absolute", "relative"] = Field(
        default="relative",
        description=(
            "`relative`: `mu` in units of the mean over models of the largest singular value of the distance "
            "to the mean, per module; then the scale of the adapters does not matter."
        ),
    )
    iters: int = Field(default=20, ge=1, le=1000, description="Largest number of sweeps.")
    tol: float = Field(
        default=1e-6,
        ge=0.0,
        lt=1.0,
        description="Stop a module when a sweep lowers its objective by less than this fraction; 0: never.",
    )
    delta_scale: float = Field(
        default=1.0,
        ge=-1e6,
        le=1e6,
        description="Factor on the combined low-rank parts (the paper's lambda).",
    )
    final: Literal["average", "ties"] = Field(
        default="ties",
        description=(
            "How the low-rank parts are combined: the weighted mean, or TIES in Core Space coordinates. "
            "`average` with equal weights and `delta_scale: 1` converges to the plain mean of the models."
        ),
    )
    density: float = Field(
        default=0.2, gt=0.0, le=1.0, description="Fraction of coordinates that `final: ties` keeps."
    )


class RmmParams(NumberLambda):
    basis_size: int = Field(
        default=1,
        ge=0,
        le=65536,
        description=(
            "Basis vectors per position beside the mean. min(rank, models - 1) makes the recovery exact, and "
            "then nothing is saved."
        ),
    )
    align: Literal["none", "procrustes"] = Field(
        default="procrustes",
        description=(
            "`procrustes` first rotates the factors of each model towards those of the largest one; the "
            "products stay as they are. `none` takes the factors as they were trained, as the paper does."
        ),
    )
    granularity: Literal["position", "factor"] = Field(
        default="position",
        description="A basis per row of B and per column of A (the paper), or one for B and one for A.",
    )


DRM = Paper("Decom-Renorm-Merge: Model Merging on the Right Space Improves Multitasking", "2505.23117")

METHODS = (
    Method(
        name="drm_h",
        title="DRM-H (Decom-Renorm-Merge, horizontal)",
        summary="Prune and elect signs on the normalised right singular vectors of the deltas side by side.",
        paper=DRM,
        contract=Contract(),
        Params=DrmParams,
        kernel="merging.methods.drm:drm_h",
        auto_norm=1.7,
        notes=(
            "The threshold is shared by all models of a module. The authors' code skips everything at a drop "
            "rate of 0; here `density: 1` only skips the pruning. A model without an update in some singular "
            "direction contributes zeros there, where the authors' code divides by zero."
        ),
    ),
    Method(
        name="drm_v",
        title="DRM-V (Decom-Renorm-Merge, vertical)",
        summary="Prune and elect signs on the normalised left singular vectors of the stacked deltas.",
        paper=DRM,
        contract=Contract(),
        Params=DrmParams,
        kernel="merging.methods.drm:drm_v",
        auto_norm=1.7,
        notes="DRM-H of the transposed deltas.",
    ),
    Method(
        name="lora_lego",
        title="LoRA-LEGO",
        summary="Cluster the rank-one units of all adapters; the rescaled centroids are the merged adapter.",
        paper=Paper(
            "Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes Through Rank-Wise "
            "Clustering",
            "2409.16167",
            "ICLR 2025",
        ),
        contract=Contract(),
        Params=LegoParams,
        kernel="merging.methods.lego:lora_lego",
        auto_norm=1.2,
        notes="Seeded k-means++ with 10 restarts of at most 300 rounds, on the Gram matrix of the units.",
    ),
    Method(
        name="lore",
        title="LoRE-Merging",
        summary="Estimate a base and low-rank parts by singular value thresholding, then recombine them.",
        paper=Paper(
            "LoRE-Merging: Exploring Low-Rank Estimation For Large Language Model Merging",
            "2502.10749",
            "Findings of EMNLP 2025",
        ),
        contract=Contract(),
        Params=LoreParams,
        kernel="merging.methods.lore:lore",
        auto_norm=1.2,
        notes=(
            "Runs on small cores; adding a common base to all models changes nothing, so none is loaded. "
            "Two models with equal weights give exactly their mean, whatever the parameters; `average` with "
            "equal weights and `delta_scale: 1` tends to the mean for any number. The report warns then."
            " A public re-implementation of the paper uses `mu: 0.01`, `mu_mode: absolute`, `final: average`."
        ),
    ),
    Method(
        name="rmm",
        title="RMM (reversible model merging)",
        summary="Replace the adapters by a small basis and coefficients from which each can be rebuilt.",
        paper=Paper("Towards Reversible Model Merging For Low-rank Weights", "2510.14163"),
        contract=Contract(multi_output=True, outputs=("lora",)),
        Params=RmmParams,
        kernel="merging.methods.rmm:rmm",
        notes=(
            "Writes one recovered adapter per model and `basis.safetensors`. Recovery is approximate: the "
            "report gives `recon_error` per model and `storage_ratio`."
        ),
    ),
)
