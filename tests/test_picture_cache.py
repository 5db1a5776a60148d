"""Decoded pictures: equal to torchvision's, kept through kills, damage and changes; the worker pool; streamed data."""

import dataclasses
import fcntl
import io
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any, get_args

from mvae.data import cache, pictures
from mvae.data.dataset import Data, consecutive_rows, permuted_rows
from mvae.data.pool import in_parallel
from mvae.errors import UsageError, UserError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture) -> None:
    """Let `caplog` catch all that the package logs."""
    caplog.set_level(logging.INFO, "mvae")


def draw(path: Path, width: int, height: int, seed: int, mode: str = "RGB") -> None:
    """Write a picture of coloured clouds."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 4), np.uint8)
    image = Image.fromarray(noise, "RGBA").resize((width, height), Image.Resampling.BICUBIC)
    image.convert(mode).save(path)


def entries_of(source: Path) -> list[cache.Entry]:
    return list(cache.listing(source).values())


def load(source: Path, path: Path, **options: object) -> Tensor:
    """Return the decoded pictures of a folder or zip, in the order of their names."""
    entries = [entry for _, entry in sorted(cache.listing(source).items())]
    return cache.decoded(source, entries, path, **options)  # type: ignore[arg-type]


def reference(path: Path, mode: str = "RGB", size: int = 64) -> Tensor:
    """Return a picture as torchvision crops it, on a white background."""
    crop = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()])
    image: Image.Image = Image.open(path)
    if image.mode == "RGBA":
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    return crop(image.convert(mode))


def decode(source: Path, path: Path, pipe: int) -> None:
    os.setsid()
    signal.alarm(60)  # no test waits longer
    sys.stdout = sys.stderr = os.fdopen(pipe, "w", buffering=1)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    try:
        cache.decoded(source, entries_of(source), path)
    except KeyboardInterrupt:
        sys.exit(130)


def start(source: Path, path: Path) -> tuple[BaseProcess, IO[str]]:
    """Decode all pictures of a folder in a process; return it and what it and its workers say, until all have ended."""
    reader, writer = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=decode, args=(source, path, writer))
    process.start()
    os.close(writer)
    return process, open(reader)


def wait_for_a_block(path: Path) -> None:
    """Wait until a build into `path` has reached its second block."""
    partial, block = path.with_name(path.name + ".partial"), cache.BLOCK * 3 * 64 * 64
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.read_bytes()[block : block + 999].strip(b"\0")):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def assert_refused(source: Path, path: Path, *said: object) -> None:
    with pytest.raises(UserError) as caught:
        load(source, path)
    assert "\n" not in str(caught.value)
    for words in said:
        assert str(words) in str(caught.value)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    for number in range(300):
        draw(folder / f"{number:03}.jpg", 20, 24, number)
    return folder


@pytest.fixture
def folder(drawn: Path, tmp_path: Path) -> Path:
    """Three blocks of small pictures, the last not full; one copy per test."""
    return Path(shutil.copytree(drawn, tmp_path / "pictures"))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six blocks of larger pictures, only ten of them different: about a second of one process's work."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(10):
        draw(folder / f"{number:04}.jpg", 300, 400, number)
    for number in range(10, 6 * cache.BLOCK):
        os.link(folder / f"{number % 10:04}.jpg", folder / f"{number:04}.jpg")
    return folder


@pytest.fixture(scope="module")
def whole(many: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of `many`, built without interruption."""
    path = tmp_path_factory.mktemp("whole") / "cache"
    cache.decoded(many, entries_of(many), path, workers=2)
    return path.read_bytes()


# The pictures


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pictures_are_those_of_torchvision(tmp_path: Path, mode: str) -> None:
    sizes = [(178, 218), (218, 178), (64, 64), (65, 64), (64, 67), (63, 200), (1, 1), (1, 9), (5, 4), (333, 77)]
    (tmp_path / "pictures").mkdir()
    paths = []
    for number, (width, height) in enumerate(sizes):
        for kind in ("RGB", "L", "RGBA"):
            paths.append(tmp_path / "pictures" / f"{number:02}{kind}.png")
            draw(paths[-1], width, height, number, kind)
    found = load(tmp_path / "pictures", tmp_path / "cache", mode=mode)
    for picture, path in zip(found, sorted(paths), strict=True):
        assert torch.equal(picture, reference(path, mode)), path.name


