"""Tensor names of adapter families and extras that are not plain LoRA, each with its own refusal."""

from __future__ import annotations

import re
from collections.abc import Iterable

from merging.errors import InputError

_REFUSED: tuple[tuple[str, str, str], ...] = (
    (r"\.lora_magnitude_vector(?:\.|\Z)|\.dora_scale\Z", "dora_unsupported",
     "a DoRA magnitude, which needs the base weights"),
    (r"\.lora_[AB](?:\.[^.]+)?\.bias\Z", "lora_bias_unsupported", "a bias on a LoRA factor"),
    (r"\.lora_diag(?:\.|\Z)", "kasa_unsupported", "KaSA's singular values"),
    (r"\.lora_E(?:\.|\Z)|\.ranknum(?:\.|\Z)", "adalora_unsupported", "AdaLoRA's singular values"),
    (r"\.hada_[wt][12]", "loha_unsupported", "a LoHa (Hadamard product) factor"),
    (r"\.lokr_[wt][12]", "lokr_unsupported", "a LoKr (Kronecker product) factor"),
    (r"\.vera_lambda_[bd](?:\.|\Z)|\bvera_[AB](?:\.|\Z)", "vera_unsupported", "a VeRA vector"),
    (r"\.ia3_l(?:\.|\Z)", "ia3_unsupported", "an (IA)3 scaling vector"),
    (r"\.(?:oft|boft|hra)_[A-Za-z]+(?:\.|\Z)", "oft_unsupported", "an orthogonal transformation"),
    (r"\.token_adapter\.|\.trainable_tokens_", "trainable_tokens_unsupported",
     "trained token rows"),
    (r"\.lora_mid\.weight\Z", "tucker_unsupported", "a Tucker core (LoCon with cp decomposition)"),
    (r"(?:\A|\.)prompt_embeddings(?:\.|\Z)|(?:\A|\.)prompt_encoder\.",
     "prompt_learning_unsupported", "trained prompts"),
)  # fmt: skip
_ANY = re.compile("|".join(f"(?:{pattern})" for pattern, _, _ in _REFUSED))
_PATTERNS = tuple((re.compile(pattern), code, what) for pattern, code, what in _REFUSED)


def refuse_unsupported(keys: Iterable[str], file: str) -> None:
    """Raise for the first tensor that shows the adapter to be more than, or other than, a LoRA."""
    for key in filter(_ANY.search, keys):
        for pattern, code, what in _PATTERNS:
            if pattern.search(key):
                raise InputError(
                    code,
                    f"{file}: tensor {key} is {what}; it cannot be merged as a LoRA",
                    remedy="Merge it into its base model first, or convert it to a plain LoRA",
                    where={"file": file, "tensor": key},
                )
