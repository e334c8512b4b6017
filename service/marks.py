"""The agreement between whoever refers to content and the collector that removes what nobody refers to.

The collector marks content first, reads all references after that, and removes only what is still marked. Who
refers to content writes the reference first and takes the mark off after that. So either the collector sees
the reference, or the mark is gone when it wants to remove the content, or the one who refers learns that the
content is being removed and must be sent again. No clock has a part in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import redis

from service.broker import text

REMOVING_SECONDS = 600
"""A removal takes seconds; one that is older was broken off, and content may come or be removed again."""

# ARGV: digests. They become marked unless they are in some other state.
_MARK = "for _, digest in ipairs(ARGV) do redis.call('HSETNX', KEYS[1], digest, 'marked') end"
_STATE = f"""
local now = tonumber(redis.call('TIME')[1])
local function removing(digest)
  local state = redis.call('HGET', KEYS[1], digest)
  return state and state ~= 'marked' and tonumber(state) > now - {REMOVING_SECONDS}
end
local found = {{}}
"""
# ARGV: digests. Answers those that may be removed now; nobody can refer to them until they are forgotten.
_CONDEMN = (
    _STATE
    + """
for _, digest in ipairs(ARGV) do
  if redis.call('HEXISTS', KEYS[1], digest) == 1 and not removing(digest) then
    redis.call('HSET', KEYS[1], digest, now)
    table.insert(found, digest)
  end
end
return found
"""
)
# ARGV: digests. Takes their marks off; answers those that are being removed.
_SPARE = (
    _STATE
    + """
for _, digest in ipairs(ARGV) do
  if removing(digest) then table.insert(found, digest) else redis.call('HDEL', KEYS[1], digest) end
end
return found
"""
)


class Marks:
    """The marks on blobs, by the sha256 of their content."""

    def __init__(self, connection: redis.Redis) -> None:
        self._redis = connection
        self._mark = connection.register_script(_MARK)
        self._condemn = connection.register_script(_CONDEMN)
        self._spare = connection.register_script(_SPARE)

    def mark(self, tenant: str, digests: Sequence[str]) -> None:
        """Announce that content may be removed; references must be read after this."""
        for part in _parts(digests):
            self._mark(keys=[_key(tenant)], args=part)

    def condemn(self, tenant: str, digests: Sequence[str]) -> list[str]:
        """Those that are still marked. They must be removed at once, and forgotten after that."""
        return [
            text(item) for part in _parts(digests) for item in self._condemn(keys=[_key(tenant)], args=part)
        ]

    def forget(self, tenant: str, digests: Sequence[str]) -> None:
        """Take off the marks of content that was removed, or that turned out to be referred to."""
        for part in _parts(digests):
            self._redis.hdel(_key(tenant), *part)

    def spare(self, tenant: str, digests: Sequence[str]) -> list[str]:
        """Take off the marks of content that is referred to from now on; those that come too late."""
        return [
            text(item) for part in _parts(digests) for item in self._spare(keys=[_key(tenant)], args=part)
        ]


def _key(tenant: str) -> str:
    """Hash: digest -> 'marked', or when its removal began."""
    return f"mg:{tenant}:marks"


def _parts(digests: Sequence[str]) -> list[list[str]]:
    return [list(digests[i : i + 500]) for i in range(0, len(digests), 500)]
