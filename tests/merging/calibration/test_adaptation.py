"""AdaRank through the engine: a frozen base, reproducible runs, checkpoints, and honest warnings."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import products, write_adapter
from golden import assert_close
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN, MODULES, write_base, write_head, write_texts

import merging
from merging.calibration.adapting import Adaptation, State
from merging.calibration.base import Base
from merging.catalog.data import AdarankParams
from merging.engine import Progress
from merging.errors import Cancelled, InputError
from merging.methods.adarank import Components

Recipe = dict[str, Any]
WEIGHTS = "adapter_model.safetensors"


def adarank(recipe: Recipe, **parameters: Any) -> Recipe:
    settings = {"steps": 12, "lr": 0.03, "batch_size": 8, "checkpoint_every": 5}
    return {**recipe, "merge_method": "adarank", "parameters": {**settings, **parameters}}


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


# what comes out


def test_no_steps_are_task_arithmetic_with_the_prior(tiny_heads: Recipe, tmp_path: Path) -> None:
    merging.merge(adarank(tiny_heads, steps=0), tmp_path / "start")
    for entry in tiny_heads["models"]:
        for key in ("data", "head"):
            del entry[key]
    plain = {**tiny_heads, "merge_method": "linear", "parameters": {"lambda": 0.3}}
    merging.merge(plain, tmp_path / "linear")
    for name, product in products(tmp_path / "linear").items():
        assert_close(products(tmp_path / "start")[name], product, 1e-5)


def test_no_steps_of_cart_are_the_mean_when_all_is_kept(tiny_heads: Recipe, tmp_path: Path) -> None:
    for share, expected in ((0.999999, True), (0.3, False)):
        out = tmp_path / f"{share}"
        merging.merge(adarank(tiny_heads, steps=0, origin="cart", init_rank=1000 if expected else share), out)
        mean: dict[str, torch.Tensor] = {}
        for entry in tiny_heads["models"]:
            for name, product in products(Path(entry["model"])).items():
                mean[name] = mean.get(name, torch.zeros_like(product)) + product / 3
        errors = [float((products(out)[name] - mean[name]).norm() / mean[name].norm()) for name in mean]
        assert (max(errors) < 1e-5) == expected


def test_entropy_falls_and_only_masks_and_coefficients_tell_the_result(
    tiny_heads: Recipe, tmp_path: Path
) -> None:
    result = merging.merge(adarank(tiny_heads, steps=25), tmp_path / "out")
    told = result.report["calibration"]
    assert told["steps"] == 25
    assert sum(told["entropy"][-5:]) < sum(told["entropy"][:5])
    before = sum(task["before"]["entropy"] for task in told["tasks"])
    after = sum(task["after"]["entropy"] for task in told["tasks"])
    assert after < before
    # the update is the sum of the components that are kept, times their coefficients
    adapters = {entry["model"]: products(Path(entry["model"])) for entry in tiny_heads["models"]}
    labels = [task["model"] for task in told["tasks"]]
    for name, product in products(tmp_path / "out").items():
        module = told["modules"][name]
        assert sum(module["kept"]) <= module["components"] == 6
        inside = torch.cat([adapters[label][name] for label in labels], 1)
        assert int(torch.linalg.matrix_rank(product, rtol=1e-5)) <= sum(module["kept"])
        assert_close(inside @ torch.linalg.pinv(inside, rtol=1e-6) @ product, product, 1e-4)


def test_the_base_and_the_heads_stay_as_they_are(tiny_heads: Recipe, tmp_path: Path) -> None:
    files = [Path(tiny_heads["base_model"], "model.safetensors")]
    files += [Path(entry["head"]) for entry in tiny_heads["models"]]
    files += [Path(entry["model"], WEIGHTS) for entry in tiny_heads["models"]]
    before = [path.read_bytes() for path in files]
    merging.merge(adarank(tiny_heads), tmp_path / "out")
    assert [path.read_bytes() for path in files] == before


def test_no_parameter_of_the_model_changes_or_gets_a_gradient(
    tiny_heads: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Base, dict[str, torch.Tensor]]] = []
    load = Base.__init__

    def remember(self: Base, *args: Any, **more: Any) -> None:
        load(self, *args, **more)
        seen.append((self, {key: value.clone() for key, value in self.model.state_dict().items()}))

    monkeypatch.setattr(Base, "__init__", remember)
    merging.merge(adarank(tiny_heads), tmp_path / "out")
    [(base, state)] = seen
    assert all(torch.equal(value, state[key]) for key, value in base.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in base.model.parameters())


def test_the_result_loads_in_peft_and_gives_the_predictions_of_the_run(
    tiny_heads: Recipe, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModel, AutoTokenizer

    result = merging.merge(adarank(tiny_heads), tmp_path / "out")
    base = AutoModel.from_pretrained(tiny_heads["base_model"])
    tokenizer = AutoTokenizer.from_pretrained(tiny_heads["base_model"])
    model = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    for task in result.report["calibration"]["tasks"]:
        entry = next(entry for entry in tiny_heads["models"] if entry["model"] == task["model"])
        texts = [json.loads(line)["text"] for line in Path(entry["data"]).read_text().splitlines()]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        features = (hidden * mask).sum(1) / mask.sum(1)
        logits = features @ load_file(entry["head"])["weight"].T
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
        assert float(entropy) == pytest.approx(task["after"]["entropy"], rel=1e-4)


# the same bytes


def test_the_same_seed_gives_the_same_bytes_whatever_order_and_threads(
    tiny_heads: Recipe, tmp_path: Path
) -> None:
    merging.merge(adarank(tiny_heads), tmp_path / "one", threads=1)
    turned = {**tiny_heads, "models": tiny_heads["models"][::-1]}
    merging.merge(adarank(turned), tmp_path / "two", threads=3)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    merging.merge(adarank({**tiny_heads, "seed": 1}), tmp_path / "other")
    assert digest(tmp_path / "other") != digest(tmp_path / "one")


class Stop:
    """Cancels at a step; as good as a kill, for all but the current step is on disk or lost."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.seen: list[str] = []

    def __call__(self, progress: Progress) -> None:
        if progress.phase == "adapt":
            self.seen.append(progress.message)
            if progress.message.startswith(f"step {self.step} of"):
                raise Cancelled