# Modes and depths. GREY has each of the 256 greys once; CLEAR is 0 where a picture is transparent, which becomes white

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
CLEAR = np.where(GREY % 3 == 0, 0, 255).astype(np.uint8)
ON_WHITE = np.where(CLEAR == 0, 255, GREY)
LA = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(CLEAR)])
LEVELS = GREY.astype(np.uint16) * 257


def written(image: Image.Image, kind: str, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (written(Image.fromarray(LEVELS), "PNG"), GREY),
        (written(Image.fromarray(LEVELS), "TIFF"), GREY),
        (written(Image.fromarray(LEVELS), "PNG", transparency=7 * 257), np.where(GREY == 7, 255, GREY)),
        (written(Image.fromarray((GREY / 255).astype(np.float32)), "TIFF"), GREY),
        (written(Image.fromarray(GREY > 127), "PNG"), np.where(GREY > 127, 255, 0)),
        (written(Image.fromarray(GREY), "PNG", transparency=7), np.where(GREY == 7, 255, GREY)),
        (written(Image.fromarray(GREY).convert("P"), "PNG"), GREY),
        (written(Image.fromarray(GREY).convert("P"), "GIF", transparency=7), np.where(GREY == 7, 255, GREY)),
        (written(LA, "PNG"), ON_WHITE),
        (written(LA.convert("RGBA"), "PNG"), ON_WHITE),
        (written(Image.fromarray(GREY).convert("RGB").convert("CMYK"), "TIFF"), GREY),
        (written(Image.fromarray(GREY).convert("RGB"), "BMP"), GREY),
    ],
)
def test_every_mode_and_depth_gives_the_right_eight_bits(file: io.BytesIO, expected: np.ndarray) -> None:
    for mode in get_args(pictures.Mode):
        pixels = np.frombuffer(pictures.pixels(file.getvalue(), mode, 16), np.uint8)
        np.testing.assert_array_equal(pixels.reshape(-1, 16, 16), [expected] * len(mode))


@pytest.mark.parametrize("values", [GREY.astype(np.float32), -(GREY / 255).astype(np.float32)], ids=["> 1", "< 0"])
def test_numbers_in_an_unknown_range_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    said = "pixels must be of 8 or 16 bits, or floats in .0, 1.; found"
    with pytest.raises(UserError, match=rf"can't read .*a\.tif: .*{said}"):
        pictures.load_picture(tmp_path / "a.tif", "L", 16)
    with pytest.raises(UserError, match=rf"a\.tif is damaged or not a picture .{said}"):
        load(tmp_path, tmp_path / "cache")


