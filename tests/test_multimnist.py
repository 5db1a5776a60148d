"""MultiMNIST: the canvases, the networks, p(text | z) as a probability, and the scripts, run as processes."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

from multimnist import datasets
from multimnist import model as networks
from multimnist.datasets import Recipe
from mvae import cli
from mvae.errors import UsageError, UserError
from mvae.run import checkpoint
from synthetic.digits import digits as synthetic_digits

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers import assert_ended, assert_same_run, run_warm, stats

SMALL: dict[str, Any] = {"train": 300, "test": 50}
Digits = tuple[np.ndarray, np.ndarray]  # pictures and labels


def draw(images: np.ndarray, labels: np.ndarray, n: int = 1200, seed: int = 0, **recipe: Any) -> tuple[Any, list[str]]:
    """Canvases (n, 50, 50) and their texts."""
    rng = np.random.default_rng(seed)
    canvases, symbols = datasets.draw(images, labels, n, Recipe(**recipe), rng)
    return canvases, datasets.decode(torch.from_numpy(symbols))


@pytest.fixture(scope="module")
def digits() -> Digits:
    return synthetic_digits(300, np.random.default_rng(0))


@pytest.fixture(scope="module")
def blocks() -> Digits:
    """One picture a class: digit d is a block in the centre, 4 + 2 d pixels high, 12 wide, of brightness 20 (d + 1)."""
    images = np.zeros((10, 28, 28), np.uint8)
    for digit in range(10):
        images[digit, 12 - digit : 16 + digit, 8:20] = 20 * (digit + 1)
    return images, np.arange(10, dtype=np.uint8)


# The canvases


def test_digits_are_at_the_corners_in_reading_order(digits: Digits) -> None:
    images, labels = digits
    inner = slice(2, 19)  # where neighbouring squares don't overlap
    squares = datasets._scaled(images, 21)[:, inner, inner]
    known = {(str(label), square.tobytes()) for label, square in zip(labels, squares, strict=True)}
    for canvas, text in zip(*draw(*digits), strict=True):
        for place, (top, left) in enumerate([(4, 4), (4, 23), (23, 4), (23, 23)]):
            shown = canvas[top : top + 21, left : left + 21][inner, inner]
            assert (text[place], shown.tobytes()) in known if place < len(text) else not shown.any()


def test_all_numbers_of_digits_within_the_bounds_are_equally_likely(digits: Digits) -> None:
    _, texts = draw(*digits, n=5000)
    counts = np.bincount([len(text) for text in texts], minlength=5)
    assert np.abs(counts - 1000).max() < 4 * np.sqrt(800)
    _, texts = draw(*digits, min_digits=2, max_digits=3)
    assert {len(text) for text in texts} == {2, 3}


def test_free_digits_are_anywhere_and_never_overlap(blocks: Digits) -> None:
    canvases, texts = draw(*blocks, n=5000, fixed=False)
    areas = (datasets._scaled(blocks[0], Recipe(fixed=False).side) > 0).sum(axis=(1, 2))
    assert (canvases > 0).sum(axis=(1, 2)).tolist() == [sum(areas[int(digit)] for digit in text) for text in texts]
    assert (canvases.max(axis=0)[5:45, 5:45] > 0).all()


def test_free_digits_are_read_by_halves_from_left_to_right(blocks: Digits) -> None:
    whole: dict[str, Any] = {"fixed": False, "no_resize": True, "max_digits": 2, "no_repeat": True}
    for canvas, text in zip(*draw(*blocks, n=300, **whole), strict=True):
        rows, columns = np.array([np.argwhere(canvas == 20 * (int(d) + 1)).mean(axis=0) for d in text]).reshape(-1, 2).T
        assert np.lexsort((columns, rows >= 24.5)).tolist() == list(range(len(text)))


def test_one_digit_in_the_centre(blocks: Digits) -> None:
    whole: dict[str, Any] = {"fixed": False, "no_resize": True, "no_translate": True, "min_digits": 1, "max_digits": 1}
    for canvas, text in zip(*draw(*blocks, n=50, **whole), strict=True):
        assert (canvas[11:39, 11:39] == blocks[0][int(text)]).all()


def test_digits_that_cannot_make_canvases_are_refused() -> None:
    pictures, labels = np.zeros((3, 28, 28), np.uint8), np.arange(3, dtype=np.uint8)
    with pytest.raises(UserError, match="too large to place"):
        draw(pictures + np.uint8(255), labels, n=20, fixed=False, no_resize=True, max_digits=2)
    with pytest.raises(UserError, match="4 classes"):
        draw(pictures, labels, n=20, no_repeat=True)


def test_scramble_and_reverse_change_the_order_of_the_text_only(digits: Digits) -> None:
    plain, scrambled, turned = draw(*digits), draw(*digits, scramble=True), draw(*digits, reverse=True)
    assert (plain[0] == scrambled[0]).all()
    assert (plain[0] == turned[0]).all()
    assert [sorted(text) for text in plain[1]] == [sorted(text) for text in scrambled[1]]
    orders = {tuple(map(text.index, other)) for text, other in zip(plain[1], scrambled[1], strict=True)}
    assert orders >= set(itertools.permutations(range(4)))
    pairs = [(text, other) for text, other in zip(plain[1], turned[1], strict=True) if text != text[::-1]]
    assert all(other in (text, text[::-1]) for text, other in pairs)
    assert 0.4 < np.mean([text != other for text, other in pairs]) < 0.6


def test_canvases_follow_from_the_seed_and_no_repeat_makes_digits_differ(digits: Digits) -> None:
    recipe: dict[str, Any] = {"fixed": False, "scramble": True, "no_repeat": True}
    first, again, other = (draw(*digits, n=300, seed=seed, **recipe) for seed in (0, 0, 1))
    assert (first[0] == again[0]).all()
    assert first[1] == again[1] != other[1]
    assert all(len(set(text)) == len(text) for text in first[1])


def test_impossible_recipes_are_refused() -> None:
    for flags, said in (
        ("--min-digits=3 --max-digits=2", "got 3 and 2"),
        ("--max-digits=5", "max_digits <= 4"),
        ("--no-resize", "need --no-fixed"),
        ("--no-translate --max-digits=1", "need --no-fixed"),
        ("--no-fixed --no-translate", "--max-digits 1"),
        ("--no-fixed --no-resize", "--max-digits 2"),
        ("--scramble --reverse", "can't be combined"),
        ("--train=0", "train must be"),
    ):
        with pytest.raises(UsageError, match=said):
            cli.parse(None, Recipe, flags.split())


def test_a_recipes_command_makes_that_recipe() -> None:
    for flags in ("", "--max-digits 2 --no-fixed --no-resize --reverse --seed 7"):
        recipe = cli.parse(None, Recipe, flags.split())
        assert cli.parse(None, Recipe, recipe.command.split()[2:]) == recipe


# The file of canvases


def test_prepare_makes_missing_canvases_and_keeps_existing_ones(digits_dir: Path, tmp_path: Path) -> None:
    recipe = dataclasses.asdict(Recipe(**SMALL, fixed=False, seed=5))
    assert datasets.prepare(digits_dir, tmp_path / "new", recipe) == recipe
    assert datasets.prepare(tmp_path / "no data", tmp_path / "new") == recipe
    train, validation = datasets.training_data(tmp_path / "new", n_val=25)
    test = datasets.test_data(tmp_path / "new")
    assert (len(train), len(validation), len(test)) == (275, 25, 50)
    batch, _ = test.batch(torch.arange(50))
    assert (batch["image"].shape, batch["image"].amin()) == ((50, 1, 50, 50), 0)
    assert 0.9 < batch["image"].amax() <= 1
    assert (batch["text"].shape, batch["text"].dtype) == ((50, 4), torch.long)
    with pytest.raises(UserError, match=r"python datasets.py .*--scramble"):
        datasets.prepare(digits_dir, tmp_path / "new", recipe | {"scramble": True})


def test_a_damaged_file_is_refused(digits_dir: Path, tmp_path: Path) -> None:
    datasets.make(digits_dir, tmp_path, Recipe(**SMALL))
    path = tmp_path / datasets.FILE
    content = path.read_bytes()
    for place in (len(content) // 2, content.index(b"max_digitsq") + 13):  # in a canvas, and in the recipe
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError, match=r"canvases.pt is damaged: .*`python datasets.py`"):
            datasets.prepare(digits_dir, tmp_path)
    path.write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"canvases.pt is damaged: .*`python datasets.py`"):
        datasets.prepare(digits_dir, tmp_path)


def test_texts_keep_their_leading_zeros_and_other_strings_are_refused() -> None:
    for text in ("", "0", "007", "1773"):
        assert datasets.decode(datasets.encode(text).unsqueeze(0)) == [text]
    for text in ("12345", "1a", " 1", "-1", "４"):
        with pytest.raises(UsageError, match="0 to 4 digits"):
            datasets.CONTROLS["text"].values(f"1,{text}")


# The networks


@pytest.fixture
def text_given_z(monkeypatch: pytest.MonkeyPatch) -> Any:
    """p(text | z) of 5 latents, with few units and large random weights, in float64."""
    monkeypatch.setattr(networks, "HIDDEN", 20)
    torch.manual_seed(0)
    likelihood = networks.Text(networks.TextDecoder(5)).double()
    for weight in likelihood.parameters():
        weight.data *= 3
    return likelihood


Z = torch.tensor([[0.3, -1.0, 2.0, 0.0, -0.5]], dtype=torch.float64)


@pytest.fixture
@torch.no_grad()
def probability(text_given_z: Any) -> dict[str, float]:
    """p(text | Z) of each of the 11,111 texts."""
    texts = ["".join(text) for length in range(5) for text in itertools.product("0123456789", repeat=length)]
    symbols = torch.stack([datasets.encode(text) for text in texts])
    return dict(zip(texts, text_given_z.log_prob(Z.expand(len(texts), -1), symbols).exp().tolist(), strict=True))


@torch.no_grad()
def test_networks_have_the_papers_sizes_and_read_every_place_of_a_text() -> None:
    torch.manual_seed(0)
    model = networks.build_model(100)
    assert sum(weight.numel() for weight in model.encoders.parameters()) == 1_841_936
    assert model.likelihood("image").mean(torch.zeros(2, 3, 100)).shape == (2, 3, 1, 50, 50)
    texts = torch.stack([datasets.encode(text) for text in ("1773", "0773", "1073", "1703", "1770", "177")])
    mu, _ = model.encoders["text"](texts)
    assert (mu[1:] != mu[0]).any(dim=1).all()


def test_recurrent_networks_and_their_gradients_are_those_of_gru() -> None:
    torch.manual_seed(0)
    encoder, decoder = networks.TextEncoder(5).double(), networks.TextDecoder(5).double()
    read, write = nn.GRU(200, 200, batch_first=True, bidirectional=True), nn.GRU(205, 200, 2, batch_first=True)
    for network, gru in ((encoder, read), (decoder, write)):
        gru.double().load_state_dict(network.gru.state_dict())
    texts = torch.randint(networks.N_SYMBOLS, (20, 4))
    z = torch.randn(20, 5, dtype=torch.float64, requires_grad=True)

    forward, backward = read(encoder.embedding(texts))[0].chunk(2, dim=2)
    code = [layer(forward[:, -1] + backward[:, 0]) for layer in (encoder.mu, encoder.logvar)]
    everywhere = z.unsqueeze(1).expand(-1, 4, -1)
    inputs = torch.cat([F.silu(decoder.embedding(texts)), everywhere], dim=2)
    hidden, state = write(inputs, decoder.state(z).repeat(2, 1, 1))
    expected = *code, decoder.logits(torch.cat([hidden, everywhere], dim=2)), state

    found = *encoder(texts), *decoder(z, texts)
    torch.testing.assert_close(found, expected)
    others = [z, *encoder.embedding.parameters(), *decoder.embedding.parameters(), *decoder.state.parameters()]
    gradients = (
        torch.autograd.grad(sum(part.square().sum() for part in results), [*others, *weights])
        for results, weights in (
            (found, [*encoder.gru.parameters(), *decoder.gru.parameters()]),
            (expected, [*read.parameters(), *write.parameters()]),
        )
    )
    torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_all_texts_together_have_probability_one_and_other_strings_none(
    text_given_z: Any, probability: dict[str, float]
) -> None:
    assert len(probability) == 11_111
    assert sum(probability.values()) == pytest.approx(1, abs=1e-12)
    assert max(probability.values()) > 100 / 11_111
    fill = datasets.FILL
    after_end = torch.tensor([[fill, 1, fill, fill], [1, fill, 2, 3], [1, 2, fill, 3]])
    assert (text_given_z.log_prob(Z.expand(3, -1), after_end) == -torch.inf).all()


@torch.no_grad()
def test_in_bfloat16_probabilities_still_sum_to_one() -> None:
    torch.manual_seed(0)
    likelihood, z = networks.Text(networks.TextDecoder(5)), 3 * torch.randn(20, 5)
    with torch.autocast("cpu", torch.bfloat16):
        total = likelihood.mean(z).double().sum(dim=2)
        assert likelihood.log_prob(z, datasets.encode("1773").expand(20, -1)).dtype == torch.float32
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)


@torch.no_grad()
def test_symbols_that_are_not_a_text_are_refused() -> None:
    model = networks.build_model(5)
    for text in ([1, 10, 2, 10], [-1, 10, 10, 10], [11, 10, 10, 10]):
        with pytest.raises(UsageError, match="digits 0 to 9, and after them 10 only"):
            model.check({"text": torch.tensor([text])}, names=["text"])


@torch.no_grad()
def test_teacher_forcing_is_the_chain_rule(text_given_z: Any, probability: dict[str, float]) -> None:
    """In decoding, p(symbol | previous symbols) is a ratio of sums over texts."""

    def begins(prefix: str) -> float:
        return sum(p for other, p in probability.items() if other.startswith(prefix))

    for text in ("", "07", "1773"):
        state, previous = None, networks.START
        for place, symbol in enumerate(datasets.encode(text)[: len(text) + 1].tolist()):
            logits, state = text_given_z.decoder(Z, torch.tensor([[previous]]), state)
            both = begins(text[: place + 1]) if symbol != datasets.FILL else probability[text]
            found = logits.softmax(dim=2)[0, 0, symbol].item()
            assert found == pytest.approx(both / begins(text[:place]), rel=1e-9)
            previous = symbol


@torch.no_grad()
def test_stacked_latents_are_scored_as_single_ones(text_given_z: Any) -> None:
    z = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    text = torch.stack([datasets.encode(text) for text in ("", "0", "17", "1773")])
    single = [[text_given_z.eval().log_prob(z[i, j], text) for j in range(2)] for i in range(3)]
    stacked = text_given_z.train().log_prob(z, text)  # teacher forcing in training and in evaluation
    torch.testing.assert_close(stacked, torch.stack([torch.stack(row) for row in single]))


@torch.no_grad()
def test_draws_have_the_texts_probabilities(text_given_z: Any, probability: dict[str, float]) -> None:
    torch.manual_seed(0)
    n = 4000
    drawn = datasets.decode(text_given_z.sample(Z.expand(n, -1)))
    for text in sorted(probability, key=lambda text: probability[text])[-10:]:
        expected = probability[text]
        assert abs(drawn.count(text) / n - expected) < 4 * (expected * (1 - expected) / n) ** 0.5
    firsts = [sum(p for text, p in probability.items() if text[:1] == digit) for digit in [*"0123456789", ""]]
    squares = torch.tensor(firsts).square()
    odds = squares / squares.sum()  # at a temperature of 1/2
    found = text_given_z.sample(Z.expand(n, -1), temperature=0.5)[:, 0].bincount(minlength=11) / n
    assert ((found - odds).abs() < 4 * (odds * (1 - odds) / n).sqrt() + 1 / n).all()


@torch.no_grad()
def test_cold_draws_are_the_greedy_text(text_given_z: Any) -> None:
    z = torch.randn(2, 50, 5, generator=torch.Generator().manual_seed(0)).double()
    assert (text_given_z.sample(z, temperature=1e-6) == text_given_z.mean(z).argmax(dim=-1)).all()


# The scripts


@pytest.fixture(scope="module")
def trained(digits_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where datasets.py and train.py (two epochs of three steps) have run, with their default paths."""
    folder = tmp_path_factory.mktemp("multimnist")
    small = ("--train", 300, "--test", 50, "--data-dir", digits_dir)
    assert_ended(run_warm("multimnist/datasets.py", "--fixed", *small, cwd=folder))
    train(folder, digits_dir, "--epochs", 2)
    return folder


