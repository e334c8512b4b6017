"""``hf://org/name[@revision]``: a model of the Hugging Face Hub, from its cache or downloaded. No torch here.

Only weights in safetensors, configurations and tokenizers are fetched. The service never comes here: it
resolves references itself.
"""

from __future__ import annotations

import re
from pathlib import Path

from merging.errors import InputError

SCHEME = "hf://"
PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.model.v3", "*.spm", "*.jinja", "*.jsonl")
_REFERENCE = re.compile(r"^hf://([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w./-]{1,200}))?$")


def snapshot(reference: str) -> Path:
    """The folder of a model. Raises ``model_reference_invalid``, ``extra_missing``, ``hub_failed``."""
    where = {"model": reference}
    match = _REFERENCE.match(reference)
    if match is None:
        raise InputError(
            "model_reference_invalid",
            f"{reference!r} is not of the form hf://org/name[@revision]",
            where=where,
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise InputError(
            "extra_missing",
            "models of the Hub need huggingface_hub, which is not installed",
            remedy="Install merganser[eval], or download the model and give its folder.",
            where=where,
        ) from error
    try:
        folder = snapshot_download(match[1], revision=match[2], allow_patterns=list(PATTERNS))
    except Exception as error:  # the client has many errors: not found, gated, offline, proxies
        problem = " ".join(str(error).split())[:200]
        raise InputError(
            "hub_failed", f"{reference} cannot be had from the Hub: {problem}", where=where
        ) from error
    return Path(folder)
