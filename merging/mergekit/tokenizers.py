"""Do the vocabularies of the models agree? Then every ``tokenizer_source`` means the donor's. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from merging.errors import InputError
from merging.formats.shards import read_json
from merging.formats.source import check_inside
from merging.formats.tensor_set import TensorSet
from merging.mergekit.config import MergekitConfig

MAX_TOKENIZER_BYTES = 128 << 20


def check_tokenizers(
    config: MergekitConfig, models: Mapping[str, TensorSet], resolve: Callable[[str], Path]
) -> None:
    """Raises ``mergekit_vocabulary`` if a source is asked for and the models' tokens differ.

    Without ``tokenizer_source`` nothing is looked at, as in mergekit: rows are merged as they stand.
    """
    if config.tokenizer_source is None:
        return
    folders = {model: found.path for model, found in models.items()}
    if config.tokenizer_source not in ("base", "union"):
        folders[config.tokenizer_source] = resolve(config.tokenizer_source)
    first, *others = folders.items()
    wanted = vocabulary(first[1], first[0])
    for model, folder in others:
        found = vocabulary(folder, model)
        if found != wanted:
            raise _differs(config.tokenizer_source, first[0], wanted, model, found)


def vocabulary(folder: Path, label: str) -> dict[str, int]:
    """Every token with its number, from ``tokenizer.json``. Raises ``mergekit_vocabulary``."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise InputError(
            "mergekit_vocabulary",
            f"{label} has no tokenizer.json to compare vocabularies with",
            remedy="Remove tokenizer_source if all models have one vocabulary.",
            where={"model": label, "file": path.name},
        )
    check_inside(folder, path)
    data = read_json(path, MAX_TOKENIZER_BYTES)
    tokens: dict[str, int] = {}
    model = data.get("model")
    vocab: Any = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        tokens.update({token: number for token, number in vocab.items() if isinstance(number, int)})
    elif isinstance(vocab, list):  # unigram: pairs of token and score
        tokens.update({pair[0]: i for i, pair in enumerate(vocab) if isinstance(pair, list) and pair})
    added = data.get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("id"), int):
            tokens[str(entry.get("content"))] = entry["id"]
    return tokens


def _differs(
    source: str, first: str, wanted: Mapping[str, int], second: str, found: Mapping[str, int]
) -> InputError:
    token = next(token for token in sorted({**wanted, **found}) if wanted.get(token) != found.get(token))
    return InputError(
        "mergekit_vocabulary",
        f"tokenizer_source {source} needs equal vocabularies, but {first} has {token[:40]!r} at "
        f"{wanted.get(token)} and {second} at {found.get(token)}",
        remedy="Give the models one tokenizer first (for instance with mergekit-tokensurgeon).",
        where={"model": second, "field": "tokenizer_source"},
    )
