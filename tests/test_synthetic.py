"""The made digits, garments and faces: what is drawn, what is written, and what is refused."""

import functools
import gzip
import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
from PIL import Image

from mvae.errors import UsageError
from mvae.synthetic import __main__ as synthetic
from mvae.synthetic.__main__ import CHECKSUMS, IDX_NAMES, main, write_idx
from mvae.synthetic.digits import digits
from mvae.synthetic.faces import DRAWN, HEIGHT, WIDTH, attributes
from mvae.synthetic.fashion import GARMENTS, bezier, garments


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs `python -m mvae.synthetic` as a process."""
    command = [sys.executable, "-m", "mvae.synthetic", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def assert_refused(done: subprocess.CompletedProcess[str], *said: str) -> None:
    """The process ended with status 2 and one line on stderr, which has all of `said` in it."""
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert all(word in done.stderr for word in said)


def make(folder: Path, *, train: int = 60, test: int = 20, seed: int = 0) -> dict[str, bytes]:
    """Writes a small set; returns the content of each file in its raw folder, by name."""
    main(["digits", str(folder), "--train", str(train), "--test", str(test), "--seed", str(seed)])
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "MNIST" / "raw").iterdir()}


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """4,000 made digits: images in [0, 255], labels."""
    return digits(4000, np.random.default_rng(0))


def test_command_writes_the_set(tmp_path: Path) -> None:
    done = run("digits", tmp_path / "new", "--train", "30", "--test", "20", "--seed", "3")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "30 + 20 made digits" in done.stdout
    assert contents(tmp_path / "new") == make(tmp_path / "again", train=30, test=20, seed=3)


def test_folder_holds_nothing_but_the_set(tmp_path: Path) -> None:
    assert set(make(tmp_path)) == {CHECKSUMS, *(f"{name}.gz" for name in IDX_NAMES)}


def test_other_seed_gives_other_images(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a", seed=0), make(tmp_path / "b", seed=1)
    assert all(first[name] != second[name] for name in first)


def test_train_and_test_images_differ(tmp_path: Path) -> None:
    files = make(tmp_path, train=50, test=50)
    assert files["train-images-idx3-ubyte.gz"] != files["t10k-images-idx3-ubyte.gz"]


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("train-images-idx3-ubyte", "00000803 0000012c 0000001c 0000001c"),
        ("train-labels-idx1-ubyte", "00000801 0000012c"),
        ("t10k-images-idx3-ubyte", "00000803 00000014 0000001c 0000001c"),
        ("t10k-labels-idx1-ubyte", "00000801 00000014"),
    ],
)
def test_idx_header(tmp_path: Path, name: str, header: str) -> None:
    content = gzip.decompress(make(tmp_path, train=300, test=20)[f"{name}.gz"])
    expected = bytes.fromhex(header)
    assert content.startswith(expected)
    sizes = np.frombuffer(expected, dtype=">u4")[1:]
    assert len(content) == len(expected) + sizes.prod()


def test_files_hold_what_is_drawn(tmp_path: Path) -> None:
    files = make(tmp_path, test=40, seed=5)
    images, labels = digits(40, np.random.default_rng([5, 1]))
    assert gzip.decompress(files["t10k-images-idx3-ubyte.gz"])[16:] == images.tobytes()
    assert gzip.decompress(files["t10k-labels-idx1-ubyte.gz"])[8:] == labels.tobytes()


def test_checksums_are_of_the_uncompressed_files(tmp_path: Path) -> None:
    files = make(tmp_path)
    lines = [f"{hashlib.md5(gzip.decompress(files[f'{name}.gz'])).hexdigest()}  {name}" for name in IDX_NAMES]
    assert files[CHECKSUMS].decode().splitlines() == lines


def test_write_idx_takes_only_bytes(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="float64"):
        write_idx(tmp_path / "a.gz", np.zeros(3))


def test_rewrites_its_own_set(tmp_path: Path) -> None:
    first = make(tmp_path, seed=0)
    make(tmp_path, seed=1)
    assert make(tmp_path, seed=0) == first


def test_rewrites_its_own_set_that_was_cut_short(tmp_path: Path) -> None:
    whole = make(tmp_path)
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz").unlink()
    assert make(tmp_path) == whole


@pytest.mark.parametrize("name", ["t10k-labels-idx1-ubyte.gz", "train-images-idx3-ubyte"])
def test_refuses_to_overwrite_a_set_that_is_not_made(tmp_path: Path, name: str) -> None:
    real = tmp_path / "MNIST" / "raw" / name
    real.parent.mkdir(parents=True)
    real.write_bytes(b"real")
    assert_refused(run("digits", tmp_path), CHECKSUMS, "another folder")
    assert contents(tmp_path) == {name: b"real"}


def test_refuses_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert_refused(run("digits", tmp_path / "file"), "cannot write in", "file")


@pytest.mark.parametrize(
    ("option", "value"), [("--train", "0"), ("--test", "-5"), ("--train", "many"), ("--seed", "-1")]
)
def test_refuses_a_wrong_number(tmp_path: Path, option: str, value: str) -> None:
    assert_refused(run("digits", tmp_path / "new", f"{option}={value}"), option, "whole number", repr(value))
    assert not (tmp_path / "new").exists()


def test_refuses_a_call_without_a_folder() -> None:
    assert_refused(run("digits"), "DIR", "-h")


def test_classes_are_balanced() -> None:
    _, labels = digits(1003, np.random.default_rng(0))
    counts = np.bincount(labels)
    assert len(counts) == 10
    assert set(counts) == {100, 101}


def test_labels_are_in_random_order(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    _, labels = drawn
    assert np.mean(labels[1:] == labels[:-1]) == pytest.approx(0.1, abs=0.02)  # four standard errors


def test_images_are_white_on_black_and_off_the_border(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    images, _ = drawn
    assert images.shape == (4000, 28, 28)
    assert images.dtype == np.uint8
    assert images.max(axis=(1, 2)).min() > 200
    border = np.ones((28, 28), dtype=bool)
    border[1:-1, 1:-1] = False
    assert images[:, border].max() < 64


def test_pixel_statistics_are_near_mnists(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    pixels = drawn[0] / 255
    assert pixels.mean() == pytest.approx(0.1307, abs=0.02)  # MNIST's training set
    assert pixels.std() == pytest.approx(0.3081, abs=0.02)


def test_classes_are_learnable(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = drawn
    means = np.stack([images[labels == digit].reshape(-1, 784).mean(axis=0) for digit in range(10)]) / 255
    test_images, test_labels = digits(2000, np.random.default_rng(1))
    distances = (means**2).sum(axis=1) - 2 * (test_images.reshape(-1, 784) / 255) @ means.T
    assert np.mean(distances.argmin(axis=1) == test_labels) > 0.8  # the nearest mean gets 0.82 on MNIST


def test_digits_of_a_class_vary(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = drawn
    assert len(np.unique(images.reshape(-1, 784), axis=0)) == len(images)
    pixels = images / 255
    within = sum(pixels[labels == digit].var(axis=0).sum() for digit in range(10)) / 10
    assert within / pixels.var(axis=0).sum() > 0.5  # the share of the variance that the class leaves unexplained


@pytest.fixture(scope="module")
def worn() -> tuple[np.ndarray, np.ndarray]:
    """2,000 made garments: images in [0, 255], labels."""
    return garments(2000, np.random.default_rng(0))


def test_fashion_writes_garments_in_the_layout_of_fashionmnist(tmp_path: Path) -> None:
    main(["fashion", str(tmp_path), "--train", "30", "--test", "20", "--seed", "3"])
    raw = tmp_path / "FashionMNIST" / "raw"
    assert {path.name for path in raw.iterdir()} == {CHECKSUMS, *(f"{name}.gz" for name in IDX_NAMES)}
    for stream, (part, n) in enumerate((("train", 30), ("t10k", 20))):
        images, labels = garments(n, np.random.default_rng([3, stream]))
        assert gzip.decompress((raw / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:] == images.tobytes()
        assert gzip.decompress((raw / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:] == labels.tobytes()


@pytest.mark.parametrize("kind", GARMENTS)
def test_forms_of_a_garment_correspond_point_by_point(kind: int) -> None:
    outlines = {tuple((part.split()[0], len(part.split())) for part in form.split("|")) for form in GARMENTS[kind]}
    assert len(outlines) == 1


def test_bezier_goes_from_the_first_point_to_the_last() -> None:
    points = np.random.default_rng(0).normal(size=(3, 4, 2))
    curve = bezier(points)
    np.testing.assert_allclose(curve[:, [0, -1]], points[:, [0, -1]])
    np.testing.assert_allclose(curve[:, 4], points.transpose(0, 2, 1) @ [1 / 8, 3 / 8, 3 / 8, 1 / 8])


def test_garments_are_balanced_and_no_two_alike(worn: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = worn
    assert (images.shape, images.dtype) == ((2000, 28, 28), np.uint8)
    assert set(np.bincount(labels)) == {200}
    assert len(np.unique(images.reshape(-1, 784), axis=0)) == len(images)


def test_pixel_statistics_are_near_fashionmnists(worn: tuple[np.ndarray, np.ndarray]) -> None:
    pixels = worn[0] / 255
    assert pixels.mean() == pytest.approx(0.2860, abs=0.02)  # FashionMNIST's training set
    assert pixels.std() == pytest.approx(0.3530, abs=0.02)


def test_kinds_of_garments_are_learnable(worn: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = worn
    means = np.stack([images[labels == kind].reshape(-1, 784).mean(axis=0) for kind in range(10)]) / 255
    test_images, test_labels = garments(1000, np.random.default_rng(1))
    distances = (means**2).sum(axis=1) - 2 * (test_images.reshape(-1, 784) / 255) @ means.T
    assert np.mean(distances.argmin(axis=1) == test_labels) > 0.7  # the nearest mean gets 0.68 on FashionMNIST


class Faces(NamedTuple):
    """Made faces as they stand on the disk."""

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
    """A list of CelebA's: the images' names, the columns' names, the values. Its count has to fit."""
    count, header, *rows = path.read_text().splitlines()
    assert int(count) == len(rows)
    words = [row.split() for row in rows]
    return [row[0] for row in words], header.split(), np.array([row[1:] for row in words], dtype=int)


