"""CelebA's lists and layouts: what is read from them, and what is refused."""

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

from mvae.data import celeba
from mvae.data.celeba import Source
from mvae.errors import UserError
from synthetic.__main__ import CELEBA_ATTRIBUTES

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from helpers import ROOT, assert_refused, environment, run, run_warm

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


def assert_not_found(data_dir: Path, *said: object, allow_missing: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        celeba.find(data_dir, allow_missing)
    assert "\n" not in str(caught.value)
    for words in said:
        assert str(words) in str(caught.value)
    return str(caught.value)


# What is read


def test_splits_are_those_of_the_partition(drawn: Path, tmp_path: Path) -> None:
    source = Source(data_dir=drawn, cache_dir=tmp_path, workers=1)
    train, validation = celeba.training_data(source)
    expected = torch.from_numpy(VALUES[:, [COLUMNS.index(name) for name in celeba.ATTRIBUTES]] == 1).byte()
    for part, data in enumerate((train, validation, celeba.examples("test", source))):
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


def test_columns_are_found_by_their_names(data_dir: Path) -> None:
    order = np.random.default_rng(2).permutation(40)
    before = celeba.find(data_dir)
    shuffled = attribute_list([COLUMNS[column] for column in order], VALUES[:, order])
    (data_dir / "celeba" / "list_attr_celeba.txt").write_text(shuffled)
    after = celeba.find(data_dir)
    for name in celeba.ATTRIBUTES:
        one, other = (faces.attributes[:, faces.columns.index(name)] for faces in (before, after))
        assert (one == other).all()


# Other layouts: each of these changes the folder


def as_csv(folder: Path) -> None:
    attributes = folder / "list_attr_celeba.txt"
    rows = [",".join(line.split()) for line in attributes.read_text().splitlines()[1:]]
    attributes.with_suffix(".csv").write_text("\n".join(["image_id," + rows[0], *rows[1:]]) + "\n")
    partition = folder / "list_eval_partition.txt"
    lines = ["image_id,partition", *(line.replace(" ", ",") for line in partition.read_text().splitlines())]
    partition.with_suffix(".csv").write_text("\r\n".join(lines))
    attributes.unlink()
    partition.unlink()


def nested(folder: Path) -> None:
    (folder / "img_align_celeba").rename(folder / "inner")
    (folder / "img_align_celeba").mkdir()
    (folder / "inner").rename(folder / "img_align_celeba" / "img_align_celeba")
    (folder / "img_align_celeba" / ".DS_Store").write_text("")


def as_png(folder: Path) -> None:
    for path in (folder / "img_align_celeba").iterdir():
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
    (folder / "img_align_celeba").rename(folder / "img_align_celeba_png")


def with_an_empty_folder_beside_the_zip(folder: Path) -> None:
    shutil.make_archive(str(folder / "img_align_celeba"), "zip", folder, "img_align_celeba")
    shutil.rmtree(folder / "img_align_celeba")
    (folder / "img_align_celeba").mkdir()


def with_byte_order_marks(folder: Path) -> None:
    for path in folder.glob("list_*"):
        path.write_text(path.read_text(), encoding="utf-8-sig")


def in_utf_16(folder: Path) -> None:
    for path in folder.glob("list_*"):
        path.write_text(path.read_text(), encoding="utf-16")


def with_carriage_returns(folder: Path) -> None:
    for path in folder.glob("list_*"):
        path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))


def in_two_folders(folder: Path) -> None:
    (folder / "img_align_celeba").rename(folder.parent / "img_align_celeba")


