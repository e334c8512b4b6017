"""Print what the package needs, for pip: ``requirements.py [--without NAME ...] [--extra NAME ...]``."""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from pathlib import Path


def main() -> int:
    """Read ``pyproject.toml`` of the folder above and print one requirement a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--without", action="append", default=[])
    parser.add_argument("--extra", action="append", default=[])
    options = parser.parse_args()
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in options.extra:
        lines += project["optional-dependencies"][extra]
    for line in lines:
        if re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0] not in options.without:
            sys.stdout.write(f"{line}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