def make_faces(folder: Path, *, seed: int = 0) -> dict[str, bytes]:
    """Writes seven faces; returns the content of each file, by its path."""
    arguments = ["faces", str(folder), "--train", "4", "--val", "2", "--test", "1", "--seed", str(seed)]
    main(arguments)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> Faces:
    """1,000 made faces."""
    folder = tmp_path_factory.mktemp("faces") / "celeba"
    main(["faces", str(folder.parent), "--train", "700", "--val", "200", "--test", "100"])
    names, columns, values = read_table(folder / "Anno" / "list_attr_celeba.txt")
    _, _, landmarks = read_table(folder / "Anno" / "list_landmarks_68.txt")
    files = sorted((folder / "img_align_celeba").iterdir())
    images = np.stack([np.asarray(Image.open(file)) for file in files])
    return Faces(folder, names, images, columns, values, landmarks.reshape(-1, 68, 2))


def test_faces_stand_in_the_official_layout(met: Faces) -> None:
    assert met.names == [f"{i:06}.jpg" for i in range(1, 1001)]
    assert sorted(path.name for path in (met.folder / "img_align_celeba").iterdir()) == met.names
    assert met.images.shape == (1000, 218, 178, 3)


def test_partition_of_the_faces(met: Faces) -> None:
    rows = [row.split() for row in (met.folder / "Eval" / "list_eval_partition.txt").read_text().splitlines()]
    assert [name for name, _ in rows] == met.names
    assert [split for _, split in rows] == ["0"] * 700 + ["1"] * 200 + ["2"] * 100


