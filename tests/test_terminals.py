"""Scripts at terminals and on machines as people have them: output, paths, memory, devices, what a system lacks."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

from mvae import UsageError, UserError, progress
from mvae.errors import is_out_of_memory
from mvae.files import check_writable, whole, write_atomically
from mvae.run import checkpoint, device
from mvae.run.device import Machine
from mvae.tools.folder import Tool

import pytest
import torch

from helpers import ROOT, assert_refused, environment

FOLDERS = ("mnist", "fashionmnist", "multimnist", "celeba", "celeba19", "vision", "mvae/tools", "synthetic")
SCRIPTS = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py") if "__main__" in path.read_text()]


def shell(main: str, redirections: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script train.py whose main has this body, in a shell that redirects its streams.

    Of mvae it imports the command line alone, since torch takes seconds.
    """
    start = "import os, sys, types\nsys.argv = ['train.py']\npackage = sys.modules['mvae'] = types.ModuleType('mvae')"
    start += "\npackage.__path__ = ['mvae']\nfrom mvae import cli"
    code = f"{start}\ndef main():\n {main}\ncli.run(main)"
    return subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {redirections}', sys.executable, code],
        cwd=ROOT, env=environment(PYTHONUNBUFFERED="", **variables), capture_output=True, timeout=120, check=False,
        encoding="utf-8", errors="surrogateescape",
    )  # fmt: skip


# Errors


def test_every_script_runs_its_main_in_the_same_way() -> None:
    assert len(SCRIPTS) > 25
    endings = {path: path.read_text().endswith('if __name__ == "__main__":\n    cli.run(main)\n') for path in SCRIPTS}
    assert not [path for path, right in endings.items() if not right]


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("OSError(13, 'Permission denied', '/x/y')", "train.py: /x/y: Permission denied"),
        ("MemoryError()", "train.py: out of memory: use fewer examples or samples at a time (--batch-size"),
        ("cli.UserError('wrong\\nin two lines')", "train.py: wrong in two lines"),
    ],
)
def test_error_that_a_user_can_fix_is_one_line(raised: str, said: str) -> None:
    assert_refused(shell(f"raise {raised}"), 1, said)


def test_error_of_the_program_keeps_its_traceback() -> None:
    assert "Traceback" in shell("raise RuntimeError('a fault')").stderr


def test_lack_of_memory_is_known_by_torchs_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert all(map(is_out_of_memory, [caught.value, cuda, MemoryError(), OSError(errno.ENOMEM, "")]))
    assert not any(map(is_out_of_memory, [RuntimeError("mat1 and mat2"), OSError(errno.ENOENT, ""), KeyError("x")]))


