"""A small client of the HTTP API: push, plan, submit, follow, download.

Uploads and downloads stream; what is downloaded is checked against its sha256 and appears at its place
all at once. A problem of the service is raised as the error that it describes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx

from merging.errors import InputError, MergeError, MergeFailure
from service.client_errors import Unreachable, failure, problem_of, unreachable
from service.client_uploads import PARTS_ABOVE, PartsNotSent, send_in_parts
from service.names import RESULTS, check_path, parse_reference

CHUNK = 1 << 20
_RETRY_SECONDS = 20.0
_FINAL = ("succeeded", "failed", "cancelled")

OnEvent = Callable[[str, dict[str, Any]], None]
"""Called with the kind of an event, ``state`` or ``progress``, and its data."""


class Client:
    """A connection to one service. Use it as a context manager."""

    def __init__(
        self, url: str, *, key: str | None = None, timeout: float = 60.0, parts_above: int = PARTS_ABOVE
    ) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=timeout, trust_env=False)
        self._bare = httpx.Client(timeout=timeout, trust_env=False)  # for signed URLs
        self._parts_above = parts_above

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bare.close()
        self._http.close()

    # models

    def push_dir(self, folder: str | Path, model: str) -> dict[str, Any]:
        """Upload the files of ``folder``, or one file, as a revision of ``ns/name``; the revision.

        Hidden files and those that the service does not take, such as a trainer's pickles beside the
        safetensors, are left out. Big files are sent in parts: what arrived before a break is not sent again.
        """
        folder = Path(folder)
        path = _model_path(model)
        if folder.is_file():
            files, folder = [folder], folder.parent
        elif folder.is_dir():
            files = _uploadable(folder)
        else:
            raise InputError("not_a_folder", f"{folder} is not a folder", where={"file": str(folder)})
        sent: dict[str, str] = {}
        for file in files:
            name = file.relative_to(folder).as_posix()
            sent[name] = digest = _digest(file)
            if file.stat().st_size > self._parts_above:
                self._push_parts(file, model, name, digest)
                continue
            self._call(
                "PUT",
                f"{path}/files/{quote(name)}",
                content=_chunks(file),
                headers={
                    "Content-Length": str(file.stat().st_size),
                    "Content-Type": "application/octet-stream",
                    "Content-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(digest)).decode()}:",
                },
            )
        return self._object("POST", f"{path}/commit", json={"files": sent})

    def _push_parts(self, file: Path, model: str, name: str, sha256: str) -> None:
        announcement = {"model": model, "path": name, "size": file.stat().st_size, "sha256": sha256}
        try:
            send_in_parts(self._call, self._bare, file, announcement)
        except PartsNotSent as error:
            raise Unreachable(
                "upload_interrupted",
                f"{name} was not sent to its end: {error}",
                remedy="Push it again: what has arrived is not sent twice",
                where={"file": name},
            ) from error

    def pull(self, reference: str, out: str | Path) -> dict[str, Any]:
        """Download ``ns/name[@revision]``, or the result of a merge by its id, into a new folder."""
        merge_id = reference.removeprefix(f"{RESULTS}/")
        if merge_id.startswith("mrg_"):
            return self.download_result(merge_id, out)
        found = parse_reference(reference)
        if found is None:
            raise InputError("model_reference_invalid", f"{reference!r} is not NS/NAME[@REVISION]")
        path = _model_path(found.model)
        revision = self._object("GET", f"{path}/revisions/{found.revision}" if found.revision else path)
        query = f"?revision={revision['revision']}"
        self._download(Path(out), revision["files"], lambda name: f"{path}/files/{quote(name)}{query}")
        return revision

    # merges

    def methods(self) -> list[dict[str, Any]]:
        """The catalogue."""
        found: list[dict[str, Any]] = self._call("GET", "/v1/methods").json()
        return found

    def plan(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """Check a recipe and estimate its work."""
        return self._object("POST", "/v1/merges/plan", json=dict(recipe))

    def submit(
        self, recipe: Mapping[str, Any], *, name: str | None = None, fresh: bool = False
    ) -> dict[str, Any]:
        """Queue a merge; its first state. ``fresh``: even if the same was done before."""
        body = {**recipe, "name": name} if name else dict(recipe)
        headers = {"Cache-Control": "no-cache"} if fresh else {}
        return self._object("POST", "/v1/merges", json=body, headers=headers)

    def cancel(self, merge_id: str) -> dict[str, Any]:
        """Stop a merge; its state, which may still be ``cancelling``."""
        return self._object("POST", f"/v1/merges/{merge_id}/cancel")

    def merge(self, merge_id: str) -> dict[str, Any]:
        """The present state of a merge."""
        return self._object("GET", f"/v1/merges/{merge_id}")

    def report(self, merge_id: str) -> dict[str, Any]:
        """The report of a finished merge."""
        return self._object("GET", f"/v1/merges/{merge_id}/report")

    def events(self, merge_id: str, *, after: str | None = None) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(id, kind, data) of the events of one connection, the first after ``after``."""
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": after} if after else {})}
        with self._http.stream("GET", f"/v1/merges/{merge_id}/events", headers=headers) as response:
            if response.is_error:
                response.read()
                raise problem_of(response)
            fields: dict[str, str] = {}
            for line in response.iter_lines():
                if line:
                    name, _, value = line.partition(":")
                    fields[name] = value.removeprefix(" ")
                elif "data" in fields:
                    yield fields.get("id", ""), fields.get("event", "message"), json.loads(fields["data"])
                    fields = {}

    def wait(self, merge_id: str, on_event: OnEvent | None = None) -> dict[str, Any]:
        """Follow a merge to its end, over broken connections; its last state, whatever it is."""
        after: str | None = None
        patience = time.monotonic() + _RETRY_SECONDS
        while True:
            try:
                for event_id, kind, data in self.events(merge_id, after=after):
                    after = event_id or after
                    patience = time.monotonic() + _RETRY_SECONDS
                    if on_event is not None:
                        on_event(kind, data)
                found = self.merge(merge_id)
                if found["state"] in _FINAL:
                    return found
            except (httpx.TransportError, Unreachable) as error:
                if time.monotonic() > patience:
                    raise (
                        error if isinstance(error, MergeError) else unreachable(self._http, error)
                    ) from error
                time.sleep(0.5)

    def download_result(self, merge_id: str, out: str | Path) -> dict[str, Any]:
        """Download the result of a merge into a new folder; the merge. Raises what made it fail."""
        found = self.merge(merge_id)
        if found["result"] is None:
            raise failure(found)
        here = f"/v1/merges/{merge_id}/files"
        self._download(Path(out), found["result"]["files"], lambda name: f"{here}/{quote(name)}")
        return found

    # transport

    def _object(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = self._call(method, path, **options).json()
        return found

    def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise unreachable(self._http, error) from error
        if response.is_error:
            raise problem_of(response)
        return response

    def _download(self, out: Path, files: list[dict[str, Any]], url: Callable[[str], str]) -> None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(
                "output_exists", f"{out} exists and is not empty", remedy="Choose a new folder",
                where={"file": str(out)},
            )  # fmt: skip
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.part-", dir=out.parent))
        try:
            for entry in files:
                self._fetch(url(entry["path"]), draft / check_path(entry["path"]), entry["sha256"])
            draft.chmod(0o777 & ~_umask())
            draft.replace(out)  # an empty folder is replaced
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _fetch(self, url: str, target: Path, sha256: str) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        try:
            with self._http.stream("GET", url) as response, target.open("xb") as file:
                if response.is_error:
                    response.read()
                    raise problem_of(response)
                for chunk in response.iter_bytes(CHUNK):
                    digest.update(chunk)
                    file.write(chunk)
        except httpx.TransportError as error:
            raise unreachable(self._http, error) from error
        if digest.hexdigest() != sha256:
            raise MergeFailure(
                "download_corrupt", f"{target.name} arrived with a wrong sha256", remedy="Try again",
                where={"file": target.name},
            )  # fmt: skip


def _model_path(model: str) -> str:
    found = parse_reference(model)
    if found is None or found.revision is not None:
        raise InputError("model_reference_invalid", f"{model!r} is not NS/NAME")
    return f"/v1/models/{found.ns}/{found.name}"


def _uploadable(folder: Path) -> list[Path]:
    """The files that the service takes, sorted. A pickle is an error only where it holds the weights."""
    found: list[Path] = []
    refused: InputError | None = None
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if not file.is_file() or any(part.startswith(".") for part in name.split("/")):
            continue
        try:
            check_path(name)
        except InputError as error:
            if error.code == "pickle_not_accepted":
                refused = refused or error
            continue
        found.append(file)
    if refused is not None and not any(file.suffix == ".safetensors" for file in found):
        raise refused
    if not found:
        raise InputError("nothing_to_push", f"{folder} holds no file that can be uploaded")
    return found


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current
