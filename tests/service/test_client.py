"""The client: what it does when the service, the network or the disk does not do its part."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from adapters import write_adapter

from merging.errors import InputError, MergeError, MergeFailure
from service.client import Client
from tests.running import push

Answer = tuple[int, str, bytes]
MERGE_ID = "mrg_" + "0" * 32


@contextmanager
def server(answer: Callable[[str, dict[str, str]], Answer]) -> Iterator[Client]:
    """A client of a server that answers GET as the test says."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, kind, body = answer(self.path, dict(self.headers))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            with Client(f"http://127.0.0.1:{httpd.server_port}") as client:
                yield client
        finally:
            httpd.shutdown()
            thread.join()


def code(run: Callable[[], Any], kind: type[MergeError] = InputError) -> str:
    with pytest.raises(kind) as raised:
        run()
    return raised.value.code


def test_no_service(tmp_path: Path) -> None:
    with Client("http://127.0.0.1:9") as client:
        assert code(client.methods, MergeFailure) == "service_unreachable"


def test_a_problem_is_raised_as_what_it_is(client: Client, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        client.submit({"merge_method": "linear", "models": [{"model": "no/such"}]})
    assert raised.value.code == "model_not_found"
    assert raised.value.where["model"] == "no/such"


def test_an_answer_that_is_no_problem(tmp_path: Path) -> None:
    with server(lambda path, headers: (502, "text/html", b"<h1>proxy</h1>")) as client:
        assert code(lambda: client.merge(MERGE_ID), MergeFailure) == "http_error"


def test_wrong_content_is_noticed_and_nothing_is_left(tmp_path: Path) -> None:
    entry = {"path": "a.json", "sha256": "0" * 64, "size": 2}
    merge = {"id": MERGE_ID, "state": "succeeded", "error": None, "result": {"files": [entry]}}

    def answer(path: str, headers: dict[str, str]) -> Answer:
        return (200, "application/json", json.dumps(merge).encode() if path.endswith(MERGE_ID) else b"{}")

    with server(answer) as client:
        assert code(lambda: client.pull(MERGE_ID, tmp_path / "out"), MergeFailure) == "download_corrupt"
    assert list(tmp_path.iterdir()) == []


def test_a_file_name_cannot_leave_the_folder(tmp_path: Path) -> None:
    entry = {"path": "../evil.json", "sha256": "0" * 64, "size": 2}
    merge = {"id": MERGE_ID, "state": "succeeded", "error": None, "result": {"files": [entry]}}
    with server(lambda path, headers: (200, "application/json", json.dumps(merge).encode())) as client:
        assert code(lambda: client.pull(MERGE_ID, tmp_path / "in" / "out")) == "path_invalid"
    assert not (tmp_path / "in" / "evil.json").exists()


def test_wait_goes_on_after_a_broken_stream() -> None:
    """Each connection gives one event; the client asks for the rest after the last it has."""
    events = [
        ("1-0", "state", {"state": "queued"}),
        ("2-0", "progress", {"progress": 0.5}),
        ("3-0", "state", {"state": "succeeded"}),
    ]
    asked: list[str | None] = []
    merge = {"id": MERGE_ID, "state": "running", "error": None, "result": None}

    def answer(path: str, headers: dict[str, str]) -> Answer:
        if not path.endswith("/events"):
            if len(asked) == len(events):
                merge["state"] = "succeeded"
            return 200, "application/json", json.dumps(merge).encode()
        asked.append(headers.get("Last-Event-ID"))
        event_id, kind, data = events[len(asked) - 1]
        text = f": ping\n\nevent: {kind}\ndata: {json.dumps(data)}\nid: {event_id}\n\n"
        return 200, "text/event-stream", text.encode()

    seen: list[str] = []
    with server(answer) as client:
        done = client.wait(MERGE_ID, lambda kind, data: seen.append(kind))
    assert done["state"] == "succeeded"
    assert asked == [None, "1-0", "2-0"]
    assert seen == ["state", "progress", "state"]


def test_an_existing_folder_is_not_overwritten(client: Client, tmp_path: Path) -> None:
    push(client, write_adapter(tmp_path / "a", seed=1), "client/a")
    assert code(lambda: client.pull("client/a", tmp_path / "a")) == "output_exists"
    (tmp_path / "empty").mkdir()
    client.pull("client/a", tmp_path / "empty")
    assert (tmp_path / "empty" / "adapter_config.json").exists()


def test_a_revision_can_be_pulled(client: Client, tmp_path: Path) -> None:
    first = push(client, write_adapter(tmp_path / "1", seed=1), "client/revs")
    push(client, write_adapter(tmp_path / "2", seed=2), "client/revs")
    client.pull(first, tmp_path / "out")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "1" / weights).read_bytes()


@pytest.mark.parametrize("name", ["plain", "a/b/c", "a/b@rev", "", "/a", "a/..", "a b/c"])
def test_impossible_names(client: Client, tmp_path: Path, name: str) -> None:
    assert code(lambda: client.pull(name, tmp_path / "out")) == "model_reference_invalid"
    assert code(lambda: client.push_dir(tmp_path, name)) == "model_reference_invalid"


def test_folders_that_cannot_be_pushed(client: Client, tmp_path: Path) -> None:
    assert code(lambda: client.push_dir(tmp_path / "none", "a/b")) == "not_a_folder"
    assert code(lambda: client.push_dir(tmp_path, "a/b")) == "nothing_to_push"
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x02")
    assert code(lambda: client.push_dir(tmp_path, "a/b")) == "pickle_not_accepted"