@pytest.mark.parametrize("origin", ["task_arithmetic", "cart"])
def test_a_stopped_run_goes_on_from_its_checkpoint_to_the_same_bytes(
    tiny_heads: Recipe, tmp_path: Path, origin: str
) -> None:
    recipe = adarank(tiny_heads, origin=origin)
    whole = merging.merge(recipe, tmp_path / "whole")
    checkpoint = tmp_path / "kept" / "state"
    with pytest.raises(Cancelled):
        merging.merge(recipe, tmp_path / "cut", progress=Stop(8), checkpoint=checkpoint)
    assert not (tmp_path / "cut").exists()
    follow = Stop(-1)
    again = merging.merge(recipe, tmp_path / "cut", progress=follow, checkpoint=checkpoint)
    assert sum("from the checkpoint" in message for message in follow.seen) == 5
    assert len(follow.seen) == 12
    assert again.files == whole.files


def test_a_checkpoint_of_another_run_is_not_used(tiny_heads: Recipe, tmp_path: Path) -> None:
    checkpoint = tmp_path / "state"
    merging.merge(adarank(tiny_heads), tmp_path / "first", checkpoint=checkpoint)
    fresh = merging.merge(adarank(tiny_heads, lr=0.01), tmp_path / "fresh")
    again = merging.merge(adarank(tiny_heads, lr=0.01), tmp_path / "again", checkpoint=checkpoint)
    assert digest(tmp_path / "fresh") == digest(tmp_path / "again")
    assert "checkpoint_ignored" in {warning["code"] for warning in again.report["warnings"]}
    assert "checkpoint_ignored" not in {warning["code"] for warning in fresh.report["warnings"]}


