"""The command ``keys``: made for whoever runs the service, it works on the storage itself."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.cli_console import columns, note, print_json, say

if TYPE_CHECKING:
    from service.auth import Keys

_SCOPES = ("read", "write", "admin")


def add_commands(commands: Any) -> None:
    """Add the command to argparse's ``commands`` (the object of ``add_subparsers``)."""
    keys = commands.add_parser(
        "keys",
        help="create, list and revoke the keys of a service",
        description="Create, list and revoke keys, in the storage of the service: run it where the service "
        "runs, with its settings (MERGANSER_*).",
    )
    actions = keys.add_subparsers(title="actions", metavar="ACTION", required=True)

    create = actions.add_parser("create", help="make a key and print it, once")
    create.add_argument("--tenant", default="local", help="whose key (default: %(default)s)")
    create.add_argument(
        "--scope",
        action="append",
        choices=_SCOPES,
        help="what it is good for; write includes read, admin includes both (default: write)",
    )
    create.add_argument("--name", help="a note for the list")
    create.set_defaults(run=_create)

    listing = actions.add_parser("list", help="show the keys, without their secrets")
    listing.add_argument("--tenant", help="only the keys of this tenant")
    listing.add_argument("--json", action="store_true", help="as JSON")
    listing.set_defaults(run=_list)

    revoke = actions.add_parser("revoke", help="make a key useless for good")
    revoke.add_argument("id", metavar="ID", help="the id of the key, or the key itself")
    revoke.set_defaults(run=_revoke)

    for action in (create, listing, revoke):
        action.add_argument("--data", type=Path, metavar="DIR", help="the folder of `merganser up`")
        action.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _create(args: argparse.Namespace) -> int:
    token, key = _keys(args).create(args.tenant, args.scope or ["write"], name=args.name)
    note(f"key {key.id} of tenant {key.tenant} with {', '.join(key.scopes)}; it is shown only now")
    say(token)
    return 0


def _list(args: argparse.Namespace) -> int:
    found = _keys(args).every(args.tenant)
    if args.json:
        print_json([key.model_dump(mode="json", exclude={"sha256"}) for key in found])
        return 0
    rows = [
        (key.id, key.tenant, ",".join(key.scopes), key.created_at, key.revoked_at or "", key.name or "")
        for key in found
    ]
    say(columns(rows, ("id", "tenant", "scopes", "created", "revoked", "name")))
    return 0


def _revoke(args: argparse.Namespace) -> int:
    parts = args.id.split("_", 2)
    key = _keys(args).revoke(parts[1] if parts[0] == "mk" and len(parts) > 1 else args.id)
    note(f"key {key.id} of tenant {key.tenant} is revoked")
    return 0


def _keys(args: argparse.Namespace) -> Keys:
    from service.auth import Keys
    from service.settings import load_settings
    from service.storage import Storage

    settings = load_settings(**({"data_dir": args.data} if args.data is not None else {}))
    return Keys(Storage.open(settings.storage_location))
