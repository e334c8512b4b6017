"""The command line, ``merganser``: assembles the commands and runs one.

Plain argparse, because ``--help`` must not wait for imports.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from merging import __version__
from service import cli_basis, cli_client, cli_keys, cli_local, cli_server, cli_stats, cli_store
from service.cli_errors import Parser, run_reporting


def build() -> Parser:
    """The command tree. Each command sets ``run``, a function of the parsed arguments."""
    parser = Parser(
        prog="merganser",
        description="Merge LoRA adapters: on this machine, or as a service with an HTTP API.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"merganser {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for family in (cli_local, cli_stats, cli_basis, cli_client, cli_server, cli_keys, cli_store):
        family.add_commands(commands)
    for command in commands.choices.values():
        command.allow_abbrev = False
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)

    def command() -> int:
        options = build().parse_args(given or ["--help"])
        status: int = options.run(options)
        return status

    return run_reporting(command, debug="--debug" in given)
