"""Data sets: the IDX files and their download, the split, the order of batches, and MNIST's batches."""

import contextlib
import gzip
import hashlib
import http.server
import os
import shutil
import socketserver
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets as official

from mnist import datasets as mnist
from mvae.data import Data, consecutive_rows, permuted_rows, random_example, seed_of, split
from mvae.datasets import mnist as idx
from mvae.datasets.mnist import load_idx
from mvae.errors import UsageError, UserError
from mvae.synthetic.__main__ import CHECKSUMS, IDX_NAMES

from helpers import assert_ended, assert_refused, environment, run_warm


@pytest.fixture
def copied(digits_dir: Path, tmp_path: Path) -> Path:
    """The raw folder of a copy of the made digits, below the data folder tmp_path."""
    return Path(shutil.copytree(digits_dir / "MNIST", tmp_path / "MNIST")) / "raw"


def unpack(raw: Path) -> None:
    for name in IDX_NAMES:
        (raw / name).write_bytes(gzip.decompress((raw / f"{name}.gz").read_bytes()))
        (raw / f"{name}.gz").unlink()


def assert_damaged(raw: Path, name: str) -> None:
    """Loading fails with one line that names the file and says what to do."""
    with pytest.raises(UserError) as caught:
        load_idx(raw.parents[1], "MNIST", "train")
    message = str(caught.value)
    assert str(raw / name) in message
    assert "delete it" in message
    assert "\n" not in message


# The files.


def test_made_digits_are_read_by_the_loader(digits_dir: Path) -> None:
    images, labels = load_idx(digits_dir, "MNIST", "train")
    assert images.shape == (1200, 28, 28)
    assert labels.shape == (1200,)
    assert images.dtype == labels.dtype == torch.uint8
    assert labels.unique().tolist() == list(range(10))


def test_both_splits_are_read(digits_dir: Path) -> None:
    assert [len(load_idx(digits_dir, "MNIST", part)[0]) for part in ("train", "t10k")] == [1200, 300]


def test_unpacked_files_are_read_as_packed_ones(digits_dir: Path, copied: Path) -> None:
    unpack(copied)
    for part in ("train", "t10k"):
        for one, other in zip(
            load_idx(digits_dir, "MNIST", part), load_idx(copied.parents[1], "MNIST", part), strict=True
        ):
            assert torch.equal(one, other)


def test_reading_writes_nothing(copied: Path) -> None:
    def state() -> list[tuple[str, int]]:
        return sorted((str(path), path.stat().st_mtime_ns) for path in [copied.parent, copied, *copied.iterdir()])

    before = state()
    load_idx(copied.parents[1], "MNIST", "train")
    assert state() == before


def test_read_only_folder_is_read(copied: Path) -> None:
    copied.chmod(0o555)
    assert len(load_idx(copied.parents[1], "MNIST", "train")[0]) == 1200


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"])
def test_truncated_packed_file_is_refused(copied: Path, name: str, share: float) -> None:
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(content[: int(share * len(content))])
    assert_damaged(copied, name)


@pytest.mark.parametrize("at", [0, 3, 200, -6])
def test_packed_file_with_a_wrong_byte_is_refused(copied: Path, at: int) -> None:
    content = bytearray((copied / "train-images-idx3-ubyte.gz").read_bytes())
    content[at] ^= 255
    (copied / "train-images-idx3-ubyte.gz").write_bytes(content)
    assert_damaged(copied, "train-images-idx3-ubyte.gz")


def test_file_of_another_content_is_refused(copied: Path) -> None:
    name = "train-images-idx3-ubyte.gz"
    content = bytearray(gzip.decompress((copied / name).read_bytes()))
    content[-1] ^= 1
    (copied / name).write_bytes(gzip.compress(bytes(content)))
    assert_damaged(copied, name)


def test_truncated_unpacked_file_is_refused(copied: Path) -> None:
    unpack(copied)
    name = "train-images-idx3-ubyte"
    (copied / name).write_bytes((copied / name).read_bytes()[:-1])
    assert_damaged(copied, name)


def test_made_digits_without_their_checksums_are_refused(copied: Path) -> None:
    (copied / CHECKSUMS).unlink()
    assert_damaged(copied, "train-images-idx3-ubyte.gz")


def test_file_that_its_checksums_leave_out_is_refused(copied: Path) -> None:
    lines = (copied / CHECKSUMS).read_text().splitlines(keepends=True)
    (copied / CHECKSUMS).write_text("".join(line for line in lines if "train-images" not in line))
    assert_damaged(copied, "train-images-idx3-ubyte.gz")


