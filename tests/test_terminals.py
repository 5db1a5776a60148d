"""Scripts at terminals and on systems as people have them: output, paths, numbers, memory, what a system lacks."""

import argparse
import contextlib
import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mvae import checkpoint
from mvae.errors import UsageError, UserError, is_out_of_memory
from mvae.files import locked, whole, write_atomically
from mvae.processes import Processes
from mvae.scripts import flags, machine, training, types
from mvae.scripts.kinds import Picture
from mvae.scripts.running import SMALLER
from mvae.training import Options, Stopped

from helpers import ROOT, assert_refused, assert_same_run, environment, fit_small, same

SCRIPTS = sorted(
    [*ROOT.glob("*/*.py"), ROOT / "mvae" / "synthetic" / "__main__.py"],
    key=lambda path: path.relative_to(ROOT),
)
SCRIPTS = [
    path for path in SCRIPTS if path.parent.name not in ("benchmarks", "tests") and "__main__" in path.read_text()
]


def shell(main: str, redirections: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a script train.py whose main has this body, by a shell that redirects its streams."""
    start = "import os, sys\nsys.argv = ['train.py']\nfrom mvae.scripts.running import run"
    code = f"{start}\ndef main():\n {main}\nrun(main)"
    return subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {redirections}', sys.executable, code],
        cwd=ROOT, env=environment(PYTHONUNBUFFERED="", **variables), capture_output=True, timeout=60, check=False,
        encoding="utf-8", errors="surrogateescape",
    )  # fmt: skip


# One entrance.


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_script_has_the_one_entrance(script: Path) -> None:
    assert script.read_text().endswith('if __name__ == "__main__":\n    running.run(main)\n')
    assert len(SCRIPTS) > 35


def test_a_result_names_the_commit_that_its_script_began_with(tmp_path: Path) -> None:
    commits = "git -c user.name=a -c user.email=a@b.c commit -q --allow-empty -m"
    subprocess.run(f"git init -q . && {commits} first", shell=True, cwd=tmp_path, check=True)
    first = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True, check=True)
    code = f"""
import os, pathlib
from mvae.scripts import running
running.ROOT = pathlib.Path.cwd()
def main():
    os.system("{commits} second")
    print(running.origin()["commit"])
running.run(main)
"""
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True
    )
    assert found.stdout == first.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_script_takes_a_path_that_it_does_not_expand(script: Path) -> None:
    shared = [ROOT / "mvae/scripts" / name for name in ("flags.py", "training.py")]
    assert not any("type=Path" in file.read_text() for file in (script, *shared))


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("OSError(13, 'Permission denied', '/x/y')", "train.py: /x/y: Permission denied"),
        ("OSError(36, 'File name too long')", "train.py: File name too long"),
        ("MemoryError()", "train.py: the memory doesn't suffice: lower --batch-size"),
    ],
)
def test_what_the_system_refuses_is_one_line(raised: str, said: str) -> None:
    assert_refused(shell(f"raise {raised}"), 1, said)


def test_memory_that_does_not_suffice_is_known_by_torchs_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert all(map(is_out_of_memory, [caught.value, cuda, MemoryError(), OSError(errno.ENOMEM, "")]))
    assert not any(map(is_out_of_memory, [RuntimeError("mat1 and mat2"), OSError(errno.ENOENT, ""), KeyError("x")]))


@pytest.mark.parametrize("script", SMALLER)
def test_flags_that_lower_the_memory_exist(script: str) -> None:
    for path in (path for path in SCRIPTS if path.name == script):
        sources = [*ROOT.glob(f"{path.parent.name}/*.py"), *ROOT.glob("mvae/scripts/*.py")]
        text = " ".join(source.read_text() for source in sources)
        assert all(f'"{flag}"' in text for flag in re.findall("--[a-z-]+", SMALLER[script])), path


def test_fault_of_the_program_keeps_its_traceback() -> None:
    done = shell("raise RuntimeError('a fault')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


# Streams.


@pytest.mark.parametrize(
    "variables",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["ascii", "C"],
)
def test_output_that_the_terminal_cannot_hold_is_escaped(variables: dict[str, str]) -> None:
    done = shell(r"print('\u03b2', '\xb1', 'a\udcff'); sys.exit('\u03b2')", **variables)
    assert (done.returncode, done.stderr) == (1, "\\u03b2\n")
    assert done.stdout.startswith("\\u03b2 \\xb1 a")


def test_stream_that_is_closed_takes_nothing_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    main = (
        f"f = open({str(path)!r}, 'w'); print('said'); print('said', file=sys.stderr); os.write(1, b'x'); f.write('y')"
    )
    done = shell(main, ">&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert path.read_text() == "y"


@pytest.mark.parametrize(("main", "status"), [("print('said')", 0), ("raise OSError('x')", 1)])
def test_closed_stderr_is_no_trouble(main: str, status: int) -> None:
    assert shell(main, "2>&-").returncode == status


@pytest.mark.parametrize(
    "main", ["print('said')", "print('said'); sys.exit(0)", "[print(i, flush=True) for i in range(9999)]"]
)
def test_reader_that_has_left_ends_a_script_as_sigpipe_does(main: str) -> None:
    done = shell(main, "| true; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr) == (141, "")


def test_error_is_told_though_nobody_reads_the_output() -> None:
    done = shell("print('said'); raise OSError('wrong')", "| true; exit ${PIPESTATUS[0]}")
    assert_refused(done, 1, "wrong")


def test_full_disk_under_the_output_is_one_line() -> None:
    assert_refused(shell("print('said')", "> /dev/full"), 1, "can't write what it prints: No space left")


class NobodyReads:
    """A stream whose reader leaves after `n` lines."""

    def __init__(self, n: int):
        self.n = n

    def write(self, text: str) -> int:
        if self.n <= 0:
            raise BrokenPipeError
        self.n -= text.count("\n")
        return len(text)

    def flush(self) -> None:
        pass


@pytest.mark.parametrize(("n", "step"), [(2, 4), (4, 1)])
def test_run_whose_output_nobody_reads_saves_and_stops(n: int, step: int, tmp_path: Path) -> None:
    """It stops after the next step: within the epoch, or if it was the epoch's own line, at the first of the next."""
    fit_small(tmp_path / "straight")
    with contextlib.redirect_stdout(NobodyReads(n)), pytest.raises(Stopped, match="the state is saved") as caught:  # type: ignore[type-var]
        fit_small(tmp_path / "run", log_interval=1)
    assert caught.value.status == 141
    assert checkpoint.load(tmp_path / "run" / checkpoint.LATEST, "small")["step"] == step
    fit_small(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "run", "small")


# Paths.


@pytest.mark.parametrize("words", [["--data-dir=~/sets"], []])
def test_home_is_found_in_flags_and_variables(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("MVAE_DATA_DIR", "~/sets")
    assert flags.parser(None).parse_args(words).data_dir == Path("/home/somebody/sets")


def test_home_is_found_in_a_condition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "picture.png").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Picture("L", 28).values("~/picture.png") == [tmp_path / "picture.png"]


@pytest.mark.parametrize("text", ["", "~nobody-is-called-so/x", "a\udcff"])
def test_path_to_nothing_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"names no file|no such home|not UTF-8"):
        types.path(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (os.devnull, "a folder or a device"),
        ("/dev/full", "a folder or a device"),
        ("/dev/stdout", "a folder or a device"),
        (".", "a folder or a device"),
        ("fifo", "a folder or a device"),
        ("file/below", "Not a directory"),
        (250 * "x", "File name too long"),
    ],
)
def test_file_that_cannot_be_written_is_known_before_the_work(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    Path("file").touch()
    for write in (types.output, lambda text: write_atomically(Path(text), b"")):
        with pytest.raises(UserError, match=f"can't write .*{said}"):
            write(text)
    assert sorted(os.listdir()) == ["fifo", "file"]
    assert not os.path.isfile(os.devnull)


def test_file_in_a_folder_of_somebody_else_is_refused_before_the_work(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(UserError, match=r"can't write .*Permission denied"):
        types.output(str(folder / "new" / "file.json"))


def test_error_leaves_no_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole(tmp_path / "new" / "newer" / "file") as file:
        file.write(b"%d" % (1 // 0))
    with pytest.raises(UserError, match="too long"):
        write_atomically(tmp_path / "new" / (300 * "x") / "file", b"")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "words", [["--json", "model"], ["--json", "x.csv", "--per-example", "./x.csv"], ["--per-example", "a/../model.csv"]]
)
def test_file_that_another_flag_names_is_not_written_over(words: list[str]) -> None:
    model = "model.csv" if "a/../model.csv" in words else "model"
    with pytest.raises(UsageError, match=r"would write over .*, which is named before"):
        flags.loglike_parser(None).parse_args([model, *words])


# Numbers.


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--n-latents", 10**12),
        ("--batch-size", 10**18),
        ("--epochs", 10**30),
        ("--seed", 10**40),
        ("--threads", 10**6),
        ("--approx-m", 10**6),
        ("--iw-samples", 10**10),
        ("--limit", 10**20),
        ("--lr", "1e40"),
        ("--lr", "1e-40"),
        ("--lr", "inf"),
        ("--weight-decay", "nan"),
        ("--epochs", "9" * 5000),
    ],
)
def test_number_too_large_to_be_meant_is_refused(flag: str, value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sizes: dict[str, Any] = {"n_latents": 2, "batch_size": 2, "epochs": 1, "annealing_epochs": 1, "lr": 1.0}
    parser = training.parser(None, modalities=("image",), lambdas={}, approx_m=0, **sizes)
    with pytest.raises(SystemExit) as caught:
        parser.parse_args([flag, str(value)])
    assert caught.value.code == 2
    assert f"argument {flag}: '{value}' is not a " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("kind", "text"), [(types.whole_number(0, 65535), "65536"), (types.concurrency, "1025")])
def test_ports_and_processes_have_their_bounds(kind: Callable[[str], int], text: str) -> None:
    assert kind(str(int(text) - 1)) == int(text) - 1
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number from"):
        kind(text)


def test_address_that_is_empty_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        flags.exploring_parser(None).parse_args(["model", "--host", ""])
    assert "'' is no address" in capsys.readouterr().err


# The machine.


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4, RANK is not set, MASTER_ADDR is not set"),
        ({"RANK": "1"}, "WORLD_SIZE is not set, RANK is 1"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is many"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "RANK is 2"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
        ({"WORLD_SIZE": "2", "RANK": "first", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "RANK is first"),
    ],
)
def test_half_of_torchruns_variables_is_refused(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"{said}.*: torchrun sets them"):
        Processes.join(torch.device("cpu"))


def test_a_process_has_a_device_of_those_there_are() -> None:
    assert machine.cuda_device("1", 2) == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="LOCAL_RANK is 2, and there are 2 CUDA devices"):
        machine.cuda_device("2", 2)
    with pytest.raises(UsageError, match="LOCAL_RANK is 'x'"):
        machine.cuda_device("x", 2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc alone")
@pytest.mark.parametrize("mine", [{}, {"MALLOC_TRIM_THRESHOLD_": "0"}])
def test_freed_memory_is_kept_unless_the_user_has_it_otherwise(mine: dict[str, str]) -> None:
    code = """
import argparse, resource, torch
from mvae.scripts import machine
machine.device(argparse.Namespace(threads=1, cuda=False))
for i in range(30):
    if i == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**22)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(**mine), capture_output=True, text=True, check=True
    )
    each = 2**24 / resource.getpagesize()  # pages of a block
    assert int(done.stdout) > 10 * each if mine else int(done.stdout) < each


def test_compiling_without_a_compiler_is_refused_before_anything(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UsageError, match=r"`compile` needs a C\+\+ compiler, and there is no .*CXX"):
        Options(epochs=1, batch_size=1, compile=True)
    Options(epochs=1, batch_size=1)


def test_system_without_fcntl_trains_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fit_small(tmp_path / "usual", epochs=1)
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with locked(tmp_path / "lock"):
        fit_small(tmp_path / "run", epochs=1)
    usual, run = (checkpoint.load(tmp_path / name / checkpoint.LATEST, "small")["model"] for name in ("usual", "run"))
    assert same(usual, run)