def train(folder: Path, digits_dir: Path, *arguments: object) -> None:
    small = ("--n-latents", 8, "--n-val", 30, "--limit", 120, "--batch-size", 40, "--annealing-epochs", 1)
    arguments = ("--lambda-text", "10.", *small, "--data-dir", digits_dir, *arguments)
    assert_ended(run_warm("multimnist/train.py", *arguments, cwd=folder))


def sample(folder: Path, *condition: object) -> tuple[bytes, list[str]]:
    """The picture and the texts of five samples."""
    arguments = ("trained_models/model_best.pth.tar", "--n-samples", 5, *condition)
    assert_ended(run_warm("multimnist/sample.py", *arguments, cwd=folder))
    return (folder / "sample_image.png").read_bytes(), (folder / "sample_text.txt").read_text().split("\n")[:-1]


def test_training_uses_the_canvases_of_datasets_and_resumes(digits_dir: Path, trained: Path) -> None:
    content = checkpoint.load(trained / "trained_models" / checkpoint.BEST, "multimnist")
    assert content["facts"]["canvases"] == dataclasses.asdict(Recipe(**SMALL))
    assert all(0 <= record["validation/text_accuracy"] <= 1 for record in stats(trained / "trained_models"))
    train(trained, digits_dir, "--out-dir", "resumed", "--epochs", 1)
    train(trained, digits_dir, "--out-dir", "resumed", "--epochs", 2, "--resume")
    assert_same_run(trained / "resumed", trained / "trained_models", "multimnist")


