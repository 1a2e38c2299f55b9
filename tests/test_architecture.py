"""Imports go one way, rooms are packages, and no private names of jax or flax are used."""

import ast
import pathlib
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ALLOWED = {
    "ops": {"ops"},
    "models": {"ops", "models"},
    "data": {"data"},
    "training": {"ops", "models", "data", "training"},
    "compression": {"ops", "models", "data", "training", "compression", "evaluation"},
    "inference": {"ops", "models", "data", "training", "compression", "inference", "evaluation"},
    "search": {"ops", "models", "data", "training", "compression", "inference", "search", "evaluation"},
    "evaluation": {"ops", "models", "evaluation"},
    "configs": {"configs"},
}
SOURCES = [p for room in (*ALLOWED, "scripts") for p in sorted((ROOT / room).rglob("*.py"))]
SOURCES += [ROOT / f"{name}.py" for name in ("train", "eval", "sweeps")]


def imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports(path):
    room = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        assert "._src" not in name and ".experimental.pallas.ops" not in name, f"{path} imports the private {name}"
        assert name.split(".")[0] not in ALLOWED, f"{path}: {name} must be imported as lissom.{name}"
        if name.startswith("lissom.") and room in ALLOWED:
            assert name.split(".")[1] in ALLOWED[room], f"{path}: {room} may not import {name}"


def test_every_folder_is_a_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {"lissom"}
    for room in ALLOWED:
        for path in (ROOT / room).rglob("*.py"):
            folders.add(".".join(("lissom", *path.parent.relative_to(ROOT).parts)))
    assert set(project["packages"]) == folders
    for package in folders - {"lissom"}:
        assert project["package-dir"][package] == package.removeprefix("lissom.").replace(".", "/")


def test_sizes():
    for path in SOURCES:
        lines = path.read_text().count("\n")
        assert lines <= 600, f"{path} has {lines} lines"


@pytest.mark.parametrize("op", sorted(p.name for p in (ROOT / "ops").iterdir() if (p / "__init__.py").exists()))
def test_op_imports_alone(op):
    code = (
        f"import lissom.ops.{op}, sys; print([m for m in sys.modules if m.startswith('lissom.') and "
        "not m.startswith('lissom.ops')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.strip() == "[]"
