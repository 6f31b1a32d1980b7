"""Imports only fall: a module may import from its own floor or from a lower one."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "kernels_pallas": 0,
    "kimijax": 1,  # its __init__ alone: every module below it is listed
    "kimijax.config": 1,
    "kimijax.config_tree": 1,
    "kimijax.errors": 1,
    "kimijax.presets": 1,
    "kimijax.cache": 2,
    "kimijax.fork": 2,
    "kimijax.rows": 2,
    "kimijax.ops": 2,
    "kimijax.layers": 3,
    "kimijax.model": 4,
    "kimijax.parallel": 5,
    "kimijax.checkpoint": 6,
    "kimijax.convert": 6,
    "kimijax.data": 6,
    "kimijax.metrics": 6,
    "kimijax.optim": 6,
    "kimijax.sampling": 6,
    "kimijax.generate": 7,
    "kimijax.infer": 7,
    "kimijax.train": 7,
    "kimijax.cli": 8,
    "kimijax.commands": 8,
    "kimijax.evals": 8,
    "kimijax.planner": 8,
    "kimijax.sweep": 8,
    "experiments": 9,
    "notebooks": 9,
    "tests": 9,
}


def floor_of(module: str) -> int | None:
    """The floor of a module or of a name in it; None for what is not ours."""
    parts = module.split(".")
    for size in range(len(parts), 0, -1):
        prefix = ".".join(parts[:size])
        if prefix in FLOORS and (prefix != "kimijax" or size == len(parts)):
            return FLOORS[prefix]
    if parts[0] == "kimijax":
        raise LookupError(f"{module} has no floor: give it one in FLOORS of tests/test_floors.py")
    return None


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in a source, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = [*(above if node.level else []), *filter(None, [node.module])]
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def violations(source: str, module: str, package: str) -> list[str]:
    """The imports of a module that climb, one line each."""
    floor = floor_of(module)
    return [
        f"{module}:{line} (floor {floor}) imports {name} (floor {floor_of(name)})"
        for line, name in imports(source, package)
        if (floor_of(name) or 0) > floor
    ]


def test_imports_only_fall():
    climbing = []
    for top in sorted({module.split(".")[0] for module in FLOORS}):
        for path in sorted((ROOT / top).rglob("*.py")):
            package = ".".join(path.parent.relative_to(ROOT).parts)
            module = package if path.stem == "__init__" else f"{package}.{path.stem}"
            climbing += violations(path.read_text(), module, package)
    assert not climbing, "\n".join(climbing)


@pytest.mark.parametrize(
    "module, source",
    [
        ("kernels_pallas.attention.ref", "from kimijax.config import MLAConfig"),
        ("kernels_pallas.attention.ref", "import kimijax"),
        ("kimijax.config", "import kimijax.ops.rope"),
        ("kimijax.layers.mla", "from kimijax import model"),
        ("kimijax.layers.mla", "from .. import model"),
        ("kimijax.layers.mla", "from ..parallel.mesh import Plan"),
        ("kimijax.model", "def late():\n    import kimijax.train as train"),
        ("kimijax.evals.needle", "import tests.helpers"),
    ],
)
def test_a_climbing_import_is_found(module, source):
    assert len(violations(source, module, module.rpartition(".")[0])) == 1


@pytest.mark.parametrize(
    "module, source",
    [
        ("kernels_pallas.attention", "import jax\nfrom ..partial import merge"),
        ("kimijax.layers.mla", "from kernels_pallas import attention\nfrom . import proj"),
        ("kimijax.model", "import os\nfrom .layers.mla import MLA\nfrom kimijax import presets"),
        ("experiments.needle", "from kimijax import cli\nfrom kimijax.evals import needle"),
    ],
)
def test_a_falling_import_is_let_through(module, source):
    assert violations(source, module, module.rpartition(".")[0]) == []


def test_a_module_without_a_floor_is_named():
    with pytest.raises(LookupError, match="kimijax.attic has no floor"):
        violations("", "kimijax.attic", "kimijax")
