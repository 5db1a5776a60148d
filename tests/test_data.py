"""Data sets: the IDX files and their download, atomic files and locks, Data, its split and the order of batches."""

import contextlib
import errno
import fcntl
import gzip
import hashlib
import http.server
import itertools
import multiprocessing
import os
import shutil
import signal
import socketserver
import threading
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from mnist import datasets as mnist
from mvae.data import mnist as idx
from mvae.data.dataset import Data, consecutive_rows, permuted_rows, random_example, seed_of, split
from mvae.data.mnist import load_idx
from mvae.errors import UsageError, UserError
from mvae.files import locked, whole, write_atomically
from synthetic.__main__ import CHECKSUMS, IDX_NAMES

import numpy as np
import pytest
import torch

from helpers import assert_ended, assert_refused, environment, run_warm

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.fixture
def copied(digits_dir: Path, tmp_path: Path) -> Path:
    """The raw folder of a copy of the synthetic digits, in the data folder tmp_path."""
    return Path(shutil.copytree(digits_dir / "MNIST", tmp_path / "MNIST")) / "raw"


def assert_damaged(raw: Path, remedy: str) -> None:
    with pytest.raises(UserError, match=rf"^{raw / IMAGES}\.gz is damaged.*checksum is wrong; {remedy}[^\n]*$"):
        images_of(raw.parents[1])


def images_of(data_dir: Path) -> torch.Tensor:
    return load_idx(data_dir, "MNIST", "train")[0]


# The files


def test_synthetic_digits_are_read(digits_dir: Path) -> None:
    images, labels = load_idx(digits_dir, "MNIST", "train")
    assert (images.shape, labels.shape) == ((1200, 28, 28), (1200,))
    assert images.dtype == labels.dtype == torch.uint8
    assert labels.unique().tolist() == list(range(10))
    assert len(load_idx(digits_dir, "MNIST", "t10k")[0]) == 300


def test_reading_writes_nothing(copied: Path) -> None:
    def state() -> list[tuple[str, int]]:
        return sorted((str(path), path.stat().st_mtime_ns) for path in [copied.parent, copied, *copied.iterdir()])

    copied.chmod(0o555)
    before = state()
    images_of(copied.parents[1])
    assert state() == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:2000] + bytes([content[2000] ^ 255]) + content[2001:],
        lambda content: gzip.compress(gzip.decompress(content)[:-1] + b"\1"),  # another pixel
    ],
)
def test_damaged_packed_file_is_refused(copied: Path, damage: Callable[[bytes], bytes]) -> None:
    path = copied / f"{IMAGES}.gz"
    path.write_bytes(damage(path.read_bytes()))
    assert_damaged(copied, "replace it")


def test_file_without_a_checksum_is_refused(copied: Path) -> None:
    (copied / CHECKSUMS).write_text("")
    assert_damaged(copied, "replace it")
    (copied / CHECKSUMS).unlink()  # then the official ones count
    assert_damaged(copied, "delete it to download it again; for your own data set, write its checksums into")


def test_checksums_may_be_of_the_packed_files(copied: Path) -> None:
    lines = [f"{hashlib.md5(path.read_bytes()).hexdigest().upper()} *./{path.name}\n" for path in copied.glob("*.gz")]
    (copied / CHECKSUMS).write_text("".join(lines))
    assert len(images_of(copied.parents[1])) == 1200


@pytest.mark.parametrize("name", ["{}-{}.idx{}-ubyte", "../{}-{}-idx{}-ubyte"])
@pytest.mark.parametrize("packed", [True, False])
def test_files_are_found_under_other_names(digits_dir: Path, copied: Path, name: str, packed: bool) -> None:
    for kind, rank in (("images", 3), ("labels", 1)):
        old = copied / f"train-{kind}-idx{rank}-ubyte.gz"
        content = old.read_bytes() if packed else gzip.decompress(old.read_bytes())
        new = copied / name.format("train", kind, rank)
        old.unlink()
        new.write_bytes(content)  # whether it is packed is known by the content
        if not (new.parent / CHECKSUMS).exists():
            shutil.copy(copied / CHECKSUMS, new.parent)
    assert torch.equal(images_of(copied.parents[1]), images_of(digits_dir))


