"""What must be true after a recovery, whatever it was from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from service.client import Client
from tests.running import Up, until
from tests.workers.split import Split

Deployment = Up | Split


def finished_once(
    deployment: Deployment, client: Client, merge_id: str, attempts: tuple[int, ...]
) -> dict[str, Any]:
    """The merge, after a look at everything that must exist exactly once."""
    done = client.wait(merge_id)
    assert done["state"] == "succeeded", done
    assert done["attempts"] in attempts
    states = [data["state"] for _, kind, data in client.events(merge_id) if kind == "state"]
    assert states == ["queued", *["running"] * done["attempts"], "succeeded"]
    folder = deployment.storage / "merges" / "local" / merge_id / "attempts"

    def with_files() -> list[Path]:
        return [path for path in folder.iterdir() if any(file.is_file() for file in path.rglob("*"))]

    until(lambda: len(with_files()) == 1, what="one attempt is stored")
    assert {file.name for file in with_files()[0].rglob("*")} == {
        entry["path"] for entry in done["result"]["files"]
    }
    return done


def recovery(client: Client, merge_id: str, struck: float, attempts: int) -> float:
    """Seconds from a moment to the first event after it that tells of work: of the last attempt."""
    running = 0
    for event_id, kind, data in client.events(merge_id):
        moment = int(event_id.partition("-")[0]) / 1000
        running += data.get("state") == "running"
        if moment > struck and running == attempts and (kind == "progress" or data["state"] == "succeeded"):
            return moment - struck
    raise AssertionError("no work was reported")


def nothing_in_hand(deployment: Deployment) -> None:
    """Wait until no queue, no list on the way and no registry holds a job, and no scratch folder is left."""
    try:
        until(lambda: not _in_hand(deployment), what="nothing is left over")
    except AssertionError:
        assert _in_hand(deployment) == []


def _in_hand(deployment: Deployment) -> list[str]:
    with deployment.redis() as connection:
        held = [*connection.keys("rq:queue:merges*"), *connection.keys("rq:wip:*")]
        held = [key for key in held if b":first_seen:" not in key]  # a note of RQ, and no job
        held += [key for key in (b"mg:active", b"mg:unsaved") if connection.exists(key)]
    found = [key.decode() for key in held]
    return [*found, *(path.name for path in (deployment.data / "scratch").iterdir())]
