"""CelebA's lists and layouts: what is read from them, and what is refused."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mvae.data import celeba
from mvae.data.cache import listing
from mvae.data.celeba import Source
from mvae.data.dataset import Data
from mvae.errors import UserError
from synthetic.__main__ import CELEBA_ATTRIBUTES

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from helpers import ROOT, environment, run_warm

COLUMNS = CELEBA_ATTRIBUTES.split()
N = 180
NAMES = [f"{number:06}.jpg" for number in range(1, N + 1)]
PARTS = np.arange(N) % 3  # every split has 60 images, spread over the list
VALUES = np.random.default_rng(0).choice([-1, 1], (N, 40))


def attribute_list(columns: list[str] = COLUMNS, values: np.ndarray = VALUES) -> str:
    rows = [f"{name} {' '.join(f'{value:2}' for value in row)}\n" for name, row in zip(NAMES, values, strict=True)]
    return f"{N}\n{' '.join(columns)} \n" + "".join(rows)


def partition_list() -> str:
    return "".join(f"{name} {part}\n" for name, part in zip(NAMES, PARTS, strict=True))


def picture(folder: Path, row: int) -> torch.Tensor:
    """Return the picture of a row of the lists as torchvision crops it."""
    crop = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(64), transforms.PILToTensor()])
    return crop(Image.open(folder / NAMES[row]))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder in torchvision's layout."""
    data_dir = tmp_path_factory.mktemp("drawn")
    images = data_dir / "celeba" / "img_align_celeba"
    images.mkdir(parents=True)
    noise = np.random.default_rng(1).integers(0, 256, (N, 8, 6, 3), np.uint8)
    for name, pixels in zip(NAMES, noise, strict=True):
        Image.fromarray(pixels).resize((44, 54), Image.Resampling.BICUBIC).save(images / name)
    (data_dir / "celeba" / "list_attr_celeba.txt").write_text(attribute_list())
    (data_dir / "celeba" / "list_eval_partition.txt").write_text(partition_list())
    return data_dir


@pytest.fixture
def data_dir(drawn: Path, tmp_path: Path) -> Path:
    """A test's own copy of it."""
    return Path(shutil.copytree(drawn, tmp_path / "data"))


@pytest.fixture
def images(data_dir: Path) -> Path:
    return data_dir / "celeba" / "img_align_celeba"


def examples(data_dir: Path, split: str = "test", allowed_in_training: bool = False, **options: Any) -> Data:
    """Return a split, decoded into a new folder in the data folder."""
    cache_dir = Path(tempfile.mkdtemp(dir=data_dir))
    source = Source(data_dir=data_dir, cache_dir=cache_dir, workers=1, **options)
    return celeba.examples(split, source, {"allow_missing": allowed_in_training})


@pytest.fixture(scope="module")
def plain(drawn: Path) -> Data:
    return examples(drawn)


def assert_not_found(data_dir: Path, *said: object, **options: Any) -> None:
    with pytest.raises(UserError) as caught:
        examples(data_dir, **options)
    assert "\n" not in str(caught.value)
    for words in said:
        assert str(words) in str(caught.value)


# What is read


def test_splits_are_those_of_the_partition(drawn: Path, tmp_path: Path) -> None:
    source = Source(data_dir=drawn, cache_dir=tmp_path, workers=1)
    train, validation = celeba.training_data(source)
    expected = torch.from_numpy(VALUES[:, [COLUMNS.index(name) for name in celeba.ATTRIBUTES]] == 1).byte()
    for part, data in enumerate((train, validation, celeba.examples("test", source, {}))):
        rows = np.flatnonzero(part == PARTS)
        assert torch.equal(data.tensors["attrs"], expected[rows])
        pictures = [picture(drawn / "celeba" / "img_align_celeba", int(row)) for row in rows]
        assert torch.equal(data.tensors["image"], torch.stack(pictures))
    end = train.tensors["image"].data_ptr() + train.tensors["image"].nbytes
    assert validation.tensors["image"].data_ptr() == end  # they share one mapped file
    some, validation = celeba.training_data(source, limit=7)
    assert (len(some), len(validation)) == (7, 60)
    assert torch.equal(some.tensors["image"], train.tensors["image"][:7])
    batch, present = train.batch(torch.tensor([3, 1]))
    assert present is None
    assert torch.equal(batch["image"], train.tensors["image"][[3, 1]].float() / 255)
    assert torch.equal(batch["attrs"], train.tensors["attrs"][[3, 1]].float())


