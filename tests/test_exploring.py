"""explore.py: what the model believes, the page that shows it, and the page in a browser."""

import base64
import importlib
import io
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mvae import MVAE, checkpoint, experts
from mvae.scripts.beliefs import believe, strongest
from mvae.scripts.kinds import Attributes, Label, Picture

from helpers import Trained, environment, small_data, small_model, start_warm

CONTROLS = {
    "image": Picture("L", 6, dark=True, pen=1),
    "attrs": Attributes(["Big", "Old", "Red", "Wet"]),
    "label": Label(["ant", "bee", "cat"]),
}
EXPERIMENTS = ["mnist", "fashionmnist", "multimnist", "celeba", "celeba19", "vision"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def model() -> MVAE:
    return small_model().eval()


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    return dict(small_data(1, seed=4).tensors)


# What the model believes


def test_shares_are_those_of_the_product_of_experts(model: MVAE, batch: dict[str, Tensor]) -> None:
    found = believe(model, CONTROLS, batch)
    assert list(found.shares) == ["prior", "image", "attrs", "label"]
    torch.testing.assert_close(sum(found.shares.values(), torch.zeros(2)), torch.ones(2))
    with torch.no_grad():
        mu, logvar = model.posterior(batch)
        expert_mu, expert_logvar = model.encode(batch)
    torch.testing.assert_close(found.shares["prior"], logvar[0].exp())  # the prior's precision is 1
    weighted = sum((found.shares[name] * expert_mu[i, 0] for i, name in enumerate(model.modalities)), torch.zeros(2))
    torch.testing.assert_close(weighted, mu[0])
    assert found.widths["label"] == pytest.approx((expert_logvar[2] / 2).mean().exp().item(), rel=1e-5)
    assert found.widths["all"] == pytest.approx((logvar / 2).mean().exp().item(), rel=1e-5)


def test_nothing_given_is_the_prior(model: MVAE) -> None:
    found = believe(model, CONTROLS, {}, seed=3)
    assert (found.elbo, found.log_p, found.widths) == (0, 0, {"all": 1})
    torch.manual_seed(3)
    torch.testing.assert_close(found.samples["image"], model.likelihood("image").mean(torch.randn(8, 2)))


def test_expected_values_are_probabilities_of_what_is_not_a_picture(model: MVAE, batch: dict[str, Tensor]) -> None:
    found = believe(model, CONTROLS, {"image": batch["image"]})
    assert {name: [words for words, _ in values] for name, values in found.expected.items()} == {
        "attrs": ["Big", "Old", "Red", "Wet"],
        "label": ["ant", "bee", "cat"],
    }
    assert sum(p for _, p in found.expected["label"]) == pytest.approx(1)


def test_bounds_hold_and_importance_samples_tighten_the_elbo(model: MVAE, batch: dict[str, Tensor]) -> None:
    found = believe(model, CONTROLS, batch)
    grid = torch.linspace(-6, 6, 241)
    z = torch.cartesian_prod(grid, grid)
    with torch.no_grad():
        log_joint = model.log_prob(z.unsqueeze(1), batch, [model.modalities] * len(z)).sum(dim=(1, 2))
    log_p = (log_joint + experts.log_standard_normal(z)).logsumexp(dim=0) + 2 * torch.log(grid[1] - grid[0])
    assert found.elbo < found.log_p
    assert found.log_p == pytest.approx(log_p.item(), abs=0.4)


def test_shift_and_temperature_change_the_samples_alone(model: MVAE, batch: dict[str, Tensor]) -> None:
    usual, shifted, cold = (
        believe(model, CONTROLS, batch, **how)  # type: ignore[arg-type]
        for how in ({}, {"shifts": {1: 2.0}}, {"temperature": 1e-9})
    )
    column = model.likelihood("image").decoder[0].weight[:, 1].detach()  # type: ignore[index, union-attr]
    change = (shifted.samples["image"].logit() - usual.samples["image"].logit()).flatten(1)
    torch.testing.assert_close(change, (2 * column).expand(8, -1), atol=1e-4, rtol=0)
    assert cold.samples["image"].std(dim=0).max() < 1e-4 < usual.samples["image"].std(dim=0).max()
    for other in (shifted, cold):
        assert (other.elbo, other.log_p, other.expected) == (usual.elbo, usual.log_p, usual.expected)


def test_strongest_latent_moves_the_picture_most(model: MVAE) -> None:
    weight = model.likelihood("image").decoder[0].weight  # type: ignore[index, union-attr]
    order = strongest(model, CONTROLS, 2)
    assert sorted(order) == [0, 1]
    assert weight[:, order[0]].abs().mean() > weight[:, order[1]].abs().mean()


# The page. What follows needs Dash.


@pytest.fixture(scope="module")
def exploring() -> Any:
    pytest.importorskip("dash", reason="the page needs Dash: pip install -r requirements-explore.txt")
    return importlib.import_module("mvae.scripts.exploring")


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return "data:image/any;base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_has_a_control_for_what_it_can_be_given(exploring: Any, experiment: str) -> None:
    controls = importlib.import_module(f"{experiment}.datasets").CONTROLS
    model = importlib.import_module(f"{experiment}.model").build_model(5)
    given = {one for name, kind in controls.items() for one in kind.modalities(name)}
    assert given == set(model.modalities)
    layout = str(exploring.page(model.eval(), controls, "made").layout)
    for name, kind in controls.items():
        ids = [f"{name}-value"]
        if isinstance(kind, Picture):
            ids = [f"{name}-file", f"{name}-clear"]
        elif isinstance(kind, Attributes):
            ids = [f"{name}-{one}" for one in kind.names]
        for one in ids:
            assert f"id='{one}'" in layout
        assert (f"id='{name}-board'" in layout) == bool(getattr(kind, "pen", 0))


def test_values_of_the_page_are_those_of_the_flags(exploring: Any) -> None:
    assert exploring._batch("label", None, CONTROLS) == {}
    assert exploring._batch("label", 2, CONTROLS)["label"].tolist() == [2]
    switches = {"Big": "there", "Old": "inferred", "Red": "absent", "Wet": "inferred"}
    assert exploring._batch("attrs", switches, CONTROLS)["attrs"].tolist() == [[1, 0, 0, 0]]
    apart = {"attrs": Attributes(CONTROLS["attrs"].names, apart=True)}
    found = exploring._batch("attrs", switches, apart)
    assert {name: x.tolist() for name, x in found.items()} == {"Big": [1], "Red": [0]}
    assert exploring._batch("attrs", dict.fromkeys(switches, "inferred"), CONTROLS) == {}
    text = importlib.import_module("multimnist.datasets").CONTROLS
    assert exploring._batch("text", {"given": ["given"], "value": ""}, text)["text"].tolist() == [[10] * 4]
    assert exploring._batch("text", {"given": [], "value": "17"}, text) == {}


def test_upload_is_decoded_as_a_picture_and_nothing_else(exploring: Any) -> None:
    kind = Picture("L", 6, dark=True)
    assert exploring._decoded(data_url(Image.new("RGB", (30, 20), (255, 255, 255)), "JPEG"), kind).shape == (1, 1, 6, 6)
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch pwned) (w) file\n"
    bomb = data_url(Image.new("1", (30_000, 30_000)))
    large = "data:;base64," + base64.b64encode(bytes(exploring.UPLOAD + 1)).decode()
    for url in ("", "no url", "data:;base64,####", "data:;base64," + base64.b64encode(script).decode(), bomb, large):
        with pytest.raises(ValueError, match="this is no picture, or a damaged one"):
            exploring._decoded(url, kind)


