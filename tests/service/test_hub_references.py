"""Which hub a reference may reach, who is told the token, and which files are taken."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from merging.errors import InputError, MergeError, MergeFailure
from merging.recipe import Recipe
from service.remote.grants import Grants
from service.remote.hub import RemoteFile, RemoteHub, Snapshot, _chosen, _ours
from service.remote.imports import bring
from service.remote.references import Hubs, RemoteReference
from service.settings import LOCAL_TENANT, Settings, load_settings
from workers import environment

HUBS = Hubs(
    ("https://huggingface.co", "http://10.0.0.1:8642/hf"), token="hf_secret", grants=Grants.parse("t:*")
)
COMMIT = "0123456789" * 4


def test_a_reference_names_one_of_the_listed_hubs() -> None:
    first = HUBS.find("hf://org/name")
    assert first == RemoteReference("https://huggingface.co", "org/name")
    second = HUBS.find("hf://10.0.0.1:8642/hf/org/name@v1.0")
    assert (second.endpoint, second.repo, second.revision) == ("http://10.0.0.1:8642/hf", "org/name", "v1.0")
    assert second.at(COMMIT) == f"hf://10.0.0.1:8642/hf/org/name@{COMMIT}"
    assert HUBS.find(str(second)) == second
    assert HUBS.find("hf://huggingface.co/org/name").endpoint == HUBS.endpoints[0]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("hf://10.0.0.1:8642/org/name", "hub_endpoint_not_allowed"),
        ("hf://10.0.0.1/hf/org/name", "hub_endpoint_not_allowed"),
        ("hf://169.254.169.254/latest/meta-data", "hub_endpoint_not_allowed"),
        ("hf://huggingface.co.evil.example/org/name", "hub_endpoint_not_allowed"),
        ("hf://http://10.0.0.1:8642/hf/org/name", "hub_endpoint_not_allowed"),
        ("hf://name", "hub_reference_invalid"),
        ("hf://", "hub_reference_invalid"),
        ("hf://org/name@", "hub_reference_invalid"),
        ("hf://org/name@a b", "hub_reference_invalid"),
        ("hf://org/name@refs/../x", "hub_reference_invalid"),
        ("hf://org/..", "hub_reference_invalid"),
        ("hf://org/na--me", "hub_reference_invalid"),
        ("hf://org/name?x=1", "hub_reference_invalid"),
    ],
)
def test_all_else_is_refused(text: str, code: str) -> None:
    with pytest.raises(InputError) as caught:
        HUBS.find(text)
    assert caught.value.code == code


def test_without_hubs_nothing_is_reached() -> None:
    with pytest.raises(InputError) as caught:
        Hubs.of(load_settings(hf_endpoints="", auth="off")).find("hf://org/name")
    assert caught.value.code == "hub_endpoint_not_allowed"


@pytest.mark.parametrize("value", ["huggingface.co", "ftp://x", "https://a:b@x", "https://x?y", "https://"])
def test_endpoints_must_be_addresses(value: str) -> None:
    with pytest.raises(InputError) as caught:
        load_settings(hf_endpoints=value)
    assert caught.value.where["field"] == "MERGANSER_HF_ENDPOINTS"


class FakeHub(RemoteHub):
    """A hub that has everything, of 60 bytes."""

    seen: list[tuple[str, str | None]]

    def __init__(self, endpoint: str, token: str | None) -> None:
        self.seen.append((endpoint, token))

    def look_up(self, reference: RemoteReference) -> Snapshot:
        return Snapshot(reference.repo, COMMIT, (RemoteFile("a.safetensors", 60, None),))

    def download(self, snapshot: Snapshot, folder: Path, tick: Any) -> None:
        folder.mkdir(parents=True)


@pytest.fixture
def fake() -> type[FakeHub]:
    return type("Fake", (FakeHub,), {"seen": []})


def recipe(*models: str, **more: Any) -> Recipe:
    return Recipe.load({"merge_method": "linear", "models": [{"model": m} for m in models], **more})


def test_only_the_first_hub_is_told_the_token(fake: type[FakeHub], tmp_path: Path) -> None:
    asked = recipe("hf://a/b", "ns/local", "hf://10.0.0.1:8642/hf/a/b", modules_to_save={"take": "hf://a/b"})
    found = bring("t", asked, HUBS, tmp_path, limit=1000, connect=fake)
    assert fake.seen == [("https://huggingface.co", "hf_secret"), ("http://10.0.0.1:8642/hf", None)]
    names = [entry.model for entry in found.recipe.models]
    assert names == [f"hf://a/b@{COMMIT}", "ns/local", f"hf://10.0.0.1:8642/hf/a/b@{COMMIT}"]
    assert found.recipe.modules_to_save.take == names[0]  # type: ignore[union-attr]
    assert sorted(found.folders) == sorted([names[0], names[2]])
    assert all(folder.is_dir() for folder in found.folders.values())
    assert set(found.commits.values()) == {COMMIT}


def test_the_token_is_used_for_those_who_were_granted_it(fake: type[FakeHub], tmp_path: Path) -> None:
    """Else a tenant could read through the operator what is another's."""
    grants = Grants.parse("acme:acme, acme:shared/one, *:open")
    hubs = Hubs(HUBS.endpoints, token="hf_secret", grants=grants)
    names = ("acme/x", "shared/one", "shared/two", "open/x", "other/x", "Acme/x")
    for tenant, granted in (("acme", ("acme/x", "shared/one", "open/x")), ("local", ("open/x",))):
        fake.seen.clear()
        bring(
            tenant,
            recipe(*[f"hf://{name}" for name in names]),
            hubs,
            tmp_path / tenant,
            limit=9999,
            connect=fake,
        )
        assert [token for _, token in fake.seen] == [
            "hf_secret" if name in granted else None for name in names
        ]
        for name in names:
            if name in granted:
                hubs.demand_push(tenant, hubs.endpoints[0], name)
                continue
            with pytest.raises(InputError) as caught:
                hubs.demand_push(tenant, hubs.endpoints[0], name)
            assert caught.value.code == "hub_push_not_granted"
            hubs.demand_push(
                tenant, hubs.endpoints[1], name
            )  # there is no token for it that could be misused
            Hubs(HUBS.endpoints).demand_push(tenant, HUBS.endpoints[0], name)


