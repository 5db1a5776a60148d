"""The command line: flags from a dataclass, and how a script ends."""

import functools
import inspect
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mvae import UsageError, UserError, cli

import pytest


@dataclass(kw_only=True)
class Base:
    # Machine
    cuda: bool = False  # run on a CUDA device
    seed: int = 0  # random seed

    # Rarely needed
    shuffle: bool = True  # in random order

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UsageError(f"seed must be >= 0, got {self.seed}")


@dataclass(kw_only=True)
class Config(Base):
    path: Path  # file to read

    # Model
    rate: float = 0.5  # 100 % of it
    kind: Literal["a", "b"] = "a"  # which kind

    # Machine
    limit: int | None = None  # read the first N (default: all)
    ends: tuple[str, str] | None = None  # two ends
    save: tuple[Literal["grid", "npy"], ...] = ("grid",)  # what to save
    given: list[str] | None = None  # repeated
    out_dir: Path = Path("out")  # folder to write to


@dataclass(kw_only=True)
class Preset(Base):
    # Model
    rate: float = 0.5  # the rate


PRESETS = {"slow": Preset(), "fast": replace(Preset(), rate=2, cuda=True)}


def test_flags_are_the_fields_of_a_dataclass() -> None:
    asked: dict[str, dict[str, Any]] = {
        "": {},
        "--rate 3. --kind b --limit 4": {"rate": 3.0, "kind": "b", "limit": 4},
        "--rate=-3e-1": {"rate": -0.3},
        "--rate -3e-1": {"rate": -0.3},
        "--cuda --no-shuffle": {"cuda": True, "shuffle": False},
        "--ends x y=z": {"ends": ("x", "y=z")},
        "--save npy grid": {"save": ("npy", "grid")},
        "--given Male --given=-Bald,Male --given -Male --cuda": {
            "given": ["Male", "-Bald,Male", "-Male"],
            "cuda": True,
        },
        "--out-dir ~/x": {"out_dir": Path.home() / "x"},
    }
    for words, fields in asked.items():
        assert cli.parse(None, Config, ["file", *words.split()]) == Config(**{"path": Path("file"), **fields})


def test_a_preset_sets_the_defaults_and_flags_override_it() -> None:
    assert cli.parse(None, PRESETS, []) == Preset()
    assert cli.parse(None, PRESETS, ["--preset", "fast"]) == Preset(rate=2, cuda=True)
    words = ["--seed", "3", "--preset=fast", "--rate", "7"]
    assert cli.parse(None, PRESETS, words) == Preset(rate=7, cuda=True, seed=3)


def test_wrong_flags_are_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    wrong: list[tuple[Any, str, str]] = [
        (Config, "", "the following arguments are required: path"),
        (Config, "file --kind c", "argument --kind: invalid choice: 'c'"),
        (Config, "file --limit 2.5", "argument --limit: invalid int value: '2.5'"),
        (Config, "file --ends x", "argument --ends: expected 2 arguments"),
        (Config, "file --lim 3", "unrecognized arguments: --lim 3"),
        (Config, "file --out-dir=", "argument --out-dir: must not be empty"),
        (PRESETS, "--preset best", "argument --preset: invalid choice: 'best'"),
        (PRESETS, "--preset", "argument --preset: expected one argument"),
    ]
    for config, words, said in wrong:
        with pytest.raises(SystemExit) as end:
            cli.parse(None, config, words.split())
        assert end.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert said in err
        assert err.endswith("; -h shows all flags\n")
        assert err.count("\n") == 1


def test_a_config_checks_its_values() -> None:
    with pytest.raises(UsageError, match="seed must be >= 0, got -1"):
        cli.parse(None, PRESETS, ["--seed", "-1"])


def help_of(config: Any, *words: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        cli.parse("What it does.", config, [*words, "-h"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_is_the_comments_with_defaults_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    """A class's own groups come first, in their order, then those of its bases, with what it adds to them."""
    said = help_of(Config, capsys=capsys)
    lines = [line for line in said.splitlines() if not line.startswith("   ")]
    assert lines[0].endswith(" [options] path")
    assert "What it does." in lines
    headings = ["positional arguments:", "Model:", "Machine:", "Rarely needed:"]
    assert [line for line in lines if line.endswith(":") and line != "options:"] == headings
    text = " ".join(said.split())
    assert "--rate X 100 % of it (default: 0.5)" in text
    assert "--kind {a,b} which kind (default: a)" in text
    assert "--limit N read the first N (default: all) --" in text
    assert "--cuda run on a CUDA device --" in text
    assert "--out-dir PATH folder to write to (default: out)" in text
    assert "(default: grid)" in text
    machine = said[said.index("Machine:") : said.index("Rarely needed:")]
    assert all(name in machine for name in ("--cuda", "--limit", "--out-dir"))


def test_help_of_a_preset_shows_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert "the rate (default: 0.5)" in help_of(PRESETS, capsys=capsys)
    said = " ".join(help_of(PRESETS, "--preset", "fast", capsys=capsys).split())
    assert "the rate (default: 2)" in said
    assert "`--preset NAME -h` shows its values (default: slow)" in said


def test_flags_work_without_source_and_a_field_needs_a_comment(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Bare:
        seed: int = 0

    with pytest.raises(TypeError, match="Bare: no comment on the line of seed"):
        cli.documented(Bare)

    def no_source(one: type) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr(inspect, "getsource", no_source)  # as in a zip
    assert cli.parse(None, Config, ["file", "--rate", "2"]) == Config(path=Path("file"), rate=2)


def test_a_config_is_recorded_as_plain_values() -> None:
    found = cli.plain(Config(path=Path("file"), ends=("x", "y")))
    assert json.loads(json.dumps(found)) == found
    assert (found["path"], found["ends"], found["save"], found["limit"]) == ("file", ["x", "y"], ["grid"], None)


# How a script ends (test_terminals.py has errors and streams)


def test_infos_and_warnings_are_printed_by_the_first_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mvae"), "propagate", False)

    def main() -> None:
        log = logging.getLogger("mvae.run.run")
        log.debug("a detail")
        log.info("an info")
        log.warning("a warning")

    for rank, said in (("", ("an info\n", "a warning\n")), ("0", ("an info\n", "a warning\n")), ("1", ("", ""))):
        monkeypatch.setattr(logging.getLogger("mvae"), "handlers", [])
        if rank:
            monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end:
            cli.run(main)
        assert (end.value.code, *capsys.readouterr()) == (0, *said)


def test_a_script_exits_with_the_status_of_its_error() -> None:
    def fail(error: BaseException) -> None:
        raise error

    for error, status in ((UserError("x"), 1), (UsageError("x"), 2), (KeyboardInterrupt(), 130), (SystemExit(5), 5)):
        with pytest.raises(SystemExit) as end:
            cli.run(functools.partial(fail, error))
        assert end.value.code == status
