"""Do the vocabularies of the models agree? Then one tokenizer does for all of them. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from merging.errors import InputError
from merging.formats.files import sha256_of
from merging.formats.shards import read_json
from merging.formats.source import check_inside
from merging.mergekit.config import MergekitConfig

Find = Callable[[str], Path]

MAX_TOKENIZER_BYTES = 128 << 20
FILES = (
    "tokenizer.json",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
)
"""Where vocabularies stand. What is no JSON is compared as it is."""

ADDED = "added_tokens.json"


def tokenizer_folder(config: MergekitConfig, folders: Mapping[str, Path], resolve: Find) -> Path | None:
    """The folder of the model whose tokenizer the result gets; ``None`` for that of the donor.

    ``folders`` are those of the models that are merged. Raises ``mergekit_vocabulary`` if a source is asked
    for and the models' tokens differ. Without ``tokenizer_source`` nothing is looked at, as in mergekit: rows
    are merged as they stand.
    """
    source = config.tokenizer_source
    if source is None:
        return None
    named = None if source in ("base", "union") else resolve(source)
    folders = {**folders} if named is None else {**folders, source: named}
    kind = next((file for file in FILES if all((at / file).exists() for at in folders.values())), FILES[0])
    first, *others = folders.items()
    wanted = vocabulary(first[1] / kind, first[0])
    for model, folder in others:
        found = vocabulary(folder / kind, model)
        if found != wanted:
            raise _differs(source, first[0], wanted, model, found)
    return named


def vocabulary(path: Path, label: str) -> dict[str, int]:
    """Every token with its number, from one of ``FILES`` and what was added to it.

    Of a file that is no JSON the digest stands for the tokens. Raises ``mergekit_vocabulary``.
    """
    if not path.exists():
        raise InputError(
            "mergekit_vocabulary",
            f"{label} has no {path.name} to compare vocabularies with",
            remedy="Remove tokenizer_source if all models have one vocabulary.",
            where={"model": label, "file": path.name},
        )
    check_inside(path.parent, path)
    if path.name == "tokenizer.json":
        return _tokens(read_json(path, MAX_TOKENIZER_BYTES))
    data = read_json(path, MAX_TOKENIZER_BYTES) if path.suffix == ".json" else {sha256_of(path): 0}
    added = path.with_name(ADDED)
    if added.exists():
        check_inside(path.parent, added)
        data |= read_json(added, MAX_TOKENIZER_BYTES)
    return {token: number for token, number in data.items() if isinstance(number, int)}


def _tokens(data: Mapping[str, Any]) -> dict[str, int]:
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
