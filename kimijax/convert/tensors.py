"""The tensors of a directory of safetensors files, read as if a stranger had made them."""

import collections
import contextlib
import os
import re
import stat
import threading
from pathlib import Path

import numpy as np

from kimijax.convert.header import (
    DTYPES,
    MAX_HEADER,
    TensorInfo,
    json_object,
    read_header,
    reading,
    refusal,
    show,
)

SINGLE, INDEX, SUFFIX = "model.safetensors", "model.safetensors.index.json", ".safetensors"
CHUNK = 2**26  # bytes read or written at once: as much of a file as the page cache has to hold
FOLIO = 2**22  # bytes; more than the pages that the kernel keeps, and drops, only together
OPEN_FILES = 4


class TensorFiles:
    """The tensors of a directory. A context manager; threads may share it, one reads at a time."""

    def __init__(self, origin: Path, infos: dict[str, TensorInfo]):
        """origin  the file (index, single file) or directory that says which tensors there are"""
        self._origin, self._infos = origin, infos
        self._open: collections.OrderedDict[Path, int] | None = collections.OrderedDict()
        self._lock = threading.Lock()

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; reading after that raises ValueError."""
        with self._lock:
            while self._open:
                _close(self._open.popitem()[1])
            self._open = None

    def names(self) -> list[str]:
        """Every tensor, file by file in the order in which they lie."""
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Where and what a tensor is; UserError: there is none of this name."""
        if name not in self._infos:
            raise refusal(
                self._origin,
                f"lacks the tensor {show(name)}",
                "convert with the config of this model, or fetch all of its files",
            )
        return self._infos[name]

    def read(self, name: str) -> np.ndarray:
        """A tensor, in fresh memory; UserError: no such tensor, or its file cannot be read."""
        return self._load(self.info(name))

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a tensor, in fresh memory: for one too large to read whole."""
        info = self.info(name)
        rows = info.shape[0] if info.shape else 0
        if not 0 <= start < stop <= rows:
            raise ValueError(f"{name} has no rows {start} to {stop}, it has {rows}")
        size = (info.end - info.start) // rows
        shape = (stop - start, *info.shape[1:])
        start, end = (info.start + row * size for row in (start, stop))
        return self._load(info._replace(shape=shape, start=start, end=end))

    def read_into(self, name: str, out: np.ndarray) -> None:
        """As `read`, into an array of the tensor's shape and dtype, C-contiguous."""
        info = self.info(name)
        if (out.dtype, out.shape) != (DTYPES[info.dtype], info.shape) or not out.flags.c_contiguous:
            raise ValueError(
                f"{name} is {DTYPES[info.dtype]} {info.shape} and needs a C-contiguous array of "
                f"that kind, not {out.dtype} {out.shape}"
            )
        self._load_into(info, out)

    def _load(self, info: TensorInfo) -> np.ndarray:
        try:
            out = np.empty(info.shape, DTYPES[info.dtype])
        except MemoryError as error:
            raise refusal(
                info.file,
                f"tensor {show(info.name)} takes {info.end - info.start} bytes of memory",
                "convert on a machine that has them",
            ) from error
        self._load_into(info, out)
        return out

    def _load_into(self, info: TensorInfo, out: np.ndarray) -> None:
        data = out.reshape(-1).view(np.uint8)
        with self._lock, reading(info.file):
            _fill(self._descriptor(info.file), info, data)
        if info.dtype == "BOOL" and (most := data.max(initial=0)) > 1:
            raise refusal(info.file, f"tensor {show(info.name)}: BOOL holds a byte of {most}")

    def _descriptor(self, file: Path) -> int:
        """The file, opened unless it is among the last few that were used."""
        if self._open is None:
            raise ValueError(f"{self._origin}: was closed")
        if file not in self._open:
            if len(self._open) == OPEN_FILES:
                _close(self._open.popitem(last=False)[1])
            self._open[file] = os.open(file, os.O_RDONLY)
        self._open.move_to_end(file)
        return self._open[file]


def open_directory(path: str | os.PathLike) -> TensorFiles:
    """The tensors of a directory in the layout of Hugging Face; UserError names file and fault.

    Read are the files that model.safetensors.index.json lists, else model.safetensors, else all
    *.safetensors. Headers are checked here, before anything is read.
    """
    directory = Path(path)
    if not directory.is_dir():
        state = "is not a directory" if directory.exists() else "does not exist"
        raise refusal(directory, state, f"name a directory with {SINGLE} or {INDEX}")
    origin, mapped, files = _choose(directory)
    paths = {file: inside(directory, file) for file in files}
    infos: dict[str, TensorInfo] = {}
    for file, real in paths.items():
        for info in read_header(real):
            if twin := infos.get(info.name):
                raise refusal(
                    directory,
                    f"tensor {show(info.name)} is in {show(twin.file.name)} and in {show(file)}",
                    "remove the file that is not of this model",
                )
            infos[info.name] = info
    for name, file in mapped.items():
        if name not in infos or infos[name].file != paths[file]:
            raise refusal(directory / file, f"lacks {show(name)}, which {INDEX} maps to it")
    return TensorFiles(origin, infos)


