"""The pages: their Python runs, scripts know their commands and flags, and their links lead somewhere."""

import contextlib
import importlib
import io
import re
import shlex
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from helpers import ROOT, Trained, assert_ended, run_warm, script

EXPERIMENTS = ["mnist", "fashionmnist", "multimnist", "celeba", "celeba19", "vision"]
PAGES_OF_ALL = ["README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
"""In their text, a script without a folder is any experiment's; the tests take mnist's."""

PAGES = [*PAGES_OF_ALL, *(f"{name}/README.md" for name in EXPERIMENTS)]

BEST = "model_best.pth.tar"

WRITES_INTO = {"train": "trained_models", "sample": ".", "transform": "samples"}
"""By script, the folder that it writes into unless --out-dir names another."""


class Command(NamedTuple):
    """`python SCRIPT WORDS`, `python -m MODULE WORDS` or torchrun's, in a folder of the repository."""

    folder: str
    program: str
    words: list[str]

    @property
    def is_module(self) -> bool:
        return not self.program.endswith(".py")

    @property
    def path(self) -> str:
        """The script's path from the repository's root."""
        return str(Path(self.folder, self.program))

    def value(self, flag: str, default: str) -> str:
        return next((value for word, value in pairwise(self.words) if word == flag), default)


@cache
def text_of(page: str) -> str:
    """The page without its tables of results, whose commands may be those of an earlier commit."""
    tables = r"<!-- table: \w+ -->.*?<!-- end of table -->"
    return re.sub(tables, "", (ROOT / page).read_text(), flags=re.DOTALL)


def prose_of(page: str) -> str:
    """The text without its blocks."""
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def blocks(page: str, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", text_of(page), flags=re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def commands(page: str) -> list[Command]:
    """The commands of a page's blocks, as one shell runs them, and of its text. An experiment's page starts in its
    folder."""
    found = []
    folder = here = "" if page.startswith("docs/") else str(Path(page).parent)
    for line in "".join(blocks(page, "", "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True) if line.startswith(("cd ", "python ", "torchrun ")) else [""]
        folder = str(Path(folder, words[1])) if words[0] == "cd" else folder
        found += command(folder, words)
    for code in re.findall(r"`([^`]+)`", prose_of(page)):
        if code.startswith(("python ", "torchrun ")):
            anywhere = page in PAGES_OF_ALL and not re.search(r"/\w+\.py", code)
            found += command("mnist" if anywhere else here, code.split())
    return found


def command(folder: str, words: list[str]) -> list[Command]:
    if words[:2] == ["python", "-m"]:
        return [Command(folder, words[2], words[3:])]
    scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
    return [Command(folder, words[i], words[i + 1 :]) for i in scripts[:1]]


def flags_in_the_help(module: ModuleType, *words: str) -> set[str]:
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["", *words, "-h"])
        patch.setattr(sys, "path", [*sys.path])
        with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
            module.main()
    return set(re.findall(r"--[a-z][\w-]*", said.getvalue()))


@cache
def flags_of(path: str, *words: str) -> set[str]:
    """The flags that a script's help names."""
    with script(path) as module:
        return flags_in_the_help(module, *words)


@cache
def flags_of_module(name: str) -> set[str]:
    """The flags that it has in mnist's folder; other folders have those of their datasets.py, too."""
    module = importlib.import_module("synthetic.__main__" if name == "synthetic" else name)
    with script("mnist/datasets.py"), contextlib.chdir(ROOT / "mnist"):
        return flags_in_the_help(module)


def test_the_python_of_the_first_page_runs(tmp_path: Path, trained: Trained) -> None:
    """Its blocks run in order as one program. test_extending.py runs those of docs/extending.md."""
    assert [page for page in PAGES if blocks(page, "python")] == ["README.md", "docs/extending.md"]
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "trained_models").symlink_to(trained.out_dir)
    (tmp_path / "readme.py").write_text("\n".join(blocks("README.md", "python")))
    assert_ended(run_warm(str(tmp_path / "readme.py"), cwd=tmp_path))


@pytest.mark.parametrize("page", PAGES)
def test_scripts_know_the_commands_of_a_page(page: str) -> None:
    for some in commands(page):
        flags = {word.split("=")[0] for word in some.words if re.match("--[a-z]", word)}
        if some.is_module:
            known = flags_of_module(some.program)
            known |= flags_of(f"{some.folder}/datasets.py") if some.folder in EXPERIMENTS else set()
        else:
            assert (ROOT / some.path).is_file(), f"{page}: there is no {some.path}"
            # setup.py's flags are its commands'
            known = flags_of(some.path, *some.words[: some.path == "vision/setup.py"]) if flags else set()
        assert flags <= known, f"{page}: {some.path} doesn't know {flags - known}"


@pytest.mark.parametrize("page", PAGES)
def test_scripts_know_the_flags_in_the_text_of_a_page(page: str) -> None:
    """One of the page's folder does; on the pages of all, any one."""
    folders = EXPERIMENTS if page in PAGES_OF_ALL else [str(Path(page).parent)]
    names = ("datasets", "train", "sample", "loglike")
    known = set[str]().union(*(flags_of(f"{folder}/{name}.py") for folder in folders for name in names))
    known |= set().union(*(flags_of_module(f"mvae.tools.{tool}") for tool in ("embed", "explore", "prior")))
    if "vision" in folders:
        known |= set().union(*(flags_of("vision/setup.py", name) for name in ("grayscale", "edge", "mask")))
    codes = re.findall(r"`([^`]+)`", prose_of(page))
    programs = ("python ", "torchrun ", "tensorboard ")  # the test above checks those
    named = {flag for code in codes if not code.startswith(programs) for flag in re.findall(r"--[a-z][\w-]*", code)}
    assert named <= known | {"--nproc_per_node"}, f"{page}: no script knows {named - known}"


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/extending.md"])
def test_commands_of_a_page_run_in_the_order_they_stand(page: str) -> None:
    """None writes into another's folder, and a model is trained before it is read. Each experiment's folder is another
    place."""
    written: dict[tuple[bool, Path], str] = {}
    for some in commands(page):
        script, place = Path(some.program).stem, Path(some.path).parent
        trains = script == "train"
        if script in WRITES_INTO and "-h" not in some.words and not some.is_module:
            folder, line = place / some.value("--out-dir", WRITES_INTO[script]), shlex.join(some.words)
            before = written.get((trains, folder))
            resumes = trains and "--resume" in some.words
            assert before is None or resumes, f"{page}: `{script}.py {line}` writes into {folder}, as does `{before}`"
            written[trains, folder] = line
        for word in some.words:
            if word.endswith(BEST):
                folder = Path(some.folder, word).parent
                assert (True, folder) in written, f"{page}: {some.words} reads of {folder}, where nothing has trained"


@pytest.mark.parametrize("page", PAGES)
def test_the_links_and_pictures_of_a_page_exist(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        path, _, heading = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if target.startswith("http"):
            continue
        assert file.exists(), f"{page}: there is no {target}"
        titles = re.findall(r"^#+ (.*)", file.read_text(), flags=re.MULTILINE) if heading else []
        anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
        assert not heading or heading in anchors, f"{page}: there is no heading {target}"


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 185
