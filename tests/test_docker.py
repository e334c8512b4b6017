"""The images, compose.yaml and manifests of docker/: valid by their schemas, and true to the program.

They are not built or started here; tests/service/test_composed.py runs the same processes and settings.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from service.app import create_app
from service.cli import main
from service.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
OURS = ("api", "worker", "worker-cuda")
MANIFESTS = sorted((DOCKER / "kubernetes").glob("*.yaml"))
SCHEMAS: dict[str, Any] = json.loads((ROOT / "tests" / "docker" / "kubernetes-1.37.json").read_text())
VARIABLES = re.compile(r"\$\{([A-Z0-9_]+)(?::[?-][^}]*)?\}")
SETTINGS = {f"MERGANSER_{name.upper()}" for name in Settings.model_fields}
FOREIGN = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "REDIS_PASSWORD", "REDISCLI_AUTH"}


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in MANIFESTS:
        for number, document in enumerate(yaml.safe_load_all(path.read_text())):
            yield f"{path.name}:{number}:{document['kind']}", document


DOCUMENTS = dict(documents())
PODS = {
    name: document["spec"]["template"]["spec"]
    for name, document in DOCUMENTS.items()
    if document["kind"] == "Deployment"
}


def filled(text: str) -> str:
    return VARIABLES.sub(lambda match: "https://x.example" if "URL" in match[1] else "secret", text)


def stages() -> dict[str, list[str]]:
    """The instructions of each stage of the Dockerfile."""
    text = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if match := re.match(r"FROM (\S+) AS (\S+)", line):
            name = match[2]
            found[name] = [*found.get(match[1], []), line]  # what it builds on holds for it too
        elif name and line.strip() and not line.startswith("#"):
            found[name].append(line.strip())
    return found


STAGES = stages()


def parses(command: list[str]) -> bool:
    """Whether a command line of ours is understood, without running it."""
    if command[0] == "merganser":
        with pytest.raises(SystemExit) as stop:
            raise SystemExit(main([*command[1:], "--help"]))
        return stop.value.code == 0
    assert command[:2] == ["python", "-m"], command
    found = subprocess.run(
        [sys.executable, "-c", f"import importlib.util as u; assert u.find_spec({command[2]!r})"],
        cwd=ROOT,
        check=False,
        timeout=30,
    )
    return found.returncode == 0


# compose.yaml


def test_compose_follows_its_specification() -> None:
    schema = json.loads((ROOT / "tests" / "docker" / "compose-spec.json").read_text())
    plain = {key: value for key, value in COMPOSE.items() if not key.startswith("x-")}
    jsonschema_rs.validator_for(schema).validate(json.loads(json.dumps(plain)))


def test_every_variable_of_compose_is_in_the_example_and_has_no_value_there() -> None:
    example = re.findall(r"^([A-Z0-9_]+)=(.*)$", (DOCKER / "env.example").read_text(), re.MULTILINE)
    wanted = {match[1] for match in VARIABLES.finditer((DOCKER / "compose.yaml").read_text())}
    assert {name for name, _ in example} == wanted
    assert [value for _, value in example if value] == []


@pytest.mark.parametrize("name", OURS)
def test_settings_of_a_service_are_ours_and_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {key: filled(value) for key, value in COMPOSE["services"][name]["environment"].items()}
    assert set(environment) <= SETTINGS | FOREIGN
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    settings = load_settings()
    assert settings.redis_url is not None
    assert settings.storage_location.startswith("s3://merganser")
    if name == "api":
        assert settings.auth == "keys"
        assert settings.host == "0.0.0.0"


@pytest.mark.parametrize("name", OURS)
def test_a_service_builds_a_target_that_exists(name: str) -> None:
    build = COMPOSE["services"][name]["build"]
    assert (DOCKER / build["context"]).resolve() == ROOT
    assert ROOT / build["dockerfile"] == DOCKER / "Dockerfile"
    assert build["target"] == name
    assert name in STAGES


@pytest.mark.parametrize("name", sorted(COMPOSE["services"]))
def test_services_can_do_little_to_their_host(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert "privileged" not in service
    assert all(address.startswith("127.0.0.1:") for address in service.get("ports", []))
    if service["restart"] == "no":  # it prepares a volume, and ends
        assert service["network_mode"] == "none"
        assert set(service["cap_add"]) <= {"CHOWN", "DAC_READ_SEARCH"}
        return
    assert "cap_add" not in service
    if name not in OURS:  # the user of ours is in the Dockerfile
        assert not service["user"].startswith("0")
        assert "healthcheck" in service


@pytest.mark.parametrize("name", sorted(COMPOSE["services"]))
def test_what_a_service_mounts_is_declared(name: str) -> None:
    service = COMPOSE["services"][name]
    assert {volume.partition(":")[0] for volume in service["volumes"]} <= set(COMPOSE["volumes"])
    assert not service.get("configs"), "they cannot be written into a read-only container"


def test_the_store_runs_as_whom_its_folder_belongs_to() -> None:
    store, folder = COMPOSE["services"]["store"], COMPOSE["services"]["store-folder"]
    assert folder["entrypoint"] == ["chown", "-R", store["user"], "/data"]
    assert folder["volumes"] == store["volumes"]
    assert store["depends_on"] == {"store-folder": {"condition": "service_completed_successfully"}}


def test_the_store_knows_the_options_it_is_started_with() -> None:
    weed = Path(sysconfig.get_path("scripts")) / "weed"
    shown = subprocess.run(
        [str(weed), "help", "mini"], check=False, capture_output=True, text=True, timeout=30
    )
    known = set(re.findall(r"^\s+-([A-Za-z0-9.]+)", shown.stdout + shown.stderr, re.MULTILINE))
    options = [
        word.removeprefix("-").partition("=")[0] for word in COMPOSE["services"]["store"]["command"][1:]
    ]
    assert options
    assert set(options) <= known


@pytest.mark.parametrize("name", ["worker", "worker-cuda"])
def test_docker_waits_longer_for_a_worker_than_the_worker_for_its_merges(name: str) -> None:
    service = COMPOSE["services"][name]
    drain = float(service["environment"]["MERGANSER_DRAIN_SECONDS"])
    assert float(service["stop_grace_period"].removesuffix("s")) > drain + 10


# The Dockerfile


@pytest.mark.parametrize("name", OURS)
def test_an_image_runs_as_nobody_special_and_says_whether_it_is_well(name: str) -> None:
    users = [line.split()[1] for line in STAGES[name] if line.startswith("USER ")]
    assert users
    assert not users[-1].startswith(("0", "root"))
    assert any(line.startswith("HEALTHCHECK ") for line in STAGES[name])


@pytest.mark.parametrize("name", OURS)
def test_the_commands_of_an_image_exist(name: str) -> None:
    command = [line for line in STAGES[name] if line.startswith("CMD ")][-1]
    assert parses(json.loads(command.removeprefix("CMD ")))
    check = [line for line in STAGES[name] if line.startswith("HEALTHCHECK ")][-1]
    words = json.loads(check[check.index("[") :])
    if words[1] == "-m":
        assert parses(words)
    else:
        compile(words[2], "healthcheck", "exec")
        assert "/healthz" in words[2]


@pytest.mark.parametrize("name", OURS)
def test_settings_in_an_image_are_ours(name: str) -> None:
    text = " ".join(line for line in STAGES[name] if line.startswith("ENV "))
    named = set(re.findall(r"(MERGANSER_[A-Z0-9_]+)=", text))
    assert named
    assert named <= SETTINGS


def test_what_is_copied_exists_and_reaches_the_build() -> None:
    let_in = [
        line[1:].rstrip("/")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    copies = [shlex.split(line)[1:-1] for name in STAGES for line in STAGES[name] if line.startswith("COPY ")]
    sources = {source for copy in copies if not copy[0].startswith("--from") for source in copy}
    assert sources >= {"merging", "service", "workers", "pyproject.toml"}
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(source == entry or source.startswith(f"{entry}/") for entry in let_in), source


def test_the_requirements_of_the_api_are_those_of_the_package_without_torch() -> None:
    def lines(*options: str) -> list[str]:
        command = [sys.executable, str(DOCKER / "requirements.py"), *options]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=30
        ).stdout.splitlines()

    everything = lines()
    assert [line for line in everything if line not in lines("--without", "torch")] == ["torch>=2.6"]
    assert any(line.startswith("huggingface_hub") for line in lines("--extra", "hub"))


def images() -> list[str]:
    text = (DOCKER / "Dockerfile").read_text()
    version = re.findall(r"^ARG PYTHON=(\S+)$", text, re.MULTILINE)[0]
    bases = [base for base in re.findall(r"^FROM (\S+)", text, re.MULTILINE) if base not in STAGES]
    found = [base.replace("${PYTHON}", version) for base in bases]
    found += [item["image"] for name, item in COMPOSE["services"].items() if name not in OURS]
    found += [container["image"] for pod in PODS.values() for container in pod["containers"]]
    return sorted(set(found))


@pytest.mark.parametrize("image", images())
def test_images_are_pinned_to_a_version(image: str) -> None:
    assert re.search(r":\d+\.\d+(\.\d+)?(-[a-z0-9.-]+)?$", image)


def test_compose_and_the_manifests_use_the_same_redis() -> None:
    assert COMPOSE["services"]["redis"]["image"] in images()
    redis = PODS["redis.yaml:2:Deployment"]["containers"][0]
    assert redis["image"] == COMPOSE["services"]["redis"]["image"]
    for text in (redis["args"][0], COMPOSE["services"]["redis"]["command"][2]):
        assert "--appendonly yes" in text
        assert "--maxmemory-policy noeviction" in text


# Kubernetes


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if not name.endswith("ScaledObject")])
def test_a_manifest_follows_the_schema_of_its_kind(name: str) -> None:
    document = DOCUMENTS[name]
    schema = {**SCHEMAS["kinds"][document["kind"]], "$defs": SCHEMAS["$defs"]}
    jsonschema_rs.validator_for(schema).validate(document)


def test_a_manifest_with_a_wrong_key_would_be_noticed() -> None:
    document = json.loads(json.dumps(DOCUMENTS["api.yaml:2:Deployment"]))
    document["spec"]["template"]["spec"]["containers"][0]["readyProbe"] = {}
    schema = {**SCHEMAS["kinds"]["Deployment"], "$defs": SCHEMAS["$defs"]}
    with pytest.raises(jsonschema_rs.ValidationError):
        jsonschema_rs.validator_for(schema).validate(document)


@pytest.mark.parametrize("name", PODS)
def test_pods_can_do_little_to_their_host(name: str) -> None:
    pod = PODS[name]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    for container in pod["containers"]:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]
        assert "livenessProbe" in container
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("name", [name for name in PODS if not name.startswith("redis")])
def test_our_pods_run_commands_and_settings_that_exist(name: str) -> None:
    container = PODS[name]["containers"][0]
    assert parses(container["command"])
    sources = [DOCUMENTS["settings.yaml:0:ConfigMap"]["data"]]
    sources.append(DOCUMENTS["secret.example.yaml:0:Secret"]["stringData"])
    named = {item["name"] for item in container["env"]} | {key for source in sources for key in source}
    assert named <= SETTINGS | FOREIGN
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert "/var/lib/merganser" in mounts


def test_probes_of_the_api_ask_for_routes_that_exist() -> None:
    container = PODS["api.yaml:2:Deployment"]["containers"][0]
    paths = create_app(Settings.model_construct()).openapi()["paths"]
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[kind]["httpGet"]["path"] in paths


@pytest.mark.parametrize("name", ["worker.yaml:0:Deployment", "worker-cuda.yaml:0:Deployment"])
def test_kubernetes_waits_longer_for_a_worker_than_the_worker_for_its_merges(name: str) -> None:
    pod = PODS[name]
    drain = next(item for item in pod["containers"][0]["env"] if item["name"] == "MERGANSER_DRAIN_SECONDS")
    assert pod["terminationGracePeriodSeconds"] > float(drain["value"]) + 10
    assert parses(pod["containers"][0]["livenessProbe"]["exec"]["command"])


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name.endswith(":Service")])
def test_a_service_finds_the_pods_it_is_for(name: str) -> None:
    spec = DOCUMENTS[name]["spec"]
    labels = [
        (document["spec"]["template"]["metadata"]["labels"], PODS[key])
        for key, document in DOCUMENTS.items()
        if key in PODS
    ]
    pods = [pod for label, pod in labels if spec["selector"].items() <= label.items()]
    assert len(pods) == 1
    ports = {port["name"]: port["containerPort"] for port in pods[0]["containers"][0]["ports"]}
    for port in spec["ports"]:
        target = port.get("targetPort", port["port"])
        assert target in ports or target in ports.values()


def test_the_scaling_follows_metrics_that_exist_and_a_deployment_that_exists() -> None:
    spec = DOCUMENTS["scaling.yaml:0:ScaledObject"]["spec"]
    names = [document["metadata"]["name"] for key, document in DOCUMENTS.items() if key in PODS]
    assert spec["scaleTargetRef"]["name"] in names
    assert 0 < spec["minReplicaCount"] <= spec["maxReplicaCount"]
    (trigger,) = spec["triggers"]
    assert trigger["type"] == "prometheus"
    assert all(isinstance(value, str) for value in trigger["metadata"].values())
    known = (ROOT / "service" / "routers" / "metrics.py").read_text()
    used = re.findall(r"merganser_[a-z_]+", trigger["metadata"]["query"])
    assert used
    assert [name for name in used if f'"{name}"' not in known] == []
