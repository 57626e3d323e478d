"""Rooms only look down: who may import whom in src/svp, read from the syntax trees, imports inside functions included."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "svp"
LADDER = [  # from the ground up; a room may import what lies below it
    {"errors"},
    {"options", "registry", "extras", "preprocessing"},  # up to here no torch: `svp --help` stays fast
    {"ops"},
    {"seams"},
    {"methods", "backbones", "data"},  # three neighbours that have never heard of each other
    {"model"},
    {"convert", "training"},
    {"studies", "analysis", "export"},
    {"cli", "demo", "serve"},  # may use everything below
    {"__init__", "__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(LADDER) for room in rooms}
LIGHT = 2  # floors below this one, and the command line's start, import no torch
HEAVY = {"torch", "torchvision", "timm", "scipy", "sklearn", "matplotlib", "pyarrow", "transformers"}
FILES = sorted(SRC.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere in a file, by statement or by import_module("…")."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute and whole: from svp.room.file import name"
            names = [f"svp.{alias.name}" for alias in node.names] if node.module == "svp" else [node.module or ""]
            found += [(node.lineno, name) for name in names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            found += [(node.lineno, text) for text in starts(node.args[0])]
    return found


def starts(node: ast.expr) -> list[str]:
    """The constant beginning of a text, where it names a room: "svp.data.sources." of f"svp.data.sources.{kind}"."""
    first = node.values[0] if isinstance(node, ast.JoinedStr) and node.values else node
    text = first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""
    return [text] if text.startswith("svp.") and len(text) > len("svp.") else []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_rooms_only_look_down(path):
    here = room_of(path)
    assert here in FLOOR, f"{path.name}: give it a floor in LADDER"
    for line, name in imports(ast.parse(path.read_text(encoding="utf-8"))):
        if name.split(".")[0] != "svp":
            continue
        parts = name.split(".")
        assert len(parts) > 1, f"{path}:{line}: `import svp` is for users; import from the room"
        there = parts[1]
        assert there in FLOOR, f"{path}:{line}: {there} has no floor"
        assert there == here or FLOOR[there] < FLOOR[here], f"{path}:{line}: {here} imports {there}"


@pytest.mark.parametrize("path", [p for p in FILES if FLOOR.get(room_of(p), 9) < LIGHT], ids=lambda p: p.name)
def test_the_lowest_floors_know_no_heavy_package(path):
    heavy = {name.split(".")[0] for _, name in imports(ast.parse(path.read_text(encoding="utf-8")))} & HEAVY
    assert not heavy, f"{path} imports {', '.join(sorted(heavy))}"


def test_every_room_of_the_ladder_is_there_or_planned():
    there = {room_of(path) for path in FILES}
    assert set(FLOOR) - there <= {"analysis", "export", "demo", "serve"}
