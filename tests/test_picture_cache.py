"""Pictures decoded once: what torchvision makes of them, kept through kills, damage and changes; and streamed data."""

import fcntl
import io
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from mvae.data import Data, consecutive_rows, permuted_rows
from mvae.datasets import picture_cache, picture_files
from mvae.errors import UserError

from helpers import ROOT, environment

MAKE = """
import logging
import sys
from pathlib import Path
from mvae.datasets import picture_cache
from mvae.errors import UserError
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
source, path = map(Path, sys.argv[1:])
try:
    picture_cache.make(source, list(picture_cache.listing(source).values()), path)
except KeyboardInterrupt:
    sys.exit(130)
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(1)
"""
"""A process that makes the file of all pictures of a folder. It doesn't import torch."""


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture) -> None:
    """What the package says is caught by `caplog`."""
    caplog.set_level(logging.INFO, "mvae")


def draw(path: Path, width: int, height: int, seed: int, mode: str = "RGB") -> None:
    """Writes a picture of coloured clouds."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 4), np.uint8)
    image = Image.fromarray(noise, "RGBA").resize((width, height), Image.Resampling.BICUBIC)
    image.convert(mode).save(path)


def change(path: Path) -> None:
    draw(path, 24, 20, 12345)


def entries_of(source: Path) -> list[picture_cache.Entry]:
    return list(picture_cache.listing(source).values())


def load(source: Path, path: Path, **options: object) -> Tensor:
    """The decoded pictures of a folder or zip, in the order of their names."""
    entries = [entry for _, entry in sorted(picture_cache.listing(source).items())]
    return picture_cache.decoded(source, entries, path, **options)  # type: ignore[arg-type]


def reference(path: Path, mode: str = "RGB", size: int = 64) -> Tensor:
    """What torchvision makes of a picture, on a white ground."""
    crop = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()])
    image: Image.Image = Image.open(path)
    if image.mode == "RGBA":
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    return crop(image.convert(mode))


def start(source: Path, path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAKE, str(source), str(path)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment(), stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def wait_for_a_block(path: Path) -> None:
    """Waits until a build into `path` is at its second block."""
    partial, block = path.with_name(path.name + ".partial"), picture_cache.BLOCK * 3 * 64 * 64
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
    """Three blocks of small pictures, the last not full; a test's own."""
    return Path(shutil.copytree(drawn, tmp_path / "pictures"))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six blocks of larger pictures, of which there are but ten: about a second of one process's work."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(10):
        draw(folder / f"{number:04}.jpg", 300, 400, number)
    for number in range(10, 6 * picture_cache.BLOCK):
        os.link(folder / f"{number % 10:04}.jpg", folder / f"{number:04}.jpg")
    return folder


