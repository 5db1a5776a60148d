"""The synthetic digits, garments and faces: what is drawn, what is written, and what is refused."""

import gzip
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mvae.data.celeba import ATTRIBUTES
from mvae.errors import UsageError, UserError
from synthetic import __main__ as synthetic
from synthetic.__main__ import CHECKSUMS, IDX_NAMES, Draw, main
from synthetic.digits import digits
from synthetic.faces import DRAWN, HEIGHT, WIDTH, attributes, faces
from synthetic.fashion import garments

import cv2
import numpy as np
import pytest
from PIL import Image

from helpers import assert_ended, run_warm

SETS: dict[str, tuple[str, Draw]] = {"digits": ("MNIST", digits), "fashion": ("FashionMNIST", garments)}


def make(folder: Path, *, kind: str = "digits", train: int = 60, test: int = 20, seed: int = 0) -> dict[str, bytes]:
    """Write a small set; return its files."""
    main([kind, str(folder), "--train", str(train), "--test", str(test), "--seed", str(seed)])
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of each file below a folder, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Digits and garments as files


def test_the_command_writes_the_set(tmp_path: Path) -> None:
    command = tmp_path / "python -m synthetic"
    command.write_text("import runpy\nrunpy.run_module('synthetic', run_name='__main__')")
    done = run_warm(str(command), "digits", tmp_path / "new", "--train", 30, "--test", 20, "--seed", 3)
    assert_ended(done)
    assert "train 30, test 20" in done.stdout
    assert contents(tmp_path / "new") == make(tmp_path / "again", train=30, test=20, seed=3)


@pytest.mark.parametrize("kind", SETS)
def test_files_are_idx_files_of_what_is_drawn(kind: str, tmp_path: Path) -> None:
    files = make(tmp_path, kind=kind, train=300, test=20, seed=5)
    name, draw = SETS[kind]
    expected = {}
    for stream, (part, n, size) in enumerate((("train", 300, "0000012c"), ("t10k", 20, "00000014"))):
        images, labels = draw(n, np.random.default_rng([5, stream]))
        header = bytes.fromhex(f"00000803 {size} 0000001c 0000001c")
        expected[f"{part}-images-idx3-ubyte"] = header + images.tobytes()
        expected[f"{part}-labels-idx1-ubyte"] = bytes.fromhex(f"00000801 {size}") + labels.tobytes()
    assert set(files) == {f"{name}/raw/{file}" for file in (CHECKSUMS, *(f"{x}.gz" for x in IDX_NAMES))}
    for file, content in expected.items():
        assert gzip.decompress(files[f"{name}/raw/{file}.gz"]) == content
    lines = [f"{hashlib.md5(expected[file]).hexdigest()}  {file}" for file in IDX_NAMES]
    assert files[f"{name}/raw/{CHECKSUMS}"].decode().splitlines() == lines


def test_a_synthetic_set_is_replaced_even_if_it_is_incomplete(tmp_path: Path) -> None:
    whole = make(tmp_path, seed=1)
    make(tmp_path, seed=0)
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz").unlink()
    assert make(tmp_path, seed=1) == whole


def test_a_real_set_is_not_replaced(tmp_path: Path) -> None:
    real = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    real.parent.mkdir(parents=True)
    real.write_bytes(b"real")
    with pytest.raises(UserError, match=f"{CHECKSUMS}.*another folder"):
        make(tmp_path)
    assert list(contents(tmp_path).values()) == [b"real"]


def test_wrong_calls_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words, said in (
        ("digits new --train=0", "train must be an integer from 1"),
        ("faces new --val=-5", "val must be an integer from 1"),
        ("digits new --seed=-1", "seed must be an integer >= 0"),
        ("digits new --val=5", "--val applies to faces only"),
    ):
        with pytest.raises(UsageError, match=said):
            main(words.split())
    assert not list(tmp_path.iterdir())


# Digits and garments as pictures


