"""Tensor names of adapter families and extras that are not plain LoRA, each with its own refusal."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from merging.errors import InputError
from merging.formats.peft_config import CONVERT

_Refusal = tuple[str, str]

_DORA = ("dora_unsupported", "a DoRA magnitude, which needs the base weights")
_ADALORA = ("adalora_unsupported", "AdaLoRA's singular values")
_VERA = ("vera_unsupported", "a VeRA vector")
_TOKENS = ("trainable_tokens_unsupported", "trained token rows")
_PROMPT = ("prompt_learning_unsupported", "trained prompts")
_IA3 = ("ia3_unsupported", "an (IA)3 scaling vector")
_NORM = ("norm_delta_unsupported", "an update of a normalisation layer")
_DENSE = ("dense_delta_unsupported", "a dense update of a whole tensor")
_ORTHOGONAL = ("oft_unsupported", "an orthogonal transformation")

# By a whole segment of the name, and by the part of a segment before its first '_' for numbered families.
_SEGMENTS: Mapping[str, _Refusal] = {
    "lora_magnitude_vector": _DORA,
    "dora_scale": _DORA,
    "lora_diag": ("kasa_unsupported", "KaSA's singular values"),
    "lora_E": _ADALORA,
    "ranknum": _ADALORA,
    "vera_lambda_b": _VERA,
    "vera_lambda_d": _VERA,
    "vera_A": _VERA,
    "vera_B": _VERA,
    "ia3_l": _IA3,
    "token_adapter": _TOKENS,
    "prompt_embeddings": _PROMPT,
    "prompt_encoder": _PROMPT,
}
# By the last segment only: modules may be called so too.
_LAST: Mapping[str, _Refusal] = {
    "on_input": _IA3,
    "w_norm": _NORM,
    "b_norm": _NORM,
    "diff": _DENSE,
    "diff_b": _DENSE,
    "set_weight": _DENSE,
    "reshape_weight": ("reshape_weight_unsupported", "a new shape for the base weight"),
}
_PREFIXES: Mapping[str, _Refusal] = {
    "hada": ("loha_unsupported", "a LoHa (Hadamard product) factor"),
    "lokr": ("lokr_unsupported", "a LoKr (Kronecker product) factor"),
    "oft": _ORTHOGONAL,
    "boft": _ORTHOGONAL,
    "hra": _ORTHOGONAL,
}
_SPLIT = ("split_qkv_unsupported", "one of several factors of a fused projection")
_GLORA = ("glora_unsupported", "a GLoRA factor, which multiplies the base weights")
_GLORA_PARTS = ("a1", "a2", "b1", "b2")
_LORA_BIAS = ("lora_bias_unsupported", "a bias on a LoRA factor")
_DEPTH = 4  # the tail of a name: more segments than any known family uses


def refuse_unsupported(keys: Collection[str], file: str) -> None:
    """Raise for the first tensor that shows the adapter to be more than, or other than, a LoRA."""
    names = frozenset(keys)
    for key in keys:
        refusal = _refusal(key) or (_GLORA if _is_glora(key, names) else None)
        if refusal is not None:
            code, what = refusal
            raise InputError(
                code,
                f"{file}: tensor {key} is {what}; it cannot be merged as a LoRA",
                remedy=CONVERT,
                where={"file": file, "tensor": key},
            )


def _refusal(key: str) -> _Refusal | None:
    tail = key.rsplit(".", _DEPTH)[-_DEPTH:]
    for segment in tail:
        found = _SEGMENTS.get(segment) or _PREFIXES.get(segment.partition("_")[0])
        if found is not None and (segment in _SEGMENTS or "_" in segment):
            return found
    if tail[-1] in _LAST:
        return _LAST[tail[-1]]
    if tail[-1] == "bias" and ("lora_A" in tail[-3:] or "lora_B" in tail[-3:]):
        return _LORA_BIAS
    if len(tail) > 2 and tail[-3] in ("lora_up", "lora_down") and tail[-2].isdigit():
        return _SPLIT
    return None


def _is_glora(key: str, names: frozenset[str]) -> bool:
    """Whether all four factors of GLoRA are there; their names are too short to be telling alone."""
    name, _, part = key.removesuffix(".weight").rpartition(".")
    return part in _GLORA_PARTS and all(f"{name}.{part}.weight" in names for part in _GLORA_PARTS)
