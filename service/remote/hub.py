"""One other hub, through ``huggingface_hub``: look a repository up, download from it, push to it.

The client library is an extra (``merganser[hub]``) and is imported with the first request. Its errors become
ours, with a code; none of them, and no message, ever holds the token.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merging.errors import InputError, MergeError, MergeFailure
from merging.formats.checkpoint_out import COMPANIONS
from service.remote.references import RemoteReference

if TYPE_CHECKING:
    from huggingface_hub import HfApi

QUIET = {
    "HF_HUB_DISABLE_XET": "1",  # its servers are not among the endpoints
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_HUB_DOWNLOAD_TIMEOUT": "30",
}
"""What the client library is to find in the environment of workers."""

_SILENCE_SECONDS = 120.0
"""A hub that says nothing for so long is given up; without a limit it would keep the worker for hours."""
_CONFIG, _WEIGHTS, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_DIFFUSERS = "pytorch_lora_weights.safetensors"
_WHOLE = re.compile(r"^model(-\d+-of-\d+)?\.safetensors$")
_NETWORK = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. ``sha256`` where the hub tells it."""

    path: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit, and those of its files that make the model."""

    repo: str
    commit: str
    files: tuple[RemoteFile, ...]

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(file.size for file in self.files)


class RemoteHub:
    """The hub at an endpoint, with a token or without one. ``token`` None: never any."""

    def __init__(self, endpoint: str, token: str | None) -> None:
        self._endpoint = endpoint
        self._token: str | bool = token or False

    def look_up(self, reference: RemoteReference) -> Snapshot:
        """The commit that a reference means at this moment, and the files to load from it.

        Raises ``hub_not_found``, ``hub_denied``, ``hub_unreachable``, ``hub_no_model``.
        """
        with _translated(str(reference)):
            info = self._api().model_info(
                reference.repo, revision=reference.revision, files_metadata=True, timeout=_SILENCE_SECONDS
            )
        files = [_file(sibling) for sibling in info.siblings or ()]
        return Snapshot(reference.repo, str(info.sha), _chosen(files, str(reference)))

    def download(self, snapshot: Snapshot, folder: Path, tick: Callable[[str], None]) -> None:
        """Bring the files of a snapshot into a folder; ``tick`` is told of each before.

        Raises ``hub_content_mismatch`` and what :meth:`look_up` raises.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for file in snapshot.files:
            tick(f"bringing {file.path} of {snapshot.repo}")
            with _translated(snapshot.repo):
                self._api().hf_hub_download(
                    snapshot.repo, file.path, revision=snapshot.commit, local_dir=folder
                )
            if file.sha256 is not None and _sha256(folder / file.path) != file.sha256:
                raise MergeFailure(
                    "hub_content_mismatch",
                    f"{file.path} of {snapshot.repo} did not arrive as the hub describes it",
                    remedy="Try again",
                    where={"file": file.path, "model": snapshot.repo},
                )
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # notes of the client library

    def push(self, folder: Path, repo: str, *, revision: str | None, private: bool, message: str) -> str:
        """Commit a folder to a repository, which is made if it does not exist; the commit.

        The same content pushed again is the same commit. Raises what :meth:`look_up` raises.
        """
        with _translated(repo):
            api = self._api()
            api.create_repo(repo, private=private, exist_ok=True)
            if revision is not None and revision != "main":
                api.create_branch(repo, branch=revision, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo, folder_path=folder, revision=revision, commit_message=message
            )
            return str(done.oid)

    def _api(self) -> HfApi:
        try:
            from huggingface_hub import HfApi, get_session
        except ImportError:
            raise MergeFailure(
                "hub_client_missing",
                "the worker has no client for other hubs",
                remedy="Install the extra: pip install 'merganser[hub]'",
            ) from None
        get_session().timeout = _SILENCE_SECONDS  # by itself it waits for ever
        return HfApi(endpoint=self._endpoint, token=self._token)


def _file(sibling: Any) -> RemoteFile:
    lfs = sibling.lfs
    return RemoteFile(sibling.rfilename, int(sibling.size or 0), None if lfs is None else lfs.sha256)


def _chosen(files: list[RemoteFile], shown: str) -> tuple[RemoteFile, ...]:
    """The files at the top of a repository that make an adapter or a whole model: no pickles, no code."""
    top = {file.path: file for file in files if "/" not in file.path and not file.path.startswith(".")}
    weights = [path for path in sorted(top) if path.endswith(".safetensors")]
    where = {"model": shown}
    if _CONFIG in top and _WEIGHTS in top:
        return top[_CONFIG], top[_WEIGHTS]
    whole = [path for path in weights if _WHOLE.match(path)]
    if whole and "config.json" in top:
        texts = [path for path in sorted(top) if path.endswith(".json") or path in COMPANIONS]
        return tuple(top[path] for path in (*texts, *whole))
    if _PICKLE in top and not weights:
        raise InputError(
            "pickle_not_accepted",
            f"{shown} holds pickled weights only, which can run code when loaded",
            remedy="Convert them to safetensors on your own machine",
            where=where,
        )
    if _DIFFUSERS in weights:
        return (top[_DIFFUSERS],)
    if len(weights) == 1:
        return (top[weights[0]], *((top[_CONFIG],) if _CONFIG in top else ()))
    what = "several weight files" if weights else "no .safetensors file"
    raise InputError(
        "hub_no_model",
        f"{shown} has {what} at its top, so there is no telling which model is meant",
        remedy="Name a repository of one LoRA adapter, or of one whole model",
        where=where,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Turn the errors of the client library into ours. ``what`` names the repository."""
    try:
        yield
    except MergeError:
        raise
    except Exception as error:
        found = _ours(error, what)
        if found is None:
            raise
        raise found from None  # the original may show headers


def _ours(error: Exception, what: str) -> MergeError | None:
    where = {"model": what}
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    kinds = [kind.__name__ for kind in type(error).__mro__]
    if "GatedRepoError" in kinds or (status in (401, 403) and "RepositoryNotFoundError" not in kinds):
        return InputError(
            "hub_denied",
            f"the hub does not give access to {what}",
            remedy="The operator sets a token that may, in MERGANSER_HF_TOKEN, and lets you use it there, "
            "in MERGANSER_HF_GRANTS",
            where=where,
        )
    if status == 404 or "RepositoryNotFoundError" in kinds or "RevisionNotFoundError" in kinds:
        return InputError(
            "hub_not_found",
            f"the hub has no {what}, or does not show it to you",
            remedy="A private one needs a token of the operator, who lets you use it in MERGANSER_HF_GRANTS",
            where=where,
        )
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
        return InputError("hub_refused", f"the hub refused {what}: {_told(error, response)}", where=where)
    network = any(kind.__module__.partition(".")[0] in _NETWORK for kind in type(error).__mro__)
    if isinstance(status, int) or network or isinstance(error, OSError) or "LocalEntryNotFoundError" in kinds:
        reason = f"status {status}" if status else type(error).__name__
        return MergeFailure(
            "hub_unreachable",
            f"the hub of {what} cannot be reached at the moment ({reason})",
            remedy="Try again later",
            where=where,
        )
    if type(error).__module__.startswith("huggingface_hub") or isinstance(error, ValueError):
        return InputError("hub_refused", f"the hub refused {what}: {_told(error, None)}", where=where)
    return None


def _told(error: Exception, response: Any) -> str:
    """What the hub said, on one line."""
    header = response.headers.get("X-Error-Message") if response is not None else None
    return " ".join(str(header or error).split())[:500]
