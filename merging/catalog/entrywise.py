"""Entry-wise methods: they treat every entry of the task vectors (in some space) on its own."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from merging.catalog.spec import PER_MODEL, Compat, Contract, LambdaAuto, Method, MethodParams, Paper

SPACES = ("full", "knots", "core")
ENTRYWISE = Contract(spaces=SPACES, dense_inputs=True)

Density: Any = Field(
    default=0.2,
    gt=0.0,
    le=1.0,
    description="Fraction of entries that is kept.",
    json_schema_extra=PER_MODEL,
)
TrimRescale: Any = Field(default=False, description="Multiply each trimmed task so that its L1 norm is kept.")
SpaceGauge: Any = Field(
    default="balanced",
    description=(
        "Core space only. `balanced` rewrites each adapter by its own SVD first, so that the result depends "
        "on B@A alone; `asis` takes the factors as they were trained, as the paper's code does."
    ),
)
Isotropize: Any = Field(
    default=False,
    description=(
        "Finish by setting all non-zero singular values of the merged update to their mean; `lambda: auto` "
        "then aims at twice the mean norm."
    ),
)


COMPAT_TEXT = "Reproduce a peer exactly: its counting, sign and weight rules; `lambda` is then 1.0."


class SpaceParams(MethodParams):
    core_gauge: Literal["balanced", "asis"] = SpaceGauge
    isotropize: bool = Isotropize


class EntrywiseParams(SpaceParams):
    compat: Compat | None = Field(default=None, description=COMPAT_TEXT)


class VotingParams(LambdaAuto, SpaceParams):
    majority_sign_method: Literal["total", "frequency", "normfrac", "normmass"] = Field(
        default="total",
        description=(
            "Elect each sign by the sum of the entries, by their count, by the entry with the largest share "
            "of its task's squared norm, or by the sum of these shares. A tie between counts is positive in "
            "full space and goes to the sum in the others, whose axes have no sign of their own."
        ),
    )
    agg: Literal["mean", "sum", "max"] = Field(
        default="mean", description="How the entries that agree with the elected sign are combined."
    )
    normalize: bool = Field(
        default=False,
        description=(
            "With `agg: mean`, divide by the sum of the weights of the agreeing models, not by their count."
        ),
    )

    @model_validator(mode="after")
    def _votes_that_the_peer_knows(self) -> Self:
        compat = getattr(self, "compat", None)
        if compat in ("peft", "mergekit") and self.majority_sign_method.startswith("norm"):
            raise ValueError(
                f"majority_sign_method {self.majority_sign_method!r} does not exist in {compat}: "
                "use total or frequency, or another compat"
            )
        if compat == "peft" and (self.agg != "mean" or self.normalize):
            raise ValueError(
                "PEFT divides by the number of agreeing models: leave out agg and normalize, or take "
                "another compat"
            )
        if self.normalize and self.agg != "mean" and compat != "mergekit":
            raise ValueError(f"normalize belongs to agg: mean, and agg is {self.agg!r}: give one of them")
        return self


class ElectionParams(VotingParams):
    compat: Compat | None = Field(default=None, description=COMPAT_TEXT)


class MagnitudePruneParams(EntrywiseParams):
    density: float = Density
    trim_scope: Literal["tensor", "global"] = Field(
        default="tensor", description="Choose the largest entries per tensor or over the whole model."
    )
    rescale: bool = TrimRescale


class TiesParams(ElectionParams):
    density: float = Density
    trim_scope: Literal["tensor", "global"] = Field(
        default="tensor", description="Choose the largest entries per tensor or over the whole model."
    )
    rescale: bool = TrimRescale


DareDensity: Any = Field(
    default=0.5,
    gt=0.0,
    le=1.0,
    description="Probability with which an entry is kept.",
    json_schema_extra=PER_MODEL,
)
Rescale: Any = Field(
    default=True,
    description="Multiply the kept entries by 1 / density (mergekit: match the L1 norm).",
)


class DareLinearParams(EntrywiseParams):
    density: float = DareDensity
    rescale: bool = Rescale


class DareTiesParams(ElectionParams):
    density: float = DareDensity
    rescale: bool = Rescale


TIES_PAPER = Paper("TIES-Merging: Resolving Interference When Merging Models", "2306.01708", "NeurIPS 2023")
DARE_PAPER = Paper(
    "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
    "2311.03099",
    "ICML 2024",
)
CORE_SPACE_PAPER = Paper(
    "Accurate and Efficient Low-Rank Model Merging in Core Space", "2509.17786", "NeurIPS 2025"
)
KNOTS_PAPER = Paper("Model merging with SVD to tie the Knots", "2410.19735", "ICLR 2025")

METHODS = (
    Method(
        name="magnitude_prune",
        title="Magnitude pruning",
        summary="Keep the largest entries of each task vector, then add.",
        paper=Paper("Language Models are Super Mario (magnitude baseline)", "2311.03099", "ICML 2024"),
        contract=ENTRYWISE,
        Params=MagnitudePruneParams,
        kernel="merging.methods.prune:magnitude_prune",
        auto_norm=1.2,
    ),
    Method(
        name="ties",
        title="TIES",
        summary="Trim small entries, elect one sign per entry, average the entries that agree.",
        paper=TIES_PAPER,
        contract=ENTRYWISE,
        Params=TiesParams,
        kernel="merging.methods.ties:ties",
        auto_norm=1.7,
        presets={
            "paper": {"trim_scope": "global", "core_gauge": "asis"},
            "mergekit": {"normalize": True},
        },
    ),
    Method(
        name="dare_linear",
        title="DARE (linear)",
        summary="Drop entries at random, rescale the rest, add.",
        paper=DARE_PAPER,
        contract=ENTRYWISE,
        Params=DareLinearParams,
        kernel="merging.methods.dare:dare_linear",
        auto_norm=1.2,
    ),
    Method(
        name="dare_ties",
        title="DARE-TIES",
        summary="Drop entries at random, rescale the rest, then elect signs and average what agrees.",
        paper=DARE_PAPER,
        contract=ENTRYWISE,
        Params=DareTiesParams,
        kernel="merging.methods.dare:dare_ties",
        auto_norm=1.7,
        presets={"paper": {"core_gauge": "asis"}, "mergekit": {"agg": "sum"}},
    ),
    Method(
        name="core_space",
        title="Core Space merging",
        summary="TIES on the coordinates of Core Space; any other entry-wise method takes `space: core`.",
        paper=CORE_SPACE_PAPER,
        contract=Contract(spaces=("core",)),
        Params=TiesParams,
        kernel="merging.methods.ties:ties",
        auto_norm=1.7,
        presets={"paper": {"core_gauge": "asis"}, "mergekit": {"normalize": True}},
        forced_space="core",
    ),
    Method(
        name="knots",
        title="KnOTS-TIES",
        summary="TIES on the coordinates of KnOTS; any other entry-wise method takes `space: knots`.",
        paper=KNOTS_PAPER,
        contract=Contract(spaces=("knots",)),
        Params=TiesParams,
        kernel="merging.methods.ties:ties",
        auto_norm=1.7,
        presets={"paper": {"trim_scope": "global"}, "mergekit": {"normalize": True}},
        forced_space="knots",
    ),
)
