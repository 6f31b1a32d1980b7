"""Notebooks run from top to bottom, are short, and hold no output but pictures."""

import base64

import nbformat
import pytest

from tests.notebooks import PATHS, PICTURE, execute, pictures_only

CELLS, LARGEST = 15, 100_000  # bytes of the pictures of one
SHORTER = {"TOKENS": "16384"}  # of index_choices


def outputs(notebook):
    return [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_is_short_and_holds_pictures_alone(path):
    text = path.read_text()
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert 0 < len(notebook.cells) <= CELLS
    assert nbformat.writes(pictures_only(notebook)) + "\n" == text
    sizes = [len(base64.b64decode(out.data[PICTURE])) for out in outputs(notebook)]
    assert sizes and sum(sizes) < LARGEST


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_runs(path):
    kept = outputs(nbformat.read(path, as_version=4))
    made = outputs(pictures_only(execute(path, **SHORTER)))
    assert len(made) == len(kept)
