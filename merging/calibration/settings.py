"""The keys under ``calibration`` in a recipe. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

DEFAULT_SAMPLES = 256
"""Samples per task where the recipe gives no number."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HeadSettings(_Strict):
    """How a separate head file turns the base model's output into logits.

    ``logits = scale * f @ weight^T + bias`` where ``f`` is the mean over the tokens that are not
    padding, the first or the last of them, or the model's own pooled output; ``normalize`` divides ``f``
    by its length.
    """

    pooling: Literal["mean", "first", "last", "pooler"] = "mean"
    normalize: bool = False
    scale: float = Field(default=1.0, gt=0.0, le=1e4, allow_inf_nan=False)


class CalibrationSettings(_Strict):
    """What methods that look at data use of the data, and how.

    ``data`` is one file for all tasks, whose rows name their ``task``; otherwise each model has its own.
    ``samples`` are drawn per task by the seed. ``features: model`` measures the inputs of each
    fine-tuned model, ``base`` those of the base model; ``auto`` is what the method's paper does.
    ``rows`` says what one row of the statistics is: a token, or the mean over the tokens of a sample.
    ``statistic: sketch`` keeps ``sketch_rows`` rows per layer instead of a Gram matrix.
    """

    data: str | None = Field(default=None, min_length=1, max_length=1024)
    tokenizer: str | None = Field(default=None, min_length=1, max_length=1024)
    samples: int | None = Field(default=None, ge=1, le=1_000_000)
    batch_size: int = Field(default=16, ge=1, le=4096)
    max_length: int = Field(default=128, ge=1, le=1 << 20)
    features: Literal["auto", "base", "model"] = "auto"
    rows: Literal["tokens", "samples"] = "tokens"
    statistic: Literal["gram", "sketch"] = "gram"
    sketch_rows: int = Field(default=256, ge=1, le=65536)
    head: HeadSettings = Field(default_factory=HeadSettings)
