"""Imports go one way, and importing a module of capfinder does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "capfinder"
MODULES = sorted(PACKAGE.rglob("*.py"))
MIDDLE = ("data", "models", "training", "evaluation", "exporting", "tracking")
LAYERS = (
    ("cli", "__main__"),
    ("commands",),
    ("pipeline", "prediction", "export_model", "import_model"),  # the ways in
    ("preparation", "run_context"),
    ("trained",),
    ("stages",),
    ("run_summary", "simulate", "inspection", "run_record", "etl", *MIDDLE),
    ("settings", "capmap", "interrupts"),
    ("files", "log", "allowed", "libraries", "compiled"),
    ("errors", ""),
)
# Sole importers of what is slow to load or hard to replace.
OWNERS = {
    "optuna": {f"stages/{name}.py" for name in ("study", "running_trial", "storage", "strategy")},
    "comet_ml": {"tracking/client.py"},
    "keras": {"libraries.py"},
    "tensorflow": {"libraries.py"},
    "onnx": {"exporting/onnx.py"},
    "onnxruntime": {"libraries.py"},
    "matplotlib": {"inspection/plot.py"},
    "tensorflow_datasets": {"data/records.py"},
    "apache_beam": {f"etl/beam/{name}.py" for name in ("engine", "exchange", "options")},
}


def _part(module: str) -> str:
    """capfinder.data.loader -> data; capfinder -> ''."""
    return module.split(".")[1] if "." in module else ""


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


def _layer(part: str) -> int:
    return next(level for level, names in enumerate(LAYERS) if part in names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    relative = path.relative_to(PACKAGE)
    here = relative.parts[0].removesuffix(".py").replace("__init__", "")
    for module in _imports(path):
        if not module.startswith("capfinder"):
            continue
        there = _part(module)
        names = {name for layer in LAYERS for name in layer}
        if there not in names or there == "" or there == here:
            continue
        if here == "settings" and module in ("capfinder.models", "capfinder.models.ARCHITECTURES"):
            continue  # the names alone
        assert _layer(there) >= _layer(here), f"{relative} imports {module}: upward"
        if here in MIDDLE and there in MIDDLE:
            assert (here, there) == ("exporting", "models"), f"{relative} imports {module}"


@pytest.mark.parametrize("name", OWNERS)
def test_each_heavy_library_has_its_one_importer(name):
    importers = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        if any(module.split(".")[0] == name for module in _imports(path))
    }
    assert importers <= OWNERS[name]
    assert importers


def test_the_way_in_loads_nothing_heavy():
    heavy = ("numba", "jax", "flax", "tensorflow", "keras", "optuna", "comet_ml", "polars", "orbax")
    code = f"import capfinder.cli, sys; print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert shown.strip() == "[]"
