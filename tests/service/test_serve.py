"""The socket that the API listens on."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

from service.serve import listen
from service.settings import Settings


def test_answers_are_not_held_back_until_the_client_acknowledges_their_headers(tmp_path: Path) -> None:
    listener = listen(Settings(data_dir=tmp_path, port=0))
    with contextlib.closing(listener), socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