def test_drawn_attributes_stand_in_celebas_columns(met: Faces) -> None:
    assert len(met.columns) == 40
    assert [met.columns.index(name) for name in DRAWN] == [
        *(4, 5, 8, 9, 11, 12, 15, 17, 18, 20, 21, 22, 26, 28, 31, 32, 33, 35)
    ]
    assert set(np.unique(met.values)) == {-1, 1}


def test_faces_lists_hold_what_is_drawn(met: Faces) -> None:
    drawn = np.concatenate([attributes(n, np.random.default_rng([0, i])) for i, n in enumerate((700, 200, 100))])
    np.testing.assert_array_equal(met.values[:, [met.columns.index(name) for name in DRAWN]], np.where(drawn, 1, -1))


def test_attributes_of_the_faces_go_together() -> None:
    drawn = attributes(20_000, np.random.default_rng(0))
    has = dict(zip(DRAWN, drawn.T, strict=True))
    assert drawn.mean(axis=0).min() > 0.04
    colours = sum(has[f"{colour}_Hair"].astype(int) for colour in ("Black", "Blond", "Brown", "Gray"))
    assert set(np.unique(colours)) == {0, 1}
    assert not colours[has["Bald"]].any()
    for name in ("Bangs", "Receding_Hairline", "Straight_Hair", "Wavy_Hair"):
        assert not (has[name] & (has["Bald"] | has["Wearing_Hat"])).any()
    assert not (has["Straight_Hair"] & has["Wavy_Hair"]).any()
    assert has["Male"][has["Mustache"]].mean() > 0.9
    assert has["Male"][has["Heavy_Makeup"]].mean() < 0.1


