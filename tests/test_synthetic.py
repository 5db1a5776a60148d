"""The made digits and garments: what is drawn, what is written, and what is refused."""

import gzip
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mvae.synthetic import CHECKSUMS, GARMENTS, IDX_NAMES, bezier, digits, garments, main, write_idx


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
    assert main(["digits", str(folder), "--train", str(train), "--test", str(test), "--seed", str(seed)]) == 0
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
    assert main(["fashion", str(tmp_path), "--train", "30", "--test", "20", "--seed", "3"]) == 0
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