def test_a_result_names_the_commit_that_its_script_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def commit() -> str:
        git = "git -c user.name=a -c user.email=a@b.c commit -q --allow-empty -m one && git rev-parse HEAD"
        return subprocess.run(git, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    subprocess.run(["git", "init", "-q", "."], cwd=tmp_path, check=True)
    monkeypatch.setattr(checkpoint, "ROOT", tmp_path)
    checkpoint.origin.cache_clear()
    first = commit()
    assert checkpoint.origin()["commit"] == first != commit()
    assert checkpoint.origin()["commit"] == first
    checkpoint.origin.cache_clear()


# Streams


@pytest.mark.parametrize(
    "variables",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=str,
)
def test_characters_that_a_terminal_cannot_show_are_escaped(variables: dict[str, str]) -> None:
    done = shell(r"print('\u03b2', '\xb1', 'a\udcff'); raise cli.UserError('\u03b2')", **variables)
    assert (done.returncode, done.stderr) == (1, "train.py: \\u03b2\n")
    assert done.stdout.startswith("\\u03b2 \\xb1 a")


@pytest.mark.parametrize("main", ["print('said'); sys.exit(0)", "[print(i, flush=True) for i in range(9999)]"])
def test_reader_that_leaves_ends_a_script_as_sigpipe_does(main: str) -> None:
    done = shell(main, "| true; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("main", "redirections", "said"),
    [
        ("print('said'); raise OSError('wrong')", "| true; exit ${PIPESTATUS[0]}", "wrong"),
        ("print('said')", "> /dev/full", "can't write to stdout: No space left"),
    ],
)
def test_error_is_shown_though_nobody_reads_the_output(main: str, redirections: str, said: str) -> None:
    assert_refused(shell(main, redirections), 1, said)


# Files


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (os.devnull, "not a regular file"),
        ("/dev/stdout", "not a regular file"),
        (".", "not a regular file"),
        ("fifo", "not a regular file"),
        ("file/below", "(not a writable folder|Not a directory)"),
        (250 * "x", "File name too long"),
    ],
)
def test_file_that_cannot_be_written_is_refused(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    Path("file").touch()
    with pytest.raises(UserError, match=f"can't write .*{said}"):
        write_atomically(Path(text), b"")
    assert sorted(os.listdir()) == ["fifo", "file"]


def test_file_in_a_folder_of_another_user_is_refused_before_the_work(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(UserError, match=r"can't write .*not a writable folder"):
        check_writable(tmp_path / "new" / "file.json")


def test_an_error_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole(tmp_path / "file") as file:
        file.write(b"%d" % (1 // 0))
    assert not os.listdir(tmp_path)


def test_of_two_writers_the_last_to_end_has_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with whole(path) as file:
        write_atomically(path, b"of another writer meanwhile")
        file.write(b"new")
    assert (os.listdir(tmp_path), path.read_bytes()) == (["file"], b"new")


OUTPUTS = ["model", "link", "x.csv ./x.csv", "a/../model", "pictures/new.npz", "other.png"]
OUTPUTS += ["run/checkpoint.pth.tar", "run/model_best.pth.tar", "run/stats.jsonl", ".lock"]


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_file_that_is_read_or_belongs_to_a_run_is_not_overwritten(
    outputs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "pictures"):
        Path(folder).mkdir()
    Path("link").symlink_to("model")
    Path("pictures/link.png").symlink_to("../other.png")
    tool = Tool(model_path=Path("model"))
    tool.check_outputs(Path("new.npz"), None, Path("run/results.json"), inputs=[Path("pictures")])
    with pytest.raises(UsageError, match=r"is also read or written|is a file of a run"):
        tool.check_outputs(None, *map(Path, outputs.split()), inputs=[Path("pictures")])


# Progress


def test_without_a_terminal_progress_is_lines_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mvae")
    seconds = iter([0, 3, 11, 20, 42, 50])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    assert list(progress.progress(range(5), "decoding", 5)) == [0, 1, 2, 3, 4]
    assert caplog.messages == ["decoding: 40 %, < 1 min left", "decoding: 80 %, < 1 min left"]
    assert [progress.duration(x) for x in (20, 90 * 60, 150 * 60)] == ["< 1 min", "90 min", "2.5 h"]


# Machines


def test_a_cuda_device_that_is_not_used_is_mentioned_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mvae")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device._mention_cuda.cache_clear()
    for _ in range(2):
        assert Machine(threads=1).device() == torch.device("cpu")
    assert [text for text in caplog.messages if "--cuda" in text] == caplog.messages
    assert len(caplog.messages) == 1


def test_a_process_has_one_of_the_devices_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Machine(cuda=True, threads=1).device() == torch.device("cuda", 1)
    for rank in ("2", "x"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(UsageError, match=f"LOCAL_RANK must be a number below 2.*got '{rank}'"):
            Machine(cuda=True, threads=1).device()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_kept() -> None:
    faults = "resource.getrusage(resource.RUSAGE_SELF).ru_minflt"
    allocate = "any(torch.ones(2**22) is None for _ in range({n}))"
    main = f"import resource, torch; {allocate.format(n=10)}; before = {faults}; {allocate.format(n=20)}; "
    done = shell(f"{main} print({faults} - before)")
    assert int(done.stdout) < 2**24 / resource.getpagesize()  # the pages of a block