def test_drawing_is_what_the_pen_leaves(exploring: Any) -> None:
    side = exploring.BOARD
    found = exploring._rasterised([{"path": f"M{side / 2},0L{side / 2},{side}"}], Picture("L", 28, dark=True, pen=2))
    assert found.shape == (1, 1, 28, 28)
    torch.testing.assert_close(found[0, 0, 5], torch.tensor([0.0] * 13 + [1, 1] + [0] * 13), atol=0.2, rtol=0)
    assert not exploring._rasterised([{"path": "M1"}, {}], Picture("L", 28, dark=True, pen=2)).any()


def test_large_requests_and_other_hosts_are_refused(exploring: Any, model: MVAE) -> None:
    app = exploring.page(model, CONTROLS, "made").server
    app.config["TRUSTED_HOSTS"] = exploring.LOCAL
    client = app.test_client()
    assert client.get("/", headers={"Host": "127.0.0.1:8050"}).status_code == 200
    assert client.get("/", headers={"Host": "elsewhere.example"}).status_code == 400
    body = b"{" + b" " * (exploring.UPLOAD * 3 // 2) + b"}"
    done = client.post("/_dash-update-component", data=body, content_type="application/json")
    assert done.status_code == 413


# The page in a browser


@pytest.fixture
def address(exploring: Any, trained: Trained, tmp_path: Path) -> Iterator[str]:
    """Where explore.py serves the model of the made digits."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    logs = tmp_path / "out", tmp_path / "err"
    (tmp_path / "temporary").mkdir()
    words = [trained.out_dir / checkpoint.BEST, "--port", 0]
    env = environment(TMPDIR=str(tmp_path / "temporary"))
    process = start_warm("mnist/explore.py", *words, logs=logs, cwd=tmp_path, env=env)
    until = time.monotonic() + 100
    while not (found := re.search(r"http://127\.0\.0\.1:\d+/", logs[0].read_text() if logs[0].exists() else "")):
        assert process.is_alive(), logs[1].read_text()
        assert time.monotonic() < until
        time.sleep(0.05)
    yield found[0]
    assert process.pid
    os.kill(process.pid, signal.SIGINT)
    process.join(timeout=30)
    assert (process.exitcode, logs[1].read_text()) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "err", "temporary", "own.png"}
    assert list((tmp_path / "temporary").iterdir()) == []


def test_page_draws_loads_clears_and_believes(address: str, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    image = Image.new("L", (60, 60), 255)
    image.paste(0, (25, 8, 35, 52))
    image.save(tmp_path / "own.png")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 900})
        asked: list[str] = []
        wrong: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))

        def said(words: str) -> None:
            page.wait_for_function("words => document.querySelector('#bounds')?.innerText.includes(words)", arg=words)

        def samples() -> str:
            return page.get_attribute("#image-samples", "src")

        page.goto(address)
        said("nothing is given")
        prior = samples()
        page.click("#resample")
        page.wait_for_function("before => document.querySelector('#image-samples').src != before", arg=prior)

        box = page.locator("#image-board .nsewdrag").bounding_box()
        page.mouse.move(box["x"] + 140, box["y"] + 40)
        page.mouse.down()
        page.mouse.move(box["x"] + 140, box["y"] + 230, steps=5)
        page.mouse.up()
        said("log p(image)")
        drawn = page.get_attribute("#image-said img", "src")
        page.click("#image-clear")
        said("nothing is given")

        page.set_input_files("#image-file input", str(tmp_path / "own.png"))
        said("log p(image)")
        page.wait_for_function("document.querySelector('#image-said').innerText.includes('inverted')")
        assert page.get_attribute("#image-said img", "src") != drawn
        page.click("#text-value")
        page.get_by_role("option", name="7").click()
        said("log p(image, text)")
        assert page.locator("#expected .bar").count() == 10
        assert "text" in page.inner_text("#experts")

        wrong_file = {"name": "other.png", "mimeType": "image/png", "buffer": b"no picture"}
        page.set_input_files("#image-file input", files=[wrong_file])
        said("log p(text)")
        assert "this is no picture" in page.inner_text("#image-said")
        browser.close()
    assert wrong == []
    assert {url.split("/")[2] for url in asked if url.startswith("http")} == {address.split("/")[2]}
