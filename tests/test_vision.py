"""Vision: its networks, its six modalities from four folders of pictures, and the scripts as a user runs them."""

import functools
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from mvae.errors import UserError
from mvae.layers import FoldConvTranspose2d
from mvae.run import checkpoint
from vision import datasets
from vision.model import build_model

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from helpers import RunHere, assert_ended, assert_refused, run_warm, stats

MODALITIES = ("image", "gray", "edge", "mask", "obscured", "watermark")
NAMES = [f"{number:06}.png" for number in range(1, 121)]
PARTS = [0] * 104 + [1] * 4 + [2] * 12
FOLDERS = {"image": "images", "gray": "grayscale", "edge": "edge", "mask": "mask"}
CELL, HEADER = 66, 30  # of the contact sheet: a picture and the space to the next, and the labels above
TRAIN = ["--batch-size", 8, "--limit", 8, "--n-latents", 4, "--annealing-epochs", 4, "--lr", 1e-3]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` as setup.py leaves it, of rectangles of 64x64 pixels, and the list of splits. Read-only."""
    root = tmp_path_factory.mktemp("vision")
    rng = np.random.default_rng(0)
    for folder in FOLDERS.values():
        (root / "data" / folder).mkdir(parents=True)
    for name in NAMES:
        pixels = np.full((64, 64, 3), rng.integers(256, size=3), dtype=np.uint8)
        mask = np.full((64, 64), 255, dtype=np.uint8)
        top, left = rng.integers(8, 40, size=2)
        pixels[top : top + 20, left : left + 16] = rng.integers(256, size=3)
        mask[top : top + 20, left : left + 16] = 0
        edge = np.zeros((64, 64), dtype=np.uint8)
        edge[top, left : left + 16] = edge[top : top + 20, left] = 255
        image = Image.fromarray(pixels)
        masked, edges = Image.fromarray(mask), Image.fromarray(edge)
        for folder, picture in zip(FOLDERS.values(), (image, image.convert("L"), edges, masked), strict=True):
            picture.save(root / "data" / folder / name, compress_level=1)
    rows = (f"{name} {part}\n" for name, part in zip(NAMES, PARTS, strict=True))
    (root / "data" / "list_eval_partition.txt").write_text("".join(rows))
    return root


@pytest.fixture
def copied(drawn: Path, tmp_path: Path) -> Path:
    """A copy of the data for one test, without the list."""
    data = Path(shutil.copytree(drawn / "data", tmp_path / "data"))
    (data / "list_eval_partition.txt").unlink()
    return data


@pytest.fixture(scope="module")
def trained(drawn: Path) -> Iterator[Path]:
    """The folder of a run of two epochs."""
    out_dir = drawn / "trained_models"
    assert_ended(run_warm("vision/train.py", *TRAIN, "--epochs", 2, cwd=drawn))
    yield out_dir
    shutil.rmtree(out_dir)  # half a gigabyte


def source(data: Path, data_dir: Path | None = None) -> datasets.Source:
    folders = {f"{kind}_dir": data / folder for kind, folder in FOLDERS.items()}
    return datasets.Source(data_dir=data_dir or data, cache_dir=data / "cache", workers=1, **folders)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def as_bytes(pictures: Tensor) -> np.ndarray:
    """(batch, channels, height, width) in [0, 1] as uint8 (batch, height, width, channels)."""
    whole = (pictures * 255).round()
    torch.testing.assert_close(pictures, whole / 255, rtol=0, atol=0)
    return whole.byte().permute(0, 2, 3, 1).numpy()


def n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# model.py


def test_networks_have_the_papers_sizes_and_differ_in_their_channels_only() -> None:
    model = build_model(250).eval()
    counts = [n_parameters(model.encoders[name]) for name in MODALITIES]
    assert counts == [4_224_372, *[4_224_372 - 2 * 16 * 32] * 3, 4_224_372, 4_224_372]
    channels = {name: 1 if name in ("gray", "edge", "mask") else 3 for name in MODALITIES}
    with torch.no_grad():
        mu, _ = model.posterior({name: torch.rand(2, n, 64, 64) for name, n in channels.items()})
        found = {name: model.likelihood(name).mean(mu).shape for name in model.modalities}
    assert found == {name: (2, n, 64, 64) for name, n in channels.items()}
    decoders = {name: model.decoders[name].modules() for name in MODALITIES}
    folds = [name for name in decoders if any(isinstance(layer, FoldConvTranspose2d) for layer in decoders[name])]
    assert folds == ["gray", "edge", "mask"]


# datasets.py: the batch


@pytest.fixture(scope="module")
def rows() -> dict[str, Tensor]:
    """Twenty stored examples of random pixels."""
    rng, sizes = torch.Generator().manual_seed(0), {kind: 3 if kind == "image" else 1 for kind in FOLDERS}
    return {kind: torch.randint(256, (20, n, 64, 64), dtype=torch.uint8, generator=rng) for kind, n in sizes.items()}


def test_the_watermark_and_the_black_half_are_what_pil_pastes(rows: dict[str, Tensor]) -> None:
    mark, before = Image.open(datasets.WATERMARK), rows["image"].clone()
    batch = datasets.six(rows)
    assert tuple(batch) == datasets.MODALITIES == MODALITIES
    assert torch.equal(rows["image"], before)
    pictures = [as_bytes(batch[name]) for name in ("image", "watermark", "obscured")]
    for image, watermark, obscured in zip(*pictures, strict=True):
        pasted = Image.fromarray(image)
        pasted.paste(mark, (0, 0), mark)
        assert (watermark == np.asarray(pasted)).all()
        assert 0.05 < np.mean(watermark != image) < 0.6
        pasted = Image.fromarray(image)
        pasted.paste((0, 0, 0), (32, 0, 64, 64))
        assert (obscured == np.asarray(pasted)).all()


# datasets.py: the folders


def test_pictures_are_the_files_and_masks_are_white_on_black(drawn: Path) -> None:
    data = drawn / "data"
    batch, present = datasets.examples("test", source(data), {}).batch(torch.tensor([2, 7]))
    assert present is None
    for i, name in enumerate((NAMES[110], NAMES[115])):
        assert (as_bytes(batch["image"])[i] == read(data / "images" / name)).all()
        for kind in ("gray", "edge"):
            assert (as_bytes(batch[kind])[i, ..., 0] == read(data / FOLDERS[kind] / name)).all()
        assert (as_bytes(batch["mask"])[i, ..., 0] == 255 - read(data / "mask" / name)).all()
    train, validation = datasets.training_data(source(data), limit=5)
    assert (len(train), len(validation)) == (5, 4)
    assert (as_bytes(train.batch(torch.tensor([4]))[0]["image"])[0] == read(data / "images" / NAMES[4])).all()


def members(found: tuple) -> list[list[str]]:
    """Return the names of each split, which must be the same in all four folders."""
    entries, counts, _ = found
    names = [[entry.member for entry in some] for some in entries.values()]
    assert all(some == names[0] for some in names)
    ends = np.cumsum(counts)
    return [names[0][end - n : end] for n, end in zip(counts, ends, strict=True)]


def test_the_official_list_splits_the_pictures(drawn: Path, copied: Path) -> None:
    """It names .jpg files; the pictures may be those of the PNG release."""
    text = (drawn / "data" / "list_eval_partition.txt").read_text()
    for where, suffix in (("elsewhere/CelebA/Eval", ".jpg"), ("elsewhere/celeba", ".png"), ("data", ".png")):
        path = copied.parent / where / "list_eval_partition.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace(".png", suffix))
        found = datasets.find(source(copied, copied.parent / "elsewhere"))
        assert members(found) == [NAMES[:104], NAMES[104:108], NAMES[108:]]
        assert found.partition == path
        path.unlink()


def test_without_the_list_names_split_the_pictures(copied: Path) -> None:
    train, validation, test = members(datasets.find(source(copied)))
    assert sorted(train + validation + test) == NAMES
    assert min(len(validation), len(test)) >= 6
    assert [datasets.split_by_name(some[0]) for some in (train, validation, test)] == [0, 1, 2]
    parts = [datasets.split_by_name(f"{number:06}.jpg") for number in range(10_000)]
    assert np.bincount(parts) == pytest.approx([8000, 1000, 1000], rel=0.1)


def test_pictures_that_a_folder_lacks_are_counted_in_one_warning(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder, i in (("grayscale", 3), ("mask", 3), ("mask", 7), ("images", 9)):
        (copied / folder / NAMES[i]).unlink()
    found = members(datasets.find(source(copied)))
    assert {name for part in found for name in part} == {*NAMES} - {NAMES[i] for i in (3, 7, 9)}
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("mvae.vision", logging.WARNING)
    said = record.getMessage()
    for words in ("119 pictures", f"1 are not in {copied / 'grayscale'}", f"2 are not in {copied / 'mask'}", "117"):
        assert words in said
    assert str(copied / "edge") not in said


def test_datasets_as_a_command_counts_and_decodes_the_pictures(copied: Path) -> None:
    (copied / "mask" / NAMES[7]).unlink()
    words = ["--data-dir", copied, "--cache-dir", copied / "cache", "--workers", 1]
    done = run_warm("vision/datasets.py", *words, cwd=copied.parent)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("1 are not in data/mask") == len(done.stderr.splitlines()) == 1
    assert "split by their names" in done.stdout
    assert len(list((copied / "cache").glob("*.pictures"))) == 4


def test_a_folder_without_pictures_is_refused_with_the_remedy(copied: Path) -> None:
    for lost, remedy in (
        ("mask", f"run `python setup.py mask {copied}/images {copied}/mask`"),
        ("edge", f"run `python setup.py edge {copied}/images {copied}/edge`"),
        ("images", "put the faces there, or pass --image-dir"),
    ):
        for name in NAMES:
            (copied / lost / name).unlink()
        with pytest.raises(UserError, match=f"^no pictures in {copied}/{lost}: {remedy}"):
            datasets.find(source(copied))
    for kind in FOLDERS.values():  # one picture makes no three splits
        Image.new("L", (64, 64)).save(copied / kind / NAMES[0])
    with pytest.raises(UserError, match="0 for"):
        datasets.find(source(copied))


# The scripts, run as a user runs them, where ./data is.


def test_a_run_reports_all_terms(trained: Path) -> None:
    first, second = stats(trained)
    assert (first["beta"], second["beta"]) == (1 / 4, 2 / 4)
    assert second["train/loss"] < first["train/loss"]
    for term in ("joint", *MODALITIES):
        beginning = f"validation/{term}/log_prob/"
        assert [name.removeprefix(beginning) for name in first if name.startswith(beginning)] == list(MODALITIES)


@pytest.fixture
def sample(trained: Path, tmp_path: Path) -> RunHere:
    """Run sample.py in the test's folder."""
    return functools.partial(run_warm, "vision/sample.py", trained / checkpoint.BEST, cwd=tmp_path)


def shown(folder: Path, n: int) -> tuple[list[np.ndarray], tuple[int, int]]:
    """Return the n pictures left of the six in the contact sheet, and its numbers of columns and rows."""
    sheet = read(folder / "samples" / "contact_sheet.png")
    right = sheet[HEADER + 2 :, sheet.shape[1] - (n + 6) * CELL :]
    left = (sheet.shape[1] - 2) // CELL, (sheet.shape[0] - HEADER - 2) // CELL
    return [right[:64, i * CELL :][:, :64] for i in range(n)], left


def test_sample_draws_from_the_prior(sample: RunHere, tmp_path: Path) -> None:
    assert_ended(sample("--n-samples", 3))
    sizes = {path.stem: read(path).shape[1::-1] for path in (tmp_path / "samples").iterdir()}
    sheet = {"contact_sheet": (6 * CELL + 2, HEADER + 3 * CELL + 2)}
    assert sizes == dict.fromkeys(MODALITIES, (3 * 66 + 2, 66 + 2)) | sheet


def test_sample_shows_the_conditions_next_to_the_six(sample: RunHere, drawn: Path, tmp_path: Path) -> None:
    """Red becomes its luminance; the obscured isn't made half black; a mask on white is inverted, which is logged."""
    data = drawn / "data"
    Image.new("RGBA", (300, 100), (255, 0, 0, 255)).save(tmp_path / "wide.png")
    Image.new("L", (10, 40), 51).save(tmp_path / "small.jpg")
    image, edge, mask = data / "images" / NAMES[0], data / "edge" / NAMES[0], data / "mask" / NAMES[110]
    arguments: list[object] = ["--n-samples", 2]
    files = {"watermark": image, "edge": edge, "gray": "wide.png", "obscured": "small.jpg", "mask": mask}
    for kind, file in files.items():
        arguments += ["--condition-file", file, "--condition-type", kind]
    done = sample(*arguments)
    assert_ended(done)
    assert f"{mask} has a light background" in done.stdout
    given, (columns, rows) = shown(tmp_path, 5)
    assert columns > 5 + 6  # and a text
    assert rows == 2
    expected = [np.array(76), read(edge)[..., None], 255 - read(mask)[..., None], np.array(51), read(image)]
    for found, picture in zip(given, expected, strict=True):  # in the modalities' order
        assert (found == picture).all()
    header = read(tmp_path / "samples" / "contact_sheet.png")[:HEADER, -11 * CELL :].max(axis=(0, 2))
    assert (header.reshape(11, CELL).max(axis=1) > 100).all()


def test_each_condition_needs_a_type_of_the_six(tmp_path: Path) -> None:
    files = ["--condition-file", "a.png", "--condition-file", "b.png"]
    refused = run_warm("vision/sample.py", "model.pth.tar", *files, "--condition-type", "edge", cwd=tmp_path)
    assert_refused(refused, 2, "2 files")
    refused = run_warm("vision/sample.py", "model.pth.tar", *files[:2], "--condition-type", "sketch", cwd=tmp_path)
    assert_refused(refused, 2, ", ".join(MODALITIES))


def test_loglike_writes_every_quantity(trained: Path, drawn: Path, tmp_path: Path) -> None:
    arguments = [trained / checkpoint.BEST, "--n-samples", 5, "--limit", 4, "--json", tmp_path / "numbers.json"]
    assert_ended(run_warm("vision/loglike.py", *arguments, cwd=drawn))
    rows = json.loads((tmp_path / "numbers.json").read_text())["log_likelihood"]
    both = ["q(z | image)", "q(z | image, gray, ..., watermark)"]
    found = {(row["quantity"], row["proposal"]) for row in rows}
    wanted = {(f"log p({name})", under) for name in MODALITIES for under in (f"q(z | {name})", both[1])}
    wanted |= {(f"log p({name} | image)", under) for name in MODALITIES[1:] for under in both}
    wanted |= {("log p(image, gray, ..., watermark)", under) for under in both}
    assert found == wanted
    assert all(row["mean"] < 0 < row["standard_error"] for row in rows)


def test_transform_draws_each_output_below_its_input(trained: Path, drawn: Path, tmp_path: Path) -> None:
    words = [trained / checkpoint.BEST, "--n-samples", 3, "--out-dir", tmp_path / "new"]
    assert_ended(run_warm("vision/transform.py", *words, cwd=drawn))
    pictures = {path.stem: read(path) for path in (tmp_path / "new").iterdir()}
    rows = {"edges_and_mask": 3, "colourisation": 2, "completion": 2, "watermark_removal": 2}
    assert {name: picture.shape for name, picture in pictures.items()} == {
        name: (2 + n * 66, 2 + 3 * 66, 3) for name, n in rows.items()
    }
    held_out = {read(drawn / "data" / "images" / name).tobytes() for name in NAMES[104:108]}
    faces = pictures["edges_and_mask"][2:66]
    assert {np.ascontiguousarray(faces[:, 2 + i * 66 :][:, :64]).tobytes() for i in range(3)} < held_out
    assert not pictures["completion"][2:66, 34:66].any()
    assert pictures["completion"][68:132, 34:66].any()
    model, _ = checkpoint.load_model(trained / checkpoint.BEST, "vision", build_model, torch.device("cpu"))
    for name, given, channels in (("colourisation", "gray", 1), ("watermark_removal", "watermark", 3)):
        x = torch.from_numpy(pictures[name][2:66, 2:66].copy()).permute(2, 0, 1)[:channels].float().unsqueeze(0) / 255
        with torch.no_grad():
            mean = model.likelihood("image").mean(model.posterior({given: x})[0])[0].permute(1, 2, 0).numpy()
        assert np.abs(pictures[name][68:132, 2:66] - 255 * mean).max() <= 1
