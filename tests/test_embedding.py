"""embed.py: latents of a split or of files, in one .npz; and the map of them."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mnist.datasets import CONTROLS as MNIST
from mnist.datasets import examples as mnist_examples
from mnist.model import build_model
from mvae import UsageError, UserError, checkpoint, maps
from mvae.data import Data
from mvae.scripts import embedding, flags
from mvae.scripts.kinds import Attributes, Label, Picture

from helpers import Trained, assert_ended, fit_small, run_warm, small_data, small_model

CONTROLS = {
    "image": Picture("L", 6, dark=True),
    "attrs": Attributes(["Big", "Old", "Red", "Wet"]),
    "label": Label(["ant", "bee", "cat"]),
}
Embed = Callable[..., dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the small model."""
    folder = tmp_path_factory.mktemp("small")
    fit_small(folder, epochs=1)
    return folder / checkpoint.BEST


@pytest.fixture
def embed(path: Path, tmp_path: Path) -> Embed:
    """Embeds 1,200 examples, or files: what embed.py does with these words."""

    def done(*words: object, data: Data | None = None) -> dict[str, np.ndarray]:
        parser = flags.embedding_parser(None, CONTROLS)
        args = parser.parse_args([str(path), "--out", str(tmp_path / "new" / "z.npz"), *map(str, words)])

        def examples(split: str, args: argparse.Namespace, settings: Any) -> Data:
            return data or small_data(1200, seed=3)

        embedding.embed(args, "small", lambda n_latents: small_model(), CONTROLS, examples)
        with np.load(args.out) as found:
            return dict(found)

    return done


def posterior(path: Path, *names: str, n: int = 1200) -> tuple[np.ndarray, np.ndarray]:
    model, _ = checkpoint.load_model(path, "small", lambda n_latents: small_model(), torch.device("cpu"))
    batch = small_data(n, seed=3).tensors
    with torch.no_grad():
        mu, logvar = model.posterior({name: batch[name] for name in names})
    return mu.numpy(), logvar.numpy()


def test_latents_are_those_of_the_modalities_given(embed: Embed, path: Path) -> None:
    found = embed("--given", "label", "image")
    for part, expected in zip(("mu", "logvar"), posterior(path, "label", "image"), strict=True):
        np.testing.assert_allclose(found[part], expected, rtol=1e-5, atol=1e-6)
    assert found["given"].tolist() == ["label", "image"]


def test_file_has_labels_attributes_and_their_names(embed: Embed) -> None:
    found, data = embed(), small_data(1200, seed=3).tensors
    np.testing.assert_array_equal(found["label"], data["label"])
    np.testing.assert_array_equal(found["attrs"], data["attrs"])
    assert (found["label_names"].tolist(), found["attrs_names"].tolist()) == (
        ["ant", "bee", "cat"],
        ["Big", "Old", "Red", "Wet"],
    )
    assert found["given"].tolist() == ["image"]


def test_examples_are_read_a_bounded_number_at_a_time_and_limit_takes_the_first(embed: Embed, path: Path) -> None:
    sizes: list[int] = []

    def transform(rows: dict[str, Any]) -> dict[str, Any]:
        sizes.append(len(rows["label"]))
        return rows

    found = embed("--limit", 1100, data=small_data(1200, seed=3, transform=transform))
    assert sizes == [500, 500, 100]
    np.testing.assert_allclose(found["mu"], posterior(path, "image")[0][:1100], rtol=1e-5, atol=1e-6)


