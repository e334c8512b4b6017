"""What every adapter reader returns: modules with their factors, whatever the file family."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from merging.errors import InputError
from merging.formats.experts import Expert, slice_factors
from merging.formats.files import sha256_of
from merging.formats.guard import TensorInfo
from merging.formats.peft_config import AdapterConfig
from merging.formats.peft_keys import Kind
from merging.formats.tensors import TensorFile

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Module:
    """One adapted layer: ``delta = scale * B @ A`` with B (m, rank) and A (rank, n).

    For a linear layer m is out and n is in features, also where the base stores the transpose
    (``fan_in_fan_out``). For an embedding m is the width and n the vocabulary, and the base stores the
    transpose of the delta. For a convolution n = in * kh * kw. ``weight_shape`` is that of the base
    weight as stored; ``key_A`` and ``key_B`` are the keys in the file. With a Tucker core ``key_mid``
    (rank, rank, kh, kw) the stored A is a 1x1 convolution, and A is the core times it.
    With ``expert`` the keys hold the factors of all experts.
    """

    name: str
    kind: Kind
    m: int
    n: int
    rank: int
    scale: float
    dtype: str
    weight_shape: tuple[int, ...]
    fan_in_fan_out: bool
    key_A: str  # noqa: N815
    key_B: str  # noqa: N815
    key_mid: str | None = None
    expert: Expert | None = None


class Adapter:
    """An opened adapter. Only the header has been read; tensors are read one at a time on request.

    ``modules`` is sorted by name. ``full_tensors`` (sorted too) are tensors that replace those of the
    base (``modules_to_save``), by their name without PEFT's prefix.
    """

    def __init__(
        self,
        *,
        label: str,
        path: Path,
        format: str,  # noqa: A002
        files: tuple[Path, ...],
        weights: TensorFile,
        modules: Mapping[str, Module],
        full_keys: Mapping[str, str] | None = None,
        config: AdapterConfig | None = None,
        base_model: str | None = None,
        base_revision: str | None = None,
        warnings: tuple[str, ...] = (),
    ) -> None:
        self.label = label
        self.path = path
        self.format = format
        self.config = config
        self.base_model = base_model
        self.base_revision = base_revision
        self.warnings = warnings
        self.modules: Mapping[str, Module] = MappingProxyType(dict(sorted(modules.items())))
        self._full_keys = dict(sorted((full_keys or {}).items()))
        self.full_tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: weights.header.tensors[key] for name, key in self._full_keys.items()}
        )
        self._files = files
        self._weights = weights
        self._pair: tuple[str, Any, Any] = ("", None, None)
        self._pair_lock = threading.Lock()

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) over the names and digests of the files that decide the adapter's meaning."""
        return self.digest_by(sha256_of)

    def digest_by(self, sha256: Callable[[Path], str]) -> str:
        """:attr:`digest` for a caller who knows the sha256 (hex) of each file."""
        total = hashlib.sha256()
        for path in self._files:
            # a single file may have any name; its content is what counts
            name = path.name if len(self._files) > 1 else "weights"
            total.update(f"{sha256(path)}  {name}\n".encode())
        return total.hexdigest()

    @property
    def metadata(self) -> Mapping[str, str]:
        """The string metadata of the weights file."""
        return self._weights.header.metadata

    def factors(
        self, name: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """B (m, r) and A (r, n) of a module with ``B @ A = delta``: the scale is folded in.

        Both are contiguous, in ``dtype`` (default: float32, or float64 if stored so). The square root of
        |scale| goes into each factor and the sign into B, so that the two stay balanced. Raises
        :class:`InputError` ``non_finite_tensor``.
        """
        import torch

        module = self.modules[name]
        if dtype is None:
            dtype = torch.float64 if module.dtype == "F64" else torch.float32
        root = math.sqrt(abs(module.scale))
        parts = []
        for key, factor in ((module.key_B, math.copysign(root, module.scale)), (module.key_A, root)):
            stored = self._stored(module, key)
            part = stored.flatten(1).to(device=device, dtype=dtype)  # ours alone, cast or not
            if key == module.key_A and module.key_mid is not None:
                # delta = up[o,s] mid[s,t,h,w] down[t,i]: the core folds into A, (r, in * kh * kw)
                mid = self._weights.tensor(module.key_mid).to(device=device, dtype=dtype)
                part = torch.einsum("sthw,ti->sihw", mid, part).flatten(1)
            parts.append(part if factor == 1.0 else part.mul_(factor))
            self._check_finite(parts[-1], key, module.name)
        return parts[0], parts[1]

    def _stored(self, module: Module, key: str) -> torch.Tensor:
        """The factor under ``key``; the experts of a pair are cut from one reading of it."""
        if module.expert is None:
            return self._weights.tensor(key)
        import torch

        with self._pair_lock:
            if self._pair[0] != module.expert.owner:
                B, A = self._weights.tensor(module.key_B), self._weights.tensor(module.key_A)
                self._pair = (module.expert.owner, B, A)
            _, B, A = self._pair
        own = slice_factors(module.expert, B, A)
        return own[0 if key == module.key_B else 1].clone(memory_format=torch.contiguous_format)

    def full_tensor(self, name: str) -> torch.Tensor:
        """A tensor of ``full_tensors`` in its stored dtype. Raises ``non_finite_tensor``."""
        key = self._full_keys[name]
        tensor = self._weights.tensor(key)
        if tensor.is_floating_point():
            self._check_finite(tensor, key, name)
        return tensor

    def close(self) -> None:
        """Close the weights file."""
        self._pair = ("", None, None)
        self._weights.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Adapter {self.label!r}: {self.format}, {len(self.modules)} modules>"

    def _check_finite(self, tensor: torch.Tensor, key: str, module: str) -> None:
        if tensor.numel() == 0:
            return
        # amin and amax carry NaN and infinity; one pass and no mask in memory
        low, high = tensor.aminmax()
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            raise InputError(
                "non_finite_tensor",
                f"{self.label}: tensor {key} holds NaN or infinite values",
                remedy="The adapter is damaged or its training diverged; train or export it again",
                where={"file": self._weights.path.name, "module": module, "model": self.label},
            )
