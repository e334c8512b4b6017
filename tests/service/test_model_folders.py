"""Folders as the libraries save them: what of them is taken, what is passed on, and what is left out."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from benchmarks.checkpoint_inputs import Shape, write_checkpoints
from service.client import Client
from service.names import TEXT_LIMIT, check_path, size_limit
from tests.running import Up, push
from tests.service.hub_client import python

SHAPE = Shape(hidden=16, inner=24, heads=2, kv_heads=1, layers=1, vocab=32)
PIECES = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x05\n\x03\xe2\x96\x81"
"""How a SentencePiece model begins; what follows does not matter, because nobody opens it."""

TOKENIZERS = {
    "tokenizer.model": PIECES,
    "merges.txt": b"#version: 0.2\na b\n",
    "vocab.json": b'{"a": 0}',
    "special_tokens_map.json": b"{}",
    "tokenizer_config.json": b"{}",
    "added_tokens.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "generation_config.json": b"{}",
}

TRAIN = """
import json, sys, torch
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
repo = sys.argv[1]
torch.manual_seed(0)
config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=2, vocab_size=32)
LlamaForCausalLM(config).save_pretrained("base")
base = lambda: LlamaForCausalLM.from_pretrained("base").eval()
model = get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
arguments = TrainingArguments(output_dir="out", max_steps=2, save_steps=1, per_device_train_batch_size=2,
                              report_to="none", use_cpu=True, push_to_hub=False, hub_model_id=repo,
                              disable_tqdm=True)
trainer = Trainer(model=model, args=arguments, train_dataset=rows)
trainer.train()
trainer.save_model()
import os
os.makedirs("out/runs/today", exist_ok=True)
open("out/runs/today/events.out.tfevents.1.host.2.0", "wb").write(bytes(64))
folder = sorted(p for _, _, names in os.walk("out") for p in names)
trainer.push_to_hub()
whole = HfApi().create_repo(repo + "-whole").repo_id
HfApi().upload_folder(repo_id=whole, folder_path="out")
x = torch.arange(6).reshape(1, 6)
with torch.no_grad():
    wanted, loaded = model.eval()(x).logits, PeftModel.from_pretrained(base(), repo)(x).logits
print(json.dumps({
    "folder": folder, "files": sorted(HfApi().list_repo_files(repo)),
    "whole": sorted(HfApi().list_repo_files(whole)), "difference": float((wanted - loaded).abs().max())}))
"""


def test_a_checkpoint_with_its_tokenizer_is_taken_and_passed_on(
    client: Client, http: httpx.Client, tmp_path: Path
) -> None:
    folders = write_checkpoints(tmp_path / "in", SHAPE, dtype="float32")
    for name, content in TOKENIZERS.items():
        (folders[0] / name).write_bytes(content)
    for name in ("training_args.bin", "model.py", "figure.png"):  # left out, by their names
        (folders[0] / name).write_bytes(b"x")
    (folders[0] / "LICENSE").write_text("mine")
    base, other = (push(client, folder, f"folders/{folder.name}") for folder in folders[:2])
    held = {item["path"] for item in http.get("/v1/models/folders/base").json()["files"]}
    assert held >= {*TOKENIZERS, "LICENSE"}
    assert held.isdisjoint({"training_args.bin", "model.py", "figure.png"})
    recipe = {
        "merge_method": "linear",
        "base_model": base,
        "models": [{"model": other}],
        "output": {"format": "checkpoint"},
    }
    done = client.wait(client.submit(recipe)["id"])
    assert done["state"] == "succeeded", done
    client.download_result(done["id"], tmp_path / "out")
    for name, content in TOKENIZERS.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    assert http.get(f"/hf/merges/{done['id']}/resolve/main/tokenizer.model").content == PIECES


def test_a_trainer_pushes_its_folder(up: Up, tmp_path: Path) -> None:
    found = python(up, tmp_path, TRAIN, "folders/trained")
    assert {"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= set(found["folder"])
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert names <= set(found["files"])
    assert "checkpoint-1/adapter_model.safetensors" in found["whole"]
    for path in (*found["files"], *found["whole"]):
        assert not path.endswith((".bin", ".pt", ".pth")), path
        assert "tfevents" not in path
    assert found["difference"] == 0.0
    assert up.http.get("/v1/models/folders/trained").json()["format"] == "peft"


@pytest.mark.parametrize(
    "name",
    ["tokenizer.model", "spiece.model", "source.spm", "qwen.tiktoken", "tokenizer.model.v3", "LICENSE",
     "original/tokenizer.model", "vocab.txt", "additional_chat_templates/tool.jinja", "Notice"],
)  # fmt: skip
def test_ordinary_files_are_taken(name: str) -> None:
    assert check_path(name) == name
    assert size_limit(name, 1 << 40) == TEXT_LIMIT


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("training_args.bin", "pickle_not_accepted"),
        ("original/consolidated.00.pth", "pickle_not_accepted"),
        ("modeling_mine.py", "file_type_not_accepted"),
        ("model.onnx", "file_type_not_accepted"),
        ("figure.png", "file_type_not_accepted"),
        ("license.exe", "file_type_not_accepted"),
    ],
)
def test_what_is_not_taken_is_refused_and_says_what_to_do(http: httpx.Client, name: str, code: str) -> None:
    answer = http.put(f"/v1/models/folders/refused/files/{name}", content=b"x")
    assert (answer.status_code, answer.json()["code"]) == (422, code)
    assert "eave it out" in answer.json()["remedy"]


@pytest.mark.parametrize("content", [b"\x80\x04\x95" + b"x" * 90, b"PK\x03\x04" + b"x" * 90])
def test_a_pickle_is_no_tokenizer(http: httpx.Client, content: bytes) -> None:
    answer = http.put("/v1/models/folders/refused/files/tokenizer.model", content=content)
    assert (answer.status_code, answer.json()["code"]) == (422, "pickle_not_accepted")