def test_pictures_of_folders_and_files_are_named(embed: Embed, path: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    paths = [tmp_path / "own" / "a.png", tmp_path / "own" / "b.png", tmp_path / "c.png"]
    for i, file in enumerate(paths):
        Image.new("L", (9, 7), 50 * i).save(file)
    found = embed("--files", tmp_path / "own", "--files", paths[2])
    assert found["file"].tolist() == list(map(str, paths))
    assert found.keys() == {"mu", "logvar", "given", "file"}
    model, _ = checkpoint.load_model(path, "small", lambda n_latents: small_model(), torch.device("cpu"))
    with torch.no_grad():
        mu, _ = model.posterior({"image": CONTROLS["image"].tensor(paths[1])})
    np.testing.assert_allclose(found["mu"][1:2], mu, rtol=1e-5)


def test_files_are_pictures_alone(embed: Embed, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`files` are pictures"):
        embed("--files", tmp_path / "a.png", "--given", "label")
    with pytest.raises(UserError, match="can't read"):
        embed("--files", tmp_path / "absent.png")
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == []
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("by", "n_colours"), [("label", 3), ("Old", 2)])
def test_map_is_coloured_by_a_label_or_an_attribute(embed: Embed, tmp_path: Path, by: str, n_colours: int) -> None:
    embed("--plot", tmp_path / "map.png", "--colour-by", by)
    pixels = np.asarray(Image.open(tmp_path / "map.png").convert("RGB")).reshape(-1, 3)
    shown = [colour for colour in maps.COLOURS if (pixels == list(bytes.fromhex(colour[1:]))).all(axis=1).sum() > 50]
    assert shown == list(maps.COLOURS[:n_colours])


def test_attribute_that_most_divides_the_examples_is_the_usual_colour() -> None:
    attrs = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 1], [1, 0, 0, 0]])
    by, classes, names = embedding.colours_of({"attrs": attrs}, CONTROLS, None, 4)
    assert (by, classes.tolist(), names) == ("Old", [1, 0, 1, 0], ["-Old", "Old"])


def test_unknown_colour_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(UsageError, match="`colour_by` takes label, not Old"):
        embedding.colours_of({"label": torch.tensor([0, 1])}, CONTROLS, "Old", 2)


def test_principal_components_are_those_of_the_covariance() -> None:
    points = np.random.default_rng(0).normal(size=(300, 5)) * [0.1, 3, 1, 0.2, 9] + 7
    found = maps.pca(points)
    values = np.linalg.eigvalsh(np.cov(points.T))[::-1]
    np.testing.assert_allclose(np.cov(found.T), np.diag(values[:2]), atol=1e-9 * values[0])
    np.testing.assert_allclose(maps.pca(points + 1), found, atol=1e-9)
    assert np.corrcoef(found[:, 0], points[:, 4])[0, 1] > 0.99  # the axis points to where the values rise


def test_projection_that_is_not_installed_is_told_with_its_package() -> None:
    for name, module, package in (("tsne", "sklearn", "scikit-learn"), ("umap", "umap", "umap-learn")):
        try:
            __import__(module)
        except ImportError:
            with pytest.raises(UsageError, match=rf"`map` {name} needs {package}: pip install {package}"):
                maps.projection(name)
        else:
            points = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
            assert maps.projection(name)(points, 0).shape == (40, 2)


def test_script_embeds_the_validation_split(trained: Trained, digits_dir: Path, tmp_path: Path) -> None:
    words = [trained.out_dir / checkpoint.BEST, "--data-dir", digits_dir, "--split", "validation", "--plot", "map.png"]
    assert_ended(run_warm("mnist/embed.py", *words, cwd=tmp_path))
    held_out = mnist_examples("validation", argparse.Namespace(data_dir=digits_dir), {"n_val": 200, "binarize": False})
    batch, _ = held_out.batch(torch.arange(200))
    model, _ = checkpoint.load_model(trained.out_dir / checkpoint.BEST, "mnist", build_model, torch.device("cpu"))
    with np.load(tmp_path / "latents.npz") as found, torch.no_grad():
        np.testing.assert_allclose(found["mu"], model.posterior({"image": batch["image"]})[0], rtol=1e-4, atol=1e-5)
        assert found["text_names"].tolist() == list(MNIST["text"].names)
    assert {file.name for file in tmp_path.iterdir()} == {"latents.npz", "map.png"}
