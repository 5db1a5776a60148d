"""vision/setup.py, run as a user runs it: grey pictures, edges and masks of synthetic faces, with a predictor trained
here on them; and vision/watermark.py."""

import bz2
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from mvae.errors import UserError
from synthetic import __main__ as synthetic
from vision import setup, watermark

import cv2
import dlib
import numpy as np
import pytest
from PIL import Image
from skimage import feature

from helpers import ROOT, assert_ended, assert_refused, environment, run_warm, start_warm

SCRIPT = "vision/setup.py"
N_FACES = 16  # and one each for validation and test
FILLED = ((17, 22), (22, 27), (27, 36), (36, 42), (42, 48), (48, 68))  # brows, nose, eyes, mouth
JAW = (0, 17)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Synthetic faces by file name: the picture, uint8 (218, 178, 3), and its landmarks, (68, 2) in pixels."""
    folder = tmp_path_factory.mktemp("faces")
    splits = ["--train", str(N_FACES), "--val", "1", "--test", "1"]
    synthetic.main(["faces", str(folder), *splits])
    rows = (folder / "celeba" / "Anno" / "list_landmarks_68.txt").read_text().splitlines()[2:]
    result = {}
    for name, *numbers in map(str.split, rows):
        landmarks = np.array(numbers, dtype=float).reshape(68, 2).round().astype(np.int32)
        result[name] = read(folder / "celeba" / "img_align_celeba" / name), landmarks
    return result


@pytest.fixture(scope="module")
def predictor(faces: dict[str, tuple[np.ndarray, np.ndarray]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A predictor that is overfitted to the faces that the detector finds."""
    images, detections = [], []
    for image, landmarks in faces.values():
        face = setup.find_face(Image.fromarray(image)) or setup.aligned_face((178, 218))
        images.append(image)
        detections.append([dlib.full_object_detection(face, [dlib.point(*point) for point in landmarks.tolist()])])
    options = dlib.shape_predictor_training_options()
    options.cascade_depth, options.num_trees_per_cascade_level, options.tree_depth = 5, 30, 3
    options.oversampling_amount, options.nu, options.feature_pool_size = 5, 0.25, 200
    path = tmp_path_factory.mktemp("predictor") / "small.dat"
    dlib.train_shape_predictor(images, detections, options).save(str(path))
    return path