@pytest.mark.parametrize(
    ("kind", "mean", "std", "accuracy"), [("digits", 0.1307, 0.3081, 0.8), ("fashion", 0.2860, 0.3530, 0.7)]
)
def test_pictures_are_like_those_of_the_real_sets(kind: str, mean: float, std: float, accuracy: float) -> None:
    images, labels = SETS[kind][1](2000, np.random.default_rng(0))
    assert (images.shape, images.dtype) == ((2000, 28, 28), np.uint8)
    assert set(np.bincount(labels)) == {200}
    assert np.mean(labels[1:] == labels[:-1]) == pytest.approx(0.1, abs=0.03)  # four standard errors
    pixels = images.reshape(-1, 784) / 255
    assert len(np.unique(pixels, axis=0)) == len(images)
    assert (pixels.mean(), pixels.std()) == pytest.approx((mean, std), abs=0.02)
    # The nearest mean of a class gets 0.82 on MNIST and 0.68 on FashionMNIST.
    means = np.stack([pixels[labels == label].mean(axis=0) for label in range(10)])
    test_images, test_labels = SETS[kind][1](1000, np.random.default_rng(1))
    distances = (means**2).sum(axis=1) - 2 * (test_images.reshape(-1, 784) / 255) @ means.T
    assert np.mean(distances.argmin(axis=1) == test_labels) > accuracy


# Faces


class Faces(NamedTuple):
    """500 faces, read from the files."""

    folder: Path
    names: list[str]
    images: np.ndarray
    """(n, HEIGHT, WIDTH, 3) uint8."""
    columns: list[str]
    values: np.ndarray
    """(n, 40) of 1 and -1."""
    landmarks: np.ndarray
    """(n, 68, 2) of (x, y)."""


def read_table(path: Path) -> tuple[list[str], list[str], np.ndarray]:
    """Read a list in CelebA's format: the images' names, the columns' names, the values. Its count must be right."""
    count, header, *rows = path.read_text().splitlines()
    assert int(count) == len(rows)
    words = [row.split() for row in rows]
    return [row[0] for row in words], header.split(), np.array([row[1:] for row in words], dtype=int)


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> Faces:
    folder = tmp_path_factory.mktemp("faces") / "celeba"
    main(["faces", str(folder.parent), "--train", "350", "--val", "100", "--test", "50"])
    names, columns, values = read_table(folder / "Anno" / "list_attr_celeba.txt")
    _, _, landmarks = read_table(folder / "Anno" / "list_landmarks_68.txt")
    files = sorted((folder / "img_align_celeba").iterdir())
    images = np.stack([np.asarray(Image.open(file)) for file in files])
    return Faces(folder, names, images, columns, values, landmarks.reshape(-1, 68, 2))


def test_faces_have_the_official_layout(met: Faces) -> None:
    assert met.names == [f"{i:06}.jpg" for i in range(1, 501)]
    assert sorted(path.name for path in (met.folder / "img_align_celeba").iterdir()) == met.names
    assert met.images.shape == (500, 218, 178, 3)
    rows = [row.split() for row in (met.folder / "Eval" / "list_eval_partition.txt").read_text().splitlines()]
    assert rows == [[name, split] for name, split in zip(met.names, "0" * 350 + "1" * 100 + "2" * 50, strict=True)]


def test_the_list_of_attributes_holds_the_drawn_ones_in_celebas_columns(met: Faces) -> None:
    assert len(met.columns) == 40
    assert DRAWN == ATTRIBUTES  # all that the experiments use
    columns = [met.columns.index(name) for name in DRAWN]
    assert columns == [4, 5, 8, 9, 11, 12, 15, 17, 18, 20, 21, 22, 26, 28, 31, 32, 33, 35]
    assert set(np.unique(met.values)) == {-1, 1}
    drawn = np.concatenate([attributes(n, np.random.default_rng([0, i])) for i, n in enumerate((350, 100, 50))])
    np.testing.assert_array_equal(met.values[:, columns], np.where(drawn, 1, -1))


