"""CelebA's lists and layouts: what is read of them, what is told, and what is refused."""

import argparse
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from mvae.datasets import celeba
from mvae.errors import UserError
from mvae.scripts.faces import add_flags

from helpers import ROOT, assert_refused, environment, run_warm

# fmt: off
COLUMNS = [
    "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips",
    "Big_Nose", "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin",
    "Eyeglasses", "Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open",
    "Mustache", "Narrow_Eyes", "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline",
    "Rosy_Cheeks", "Sideburns", "Smiling", "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat",
    "Wearing_Lipstick", "Wearing_Necklace", "Wearing_Necktie", "Young",
]
# fmt: on
N = 180
NAMES = [f"{number:06}.jpg" for number in range(1, N + 1)]
PARTS = np.arange(N) % 3  # every split has 60, and no two neighbours are of the same
VALUES = np.random.default_rng(0).choice([-1, 1], (N, 40))


def attribute_list(columns: list[str] = COLUMNS, values: np.ndarray = VALUES) -> str:
    rows = [f"{name} {' '.join(f'{value:2}' for value in row)}\n" for name, row in zip(NAMES, values, strict=True)]
    return f"{N}\n{' '.join(columns)} \n" + "".join(rows)


def partition_list() -> str:
    return "".join(f"{name} {part}\n" for name, part in zip(NAMES, PARTS, strict=True))


def picture(folder: Path, row: int) -> torch.Tensor:
    """What torchvision makes of the picture of a row of the lists."""
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


def assert_not_found(data_dir: Path, *said: object, allow_missing: bool = False) -> None:
    with pytest.raises(UserError) as caught:
        celeba.find(data_dir, allow_missing)
    assert "\n" not in str(caught.value)
    for words in said:
        assert str(words) in str(caught.value)


# What is read.


def test_splits_are_those_of_the_partition(drawn: Path, tmp_path: Path) -> None:
    train, validation = celeba.training_data(drawn, tmp_path, allow_missing=False, workers=1)
    test = celeba.test_data(drawn, tmp_path, allow_missing=False, workers=1)
    wanted = torch.from_numpy(VALUES[:, [COLUMNS.index(name) for name in celeba.ATTRIBUTES]] == 1).byte()
    for part, data in enumerate((train, validation, test)):
        rows = np.flatnonzero(part == PARTS)
        assert torch.equal(data.tensors["attrs"], wanted[rows])
        expected = torch.stack([picture(drawn / "celeba" / "img_align_celeba", int(row)) for row in rows])
        assert torch.equal(data.tensors["image"], expected)


def test_splits_share_one_mapped_file(drawn: Path, tmp_path: Path) -> None:
    train, validation = celeba.training_data(drawn, tmp_path, allow_missing=False, workers=1)
    assert len([path for path in tmp_path.iterdir() if path.stat().st_size]) == 1
    end = train.tensors["image"].data_ptr() + train.tensors["image"].nbytes
    assert validation.tensors["image"].data_ptr() == end


def test_limit_takes_the_first_of_the_training_split(drawn: Path, tmp_path: Path) -> None:
    whole, _ = celeba.training_data(drawn, tmp_path, allow_missing=False, workers=1)
    some, validation = celeba.training_data(drawn, tmp_path, limit=7, allow_missing=False, workers=1)
    assert len(validation) == 60
    assert torch.equal(some.tensors["image"], whole.tensors["image"][:7])
    assert torch.equal(some.tensors["attrs"], whole.tensors["attrs"][:7])


def test_batch_is_of_floats(drawn: Path, tmp_path: Path) -> None:
    train, _ = celeba.training_data(drawn, tmp_path, allow_missing=False, workers=1)
    batch, present = train.batch(torch.tensor([3, 1]))
    assert present is None
    assert torch.equal(batch["image"], train.tensors["image"][[3, 1]].float() / 255)
    assert batch["attrs"].tolist() == train.tensors["attrs"][[3, 1]].tolist()
    assert {tensor.dtype for tensor in batch.values()} == {torch.float32}


def test_columns_are_found_by_their_names(data_dir: Path) -> None:
    order = np.random.default_rng(2).permutation(40)
    shuffled = attribute_list([COLUMNS[column] for column in order], VALUES[:, order])
    before = celeba.find(data_dir)
    (data_dir / "celeba" / "list_attr_celeba.txt").write_text(shuffled)
    after = celeba.find(data_dir)
    for name in celeba.ATTRIBUTES:
        one, other = (faces.attributes[:, faces.columns.index(name)] for faces in (before, after))
        assert (one == other).all()


# The set as people have it: each of these changes its folder, and it is found all the same.


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


def in_two_folders(folder: Path) -> None:
    (folder / "img_align_celeba").rename(folder.parent / "img_align_celeba")


