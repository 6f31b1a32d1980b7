"""The notebooks, run by this interpreter in processes of their own.

    python -m tests.notebooks [NAME ...]    # again, and written back with their pictures alone
"""

import base64
import io
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PICTURE = "image/png"
COLOURS = 256  # of a picture as it is kept


def execute(path: Path, **env: str) -> NotebookNode:
    """The notebook with all outputs; CellExecutionError: a cell failed.

    env  variables besides this process's own; how many devices there are is left to the notebook
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as scratch:
        # No kernel that is installed somewhere, and no file outside of `scratch`.
        manager = AsyncKernelManager(
            kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
            connection_file=str(Path(scratch) / "kernel.json"), transport="ipc",
            ip=str(Path(scratch) / "socket"),
        )
        client = NotebookClient(
            notebook, km=manager, timeout=900, resources={"metadata": {"path": str(path.parent)}}
        )
        flags = os.environ.get("XLA_FLAGS", "").split()
        own = {
            "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "IPYTHONDIR": scratch,
            "TMPDIR": scratch, "XLA_FLAGS": " ".join(f for f in flags if "device_count" not in f),
        }
        return client.execute(cleanup_kc=True, env=dict(os.environ) | own | env)


def pictures_only(notebook: NotebookNode) -> NotebookNode:
    """What is committed: sources and pictures, no text, no counts, no times."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            found = [out.data[PICTURE] for out in cell.outputs if PICTURE in out.get("data", {})]
            data = [{PICTURE: picture} for picture in found]
            cell.outputs = [nbformat.v4.new_output("display_data", data=d) for d in data]
            cell.execution_count = None
    notebook.metadata = {k: notebook.metadata[k] for k in ("kernelspec", "language_info")}
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def shrink(notebook: NotebookNode) -> None:
    """Its pictures in few colours, for the repository: half the bytes."""
    for cell in notebook.cells:
        for out in cell.get("outputs", []):
            image = Image.open(io.BytesIO(base64.b64decode(out.data[PICTURE]))).convert("RGB")
            stream = io.BytesIO()
            image.quantize(COLOURS).save(stream, "PNG", optimize=True)
            out.data[PICTURE] = base64.b64encode(stream.getvalue()).decode()


def main(names: list[str]) -> None:
    """Run them, or all, and write each back. SystemExit: there is no such notebook."""
    if unknown := sorted(set(names) - {path.stem for path in PATHS}):
        known = ", ".join(path.stem for path in PATHS)
        sys.exit(f"error: there is no notebook {unknown[0]!r:.40}, there are {known}")
    for path in PATHS:
        if names and path.stem not in names:
            continue
        began = time.monotonic()
        notebook = pictures_only(execute(path))
        shrink(notebook)
        text = nbformat.writes(notebook)
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(text + "\n")
        temporary.replace(path)
        print(f"{path.name}: {time.monotonic() - began:.0f} s, {len(text) / 1024:.0f} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
