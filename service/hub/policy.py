"""How clients are told to send their files, and which files are left out."""

from __future__ import annotations

import re
from typing import Literal

Mode = Literal["regular", "lfs"]

REGULAR_LIMIT = 256 << 20
"""Most bytes of one file inside a commit."""
_REGULAR_TOTAL = 640 << 20
"""Most bytes of all files inside a commit; as base64 they stay below the limit of its body."""
_ALWAYS_REGULAR = 4 << 20
_CLIENT = re.compile(r"\bhf_hub/(\d+)\.")
_TRAINING_STATE = re.compile(
    r"^(training_args\.bin|optimizer\.(pt|bin)|scheduler\.(pt|bin)|scaler\.pt|rng_state(_\d+)?\.pth"
    r"|events\.out\.tfevents\..*)$"
)


class Budget:
    """The modes for the files of one commit.

    Since version 1 ``huggingface_hub`` sends what is not in the commit by the Xet protocol, which is not
    spoken here, unless the user turns that off. So files go into the commit as long as they can; older
    clients, which would hold them in memory, use LFS.
    """

    def __init__(self, user_agent: str) -> None:
        found = _version(user_agent)
        self._regular = REGULAR_LIMIT if found is not None and found >= 1 else _ALWAYS_REGULAR
        self._left = _REGULAR_TOTAL

    def mode(self, size: int) -> Mode:
        """The mode for the next file."""
        if size > min(self._regular, self._left):
            return "lfs"
        self._left -= size
        return "regular"


def before_one(user_agent: str) -> bool:
    """Whether the client is ``huggingface_hub`` 0.x, which misreads addresses below an endpoint with a path.

    It is told ``hf://`` addresses instead, and never that a file has not changed, since it would then make
    up such an address by itself.
    """
    return _version(user_agent) == 0


def _version(user_agent: str) -> int | None:
    found = _CLIENT.search(user_agent)
    return int(found.group(1)) if found else None


def ignored(path: str) -> bool:
    """Files that clients send along, that belong to no model, and that they are told to leave out.

    Hidden files (``.gitattributes``), what a training run needs to go on (those are pickles), and its log.
    """
    parts = path.split("/")
    return any(part.startswith(".") for part in parts) or bool(_TRAINING_STATE.match(parts[-1]))