@pytest.mark.parametrize("marks", [None, with_byte_order_marks, in_utf_16])
@pytest.mark.parametrize("lists", [None, as_csv])
@pytest.mark.parametrize("layout", [None, nested, as_png, with_an_empty_folder_beside_the_zip, in_two_folders])
def test_set_is_found_as_people_have_it(
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
    assert_not_found(data_dir, images, "holds no pictures", "img_align_celeba.zip")


def test_images_of_other_names_are_named_and_no_flag_is_advised(data_dir: Path, images: Path) -> None:
    for number, path in enumerate(sorted(images.iterdir())):
        path.rename(images / f"face{number}.jpg")
    with pytest.raises(UserError, match=r"which has face0\.jpg, face1\.jpg and others, and not 000001\.jpg") as caught:
        celeba.find(data_dir)
    assert "allow_missing" not in str(caught.value)


def test_too_few_images_are_named_before_a_flag_is_advised(data_dir: Path, images: Path) -> None:
    for name in NAMES[:100]:
        (images / name).unlink()
    with pytest.raises(UserError, match="too few are left") as caught:
        celeba.find(data_dir)
    assert "allow_missing" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("list_attr_celeba.csv", "Bald,", "", "line 1: doesn't name the column Bald"),
        ("list_attr_celeba.csv", "000002.jpg,", "000002.jpg,7,", "line 3: 42 words"),
        ("list_eval_partition.csv", "000002.jpg,1", "000002.jpg,3", r"line 3 \(000002.jpg\): '3' where 0 or 1 or 2"),
    ],
)
def test_line_of_a_csv_that_is_wrong_is_named(data_dir: Path, name: str, old: str, new: str, said: str) -> None:
    as_csv(data_dir / "celeba")
    path = data_dir / "celeba" / name
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=f"{name}, {said}"):
        celeba.find(data_dir)


def test_lists_with_carriage_returns_are_read(data_dir: Path) -> None:
    for name in ("list_attr_celeba.txt", "list_eval_partition.txt"):
        path = data_dir / "celeba" / name
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert celeba.find(data_dir).counts == (60, 60, 60)


# Where it is found.


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


