"""``python -m workers.health``: exit status 0 while a worker of this host is heard of in Redis."""

from __future__ import annotations

import socket
import sys

from redis import RedisError

from service.broker import connect
from service.settings import Settings, load_settings


def healthy(settings: Settings, host: str) -> bool:
    """Whether Redis knows a living worker of a host; its entry goes away soon after its last sign of life."""
    with connect(settings) as redis:
        names = redis.smembers("rq:workers")
        return any(redis.hget(name, "hostname") == host.encode() for name in names)


def main() -> int:
    """0 or 1."""
    try:
        return 0 if healthy(load_settings(), socket.gethostname()) else 1
    except RedisError as error:
        sys.stderr.write(f"{error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