@pytest.mark.parametrize(("levels", "orientation", "turns"), [(GREY, 6, 1), (LEVELS, 8, -1)])
def test_exif_orientation_is_applied(levels: np.ndarray, orientation: int, turns: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = written(Image.fromarray(np.ascontiguousarray(np.rot90(levels, turns))), "PNG", exif=exif)
    found = np.frombuffer(pictures.pixels(file.getvalue(), "L", 16), np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(found, GREY)


def test_pictures_come_in_the_order_of_the_entries_whatever_the_workers(folder: Path, tmp_path: Path) -> None:
    files = cache.listing(folder)
    names = sorted(files, reverse=True)
    entries = [files[name] for name in names]
    one, five = (cache.decoded(folder, entries, tmp_path / str(n), size=33, workers=n) for n in (1, 5))
    assert torch.equal(one, torch.stack([reference(folder / name, size=33) for name in names]))
    assert torch.equal(one, five)


def test_zip_gives_what_its_folder_gives(folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.iterdir(), reverse=True):
            archive.write(path, f"pictures/{path.name}")
    assert torch.equal(load(tmp_path / "pictures.zip", tmp_path / "a"), load(folder, tmp_path / "b", workers=2))


# The file


def test_existing_file_is_read_and_not_written(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "new" / "cache"
    first = load(folder, path).clone()
    assert sorted(os.listdir(tmp_path / "new")) == ["cache", "cache.lock"]
    (tmp_path / "new" / "cache.lock").unlink()
    before = path.stat()
    caplog.clear()
    assert torch.equal(load(folder, path), first)
    assert path.stat() == before
    assert caplog.text == ""
    assert os.listdir(tmp_path / "new") == ["cache"]


@pytest.mark.parametrize(("edit", "partial"), [(lambda path: os.utime(path, ns=(0, 1)), False), (Path.unlink, True)])
def test_changed_source_is_decoded_again(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, edit: Callable[[Path], object], partial: bool
) -> None:
    path = tmp_path / "cache"
    old = load(folder, path)
    before = old.clone()
    if partial:
        path.rename(tmp_path / "cache.partial")
    edit(folder / "100.jpg")
    assert torch.equal(load(folder, path), load(folder, tmp_path / "fresh"))
    assert ("of other pictures" in caplog.text) != partial
    assert torch.equal(old, before)  # whoever has mapped them keeps them


def test_another_mode_or_size_is_decoded_again(folder: Path, tmp_path: Path) -> None:
    for mode, size in (("RGB", 64), ("L", 64), ("RGB", 32)):
        found = load(folder, tmp_path / "cache", mode=mode, size=size)
        assert torch.equal(found[0], reference(folder / "000.jpg", mode, size))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: bytes([content[0] ^ 4]) + content[1:], "is damaged: decoding 1 of 3 blocks again"),
        (lambda content: content[:-1], "decoding all"),
        (lambda content: b"", "decoding all"),
    ],
)
def test_damaged_file_is_repaired(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes], said: str
) -> None:
    path = tmp_path / "cache"
    load(folder, path)
    good = path.read_bytes()
    path.write_bytes(damage(good))
    load(folder, path)
    assert said in caplog.text
    assert path.read_bytes() == good