def _choose(directory: Path) -> tuple[Path, dict[str, str], list[str]]:
    """What says which tensors there are, tensor -> file if an index does, and the files to read."""
    if os.path.lexists(directory / INDEX):
        mapped = _read_index(directory)
        files = sorted(set(mapped.values()))
        if SINGLE not in files and os.path.lexists(directory / SINGLE):
            raise refusal(directory, f"holds {SINGLE} and another model's {INDEX}", "remove one")
        return directory / INDEX, mapped, files
    if os.path.lexists(directory / SINGLE):
        return directory / SINGLE, {}, [SINGLE]
    return directory, {}, _list_shards(directory)


def forget(file: int, start: int = 0, size: int = 0) -> None:
    """Give the page cache of a file's bytes back (size 0: to its end); what is dirty stays."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # only advice, which some file systems do not take
            os.posix_fadvise(file, start, size, os.POSIX_FADV_DONTNEED)


def _close(file: int) -> None:
    forget(file)
    os.close(file)


def _fill(file: int, info: TensorInfo, data: np.ndarray) -> None:
    done = 0
    while done < data.size:
        at = info.start + done
        count = os.preadv(file, [data[done : done + CHUNK]], at)
        if count == 0:
            raise refusal(info.file, f"tensor {show(info.name)}: the file ends at byte {at}")
        # From a little before: the last call kept the folio in which its range ended.
        begin = max(0, at - FOLIO)
        forget(file, begin, at + count - begin)
        done += count


def _read_index(directory: Path) -> dict[str, str]:
    """Tensor -> file name, as the index has it; each name is one that `inside` takes."""
    path = directory / INDEX
    with reading(path):
        real = inside(directory, INDEX)
        if (size := real.stat().st_size) > MAX_HEADER:
            raise refusal(path, f"has {size} bytes, and an index has at most {MAX_HEADER}")
        mapped = json_object(path, real.read_bytes()).get("weight_map")
    if not isinstance(mapped, dict) or not mapped:
        raise refusal(path, f"its weight_map must map tensors to files, but is {show(mapped)}")
    for name, file in mapped.items():
        if not isinstance(file, str) or not file.endswith(SUFFIX) or re.search(r"[/\\\0]", file):
            raise refusal(
                path, f"maps {show(name)} to {show(file)}",
                f"it must be the name of a {SUFFIX} file beside it, without a directory",
            )
    for file, name in {file: name for name, file in mapped.items()}.items():
        if not os.path.lexists(directory / file):
            raise refusal(
                directory, f"lacks {show(file)}, to which {INDEX} maps {show(name)}", "fetch it"
            )
    return mapped


def _list_shards(directory: Path) -> list[str]:
    """All *.safetensors; of files that count themselves, like model-00001-of-00003, all."""
    with reading(directory):
        files = sorted(x for x in os.listdir(directory) if x.endswith(SUFFIX) and x[0] != ".")
    if not files:
        raise refusal(directory, f"holds no {SUFFIX} file", f"name one with {SINGLE} or {INDEX}")
    present = set(files)
    for file in files:
        if match := re.fullmatch(r"(.*)-[0-9]{5}-of-([0-9]{5})\.safetensors", file, re.DOTALL):
            stem, count = match.groups()
            siblings = (f"{stem}-{i:05d}-of-{count}{SUFFIX}" for i in range(1, int(count) + 1))
            if missing := next((x for x in siblings if x not in present), None):
                raise refusal(directory, f"lacks {show(missing)} beside {show(file)}", "fetch it")
    return files


def inside(directory: Path, name: str) -> Path:
    """The regular file that a name in the directory stands for.

    It lies in the directory or, where that is a snapshot in the hub's cache, among its blobs.
    """
    path = directory / name
    try:
        real, root = (Path(os.path.realpath(x, strict=True)) for x in (path, directory))
    except OSError as error:
        raise refusal(path, f"cannot be read: {error.strerror}", "fetch it") from error
    cached = root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs"
    if not real.is_relative_to(root) and not cached:
        raise refusal(
            path, "is a symbolic link that leaves the directory", "copy the file there"
        )
    if not stat.S_ISREG(real.stat().st_mode):  # a pipe would block for ever
        raise refusal(path, "is not a regular file")
    return real