def idx_file(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes() + values.astype(np.uint8).tobytes()


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (idx_file(np.zeros((5, 28, 28))), idx_file(np.full(5, 26)), "label from 0 to 9 per picture, found .* up to 26"),
        (idx_file(np.zeros((5, 28, 28))), idx_file(np.zeros(4)), "found 5 pictures and 4 labels"),
        (idx_file(np.zeros((0, 28, 28))), idx_file(np.zeros(0)), "found 0 pictures"),
        (idx_file(np.zeros((5, 32, 32))), idx_file(np.zeros(5)), "must be an IDX file of bytes of shape .'N', 28, 28"),
        (idx_file(np.zeros((5, 28, 28)))[:-1], idx_file(np.zeros(5)), "must be an IDX file"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_data_that_do_not_fit_the_networks_are_refused(tmp_path: Path, images: bytes, labels: bytes, said: str) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in ((IMAGES, images), (LABELS, labels)):
        (raw / name).write_bytes(content)
        with open(raw / CHECKSUMS, "a") as sums:
            sums.write(f"{hashlib.md5(content).hexdigest()}  {name}\n")
    with pytest.raises(UserError, match=said):
        images_of(tmp_path)


# The download, from a server on this machine


class Files(http.server.SimpleHTTPRequestHandler):
    """Serves the files of a folder, without a log."""

    def log_message(self, *arguments: Any) -> None:
        pass


class Garbage(socketserver.BaseRequestHandler):
    """Answers something that isn't HTTP."""

    def handle(self) -> None:
        self.request.recv(1000)
        self.request.sendall(b"garbage\r\n\r\n")


@contextlib.contextmanager
def mirror(handler: Any) -> Iterator[str]:
    """Serve on a free port; yield the address."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.fixture
def served(digits_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server with the synthetic digits, which are the official MNIST while a test runs."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    raw = digits_dir / "MNIST" / "raw"
    unpacked = {name: gzip.decompress((raw / f"{name}.gz").read_bytes()) for name in IDX_NAMES}
    sums = {name: hashlib.md5(content).hexdigest() for name, content in unpacked.items()}
    monkeypatch.setitem(idx.CONTENT_MD5, "MNIST", sums)
    with mirror(partial(Files, directory=str(raw))) as address:
        monkeypatch.setitem(idx.MIRRORS, "MNIST", (address,))
        yield address


def test_absent_files_are_downloaded_from_the_first_mirror_that_has_them(
    served: str, digits_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mirror(Garbage) as broken:
        monkeypatch.setitem(idx.MIRRORS, "MNIST", (served + "no/such/folder/", broken, served))
        assert torch.equal(images_of(tmp_path / "new"), images_of(digits_dir))
    assert set(os.listdir(tmp_path / "new" / "MNIST" / "raw")) == {f"{IMAGES}.gz", f"{LABELS}.gz"}


@pytest.mark.parametrize("failure", ["its checksum is wrong", "garbage", "No such file"])
def test_failed_download_names_the_file(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    monkeypatch.setitem(idx.CONTENT_MD5["MNIST"], IMAGES, "0" * 32)
    with mirror(Garbage) as garbage:
        away = (tmp_path / "away").as_uri() + "/"
        address = {"its checksum is wrong": served, "garbage": garbage, "No such file": away}[failure]
        monkeypatch.setitem(idx.MIRRORS, "MNIST", (address,))
        said = rf"no .*{IMAGES}\.gz, and it can't be downloaded \([^<>]*{failure}[^<>]*\).*--data-dir"
        with pytest.raises(UserError, match=said):
            images_of(tmp_path)
    assert os.listdir(tmp_path) == []


def test_command_checks_the_data_set(digits_dir: Path, tmp_path: Path) -> None:
    done = run_warm("mnist/datasets.py", "--data-dir", digits_dir)
    assert_ended(done)
    assert f"{digits_dir} is complete: 1200 training and 300 test examples" in done.stdout
    closed = "http://127.0.0.1:9"  # the discard port
    env = environment(http_proxy=closed, https_proxy=closed, no_proxy="")
    done = run_warm("mnist/datasets.py", "--data-dir", tmp_path, cwd=tmp_path, env=env)
    assert_refused(done, 1, tmp_path / "MNIST" / "raw" / f"{IMAGES}.gz", "--data-dir")


# Atomic files and locks


def test_symbolic_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    for content in (b"old", b"new"):
        write_atomically(tmp_path / "link", content)
        assert (tmp_path / "folder" / "file").read_bytes() == content
    assert (tmp_path / "link").is_symlink()


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    with whole(tmp_path / "file") as one, whole(tmp_path / "file") as other:
        one.write(b"first")
        other.write(b"second")
    assert (tmp_path / "file").read_bytes() == b"first"  # the one that ended last
    assert os.listdir(tmp_path) == ["file"]


def hold(path: Path, held: Event) -> None:
    with locked(path):
        held.set()
        signal.pause()


def test_lock_ends_with_its_process(tmp_path: Path) -> None:
    path, forking, waited = tmp_path / "lock", multiprocessing.get_context("fork"), []
    held = forking.Event()
    process = forking.Process(target=hold, args=(path, held), daemon=True)
    process.start()
    assert held.wait(60)
    with pytest.raises(BlockingIOError), locked(path):
        pass

    def wait() -> None:
        waited.append(path.exists())
        process.kill()

    with locked(path, wait):
        assert waited == [True]


@pytest.mark.parametrize("error", [errno.ENOLCK, 524])
def test_disk_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "lock"), locked(tmp_path / "lock"):
        pass
    assert [record.levelname for record in caplog.records] == 2 * ["WARNING"]
    assert "continuing without a lock" in caplog.text


# Real MNIST


def test_real_mnist_is_read(mnist_dir: Path) -> None:
    images, labels = load_idx(mnist_dir, "MNIST", "train")
    test_images, test_labels = load_idx(mnist_dir, "MNIST", "t10k")
    assert (len(images), len(test_images)) == (60000, 10000)
    assert labels[:3].tolist() == [5, 0, 4]
    assert test_labels[:3].tolist() == [7, 2, 1]
    assert images.float().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)


# Batches of MNIST


def test_batch_is_grey_in_0_to_1_with_its_label(digits_dir: Path) -> None:
    images, labels = load_idx(digits_dir, "MNIST", "train")
    batch, present = mnist.training_data(digits_dir, n_val=200)[0].batch(torch.tensor([3, 1]))
    assert torch.equal(batch["image"], images[[3, 1]].unsqueeze(1) / 255)
    assert torch.equal(batch["text"], labels[[3, 1]].long())
    assert present is None


def test_binarized_training_pictures_are_drawn_again_for_each_batch(digits_dir: Path) -> None:
    grey, _ = mnist.training_data(digits_dir, n_val=200)
    train, _ = mnist.training_data(digits_dir, n_val=200, binarize=True)
    rows = torch.arange(10)
    torch.manual_seed(0)
    draws = torch.stack([train.batch(rows)[0]["image"] for _ in range(200)])
    assert draws.unique().tolist() == [0, 1]
    assert (draws.mean(dim=0) - grey.batch(rows)[0]["image"]).abs().max() < 5 * 0.5 / 200**0.5  # five standard errors


@pytest.mark.parametrize("part", ["validation", "test"])
def test_binarized_held_out_pictures_are_drawn_once(digits_dir: Path, part: str) -> None:
    config, settings = mnist.Source(data_dir=digits_dir), {"n_val": 200, "binarize": True}
    one, other = (mnist.examples(part, config, settings).tensors["image"] for _ in range(2))
    assert len(one) == {"validation": 200, "test": 300}[part]
    assert one.unique().tolist() == [0, 255]
    assert torch.equal(one, other)
    grey = mnist.examples(part, config, {**settings, "binarize": False}).tensors["image"]
    for low, high in ((1, 64), (64, 128), (128, 192), (192, 255)):  # drawn, not rounded
        some = (low <= grey) & (grey < high)
        error = (one[some].double() - grey[some]).mean() / 255
        assert abs(error) < 4 * 0.5 / some.sum() ** 0.5


# Data, its split and the order of batches


def numbers(n: int, **fields: Any) -> Data:
    """n examples, each its own number."""
    return Data(tensors={"x": torch.arange(n)}, **fields)


@pytest.mark.parametrize(("limit", "n"), [(None, 7), (2, 2), (9, 7)])
def test_validation_is_the_end_of_the_training_split_whatever_the_limit(limit: int | None, n: int) -> None:
    train, validation = split(numbers(10), n_val=3, limit=limit)
    assert train.tensors["x"].tolist() == list(range(n))
    assert validation.tensors["x"].tolist() == [7, 8, 9]
    for n_val in (0, 10):
        with pytest.raises(UsageError, match=f"n_val must be from 1 to 9.*got {n_val}"):
            split(numbers(10), n_val=n_val, limit=None)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tensors": {"x": np.zeros(3)}}, r"tensors\['x'\] must be a dense torch.Tensor .*got ndarray"),
        ({"tensors": {"x": torch.zeros(3), "y": torch.zeros(2)}}, "same number of examples, at least 1, got .*3.*2"),
        ({"tensors": {"x": torch.zeros(3)}, "present": {"x": torch.ones(3)}}, r"must be torch.bool of shape \(3,\)"),
        ({"tensors": {"x": torch.zeros(())}}, r"tensors\['x'\] must be a dense torch.Tensor with a row"),
        ({"tensors": {"x": torch.zeros(0)}}, "at least 1"),
    ],
)
def test_inconsistent_data_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Data(**fields)


def test_presence_and_transform_follow_the_examples() -> None:
    present = {"x": torch.tensor([True, False, True, True, False, False])}
    stored = numbers(6, present=present, transform=lambda rows: {"x": rows["x"] * 10})
    batch, here = stored[2:].to(torch.device("cpu")).batch(torch.tensor([2, 1]))
    assert batch["x"].tolist() == [40, 30]
    assert here is not None
    assert here["x"].tolist() == [False, True]


def test_only_named_modalities_are_present_and_keep_their_masks() -> None:
    mask = torch.tensor([True, False, True])

    def transform(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"a": rows["x"], "b": rows["x"], "c": rows["x"]}

    data = numbers(3, present={"a": mask, "c": ~mask}, pairs=mask, transform=transform).only("a", "b")
    assert data.present is not None
    expected = {"a": mask.tolist(), "b": [True] * 3, "c": [False] * 3}
    assert {name: here.tolist() for name, here in data.present.items()} == expected
    few, all_ = (numbers(3, present=present, transform=transform) for present in ({"b": mask}, None))
    assert few.only("a").checksum() == all_.only("a").checksum()  # whatever number of labels the other stage has


def test_checksum_depends_on_all_that_is_stored() -> None:
    """Of more examples than it reads at once; a change of one value, or of how the same bytes are read."""
    x, here = torch.zeros(5000, 4, dtype=torch.uint8), torch.ones(5000, dtype=torch.bool)
    last = x.clone()
    last[-1, -1] = 1
    tensors = [{"x": x}, {"x": last}, {"y": x}, {"x": x.view(5000, 2, 2)}, {"x": x.view(torch.int8)}]
    stored: list[dict[str, Any]] = [{"tensors": some} for some in tensors]
    stored += [{"tensors": {"x": x}, **masks} for masks in ({"present": {"x": here}}, {"present": {"x": ~here}})]
    stored += [{"tensors": {"x": x}, "pairs": here}]
    found = [Data(**fields).checksum() for fields in stored]
    assert len(set(found)) == len(stored)
    assert Data(tensors={"x": x.clone()}).checksum() == found[0]


def test_random_example_is_one_of_those_allowed() -> None:
    allowed = torch.tensor([False, True, False, True, True])
    assert {random_example(numbers(5), allowed, "it")["x"].item() for _ in range(100)} == {1, 3, 4}
    with pytest.raises(UserError, match="none of the 5 held-out examples shows a 7"):
        random_example(numbers(5), torch.zeros(5, dtype=torch.bool), "a 7")


@pytest.mark.parametrize(("n", "lengths"), [(12, [4, 4, 4]), (11, [4, 4]), (3, [3])])
def test_epoch_is_whole_batches_of_different_examples(n: int, lengths: list[int]) -> None:
    batches = permuted_rows(numbers(n), 4, seed=0)
    assert [len(rows) for rows in batches] == lengths
    assert len(torch.cat(batches).unique()) == sum(lengths)


def test_order_depends_on_the_seed_alone_and_every_example_has_its_turn() -> None:
    epochs = [torch.cat(permuted_rows(numbers(11), 4, seed)).tolist() for seed in range(20)]
    torch.manual_seed(1)
    assert epochs == [torch.cat(permuted_rows(numbers(11), 4, seed)).tolist() for seed in range(20)]
    assert len({tuple(rows) for rows in epochs}) == 20
    assert set().union(*epochs) == set(range(11))
    assert [rows.tolist() for rows in consecutive_rows(numbers(5), 2)] == [[0, 1], [2, 3], [4]]


def test_seeds_are_of_63_bits_and_differ() -> None:
    grid = [*itertools.product(range(5), repeat=4), (1, 23), (12, 3), (123,), (1, 2, 3), (1, 23, 0)]
    seeds = [seed_of(*some) for some in grid]
    assert len(set(seeds)) == len(grid)
    assert seeds == [seed_of(*some) for some in grid]
    assert all(0 <= seed < 2**63 for seed in seeds)
