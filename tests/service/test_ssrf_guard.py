"""Where webhooks may go: to the open internet over https, and to what the operator allows."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import Any

import pytest

from merging.errors import MergeError
from service.webhooks.guard import Allowed, check_url, is_public, resolve

NOBODY = Allowed()
PUBLIC = "93.184.215.14"


def code(run: Any) -> str:
    with pytest.raises(MergeError) as raised:
        run()
    return raised.value.code


def names(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Let the resolver give these addresses, one list after the other; the names that were asked for."""
    asked: list[str] = []
    left = list(answers)

    def getaddrinfo(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        asked.append(host)
        found = left.pop(0) if len(left) > 1 else left[0]
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        family = {4: socket.AF_INET, 6: socket.AF_INET6}
        return [
            (family[ipaddress.ip_address(a.partition("%")[0]).version], socket.SOCK_STREAM, 6, "", (a, port))
            for a in found
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.255.255.254", "169.254.169.254",
        "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.0.8", "192.0.0.171",
        "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1",
        "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255",
        "::", "::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1",
        "64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b:1::7f00:1", "2001::1", "2001:db8::1", "2002:7f00:1::",
        "2002:a00:1::1", "3fff::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fec0::1", "ff02::1", "100::1",
        "5f00::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", [PUBLIC, "1.1.1.1", "8.8.8.8", "::ffff:8.8.8.8", "2606:4700:4700::1111", "2a00:1450::1"]
)
def test_public_addresses(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/", "https://127.1/", "https://0x7f000001/", "https://2130706433/", "https://0177.0.0.1/",
        "https://127.0.0.1./", "https://[::1]/", "https://[::ffff:127.0.0.1]/", "https://[64:ff9b::7f00:1]/",
        "https://[2002:7f00:1::]/", "https://169.254.169.254/latest/meta-data", "https://10.1.2.3:8443/",
        "https://0.0.0.0/", "https://0/",
        "http://example.com/", "https://example.com:22/", "https://example.com:8080/", f"http://{PUBLIC}/",
        f"https://{PUBLIC}:6379/",
    ],
)  # fmt: skip
def test_refused_without_a_name_server(url: str) -> None:
    assert code(lambda: check_url(url, NOBODY)) == "webhook_url_refused"


@pytest.mark.parametrize(
    "url",
    [
        "", "example.com", "//example.com/", "ftp://example.com/", "file:///etc/passwd", "gopher://example.com/",
        "https://", "https:///path", "https://user@example.com/", "https://user:word@example.com/",
        "https://example.com@127.0.0.1/", "https://example.com/#part", "https://example.com:0/",
        "https://example.com:99999/", "https://exa mple.com/", "https://example.com/a b",
        "https://example.com\\@127.0.0.1/", "https://example.com/\r\nX: y", "https://ex\u00e4mple.com/",
        "https://[::1/", "https://-.com/", "https://" + "a" * 254 + "/", "https://example.com/" + "a" * 2048,
    ],
)  # fmt: skip
def test_no_usable_url(url: str) -> None:
    assert code(lambda: check_url(url, NOBODY)) == "webhook_url_invalid"


def test_the_problem_names_the_field_and_not_the_address() -> None:
    with pytest.raises(MergeError) as raised:
        check_url("https://10.1.2.3/", NOBODY, field="webhook.url")
    assert raised.value.where == {"field": "webhook.url"}
    assert "10.1.2.3" not in f"{raised.value.message} {raised.value.remedy}"


def test_a_public_host_is_resolved_to_the_address_to_connect_to(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = names(monkeypatch, [PUBLIC, "2606:4700::1"])
    place, address = asyncio.run(resolve("https://Example.com:8443/hook?a=b", NOBODY))
    assert (place.authority, place.target) == ("example.com:8443", "/hook?a=b")
    assert str(address) == PUBLIC
    assert asked == ["example.com"]


@pytest.mark.parametrize(
    "found",
    [
        ["127.0.0.1"],
        [PUBLIC, "10.0.0.1"],
        ["::1"],
        [PUBLIC, "::ffff:127.0.0.1"],
        ["64:ff9b::a00:1"],
        ["fe80::1%lo"],
    ],
    ids=str,
)
def test_one_bad_address_spoils_a_name(monkeypatch: pytest.MonkeyPatch, found: list[str]) -> None:
    names(monkeypatch, found)
    assert code(lambda: asyncio.run(resolve("https://example.com/", NOBODY))) == "webhook_url_refused"


def test_a_name_that_means_another_address_the_next_time_is_asked_for_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = names(monkeypatch, [PUBLIC], ["127.0.0.1"])
    _, address = asyncio.run(resolve("https://example.com/", NOBODY))
    assert str(address) == PUBLIC
    assert len(asked) == 1


def test_an_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names(monkeypatch, [])
    assert code(lambda: asyncio.run(resolve("https://example.com/", NOBODY))) == "webhook_host_unknown"


class TestAllowed:
    """What the operator allows may have any port and plain http."""

    @pytest.mark.parametrize("text", ["127.0.0.0/8", "127.0.0.1", "::1, 127.0.0.0/8,"])
    def test_a_network(self, text: str) -> None:
        allowed = Allowed.parse(text)
        place = check_url("http://127.0.0.1:9000/x", allowed)
        assert (place.scheme, place.port) == ("http", 9000)
        assert check_url("http://[::ffff:127.0.0.1]:9000/x", allowed).port == 9000
        assert code(lambda: check_url("http://10.0.0.1:9000/x", allowed)) == "webhook_url_refused"
        assert code(lambda: check_url(f"http://{PUBLIC}/", allowed)) == "webhook_url_refused"

    def test_a_name_in_an_allowed_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        allowed = Allowed.parse("10.0.0.0/8")
        names(monkeypatch, ["10.0.0.9"], [PUBLIC], ["10.0.0.9", PUBLIC], ["10.0.0.9", "127.0.0.1"])
        assert str(asyncio.run(resolve("http://hooks.svc:8080/", allowed))[1]) == "10.0.0.9"
        for _ in range(3):
            assert (
                code(lambda: asyncio.run(resolve("http://hooks.svc:8080/", allowed))) == "webhook_url_refused"
            )

    def test_a_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        allowed = Allowed.parse("hooks.svc")
        names(monkeypatch, ["10.0.0.9"])
        assert str(asyncio.run(resolve("http://HOOKS.svc.:8080/", allowed))[1]) == "10.0.0.9"
        assert code(lambda: asyncio.run(resolve("https://other.svc/", allowed))) == "webhook_url_refused"

    @pytest.mark.parametrize("text", ["10.0.0.0/33", "a b", "127.1", "http://x", "*"])
    def test_nonsense(self, text: str) -> None:
        assert code(lambda: Allowed.parse(text)) == "settings_invalid"