def test_a_damaged_checkpoint_is_not_used(tiny_heads: Recipe, tmp_path: Path) -> None:
    checkpoint = tmp_path / "state"
    checkpoint.write_bytes(b"not a checkpoint")
    merging.merge(adarank(tiny_heads), tmp_path / "first", checkpoint=checkpoint)
    merging.merge(adarank(tiny_heads), tmp_path / "second")
    assert digest(tmp_path / "first") == digest(tmp_path / "second")


def test_every_step_is_told_with_its_entropy(tiny_heads: Recipe, tmp_path: Path) -> None:
    told: list[Progress] = []
    merging.merge(adarank(tiny_heads), tmp_path / "out", progress=told.append)
    steps = [progress for progress in told if progress.phase == "adapt"]
    assert len(steps) == 12
    assert all("entropy" in progress.message for progress in steps)
    assert told[-1].done == told[-1].total


# collapse and early stop


def test_a_collapse_of_the_predictions_is_told(tiny_heads: Recipe, tmp_path: Path) -> None:
    report = merging.merge(adarank(tiny_heads, steps=40), tmp_path / "out").report
    collapsed = [warning for warning in report["warnings"] if warning["code"] == "predictions_collapsed"]
    tasks = report["calibration"]["tasks"]
    fallen = [t for t in tasks if t["after"]["classes_in_use"] < 0.7 * t["before"]["classes_in_use"]]
    assert len(collapsed) == len(fallen) > 0
    assert all(any(task["model"] in warning["message"] for warning in collapsed) for task in fallen)


def test_diversity_keeps_more_classes_in_use(tiny_heads: Recipe, tmp_path: Path) -> None:
    def classes(report: dict[str, Any]) -> float:
        return sum(task["after"]["classes_in_use"] for task in report["calibration"]["tasks"])

    plain = merging.merge(adarank(tiny_heads, steps=25), tmp_path / "plain").report
    diverse = merging.merge(adarank(tiny_heads, steps=25, diversity=1.0), tmp_path / "diverse").report
    assert classes(diverse) > classes(plain)


