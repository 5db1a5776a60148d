"""The command line: flags from a dataclass, and how a script ends."""

import errno
import inspect
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mvae import UsageError, cli
from mvae.errors import is_out_of_memory

import pytest
import torch

from helpers import ROOT, environment, run, run_warm


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


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ("", {}),
        ("--rate 3. --kind b --limit 4", {"rate": 3.0, "kind": "b", "limit": 4}),
        ("--rate=-3e-1", {"rate": -0.3}),
        ("--rate -3e-1", {"rate": -0.3}),
        ("--cuda --no-shuffle", {"cuda": True, "shuffle": False}),
        ("--shuffle", {"shuffle": True}),
        ("--ends x y=z", {"ends": ("x", "y=z")}),
        ("--save npy grid", {"save": ("npy", "grid")}),
        (
            "--given Male --given=-Bald,Male --given -Male --cuda",
            {"given": ["Male", "-Bald,Male", "-Male"], "cuda": True},
        ),
        ("--out-dir ~/x", {"out_dir": Path.home() / "x"}),
    ],
)
def test_flags_are_the_fields_of_a_dataclass(words: str, fields: dict[str, Any]) -> None:
    found = cli.parse(None, Config, ["file", *words.split()])
    assert found == Config(**{"path": Path("file"), **fields})


def test_a_preset_sets_the_defaults_and_flags_override_it() -> None:
    assert cli.parse(None, PRESETS, []) == Preset()
    assert cli.parse(None, PRESETS, ["--preset", "fast"]) == Preset(rate=2, cuda=True)
    assert cli.parse(None, PRESETS, ["--seed", "3", "--preset=fast", "--rate", "7"]) == Preset(
        rate=7, cuda=True, seed=3
    )


