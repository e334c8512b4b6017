"""Other versions of the clients, and clients that are not among our dependencies.

They are installed into a cache folder when ``MERGANSER_TEST_INSTALL`` is set; that takes a package index.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapters import write_adapter

from tests.running import Up, push
from tests.service.hub_client import python
from tests.service.test_hub_writing import WRITE

pytestmark = pytest.mark.slow

SEND = """
import json, os, sys
import huggingface_hub
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
folder, merge, repo, cache = sys.argv[1:]
api = HfApi()
api.create_repo(repo)
done = api.upload_folder(repo_id=repo, folder_path=folder)
local = snapshot_download(repo, cache_dir=cache)
result = snapshot_download(merge, cache_dir=cache)
print(json.dumps({
    "version": huggingface_hub.__version__,
    "commit": [done.oid, api.model_info(repo).sha, api.upload_folder(repo_id=repo, folder_path=folder).oid],
    "same": all(open(f"{local}/{n}", "rb").read() == open(f"{folder}/{n}", "rb").read()
                for n in os.listdir(folder)),
    "files": [sorted(api.list_repo_files(repo)), sorted(os.listdir(local)), sorted(os.listdir(result))],
    "exists": [api.file_exists(repo, "adapter_config.json"), api.file_exists(repo, "no.json"),
               api.repo_exists("no/such"), api.revision_exists(repo, "no")],
}))
"""

IMAGES = """
import json, sys
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
import torch

def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        in_channels=4, out_channels=4, cross_attention_dim=8, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")).eval()
"""

MAKE_IMAGES = (
    IMAGES
    + """
for number in (1, 2):
    model = unet()
    torch.manual_seed(number)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    StableDiffusionPipeline.save_lora_weights(
        str(number), unet_lora_layers=get_peft_model_state_dict(model))
print("null")
"""
)

LOAD_IMAGES = (
    IMAGES
    + """
from diffusers.loaders import StableDiffusionLoraLoaderMixin

class Pipeline(StableDiffusionLoraLoaderMixin):
    hf_device_map = None
    def __init__(self):
        self.unet, self.text_encoder = unet(), None
        self.components = {"unet": self.unet}

def output(source):
    pipeline = Pipeline()
    if source:
        pipeline.load_lora_weights(source)
    generator = torch.Generator().manual_seed(3)
    x, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 8, generator=generator)
    with torch.no_grad():
        return pipeline.unet(x, 1, text).sample

name, local = sys.argv[1:]
served, expected, plain = output(name), output(local), output(None)
print(json.dumps([float((served - expected).abs().max()), float((served - plain).abs().max())]))
"""
)


@pytest.fixture(scope="session")
def installed() -> Callable[..., str]:
    """Gives the folder of a package that is not in the environment; it is installed if need be."""
    if not os.environ.get("MERGANSER_TEST_INSTALL"):
        pytest.skip("MERGANSER_TEST_INSTALL is not set, so no other versions of the clients are installed")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "merganser-tests"

    def install(*packages: str, needs: bool = True) -> str:
        target = cache / "+".join(packages).replace("==", "-")
        if not (target / "installed").exists():
            more = [] if needs else ["--no-deps"]
            done = subprocess.run(
                [sys.executable, "-m", "pip", "install", "-q", "--target", str(target), *more, *packages],
                check=False, capture_output=True, text=True, timeout=600,
            )  # fmt: skip
            if done.returncode != 0:
                pytest.skip(f"{packages[0]} cannot be installed: {done.stderr.splitlines()[-1][:200]}")
            (target / "installed").touch()
        return str(target)

    return install


@pytest.mark.parametrize("version", ["0.36.2", "1.33.0"])
def test_other_versions_read_and_write(
    up: Up, merged: dict[str, Any], installed: Callable[..., str], version: str, tmp_path: Path
) -> None:
    path = installed(f"huggingface_hub=={version}")
    modules = {f"layers.{i}.q_proj": (512, 512) for i in range(10)}
    large = write_adapter(tmp_path / "large", seed=81, rank=128, modules=modules)
    assert (large / "adapter_model.safetensors").stat().st_size > 4 << 20, "0.x sends it as an LFS object"
    name = f"versions/v{version.replace('.', '-')}"
    found = python(
        up, tmp_path, SEND, str(large), f"merges/{merged['id']}", name, str(tmp_path / "cache"), path=path
    )
    assert found["version"] == version
    assert len(set(found["commit"])) == 1
    assert found["same"]
    adapter = ["adapter_config.json", "adapter_model.safetensors"]
    result = sorted(item["path"] for item in merged["result"]["files"])
    assert found["files"] == [adapter, adapter, result]
    assert found["exists"] == [True, False, False, False]
    small = write_adapter(tmp_path / "a", seed=82), write_adapter(tmp_path / "b", seed=83)
    wrote = python(up, tmp_path, WRITE, *map(str, small), f"{name}-w", path=path)
    assert wrote["after"] == [wrote["fresh"], adapter]
    assert wrote["deleted"] == wrote["unchanged"] == wrote["first"][0]
    assert "parent_commit_outdated" in wrote["stale"][1]
    assert "pickle_not_accepted" in wrote["pickle"][1]
    assert wrote["exists"] is False


def test_diffusers_loads_a_merge_of_image_adapters(
    up: Up, installed: Callable[..., str], tmp_path: Path
) -> None:
    path = installed("diffusers==0.42.1", "pillow", "importlib_metadata", "zipp", needs=False)
    python(up, tmp_path, MAKE_IMAGES, path=path)
    with up.client() as client:
        models = [{"model": push(client, tmp_path / str(n), f"images/v{n}")} for n in (1, 2)]
        recipe = {"merge_method": "ties", "parameters": {"density": 0.5}, "models": models}
        done = client.wait(client.submit(recipe)["id"])
        assert done["state"] == "succeeded", done
        client.download_result(done["id"], tmp_path / "local")
    difference, effect = python(
        up, tmp_path, LOAD_IMAGES, f"merges/{done['id']}", str(tmp_path / "local"), path=path
    )
    assert difference == 0.0
    assert effect > 1e-4
    alone = python(up, tmp_path, LOAD_IMAGES, "images/v1", str(tmp_path / "1"), path=path)
    assert alone[0] == 0.0
