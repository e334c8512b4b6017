"""The commands ``reindex`` and ``gc``: for whoever runs the service, beside it and with its settings."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.cli_console import columns, note, print_json, say, size

if TYPE_CHECKING:
    from service.settings import Settings

_HOUR_SECONDS = 3600


def add_commands(commands: Any) -> None:
    """Add the commands to argparse's ``commands`` (the object of ``add_subparsers``)."""
    where = "It works on the Redis and the storage of a service: give it the settings (MERGANSER_*) of that."
    reindex = commands.add_parser(
        "reindex",
        help="rebuild Redis from the storage",
        description="Enter all models and merges of the storage into Redis again, and queue the merges that "
        f"had not ended. Safe at any time; doing it again changes nothing. {where}",
    )
    reindex.set_defaults(run=_reindex)

    collect = commands.add_parser(
        "gc",
        help="remove from the storage what nothing refers to",
        description="Remove content of no model, attempts that were not published, and uploads that broke "
        f"off. Safe beside a running service, which does it by itself every day. {where}",
    )
    collect.add_argument("--dry-run", action="store_true", help="only tell what would be removed")
    collect.add_argument(
        "--grace",
        type=float,
        default=24.0,
        metavar="HOURS",
        help="leave alone what is younger (default: %(default)s)",
    )
    collect.set_defaults(run=_collect)

    for command in (reindex, collect):
        command.add_argument("--data", type=Path, metavar="DIR", help="the folder of `merganser up`")
        command.add_argument("--json", action="store_true", help="as JSON")


def _reindex(args: argparse.Namespace) -> int:
    from merging.errors import MergeFailure
    from service.broker import connect
    from service.reindex import Reindexer
    from service.storage import Storage

    settings = _settings(args)
    with closing(connect(settings)) as connection:
        storage = Storage.open(settings.storage_location, patient=True)
        storage.require()
        done = Reindexer(storage, connection).run()
    if done is None:
        raise MergeFailure(
            "reindex_running", "another process is rebuilding the index", remedy="Wait until it has ended"
        )
    if args.json:
        print_json({"found": dict(done.found), "queued": done.queued, "bytes": done.size})
        return 0
    say(columns([(count, kind) for kind, count in sorted(done.found.items())], ("number", "found")))
    for merge_id in done.queued:
        note(f"queued again: {merge_id}")
    for tenant, stored in sorted(done.size.items()):
        note(f"{tenant} stores {size(stored)}")
    return 0


def _collect(args: argparse.Namespace) -> int:
    import time

    from merging.errors import InputError
    from service.broker import connect
    from service.collect import Collector
    from service.storage import Storage
    from service.uploads import expired

    if args.grace < 0:
        raise InputError("usage", "--grace must not be negative", where={"field": "--grace"})
    settings = _settings(args)
    with closing(connect(settings)) as connection:
        storage = Storage.open(settings.storage_location, patient=True)
        storage.require()
        uploads = [] if args.dry_run else expired(storage, connection, time.time())
        grace = args.grace * _HOUR_SECONDS
        done = Collector(storage, connection, grace=grace, dry=args.dry_run).run()
    if args.json:
        print_json(
            {
                "dry_run": args.dry_run,
                "objects": done.objects,
                "bytes": done.size,
                "expired_uploads": uploads,
                "corrected": done.corrected,
            }
        )
        return 0
    rows = [(kind, count, size(done.size[kind])) for kind, count in sorted(done.objects.items())]
    say(columns(rows, ("kind", "objects", "size")) if rows else "nothing to remove")
    if uploads:
        note(f"{len(uploads)} expired uploads removed")
    if args.dry_run and rows:
        note("nothing was removed; leave --dry-run out for that")
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    """The settings; without a Redis in them, with that of the `merganser up` which runs on the folder."""
    from service.embedded_redis import running_at
    from service.settings import load_settings

    settings = load_settings(**({"data_dir": args.data} if args.data is not None else {}))
    if settings.redis_url is None:
        found = running_at(settings.data_dir)
        if found:
            return settings.with_redis(found)
    return settings