@pytest.fixture(scope="module")
def face_pictures(faces: dict[str, tuple[np.ndarray, np.ndarray]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four faces and a picture without one, blank.png, all lossless."""
    folder = tmp_path_factory.mktemp("face_pictures")
    for name, (image, _) in list(faces.items())[:4]:
        Image.fromarray(image).save((folder / name).with_suffix(".png"))
    Image.new("RGB", (178, 218), (90, 120, 160)).save(folder / "blank.png")
    return folder


@pytest.fixture(scope="module")
def masks(face_pictures: Path, predictor: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The masks of `face_pictures`, made by one worker, and the output of the run. Read-only."""
    folder = tmp_path_factory.mktemp("masks")
    done = run_warm(SCRIPT, "mask", face_pictures, folder, "--predictor", predictor, "--workers", 1, cwd=folder)
    assert_ended(done)
    return folder, done.stdout


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of discs and lines in several formats, modes and sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i, suffix in enumerate((".png", ".png", ".jpg", ".JPG", ".webp")):
        canvas = rng.integers(0, 256, 3, dtype=np.uint8) * np.ones((60 + 7 * i, 80, 3), dtype=np.uint8)
        for _ in range(3):
            colour = rng.integers(0, 256, 3).tolist()
            cv2.circle(canvas, rng.integers(10, 60, 2).tolist(), 12, colour, thickness=-1)
            cv2.line(canvas, rng.integers(0, 80, 2).tolist(), rng.integers(0, 80, 2).tolist(), colour, thickness=3)
        Image.fromarray(canvas).save(folder / f"{i}{suffix}")
    Image.fromarray(rng.integers(0, 256, (20, 30, 4), dtype=np.uint8)).save(folder / "rgba.png")
    Image.new("RGB", (1, 1), (10, 200, 30)).save(folder / "tiny.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def greys(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The grey pictures of `pictures`, made by one worker. Read-only."""
    folder = tmp_path_factory.mktemp("greys")
    assert_ended(run_warm(SCRIPT, "grayscale", pictures, folder / "grey", "--workers", 1, cwd=folder))
    return folder / "grey"


def luminance(path: Path) -> np.ndarray:
    """PIL's, of the picture on a white background."""
    with Image.open(path) as image:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return np.asarray(Image.alpha_composite(white, rgba).convert("L"))


def test_grey_is_pils_luminance_in_a_file_of_the_same_name_and_format(pictures: Path, greys: Path):
    assert {path.name for path in greys.iterdir()} == {path.name for path in pictures.iterdir()} - {"notes.txt"}
    for path in greys.iterdir():
        with Image.open(path) as grey, Image.open(pictures / path.name) as picture:
            assert (grey.format, grey.size) == (picture.format, picture.size)
    for path in pictures.glob("*.png"):
        np.testing.assert_array_equal(read(greys / path.name), luminance(path))
    assert np.abs(read(greys / "2.jpg") - luminance(pictures / "2.jpg").astype(int)).mean() < 1


def test_edges_are_cannys_white_on_black(pictures: Path, tmp_path: Path):
    assert_ended(run_warm(SCRIPT, "edge", pictures, tmp_path, cwd=tmp_path))
    n_white = 0
    for path in pictures.glob("*.png"):
        canny = feature.canny(luminance(path) / 255, sigma=2)
        np.testing.assert_array_equal(read(tmp_path / path.name), np.where(canny, 255, 0))
        n_white += canny.sum()
    assert n_white > 100


def test_a_rerun_makes_what_is_missing_or_cut_short(pictures: Path, greys: Path, tmp_path: Path):
    for name, content in contents(greys).items():
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, (0, 0))
    cut = tmp_path / "2.jpg"
    cut.write_bytes(cut.read_bytes()[:-100])
    (tmp_path / "tiny.png").unlink()
    done = run_warm(SCRIPT, "grayscale", pictures, tmp_path, cwd=tmp_path)
    assert_ended(done)
    assert "made 2, kept 5" in done.stdout
    assert {path.name for path in tmp_path.iterdir() if path.stat().st_mtime > 0} == {"2.jpg", "tiny.png"}
    assert contents(tmp_path) == contents(greys)


def test_overwrite_replaces_complete_results(pictures: Path, greys: Path, tmp_path: Path):
    (tmp_path / "0.png").write_bytes((pictures / "0.png").read_bytes())
    assert_ended(run_warm(SCRIPT, "grayscale", pictures, tmp_path, "--overwrite", "--limit", 1, cwd=tmp_path))
    assert contents(tmp_path) == {"0.png": (greys / "0.png").read_bytes()}


def test_limit_takes_pictures_evenly_by_name(pictures: Path, greys: Path, tmp_path: Path):
    """So that the official list, whose splits are ranges of names, leaves some in each."""
    assert_ended(run_warm(SCRIPT, "grayscale", pictures, tmp_path, "--limit", 3, cwd=tmp_path))
    names = sorted(contents(greys))
    assert sorted(contents(tmp_path)) == [names[0], names[len(names) // 3], names[2 * len(names) // 3]]


def test_damaged_pictures_are_named_and_counted_and_the_rest_is_done(pictures: Path, greys: Path, tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("0.png", "2.jpg", "3.JPG"):
        (source / name).write_bytes((pictures / name).read_bytes())
    (source / "cut.jpg").write_bytes((pictures / "2.jpg").read_bytes()[:-200])
    (source / "empty.png").touch()
    Image.new("1", (20_000, 20_000)).save(source / "large.png")
    (source / "sub.png").mkdir()
    (source / "broken.png").symlink_to("nowhere")
    os.mkfifo(source / "fifo.png")
    for name in ("Thumbs.db", "._0.png"):
        (source / name).write_bytes(b"junk")
    done = run_warm(SCRIPT, "grayscale", source, "grey", cwd=tmp_path)
    lines = sorted(done.stderr.splitlines())
    assert (done.returncode, len(lines)) == (1, 4)
    expected = ("cut.jpg: damaged", "empty.png: damaged", "large.png: larger than 50,000,000 pixels", "3 of 6")
    assert all(said in line for said, line in zip(expected, lines, strict=True))
    assert "skipped 5 of 11 entries of" in done.stdout
    assert contents(tmp_path / "grey") == {name: (greys / name).read_bytes() for name in ("0.png", "2.jpg", "3.JPG")}


def test_a_result_that_is_a_link_to_its_picture_is_not_overwritten(pictures: Path, tmp_path: Path):
    (tmp_path / "0.png").symlink_to(pictures / "0.png")
    for src, dst in ((pictures, tmp_path), (tmp_path, pictures)):
        config = setup.Config(command="grayscale", src=src, dst=dst, overwrite=True)
        with pytest.raises(UserError, match=r"0\.png is the same file as a picture of"):
            setup.convert(config, None, src / "0.png")


def test_a_mask_is_black_where_the_landmarks_regions_are(
    faces: dict[str, tuple[np.ndarray, np.ndarray]], masks: tuple[Path, str]
):
    for name, (_, landmarks) in list(faces.items())[:4]:
        regions = np.zeros((218, 178), dtype=np.uint8)
        for start, end in FILLED:
            cv2.fillConvexPoly(regions, cv2.convexHull(landmarks[start:end]), color=1)
        cv2.polylines(regions, [landmarks[slice(*JAW)]], isClosed=False, color=1, thickness=2)
        mask = read((masks[0] / name).with_suffix(".png"))
        assert set(np.unique(mask)) == {0, 255}
        black = mask == 0
        # the predictor is off by a pixel in places
        near = cv2.dilate(regions, np.ones((5, 5), dtype=np.uint8)) == 1
        assert black[regions == 1].mean() > 0.9
        assert near[black].mean() > 0.98


def test_without_a_face_the_mask_is_that_of_the_aligned_frame(predictor: Path, masks: tuple[Path, str]):
    image = Image.new("RGB", (178, 218), (90, 120, 160))
    expected = setup.mask(image, setup.aligned_face(image.size), setup.load_predictor(predictor))
    np.testing.assert_array_equal(read(masks[0] / "blank.png"), np.asarray(expected))
    assert (np.asarray(expected) == 0).mean() > 0.01
    assert "no face in 1 of the 5" in masks[1]


def test_without_a_face_and_the_fallback_the_mask_is_blank(
    face_pictures: Path, predictor: Path, masks: tuple[Path, str], tmp_path: Path
):
    arguments = ["--predictor", predictor, "--no-fallback", "--workers", 2]
    assert_ended(run_warm(SCRIPT, "mask", face_pictures, tmp_path, *arguments, cwd=tmp_path))
    assert (read(tmp_path / "blank.png") == 255).all()
    others = contents(masks[0])
    assert contents(tmp_path) == {**others, "blank.png": (tmp_path / "blank.png").read_bytes()}


def test_a_packed_predictor_is_found_at_the_default_path(
    face_pictures: Path, predictor: Path, masks: tuple[Path, str], tmp_path: Path
):
    (tmp_path / "data").mkdir()
    packed = tmp_path / "data" / "shape_predictor_68_face_landmarks.dat.bz2"
    packed.write_bytes(bz2.compress(predictor.read_bytes(), compresslevel=1))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    env = environment(TMPDIR=str(temporary))
    assert_ended(run_warm(SCRIPT, "mask", face_pictures, "masks", cwd=tmp_path, env=env))
    assert contents(tmp_path / "masks") == contents(masks[0])
    assert list(temporary.iterdir()) == []
    assert list(packed.parent.iterdir()) == [packed]


def test_a_missing_predictor_is_refused_with_its_address(pictures: Path, tmp_path: Path):
    done = run_warm(SCRIPT, "mask", pictures, "masks", cwd=tmp_path)
    where = "data/shape_predictor_68_face_landmarks.dat"
    assert_refused(done, 1, where, "dlib.net/files/shape_predictor_68_face_landmarks.dat.bz2")
    assert not (tmp_path / "masks").exists()


@pytest.mark.parametrize("content", [b"", b"no predictor", b"BZh9 no archive", None])
def test_a_file_that_is_not_a_predictor_is_refused(content: bytes | None, tmp_path: Path):
    if content is None:
        os.mkfifo(tmp_path / "a.dat")
    else:
        (tmp_path / "a.dat").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.dat"), setup.predictor_file(tmp_path / "a.dat"):
        pass


def test_a_predictor_of_five_points_is_refused(tmp_path: Path):
    points = [dlib.point(x, 2 * x) for x in range(5)]
    face = dlib.rectangle(0, 0, 15, 15)
    options = dlib.shape_predictor_training_options()
    options.cascade_depth, options.num_trees_per_cascade_level, options.oversampling_amount = 1, 1, 1
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)
    five = dlib.train_shape_predictor([image] * 2, [[dlib.full_object_detection(face, points)]] * 2, options)
    five.save(str(tmp_path / "five.dat"))
    with pytest.raises(UserError, match="68-point"), setup.predictor_file(tmp_path / "five.dat"):
        pass


def test_the_orientation_and_the_bits_of_a_picture_are_respected(tmp_path: Path):
    upright = np.arange(24 * 16).reshape(24, 16).astype(np.uint16) * 170
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees, clockwise
    Image.fromarray(np.ascontiguousarray(np.rot90(upright))).save(tmp_path / "a.png", exif=exif)
    config = setup.Config(command="grayscale", src=tmp_path, dst=tmp_path / "out")
    assert setup.convert(config, None, tmp_path / "a.png") == ("made", "")
    assert abs(read(tmp_path / "out" / "a.png") - upright / 257).max() <= 0.5


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["grayscale", "absent", "out"], 1, "absent"),
        (["grayscale", "empty", "out"], 1, "empty holds no pictures"),
        (["grayscale", "one", "one/../one"], 2, "src and dst must differ"),
        (["grayscale", "one", "one/a.png"], 1, "can't write one/a.png"),
        (["grayscale", "one", "out", "--workers=0"], 2, "workers must be"),
        (["edge", "one", "out", "--no-fallback"], 2, "masks only"),
    ],
)
def test_wrong_calls_are_refused(arguments: list[str], status: int, said: str, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "one" / "a.png")
    assert_refused(run_warm(SCRIPT, *arguments, cwd=tmp_path), status, said)
    assert not (tmp_path / "out").exists()


def test_of_several_faces_the_most_central_for_its_size_is_taken(monkeypatch: pytest.MonkeyPatch):
    large, in_the_corner = dlib.rectangle(40, 60, 140, 160), dlib.rectangle(0, 0, 40, 40)
    monkeypatch.setattr(setup, "_detector", lambda: lambda image, upsampled: [in_the_corner, large])
    assert setup.find_face(Image.new("L", (178, 218))) == large


@pytest.mark.parametrize(("by", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_run_that_is_stopped_leaves_whole_files_and_no_workers(
    by: signal.Signals, status: int, pictures: Path, tmp_path: Path
):
    (tmp_path / "source").mkdir()
    for i in range(5000):
        os.link(pictures / "0.png", tmp_path / "source" / f"{i:04d}.png")
    logs = tmp_path / "out", tmp_path / "err"
    process = start_warm(SCRIPT, "edge", "source", "edges", "--workers", 2, logs=logs, cwd=tmp_path)
    assert process.pid
    wait_for(lambda: len(list(tmp_path.glob("edges/*.png"))) > 20)
    workers = children(process.pid)
    assert len(workers) == 2
    for pid in (*workers, process.pid) if by == signal.SIGINT else (process.pid,):  # as a terminal does
        os.kill(pid, by)
    process.join(timeout=20)
    assert (process.exitcode, *(log.read_text() for log in logs)) == (status, "", "")
    wait_for(lambda: not any(is_alive(worker) for worker in workers))
    written = list(tmp_path.glob("edges/*.png"))
    assert len(written) < 5000
    assert len({path.read_bytes() for path in written}) == 1
    partial = {path.suffix for path in (tmp_path / "edges").iterdir()} - {".png"}
    assert partial <= (set() if by == signal.SIGINT else {".partial"})


def is_alive(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state) and not state.startswith("Z")


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise TimeoutError


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return [int(line) for line in listed.stdout.split()]


def test_the_watermark_is_what_its_script_draws():
    kept = read(ROOT / "vision" / "watermark.png")
    assert (kept.shape, kept.dtype) == ((64, 64, 4), np.uint8)
    assert np.abs(watermark.watermark().astype(int) - kept).max() <= 8  # versions of OpenCV may round differently
    opacity = kept[..., 3] / 255
    assert 0.4 < opacity.max() < 0.6
    assert 0.1 < (opacity > 0.1).mean() < 0.5
