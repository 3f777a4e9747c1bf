"""DESIGN section 3: data flows up the floors, imports go down only, and never in a circle."""

import ast
from pathlib import Path

import halfbyte

ROOT = Path(halfbyte.__file__ or "").parent
FLOORS = {
    0: ["codebooks", "config", "errors", "objects"],
    1: ["ops"],
    2: ["nf4", "hub", "chat", "template", "rows", "forms", "run", "recompute", "memory", "paged"],
    3: ["lora", "saved", "adapter", "loss", "adamw8bit", "batches", "attention", "fuse", "embedding"],
    4: [
        "architecture",
        "card",
        "export",
        "publish",
        "trackers",
        "filler",
        "quantized",
        "load",
        "dataset",
        "checkpoint",
        "merge",
        "plan",
        "selftest",
        "learner",
        "ledger",
    ],
    5: ["train", "evaluate", "generate", "rehearsal"],
    6: ["hf", "quantizer", "cli", "__init__", "__main__"],
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}


def modules() -> dict[str, Path]:
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sorted(ROOT.rglob("*.py"))}


def imports(name: str, path: Path) -> set[str]:
    """Modules of ours that a module imports, anywhere in it."""
    found = set()
    package = name.split(".")[:-1]
    known = modules()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                deep, flat = ".".join([*base, alias.name]), ".".join(base)
                for candidate in (deep, f"{deep}.__init__", flat, f"{flat}.__init__"):
                    if candidate in known and candidate != name:
                        found.add(candidate)
                        break
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("halfbyte"):
            found.add((node.module or "").removeprefix("halfbyte").strip(".") or "__init__")
    return found


def room(name: str) -> str:
    return name.split(".")[0]


def test_every_room_has_a_floor():
    assert {room(name) for name in modules()} == set(FLOOR_OF)


def test_imports_go_down_only():
    wrong = [
        f"{name} (F{FLOOR_OF[room(name)]}) imports {other} (F{FLOOR_OF[room(other)]})"
        for name, path in modules().items()
        if name != "__init__"
        for other in imports(name, path)
        if FLOOR_OF[room(other)] > FLOOR_OF[room(name)]
    ]
    assert not wrong, wrong


def test_no_import_cycles():
    graph = {name: imports(name, path) & set(modules()) for name, path in modules().items() if name != "__init__"}
    state: dict[str, int] = {}

    def visit(name: str, trail: list[str]) -> None:
        assert state.get(name) != 1, f"import cycle: {' -> '.join([*trail, name])}"
        if name not in state:
            state[name] = 1
            for other in graph.get(name, ()):
                visit(other, [*trail, name])
            state[name] = 2

    for name in graph:
        visit(name, [])


def test_facts_import_no_torch():
    for name in FLOORS[0]:
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not any(n.split(".")[0] in ("torch", "transformers") for n in names), name
