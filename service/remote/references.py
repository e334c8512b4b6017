"""``hf://[endpoint/]org/name[@revision]``, and the hubs that such a reference may reach.

The list of endpoints is the operator's; a reference names one of them by host and path, or none, which means
the first. So no request of ours goes anywhere that the operator has not named.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from merging.errors import InputError
from service.remote.grants import NOBODY, Grants
from service.settings import Settings

SCHEME = "hf://"
COMMIT_PATTERN = r"^[0-9a-f]{40}$"
_REPO = re.compile(r"^(?=.{3,96}$)[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$")
_REVISION = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")


@dataclass(frozen=True)
class RemoteReference:
    """A revision of a repository of another hub. ``place`` is the endpoint as it was written, or nothing."""

    endpoint: str
    repo: str
    revision: str | None = None
    place: str = ""

    def at(self, commit: str) -> str:
        """The same reference, pinned to a commit."""
        return f"{SCHEME}{self.place}{self.repo}@{commit}"

    def __str__(self) -> str:
        return f"{SCHEME}{self.place}{self.repo}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class Hubs:
    """The hubs that may be reached, and the token for the first of them; no other one is told it."""

    endpoints: tuple[str, ...]
    token: str | None = None
    grants: Grants = NOBODY

    @classmethod
    def of(cls, settings: Settings) -> Hubs:
        """Those of the settings."""
        token = settings.hf_token
        grants = Grants.parse(settings.hf_grants)
        return cls(settings.hf_endpoint_list, token.get_secret_value() if token else None, grants)

    def token_for(self, tenant: str, endpoint: str, repo: str) -> str | None:
        """The token for a repository at an endpoint, if the tenant is to have it."""
        if self.endpoints[:1] != (endpoint,) or not self.grants.allow(tenant, repo):
            return None
        return self.token

    def demand_push(self, tenant: str, endpoint: str, repo: str) -> None:
        """Raise ``hub_push_not_granted`` where the token is needed, and the tenant is not to have it."""
        if self.token and self.endpoints[:1] == (endpoint,) and not self.grants.allow(tenant, repo):
            raise InputError(
                "hub_push_not_granted",
                f"push_to.repo: this service does not push to {repo} for you",
                remedy="The operator says in MERGANSER_HF_GRANTS who may push where",
                where={"field": "push_to.repo"},
            )

    def find(self, text: str, *, field: str = "models") -> RemoteReference:
        """The repository that a reference names.

        Raises ``hub_reference_invalid``, ``hub_endpoint_not_allowed``.
        """
        where = {"field": field, "model": text}
        target, _, revision = text.removeprefix(SCHEME).partition("@")
        *place, org, name = ["", *target.split("/")]
        repo = f"{org}/{name}"
        if not _good_repo(repo) or ("@" in text and not _good_revision(revision)):
            raise InputError(
                "hub_reference_invalid",
                f"{field}: {text[:200]!r} does not name a repository of a hub",
                remedy="Write hf://org/name[@revision], with host[:port]/path/ before org for another hub",
                where=where,
            )
        written = "/".join(part for part in place if part)
        endpoint = self.endpoint(written or None, field=field)
        return RemoteReference(endpoint, repo, revision or None, f"{written}/" if written else "")

    def endpoint(self, wanted: str | None, *, field: str) -> str:
        """The allowed endpoint that is meant by its URL, or by it without ``https://``; None: the first."""
        for endpoint in self.endpoints:
            if wanted is None or wanted.rstrip("/") in (endpoint, endpoint.partition("://")[2]):
                return endpoint
        meant = "any other hub" if wanted is None else f"the hub {wanted[:200]!r}"
        raise InputError(
            "hub_endpoint_not_allowed",
            f"{field}: this service does not reach {meant}",
            remedy="The operator lists the hubs in MERGANSER_HF_ENDPOINTS",
            where={"field": field},
        )


def check_target(repo: str, revision: str | None) -> None:
    """Whether something can be pushed to these names. Raises ``hub_reference_invalid``."""
    if not _good_repo(repo) or not (revision is None or _good_revision(revision)):
        raise InputError(
            "hub_reference_invalid",
            "push_to: the repository must look like org/name, the revision like a branch",
            where={"field": "push_to"},
        )


def is_remote(text: str) -> bool:
    """Whether a model reference names another hub."""
    return text.startswith(SCHEME)


def _good_repo(repo: str) -> bool:
    return bool(_REPO.fullmatch(repo)) and ".." not in repo and "--" not in repo


def _good_revision(revision: str) -> bool:
    return bool(_REVISION.fullmatch(revision)) and ".." not in revision and "//" not in revision