def test_a_service_without_keys_may_use_its_token_and_tenants_may_not() -> None:
    grants = Grants.parse(load_settings().hf_grants)
    assert (grants.allow(LOCAL_TENANT, "any/thing"), grants.allow("acme", "acme/x")) == (True, False)


@pytest.mark.parametrize("text", ["acme", ":x", "a b:x", "acme:x/y/z", "acme:*/name", "acme:or*", "a:b:c"])
def test_a_grant_that_cannot_be_read_stops_the_start(text: str) -> None:
    with pytest.raises(InputError, match="MERGANSER_HF_GRANTS"):
        load_settings(hf_grants=text)


def test_the_limit_is_for_all_imports_together(fake: type[FakeHub], tmp_path: Path) -> None:
    two = recipe("hf://a/b", "hf://a/c")
    assert len(bring("t", two, HUBS, tmp_path / "1", limit=120, connect=fake).folders) == 2
    with pytest.raises(InputError) as caught:
        bring("t", two, HUBS, tmp_path / "2", limit=119, connect=fake)
    assert caught.value.code == "hub_too_large"


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (["adapter_config.json", "adapter_model.safetensors", "x.safetensors", "tokenizer.json"],
         ["adapter_config.json", "adapter_model.safetensors"]),
        (["style.safetensors", "README.md", "train.py"], ["style.safetensors"]),
        (["pytorch_lora_weights.safetensors", "other.safetensors"], ["pytorch_lora_weights.safetensors"]),
        (["config.json", "model.safetensors", "pytorch_model.bin"], ["config.json", "model.safetensors"]),
        (["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
          "model.safetensors.index.json", "modeling.py"],
         ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
          "model-00002-of-00002.safetensors"]),
        (["a.safetensors", "b.safetensors"], "hub_no_model"),
        (["checkpoint-1/adapter_model.safetensors"], "hub_no_model"),
        (["adapter_config.json", "adapter_model.bin"], "pickle_not_accepted"),
        ([], "hub_no_model"),
    ],
)  # fmt: skip
def test_which_files_are_taken(there: list[str], taken: list[str] | str) -> None:
    files = [RemoteFile(path, 1, None) for path in there]
    if isinstance(taken, list):
        assert [file.path for file in _chosen(files, "hf://a/b")] == taken
        return
    with pytest.raises(InputError) as caught:
        _chosen(files, "hf://a/b")
    assert caught.value.code == taken


class Response:
    def __init__(self, status: int, **headers: str) -> None:
        self.status_code = status
        self.headers = headers


class Refusal(Exception):
    def __init__(self, status: int, **headers: str) -> None:
        super().__init__("Bearer hf_secret")
        self.response = Response(status, **headers)


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (Refusal(401), InputError, "hub_denied"),
        (Refusal(403), InputError, "hub_denied"),
        (Refusal(404), InputError, "hub_not_found"),
        (Refusal(422, **{"X-Error-Message": "no\nsuch"}), InputError, "hub_refused"),
        (Refusal(429), MergeFailure, "hub_unreachable"),
        (Refusal(503), MergeFailure, "hub_unreachable"),
        (ConnectionError("x"), MergeFailure, "hub_unreachable"),
        (TimeoutError("x"), MergeFailure, "hub_unreachable"),
    ],
)
def test_errors_of_the_client_have_codes(error: Exception, kind: type[MergeError], code: str) -> None:
    found = _ours(error, "a/b")
    assert type(found) is kind
    assert found.code == code
    assert "hf_secret" not in str(found)


def test_a_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("service.remote.hub._SILENCE_SECONDS", 0.2)
    (tmp_path / "a.md").write_text("x")
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        hub = RemoteHub(f"http://127.0.0.1:{deaf.getsockname()[1]}", None)
        for ask in (
            lambda: hub.look_up(RemoteReference("", "a/b")),
            lambda: hub.push(tmp_path, "a/b", revision=None, private=True, message="x"),
        ):
            with pytest.raises(MergeFailure) as caught:
                ask()
            assert caught.value.code == "hub_unreachable"
    huggingface_hub.close_session()  # other tests are in no such hurry


def test_unknown_errors_are_not_hidden() -> None:
    assert _ours(KeyError("x"), "a/b") is None


def test_the_token_is_nowhere_but_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MERGANSER_HF_TOKEN", "hf_secret")
    settings = load_settings()
    assert Hubs.of(settings).token == "hf_secret"
    caplog.set_level(logging.DEBUG)
    logging.getLogger("x").info("%s %r", settings, settings)
    assert "hf_secret" not in caplog.text + settings.model_dump_json() + repr(settings)
    child = environment.child(settings)
    assert child["MERGANSER_HF_TOKEN"] == "hf_secret"
    assert child["HF_HUB_DISABLE_IMPLICIT_TOKEN"] == "1"
    assert isinstance(settings, Settings)