@pytest.mark.parametrize("marks", [None, with_byte_order_marks, in_utf_16, with_carriage_returns])
@pytest.mark.parametrize("lists", [None, as_csv])
@pytest.mark.parametrize("layout", [None, nested, as_png, with_an_empty_folder_beside_the_zip, in_two_folders])
def test_other_layouts_are_found(
    data_dir: Path, *, layout: Callable[[Path], None] | None, lists: Callable[[Path], None] | None,
    marks: Callable[[Path], None] | None,
) -> None:  # fmt: skip
    before = celeba.find(data_dir)
    for change in (layout, lists, marks):
        if change:
            change(data_dir / "celeba")
    after = celeba.find(data_dir)
    assert after.counts == before.counts == after.named
    assert (after.attributes == before.attributes).all()
    assert after.columns == before.columns
    stems = [[Path(entry.member).stem for entry in faces.entries] for faces in (before, after)]
    assert stems[0] == stems[1]


def test_empty_folder_is_named(data_dir: Path, images: Path) -> None:
    shutil.rmtree(images)
    images.mkdir()
    assert_not_found(data_dir, images, "has no pictures", "img_align_celeba.zip")


def test_images_with_other_names_are_named(data_dir: Path, images: Path) -> None:
    for number, path in enumerate(sorted(images.iterdir())):
        path.rename(images / f"face{number}.jpg")
    said = assert_not_found(data_dir, "it has face0.jpg, face1.jpg and others, but not 000001.jpg")
    assert "--allow-missing" not in said


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("list_attr_celeba.csv", "Bald,", "", "line 1: the header must name the column Bald"),
        (
            "list_attr_celeba.csv",
            "000002.jpg,",
            "000002.jpg,7,",
            "line 3: expected a name and 40 values, found 42 words",
        ),
        (
            "list_eval_partition.csv",
            "000002.jpg,1",
            "000002.jpg,3",
            r"line 3 \(000002.jpg\): expected 0 or 1 or 2, found '3'",
        ),
    ],
)
def test_line_of_a_csv_that_is_wrong_is_named(data_dir: Path, name: str, old: str, new: str, said: str) -> None:
    as_csv(data_dir / "celeba")
    path = data_dir / "celeba" / name
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=f"{name}, {said}"):
        celeba.find(data_dir)


def official(root: Path, images: Path) -> None:
    """The official download's layout in `root`, of torchvision's in the folder of `images`."""
    for part, name in (("Anno", "list_attr_celeba.txt"), ("Eval", "list_eval_partition.txt")):
        (root / part).mkdir(parents=True, exist_ok=True)
        shutil.copy(images.parent / name, root / part / name)


@pytest.mark.parametrize("below", ["", "celeba", "CelebA"])
@pytest.mark.parametrize("folder", ["", "Img"])
@pytest.mark.parametrize("packed", [False, True])
def test_official_download_is_found(drawn: Path, tmp_path: Path, below: str, folder: str, packed: bool) -> None:
    images = drawn / "celeba" / "img_align_celeba"
    official(tmp_path / below, images)
    where = tmp_path / below / folder
    where.mkdir(exist_ok=True)
    if packed:
        with zipfile.ZipFile(where / "img_align_celeba.zip", "w") as archive:
            archive.mkdir("img_align_celeba")
            for path in sorted(images.iterdir()):
                archive.write(path, f"img_align_celeba/{path.name}")
    else:
        (where / "img_align_celeba").symlink_to(images)
    faces = celeba.find(tmp_path)
    assert faces.counts == (60, 60, 60)
    assert faces.source == where / ("img_align_celeba.zip" if packed else "img_align_celeba")


def test_zip_gives_what_its_folder_gives(drawn: Path, data_dir: Path, images: Path) -> None:
    with_an_empty_folder_beside_the_zip(images.parent)
    of_zip, of_folder = (
        celeba.examples("test", Source(data_dir=folder, cache_dir=data_dir / name, workers=1))
        for folder, name in ((data_dir, "a"), (drawn, "b"))
    )
    assert torch.equal(of_zip.tensors["image"], of_folder.tensors["image"])