def test_samples_depend_on_their_condition(trained: Path) -> None:
    assert sample(trained)[0] != sample(trained, "--condition-on-text", "")[0]
    _, texts = sample(trained, "--condition-on-image", "", "--condition-on-text", "", "--draw", "--temperature", 2)
    assert [datasets.decode(datasets.encode(text).unsqueeze(0))[0] for text in texts] == texts
    assert len(set(texts)) > 1


def test_loglike_reports_both_accuracies(trained: Path) -> None:
    path = trained / "trained_models" / checkpoint.BEST
    few = ("--limit", 20, "--n-samples", 10, "--json", "found.json")
    assert_ended(run_warm("multimnist/loglike.py", path, *few, cwd=trained))
    found = json.loads((trained / "found.json").read_text())
    assert all(row["mean"] < 0 for row in found["log_likelihood"])
    model, _ = checkpoint.load_model(path, "multimnist", networks.build_model, torch.device("cpu"))
    batch, _ = datasets.test_data(trained / "data" / "MultiMNIST").batch(torch.arange(20))
    with torch.no_grad():
        read = model.likelihood("text").mean(model.posterior({"image": batch["image"]})[0]).argmax(dim=2)
    pairs = list(zip(datasets.decode(batch["text"]), datasets.decode(read), strict=True))
    right = [digit == other[i : i + 1] for text, other in pairs for i, digit in enumerate(text)]
    for kind, expected in (("whole strings", [text == other for text, other in pairs]), ("per digit", right)):
        accuracy = found["measures"][f"accuracy of the text predicted from the image, {kind}"]["mean"]
        assert accuracy == pytest.approx(np.mean(expected))
