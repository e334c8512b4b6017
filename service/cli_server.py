"""Commands that run servers: ``up``, ``serve`` and ``worker``.

The API is ours to start. Everything with a worker in it lives in the package ``workers``, which this
package does not import: this process becomes ``python -m workers`` instead.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NoReturn


def add_commands(commands: Any) -> None:
    """Add the server commands to argparse's ``commands`` (the object of ``add_subparsers``)."""
    settings = "Further settings come from the environment: MERGANSER_*, see docs/cli.md."
    up = commands.add_parser(
        "up",
        help="run everything on this machine: API, Redis, storage, workers",
        description=f"Run API, Redis, storage and workers in one command. {settings}",
    )
    up.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    up.add_argument("--port", type=int, help="port to listen on (0: any free one)")
    up.add_argument("--data", type=Path, metavar="DIR", help="where everything is kept")
    up.set_defaults(run=_up)

    serve = commands.add_parser(
        "serve",
        help="run the API alone",
        description=f"Run the API alone, for a split deployment. {settings}",
    )
    serve.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to listen on")
    serve.set_defaults(run=_serve)

    worker = commands.add_parser(
        "worker",
        help="run the workers alone, one per device",
        description=f"Run the workers alone, for a split deployment. {settings}",
    )
    worker.set_defaults(run=_worker)


def _up(args: argparse.Namespace) -> int:
    options = {"HOST": args.host, "PORT": args.port, "DATA_DIR": args.data}
    _become_workers("up", options, debug=args.debug)


def _worker(args: argparse.Namespace) -> int:
    _become_workers("worker", {}, debug=args.debug)


def _serve(args: argparse.Namespace) -> int:
    from service.serve import run_serve
    from service.settings import load_settings

    given = {"host": args.host, "port": args.port}
    run_serve(load_settings(**{name: value for name, value in given.items() if value is not None}))
    return 0


def _become_workers(role: str, options: dict[str, object], *, debug: bool) -> NoReturn:
    """Replace this process by ``python -m workers ROLE``, options given as settings."""
    environment = dict(os.environ)
    for name, value in options.items():
        if value is not None:
            environment[f"MERGANSER_{name}"] = str(value)
    command = [sys.executable, "-m", "workers", role, *["--debug"] * debug]
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)
