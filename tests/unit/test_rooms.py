"""The rooms of the house: which may import which, and how long a file may be."""

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLOORS = ("cluster", "jobs", "launcher")
"""Each may import itself and those before it."""
FILES = sorted(path.relative_to(ROOT) for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))


def room_of(module: str) -> str:
    parts = module.split(".")
    is_inner = len(parts) > 2 and ROOT.joinpath(*parts[:3]).is_dir()
    return ".".join(parts[: 3 if is_inner else 2])


def imports_of(file: Path) -> Iterator[str]:
    """The modules of ours that a file imports, also inside of functions and for types alone."""
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in FLOORS:
            for name in node.names:
                full = f"{node.module}.{name.name}"
                is_module = (ROOT / full.replace(".", "/")).with_suffix(".py").exists()
                yield full if is_module else node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.partition(".")[0] in FLOORS)


def test_imports_run_one_way_between_floors() -> None:
    upward = [
        f"{file} imports {module}"
        for file in FILES
        for module in imports_of(file)
        if FLOORS.index(module.partition(".")[0]) > FLOORS.index(file.parts[0])
    ]
    assert upward == []


def test_rooms_import_each_other_without_a_circle() -> None:
    imported = defaultdict[str, set[str]](set)
    for file in FILES:
        room = room_of(".".join(file.with_suffix("").parts))
        imported[room] |= {room_of(module) for module in imports_of(file)} - {room, *FLOORS}
    while free := {room for room, others in imported.items() if not others & imported.keys()}:
        for room in free:
            del imported[room]
    assert dict(imported) == {}


def test_every_file_can_be_read_in_one_sitting() -> None:
    lengths = {str(file): len((ROOT / file).read_text().splitlines()) for file in FILES}
    assert {file: length for file, length in lengths.items() if length > 350} == {}


def test_every_room_says_what_it_holds() -> None:
    for room in sorted({file.parent for file in FILES}):
        assert ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text())), room


def test_no_two_files_of_tests_have_one_name() -> None:
    """Pytest imports them by their names alone, and cannot collect a second one; the GPU tier is collected alone."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py") if path.parent.name != "gpu")
    assert [name for name, count in names.items() if count > 1] == []
