"""Sampling: values, conditions, noise, temperature and the ways to save."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from mvae import MVAE, Bernoulli, Categorical, Data, Gaussian, Likelihood, UsageError, UserError
from mvae.run import checkpoint, grids, maps
from mvae.run.grids import given_labels, reconstructions, sheet
from mvae.run.reports import Reports
from mvae.tools import controls, sampling
from mvae.tools.controls import Attributes, Kind, Label, Picture, Value, Vector
from mvae.tools.sampling import BLOCK, Row, Sampling

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from helpers import SmallEncoder, Trained, assert_ended, assert_refused, run_warm, small_data, small_model

CONTROLS: dict[str, Kind] = {
    "image": Picture("L", 6, dark=True),
    "attrs": Attributes(["Big", "Old", "Red", "Wet"]),
    "label": Label(["ant", "bee", "cat"]),
}


@pytest.fixture(scope="module")
def model() -> MVAE:
    return small_model().eval()


def values(name: str, words: str) -> list[Value]:
    return controls.parse(CONTROLS, name, words)


def conditions(model: MVAE, *ends: str, **given: str) -> list[Row]:
    """Return the rows of these values, by control."""
    pairs = [controls.endpoint(CONTROLS, words) for words in ends]
    parsed = {name: values(name, words) for name, words in given.items()}
    return sampling.conditions(model, CONTROLS, parsed, pairs, lambda: small_data(30, seed=1))


def drawn(model: MVAE, rows: list[Row], n: int = 5, seed: int = 0, **options: Any) -> dict[str, Tensor]:
    return sampling.draw(model, CONTROLS, rows, n, seed, **options)


# Values

NAN = pytest.approx(float("nan"), nan_ok=True)


@pytest.mark.parametrize(
    ("kind", "words", "expected"),
    [
        (CONTROLS["label"], "1, CAT", [("bee", [1]), ("cat", [2])]),
        (CONTROLS["label"], "dog", "expected one of 0 ant, 1 bee, 2 cat"),
        (CONTROLS["attrs"], "big,-Wet", [("Big, -Wet", [[1, NAN, NAN, 0]])]),
        (CONTROLS["attrs"], "Bog", "did you mean Big"),
        (CONTROLS["attrs"], "Big,-Big", "both present and absent"),
        (CONTROLS["image"], "absent.png", "no such file: 'absent.png'"),
        (Vector(3), "1,-2.5,5e-1", [("1, -2.5, 0.5", [[1, -2.5, 0.5]])]),
        (Vector(3), "1,two,3", "must be numbers separated by commas, or a file"),
        (Vector(3), "1,2", "must be 3 finite numbers, got 2"),
        (Vector(3), "1,2,nan", "must be 3 finite numbers"),
    ],
)
def test_values_are_parsed_or_refused(kind: Kind, words: str, expected: Any) -> None:
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected):
            kind.values(words)
    else:
        assert [(value.said, value.x.tolist()) for value in kind.values(words)] == expected


def test_vectors_are_read_from_files(tmp_path: Path) -> None:
    rows = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    np.save(tmp_path / "a.npy", rows)
    np.savetxt(tmp_path / "a.csv", rows, delimiter=",")
    (tmp_path / "bad.csv").write_text("a,b,c\n")
    for name, expected in (("a.npy", rows), ("a.csv", rows)):
        found = controls.parse({"curve": Vector(3)}, "curve", str(tmp_path / name))
        assert torch.cat([value.x for value in found]).tolist() == expected.tolist()
    with pytest.raises(UserError, match="must be numbers"):
        controls.parse({"curve": Vector(3)}, "curve", str(tmp_path / "bad.csv"))


def test_curve_is_drawn_between_its_bounds() -> None:
    drawing = Vector(3, low=0, high=1).pictures(torch.tensor([[0.0, 0.5, 1.0], [7.0, 7.0, 7.0]]))
    assert drawing.shape == (2, 1, 64, 64)
    rows = torch.arange(64.0).view(64, 1)
    heights = (drawing[:, 0] * rows).sum(dim=1) / drawing[:, 0].sum(dim=1)
    torch.testing.assert_close(heights[0], torch.linspace(63, 0, 64), atol=1, rtol=0)
    assert (heights[1] == 0).all()


# Conditions


def test_values_of_two_controls_are_combined(model: MVAE) -> None:
    rows = conditions(model, attrs="Old,-Wet", label="2,0")
    assert [row.said for row in rows] == ["attrs Old, -Wet, label cat", "attrs Old, -Wet, label ant"]
    assert rows[1].given["attrs"].tolist() == [[0, 1, 0, 0]]
    assert rows[1].given["label"].tolist() == [0]


def test_held_out_picture_shows_what_is_asked_for(model: MVAE) -> None:
    data, words = small_data(30, seed=1).tensors, "Old,-Wet"
    (row,) = conditions(model, image=words)
    (found,) = (data["image"] == row.given["image"]).flatten(1).all(dim=1).nonzero()
    x = values("attrs", words)[0].x[0]
    assert ((data["attrs"][found[0]] == x) | x.isnan()).all()
    assert row.said == "image of attrs Old, -Wet"


def test_interpolation_goes_straight_from_one_condition_to_another(model: MVAE) -> None:
    rows = conditions(model, "label=ant", "label=2", attrs="Old")
    for row, label in ((rows[0], "0"), (rows[-1], "2")):
        (alone,) = conditions(model, attrs="Old", label=label)
        torch.testing.assert_close((row.mu, row.logvar), (alone.mu, alone.logvar))
    means = torch.cat([row.mu for row in rows])
    torch.testing.assert_close(means.diff(dim=0), (means[-1] - means[0]).expand(7, -1) / 7)
    assert rows[3].said == "attrs Old, label ant to label cat, 3/7"
    assert [row.given["label"].item() for row in rows] == [0] * 4 + [2] * 4
    with pytest.raises(UsageError, match="can't both set label"):
        conditions(model, "label=0", "label=2", label="1")


def test_end_is_named_or_describes_a_picture() -> None:
    for words, name, said in (("Big", "attrs", "Big"), ("label=1", "label", "bee"), ("attrs=-Old", "attrs", "-Old")):
        found, value = controls.endpoint(CONTROLS, words)
        assert (found, value.said) == (name, said)
    with pytest.raises(UsageError, match="must be one condition, got 2"):
        controls.endpoint(CONTROLS, "label=1,2")


# Samples


def test_rows_have_the_same_noise_whatever_other_rows_there_are(model: MVAE) -> None:
    rows, n = conditions(model, label="0,1,0"), BLOCK + 3
    together = drawn(model, rows, n)["image"].view(3, n, -1)
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])
    assert torch.equal(drawn(model, rows[1:2], n)["image"].view(n, -1), together[1])
    assert not torch.equal(drawn(model, rows[1:2], n, seed=1)["image"].view(n, -1), together[1])


def test_samples_are_the_means_given_draws_of_the_posterior(model: MVAE) -> None:
    (row,) = conditions(model, label="1")
    torch.manual_seed(7)
    z = model.draw(row.given, 5)
    torch.testing.assert_close(drawn(model, [row], seed=7)["image"], model.likelihood("image").mean(z))


def test_temperature_multiplies_the_variance_of_z(model: MVAE) -> None:
    (row,) = conditions(model, label="1")
    cold, cool, usual = (drawn(model, [row], temperature=t)["image"].logit() for t in (1e-12, 0.25, 1.0))
    torch.testing.assert_close(cold, model.likelihood("image").mean(row.mu).logit().expand_as(cold), atol=1e-4, rtol=0)
    torch.testing.assert_close(cool - cold, (usual - cold) / 2, atol=1e-3, rtol=0)  # the decoder is linear


def test_draws_are_values_and_cold_ones_the_most_probable(model: MVAE) -> None:
    found = drawn(model, conditions(model), n=50, draw_x=True)
    assert set(found["image"].unique().tolist()) == {0, 1}
    assert set(found["label"].tolist()) == {0, 1, 2}
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    for name in ("attrs", "label"):
        likelihood, kind = model.likelihood(name), CONTROLS[name]
        assert kind.lines(likelihood.sample(z, 1e-6)) == kind.lines(likelihood.mean(z))


# Pictures


def picture(path: Path, ground: int, ink: int, mode: str = "L") -> Path:
    image = Image.new("L", (60, 60), ground)
    image.paste(ink, (25, 5, 35, 55))
    image.convert(mode).save(path)
    return path


def test_picture_on_a_light_background_is_inverted_if_the_data_are_dark(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mvae")
    dark, light = picture(tmp_path / "dark.png", 0, 255), picture(tmp_path / "light.bmp", 255, 0, "RGB")
    kind = Picture("L", 28, dark=True)
    torch.testing.assert_close(kind.read(dark)[0].x, kind.read(light)[0].x)
    assert [record.getMessage().split()[0] for record in caplog.records] == [str(light)]
    assert not torch.equal(Picture("L", 28).read(dark)[0].x, Picture("L", 28).read(light)[0].x)


# Grids


def test_caption_is_no_higher_than_its_lines() -> None:
    white = np.full((28, 28, 1), 255, np.uint8)
    captions = ["a long text of many words that must be broken", "b"]
    found = sheet(captions, [[], [white]], [[[white] * 3], [[white] * 3]], scale=2)
    left = found.shape[1] - 4 * 58 - 2
    assert found.shape[0] == 2 * 58 + 2
    assert (found[2:58, left + 2 : left + 58] == 0).all()  # nothing is given in the first line
    assert (found[60:116, left + 2 : left + 58] == 255).all()
    assert found[40:58, :left].any()
    assert found[60:76, :left].any()
    assert not found[76:, :left].any()


def test_grids_skip_what_can_not_be_drawn(model: MVAE) -> None:
    batch = dict(small_data(4, seed=2).tensors)
    assert set(reconstructions(model, batch)) == {"image"}
    assert set(given_labels(model, batch)) == {("attrs", "image"), ("label", "image")}


def test_a_report_draws_what_it_can_and_warns_once_of_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {"image": (1, 6, 6), "depth": (2, 6, 6), "last": (6, 6, 3)}
    likelihoods: dict[str, Likelihood] = {
        name: Bernoulli(torch.nn.Sequential(torch.nn.Linear(2, math.prod(shape)), torch.nn.Unflatten(1, shape)))
        for name, shape in shapes.items()
    }
    likelihoods["count"] = Categorical(torch.nn.Linear(2, 100_001))
    encoders = {name: SmallEncoder(math.prod(shapes.get(name, ()))) for name in likelihoods}
    model = MVAE(encoders=encoders, likelihoods=likelihoods, n_latents=2)
    tensors = {name: torch.rand(24, *shape) for name, shape in shapes.items()}
    data = Data(tensors={**tensors, "count": torch.arange(24) * 4000})
    names: list[str] = []

    def figure(_: Any, __: Any, shown: list[str], ___: str) -> Figure:
        names.extend(shown)
        return Figure()

    monkeypatch.setattr(maps, "figure", figure)

    def report(*epochs: int) -> list[str]:
        caplog.clear()
        reports = Reports(model, tmp_path, [{"epoch": epoch} for epoch in range(1, epochs[0])])
        for epoch in epochs:
            reports.write({"epoch": epoch}, data)
        reports.close()
        return [record.message for record in caplog.records]

    assert report(1, 2) == []
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["images"]) == {"reconstruction/image", "given_count/image", "latents/image"}
    assert len(names) == 2 * 24  # a name for each number that occurs
    monkeypatch.setattr(grids, "is_picture", lambda _: 1 / 0)
    assert report(3, 4) == ["TensorBoard lacks pictures of this run: division by zero"]


def test_a_report_that_can_not_be_written_does_not_end_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reports, data = Reports(small_model(), tmp_path, []), small_data(9, seed=0)
    reports.write({"epoch": 1}, data)
    (tmp_path / "stats.jsonl").unlink()
    (tmp_path / "stats.jsonl").mkdir()
    for epoch in (2, 3):
        reports.write({"epoch": epoch}, data)
    reports.close()
    assert caplog.messages == [f"can't write {tmp_path / 'stats.jsonl'}, which --resume completes: Is a directory"]


# sample.py


@pytest.mark.parametrize(
    ("flags", "message"),
    [({"n_samples": 0}, "n_samples"), ({"temperature": 0.0}, "temperature must be > 0"), ({"seed": -1}, "seed")],
)
def test_wrong_flag_is_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(model_path=Path("model"), **flags)


def sample(trained: Trained, digits_dir: Path, out_dir: Path, *flags: object) -> Any:
    words = [trained.out_dir / checkpoint.BEST, "--data-dir", digits_dir, "--out-dir", out_dir, *flags]
    return run_warm("mnist/sample.py", *words, cwd=out_dir.parent)


@pytest.fixture(scope="module")
def saved(trained: Trained, digits_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rows of four drawn samples, saved in each way."""
    folder = tmp_path_factory.mktemp("saved") / "new"
    flags = ["--condition-on-text", "3,7", "--condition-on-text", "0", "--n-samples", 4, "--draw"]
    saves = ["--save", "grid", "--save", "images", "--save", "npy"]
    assert_ended(sample(trained, digits_dir, folder, *flags, "--scale", 1, *saves))
    return folder