def test_zip_of_the_images_gives_what_the_folder_gives(drawn: Path, data_dir: Path, images: Path) -> None:
    with zipfile.ZipFile(images.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        for path in images.iterdir():
            archive.write(path, f"img_align_celeba/{path.name}")
    shutil.rmtree(images)
    of_zip = celeba.test_data(data_dir, data_dir / "cache", allow_missing=False, workers=1)
    of_folder = celeba.test_data(drawn, data_dir / "other", allow_missing=False, workers=1)
    assert torch.equal(of_zip.tensors["image"], of_folder.tensors["image"])
    assert not images.exists()


@pytest.mark.parametrize("name", ["img_align_celeba", "list_attr_celeba.txt", "list_eval_partition.txt"])
def test_what_is_missing_is_named_with_where_it_goes(data_dir: Path, name: str) -> None:
    path = data_dir / "celeba" / name
    path.rename(data_dir / "elsewhere")
    assert_not_found(data_dir, f"lacks {name}", "mmlab.ie.cuhk.edu.hk/projects/CelebA.html", data_dir / "celeba")


def test_empty_data_folder_lacks_all_three(tmp_path: Path) -> None:
    assert_not_found(tmp_path, "img_align_celeba.zip and list_attr_celeba.txt and list_eval_partition.txt")


# Missing images.


def test_missing_images_are_counted_and_refused(data_dir: Path, images: Path) -> None:
    for name in NAMES[:5]:
        (images / name).unlink()
    assert_not_found(data_dir, f"5 of the {N} images", images, "`allow_missing`")


def test_missing_images_may_be_allowed_and_are_told(
    data_dir: Path, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in NAMES[:5]:
        (images / name).unlink()
    test = celeba.test_data(data_dir, data_dir / "cache", allow_missing=True, workers=1)
    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert f"5 of the {N} images" in record.getMessage()
    rows = np.flatnonzero(PARTS == 2)[1:]
    assert torch.equal(test.tensors["image"], torch.stack([picture(images, int(row)) for row in rows]))


def test_too_few_images_are_refused_in_any_case(data_dir: Path, images: Path) -> None:
    for name, part in zip(NAMES, PARTS, strict=True):
        if part == 1:
            (images / name).unlink()
    said = "too few are left: 60 for train, 0 for validation, 60 for test"
    assert_not_found(data_dir, f"60 of the {N} images", said, allow_missing=True)


def test_check_says_what_is_there(drawn: Path) -> None:
    said = celeba.check(drawn)
    assert said.endswith("train 60 of 60 images, validation 60 of 60 images, test 60 of 60 images")
    assert str(drawn / "celeba" / "img_align_celeba") in said


# Lists that don't fit. Line 5 of the attributes and line 3 of the partition are of the third image.


def replace(old: str, new: str) -> Callable[[str], str]:
    def edit(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return edit


def in_row(name: str, edit: Callable[[str], str]) -> Callable[[str], str]:
    return lambda text: "".join(edit(row) if row.startswith(name) else row for row in text.splitlines(keepends=True))


THIRD = NAMES[2]
ATTRIBUTE_FAULTS = [
    (in_row(THIRD, lambda row: row.replace("\n", " 1\n")), "line 5: 42 words"),
    (in_row(THIRD, lambda row: row[:20] + "\n"), "line 5: 4 words"),
    (in_row(THIRD, lambda row: "\n"), "line 5: 0 words"),
    (in_row(THIRD, lambda row: row.replace(" -1", "  0", 1)), f"line 5 ({THIRD}): '0'"),
    (in_row(THIRD, lambda row: row.replace(" -1", " --1", 1)), f"line 5 ({THIRD}): '--1'"),
    (in_row(THIRD, lambda row: row.replace(" -1", " 11", 1)), f"line 5 ({THIRD}): '11'"),
    (in_row(THIRD, lambda row: row.replace(" -1", " \x00", 1)), "line 5"),
    (in_row(THIRD, lambda row: row.replace(" -1", " -", 1)), f"line 5 ({THIRD}): '-'"),
    (in_row(THIRD, lambda row: row.replace(" -1", " é", 1)), f"line 5 ({THIRD}): 'é'"),
    (in_row(THIRD, lambda row: row.replace(THIRD, NAMES[0])), f"line 5: names {NAMES[0]} a second time"),
    (in_row(THIRD, lambda row: ""), f"line 1: is '{N}' where the number of rows stands, and there are {N - 1}"),
    (replace(f"{N}\n", "many\n"), "line 1: is 'many'"),
    (replace("Male", "Mail"), "line 2: doesn't name the column Male"),
    (lambda text: "", "line 2"),
    (lambda text: text[: len(text) // 2], "line "),
]
PARTITION_FAULTS = [
    (replace(f"{THIRD} 2", f"{THIRD} 3"), f"line 3 ({THIRD}): '3' where 0 or 1 or 2"),
    (replace(f"{THIRD} 2", f"{THIRD}"), "line 3: 1 words"),
    (replace(f"{THIRD} 2\n", ""), f"line 3: names {NAMES[3]}"),
    (replace(f"{THIRD} 2", "other.jpg 2"), "line 3: names other.jpg"),
    (replace(f"{NAMES[-1]} 2\n", ""), f"line {N}: names no more"),
    (lambda text: text + "more.jpg 0\n", f"line {N + 1}: names more.jpg"),
    (lambda text: "", "line 1"),
]


@pytest.mark.parametrize(("edit", "said"), ATTRIBUTE_FAULTS)
def test_fault_in_the_list_of_attributes_is_named(data_dir: Path, edit: Callable[[str], str], said: str) -> None:
    path = data_dir / "celeba" / "list_attr_celeba.txt"
    path.write_text(edit(path.read_text()))
    assert_not_found(data_dir, path, said)


@pytest.mark.parametrize(("edit", "said"), PARTITION_FAULTS)
def test_fault_in_the_partition_is_named(data_dir: Path, edit: Callable[[str], str], said: str) -> None:
    path = data_dir / "celeba" / "list_eval_partition.txt"
    path.write_text(edit(path.read_text()))
    assert_not_found(data_dir, path, said)


def test_partition_that_leaves_a_split_empty_is_refused(data_dir: Path) -> None:
    path = data_dir / "celeba" / "list_eval_partition.txt"
    path.write_text(path.read_text().replace(" 1\n", " 0\n"))
    assert_not_found(data_dir, path, "120 for train, 0 for validation, 60 for test")


def test_damaged_image_is_named(data_dir: Path, images: Path) -> None:
    (images / THIRD).write_bytes((images / THIRD).read_bytes()[:-40])
    with pytest.raises(UserError, match=THIRD):
        celeba.test_data(data_dir, data_dir / "cache", allow_missing=False, workers=1)


# The flags, the script, and the real lists.


def test_script_names_the_flag_and_does_with_what_is_there(data_dir: Path, images: Path, tmp_path: Path) -> None:
    for name in NAMES[:5]:
        (images / name).unlink()
    env = environment(MVAE_DATA_DIR=str(data_dir), MVAE_CACHE_DIR=str(tmp_path / "cache"))
    done = run_warm("celeba/datasets.py", cwd=tmp_path, env=env)
    assert_refused(done, 1, f"5 of the {N} images", "--allow-missing")
    done = run_warm("celeba/datasets.py", "--allow-missing", "--workers", 1, cwd=tmp_path, env=env)
    assert done.returncode == 0
    assert len(done.stderr.splitlines()) == 1
    assert f"5 of the {N} images" in done.stderr
    assert "train 58 of 60 images, validation 58 of 60 images, test 59 of 60 images" in done.stdout
    assert f"decoding {N - 5} pictures" in done.stdout


def test_cache_folder_may_be_named_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for value in (None, "/elsewhere"):
        if value:
            monkeypatch.setenv("MVAE_CACHE_DIR", value)
        else:
            monkeypatch.delenv("MVAE_CACHE_DIR", raising=False)
        parser = argparse.ArgumentParser()
        add_flags(parser)
        args = parser.parse_args([])
        found.append(args.cache_dir)
        assert (args.allow_missing, args.workers) == (False, os.cpu_count())
    assert found == [Path("./data/cache"), Path("/elsewhere")]


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
