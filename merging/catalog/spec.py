"""What a catalogue entry is: contract and parameters as data, checked before any tensor is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

Compat = Literal["paper", "peft", "mergekit"]
PER_MODEL: JsonDict = {"per_model": True}


class MethodParams(BaseModel):
    """Parameters that every method takes. A method's own class adds to them.

    A field marked ``per_model`` may also stand under ``models[i].parameters`` and then overrides the
    global value for that model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)

    weight: float = Field(
        default=1.0,
        ge=-1e6,
        le=1e6,
        description="Factor on the model's task vector.",
        json_schema_extra=PER_MODEL,
    )
    lambda_: float | Literal["auto"] = Field(
        default=1.0,
        alias="lambda",
        description=(
            "Factor on the merged update. A number means exactly that number; `auto` scales the update so "
            "that its norm is the method's documented multiple of the mean norm of the inputs."
        ),
    )


class LambdaAuto(MethodParams):
    """Parameters of methods whose natural scale depends on the number of tasks: `lambda` is `auto`."""

    lambda_: float | Literal["auto"] = Field(
        default="auto",
        alias="lambda",
        description=(
            "Factor on the merged update. A number means exactly that number; `auto` scales the update so "
            "that its norm is the method's documented multiple of the mean norm of the inputs."
        ),
    )


class NumberLambda(MethodParams):
    """Parameters of methods whose scale cannot be calibrated: `lambda` is a number."""

    lambda_: float = Field(
        default=1.0,
        alias="lambda",
        description="Factor on what the method writes. `auto` is not defined for this method.",
    )


@dataclass(frozen=True)
class Paper:
    """Where a method was published."""

    title: str
    arxiv: str | None = None
    venue: str | None = None

    def to_dict(self) -> dict[str, Any]:
        url = f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None
        return {"title": self.title, "arxiv": self.arxiv, "venue": self.venue, "url": url}


@dataclass(frozen=True)
class Contract:
    """What a method asks of its inputs and can give as output.

    ``spaces`` is empty for methods that choose their own coordinates; ``ordered`` says that the order of
    the models has a meaning (otherwise it never reaches the result); ``multi_output`` methods write one
    adapter per task; ``data`` methods need samples or statistics; ``initial`` ones take no trained models.
    """

    min_models: int = 1
    max_models: int | None = None
    spaces: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ("lora", "delta", "checkpoint")
    equal_ranks: bool = False
    ordered: bool = False
    multi_output: bool = False
    needs_base: bool = False
    data: bool = False
    dense_inputs: bool = False
    initial: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {
            "min_models": self.min_models,
            "max_models": self.max_models,
            "spaces": list(self.spaces),
            "outputs": list(self.outputs),
            "equal_ranks": self.equal_ranks,
            "ordered": self.ordered,
            "multi_output": self.multi_output,
            "needs_base": self.needs_base,
            "data": self.data,
            "dense_inputs": self.dense_inputs,
            "initial": self.initial,
        }


@dataclass(frozen=True)
class Method:
    """One entry of the catalogue.

    ``kernel`` names the code as ``module:attribute`` (ours, never the user's). ``auto_norm`` is the norm
    of the merged update, in units of the mean norm of the inputs, that ``lambda: auto`` aims at.
    ``presets`` are values that apply under a ``compat`` mode unless the recipe sets them itself.
    ``forced_space`` belongs to names that mean another method in a fixed space.
    """

    name: str
    title: str
    summary: str
    paper: Paper
    contract: Contract
    Params: type[MethodParams]
    kernel: str
    auto_norm: float | None = None
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    forced_space: str | None = None
    notes: str = ""

    def parameter_schema(self) -> dict[str, Any]:
        """JSON schema of the parameters, by the names of the recipe."""
        schema = self.Params.model_json_schema(by_alias=True)
        schema.pop("description", None)
        schema["title"] = f"Parameters of {self.name}"
        return schema

    def defaults(self) -> dict[str, Any]:
        """Default values by the names of the recipe."""
        return self.Params().model_dump(mode="json", by_alias=True)

    def per_model_names(self) -> tuple[str, ...]:
        """Names of the parameters that may be given per model."""
        return tuple(
            info.alias or name
            for name, info in self.Params.model_fields.items()
            if isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("per_model")
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "title": self.title,
            "summary": self.summary,
            "paper": self.paper.to_dict(),
            "contract": self.contract.to_dict(),
            "parameters": self.parameter_schema(),
            "defaults": self.defaults(),
            "per_model": list(self.per_model_names()),
            "auto_norm": self.auto_norm,
            "compat": {name: dict(values) for name, values in self.presets.items()},
            "notes": self.notes,
        }
