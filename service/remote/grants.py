"""Which tenants reach which repositories with the token of the service.

The token is the operator's and may read what none of the tenants may. So it is used for nobody but those whom
the operator names; everyone else reaches public repositories, without it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_RULE = re.compile(r"^(?P<tenant>\*|[^\s:*]+):(?P<org>\*|[A-Za-z0-9._-]+)(?:/(?P<name>\*|[A-Za-z0-9._-]+))?$")


@dataclass(frozen=True)
class Grants:
    """Rules of a tenant, an organisation and a name; ``*`` stands for any."""

    rules: tuple[tuple[str, str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Grants:
        """Comma-separated ``tenant:org`` or ``tenant:org/name``. Raises :class:`ValueError`."""
        rules = []
        for item in filter(None, (part.strip() for part in text.split(","))):
            match = _RULE.match(item)
            if match is None or (match["org"] == "*" and match["name"] not in (None, "*")):
                raise ValueError(f"{item[:80]!r} does not look like tenant:org or tenant:org/name")
            rules.append((match["tenant"], match["org"], match["name"] or "*"))
        return cls(tuple(rules))

    def allow(self, tenant: str, repo: str) -> bool:
        """Whether a tenant reaches ``org/name`` with the token."""
        org, _, name = repo.partition("/")
        return any(
            all(rule in ("*", said) for rule, said in zip(rules, (tenant, org, name), strict=True))
            for rules in self.rules
        )


NOBODY = Grants()
"""No tenant has the use of the token."""
