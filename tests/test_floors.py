"""The floors of the architecture: a module imports only lower floors (or its own)."""

import ast
from pathlib import Path

FLOORS = {
    "errors": -1,
    "files": -1,
    "launch": 0,
    "registry": 0,
    "config": 0,
    "ops": 1,
    "data": 1,
    "optim": 2,
    "models": 2,
    "tasks": 3,
    "train": 4,
    "evaluate": 5,
    "quickstart": 6,
    "doctor": 5,
    "plan": 5,
    "cli": 7,
    "__main__": 8,
}
PACKAGE = Path(__file__).parent.parent / "fastft"


def imports(path: Path) -> list[str]:
    """Parts of fastft that a file imports, anywhere in it: 'fastft.train.loop' -> 'train'."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found += [f"{node.module}.{a.name}" for a in node.names] if node.module == "fastft" else [node.module]
    return [name.split(".")[1] for name in found if name.startswith("fastft.")]


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def violations(path: Path, part: str) -> list[str]:
    known = [name for name in imports(path) if name in FLOORS]
    return [name for name in known if name != part and FLOORS[name] >= FLOORS[part]]


def test_every_part_has_a_floor():
    parts = {part_of(p) for p in PACKAGE.rglob("*.py")} - {"__init__"}
    assert parts == set(FLOORS), "a new part of fastft needs its floor here"


def test_imports_go_down():
    broken = {
        str(p.relative_to(PACKAGE)): bad
        for p in PACKAGE.rglob("*.py")
        if part_of(p) != "__init__" and (bad := violations(p, part_of(p)))
    }
    assert not broken


def test_the_walk_sees_an_upward_import(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from fastft.train.loop import train\n    from fastft import cli\n")
    assert violations(file, "ops") == ["train", "cli"]


def test_torch_free_kernels_and_single_rooms():
    """csrc knows no torch; triton and pybind11's header are each met in one room."""
    for path in (PACKAGE.parent / "csrc").rglob("*"):
        if path.suffix in (".cpp", ".cu", ".h", ".cuh"):
            text = path.read_text()
            assert "torch/" not in text and "ATen" not in text, path
            assert path.name == "bindings.cpp" or "pybind11" not in text, path
    users = [p for p in PACKAGE.rglob("*.py") if any(i.startswith("triton") for i in _top_level(p))]
    assert all("triton" in p.parts for p in users), users


def _top_level(path: Path) -> list[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names] + [
        n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.module
    ]