def test_every_way_to_save_has_the_same_samples_and_says_what_was_given(saved: Path) -> None:
    array = np.load(saved / "sample_image.npy")
    assert (array.shape, array.dtype) == ((12, 1, 28, 28), np.float32)
    with Image.open(saved / "sample_image.png") as opened:
        grid = np.asarray(opened.convert("L"))
    assert grid.shape[0] == 3 * 30 + 2
    grid = grid[:, -(4 * 30 + 2) :]
    files = sorted((saved / "sample_image").iterdir())
    assert [path.name for path in files] == [f"{i:05}.png" for i in range(12)]
    for i, path in enumerate(files):
        single = np.asarray(Image.open(path))
        assert (single == array[i, 0] * 255).all()
        top, left = 2 + i // 4 * 30, 2 + i % 4 * 30
        assert (single == grid[top : top + 28, left : left + 28]).all()
    labels = np.load(saved / "sample_text.npy").astype(int).tolist()
    assert (saved / "sample_text.txt").read_text().split() == list(map(str, labels))
    about = json.loads((saved / "sample_given.json").read_text())
    assert about["given"] == ["text 3", "text 7", "text 0"]
    assert (about["experiment"], about["seed"], about["drawn"], about["samples of each"]) == ("mnist", 0, True, 4)
    with Image.open(saved / "sample_image.png") as image:
        assert json.loads(image.info["mvae"]) == about
    with Image.open(saved / "sample_image" / "00007.png") as image:
        assert json.loads(image.info["mvae"])["given"] == "text 7"


