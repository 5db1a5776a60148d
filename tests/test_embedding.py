"""mvae.tools.embed: latents of a split or of files, in one .npz file; and their map."""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mnist.datasets import CONTROLS as MNIST
from mnist.model import build_model
from mvae import Data, UsageError, UserError, load_model
from mvae.data import mnist
from mvae.run import checkpoint, maps
from mvae.tools import embed as embedding
from mvae.tools.controls import Attributes, Label, Picture
from mvae.tools.embed import Embedding
from mvae.tools.folder import Experiment

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import ROOT, Trained, script, small_data, small_model

CONTROLS = {
    "image": Picture("L", 6, dark=True),
    "attrs": Attributes(["Big", "Old", "Red", "Wet"]),
    "label": Label(["ant", "bee", "cat"]),
}
Embed = Callable[..., dict[str, np.ndarray]]


@pytest.fixture
def embed(tmp_path: Path) -> Embed:
    """Embed 1,200 examples of the small model, or files, with these flags."""
    content = {"settings": {}, "n_latents": 2, "model": small_model().state_dict()}
    checkpoint.save(tmp_path / "model.pt", "small", content)

    def done(data: Data | None = None, **flags: Any) -> dict[str, np.ndarray]:
        found = data or small_data(1200, seed=3)
        folder = Experiment("small", CONTROLS, object, lambda *_: found, lambda _: small_model())
        config = Embedding(model_path=tmp_path / "model.pt", out=tmp_path / "new" / "z.npz", **flags)
        embedding.embed(config, folder)
        with np.load(config.out) as arrays:
            return dict(arrays)

    return done


def test_file_has_the_latents_given_some_modalities_and_the_labels(embed: Embed) -> None:
    """Examples are read in bounded batches, and --limit takes the first."""
    sizes: list[int] = []

    def transform(rows: dict[str, Any]) -> dict[str, Any]:
        sizes.append(len(rows["label"]))
        return rows

    data = small_data(1200, seed=3, transform=transform)
    found, first = embed(data, given=("label", "image"), limit=1100), data.tensors
    assert sizes == [500, 500, 100]
    with torch.no_grad():
        expected = small_model().eval().posterior({name: first[name][:1100] for name in ("label", "image")})
    for part, values in zip(("mu", "logvar"), expected, strict=True):
        np.testing.assert_allclose(found[part], values, rtol=1e-5, atol=1e-6)
    assert found["given"].tolist() == ["label", "image"]
    for name in ("label", "attrs"):
        np.testing.assert_array_equal(found[name], first[name][:1100])
        assert found[f"{name}_names"].tolist() == list(CONTROLS[name].names)


def test_files_and_folders_are_embedded(embed: Embed, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    paths = [tmp_path / "own" / "a.png", tmp_path / "own" / "b.png", tmp_path / "c.png"]
    for i, file in enumerate(paths):
        Image.new("L", (9, 7), 50 * i).save(file)
    found = embed(files=(tmp_path / "own", paths[2]))
    assert found["file"].tolist() == list(map(str, paths))
    assert found.keys() == {"mu", "logvar", "given", "file"}
    with torch.no_grad():
        mu, _ = small_model().eval().posterior({"image": CONTROLS["image"].read(paths[1])[0].x})
    np.testing.assert_allclose(found["mu"][1:2], mu, rtol=1e-5)


def test_what_is_no_picture_in_a_folder_is_skipped_and_counted(
    embed: Embed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "own"
    (folder / "sub.png").mkdir(parents=True)
    for name in (".DS_Store", "Thumbs.db"):
        (folder / name).write_bytes(b"junk")
    os.mkfifo(folder / "fifo.png")
    (folder / "broken.png").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"no file to read in .*own: can't read"):
        embed(files=(folder,))
    Image.new("L", (9, 7)).save(folder / "a.png")
    assert embed(files=(folder,))["file"].tolist() == [str(folder / "a.png")]
    assert "skipped 5 of 6 files" in caplog.text
    with pytest.raises(UserError, match=r"can't read .*fifo\.png: not a regular file"):
        embed(files=(folder / "fifo.png",))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"given": ("other",)}, "given must be among image, attrs, label"),
        ({"files": (Path("absent.png"),), "given": ("label",)}, "one control that files can hold"),
        ({"files": (Path("absent.png"),)}, "can't read"),
        ({"plot": Path("model.pt")}, "is also read or written"),
        ({"plot": Path("map.png"), "colour_by": "Bog"}, "colour_by must be one of"),
    ],
)
def test_wrong_flags_are_refused_and_leave_no_file(
    embed: Embed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        embed(**flags)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize(("by", "n_colours"), [("label", 3), ("Old", 2)])
def test_map_is_coloured_by_a_label_or_an_attribute(embed: Embed, tmp_path: Path, by: str, n_colours: int) -> None:
    embed(plot=tmp_path / "map.png", colour_by=by)
    pixels = np.asarray(Image.open(tmp_path / "map.png").convert("RGB")).reshape(-1, 3)
    shown = [colour for colour in maps.COLOURS if (pixels == list(bytes.fromhex(colour[1:]))).all(axis=1).sum() > 50]
    assert shown == list(maps.COLOURS[:n_colours])


def test_default_colour_is_the_attribute_nearest_to_one_half() -> None:
    attrs = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 1], [1, 0, 0, 0]])
    by, classes, names = embedding.colours_of({"attrs": attrs}, CONTROLS, None, 4)
    assert (by, classes.tolist(), names) == ("Old", [1, 0, 1, 0], ["-Old", "Old"])


def test_projections_to_two_dimensions() -> None:
    points = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    assert maps.project(points, "tsne", 0).shape == (40, 2)
    with pytest.raises(UsageError, match="at least 4 points"):
        maps.project(points[:3], "tsne", 0)
    if importlib.util.find_spec("umap"):
        assert maps.project(points, "umap", 0).shape == (40, 2)
    else:
        with pytest.raises(UsageError, match="pip install umap-learn"):
            maps.project(points, "umap", 0)
    points[:, 3] = 9 * points[:, 3] + 7
    assert abs(np.corrcoef(maps.pca(points)[:, 0], points[:, 3])[0, 1]) > 0.99
    assert maps.pca(points[:3, :1]).shape == (3, 2)
    assert maps.pca(points[:1]).tolist() == [[0, 0]]


def test_legend_is_bounded() -> None:
    names = [f"class {i}" for i in range(50)]
    (legend,) = maps.figure(np.zeros((50, 2)), range(50), names, "many").legends
    assert [text.get_text() for text in legend.get_texts()] == names[:20]
    assert legend.get_title().get_text() == "and 30 more"


def test_tool_runs_in_an_experiments_folder(
    trained: Trained, digits_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_path, out = trained.out_dir / checkpoint.BEST, tmp_path / "z.npz"
    words = [model_path, "--data-dir", digits_dir, "--split", "validation", "--out", out, "--threads", 1]
    monkeypatch.setattr(sys, "argv", ["embed", *map(str, words)])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(ROOT / "mnist")
    with script("mnist/datasets.py"):
        embedding.main()
    _, validation = mnist.training_data("MNIST", digits_dir, n_val=200, binarize=False)
    batch, _ = validation.batch(torch.arange(200))
    model, _ = load_model(model_path, "mnist", build_model, torch.device("cpu"))
    with np.load(out) as found, torch.no_grad():
        np.testing.assert_allclose(found["mu"], model.posterior({"image": batch["image"]})[0], rtol=1e-4, atol=1e-5)
        assert found["text_names"].tolist() == list(MNIST["text"].names)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="run this in an experiment's folder"):
        embedding.main()
