"""The division of the house: what may import what, what is loaded when, and that the exported names are there."""

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mvae

from helpers import ROOT, assert_refused, environment, run_warm

EXPERIMENTS = ("mnist", "fashionmnist", "multimnist", "celeba", "celeba19", "vision")

FLOORS = {
    "plain": "errors files",
    "data": "data supervision",
    "paper": "experts likelihoods layers stats model objective estimators",
    "run": "schedules metrics checkpoint pictures maps processes run watch reports training",
}
"""The modules of mvae by floor, from the lowest. `estimators` takes its examples as Data, and no other of the paper."""

MAY_IMPORT = {
    "plain": {"plain"},
    "data": {"data", "plain"},
    "paper": {"paper", "data", "plain"},
    "run": {"run", "paper", "data", "plain"},
    "datasets": {"datasets", "data", "plain"},
    "synthetic": {"synthetic", "scripts", "plain"},
    "scripts": {"scripts", "datasets", "run", "paper", "data", "plain"},
}


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that importing a module runs; what a type checker alone reads isn't among them."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If) and "TYPE_CHECKING" not in ast.unparse(statement.test):
            yield from statements(statement.body + statement.orelse)
        elif isinstance(statement, ast.Try):
            yield from statements(statement.body + [s for handler in statement.handlers for s in handler.body])


def imports(path: Path, name: str) -> set[str]:
    """What a module imports when it is imported itself, as absolute names: `mvae.data.Data` for a name of a module."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for statement in statements(ast.parse(path.read_text()).body):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            above = package[: len(package) - statement.level + 1] if statement.level else []
            home = ".".join([*above, *([statement.module] if statement.module else [])])
            found |= {f"{home}.{alias.name}" for alias in statement.names}
    return found


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted((ROOT / "mvae").rglob("*.py"))}


def floor_of(module: str) -> str | None:
    """The floor of a module of mvae; None for mvae itself, which exports all of them."""
    part = module.split(".")[1] if "." in module else None
    return next((floor for floor, names in FLOORS.items() if part in names.split()), part)


def arrows(module: str) -> set[str]:
    """The modules of mvae that a module of mvae imports."""
    found = set()
    for name in imports(MODULES[module], module):
        if name.split(".")[0] == "mvae":
            found.add(name if name in MODULES else name.rpartition(".")[0])
    return found


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_one_of_a_higher_floor(module: str) -> None:
    floor = floor_of(module)
    for other in arrows(module):
        assert floor is not None, f"importing mvae would import {other}"
        assert floor_of(other) in MAY_IMPORT[floor], f"{module} ({floor}) imports {other} ({floor_of(other)})"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_needs_what_windows_lacks_when_it_is_imported(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(MODULES[module], module)} & {
        "fcntl",
        "resource",
        "pwd",
        "termios",
    }


def test_of_the_paper_the_estimators_alone_take_data() -> None:
    paper = [f"mvae.{name}" for name in FLOORS["paper"].split()]
    assert [module for module in paper if "mvae.data" in arrows(module)] == ["mvae.estimators"]


def test_no_modules_import_each_other_in_a_circle() -> None:
    left = {module: arrows(module) for module in MODULES}
    while free := [module for module, needed in left.items() if not needed & left.keys()]:
        for module in free:
            del left[module]
    assert not left


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments_do_not_import_each_other(experiment: str) -> None:
    others = {*EXPERIMENTS} - {experiment}
    for path in (ROOT / experiment).glob("*.py"):
        assert not {name.split(".")[0] for name in imports(path, name_of(path))} & others, path


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_networks_need_torch_and_mvae_alone(experiment: str) -> None:
    path = ROOT / experiment / "model.py"
    needed = {name.split(".")[0] for name in imports(path, name_of(path))}
    assert needed - sys.stdlib_module_names <= {"torch", "mvae"}


# What is loaded.


def loaded(code: str) -> set[str]:
    """The modules that a fresh process has loaded at the end of `code`."""
    program = f"{code}\nimport sys, json\nprint(json.dumps([*sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=300, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_training_needs_nothing_of_terminals_processes_and_archives() -> None:
    code = "import mvae.training, mvae.checkpoint; from mnist.model import build_model"
    everything = loaded(f"{code}; mvae.checkpoint.outline(build_model, 64)")
    assert not everything & {"torchvision", "torch._dynamo", "tensorboard"}  # each takes a second or more to import
    modules = {name for name in everything if name.split(".")[0] == "mvae"}
    assert "mvae.training" in modules
    for module in modules:
        needed = {name.split(".")[0] for name in imports(MODULES[module], module)}
        assert not needed & {"argparse", "fcntl", "zipfile", "subprocess"}, module


def test_mvae_is_imported_without_torch() -> None:
    assert "torch" not in loaded("import mvae")


def test_scripts_read_their_flags_before_torch_is_loaded() -> None:
    others = ("model.py", "setup.py", "watermark.py")
    scripts = [str(path) for name in EXPERIMENTS for path in (ROOT / name).glob("*.py") if path.name not in others]
    assert len(scripts) >= 4 * len(EXPERIMENTS)
    code = f"""
import pathlib, runpy, sys
for script in {scripts}:
    sys.argv = [script, "-h"]
    sys.path[0] = str(pathlib.Path(script).parent)
    sys.modules.pop("datasets", None)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit:
        pass"""
    assert not loaded(code) & {"torch", "torchvision", "cv2"}


# What is exported.


def exported_to_type_checkers() -> dict[str, str]:
    """The names that mvae/__init__.py imports for type checkers, with their modules."""
    tree = ast.parse(MODULES["mvae"].read_text())
    blocks = [s for s in tree.body if isinstance(s, ast.If) and ast.unparse(s.test) == "TYPE_CHECKING"]
    found = [s for block in blocks for s in block.body if isinstance(s, ast.ImportFrom)]
    return {alias.name: str(statement.module) for statement in found for alias in statement.names}


def test_exported_names_are_listed_alike_thrice() -> None:
    homes = {name: module for module, names in mvae._HOMES.items() for name in names}
    assert exported_to_type_checkers() == homes
    assert sorted(mvae.__all__) == sorted(homes)
    assert len(set(mvae.__all__)) == len(mvae.__all__)


@pytest.mark.parametrize("name", mvae.__all__)
def test_exported_name_is_that_of_its_module(name: str) -> None:
    home = importlib.import_module(f"mvae.{exported_to_type_checkers()[name]}")
    assert getattr(mvae, name) is getattr(home, name)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'mvae' has no attribute 'MVEA'"):
        mvae.MVEA  # noqa: B018


# The experiments' folders, as a user meets them.


@pytest.mark.parametrize("script", ["train.py", "sample.py", "embed.py", "explore.py", "loglike.py"])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_script_explains_itself(experiment: str, script: str, tmp_path: Path) -> None:
    done = run_warm(f"{experiment}/{script}", "-h", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {script}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("mnist/train.py", ["--epochs", 0]),
        ("mnist/train.py", ["--preset", "best"]),
        ("celeba/sample.py", []),
        ("fashionmnist/explore.py", ["model_best.pth.tar", "--cache-dir", "cache"]),
        ("vision/setup.py", []),
        ("vision/setup.py", ["edge", "faces"]),
        ("vision/watermark.py", ["one.png", "two.png"]),
    ],
)
def test_wrong_call_is_one_line(script: str, words: list[object], tmp_path: Path) -> None:
    done = run_warm(script, *words, cwd=tmp_path)
    assert_refused(done, 2, f"{Path(script).name}", "; -h shows all flags")
    assert list(tmp_path.iterdir()) == []
