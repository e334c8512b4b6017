"""Bring the models of a recipe that lie on other hubs; afterwards the recipe names their commits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from merging.calibration.references import renamed_data
from merging.errors import InputError
from merging.recipe import Recipe, TakeFrom
from service.remote.hub import RemoteHub
from service.remote.references import Hubs, is_remote

Connect = Callable[[str, str | None], RemoteHub]
"""From an endpoint and a token to the hub."""


@dataclass(frozen=True)
class Imported:
    """A recipe whose references to other hubs are pinned, and where what they mean lies."""

    recipe: Recipe
    folders: dict[str, Path] = field(default_factory=dict)
    """From pinned reference to folder."""
    commits: dict[str, str] = field(default_factory=dict)
    """From reference as it was asked for to commit."""


def remote_models(recipe: Recipe) -> tuple[str, ...]:
    """The references of a recipe to other hubs, each once."""
    named = [entry.model for entry in recipe.models]
    named += [recipe.base_model] if recipe.base_model is not None else []
    return tuple(dict.fromkeys(text for text in named if is_remote(text)))


def bring(
    tenant: str,
    recipe: Recipe,
    hubs: Hubs,
    folder: Path,
    *,
    limit: int,
    tick: Callable[[str], None] = lambda message: None,
    demand: Callable[[int], None] = lambda size: None,
    connect: Connect = RemoteHub,
) -> Imported:
    """Look up and download what lies on other hubs, at most ``limit`` bytes in all.

    Each reference is looked up once, so that a branch that moves meanwhile makes no difference. ``tick`` is
    told what comes next, ``demand`` how many bytes; both may raise.
    Raises ``hub_too_large`` and the errors of :class:`RemoteHub`.
    """
    names: dict[str, str] = {}
    folders: dict[str, Path] = {}
    commits: dict[str, str] = {}
    total = 0
    for text in remote_models(recipe):
        reference = hubs.find(text)
        hub = connect(reference.endpoint, hubs.token_for(tenant, reference.endpoint, reference.repo))
        tick(f"looking up {text}")
        snapshot = hub.look_up(reference)
        total += snapshot.size
        if total > limit:
            raise InputError(
                "hub_too_large",
                f"{text} has {snapshot.size} bytes; all imports of a merge may have {limit}",
                where={"model": text},
            )
        pinned = reference.at(snapshot.commit)
        names[text], commits[text] = pinned, snapshot.commit
        if pinned not in folders:
            folders[pinned] = folder / f"{len(folders)}-{reference.repo.partition('/')[2]}"
            demand(snapshot.size)
            hub.download(snapshot, folders[pinned], tick)
    return Imported(renamed(recipe, names), folders, commits)


def renamed(recipe: Recipe, names: dict[str, str]) -> Recipe:
    """The recipe with other references for its models."""
    models = tuple(
        entry.model_copy(update={"model": names.get(entry.model, entry.model)}) for entry in recipe.models
    )
    update: dict[str, object] = {"models": models}
    saved = recipe.modules_to_save
    if isinstance(saved, TakeFrom) and saved.take in names:
        update["modules_to_save"] = TakeFrom(take=names[saved.take])
    if recipe.base_model in names:
        update["base_model"] = names[recipe.base_model]
    return renamed_data(recipe.model_copy(update=update), names)