def test_large_file_is_sampled_by_the_first_process_of_a_machine(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache"
    content = bytearray(load(folder, path).numpy().tobytes() + path.read_bytes()[300 * 3 * 64 * 64 :])
    content[-2000] ^= 4  # in the last of three blocks, of which every second is looked at
    path.write_bytes(content)
    monkeypatch.setattr(cache, "SAMPLED", 2 * 2**20)
    for rank, decodes in (("1", False), ("0", True)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        caplog.clear()
        load(folder, path)
        assert ("decoding 1 of 3 blocks again" in caplog.text) == decodes


def anonymous_bytes() -> int:
    """Return this process's memory that isn't backed by a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="this system has no /proc to tell a process's memory"
)
def test_pictures_are_mapped_and_not_loaded(many: Path, whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(whole)
    load(many, tmp_path / "cache")
    before = anonymous_bytes()
    maps = [load(many, tmp_path / "cache") for _ in range(4)]
    assert sum(int(pictures[:, 0, 0, 0].sum()) for pictures in maps) > 0
    assert anonymous_bytes() - before < len(whole) / 2


# Kills and simultaneous processes


@pytest.mark.parametrize(("ending", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_killed_or_interrupted_build_is_continued(
    many: Path, whole: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture, ending: int, status: int
) -> None:
    path = tmp_path / "cache"
    process, output = start(many, path)
    wait_for_a_block(path)
    assert process.pid
    (os.kill if ending == signal.SIGKILL else os.killpg)(process.pid, ending)
    assert all(line.startswith("decoding") for line in output)
    process.join()
    assert process.exitcode == status
    assert not path.exists()
    cache.decoded(many, entries_of(many), path)
    assert "which are done" in caplog.text
    assert path.read_bytes() == whole


def test_two_builds_at_once_decode_once(many: Path, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    with open(tmp_path / "cache.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        processes = [start(many, path) for _ in range(2)]
        for _, output in processes:
            assert "waiting for another process" in output.readline()
        fcntl.flock(lock, fcntl.LOCK_UN)  # the processes have inherited it
    assert sum("decoding" in output.read() for _, output in processes) == 1
    for process, _ in processes:
        process.join()
        assert process.exitcode == 0
    assert path.read_bytes() == whole


# Errors


@pytest.mark.parametrize("kept", [0.0, 0.99])
def test_truncated_picture_is_named(folder: Path, tmp_path: Path, kept: float) -> None:
    content = (folder / "200.jpg").read_bytes()
    (folder / "200.jpg").write_bytes(content[: int(kept * len(content))])
    assert_refused(folder, tmp_path / "cache", folder / "200.jpg", "is damaged or not a picture", "replace it")
    assert not (tmp_path / "cache").exists()


def test_blocks_decoded_before_a_damaged_picture_are_kept(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = sorted(entries_of(folder))
    good = (folder / "299.jpg").read_bytes()
    (folder / "299.jpg").write_bytes(bytes(len(good)))
    with pytest.raises(UserError):
        cache.decoded(folder, entries, tmp_path / "cache")
    (folder / "299.jpg").write_bytes(good)
    cache.decoded(folder, entries, tmp_path / "cache")
    assert "which are done" in caplog.text


def test_sources_without_pictures_and_unwritable_folders_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", tmp_path / "cache", f"no pictures in {tmp_path / 'empty'}")
    path = tmp_path / "pictures.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "200.jpg")
    path.write_bytes(path.read_bytes()[:-30])
    assert_refused(path, tmp_path / "cache", f"can't read {path}")
    assert_refused(folder, path / "cache", path / "cache", "--cache-dir")


def end_by(signal_: int) -> int:
    os.kill(os.getpid(), signal_)
    return signal_


def test_jobs_run_in_parallel_and_a_killed_worker_is_reported() -> None:
    assert sorted(in_parallel(abs, range(-50, 0), 3)) == list(range(1, 51))
    assert list(in_parallel(abs, [], 3)) == []
    assert list(in_parallel(end_by, [signal.SIGINT], 1)) == [signal.SIGINT]  # interrupts are the parent's
    with pytest.raises(UserError, match="worker process was killed: rerun the command to continue"):
        list(in_parallel(end_by, [signal.SIGKILL], 1))
    with pytest.raises(UsageError, match="workers must be an integer >= 1, got 0"):
        list(in_parallel(abs, [1], 0))


# Data that are mapped, or too large for the device


@pytest.fixture
def mapped(folder: Path, tmp_path: Path) -> Data:
    pictures = load(folder, tmp_path / "cache")
    return Data(tensors={"image": pictures}, present={"image": torch.arange(len(pictures)) % 2 == 0})


def test_slices_share_memory_and_data_move_to_a_device_with_room(mapped: Data) -> None:
    some = mapped[100:200].to(torch.device("cpu"))
    assert some.tensors["image"].data_ptr() == mapped.tensors["image"][100].data_ptr()
    there = mapped.to(torch.device("meta"))
    assert there.tensors["image"].is_meta
    assert there.streamed_to is None


def test_data_stays_where_a_gpu_lacks_room(mapped: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    image = mapped.tensors["image"]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * image.nbytes - 2, 10 * image.nbytes))
    there = mapped.to(torch.device("cuda", 0))
    assert there.device == there[10:].device == torch.device("cuda", 0)
    assert there.tensors["image"].data_ptr() == image.data_ptr()
    assert there.to(torch.device("cpu")).device == torch.device("cpu")


def test_streamed_batch_is_copied_to_the_device(mapped: Data) -> None:
    data = dataclasses.replace(mapped, streamed_to=torch.device("meta"))
    for rows in (permuted_rows(data, 7, 0)[0], consecutive_rows(data, 7)[0]):
        batch, present = data.batch(rows)
        assert rows.device == torch.device("cpu")
        assert batch["image"].is_meta
        assert batch["image"].shape == (7, 3, 64, 64)
        assert present
        assert present["image"].is_meta