def test_folder_of_other_pictures_is_kept(trained: Trained, digits_dir: Path, saved: Path) -> None:
    before = (saved / "sample_text.txt").read_bytes()
    many = ["--n-samples", 1_000_000]
    assert_refused(sample(trained, digits_dir, saved, *many), 2, "1000000 samples is too large to view")
    assert_refused(sample(trained, digits_dir, saved, "--save", "images"), 1, saved / "sample_image", "--out-dir")
    assert (saved / "sample_text.txt").read_bytes() == before


def test_own_digit_and_an_interpolation_are_conditions(trained: Trained, digits_dir: Path, tmp_path: Path) -> None:
    own = picture(tmp_path / "own.jpg", 250, 10, "RGB")
    done = sample(
        trained, digits_dir, tmp_path / "new", "--condition-on-image", own, "--interpolate", 3, 8, "--scale", 1
    )
    assert_ended(done)
    assert f"{own} has a light background" in done.stdout
    with Image.open(tmp_path / "new" / "sample_image.png") as grid:
        given = json.loads(grid.info["mvae"])["given"]
        assert grid.height == 8 * 30 + 2
        shown = np.asarray(grid.convert("L"))[2:30, -(9 * 30) : -(8 * 30 + 2)]
    assert given[0] == "image own.jpg, text 3 to text 8, 0/7"
    assert (shown == (255 * Picture("L", 28, dark=True).read(own)[0].x[0, 0]).round().numpy()).all()


