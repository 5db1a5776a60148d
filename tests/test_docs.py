"""The pages: their Python runs, their commands are ones that the scripts know, and their links lead somewhere."""

import re
import shlex
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from helpers import ROOT, Trained, assert_ended, environment, run_warm

EXPERIMENTS = ["mnist", "fashionmnist", "multimnist", "celeba", "celeba19", "vision"]
PAGES_OF_ALL = ["README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
"""Where their text names a script without a folder, each experiment has one; the tests take mnist's."""

PAGES = [*PAGES_OF_ALL, *(f"{name}/README.md" for name in EXPERIMENTS)]

BEST = "model_best.pth.tar"

WRITES_INTO = {"train.py": "trained_models", "sample.py": ".", "transform.py": "samples"}
"""By script, the folder that it writes into unless --out-dir names another."""


class Block(NamedTuple):
    """A fenced block: its language, the number of its first line, and its lines."""

    language: str
    start: int
    lines: list[str]


class Command(NamedTuple):
    """`python SCRIPT WORDS`, or torchrun's, in a block; the script's path is from the repository's root."""

    script: str
    words: list[str]
    block: int

    @property
    def name(self) -> str:
        return Path(self.script).name

    @property
    def flags(self) -> list[str]:
        return [word.split("=")[0] for word in self.words if re.match("--[a-z]", word)]

    @property
    def line(self) -> str:
        return shlex.join([self.script, *self.words])

    def value(self, flag: str, default: str) -> str:
        return next((value for word, value in pairwise(self.words) if word == flag), default)


def blocks(page: str) -> list[Block]:
    found, inside = [], None
    for number, line in enumerate(text_of(page).splitlines(), 1):
        if line.startswith("```"):
            if inside:
                found.append(inside)
            inside = None if inside else Block(line[3:], number + 1, [])
        elif inside:
            inside.lines.append(line)
    return found


def without(pattern: str, text: str) -> str:
    return re.sub(pattern, lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)


@cache
def text_of(page: str) -> str:
    """The page without its tables of results, whose commands may be those of an earlier commit; lines keep numbers."""
    return without(r"<!-- table: \w+ -->.*?<!-- end of table -->", (ROOT / page).read_text())


def prose_of(page: str) -> str:
    """The text without its blocks."""
    return without(r"^```.*?^```", text_of(page))


def file_of(block: Block) -> str | None:
    """The path that the first line of a block of Python names, if the block is a file of an experiment."""
    found = re.fullmatch(r"# (\w+/\w+\.py)", block.lines[0])
    return found[1] if found else None


def commands(page: str) -> list[Command]:
    """The commands of a page's blocks, as one shell runs them, and of its text. A folder's page starts in it."""
    found = []
    folder = here = "" if page.startswith("docs/") else str(Path(page).parent)
    for number, block in enumerate(blocks(page)):
        if block.language in ("", "bash"):
            for line in "\n".join(block.lines).replace("\\\n", " ").splitlines():
                if not line.startswith(("cd ", "python ", "torchrun ")):
                    continue
                words = shlex.split(line, comments=True)
                if words[:1] == ["cd"]:
                    folder = str(Path(folder, words[1]))
                found += command(folder, words, number)
    for i, code in enumerate(re.findall(r"`([^`]+)`", prose_of(page))):
        if code.startswith(("python ", "torchrun ")):
            of_no_folder = page in PAGES_OF_ALL and not re.search(r"/\w+\.py", code)
            found += command("mnist" if of_no_folder else here, code.split(), -1 - i)
    return found


def command(folder: str, words: list[str], block: int) -> list[Command]:
    scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
    if words[0] != "cd" and scripts:
        return [Command(str(Path(folder, words[scripts[0]])), words[scripts[0] + 1 :], block)]
    return []


@cache
def help_of(script: str, *words: str) -> str:
    done = run_warm(script, *words, "-h")
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def help_of_tool(folder: str, tool: str) -> str:
    words = [sys.executable, "-m", f"mvae.tools.{tool}", "-h"]
    done = subprocess.run(words, cwd=ROOT / folder, env=environment(), capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language == "python" for b in blocks(page))])
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, trained: Trained) -> None:
    """A page's blocks run in order as one program, whose line numbers are the page's.

    A block that names a file is written there instead; the page's commands then run it.
    """
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "trained_models").symlink_to(trained.out_dir)
    program = [""] * len(text_of(page).splitlines())
    written = set()
    for block in blocks(page):
        if block.language != "python":
            continue
        if file := file_of(block):
            path = tmp_path / file
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(block.lines) + "\n")
            written.add(file)
        else:
            program[block.start - 1 : block.start - 1 + len(block.lines)] = block.lines
    for some in commands(page):
        if some.script in written:
            script = tmp_path / some.script
            assert_ended(run_warm(str(script), *some.words, cwd=script.parent, env=environment(COLUMNS="80")))
    if any(program):
        name = tmp_path / (Path(page).stem + "_md.py")
        name.write_text("\n".join(program) + "\n")
        assert_ended(run_warm(str(name), cwd=tmp_path))


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_name_scripts_and_flags_that_exist(page: str) -> None:
    written = {file_of(block) for block in blocks(page) if block.language == "python"}
    for some in commands(page):
        if some.script in written:
            continue
        assert (ROOT / some.script).is_file(), f"{page}: there is no {some.script}"
        if some.flags:
            # setup.py's flags are its commands'
            of_command = some.words[:1] if some.name == "setup.py" else []
            known = set(re.findall(r"--[a-z][\w-]*", help_of(some.script, *of_command)))
            assert set(some.flags) <= known, f"{page}: {some.script} doesn't know {set(some.flags) - known}"


