"""The floors of the architecture: a module imports only lower floors (or its own)."""

import ast
import subprocess
import sys
from pathlib import Path

FLOORS = {
    "errors": -2,
    "files": -2,
    "processes": -1,
    "streams": -2,
    "lazy": -1,
    "terminal": -1,
    "versions": -1,
    "registry": -1,
    "launch": 0,
    "mapped": 0,
    "rooms": 0,
    "config": 1,
    "ops": 2,
    "data": 2,
    "ranks": 2,
    "track": 2,
    "zero.parameters": 2,
    "models.depth": 2,
    "optim": 3,
    "models": 3,
    "objectives": 4,
    "corpus": 4,
    "inference": 4,
    "tasks": 5,
    "zero": 5,
    "assemble": 6,
    "plan": 7,
    "train": 8,
    "evaluate": 9,
    "bench": 9,
    "doctor": 9,
    "quickstart": 10,
    "api": 10,
    "cli": 11,
    "__main__": 12,
}
PACKAGE = Path(__file__).parent.parent / "fastft"


def imports(path: Path) -> list[str]:
    """What a file imports of fastft, anywhere in it but for types: 'fastft.train.loop' -> 'train.loop'."""
    found = []
    tree = ast.parse(path.read_text())
    for branch in [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]:
        branch.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found += [f"{node.module}.{a.name}" for a in node.names]
    return [name.removeprefix("fastft.") for name in found if name.startswith("fastft.")]


def floor_of(name: str) -> tuple[str, int] | None:
    """The part that a module's name belongs to, and its floor; None: fastft itself (its version)."""
    parts = name.split(".")
    for known in (".".join(parts[:2]), parts[0]):
        if known in FLOORS:
            return known, FLOORS[known]
    return None


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def violations(path: Path, name: str) -> list[str]:
    own = floor_of(name)
    assert own, name
    found = [(imported, floor_of(imported)) for imported in imports(path)]
    return [imported for imported, part in found if part and part[0] != own[0] and part[1] >= own[1]]


FILES = [p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py"]


def test_every_part_has_a_floor():
    parts = {name_of(p).split(".")[0] for p in FILES}
    assert parts == {name.split(".")[0] for name in FLOORS}, "a new part of fastft needs its floor here"


def test_imports_go_down():
    broken = {name_of(p): bad for p in FILES if (bad := violations(p, name_of(p)))}
    assert not broken


def test_only_one_room_knows_deepspeed():
    users = [name_of(p) for p in FILES if any(i.split(".")[0] == "deepspeed" for i in _top_level(p))]
    assert all(name.startswith("zero.") for name in users), users


def test_settings_are_checked_without_torch():
    """Every member of every table, and the configuration around it, is imported without torch or transformers."""
    code = (
        "import sys\nfrom fastft import rooms, config\n"
        "tables = [t for t in vars(rooms).values() if isinstance(t, rooms.Registry)]\n"
        "members = [table.get(name).Settings if hasattr(table.get(name), 'Settings') else table.get(name)\n"
        "           for table in tables for name in table.names()]\n"
        "assert len(tables) == 9 and len(members) >= 4\n"
        "config.json_schema()\n"
        "bad = {'torch', 'transformers', 'deepspeed', 'datasets'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_help_imports_next_to_nothing():
    code = (
        "import sys\nfrom fastft.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "bad = {'torch', 'pydantic', 'typer', 'rich', 'yaml', 'numpy'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=PACKAGE.parent, capture_output=True, text=True
    )
    for verb in ("train", "verify-resume", "predict"):
        assert f"  {verb} " in output.stdout


def test_no_file_is_too_long():
    long = {name_of(p): n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_the_walk_sees_an_upward_import(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from fastft.train.loop import train\n    from fastft import cli\n")
    assert violations(file, "ops.x") == ["train.loop.train", "cli"]


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