@pytest.mark.parametrize("name", ["img_align_celeba", "list_attr_celeba.txt", "list_eval_partition.txt"])
def test_what_is_missing_is_named_with_where_it_goes(data_dir: Path, name: str) -> None:
    path = data_dir / "celeba" / name
    path.rename(data_dir / "elsewhere")
    assert_not_found(data_dir, f"lacks {name}", "mmlab.ie.cuhk.edu.hk/projects/CelebA.html", data_dir / "celeba")


def test_empty_data_folder_lacks_all_three(tmp_path: Path) -> None:
    assert_not_found(tmp_path, "img_align_celeba.zip and list_attr_celeba.txt and list_eval_partition.txt")


# Missing images


def test_missing_images_are_refused_unless_allowed(
    data_dir: Path, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in NAMES[:5]:
        (images / name).unlink()
    assert_not_found(data_dir, f"5 of the {N} images", images, "--allow-missing")
    test = celeba.examples(
        "test", Source(data_dir=data_dir, cache_dir=data_dir / "cache", workers=1, allow_missing=True)
    )
    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert f"5 of the {N} images" in record.getMessage()
    rows = np.flatnonzero(PARTS == 2)[1:]
    assert torch.equal(test.tensors["image"], torch.stack([picture(images, int(row)) for row in rows]))


@pytest.mark.parametrize("allow_missing", [True, False])
def test_split_with_too_few_images_is_refused(data_dir: Path, images: Path, allow_missing: bool) -> None:
    for row in np.flatnonzero(PARTS == 1):
        (images / NAMES[row]).unlink()
    left = "too few are left: 60 for train, 0 for validation, 60 for test"
    said = assert_not_found(data_dir, f"60 of the {N} images", left, allow_missing=allow_missing)
    assert "--allow-missing" not in said


# Wrong lists. Line 5 of the attributes and line 3 of the partition are the third image's


def replace(old: str, new: str) -> Callable[[str], str]:
    def edit(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return edit


def in_row(name: str, edit: Callable[[str], str]) -> Callable[[str], str]:
    return lambda text: "".join(edit(row) if row.startswith(name) else row for row in text.splitlines(keepends=True))


THIRD = NAMES[2]
ATTRIBUTE_FAULTS = [
    (in_row(THIRD, lambda row: row.replace("\n", " 1\n")), "line 5: expected a name and 40 values, found 42 words"),
    (in_row(THIRD, lambda row: row[:20] + "\n"), "line 5: expected a name and 40 values, found 4 words"),
    (in_row(THIRD, lambda row: "\n"), "line 5: expected a name and 40 values, found 0 words"),
    (in_row(THIRD, lambda row: row.replace(" -1", "  0", 1)), f"line 5 ({THIRD}): expected -1 or 1, found '0'"),
    (in_row(THIRD, lambda row: row.replace(" -1", " --1", 1)), f"line 5 ({THIRD}): expected -1 or 1, found '--1'"),
    (in_row(THIRD, lambda row: row.replace(" -1", " 11", 1)), f"line 5 ({THIRD}): expected -1 or 1, found '11'"),
    (in_row(THIRD, lambda row: row.replace(" -1", " \x00", 1)), "line 5"),
    (in_row(THIRD, lambda row: row.replace(" -1", " -", 1)), f"line 5 ({THIRD}): expected -1 or 1, found '-'"),
    (in_row(THIRD, lambda row: row.replace(" -1", " é", 1)), f"line 5 ({THIRD}): expected -1 or 1, found 'é'"),
    (in_row(THIRD, lambda row: row.replace(THIRD, NAMES[0])), f"line 5: {NAMES[0]} is named a second time"),
    (in_row(THIRD, lambda row: ""), f"line 1: expected the row count, {N - 1}, found '{N}'"),
    (replace(f"{N}\n", "many\n"), "found 'many'"),
    (replace("Male", "Mail"), "line 2: the header must name the column Male"),
    (lambda text: "", "line 2"),
    (lambda text: text[: len(text) // 2], "line "),
]
PARTITION_FAULTS = [
    (replace(f"{THIRD} 2", f"{THIRD} 3"), f"line 3 ({THIRD}): expected 0 or 1 or 2, found '3'"),
    (replace(f"{THIRD} 2", f"{THIRD}"), "line 3: expected a name and 1 values, found 1 words"),
    (replace(f"{THIRD} 2\n", ""), f"in row 3 they name {NAMES[3]} and {THIRD}"),
    (replace(f"{THIRD} 2", "other.jpg 2"), f"in row 3 they name other.jpg and {THIRD}"),
    (replace(f"{NAMES[-1]} 2\n", ""), f"in row {N} they name no more and"),
    (lambda text: text + "more.jpg 0\n", f"in row {N + 1} they name more.jpg and no more"),
    (lambda text: "", "line 1"),
]


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    [
        *(("list_attr_celeba.txt", *fault) for fault in ATTRIBUTE_FAULTS),
        *(("list_eval_partition.txt", *fault) for fault in PARTITION_FAULTS),
    ],
)
def test_fault_in_a_list_is_named(data_dir: Path, name: str, edit: Callable[[str], str], said: str) -> None:
    path = data_dir / "celeba" / name
    path.write_text(edit(path.read_text()))
    assert_not_found(data_dir, path, said)


def test_partition_that_leaves_a_split_empty_is_refused(data_dir: Path) -> None:
    path = data_dir / "celeba" / "list_eval_partition.txt"
    path.write_text(path.read_text().replace(" 1\n", " 0\n"))
    assert_not_found(data_dir, path, "120 for train, 0 for validation, 60 for test")


# The script and the real lists


def test_script_decodes_the_images_that_exist(data_dir: Path, images: Path, tmp_path: Path) -> None:
    for name in NAMES[:5]:
        (images / name).unlink()
    env = environment(MVAE_DATA_DIR=str(data_dir), MVAE_CACHE_DIR=str(tmp_path / "cache"))
    done = run("celeba/datasets.py", "--allow-missing", cwd=tmp_path, env=env)
    assert (done.returncode, len(done.stderr.splitlines())) == (0, 1)
    assert f"5 of the {N} images" in done.stderr
    assert "train 58 of 60 images, validation 58 of 60 images, test 59 of 60 images" in done.stdout
    assert f"decoding {N - 5} pictures" in done.stdout
    assert (tmp_path / "cache" / "celeba-64.pictures").exists()
    flags = ["--data-dir", data_dir, "--cache-dir", tmp_path]
    assert_refused(run_warm("celeba/datasets.py", *flags), 1, f"5 of the {N} images", "--allow-missing")


@pytest.mark.parametrize(("workers", "status", "said"), [(1, 1, THIRD), (0, 2, "workers must be an integer >= 1")])
def test_script_names_a_damaged_image_and_a_wrong_flag(
    data_dir: Path, images: Path, workers: int, status: int, said: str
) -> None:
    (images / THIRD).write_bytes((images / THIRD).read_bytes()[:-40])
    flags = ["--data-dir", data_dir, "--cache-dir", data_dir / "cache", "--workers", workers]
    assert_refused(run_warm("celeba/datasets.py", *flags), status, said)


def test_real_lists_are_read_whole() -> None:
    folder = Path(os.environ.get("MVAE_DATA_DIR", ROOT / "data"), "celeba")
    if not folder.is_dir():
        pytest.skip(f"real CelebA is not in {folder.parent}: MVAE_DATA_DIR names the folder that holds it")
    names, columns, values = celeba.read_attributes(folder / "list_attr_celeba.txt")
    others, parts = celeba.read_partition(folder / "list_eval_partition.txt")
    assert names == others == [f"{number:06}.jpg" for number in range(1, 202_600)]
    assert columns == COLUMNS
    assert np.bincount(parts).tolist() == [162_770, 19_867, 19_962]
    row = np.random.default_rng(0).integers(len(names))
    line = (folder / "list_attr_celeba.txt").read_text().splitlines()[2 + row]
    assert line.split()[1:] == [str(value) for value in values[row]]