class Constant:
    """A classifier whose logits do not depend on the model."""

    def logits(self, task: int, step: int, cores: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.ones(4, 3, dtype=torch.float64) + 0.0 * sum(core.sum() for core in cores.values())


def components() -> Components:
    eye = torch.eye(2, dtype=torch.float64)
    return Components(
        "layer", eye, eye, eye, torch.ones(2, dtype=torch.float64), eye, torch.tensor([0, 1]), None,
        torch.full((2,), 0.1, dtype=torch.float64), torch.full((2,), 0.3, dtype=torch.float64),
    )  # fmt: skip


def test_a_run_stops_when_the_entropy_has_settled() -> None:
    run = Adaptation([components()], AdarankParams(patience=15, steps=1000), Constant())
    while not run.settled():
        run.advance()
    assert run.state.step == 25  # the patience beyond the first window
    assert Adaptation([components()], AdarankParams(), Constant(), run.state).settled() is False


def test_a_falling_entropy_does_not_stop_a_run() -> None:
    state = State(torch.zeros(2), torch.zeros(1, 2), [torch.zeros(2)] * 4)
    state.entropies = [[1.0 / (step + 1)] for step in range(200)]
    assert not Adaptation([components()], AdarankParams(patience=5), Constant(), state).settled()


# heads of the adapters, pictures


def write_classifier(folder: Path, tasks: int = 2) -> Recipe:
    """A recipe of adapters of a sequence classifier that bring their own heads."""
    write_base(folder / "base")
    models = []
    for t in range(tasks):
        modules = {f"bert.{name}": shape for name, shape in MODULES.items()}
        path = write_adapter(
            folder / f"cls{t}",
            seed=t,
            rank=2,
            modules=modules,
            task_type="SEQ_CLS",
            modules_to_save=["classifier"],
        )
        tensors = load_file(path / WEIGHTS)
        head = load_file(write_head(folder / "head.safetensors", classes=3 + t, seed=t))["weight"]
        tensors["base_model.model.classifier.weight"] = head
        tensors["base_model.model.classifier.bias"] = torch.linspace(-0.1, 0.1, 3 + t)
        save_file(tensors, str(path / WEIGHTS), metadata={"format": "pt"})
        data = write_texts(folder / f"cls{t}.jsonl", seed=t)
        models.append({"model": str(path), "data": str(data)})
    return {"base_model": str(folder / "base"), "models": models, "modules_to_save": "drop"}


def test_heads_of_the_adapters_are_used(tmp_path: Path) -> None:
    recipe = write_classifier(tmp_path)
    report = merging.merge(adarank(recipe, steps=3), tmp_path / "out").report
    classes = {Path(task["model"]).name: task["before"]["classes"] for task in report["calibration"]["tasks"]}
    assert classes == {"cls0": 3, "cls1": 4}


def test_a_regression_head_of_an_adapter_is_refused(tmp_path: Path) -> None:
    recipe = write_classifier(tmp_path)
    path = Path(recipe["models"][0]["model"], WEIGHTS)
    tensors = load_file(path)
    tensors["base_model.model.classifier.weight"] = torch.ones(1, HIDDEN)
    tensors["base_model.model.classifier.bias"] = torch.ones(1)
    save_file(tensors, str(path), metadata={"format": "pt"})
    with pytest.raises(InputError) as caught:
        merging.plan(adarank(recipe))
    assert caught.value.code == "entropy_undefined"


@pytest.mark.parametrize("own", [False, True], ids=["head files", "heads of the adapters"])
def test_pictures_can_be_adapted_to(tmp_path: Path, own: bool) -> None:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8,
        patch_size=4, num_channels=1, initializer_range=0.3,
    )  # fmt: skip
    model = ViTModel(config, add_pooling_layer=False)
    model.save_pretrained(tmp_path / "base")
    layers = {
        f"vit.{name}" if own else name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    models = []
    for t in range(2):
        generator = torch.Generator().manual_seed(t)
        data = tmp_path / f"pictures{t}.safetensors"
        save_file({"pixel_values": torch.randn(16, 1, 8, 8, generator=generator)}, str(data))
        head = write_head(tmp_path / f"head{t}.safetensors", classes=3, seed=t)
        told = {"modules_to_save": ["classifier"]} if own else {}
        path = write_adapter(tmp_path / f"vit{t}", seed=t, rank=2, modules=layers, **told)
        entry = {"model": str(path), "data": str(data)}
        if own:
            tensors = load_file(path / WEIGHTS)
            tensors["base_model.model.classifier.weight"] = load_file(head)["weight"]
            tensors["base_model.model.classifier.bias"] = torch.zeros(3)
            save_file(tensors, str(path / WEIGHTS), metadata={"format": "pt"})
        models.append(entry if own else {**entry, "head": str(head)})
    settings = {"head": {"pooling": "first", "normalize": True, "scale": 10.0}}
    recipe = {
        "base_model": str(tmp_path / "base"),
        "models": models,
        "modules_to_save": "drop",
        "calibration": {} if own else settings,
    }
    told = merging.merge(adarank(recipe, steps=20), tmp_path / "out").report["calibration"]
    assert [task["before"]["classes"] for task in told["tasks"]] == [3, 3]
    assert sum(told["entropy"][-4:]) < sum(told["entropy"][:4])


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["adarank", "regmean", "osrm_project"])
def test_a_gpu_gives_what_a_cpu_gives(tiny_heads: Recipe, tmp_path: Path, method: str) -> None:
    recipe = adarank(tiny_heads, steps=2)
    if method != "adarank":
        for entry in recipe["models"]:
            del entry["head"]
        recipe = {**recipe, "merge_method": method, "parameters": {}}
    for device in ("cpu", "cuda"):
        merging.merge(recipe, tmp_path / device, device=device)
    for path in sorted((tmp_path / "cpu").rglob(WEIGHTS)):
        folder = path.parent
        other = products(tmp_path / "cuda" / folder.relative_to(tmp_path / "cpu"))
        for name, product in products(folder).items():
            assert_close(other[name], product, 1e-3)