def test_pictures_that_do_not_fit_their_labels_are_refused(copied: Path) -> None:
    shutil.copy(copied / "t10k-labels-idx1-ubyte.gz", copied / "train-labels-idx1-ubyte.gz")
    content = gzip.decompress((copied / "train-labels-idx1-ubyte.gz").read_bytes())
    with open(copied / CHECKSUMS, "a") as file:
        file.write(f"{hashlib.md5(content).hexdigest()}  train-labels-idx1-ubyte\n")
    with pytest.raises(UserError, match="1200 pictures of train don't fit 300 labels"):
        load_idx(copied.parents[1], "MNIST", "train")


# Files as others have them.


def idx_file(values: np.ndarray, kind: int = 8) -> bytes:
    """An IDX file of these values."""
    shape = np.array(values.shape, ">i4").tobytes()
    return bytes([0, 0, kind, values.ndim]) + shape + values.tobytes()


@pytest.mark.parametrize(
    "name", ["{}-{}.idx{}-ubyte", "{0}-{1}-idx{2}-ubyte/{0}-{1}-idx{2}-ubyte", "../{}-{}-idx{}-ubyte"]
)
@pytest.mark.parametrize("packed", [True, False])
def test_files_are_found_where_others_have_them(digits_dir: Path, copied: Path, name: str, packed: bool) -> None:
    for part, kind, rank in (("train", "images", 3), ("train", "labels", 1)):
        old = copied / f"{part}-{kind}-idx{rank}-ubyte.gz"
        content = old.read_bytes() if packed else gzip.decompress(old.read_bytes())
        new = copied / name.format(part, kind, rank)
        old.unlink()
        new.parent.mkdir(exist_ok=True)
        new.write_bytes(content)  # a packed one without .gz is known by what it holds
        if not (new.parent / CHECKSUMS).exists():
            shutil.copy(copied / CHECKSUMS, new.parent)
    assert torch.equal(load_idx(copied.parents[1], "MNIST", "train")[0], load_idx(digits_dir, "MNIST", "train")[0])


def test_name_of_a_packed_file_may_be_that_of_an_unpacked_one(digits_dir: Path, copied: Path) -> None:
    for name in IDX_NAMES:
        path = copied / f"{name}.gz"
        path.write_bytes(gzip.decompress(path.read_bytes()))
    assert torch.equal(load_idx(copied.parents[1], "MNIST", "train")[0], load_idx(digits_dir, "MNIST", "train")[0])


def test_good_file_beside_a_truncated_one_is_read(digits_dir: Path, copied: Path) -> None:
    for name in IDX_NAMES:
        path = copied / f"{name}.gz"
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(load_idx(copied.parents[1], "MNIST", "train")[0], load_idx(digits_dir, "MNIST", "train")[0])


@pytest.mark.parametrize("own_checksums", [True, False])
@pytest.mark.parametrize(
    ("images", "labels", "kind", "said"),
    [
        ((5, 28, 28), 26, 8, "labels up to 26, and the networks take ten classes, 0 to 9"),
        ((5, 32, 32), 9, 8, r"shape \(5, 32, 32\), and the networks take pictures of 28x28"),
        ((5, 784), 9, 8, r"shape \(5, 784\), and the networks take pictures of 28x28"),
        ((5, 28, 28, 3), 9, 8, r"shape \(5, 28, 28, 3\), and the networks take pictures of 28x28"),
        ((5, 28, 28), 9, 9, "values of type 0x9.*in bytes"),
    ],
)
def test_what_the_networks_do_not_take_is_named(
    tmp_path: Path, images: tuple[int, ...], labels: int, kind: int, said: str, own_checksums: bool
) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(idx_file(np.zeros(images, np.uint8), kind))
    (raw / "train-labels-idx1-ubyte").write_bytes(idx_file(np.full(5, labels, np.uint8)))
    if own_checksums:
        sums = [f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}\n" for path in raw.iterdir()]
        (raw / CHECKSUMS).write_text("".join(sums))
    with pytest.raises(UserError, match=said) as caught:
        load_idx(tmp_path, "MNIST", "train")
    assert "delete" not in str(caught.value)
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\0\0\x08", b"\0\0\x08\x03\0\0", b"label,pixel\n7,0\n", b"\0\0\x08\0", b"\0\0\x07\x01\0\0\0\1a"),
        idx_file(np.zeros((5, 28, 28), np.uint8))[:-1],
        idx_file(np.zeros((5, 28, 28), np.uint8)) + b"\0",
        b"\0\0\x08\x03" + b"\xff" * 12,
    ],
    ids=str,
)
def test_file_that_is_no_whole_idx_file_is_refused(copied: Path, content: bytes) -> None:
    (copied / "train-images-idx3-ubyte.gz").write_bytes(content)
    with open(copied / CHECKSUMS, "a") as file:
        file.write(f"{hashlib.md5(content).hexdigest()}  train-images-idx3-ubyte\n")
    assert_damaged(copied, "train-images-idx3-ubyte.gz")


