"""The base model, loaded with transformers (the extra ``eval``), frozen, never with remote code.

Only safetensors are read. Layers are found by the names that adapters use for them, and watched or
changed by hooks; the weights themselves are never written to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from merging.calibration.base_files import BaseFiles
from merging.errors import InputError

Kind = Literal["body", "text_classifier", "image_classifier"]
Hook = Callable[[str, Tensor, Tensor], Tensor | None]
"""Takes the name of a layer, its input and its output; may return another output."""

_CLASSES = {
    "body": "AutoModel",
    "text_classifier": "AutoModelForSequenceClassification",
    "image_classifier": "AutoModelForImageClassification",
}
_OPTIONAL = ("pooler", "classifier", "score", "position_ids", "lm_head")
"""Parts of a model that a file may lack: they are not used, or replaced."""


def transformers() -> Any:
    """The library. Raises ``extra_missing``."""
    try:
        import transformers as library
    except ImportError as error:
        raise InputError(
            "extra_missing",
            "running a base model needs transformers, which is not installed",
            remedy="Install merganser[eval], or give statistics instead of data.",
            where={"field": "base_model"},
        ) from error
    return library


class Base:
    """A frozen model in float32 on ``device``; ``sizes`` are ``(m, n)`` of the layers that adapters name.

    Raises :class:`InputError` ``base_model_invalid``, ``base_model_incomplete``, ``module_not_in_base``,
    ``base_shape_mismatch``.
    """

    def __init__(
        self,
        files: BaseFiles,
        sizes: Mapping[str, tuple[int, int]],
        device: torch.device,
        kind: Kind = "body",
    ) -> None:
        self.files = files
        self.device = device
        self.model, self.missing = _load(files, kind)
        self.model.requires_grad_(False).eval().to(device)
        self._modules = dict(self.model.named_modules())
        self.prefix = str(getattr(self.model, "base_model_prefix", ""))
        self.layers = {name: self._layer(name, shape) for name, shape in sizes.items()}
        self._parameters = dict(self.model.named_parameters())

    @property
    def vocabulary(self) -> int | None:
        """Rows of the token embedding."""
        embedding = getattr(self.model, "get_input_embeddings", lambda: None)()
        return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None

    @property
    def padding(self) -> int | None:
        """The token that pads, where the model states one."""
        value = getattr(self.model.config, "pad_token_id", None)
        return value if isinstance(value, int) else None

    @property
    def positions(self) -> int | None:
        """The longest sequence, where the model states one."""
        value = getattr(self.model.config, "max_position_embeddings", None)
        padding = getattr(self.model.config, "pad_token_id", None) or 0
        if value is None or self.files.model_type not in ("roberta", "xlm-roberta", "camembert"):
            return value
        return int(value) - padding - 1  # their positions start after the padding index

    def run(self, batch: Mapping[str, Tensor], replaced: Mapping[str, Tensor] | None = None) -> Any:
        """The model's output; ``replaced`` are parameters that stand in for its own, by :meth:`own_name`."""
        given = {key: value.to(self.device) for key, value in batch.items()}
        if not replaced:
            return self.model(**given)
        return torch.func.functional_call(self.model, dict(replaced), args=(), kwargs=given)

    def own_name(self, name: str) -> str | None:
        """The model's name of a parameter that an adapter names, or None if it has none."""
        parts = name.split(".")
        for candidate in (name, f"{self.prefix}.{name}", *(".".join(parts[i:]) for i in (1, 2))):
            if candidate in self._parameters:
                return candidate
        return None

    @contextmanager
    def hooked(self, hook: Hook, names: Sequence[str] | None = None) -> Iterator[None]:
        """``hook`` on the forward pass of the named layers (all by default)."""
        handles = []
        try:
            for name in names if names is not None else self.layers:

                def call(_module: Any, args: Any, output: Any, name: str = name) -> Any:
                    return hook(name, args[0], output)

                handles.append(self.layers[name].register_forward_hook(call))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _layer(self, name: str, size: tuple[int, int]) -> nn.Module:
        parts = name.split(".")
        candidates = (name, f"{self.prefix}.{name}", *(".".join(parts[i:]) for i in (1, 2) if i < len(parts)))
        for candidate in (*candidates, *(_renamed(self.model, candidate) for candidate in candidates)):
            if candidate in self._modules:
                found: nn.Module = self._modules[candidate]
                self._check(name, found, size)
                return found
        raise InputError(
            "module_not_in_base",
            f"the base model {self.files.folder.name} has no layer {name}",
            remedy="Give the base model that the adapters were trained on.",
            where={"module": name, "field": "base_model"},
        )

    def _check(self, name: str, layer: nn.Module, size: tuple[int, int]) -> None:
        shape = tuple(getattr(layer, "weight", torch.empty(0)).shape)
        transposed = type(layer).__name__ == "Conv1D"
        if shape != (size[::-1] if transposed else size):
            raise InputError(
                "base_shape_mismatch",
                f"{name} is {size[0]} x {size[1]}, but the base model {self.files.folder.name} has {shape}",
                remedy="Give the base model that the adapters were trained on.",
                where={"module": name, "field": "base_model"},
            )


@contextmanager
def first_pass(label: str) -> Iterator[None]:
    """The first time that the model sees samples. Raises ``samples_do_not_fit`` for what it cannot take."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        problem = " ".join(str(error).split())[:200]
        raise InputError(
            "samples_do_not_fit",
            f"the base model cannot take the samples of {label}: {problem}",
            remedy="Give texts to a text model, and pictures of its size and channels to an image model.",
            where={"model": label, "field": "data"},
        ) from error


def _renamed(model: Any, name: str) -> str:
    """The name in memory of a layer that files and older adapters call ``name``: the library renames some."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # earlier versions keep the names of the files
        return name
    key = f"{name}.weight"
    for change in get_model_conversion_mapping(model):
        if isinstance(change, WeightRenaming):
            key, _ = change.rename_source_key(key)
    return str(key).removesuffix(".weight")


def names_in_memory(files: BaseFiles, names: Sequence[str]) -> dict[str, str]:
    """The names that the library, and so PEFT, has for layers named as in the files of a base model."""
    library = transformers()
    try:
        with _quiet(library), torch.device("meta"):
            config = library.AutoConfig.from_pretrained(
                str(files.folder), local_files_only=True, trust_remote_code=False
            )
            model = library.AutoModel.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError):
        return {name: name for name in names}  # what is wrong with it, loading will tell
    return {name: _renamed(model, name) for name in names}


def _load(files: BaseFiles, kind: Kind) -> tuple[Any, tuple[str, ...]]:
    library = transformers()
    loader = getattr(library, _CLASSES[kind])
    with _quiet(library), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # parts that the file lacks are drawn; they are the same in every run
        try:
            model, info = loader.from_pretrained(
                str(files.folder),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
            problem = " ".join(str(error).split())[:300]
            raise InputError(
                "base_model_invalid",
                f"base model {files.folder.name} cannot be loaded: {problem}",
                where={"file": files.folder.name, "field": "base_model"},
            ) from error
    missing = tuple(sorted(info["missing_keys"]))
    for key in missing:
        if not any(f".{part}" in f".{key}" for part in _OPTIONAL):
            raise InputError(
                "base_model_incomplete",
                f"base model {files.folder.name} lacks {key}",
                where={"file": files.folder.name, "field": "base_model"},
            )
    return model, missing


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    logs = library.utils.logging
    level, bar = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if bar:
            logs.enable_progress_bar()