# Other layouts: each of these changes the folder


def shuffled(folder: Path) -> None:
    order = np.random.default_rng(2).permutation(40)
    columns = [COLUMNS[column] for column in order]
    (folder / "list_attr_celeba.txt").write_text(attribute_list(columns, VALUES[:, order]))


def as_csv(folder: Path) -> None:
    attributes = folder / "list_attr_celeba.txt"
    rows = [",".join(line.split()) for line in attributes.read_text().splitlines()[1:]]
    attributes.with_suffix(".csv").write_text("\n".join(["image_id," + rows[0], *rows[1:]]) + "\n")
    partition = folder / "list_eval_partition.txt"
    lines = ["image_id,partition", *(line.replace(" ", ",") for line in partition.read_text().splitlines())]
    partition.with_suffix(".csv").write_text("\r\n".join(lines))
    attributes.unlink()
    partition.unlink()


def with_byte_order_marks_and_carriage_returns(folder: Path) -> None:
    for path in folder.glob("list_*"):
        path.write_text(path.read_text(), encoding="utf-8-sig", newline="\r\n")


def nested(folder: Path) -> None:
    (folder / "img_align_celeba").rename(folder / "inner")
    (folder / "img_align_celeba").mkdir()
    (folder / "inner").rename(folder / "img_align_celeba" / "img_align_celeba")


def as_png(folder: Path) -> None:
    for path in (folder / "img_align_celeba").iterdir():
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
    (folder / "img_align_celeba").rename(folder / "img_align_celeba_png")


def in_two_folders(folder: Path) -> None:
    (folder / "img_align_celeba").rename(folder.parent / "img_align_celeba")


def as_a_zip(folder: Path) -> None:
    shutil.make_archive(str(folder / "img_align_celeba"), "zip", folder, "img_align_celeba")
    shutil.rmtree(folder / "img_align_celeba")


def as_the_official_download(folder: Path) -> None:
    as_a_zip(folder)
    for name, part in (("img_align*", "Img"), ("list_attr*", "Anno"), ("list_eval*", "Eval")):
        (path,) = folder.glob(name)
        (folder / part).mkdir()
        path.rename(folder / part / path.name)
    folder.rename(folder.parent / "CelebA")


@pytest.mark.parametrize(
    "changes",
    [
        [shuffled],
        [as_csv, nested],
        [as_csv, with_byte_order_marks_and_carriage_returns],
        [with_byte_order_marks_and_carriage_returns, in_two_folders],
        [as_png],
        [as_a_zip],
        [as_the_official_download],
    ],
)
def test_other_layouts_are_found(plain: Data, data_dir: Path, changes: list[Callable[[Path], None]]) -> None:
    for change in changes:
        change(data_dir / "celeba")
    found = examples(data_dir)
    assert torch.equal(found.tensors["attrs"], plain.tensors["attrs"])
    assert torch.equal(found.tensors["image"], plain.tensors["image"])


@pytest.mark.parametrize("name", ["img_align_celeba", "list_attr_celeba.txt", "list_eval_partition.txt"])
def test_what_is_missing_is_named_with_where_it_goes(data_dir: Path, name: str) -> None:
    (data_dir / "celeba" / name).rename(data_dir / "elsewhere")
    assert_not_found(data_dir, f"lacks {name}", "mmlab.ie.cuhk.edu.hk/projects/CelebA.html", data_dir / "celeba")