@pytest.mark.parametrize(
    ("config", "words", "said"),
    [
        (Config, "", "the following arguments are required: path"),
        (Config, "file --kind c", "argument --kind: invalid choice: 'c'"),
        (Config, "file --limit 2.5", "argument --limit: invalid int value: '2.5'"),
        (Config, "file --rate", "argument --rate: expected one argument"),
        (Config, "file --ends x", "argument --ends: expected 2 arguments"),
        (Config, "file --lim 3", "unrecognized arguments: --lim 3"),
        (Config, "file --out-dir=", "argument --out-dir: must not be empty"),
        (Config, "file --out-dir \udcff", "argument --out-dir: '\\udcff' is not valid UTF-8"),
        (PRESETS, "--preset best", "argument --preset: invalid choice: 'best'"),
        (PRESETS, "--preset", "argument --preset: expected one argument"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(
    config: Any, words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.parse(None, config, words.split())
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.endswith("; -h shows all flags\n")
    assert err.count("\n") == 1


def test_a_config_checks_its_values() -> None:
    for config, words in ((Config, ["file", "--seed", "-1"]), (PRESETS, ["--seed", "-1"])):
        with pytest.raises(UsageError, match="seed must be >= 0, got -1"):
            cli.parse(None, config, words)  # type: ignore[arg-type]


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
    headings = [line for line in lines if line.endswith(":") and line != "options:"]
    assert headings == ["positional arguments:", "Model:", "Machine:", "Rarely needed:"]
    text = " ".join(said.split())
    assert "--rate X 100 % of it (default: 0.5)" in text
    assert "--kind {a,b} which kind (default: a)" in text
    assert "--limit N read the first N (default: all) --" in text
    assert "--cuda run on a CUDA device --" in text
    assert "--out-dir PATH folder to write to (default: out)" in text
    assert "(default: grid)" in text
    machine = said[said.index("Machine:") : said.index("Rarely needed:")]
    assert [name for name in ("--cuda", "--limit", "--out-dir", "--rate") if name in machine] == [
        "--cuda",
        "--limit",
        "--out-dir",
    ]


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


# How a script ends


def ended(main: str, tmp_path: Path, *, before: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script train.py with this body of main, after other lines."""
    script, env = tmp_path / "train.py", environment(PYTHONPATH=str(ROOT), **variables)
    imports = "import logging, os, sys\nfrom mvae import UserError, UsageError, cli\n"
    script.write_text(f"{imports}{before}\n\ndef main():\n {main}\n\ncli.run(main)\n")
    return run_warm(str(script), cwd=tmp_path, env=env)


REOPENED = "; sys.stdout = open(1, 'w', closefd=False)"
GONE = "r, w = os.pipe(); os.dup2(w, 1); os.close(r); os.close(w)" + REOPENED  # the reader of the output
FULL = "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)" + REOPENED


@pytest.mark.parametrize(
    ("main", "before", "status", "out", "err"),
    [
        ("print('said')", "", 0, "said\n", ""),
        ("raise UserError('two\\nlines')", "", 1, "", "train.py: two lines\n"),
        ("raise UsageError('wrong')", "", 2, "", "train.py: wrong\n"),
        ("raise OSError(13, 'Permission denied', '/x/y')", "", 1, "", "train.py: /x/y: Permission denied\n"),
        ("raise OSError(36, 'File name too long')", "", 1, "", "train.py: File name too long\n"),
        ("raise MemoryError()", "", 1, "", "train.py: out of memory: use fewer examples"),
        ("raise KeyboardInterrupt()", "", 130, "", ""),
        ("raise RuntimeError('a fault')", "", 1, "", "Traceback"),
        ("print('said')", GONE, 141, "", ""),
        ("print('said'); sys.exit(0)", GONE, 141, "", ""),
        ("[print(i, flush=True) for i in range(9999)]", GONE, 141, "", ""),
        ("print('said'); raise OSError('wrong')", GONE, 1, "", "train.py: wrong\n"),
        ("print('said')", FULL, 1, "", "train.py: can't write to stdout: No space left on device\n"),
        ("print('β', '±', 'a\\udcff')", "sys.stdout.reconfigure(encoding='ascii')", 0, "\\u03b2 \\xb1 a\\udcff\n", ""),
        ("log = logging.getLogger('mvae.x'); log.info('i'); log.warning('w')", "", 0, "i\n", "w\n"),
    ],
)
def test_a_script_ends_in_one_line(main: str, before: str, status: int, out: str, err: str, tmp_path: Path) -> None:
    done = ended(main, tmp_path, before=before)
    assert (done.returncode, done.stdout) == (status, out)
    assert done.stderr == err if not err or err.endswith("\n") else err in done.stderr


def test_of_several_processes_only_the_first_logs(tmp_path: Path) -> None:
    done = ended("log = logging.getLogger('mvae.x'); log.info('i'); log.warning('w')", tmp_path, RANK="1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_closed_stream_takes_nothing_from_a_file(tmp_path: Path) -> None:
    main = "f = open('file', 'w'); print('said'); print('said', file=sys.stderr); os.write(1, b'x'); f.write('y')"
    done = ended(main, tmp_path, before="os.close(1); os.close(2); sys.stdout = sys.stderr = None")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "file").read_text() == "y"


def test_lack_of_memory_is_known_by_torchs_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert all(map(is_out_of_memory, [caught.value, cuda, MemoryError(), OSError(errno.ENOMEM, "")]))
    assert not any(map(is_out_of_memory, [RuntimeError("mat1 and mat2"), OSError(errno.ENOENT, ""), KeyError("x")]))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc has the setting")
@pytest.mark.parametrize("mine", [{}, {"MALLOC_TRIM_THRESHOLD_": "0"}])
def test_freed_memory_is_kept_unless_the_user_has_a_setting(mine: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("""
import resource
from mvae import cli
import torch

def main():
    for i in range(30):
        if i == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**22)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 2**24)

cli.run(main)""")
    done = run(str(tmp_path / "train.py"), cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT), **mine))
    assert float(done.stdout) > 10 if mine else float(done.stdout) < 1  # blocks that the system filled with zeros
