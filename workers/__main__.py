"""``python -m workers up`` and ``python -m workers worker``: what ``merganser up`` and ``worker`` become.

Settings come from the environment (``MERGANSER_*``).
"""

from __future__ import annotations

import sys

from service.cli_errors import Parser, run_reporting


def main() -> int:
    """Run the role that the command line names until a signal ends it."""

    def command() -> int:
        parser = Parser(prog="merganser", allow_abbrev=False)
        parser.add_argument("role", choices=("up", "worker"))
        parser.add_argument("--debug", action="store_true")
        role = parser.parse_args().role
        from service.settings import load_settings

        settings = load_settings()
        if role == "up":
            from workers.up import run_up

            return run_up(settings)
        from workers.supervisor import run_worker

        return run_worker(settings)

    return run_reporting(command, debug="--debug" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
