"""Tensor names of adapter families and extras that are not plain LoRA, each with its own refusal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from merging.errors import InputError

_Refusal = tuple[str, str]

_DORA = ("dora_unsupported", "a DoRA magnitude, which needs the base weights")
_ADALORA = ("adalora_unsupported", "AdaLoRA's singular values")
_VERA = ("vera_unsupported", "a VeRA vector")
_TOKENS = ("trainable_tokens_unsupported", "trained token rows")
_PROMPT = ("prompt_learning_unsupported", "trained prompts")
_ORTHOGONAL = ("oft_unsupported", "an orthogonal transformation")

# By a whole segment of the name, and by the part of a segment before its first '_' for numbered families.
_SEGMENTS: Mapping[str, _Refusal] = {
    "lora_magnitude_vector": _DORA,
    "dora_scale": _DORA,
    "lora_diag": ("kasa_unsupported", "KaSA's singular values"),
    "lora_E": _ADALORA,
    "ranknum": _ADALORA,
    "lora_mid": ("tucker_unsupported", "a Tucker core (LoCon with cp decomposition)"),
    "vera_lambda_b": _VERA,
    "vera_lambda_d": _VERA,
    "vera_A": _VERA,
    "vera_B": _VERA,
    "ia3_l": ("ia3_unsupported", "an (IA)3 scaling vector"),
    "token_adapter": _TOKENS,
    "prompt_embeddings": _PROMPT,
    "prompt_encoder": _PROMPT,
}
_PREFIXES: Mapping[str, _Refusal] = {
    "hada": ("loha_unsupported", "a LoHa (Hadamard product) factor"),
    "lokr": ("lokr_unsupported", "a LoKr (Kronecker product) factor"),
    "oft": _ORTHOGONAL,
    "boft": _ORTHOGONAL,
    "hra": _ORTHOGONAL,
}
_LORA_BIAS = ("lora_bias_unsupported", "a bias on a LoRA factor")
_DEPTH = 4  # the tail of a name: more segments than any known family uses


def refuse_unsupported(keys: Iterable[str], file: str) -> None:
    """Raise for the first tensor that shows the adapter to be more than, or other than, a LoRA."""
    for key in keys:
        refusal = _refusal(key)
        if refusal is not None:
            code, what = refusal
            raise InputError(
                code,
                f"{file}: tensor {key} is {what}; it cannot be merged as a LoRA",
                remedy="Merge it into its base model first, or convert it to a plain LoRA",
                where={"file": file, "tensor": key},
            )


def _refusal(key: str) -> _Refusal | None:
    tail = key.rsplit(".", _DEPTH)[-_DEPTH:]
    for segment in tail:
        found = _SEGMENTS.get(segment) or _PREFIXES.get(segment.partition("_")[0])
        if found is not None and (segment in _SEGMENTS or "_" in segment):
            return found
    if tail[-1] == "bias" and ("lora_A" in tail[-3:] or "lora_B" in tail[-3:]):
        return _LORA_BIAS
    return None