def test_attributes_are_visible_in_the_faces(met: Faces) -> None:
    """Balanced accuracy on held-out faces of ridge regression on small pictures, for each attribute."""
    small = np.stack([cv2.resize(image, (30, 36), interpolation=cv2.INTER_AREA).ravel() for image in met.images]) / 255
    has = met.values[:, [met.columns.index(name) for name in DRAWN]] > 0
    train, test = small[:350] - small[:350].mean(axis=0), small[350:] - small[:350].mean(axis=0)
    target = has[:350] / has[:350].mean(axis=0) - (~has[:350]) / (~has[:350]).mean(axis=0)
    kernel = train @ train.T
    weights = np.linalg.solve(kernel + 10 * np.eye(350), target)

    def means(score: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        return (score * chosen).sum(axis=0) / chosen.sum(axis=0)

    fitted = kernel @ weights
    threshold = (means(fitted, has[:350]) + means(fitted, ~has[:350])) / 2
    predicted = test @ (train.T @ weights) > threshold
    accuracy = (means(predicted, has[350:]) + means(~predicted, ~has[350:])) / 2
    assert not {name: value for name, value in zip(DRAWN, accuracy, strict=True) if value < 0.55}
    assert accuracy.mean() > 0.8


def test_faces_are_in_celebas_aligned_frame(met: Faces) -> None:
    points = met.landmarks
    assert (points.min(axis=(0, 1)) >= 0).all()
    assert (points.max(axis=(0, 1)) < (WIDTH, HEIGHT)).all()
    right_eye, left_eye = points[:, 36:42].mean(axis=1), points[:, 42:48].mean(axis=1)
    np.testing.assert_allclose(right_eye.mean(axis=0), (69, 111), atol=1.5)
    np.testing.assert_allclose(left_eye.mean(axis=0), (108, 111), atol=1.5)
    np.testing.assert_allclose(points[:, [48, 54]].mean(axis=0), [(72, 152), (105, 152)], atol=3)
    assert (right_eye.std(axis=0) > 0.5).all()
    assert (right_eye.std(axis=0) < 4).all()


def test_landmarks_are_in_ibugs_order(met: Faces) -> None:
    x, y = np.moveaxis(met.landmarks, 2, 0)
    assert (np.diff(x[:, 2:15:2], axis=1) > 0).all()  # the jaw, from the image's left to its right
    assert (np.diff(x[:, 17:27], axis=1) > 0).all()  # the brows
    assert (y[:, 17:27].mean(axis=1) < y[:, 36:48].mean(axis=1)).all()
    assert (np.diff(y[:, 27:31], axis=1) > 0).all()  # the bridge of the nose
    assert (x[:, [36, 42]] < x[:, [39, 45]]).all()
    assert (y[:, [51, 62]] <= y[:, [57, 66]]).all()


def test_the_same_seed_gives_the_same_faces(tmp_path: Path) -> None:
    for folder, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        main(["faces", str(tmp_path / folder), "--train", "4", "--val", "2", "--test", "1", "--seed", seed])
    first, same, other = (contents(tmp_path / folder) for folder in "abc")
    assert len(first) == 10
    assert first == same
    assert all(first[name] != other[name] for name in first if name.endswith(".jpg"))


def test_faces_are_not_written_into_a_folder_that_exists(tmp_path: Path) -> None:
    (tmp_path / "celeba").mkdir()
    (tmp_path / "celeba" / "real.jpg").write_bytes(b"real")
    with pytest.raises(UserError, match=r"exists already.*another folder"):
        main(["faces", str(tmp_path)])
    assert [path.name for path in tmp_path.rglob("*")] == ["celeba", "real.jpg"]


def test_interrupted_faces_leave_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(rows: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield from faces(rows[:2], rng)
        raise UserError("no space left")

    monkeypatch.setattr(synthetic, "faces", full_disk)
    with pytest.raises(UserError, match="no space left"):
        main(["faces", str(tmp_path), "--train", "4"])
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "faces.abc.partial" / "Anno").mkdir(parents=True)
    synthetic.write_faces(tmp_path / "faces", (1, 1, 1), seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["faces"]