def test_checksums_of_the_packed_files_do_as_well(copied: Path) -> None:
    lines = [f"{hashlib.md5(path.read_bytes()).hexdigest().upper()} *./{path.name}\n" for path in copied.glob("*.gz")]
    (copied / CHECKSUMS).write_text("".join(lines))
    assert len(load_idx(copied.parents[1], "MNIST", "train")[0]) == 1200


@pytest.mark.parametrize("line", ["train-images-idx3-ubyte", "a b c", "12  train-images-idx3-ubyte"])
def test_list_of_checksums_that_is_none_is_named(copied: Path, line: str) -> None:
    with open(copied / CHECKSUMS, "a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(UserError, match=rf"{CHECKSUMS}, line \d: 'MD5 NAME' is wanted"):
        load_idx(copied.parents[1], "MNIST", "train")


def test_set_without_pictures_is_refused(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    contents = {
        "images-idx3": idx_file(np.zeros((0, 28, 28), np.uint8)),
        "labels-idx1": idx_file(np.zeros(0, np.uint8)),
    }
    for name, content in contents.items():
        (raw / f"train-{name}-ubyte").write_bytes(content)
    sums = [f"{hashlib.md5(content).hexdigest()}  train-{name}-ubyte\n" for name, content in contents.items()]
    (raw / CHECKSUMS).write_text("".join(sums))
    with pytest.raises(UserError, match="0 pictures of train"):
        load_idx(tmp_path, "MNIST", "train")


# The download, from a server on this machine.


@contextlib.contextmanager
def mirror(handler: Any) -> Iterator[str]:
    """Serves on a free port of this machine; gives the address."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


class Files(http.server.SimpleHTTPRequestHandler):
    """Serves the files of a folder, without a log."""

    def log_message(self, *arguments: Any) -> None:
        pass


class Garbage(socketserver.BaseRequestHandler):
    """Answers what is no HTTP."""

    def handle(self) -> None:
        self.request.recv(1000)
        self.request.sendall(b"garbage\r\n\r\n")


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def official_is(raw: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the packed files in `raw` the official MNIST, to be had at `address`."""
    packed = {f"{name}.gz": (raw / f"{name}.gz").read_bytes() for name in IDX_NAMES}
    resources = [(name, hashlib.md5(content).hexdigest()) for name, content in packed.items()]
    monkeypatch.setattr(official.MNIST, "mirrors", [address])
    monkeypatch.setattr(official.MNIST, "resources", resources)
    sums = {name[:-3]: hashlib.md5(gzip.decompress(content)).hexdigest() for name, content in packed.items()}
    monkeypatch.setitem(idx.CONTENT_MD5, "MNIST", sums)


@pytest.mark.usefixtures("no_proxy")
def test_absent_files_are_downloaded(digits_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = digits_dir / "MNIST" / "raw"
    with mirror(partial(Files, directory=str(raw))) as address:
        official_is(raw, address, monkeypatch)
        images, _ = load_idx(tmp_path / "new", "MNIST", "train")
    assert torch.equal(images, load_idx(digits_dir, "MNIST", "train")[0])
    downloaded = {"train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"}
    assert set(os.listdir(tmp_path / "new" / "MNIST" / "raw")) == downloaded


@pytest.mark.usefixtures("no_proxy")
def test_next_mirror_is_tried(digits_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = digits_dir / "MNIST" / "raw"
    with mirror(Garbage) as broken, mirror(partial(Files, directory=str(raw))) as address:
        official_is(raw, address, monkeypatch)
        monkeypatch.setattr(official.MNIST, "mirrors", [address + "no/such/folder/", broken, address])
        assert len(load_idx(tmp_path, "MNIST", "t10k")[0]) == 300


@pytest.mark.usefixtures("no_proxy")
def test_download_of_another_content_is_refused(
    digits_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = digits_dir / "MNIST" / "raw"
    with mirror(partial(Files, directory=str(raw))) as address:
        monkeypatch.setattr(official.MNIST, "mirrors", [address])
        with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz.*can't be downloaded.*`data_dir`"):
            load_idx(tmp_path, "MNIST", "train")
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("no_proxy")
def test_mirror_that_speaks_no_http_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mirror(Garbage) as address:
        monkeypatch.setattr(official.MNIST, "mirrors", [address])
        with pytest.raises(UserError, match="can't be downloaded"):
            load_idx(tmp_path, "MNIST", "train")


def test_mirror_that_is_away_is_told_in_plain_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(official.MNIST, "mirrors", [(tmp_path / "away").as_uri() + "/"])
    with pytest.raises(UserError, match=r"can't be downloaded \([^<>]*No such file or directory[^<>]*\): put them"):
        load_idx(tmp_path, "MNIST", "train")


def test_absent_files_in_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz.*file/MNIST/raw.*`data_dir`"):
        load_idx(tmp_path / "file", "MNIST", "train")


def test_without_network_and_data_the_files_wanted_are_named(tmp_path: Path) -> None:
    closed = "http://127.0.0.1:9"  # the discard port, which nothing serves
    env = environment(http_proxy=closed, https_proxy=closed, no_proxy="")
    done = run_warm("mnist/datasets.py", "--data-dir", tmp_path, cwd=tmp_path, env=env)
    wanted = ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", tmp_path / "MNIST" / "raw", "--data-dir"]
    assert_refused(done, 1, *wanted)


def test_command_says_that_the_set_is_complete(digits_dir: Path) -> None:
    done = run_warm("mnist/datasets.py", "--data-dir", digits_dir)
    assert_ended(done)
    assert f"{digits_dir} is complete: 1200 training and 300 test examples" in done.stdout


# Real MNIST.


def test_real_mnist_is_read(mnist_dir: Path) -> None:
    images, labels = load_idx(mnist_dir, "MNIST", "train")
    test_images, test_labels = load_idx(mnist_dir, "MNIST", "t10k")
    assert (len(images), len(test_images)) == (60000, 10000)
    assert labels[:3].tolist() == [5, 0, 4]
    assert test_labels[:3].tolist() == [7, 2, 1]
    assert images.float().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)


# What the experiment makes of them.


def test_mnist_batch_is_grey_in_0_to_1_with_its_label(digits_dir: Path) -> None:
    images, labels = load_idx(digits_dir, "MNIST", "train")
    train, _ = mnist.training_data(digits_dir, n_val=200)
    batch, present = train.batch(torch.tensor([3, 1]))
    assert torch.equal(batch["image"], images[[3, 1]].unsqueeze(1) / 255)
    assert torch.equal(batch["text"], labels[[3, 1]].long())
    assert present is None


def test_binarized_training_pictures_are_drawn_afresh(digits_dir: Path) -> None:
    grey, _ = mnist.training_data(digits_dir, n_val=200)
    train, _ = mnist.training_data(digits_dir, n_val=200, binarize=True)
    rows = torch.arange(10)
    torch.manual_seed(0)
    draws = torch.stack([train.batch(rows)[0]["image"] for _ in range(200)])
    assert draws.unique().tolist() == [0, 1]
    assert (draws.mean(dim=0) - grey.batch(rows)[0]["image"]).abs().max() < 5 * 0.5 / 200**0.5  # five standard errors


@pytest.mark.parametrize("which", ["validation", "test"])
def test_binarized_held_out_pictures_are_drawn_once(digits_dir: Path, which: str) -> None:
    def images() -> torch.Tensor:
        validation = mnist.training_data(digits_dir, n_val=200, binarize=True)[1]
        held_out = validation if which == "validation" else mnist.test_data(digits_dir, binarize=True)
        return held_out.batch(torch.arange(len(held_out)))[0]["image"]

    assert images().unique().tolist() == [0, 1]
    assert torch.equal(images(), images())


# Data, its split and the order of batches.


def numbers(n: int, **fields: Any) -> Data:
    """n examples, each its own number."""
    return Data(tensors={"x": torch.arange(n)}, **fields)


def test_validation_is_the_end_of_the_training_split() -> None:
    train, validation = split(numbers(10), n_val=3, limit=None)
    assert train.tensors["x"].tolist() == list(range(7))
    assert validation.tensors["x"].tolist() == [7, 8, 9]


def test_limit_takes_the_first_examples_and_leaves_the_validation() -> None:
    train, validation = split(numbers(10), n_val=3, limit=2)
    assert train.tensors["x"].tolist() == [0, 1]
    assert validation.tensors["x"].tolist() == [7, 8, 9]


def test_limit_never_reaches_into_the_validation() -> None:
    train, _ = split(numbers(10), n_val=3, limit=9)
    assert train.tensors["x"].tolist() == list(range(7))


@pytest.mark.parametrize("n_val", [0, 10, 11])
def test_split_that_leaves_nothing_is_a_wrong_call(n_val: int) -> None:
    with pytest.raises(UsageError, match=f"`n_val` {n_val} .*10") as caught:
        split(numbers(10), n_val=n_val, limit=None)
    assert caught.value.status == 2


def test_data_keeps_presence_beside_its_examples() -> None:
    stored = numbers(6, present={"x": torch.tensor([True, False, True, True, False, False])})
    batch, present = stored[2:].batch(torch.tensor([2, 1]))
    assert batch["x"].tolist() == [4, 3]
    assert present is not None
    assert present["x"].tolist() == [False, True]


def test_data_keeps_its_transform_when_sliced() -> None:
    stored = numbers(6, transform=lambda rows: {"x": rows["x"] * 10})
    assert stored[2:].to(torch.device("cpu")).batch(torch.tensor([0]))[0]["x"].tolist() == [20]


def test_checksum_tells_all_that_is_stored() -> None:
    """Of more examples than it reads at once; a change of one value, or of how the same bytes are read."""
    x, here = torch.zeros(5000, 4, dtype=torch.uint8), torch.ones(5000, dtype=torch.bool)
    last = x.clone()
    last[-1, -1] = 1
    present = {"x": here}
    stored: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]] = [
        ({"x": x}, None),
        ({"x": last}, None),
        ({"y": x}, None),
        ({"x": x.view(5000, 2, 2)}, None),
        ({"x": x.view(torch.int8)}, None),
        ({"x": x}, present),
        ({"x": x}, {"x": here.logical_not()}),
    ]
    found = [Data(tensors=tensors, present=masks).checksum() for tensors, masks in stored]
    assert len(set(found)) == len(stored)
    assert Data(tensors={"x": x.clone()}).checksum() == found[0]


def test_random_example_is_one_of_those_allowed() -> None:
    allowed = torch.tensor([False, True, False, True, True])
    found = {random_example(numbers(5), allowed, "it")["x"].item() for _ in range(100)}
    assert found == {1, 3, 4}


def test_no_example_to_choose_from_is_one_error() -> None:
    with pytest.raises(UserError, match="none of the 5 held-out examples shows a 7"):
        random_example(numbers(5), torch.zeros(5, dtype=torch.bool), "a 7")


def test_epoch_takes_every_example_once() -> None:
    rows = torch.cat(permuted_rows(numbers(12), 4, seed=0))
    assert rows.sort().values.tolist() == list(range(12))
    assert rows.tolist() != list(range(12))


def test_incomplete_last_batch_is_dropped() -> None:
    assert [len(rows) for rows in permuted_rows(numbers(11), 4, seed=0)] == [4, 4]


def test_another_epoch_drops_other_examples() -> None:
    seen = [frozenset(torch.cat(permuted_rows(numbers(11), 4, seed)).tolist()) for seed in range(20)]
    assert len(set(seen)) > 10
    assert frozenset.union(*seen) == set(range(11))


def test_fewer_examples_than_a_batch_are_one_batch() -> None:
    assert [len(rows) for rows in permuted_rows(numbers(3), 4, seed=0)] == [3]


def test_order_is_decided_by_the_seed_alone() -> None:
    first = permuted_rows(numbers(12), 4, seed=5)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, permuted_rows(numbers(12), 4, seed=5), strict=True))
    assert not torch.equal(first[0], permuted_rows(numbers(12), 4, seed=6)[0])


def test_consecutive_rows_are_all_rows() -> None:
    assert [rows.tolist() for rows in consecutive_rows(numbers(5), 2)] == [[0, 1], [2, 3], [4]]


def test_seed_is_a_function_of_the_numbers() -> None:
    assert seed_of(3, 1, 4) == seed_of(3, 1, 4)


def test_seeds_of_different_numbers_differ() -> None:
    grid: list[tuple[int, ...]] = [(a, b, c, d) for a in range(5) for b in range(5) for c in range(5) for d in range(5)]
    grid += [(1, 23), (12, 3), (123,), (1, 2, 3), (1, 23, 0)]
    assert len({seed_of(*some) for some in grid}) == len(grid)


def test_seed_fits_torch_and_numpy() -> None:
    seeds = [seed_of(7, i) for i in range(100)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.manual_seed(max(seeds))
    np.random.default_rng(max(seeds))
