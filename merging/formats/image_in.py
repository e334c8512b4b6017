"""What the readers of kohya's and of diffusers' files share: modules from keys, shapes and alphas."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from merging.formats.guard import Header
from merging.formats.image_keys import ImageKey, ImageRole
from merging.formats.loaded import Module
from merging.formats.peft_config import AdapterConfig
from merging.formats.peft_keys import Kind
from merging.formats.shapes import DAMAGED, Shapes, common_dtype, fail, stored_twice
from merging.formats.tensors import TensorFile

Roles = dict[ImageRole, str]


@dataclass(frozen=True, slots=True)
class Scaling:
    """The configuration of a module's component and the name by which it knows the module."""

    config: AdapterConfig
    path: str


def group(parsed: Mapping[str, ImageKey | None], file: str) -> dict[str, Roles]:
    """Module -> part -> key. Raises ``unknown_tensor``, ``several_adapters``, ``duplicate_module``."""
    unknown = [key for key, found in parsed.items() if found is None]
    if unknown:
        fail("unknown_tensor", file, unknown[0],
             f"holds {len(unknown)} tensors that are no part of a LoRA: {', '.join(unknown[:10])}",
             remedy="Remove them, or merge the adapter into its base model first")  # fmt: skip
    modules: dict[str, Roles] = {}
    names: dict[str | None, str] = {}
    for key, found in parsed.items():
        assert found is not None
        if found.role in ("A", "B"):
            names.setdefault(found.adapter_name, key)
        if len(names) > 1:
            shown = " and ".join(f"{name or '(none)'} in {where}" for name, where in names.items())
            fail("several_adapters", file, None, f"holds more than one adapter: {shown}",
                 remedy="Save one adapter per file")  # fmt: skip
        roles = modules.setdefault(found.path, {})
        if found.role in roles:
            stored_twice(file, found.path, (roles[found.role], key))
        roles[found.role] = key
    return modules


class ImageReader(Shapes):
    """Modules of one file. ``zero_alpha_is_rank`` is the rule of kohya's scripts for an alpha of 0."""

    def __init__(self, weights: TensorFile, header: Header, *, zero_alpha_is_rank: bool) -> None:
        super().__init__(weights.path.name, header.tensors)
        self.weights = weights
        self.zero_alpha_is_rank = zero_alpha_is_rank
        self.zero: list[str] = []
        """Modules whose alpha is stored as 0."""

    def module(self, name: str, roles: Roles, scaling: Scaling | None = None) -> Module:
        """Check the tensors of a module and describe it.

        Raises ``incomplete_pair``, ``empty_shard``, ``factor_dtype``, ``factor_shape``, ``alpha_invalid``,
        ``alpha_conflict``, ``rank_mismatch``, ``conv_unsupported`` and ``grouped_conv_unsupported``.
        """
        if "A" not in roles or "B" not in roles:
            self.fail("incomplete_pair", name, f"has only {', '.join(roles.values())}; both factors of a "
                      "LoRA are needed", remedy=DAMAGED)  # fmt: skip
        A, B = self.factor(name, roles["A"]), self.factor(name, roles["B"])
        dtype = common_dtype(A.dtype, B.dtype)
        shape_A = A.shape
        if "mid" in roles:
            mid = self.factor(name, roles["mid"])
            dtype = common_dtype(dtype, mid.dtype)
            shape_A = self._through(name, mid.shape, A.shape)
        kind: Kind = "linear" if len(shape_A) == len(B.shape) == 2 else "conv2d"
        if kind == "linear":
            m, n, rank = self.linear(name, shape_A, B.shape)
            shape: tuple[int, ...] = (m, n)
        else:
            rank, shape = self.conv(name, shape_A, B.shape)
            m, n = shape[0], math.prod(shape[1:])
        return Module(
            name=name,
            kind=kind,
            m=m,
            n=n,
            rank=rank,
            scale=self._scale(name, roles.get("alpha"), rank, scaling),
            dtype=dtype,
            weight_shape=shape,
            fan_in_fan_out=False,
            key_A=roles["A"],
            key_B=roles["B"],
            key_mid=roles.get("mid"),
        )

    def _through(self, name: str, mid: tuple[int, ...], A: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of A (rank, in, kh, kw) that a Tucker core (rank, rank, kh, kw) makes of a 1x1 A."""
        if len(mid) != 4 or mid[0] != mid[1] or mid[1] != A[0] or len(A) != 4 or A[2:] != (1, 1):
            self.fail(
                "factor_shape", name, f"has A {A} and a Tucker core {mid}, which do not fit", remedy=DAMAGED
            )
        return (mid[0], A[1], *mid[2:])

    def _scale(self, name: str, key: str | None, rank: int, scaling: Scaling | None) -> float:
        scale = 1.0
        if key is not None:
            alpha = self._alpha(name, key)
            if alpha == 0:
                self.zero.append(name)
            scale = 1.0 if alpha == 0 and self.zero_alpha_is_rank else alpha / rank
        if scaling is None:
            return scale
        stated = scaling.config.rank_of(scaling.path)
        if stated != rank:
            self.fail("rank_mismatch", name, f"has rank {rank} in the weights and {stated} in "
                      f"{scaling.config.file}",
                      remedy="Correct the ranks in the metadata, or remove it")  # fmt: skip
        wanted = scaling.config.scale_of(scaling.path)
        if key is not None and not math.isclose(wanted, scale, rel_tol=1e-2):
            self.fail("alpha_conflict", name, f"has the scale {scale:g} by its alpha tensor and {wanted:g} "
                      f"by {scaling.config.file}",
                      remedy="Remove the one that is wrong")  # fmt: skip
        return wanted

    def _alpha(self, name: str, key: str) -> float:
        try:
            alpha = self.weights.number(key)
        except ValueError as error:
            self.fail("alpha_invalid", name, f"has {key}, {error}; one number is needed",
                      remedy=DAMAGED)  # fmt: skip
        if not math.isfinite(alpha) or abs(alpha) > 1e9:
            self.fail("alpha_invalid", name, f"has {key} = {alpha:g}", remedy=DAMAGED)
        return alpha