@pytest.mark.parametrize("zipped", [False, True])
def test_files_that_are_no_pictures_are_skipped_and_counted(
    images: Path, zipped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for name in (".DS_Store", "._000001.jpg", "Thumbs.db"):
        (images / name).write_bytes(b"junk")
    (images / "broken.png").symlink_to("nowhere")
    os.mkfifo(images / "fifo.png")
    (images / "sub.png").mkdir()
    source, skipped = images, 6
    if zipped:
        as_a_zip(images.parent)
        source, skipped = images.with_suffix(".zip"), 3
    assert sorted(listing(source)) == NAMES
    assert caplog.messages == [f"skipped {skipped} of {N + skipped} entries of {source}, which aren't pictures"]


@pytest.mark.parametrize(
    ("content", "said"), [(b"junk", "damaged or not a picture"), (None, "larger than 50,000,000 pixels")]
)
def test_error_of_a_worker_has_one_traceback(images: Path, content: bytes | None, said: str) -> None:
    if content:
        (images / NAMES[0]).write_bytes(content)
    else:
        Image.new("1", (20_000, 20_000)).save(images / NAMES[0], "PNG")
    with pytest.raises(UserError, match=f"{NAMES[0]} is {said}: replace it") as caught:
        examples(images.parents[1])
    assert caught.value.__cause__ is None


# Missing images


def test_missing_images_are_refused_unless_allowed(
    data_dir: Path, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in NAMES[:5]:
        (images / name).unlink()
    assert_not_found(data_dir, f"5 of the {N} images", images, "--allow-missing")
    assert len(examples(data_dir, allowed_in_training=True)) == 59
    caplog.clear()
    test = examples(data_dir, allow_missing=True)
    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert f"5 of the {N} images" in record.getMessage()
    rows = np.flatnonzero(PARTS == 2)[1:]
    assert torch.equal(test.tensors["image"], torch.stack([picture(images, int(row)) for row in rows]))


def test_split_without_images_is_refused(data_dir: Path, images: Path) -> None:
    for row in np.flatnonzero(PARTS == 1):
        (images / NAMES[row]).unlink()
    found = "every split needs images, found 60 for train, 0 for validation, 60 for test"
    assert_not_found(data_dir, f"{found}: 60 of the {N} images", allow_missing=True)


# Damaged lists. Line 5 of the attributes and line 3 of the partition are the third image's

THIRD = NAMES[2]


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("attr", f"{THIRD} ", f"{THIRD} \x00é", "line 5: expected a name and 40 values of -1 or 1, found"),
        ("attr", "Male", "Mail", "line 2: the header must name the columns, but lacks Male"),
        ("eval", f"{THIRD} 2", f"{THIRD} 3", f"line 3: expected a name and 1 values of 0 or 1 or 2, found '{THIRD} 3'"),
        ("eval", f"{THIRD} 2\n", "", "must name the same images in the same order"),
        ("eval", partition_list(), "", "line 1: expected a name"),
    ],
)
def test_fault_in_a_list_is_named(data_dir: Path, name: str, old: str, new: str, said: str) -> None:
    (path,) = (data_dir / "celeba").glob(f"list_{name}*")
    before = path.read_text()
    assert old in before
    path.write_text(before.replace(old, new, 1))
    assert_not_found(data_dir, path, said)


def test_fault_in_a_csv_is_named(data_dir: Path) -> None:
    as_csv(data_dir / "celeba")
    path = data_dir / "celeba" / "list_attr_celeba.csv"
    path.write_text(path.read_text().replace("000002.jpg,", "000002.jpg,7,"))
    assert_not_found(data_dir, f"{path}, line 3: expected a name and 40 values")


# The script and the real lists


def test_script_decodes_the_images_that_exist(data_dir: Path, images: Path, tmp_path: Path) -> None:
    for name in NAMES[:5]:
        (images / name).unlink()
    env = environment(MVAE_DATA_DIR=str(data_dir), MVAE_CACHE_DIR=str(tmp_path / "cache"))
    done = run_warm("celeba/datasets.py", "--allow-missing", cwd=tmp_path, env=env)
    assert (done.returncode, len(done.stderr.splitlines())) == (0, 1)
    assert f"5 of the {N} images" in done.stderr
    assert "train 58, validation 58, test 59 images" in done.stdout
    assert f"decoding {N - 5} pictures" in done.stdout
    assert (tmp_path / "cache" / "celeba-64.pictures").exists()


def test_real_lists_are_read_whole() -> None:
    folder = Path(os.environ.get("MVAE_DATA_DIR", ROOT / "data"), "celeba")
    if not folder.is_dir():
        pytest.skip(f"real CelebA is not in {folder.parent}: MVAE_DATA_DIR names the folder that holds it")
    names, values = celeba.read_attributes(folder / "list_attr_celeba.txt")
    others, parts = celeba.read_partition(folder / "list_eval_partition.txt")
    assert names == others == [f"{number:06}.jpg" for number in range(1, 202_600)]
    assert np.bincount(parts).tolist() == [162_770, 19_867, 19_962]
    row = np.random.default_rng(0).integers(len(names))
    line = (folder / "list_attr_celeba.txt").read_text().splitlines()[2 + row].split()
    assert [line[1 + COLUMNS.index(name)] == "1" for name in celeba.ATTRIBUTES] == values[row].tolist()