def build_curves(n_latents: int) -> MVAE:
    decoder = Gaussian(torch.nn.Linear(n_latents, 5))
    return MVAE(encoders={"curve": SmallEncoder(5, n_latents)}, likelihoods={"curve": decoder}, n_latents=n_latents)


def test_curves_are_conditions_and_are_written_as_text_and_pictures(tmp_path: Path) -> None:
    content = {"settings": {}, "n_latents": 3, "model": build_curves(3).state_dict()}
    checkpoint.save(tmp_path / "model.pt", "curves", content)
    config = Sampling(model_path=tmp_path / "model.pt", n_samples=3, out_dir=tmp_path, save=["grid", "npy"])
    curves: dict[str, Kind] = {"curve": Vector(5)}
    given = {"curve": Vector(5).values("-1,0,1,0,-1")}
    sampling.sample(config, "curves", build_curves, curves, lambda *_: small_data(1, seed=0), given=given)
    lines = (tmp_path / "sample_curve.txt").read_text().splitlines()
    rows = [[float(number) for number in line.split(",")] for line in lines]
    np.testing.assert_allclose(rows, np.load(tmp_path / "sample_curve.npy"), rtol=1e-5)
    with Image.open(tmp_path / "sample_curve.png") as grid:
        assert np.asarray(grid)[:, -66:].any()
        assert json.loads(grid.info["mvae"])["given"] == ["curve -1, 0, 1, ..."]


def test_condition_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"settings": {}, "n_latents": 2, "model": small_model().state_dict()}
    checkpoint.save(tmp_path / "model.pt", "small", content)
    own = picture(tmp_path / "sample_image.png", 0, 255)
    kind = dataclasses.make_dataclass("Config", [("condition_on_image", list[str])], bases=(Sampling,), kw_only=True)
    build, examples = lambda _: small_model(), lambda *_: small_data(9, seed=0)
    for words, ends in (([str(own)], None), ([], (f"image={own.name}", "label=cat"))):
        config = kind(model_path=tmp_path / "model.pt", condition_on_image=words, interpolate=ends)
        with pytest.raises(UsageError, match=r"sample_image\.png is also read"):
            sampling.sample(config, "small", build, CONTROLS, examples, given={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "sample_image.png"]
