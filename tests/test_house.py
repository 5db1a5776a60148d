"""The division of the house: what may import what, that every flag is documented, and what a wrong call says."""

import ast
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mvae import OPENMP, cli

import pytest

from helpers import ROOT, assert_refused, environment, run, run_warm, script

EXPERIMENTS = ("mnist", "fashionmnist", "multimnist", "celeba", "celeba19", "vision")

FLOORS = {
    "bottom": {"errors", "files", "cli", "progress"},
    "paper": {"experts", "likelihoods", "layers", "model", "objective", "estimators"},
    "data": {"data"},
    "run": {"run"},
    "tools": {"tools"},
}
"""The modules and folders of mvae by floor, from the lowest."""

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "mvae").rglob("*.py"))
}
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in EXPERIMENTS
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text()
)
OPTIONAL = {"dash", "werkzeug", "umap", "dlib"}
"""Packages that are imported where they are used, since they need not be installed."""


def imported(statement: ast.AST, package: list[str]) -> set[str]:
    """Return what a statement imports, as absolute names: `mvae.data.Data` for a name of a module."""
    if isinstance(statement, ast.Import):
        return {alias.name for alias in statement.names}
    if isinstance(statement, ast.ImportFrom):
        above = package[: len(package) - statement.level + 1] if statement.level else []
        home = ".".join([*above, *([statement.module] if statement.module else [])])
        return {f"{home}.{alias.name}" for alias in statement.names}
    return set()


def imports(path: Path, *, at_top: bool = True) -> list[str]:
    """Return what a file imports at its top, in order; or else anywhere below."""
    package = list(path.relative_to(ROOT).parent.parts)
    tree = ast.parse(path.read_text())
    statements = tree.body if at_top else [node for node in ast.walk(tree) if node not in tree.body]
    return [name for statement in statements for name in sorted(imported(statement, package))]


def of(package: str, path: Path) -> set[str]:
    """Return the second part of each name that a file imports from a package."""
    return {name.split(".")[1] for name in imports(path) if name.startswith(f"{package}.")}


def sources() -> Iterator[Path]:
    """Yield the files of mvae, and of the experiments."""
    yield from MODULES.values()
    yield from (path for name in EXPERIMENTS for path in sorted((ROOT / name).glob("*.py")))


def test_arrows_point_down() -> None:
    assert {name.split(".")[1] for name in MODULES if "." in name} == set().union(*FLOORS.values())
    names = list(FLOORS)
    below = {name: set().union(*(FLOORS[floor] for floor in names[: names.index(name) + 1])) for name in names}
    for module, path in MODULES.items():
        floor = next((floor for floor in names if module.partition(".")[2].split(".")[0] in FLOORS[floor]), None)
        if floor:  # all but mvae/__init__.py
            assert of("mvae", path) <= below[floor], module


def test_no_modules_import_each_other_in_a_circle() -> None:
    def arrows(path: Path) -> set[str]:
        return {
            next(m for m in (name, name.rpartition(".")[0]) if m in MODULES)
            for name in imports(path)
            if "mvae." in name
        }

    left = {module: arrows(path) for module, path in MODULES.items() if module != "mvae"}
    while free := [module for module, needed in left.items() if not needed & left.keys()]:
        for module in free:
            del left[module]
    assert not left


def test_experiments_import_mvae_and_their_own_files() -> None:
    for name in EXPERIMENTS:
        for path in (ROOT / name).glob("*.py"):
            packages = {one.split(".")[0] for one in imports(path)}
            assert not packages & {*EXPERIMENTS, "synthetic", "tests", "benchmarks"} - {name}, path
            if path.name == "model.py":  # needs little, wherever it is imported
                assert packages - sys.stdlib_module_names <= {"torch", "mvae"}, path


def test_imports_are_at_the_top_and_need_what_every_system_has() -> None:
    for path in sources():
        assert {name.split(".")[0] for name in imports(path, at_top=False)} <= OPTIONAL, path
        assert not {name.split(".")[0] for name in imports(path)} & {"fcntl", "resource", "pwd", "termios"}, path


def test_threads_wait_a_moment_and_then_sleep(tmp_path: Path) -> None:
    env = {key: value for key, value in environment(OMP_DISPLAY_ENV="verbose").items() if key not in OPENMP}
    said = run("mnist/sample.py", "absent.pth.tar", cwd=tmp_path, env=env).stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE" in said
    assert "GOMP_SPINCOUNT = '300" in said


# Scripts


def said_by(module: Any, *words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what a script prints with `-h`."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *words, "-h"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # of `python -m pytest`
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def assert_documented(kind: type) -> None:
    for _, name, help_ in cli.documented(kind):
        assert help_.strip(), (kind, name)
        assert not help_.endswith("."), (kind, name, help_)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_script_explains_itself_and_each_flag(
    experiment: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (path for path in SCRIPTS if path.startswith(f"{experiment}/") and "watermark" not in path):
        with script(path) as module:
            said = said_by(module, capsys=capsys, monkeypatch=monkeypatch)
            assert said.startswith(f"usage: {Path(path).name} [options]")
            assert str(module.__doc__).strip().splitlines()[0] in said
            for kind in {getattr(module, name) for name in ("Config", "Source", "Recipe") if hasattr(module, name)}:
                assert_documented(kind)
            names = {field.name for field in dataclasses.fields(getattr(module, "Config", None) or module.Source)}
            assert all(name in said or f"--{name.replace('_', '-')} " in said for name in names), path
    assert list(tmp_path.iterdir()) == []


def test_wrong_call_is_one_line(tmp_path: Path) -> None:
    assert_refused(run_warm("mnist/train.py", "--epochs", 0, cwd=tmp_path), 2, "train.py: ")
    assert list(tmp_path.iterdir()) == []
