"""Find the files of an adapter in a folder without leaving the folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from merging.errors import InputError
from merging.formats.files import open_regular, read_at
from merging.formats.peft_config import MAX_CONFIG_BYTES
from merging.formats.sniff import PICKLE_SUFFIXES

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
_MAX_ENTRIES = 1_000
_GIVE = "Give the folder of an adapter, or the .safetensors file of a kohya or diffusers LoRA"
_AS_SAVED = f"Put {CONFIG_NAME} there as PEFT's save_pretrained wrote it"


@dataclass(frozen=True, slots=True)
class Source:
    """Where an adapter lies: its folder, its weights, and the bytes of its configuration if it has one."""

    folder: Path
    weights: Path
    config: bytes | None
    notes: tuple[str, ...] = ()
    single: bool = False

    @property
    def label(self) -> str:
        """A name for messages: that of the folder, or of a single file."""
        if self.single:
            return self.weights.stem
        return self.folder.resolve().name

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that decide what the adapter means, in a fixed order."""
        config = () if self.config is None else (self.folder / CONFIG_NAME,)
        return (*config, self.weights)


def locate(path: str | Path) -> Source:
    """Find an adapter at ``path``: a folder, a folder with one adapter one level down, or a file.

    Raises :class:`InputError`: ``adapter_not_found``, ``adapter_config_missing``,
    ``adapter_weights_missing``, ``several_adapters``, ``pickle_not_accepted``, ``link_outside_folder``,
    ``not_a_regular_file``, ``config_too_large``.
    """
    path = Path(path)
    if path.is_dir():
        return _from_folder(path)
    if not path.exists():
        raise _error("adapter_not_found", path, "does not exist", remedy=_GIVE)
    if path.suffix == ".safetensors":
        if path.name == WEIGHTS_NAME and (path.parent / CONFIG_NAME).is_file():
            return _from_folder(path.parent)
        return Source(path.parent, path, None, single=True)
    if path.suffix in PICKLE_SUFFIXES:
        raise _pickle(path)
    raise _error("adapter_not_found", path, "is neither a folder nor a .safetensors file", remedy=_GIVE)


def _from_folder(folder: Path) -> Source:
    config = folder / CONFIG_NAME
    if not os.path.lexists(config):
        below = _one_below(folder)
        if below is None:
            return _image_file(folder)
        folder = below
        config = folder / CONFIG_NAME
    weights = folder / WEIGHTS_NAME
    data = _read_config(folder, config)
    pickles = [name for name in _names(folder) if Path(name).suffix in PICKLE_SUFFIXES]
    if not os.path.lexists(weights):
        if pickles:
            raise _pickle(folder / pickles[0])
        raise _error("adapter_weights_missing", folder, f"has no {WEIGHTS_NAME}",
              remedy=f"Put it beside {CONFIG_NAME}")  # fmt: skip
    check_inside(folder, weights)
    notes = tuple(f"{name} was ignored; the weights of {WEIGHTS_NAME} count" for name in pickles)
    return Source(folder, weights, data, notes)


def _image_file(folder: Path) -> Source:
    """A folder without a configuration may hold one file of another family than PEFT's."""
    names = _names(folder)
    files = [name for name in names if name.endswith(".safetensors")]
    if WEIGHTS_NAME in files or not files:
        raise _error("adapter_config_missing", folder, f"has no {CONFIG_NAME}",
              remedy="It states the rank and alpha, without which the weights have no scale")  # fmt: skip
    name = DIFFUSERS_NAME if DIFFUSERS_NAME in files else files[0]
    if len(files) > 1 and name != DIFFUSERS_NAME:
        raise _error("several_adapters", folder, f"holds several files ({', '.join(files[:10])})",
              remedy="Name one of them")  # fmt: skip
    weights = folder / name
    check_inside(folder, weights)
    return Source(folder, weights, None)


def _one_below(folder: Path) -> Path | None:
    """The only sub-folder with a configuration, or None if there is no such folder."""
    names = _names(folder)
    below = [
        folder / name
        for name in names
        if (folder / name).is_dir()
        and not (folder / name).is_symlink()
        and os.path.lexists(folder / name / CONFIG_NAME)
    ]
    if len(below) == 1:
        return below[0]
    if below:
        shown = ", ".join(entry.name for entry in below[:10])
        raise _error("several_adapters", folder, f"holds several adapters ({shown})",
              remedy="Name the folder of one of them")  # fmt: skip
    pickles = [name for name in names if Path(name).suffix in PICKLE_SUFFIXES]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise _pickle(folder / pickles[0])
    return None


def _names(folder: Path) -> list[str]:
    """The sorted names in a folder; refuses folders that are clearly not an adapter."""
    names: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            names.append(entry.name)
            if len(names) > _MAX_ENTRIES:
                raise _error("adapter_not_found", folder, f"has more than {_MAX_ENTRIES} entries",
                      remedy=_GIVE)  # fmt: skip
    return sorted(names)


def _read_config(folder: Path, path: Path) -> bytes:
    check_inside(folder, path)
    try:
        with open_regular(path) as (handle, status):
            if status.st_size > MAX_CONFIG_BYTES:
                what = f"has {status.st_size} bytes, the limit is {MAX_CONFIG_BYTES}"
                raise _error("config_too_large", path, what, remedy=_AS_SAVED)
            return read_at(handle, MAX_CONFIG_BYTES + 1, 0)
    except OSError as error:
        raise _error("not_a_regular_file", path, f"cannot be read ({error.strerror})",
              remedy=_AS_SAVED) from None  # fmt: skip


def check_inside(folder: Path, path: Path) -> None:
    """A link may stay in the folder or, in a Hugging Face cache, point into the cache's own blobs."""
    if not path.is_symlink():
        return
    try:
        target = path.resolve()
    except (OSError, RuntimeError):
        target = Path("/")  # links in a circle
    roots = [folder.resolve()]
    if roots[0].parent.name == "snapshots":
        roots.append(roots[0].parents[1] / "blobs")
    if not any(target.is_relative_to(root) for root in roots):
        raise _error("link_outside_folder", path, "is a link to a file outside its folder",
              remedy="Put the file itself there")  # fmt: skip


def _pickle(path: Path) -> InputError:
    return _error("pickle_not_accepted", path, "holds pickled weights, which can run code when loaded",
          remedy="Convert it on your own machine and send adapter_model.safetensors")  # fmt: skip


def _error(code: str, path: Path, what: str, *, remedy: str | None = None) -> InputError:
    return InputError(code, f"{path.name} {what}", remedy=remedy, where={"file": path.name})
