"""Recognise files that are not safetensors by their content, never by their name alone."""

from __future__ import annotations

from merging.errors import InputError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_CONVERT = (
    "Pickled weights can run code when they are loaded; convert the file on your own machine with "
    "torch.load(..., weights_only=True) and safetensors.torch.save_file"
)
_PICKLE = "pickle_not_accepted"
_ARCHIVE = "archive_not_accepted"
_MAGIC: tuple[tuple[bytes, str, str, str | None], ...] = (
    (b"PK\x03\x04", _PICKLE, "is a zip archive, as torch.save writes them", _CONVERT),
    (b"PK\x05\x06", _PICKLE, "is an empty zip archive", _CONVERT),
    (b"\x1f\x8b", _ARCHIVE, "is compressed with gzip", "Send the safetensors file itself"),
    (b"BZh", _ARCHIVE, "is compressed with bzip2", "Send the safetensors file itself"),
    (b"\xfd7zXZ\x00", _ARCHIVE, "is compressed with xz", "Send the safetensors file itself"),
    (b"\x28\xb5\x2f\xfd", _ARCHIVE, "is compressed with zstd", "Send the safetensors file itself"),
    (b"7z\xbc\xaf\x27\x1c", _ARCHIVE, "is a 7z archive", "Send the safetensors file itself"),
    (b"GGUF", "gguf_not_accepted", "is a GGUF file", "Use the safetensors file it was made from"),
    (b"\x89HDF\r\n", "hdf5_not_accepted", "is an HDF5 file", "Export safetensors instead"),
    (
        b"version https://git-lfs",
        "git_lfs_pointer",
        "is a Git LFS pointer, not the file itself",
        "Run `git lfs pull` in the repository it comes from",
    ),
)


def refuse_foreign(head: bytes, file: str) -> None:
    """Raise for the first bytes (512 are enough) of a pickle, an archive or another known format.

    A safetensors file always passes: the upper bytes of its header length are zero and byte 8 opens the
    JSON header.
    """
    if head[5:9] == b"\x00\x00\x00{":
        return
    for magic, code, what, remedy in _MAGIC:
        if head.startswith(magic):
            _refuse(code, file, what, remedy)
    if head[257:262] == b"ustar":
        _refuse(_ARCHIVE, file, "is a tar archive", "Send the safetensors file itself")
    # A pickle opens with the PROTO opcode and its version; a header length with those two bytes and
    # more behind them would be far above any limit.
    if len(head) > 2 and head[0] == 0x80 and head[1] <= 5 and head[2:8] != bytes(6):
        _refuse(_PICKLE, file, "is a pickle", _CONVERT)


def _refuse(code: str, file: str, what: str, remedy: str | None) -> None:
    raise InputError(code, f"{file} {what}", remedy=remedy, where={"file": file})
