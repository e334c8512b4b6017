"""Commands that talk to a running service: ``submit``, ``push`` and ``pull``."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.cli_console import ShowProgress, note, progress, say

if TYPE_CHECKING:
    from service.client import Client
    from service.work import Configuration

DEFAULT_URL = "http://127.0.0.1:8642"


def add_commands(commands: Any) -> None:
    """Add the client commands to argparse's ``commands`` (the object of ``add_subparsers``)."""
    submit = _client_command(
        commands,
        "submit",
        "submit a recipe to a service",
        "Submit a recipe and print the id of the merge. Its models are models of the service.",
    )
    submit.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML or JSON file")
    submit.add_argument(
        "--push",
        metavar="NS",
        help="upload the recipe's local models, and the data that it looks at, into this namespace first",
    )
    submit.add_argument("--wait", action="store_true", help="follow the merge to its end")
    submit.add_argument("--out", type=Path, metavar="DIR", help="wait, then download the result here")
    submit.add_argument("--quiet", action="store_true", help="no progress")
    submit.set_defaults(run=_submit)

    push = _client_command(
        commands,
        "push",
        "upload an adapter",
        "Upload an adapter directory as a new revision of a model.",
    )
    push.add_argument(
        "directory",
        type=Path,
        metavar="DIR",
        help="adapter directory; or one file: samples, statistics or a head",
    )
    push.add_argument("model", metavar="NS/NAME", help="name of the model")
    push.set_defaults(run=_push)

    pull = _client_command(
        commands,
        "pull",
        "download a model, or the result of a merge",
        "Download a model, or the result of a merge by its id.",
    )
    pull.add_argument("model", metavar="NS/NAME[@REVISION]", help="a model, or the id of a merge")
    pull.add_argument("directory", type=Path, metavar="DIR", help="where to write")
    pull.set_defaults(run=_pull)


def _client_command(commands: Any, name: str, summary: str, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=f"{text} The key comes from MERGANSER_API_KEY."
    )
    command.add_argument(
        "--url",
        default=os.environ.get("MERGANSER_URL", DEFAULT_URL),
        help="the service (default: MERGANSER_URL, else %(default)s)",
    )
    return command


def _submit(args: argparse.Namespace) -> int:
    work = _read(args.recipe)
    with _connect(args) as client:
        if args.push is not None:
            work = _with_pushed(client, work, args.push)
        merge_id = client.submit(work if isinstance(work, dict) else work.document)["id"]
        if not (args.wait or args.out):
            say(merge_id)
            return 0
        note(f"merge {merge_id}")
        with progress(quiet=args.quiet) as show:
            merge = client.wait(merge_id, partial(show_event, show))
        if merge["result"] is None:
            from service.client_errors import failure

            raise failure(merge)
        if args.out is None:
            say(merge_id)
        else:
            client.download_result(merge_id, args.out)
            say(str(args.out))
    return 0


def show_event(show: ShowProgress, kind: str, data: dict[str, Any]) -> None:
    """Show an event of a merge: ``progress`` as it is, ``state`` by its name."""
    if kind == "progress":
        show(data["phase"], data["progress"], data.get("message") or "")
    elif kind == "state":
        show(data["state"], 1.0 if data["state"] == "succeeded" else 0.0, "")


def _read(path: Path) -> Configuration | dict[str, Any]:
    """The mergekit configuration or the recipe in a file. The service decides what could be either."""
    from merging.mergekit.config import is_either
    from merging.mergekit.detect import claimed
    from merging.recipe import Recipe, read_document
    from service.work import Configuration

    config = claimed(path, Path)
    if config is not None:
        return Configuration.read(*config)
    recipe = Recipe.load(path).model_dump(mode="json")
    document, _ = read_document(path)
    return document if is_either(document) else recipe


def _with_pushed(
    client: Client, work: Configuration | dict[str, Any], ns: str
) -> Configuration | dict[str, Any]:
    """The same with local files uploaded: all of a configuration, of a recipe what its merge reads."""
    if not isinstance(work, dict):
        named = dict.fromkeys(work.references().values())
        return work.renamed({model: _pushed(client, model, ns) for model in named})

    from merging.calibration.references import data_references
    from merging.recipe import Recipe
    from service.data_uploads import looks_at_data, starts_from_nothing
    from service.remote.imports import renamed

    recipe = Recipe.load(work)
    names = {}
    if not starts_from_nothing(recipe):
        names = {entry.model: _pushed(client, entry.model, ns) for entry in recipe.models}
    reads = recipe.output.format == "checkpoint" or looks_at_data(recipe)
    if recipe.base_model is not None and reads and recipe.base_model not in names:
        names[recipe.base_model] = _pushed(client, recipe.base_model, ns)
    for field, reference in data_references(recipe).items():
        if reference not in names:
            names[reference] = _pushed(client, reference, ns, kind=field.rpartition(".")[2])
    found: dict[str, Any] = renamed(recipe, names).model_dump(mode="json")
    return found


def _pushed(client: Client, model: str, ns: str, kind: str = "") -> str:
    """A reference to a model or to data; what is local is uploaded, and then it is its revision there.

    Samples and heads are often called like the adapters that they are of, so ``kind`` is added to the name.
    """
    path = Path(model)
    if not (path.exists() if kind else path.is_dir()):
        return model
    name = f"{path.stem}-{kind}" if path.is_file() else path.resolve().name
    revision = client.push_dir(path, f"{ns}/{name}")
    note(f"pushed {path} as {revision['model']}")
    return f"{revision['model']}@{revision['revision']}"


def _push(args: argparse.Namespace) -> int:
    with _connect(args) as client:
        revision = client.push_dir(args.directory, args.model)
    for warning in revision["warnings"]:
        note(f"warning: {warning}")
    say(f"{revision['model']}@{revision['revision']}")
    return 0


def _pull(args: argparse.Namespace) -> int:
    with _connect(args) as client:
        client.pull(args.model, args.directory)
    say(str(args.directory))
    return 0


def _connect(args: argparse.Namespace) -> Client:
    from service.client import Client

    return Client(args.url, key=os.environ.get("MERGANSER_API_KEY"))