@pytest.fixture(scope="module")
def whole(many: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of `many`, made without interruption."""
    path = tmp_path_factory.mktemp("whole") / "cache"
    picture_cache.make(many, entries_of(many), path, workers=2)
    return path.read_bytes()


@pytest.fixture
def celeba_images() -> Path:
    """The folder of real CelebA pictures."""
    folder = Path(os.environ.get("MVAE_DATA_DIR", ROOT / "data"), "celeba", "img_align_celeba")
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}: MVAE_DATA_DIR names the folder that holds real CelebA")
    return folder


# What the pictures are.


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pictures_are_those_of_torchvision(tmp_path: Path, mode: str) -> None:
    sizes = [
        (178, 218),
        (218, 178),
        (64, 64),
        (65, 64),
        (64, 67),
        (63, 200),
        (1, 1),
        (1, 9),
        (5, 4),
        (333, 77),
        (91, 91),
    ]
    (tmp_path / "pictures").mkdir()
    paths = []
    for number, (width, height) in enumerate(sizes):
        for kind in ("RGB", "L", "RGBA"):
            paths.append(tmp_path / "pictures" / f"{number:02}{kind}.png")
            draw(paths[-1], width, height, number, kind)
    found = load(tmp_path / "pictures", tmp_path / "cache", mode=mode)
    for picture, path in zip(found, sorted(paths), strict=True):
        assert torch.equal(picture, reference(path, mode)), path.name


# Modes and depths. GREY has each of the 256 greys once; CLEAR is where a picture is transparent, and so white.

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
        (written(Image.fromarray(LEVELS), "PPM"), GREY),
        (written(Image.fromarray(LEVELS), "PNG", transparency=7 * 257), np.where(GREY == 7, 255, GREY)),
        (written(Image.fromarray((GREY / 255).astype(np.float32)), "TIFF"), GREY),
        (written(Image.fromarray(GREY > 127), "PNG"), np.where(GREY > 127, 255, 0)),
        (written(Image.fromarray(GREY), "PNG", transparency=7), np.where(GREY == 7, 255, GREY)),
        (written(Image.fromarray(GREY).convert("P"), "PNG"), GREY),
        (written(Image.fromarray(GREY).convert("P"), "PNG", transparency=7), np.where(GREY == 7, 255, GREY)),
        (written(Image.fromarray(GREY).convert("P"), "GIF", transparency=7), np.where(GREY == 7, 255, GREY)),
        (written(LA, "PNG"), ON_WHITE),
        (written(LA.convert("RGBA"), "PNG"), ON_WHITE),
        (written(LA.convert("RGBA"), "TIFF"), ON_WHITE),
        (written(Image.fromarray(GREY).convert("RGB").convert("CMYK"), "TIFF"), GREY),
        (written(Image.fromarray(GREY).convert("RGB"), "BMP"), GREY),
    ],
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_every_mode_and_depth_gives_the_right_eight_bits(
    file: io.BytesIO, expected: np.ndarray, mode: Literal["L", "RGB"]
) -> None:
    with Image.open(file) as opened:
        found = np.asarray(picture_files.eight_bit(opened).convert(mode))
    np.testing.assert_array_equal(found if mode == "L" else found[..., 1], expected)
    pixels = picture_files.pixels(file.getvalue(), mode, 16)
    np.testing.assert_array_equal(np.frombuffer(pixels, np.uint8).reshape(-1, 16, 16)[-1], expected)


@pytest.mark.parametrize(
    "values", [GREY.astype(np.float32), GREY.astype(np.int32), -(GREY / 255).astype(np.float32)], ids=["F", "I", "<0"]
)
def test_numbers_whose_white_is_not_known_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"can't read .*a\.tif .*its pixels go from .* to .*: numbers of 8 or 16 bits"):
        picture_files.load_picture(tmp_path / "a.tif", "L", 16)
    with pytest.raises(UserError, match=r"a\.tif is damaged, or no picture .its pixels go from"):
        load(tmp_path, tmp_path / "cache")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("levels", [GREY, LEVELS], ids=["8 bits", "16 bits"])
def test_pictures_are_turned_as_the_camera_says(levels: np.ndarray, orientation: int) -> None:
    # What the tag says of rows and columns, by the Exif standard: how the stored array is made of the upright one.
    stored = {
        1: GREY, 2: GREY[:, ::-1], 3: GREY[::-1, ::-1], 4: GREY[::-1],
        5: GREY.T, 6: np.rot90(GREY), 7: GREY[::-1, ::-1].T, 8: np.rot90(GREY, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored * (levels[0, 1] // GREY[0, 1])).astype(levels.dtype))
    file = written(image, "PNG", exif=exif)
    found = np.frombuffer(picture_files.pixels(file.getvalue(), "L", 16), np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(found, GREY)


def test_size_may_be_another(folder: Path, tmp_path: Path) -> None:
    found = load(folder, tmp_path / "cache", size=33)
    assert torch.equal(found[7], reference(folder / "007.jpg", size=33))


def test_real_pictures_are_those_of_torchvision(celeba_images: Path, tmp_path: Path) -> None:
    entries = sorted(entries_of(celeba_images))[::100]
    found = picture_cache.decoded(celeba_images, entries, tmp_path / "cache", workers=2)
    for picture, entry in zip(found, entries, strict=True):
        assert torch.equal(picture, reference(celeba_images / entry.member)), entry.member


def test_pictures_come_in_the_order_asked_for(folder: Path, tmp_path: Path) -> None:
    files = picture_cache.listing(folder)
    names = ["200.jpg", "003.jpg", "004.jpg"]
    found = picture_cache.decoded(folder, [files[name] for name in names], tmp_path / "cache")
    assert torch.equal(found, torch.stack([reference(folder / name) for name in names]))


def test_number_of_workers_does_not_matter(folder: Path, tmp_path: Path) -> None:
    assert torch.equal(load(folder, tmp_path / "one"), load(folder, tmp_path / "five", workers=5))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_gives_what_its_folder_gives(folder: Path, tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w", method) as archive:
        for path in sorted(folder.iterdir(), reverse=True):
            archive.write(path, f"pictures/{path.name}")
    assert torch.equal(load(tmp_path / "pictures.zip", tmp_path / "a"), load(folder, tmp_path / "b", workers=2))


# The file.


def test_file_that_is_whole_is_read_and_not_written(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "cache"
    first = load(folder, path).clone()
    before = path.stat()
    caplog.clear()
    assert torch.equal(load(folder, path), first)
    assert path.stat() == before
    assert caplog.text == ""


def test_whole_file_serves_where_nothing_can_be_written(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    load(folder, path)
    (tmp_path / "cache.lock").unlink()
    load(folder, path)
    assert not (tmp_path / "cache.lock").exists()


def test_no_partial_file_is_left(folder: Path, tmp_path: Path) -> None:
    load(folder, tmp_path / "new" / "cache")
    assert sorted(os.listdir(tmp_path / "new")) == ["cache", "cache.lock"]


def touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize("edit", [touch, Path.unlink])
def test_changed_source_is_decoded_anew(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, edit: Callable[[Path], object]
) -> None:
    path = tmp_path / "cache"
    load(folder, path)
    edit(folder / "100.jpg")
    found = load(folder, path)
    assert "doesn't hold the pictures that are now in" in caplog.text
    assert torch.equal(found, load(folder, tmp_path / "fresh"))


def test_changed_member_of_a_zip_is_decoded_anew(folder: Path, tmp_path: Path) -> None:
    for number, name in enumerate(["000.jpg", "001.jpg"]):
        with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
            archive.write(folder / name, "000.jpg")
        found = load(tmp_path / "pictures.zip", tmp_path / "cache")
        assert torch.equal(found[0], reference(folder / f"00{number}.jpg"))


def test_older_map_keeps_its_pictures_when_the_source_changes(folder: Path, tmp_path: Path) -> None:
    old = load(folder, tmp_path / "cache")
    change(folder / "100.jpg")
    load(folder, tmp_path / "cache")
    assert not torch.equal(old[100], reference(folder / "100.jpg"))


@pytest.mark.parametrize("share", [0.0, 0.9999])
def test_damaged_block_is_decoded_again(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, share: float
) -> None:
    path = tmp_path / "cache"
    load(folder, path)
    good = path.read_bytes()
    at = int(share * 300 * 3 * 64 * 64)
    path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
    load(folder, path)
    assert "is damaged: decoding 1 of 3 blocks again" in caplog.text
    assert path.read_bytes() == good


@pytest.mark.parametrize("kept", [0, -1])
def test_file_cut_short_is_made_anew(folder: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cache"
    load(folder, path)
    good = path.read_bytes()
    path.write_bytes(good[:kept])
    load(folder, path)
    assert path.read_bytes() == good


def test_pictures_of_another_size_or_mode_are_not_taken_for_these(folder: Path, tmp_path: Path) -> None:
    for mode, size in (("RGB", 64), ("L", 64), ("RGB", 32)):
        found = load(folder, tmp_path / "cache", mode=mode, size=size)
        assert torch.equal(found[0], reference(folder / "000.jpg", mode, size))


def anonymous_bytes() -> int:
    """The memory of this process that no file stands behind."""
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


def test_module_needs_neither_torch_nor_fcntl_to_be_imported() -> None:
    code = (
        "import sys; sys.modules['fcntl'] = None; import mvae.datasets.picture_cache; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


# Kills, and processes at the same time.


def test_killed_build_is_gone_on_with(
    many: Path, whole: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "cache"
    process = start(many, path)
    wait_for_a_block(path)
    process.kill()
    process.communicate()  # ends when the last process that holds its stderr does
    assert not path.exists()
    picture_cache.make(many, entries_of(many), path)
    assert "are done" in caplog.text
    assert path.read_bytes() == whole


def test_interrupt_ends_the_build_at_once_and_loses_nothing(
    many: Path, whole: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = start(many, tmp_path / "cache")
    wait_for_a_block(tmp_path / "cache")
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "")
    picture_cache.make(many, entries_of(many), tmp_path / "cache")
    assert "of which" in caplog.text
    assert (tmp_path / "cache").read_bytes() == whole


def test_two_builds_at_once_decode_once(many: Path, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    with open(tmp_path / "cache.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        processes = [start(many, path) for _ in range(2)]
        for process in processes:
            assert process.stdout
            assert "waiting for another process" in process.stdout.readline()
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("decoding" in words for words in said) == 1
    assert path.read_bytes() == whole


def test_partial_file_of_other_pictures_is_not_gone_on_with(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    load(folder, path)
    path.rename(tmp_path / "cache.partial")
    change(folder / "100.jpg")
    assert torch.equal(load(folder, path)[100], reference(folder / "100.jpg"))


# What can't be had.


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_truncated_picture_is_named(folder: Path, tmp_path: Path, kept: float) -> None:
    content = (folder / "200.jpg").read_bytes()
    (folder / "200.jpg").write_bytes(content[: int(kept * len(content))])
    assert_refused(folder, tmp_path / "cache", folder / "200.jpg", "is damaged, or no picture", "replace it")
    assert not (tmp_path / "cache").exists()


def test_damaged_member_of_a_zip_is_named(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "pictures.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "200.jpg", "in/200.jpg")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert_refused(path, tmp_path / "cache", path / "in" / "200.jpg", "is damaged")


def test_what_is_decoded_before_a_damaged_picture_is_kept(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = sorted(entries_of(folder))
    good = (folder / "200.jpg").read_bytes()
    (folder / "200.jpg").write_bytes(bytes(len(good)))
    with pytest.raises(UserError):
        picture_cache.make(folder, entries, tmp_path / "cache")
    (folder / "200.jpg").write_bytes(good)
    picture_cache.make(folder, entries, tmp_path / "cache")
    assert f"of which {picture_cache.BLOCK} are done" in caplog.text


def test_truncated_zip_is_named(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "pictures.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "200.jpg")
    path.write_bytes(path.read_bytes()[:-30])
    assert_refused(path, tmp_path / "cache", f"can't read {path}")


def test_folder_without_pictures_is_named(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    assert_refused(tmp_path / "pictures", tmp_path / "cache", f"no pictures in {tmp_path / 'pictures'}")


def test_folder_that_cannot_be_made_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_refused(folder, tmp_path / "file" / "cache", tmp_path / "file" / "cache", "`cache_dir`")


def test_full_disk_is_told_at_once_and_nothing_is_left(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fallocate(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    assert_refused(folder, tmp_path / "cache", "No space left on device", "`cache_dir`")
    assert sorted(os.listdir(tmp_path)) == ["cache.lock", "pictures"]


def test_killed_worker_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert_refused(folder, tmp_path / "cache", "was killed", "goes on")


# Data that is mapped, or too large for the device.


def mapped(folder: Path, tmp_path: Path) -> Data:
    pictures = load(folder, tmp_path / "cache")
    return Data(tensors={"image": pictures}, present={"image": torch.arange(len(pictures)) % 2 == 0})


def test_slice_of_data_is_no_copy(folder: Path, tmp_path: Path) -> None:
    data = mapped(folder, tmp_path)
    some = data[100:200].to(torch.device("cpu"))
    assert some.tensors["image"].data_ptr() == data.tensors["image"][100].data_ptr()


def test_data_is_moved_to_a_device_that_has_room(folder: Path, tmp_path: Path) -> None:
    data = mapped(folder, tmp_path).to(torch.device("meta"))
    assert data.tensors["image"].is_meta
    assert data.streamed_to is None


def test_data_stays_where_a_gpu_lacks_room(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = mapped(folder, tmp_path)
    n_bytes = data.tensors["image"].nbytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * n_bytes - 2, 10 * n_bytes))
    there = data.to(torch.device("cuda", 0))
    assert there.device == torch.device("cuda", 0)
    assert there.tensors["image"].data_ptr() == data.tensors["image"].data_ptr()
    assert there[10:].device == there.device
    assert there.to(torch.device("cpu")).device == torch.device("cpu")


def test_streamed_batch_is_copied_to_the_device(folder: Path, tmp_path: Path) -> None:
    data = Data(**{**vars(mapped(folder, tmp_path)), "streamed_to": torch.device("meta")})
    for rows in (permuted_rows(data, 7, 0)[0], consecutive_rows(data, 7)[0]):
        batch, present = data.batch(rows)
        assert rows.device == torch.device("cpu")
        assert batch["image"].is_meta
        assert batch["image"].shape == (7, 3, 64, 64)
        assert present
        assert present["image"].is_meta
