"""The house: wings in one order, tests beside what they test, the field's words, sizes."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import halfbyte
from halfbyte.config.options import RULES, TrainConfig

PACKAGE = Path(halfbyte.__file__ or "").parent
TESTS = Path(__file__).parent
ROOT = TESTS.parent

GROUND = ["errors", "progress", "ledger", "codebooks"]
WINGS = [
    *GROUND,
    "config",
    "ops",
    "files",
    "memory",
    "data",
    "model",
    "quantization",
    "adapters",
    "engine",
    "run",
    "planning",
    "exporters",
    "training",
    "nf4",
    "integrations",
    "cli",
    "__init__",
    "__main__",
]
"""Who is lower is imported by who is higher, never the other way round."""

TESTED_ELSEWHERE = {
    "__init__": "test_package_gives_functions_not_modules in cli/test_cli.py",
    "__main__": "two lines",
    "nf4": "names of quantization/tensor.py and bnb_format.py",
    "errors": "every test of a refusal; cli/test_cli.py prints them",
    "progress": "two callbacks",
    "quantization.params4bit": "quantization/test_hf_quantizer.py",
    "adapters.peft_config": "adapters/test_peft_files.py",
    "data.cells": "data/test_formats.py",
    "data.encoder": "data/test_renderer.py and test_renderer_masks.py, through the renderer",
    "data.json_rows": "data/test_readers.py",
    "data.packed": "data/test_readers.py",
    "data.tables": "data/test_readers.py",
    "data.tracked": "data/test_origins.py",
    "model.meta": "model/test_architecture.py",
    "integrations.checkpointing": "integrations/test_optimize.py",
    "integrations.layers": "integrations/test_optimize.py",
    "cli.__init__": "cli/test_cli.py",
    "cli.bench": "cli/test_cli.py",
    "cli.checkpoint": "run/test_checkpoint.py",
    "cli.console": "cli/test_cli.py",
    "cli.data": "cli/test_cli.py",
    "cli.demo": "cli/test_cli.py",
    "cli.doctor": "cli/test_cli.py",
    "cli.eval": "engine/test_evaluate.py",
    "cli.explain": "cli/test_cli.py",
    "cli.export": "exporters/test_export.py",
    "cli.merge": "cli/test_cli.py",
    "cli.options": "cli/test_cli.py",
    "cli.orders": "cli/test_cli.py",
    "cli.plan": "planning/test_plan.py",
    "cli.quantize": "quantization/test_cache.py",
    "cli.train": "cli/test_cli.py",
    "config.text_file": "config/test_build.py",
    "config.verbs": "cli/test_cli.py",
    "config.rules": "config/test_options.py",
    "files.publish": "exporters/test_export.py, beside the Hub on this machine",
    "integrations.memory_callback": "integrations/test_optimize.py, beside the script's trainer",
    "model.class_swap": "model/test_fusion.py",
    "ops.__init__": "names",
    "ops.cpu_calls": "ops/test_cpu.py: the library is called through the operations",
    "ops.cpu_library": "ops/test_cpu.py",
    "ops.library": "ops/test_passes.py: fakes, and planning/test_tracker.py: workspaces",
    "ops.lora": "adapters/test_lora.py holds both branches to autograd",
    "ops.adamw8bit": "engine/test_adamw8bit.py, beside bitsandbytes",
    "ops.triton_kernels": "ops/test_gpu_calls.py launches every kernel",
    "planning.memory_plan": "planning/test_search.py and test_dry_run.py",
    "planning.parts": "planning/test_tracker.py",
    "quantization.weights": "quantization/test_load.py",
    "quantization.writer": "quantization/test_cache.py, and cli/test_cli.py",
    "run.load": "exporters/test_export.py and adapters/test_initial.py",
    "training.rehearsal": "whole/test_fit.py and whole/test_paging.py: in a process with limits",
    "training.trainer": "whole/test_train.py",
    "training.promise": "training/test_recovery.py",
}
"""Modules without a test file of their own, and where what they do is held."""

GLOSSARY = """
    spell spelling SPELLINGS meaning Room Mapped Slots Slot Travel Stop Desk DESKS Ahead
    _Lane Pieces bounds Encoded settle settled_in_words remedies Watch TensorBytes _bury
    resident elsewhere _Tape attended _Unneeded _Surroundings _Playing Filler filler
    SavedModule held_as LASTING PASSING allocate_apart _YOUNGER become _lively slope
    strangers LENIENCE NormForm MlpForm AttentionForm hearing_scratch
