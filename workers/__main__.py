"""``python -m workers up`` and ``python -m workers worker``: what the command line turns into."""

from __future__ import annotations

import sys

from service.cli_errors import Parser, run_reporting
from service.settings import load_settings


def main() -> int:
    """Run the role that is asked for, with the settings of the environment."""
    parser = Parser(prog="merganser", description=__doc__)
    parser.add_argument("role", choices=("up", "worker"))
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def run() -> int:
        options = parser.parse_args()
        settings = load_settings()
        if options.role == "worker":
            from workers.supervisor import run_worker

            return run_worker(settings)
        from workers.up import run_up

        return run_up(settings, _announce)

    return run_reporting(run, debug="--debug" in sys.argv)


def _announce(url: str) -> None:
    sys.stdout.write(f"Merganser is ready at {url} (Ctrl-C stops it)\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