def test_attributes_can_be_seen_in_the_faces(met: Faces) -> None:
    """Balanced accuracy on held-out faces of ridge regression on small pictures, for each attribute."""
    small = np.stack([cv2.resize(image, (30, 36), interpolation=cv2.INTER_AREA).ravel() for image in met.images]) / 255
    has = met.values[:, [met.columns.index(name) for name in DRAWN]] > 0
    train, test = small[:700] - small[:700].mean(axis=0), small[700:] - small[:700].mean(axis=0)
    target = has[:700] / has[:700].mean(axis=0) - (~has[:700]) / (~has[:700]).mean(axis=0)
    kernel = train @ train.T
    weights = np.linalg.solve(kernel + 10 * np.eye(700), target)

    def means(score: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        return (score * chosen).sum(axis=0) / chosen.sum(axis=0)

    fitted = kernel @ weights
    threshold = (means(fitted, has[:700]) + means(fitted, ~has[:700])) / 2
    said = test @ (train.T @ weights) > threshold
    accuracy = (means(said, has[700:]) + means(~said, ~has[700:])) / 2
    assert not {name: value for name, value in zip(DRAWN, accuracy, strict=True) if value < 0.6}
    assert accuracy.mean() > 0.85


def test_faces_stand_in_celebas_aligned_frame(met: Faces) -> None:
    points = met.landmarks
    assert (points.min(axis=(0, 1)) >= 0).all()
    assert (points.max(axis=(0, 1)) < (WIDTH, HEIGHT)).all()
    right_eye, left_eye = points[:, 36:42].mean(axis=1), points[:, 42:48].mean(axis=1)
    corners = points[:, [48, 54]].mean(axis=0)
    np.testing.assert_allclose(right_eye.mean(axis=0), (69, 111), atol=1.5)
    np.testing.assert_allclose(left_eye.mean(axis=0), (108, 111), atol=1.5)
    np.testing.assert_allclose(corners, [(72, 152), (105, 152)], atol=3)
    assert (right_eye.std(axis=0) > 0.5).all()
    assert (right_eye.std(axis=0) < 4).all()


def test_landmarks_are_in_their_order(met: Faces) -> None:
    x, y = np.moveaxis(met.landmarks, 2, 0)
    assert (np.diff(x[:, 2:15:2], axis=1) > 0).all()  # the jaw, from the image's left to its right
    assert (y[:, 8] == y[:, :17].max(axis=1)).mean() > 0.5  # its middle is the chin
    assert (np.diff(x[:, 17:27], axis=1) > 0).all()  # the brows
    assert (y[:, 17:27].mean(axis=1) < y[:, 36:48].mean(axis=1)).all()
    assert (np.diff(y[:, 27:31], axis=1) > 0).all()  # the bridge of the nose
    assert (x[:, [36, 42]] < x[:, [39, 45]]).all()
    assert (y[:, [37, 38, 43, 44]].mean(axis=1) < y[:, [40, 41, 46, 47]].mean(axis=1)).all()
    assert (y[:, 51] < y[:, 57]).all()
    assert (y[:, 62] <= y[:, 66]).all()


def test_pupils_are_darker_than_cheeks(met: Faces) -> None:
    near = np.arange(-3, 4)
    for eye in (slice(36, 42), slice(42, 48)):
        x, y = met.landmarks[:, eye].mean(axis=1).round().astype(int).T[:, :, None, None]
        faces, down, across = np.arange(len(x))[:, None, None], near[:, None], near
        pupil = met.images[faces, y + down, x + across].mean(axis=3).min(axis=(1, 2))
        cheek = met.images[faces, y + 24 + down, x + across].mean(axis=(1, 2, 3))
        assert (pupil < cheek / 2).mean() > 0.97


def test_open_mouths_are_open(met: Faces) -> None:
    gap = met.landmarks[:, 66, 1] - met.landmarks[:, 62, 1]
    opened = met.values[:, met.columns.index("Mouth_Slightly_Open")] > 0
    assert gap[opened].min() > gap[~opened].max()


def test_same_seed_gives_the_same_faces(tmp_path: Path) -> None:
    first = make_faces(tmp_path / "a")
    assert len(first) == 10
    assert first == make_faces(tmp_path / "b")
    other = make_faces(tmp_path / "c", seed=1)
    assert all(first[name] != other[name] for name in first if name.endswith(".jpg"))


def test_faces_command_refuses_a_folder_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "celeba").mkdir()
    (tmp_path / "celeba" / "real.jpg").write_bytes(b"real")
    assert_refused(run("faces", tmp_path), "is there already", "another folder")
    assert [path.name for path in tmp_path.rglob("*")] == ["celeba", "real.jpg"]


def test_faces_command_refuses_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert_refused(run("faces", tmp_path / "file"), "cannot write in", "file")


def test_faces_that_are_cut_short_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(
        faces: Callable, rows: np.ndarray, rng: np.random.Generator
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield from faces(rows[:2], rng)
        raise OSError("no space left")

    monkeypatch.setattr(synthetic, "faces", functools.partial(full_disk, synthetic.faces))
    with pytest.raises(UsageError, match="no space left"):
        main(["faces", str(tmp_path), "--train", "4"])
    assert list(tmp_path.iterdir()) == []


def test_drawing_does_without_torch() -> None:
    code = "import sys, mvae.synthetic.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