""".split()
"""Private words that PyTorch's readers would need a dictionary for; what we say is in the code."""


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports(name: str, path: Path) -> set[str]:
    """Modules of ours that a module imports, anywhere in it."""
    found, package, known = set(), name.split(".")[:-1], modules()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) - node.level + 1]
        base += node.module.split(".") if node.module else []
        for alias in node.names:
            deep, flat = ".".join([*base, alias.name]), ".".join(base)
            candidates = (deep, f"{deep}.__init__", flat, f"{flat}.__init__")
            found |= {next((c for c in candidates if c in known and c != name), "__init__")}
    return found


def wing(name: str) -> str:
    return name.split(".")[0]


def test_every_wing_has_its_place():
    assert {wing(name) for name in modules()} == set(WINGS)


def test_imports_never_climb():
    wrong = [
        f"{name} imports {other}"
        for name, path in modules().items()
        if name != "__init__"
        for other in imports(name, path)
        if WINGS.index(wing(other)) > WINGS.index(wing(name))
    ]
    assert not wrong, wrong


def test_no_import_cycles():
    graph = {name: imports(name, path) for name, path in modules().items() if name != "__init__"}
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


def test_wings_export_nothing_again():
    for path in PACKAGE.glob("*/__init__.py"):
        if path.parent.name not in ("ops", "cli"):  # the operations, and the command line itself
            assert not path.read_text(), path


def test_ground_and_options_import_no_torch():
    ground = {"errors", "progress", "ledger"}
    for name, path in modules().items():
        if name in ground or wing(name) == "config":
            tree = ast.parse(path.read_text())
            plain = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
            plain += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
            assert not any(n.split(".")[0] in ("torch", "transformers") for n in plain), name


def test_every_module_has_its_namesake_or_a_reason():
    missing, needless = [], []
    for name in modules():
        *folders, leaf = name.split(".")
        if leaf == "__init__" and folders and folders[0] not in ("ops", "cli"):
            continue
        there = TESTS.joinpath(*folders, f"test_{leaf}.py").exists()
        if not there and name not in TESTED_ELSEWHERE:
            missing.append(name)
        if there and name in TESTED_ELSEWHERE:
            needless.append(name)
    assert not missing and not needless, (missing, needless)
    assert TESTED_ELSEWHERE.keys() <= modules().keys()


def test_no_private_words():
    wrong = []
    for path in [*PACKAGE.rglob("*.py"), *TESTS.rglob("*.py")]:
        if path == Path(__file__):
            continue
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if token.type == tokenize.NAME and token.string in GLOSSARY:
                wrong.append(f"{path.relative_to(ROOT)}:{token.start[0]}: {token.string}")
    assert not wrong, wrong


def test_long_files_say_why():
    for name, path in modules().items():
        text = path.read_text()
        if sum(bool(line.strip()) for line in text.splitlines()) > 400:
            assert "One file because" in (ast.get_docstring(ast.parse(text)) or ""), name


def test_functions_are_of_a_size():
    """Lines of code, without the docstring."""
    sizes = {}
    for name, path in modules().items():
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node, clean=False) is not None
                first = (node.body[0].end_lineno or 0) if docstring else node.lineno - 1
                head = node.body[0].lineno - node.lineno if docstring else 0
                body = [line for line in lines[first : node.end_lineno] if line.strip()]
                sizes[f"{name}.{node.name}"] = head + len(body)
    assert max(sizes.values()) <= 70, max(sizes, key=lambda key: sizes[key])


def test_every_option_of_a_training_says_what_a_resume_may_do():
    silent = [name for name, rules in RULES.items() if rules.resume is None]
    assert not silent and RULES.keys() == TrainConfig.model_fields.keys()


def test_the_tree_in_the_documentation_is_the_tree():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "draw_tree.py"), "--check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("word", ["DESIGN", "../shared/HOUSE"])
def test_nothing_cites_what_is_not_here(word: str):
    cited = [
        str(path.relative_to(ROOT))
        for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("*.md"), *TESTS.rglob("*.py")]
        if path != Path(__file__) and word in path.read_text()
    ]
    assert not cited, cited


def test_tests_that_documents_name_are_there():
    there = set[str]()
    for path in TESTS.rglob("test_*.py"):
        names = (node for node in ast.walk(ast.parse(path.read_text())))
        there |= {node.name for node in names if isinstance(node, ast.FunctionDef)}
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        if path.name != "log.md":  # which says what was
            named = set(re.findall(r"`(test_[a-z0-9_]+)`", path.read_text()))
            assert named <= there, (path.name, sorted(named - there))