@pytest.mark.parametrize("page", PAGES)
def test_the_flags_in_the_text_of_a_page_exist(page: str) -> None:
    """A script of the page's folder has them; on the pages of all, some script has."""
    folders = EXPERIMENTS if page in PAGES_OF_ALL else [str(Path(page).parent)]
    scripts = [f"{folder}/{name}.py" for folder in folders for name in ("datasets", "train", "sample", "loglike")]
    text = " ".join(help_of(script) for script in scripts)
    text += " ".join(help_of_tool(folder, tool) for folder in folders[:1] for tool in ("embed", "explore"))
    if "vision" in folders:
        text += " ".join(help_of("vision/setup.py", command) for command in ("grayscale", "edge", "mask"))
    codes = re.findall(r"`([^`]+)`", prose_of(page))
    programs = ("python ", "torchrun ", "tensorboard ")  # the test above checks those
    named = {flag for code in codes if not code.startswith(programs) for flag in re.findall(r"--[a-z][\w-]*", code)}
    unknown = named - set(re.findall(r"--[a-z][\w-]*", text))
    assert not unknown, f"{page}: no script knows {unknown}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_run_in_the_order_they_stand(page: str) -> None:
    """No run is written into another's folder, no samples over others, and what a command reads is trained before it.

    That holds for all commands of a page, those in its text included. Each folder of an experiment is another place.
    """
    written: dict[tuple[str, Path], str] = {}
    for some in commands(page):
        place = Path(some.script).parent
        default = WRITES_INTO.get(some.name)
        if default is not None and "-h" not in some.words and not some.script.startswith("benchmarks"):
            folder = place / some.value("--out-dir", default)
            key = "train.py" if some.name == "train.py" else "samples", folder
            before = written.get(key)
            if not (before and some.name == "train.py" and "--resume" in some.words):
                assert before is None, f"{page}: `{some.line}` writes into {folder}, and so does `{before}`"
            written[key] = some.line
        read = {(place / word).parent for word in some.words if word.endswith(BEST)}
        lacking = {folder for folder in read if ("train.py", folder) not in written}
        assert not lacking, f"{page}: `{some.line}` reads of {lacking}, where nothing has trained yet"


@pytest.mark.parametrize("page", PAGES)
def test_the_links_and_pictures_of_a_page_exist(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without(r"^```.*?^```", (ROOT / page).read_text())):
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: there is no {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)", file.read_text(), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, f"{page}: there is no heading {target}"


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_of_a_page_are_marked(page: str) -> None:
    """A command fills what stands between two marks."""
    text = (ROOT / page).read_text()
    marks = re.findall(r"^<!-- (table: \w+|end of table) -->$", text, flags=re.MULTILINE)
    assert len(marks) == text.count("<!--")
    assert all(mark == "end of table" for mark in marks[1::2])
    assert all(mark != "end of table" for mark in marks[::2])
    assert len(marks) % 2 == 0


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 185
