"""The last file written of a checkpoint: the size and digest of every other one.

Orbax does not checksum arrays (flipped bits restore in silence). Reading all of a large checkpoint
takes long, so each process of a job reads its share of the files, when they are written and when
they are verified.
"""

import hashlib
import json
from pathlib import Path

import jax

from kimijax.checkpoint.common import brief, sync
from kimijax.checkpoint.places import files, in_bucket, remove

MANIFEST, PARTS = "manifest.json", "digests"


def write_part(path: Path) -> None:
    """This process's share of the files reaches the disk, its digests go to a file for process 0.

    Every process calls it when all files are written, and then meets the others.
    """
    mine = _share([*_files(path)])
    if not in_bucket(path):  # there, what is written has reached it, and needs no directory
        sync(path / name for name in mine)
        (path / PARTS).mkdir(exist_ok=True)
    part = path / PARTS / f"{jax.process_index():05d}.json"
    part.write_text(json.dumps({name: _digest(path / name) for name in mine}))


def write_manifest(path: Path) -> None:
    """The parts of all processes become the manifest, on the disk on return. Process 0 calls it."""
    digests = {}
    for part in sorted((path / PARTS).iterdir()):
        digests |= json.loads(part.read_text())
    remove(path / PARTS)
    (path / MANIFEST).write_bytes(_text(_files(path), digests))
    if not in_bucket(path):
        sync([p for p in path.rglob("*") if p.is_dir()] + [path / MANIFEST, path])


def damage(path: Path, verify: bool) -> str | None:
    """Why a checkpoint cannot be trusted, as "has ..."; None: all that was looked at is right.

    verify  read this process's share of the files; else only their names and sizes are compared
    """
    try:
        if not (path / MANIFEST).is_file():
            return f"has no {MANIFEST}"
        text, sizes = (path / MANIFEST).read_bytes(), _files(path)
        listed = json.loads(text)
        said = {name: entry["blake2b"] for name, entry in listed.items()}
        read = {name: _digest(path / name) for name in (_share([*sizes]) if verify else ())}
        found = _text(sizes, {name: said.get(name) for name in sizes} | read)
        if text == found:  # one canonical form: equal texts are equal files
            return None
        found = json.loads(found)
        wrong = [name for name in listed | found if listed.get(name) != found.get(name)]
        return f"differs from its {MANIFEST} in {wrong[0]!r}"
    except OSError as error:
        return f"cannot be read: {brief(error)}"
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return f"has a damaged {MANIFEST}"  # no JSON, not of this form, or no such text


def _files(path: Path) -> dict[str, int]:
    kept = lambda name: name != MANIFEST and not name.startswith(f"{PARTS}/")  # noqa: E731
    return {name: size for name, size in files(path).items() if kept(name)}


def _share(names: list[str]) -> list[str]:
    return names[jax.process_index() :: jax.process_count()]


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()


def _text(sizes: dict[str, int], digests: dict[str, str | None]) -> bytes:
    both = {n: {"size": sizes[n], "blake2b": digest} for n, digest in sorted(digests.items())}
    return json.dumps(both, indent=1).encode()
