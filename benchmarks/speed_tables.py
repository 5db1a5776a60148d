"""The tables of how fast it is: what step.py, loglike.py, growth.py, threads.py, peer.py and gpu.py wrote."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown import NOTHING, read, table

ORDER = ["mnist", "fashionmnist", "multimnist", "celeba", "celeba19", "vision"]
"""The experiments in the tables' order."""


def step_files(root: Path) -> list[dict[str, Any]]:
    return [read(path) for path in sorted(root.glob("results/step-*.json"))]


def speed(root: Path, document: Path) -> str:
    """A row for each timing of a step."""
    files = step_files(root)
    timed = [(file, step) for file in files for step in file["steps"]]
    if not timed:
        return NOTHING
    timed.sort(key=lambda pair: (pair[1]["device"], ORDER.index(pair[1]["experiment"])))
    rows = [
        [
            step["experiment"],
            str(step["batch_size"]),
            _device(file, step, files),
            step["precision"],
            "yes" if step["compiled"] else "no",
            *(_quartiles(step[name], ".1f") for name in ("plain_ms", "ours_ms")),
            *(_quartiles(step[name], ".2f") for name in ("plain / ours", "given only / ours")),
            f"{100 * step['data_share']:.1f} %",
        ]
        for file, step in timed
    ]
    columns = ["", "examples", "device", "precision", "compiled", "plain, ms", "ours, ms", "plain / ours"]
    columns += ["given only / ours", "share of the batch"]
    about = "*Milliseconds a step: median (lower to upper quartile) of blocks that take turns in one process."
    return "\n\n".join([table(columns, rows), f"{about} {_machines(files)}*", _commands(files)])


def memory(root: Path, document: Path) -> str:
    """A row for each experiment: peak memory of a step, and the time that loglike.py takes."""
    files = step_files(root)
    rows = []
    for file in files:
        minutes = {(row["experiment"], row["device"]): row["minutes"] for row in file["loglike"]}
        for row in file["memory"]:
            cells = []
            for kind in ("plain", "ours", "ours, compiled"):
                found = row.get(kind)
                before = f" ({found['before_mib']:.0f})" if found and "before_mib" in found else ""
                cells.append(f"{found['peak_mib']:.0f}{before}" if found else "–")
            key = (row["experiment"], row["device"])
            device = _device(file, {"device": row["device"], "threads": 1}, files)
            cells.append(_quartiles(minutes[key], ".1f") if key in minutes else "–")
            rows.append([row["experiment"], device, row["precision"], *cells])
    if not rows:
        return NOTHING
    rows.sort(key=lambda row: ORDER.index(row[0]))
    columns = ["", "device", "precision", "plain, MiB", "ours, MiB", "ours compiled, MiB", "loglike.py, minutes"]
    about = (
        "*Peak memory of a process that takes 10 steps; in brackets, Python and torch alone. loglike.py on 1,000 "
        "examples with 1,000 importance samples, extrapolated from 10; median (lower to upper quartile)."
    )
    return "\n\n".join([table(columns, rows), f"{about} {_machines(files)}*", _commands(files)])


def _device(file: Mapping[str, Any], step: Mapping[str, Any], files: Sequence[Mapping[str, Any]]) -> str:
    """Where a step ran; with the processor's name, if not all files are of one."""
    if step["device"] != "cpu":
        return file["gpu"]
    several = len({one["processor"] for one in files}) > 1
    threads = f"{step['threads']} thread{'s' * (step['threads'] > 1)}"
    return f"{file['processor'] if several else 'CPU'}, {threads}"


def _machines(files: Sequence[Mapping[str, Any]]) -> str:
    return " ".join(dict.fromkeys(f"{file['processor']}, torch {file['torch']}." for file in files))


def _commands(files: Sequence[Mapping[str, Any]]) -> str:
    return "```\n" + "\n".join(dict.fromkeys(file["command"] for file in files)) + "\n```"


def _quartiles(values: Sequence[float], digits: str) -> str:
    low, middle, high = values
    return f"{middle:{digits}} ({low:{digits}} to {high:{digits}})"


def loglike(root: Path, document: Path) -> str:
    """A row for each other way to estimate log-likelihoods, and a line on bfloat16."""
    files = [read(path) for path in sorted(root.glob("results/loglike-*.json"))]
    if not files:
        return NOTHING
    ways = [name for name in files[0]["ratios"] if name != "ours"]
    rows = [[file["experiment"], *(_quartiles(file["ratios"][way], ".2f") for way in ways)] for file in files]
    about = [
        "*Each way's time of the processor divided by that of loglike.py: median (lower to upper quartile) of turns."
    ]
    for file in files:
        for row in file.get("bf16 less fp32", []):
            if row["quantity"] in ("log p(image)", "log p(image, text)") and row["proposal"] == "q(z | image)":
                found = f"{row['mean']:.4f} ± {row['standard_error']:.4f}"
                moved = f"{file['experiment']}: bfloat16 moves {row['quantity']} of a trained model by {found} nats"
                about.append(f"{moved}, a mean over {row['n_examples']} examples.")
    commands = "```\n" + "\n".join(file["command"] for file in files) + "\n```"
    return "\n\n".join([table(["", *(f"{way} / ours" for way in ways)], rows), f"{' '.join(about)}*", commands])


def loglike_full(root: Path, document: Path) -> str:
    """A row for each run of loglike.py over a whole test split: how long it took, and what it found."""
    files = [read(path) for path in sorted(root.glob("results/full/*.json"))]
    if not files:
        return NOTHING
    rows = []
    for file in files:
        found = {(row["quantity"], row["proposal"]): row for row in file["log_likelihood"]}
        cells = []
        for name in ("log p(image)", "log p(image, text)"):
            row = found[name, "q(z | image)"]
            cells.append(f"{row['mean']:.3f} ± {row['standard_error']:.3f}")
        rows.append([file["precision"], str(file["jobs"]), f"{file['seconds'] / 60:.1f}", *cells])
    about = (
        f"*A model of mnist, all {files[0]['n_examples']:,} test images, {files[0]['n_samples']:,} importance samples "
        "of each quantity under each proposal.*"
    )
    columns = ["precision", "processes", "minutes", "log p(image)", "log p(image, text)"]
    return "\n\n".join([table(columns, rows), about, _commands(files)])


def of_one_file(made: Callable[[dict[str, Any]], str]) -> Callable[[Path, Path], str]:
    """The table that `made` makes of the results file of its name, if there is one."""

    def whole(root: Path, document: Path) -> str:
        path = root / "results" / f"{made.__name__}.json"
        return made(read(path)) if path.exists() else NOTHING

    return whole


@of_one_file
def growth(content: dict[str, Any]) -> str:
    """A row for each size of a step that grows: how steeply time and memory do, beside the arithmetic."""
    rows = []
    for name, found in content["growth"].items():
        values = [row["value"] for row in found["rows"]]
        slopes = [f"{found['slopes'][column]:.2f}" for column in ("ms", "flops", "held_bytes", "numbers")]
        rows.append([name, f"{values[0]} to {values[-1]}", *slopes])
    columns = ["what grows", "values", "time", "of the arithmetic", "memory", "of the numbers to be made"]
    about = (
        "*Slopes of the logarithm of a step's time and of what it keeps for its backward pass, over the larger half of "
        "the values: 1 is as steep as what grows. Beside each, that of the multiplications and of the numbers.*"
    )
    return "\n\n".join([table(columns, rows), about, f"```\n{content['command']}\n```"])


@of_one_file
def threads(content: dict[str, Any]) -> str:
    """A row for each experiment and number of other processes, a column for each way to run a step."""
    ways = list(dict.fromkeys(row["way"] for row in content["rows"]))
    rates = {(row["experiment"], row["busy"], row["way"]): row["rate"] for row in content["rows"]}
    keys = list(dict.fromkeys((row["experiment"], row["busy"]) for row in content["rows"]))
    rows = [[name, str(busy), *(f"{rates[name, busy, way][1]:.2f}" for way in ways)] for name, busy in keys]
    about = (
        "*Examples a second, by those of one thread with nothing beside: medians of turns. The other processes are "
        f"loops. {_machines([content])}*"
    )
    return "\n\n".join([table(["", "other processes", *ways], rows), about, _commands([content])])


@of_one_file
def peer(content: dict[str, Any]) -> str:
    """A row for each thing that both can do."""
    rows = [
        [name, *(_quartiles(ratios[other], ".2f") if other in ratios else "–" for other in ("MultiVae", "products"))]
        for name, ratios in content["ratios"].items()
    ]
    about = (
        f"*The time of MultiVae {content['multivae']}, which is always in float32, divided by ours; and that "
        "of the decoders' matrix products alone, which is the least there can be: median (lower to upper quartile) of "
        f"turns on one thread. {_machines([content])}*"
    )
    columns = ["mnist", "MultiVae / ours", "matrix products / ours"]
    return "\n\n".join([table(columns, rows), about, _commands([content])])


@of_one_file
def gpu(content: dict[str, Any]) -> str:
    """A row for each experiment and precision: a step as launched and as captured, beside the device's floors."""
    rows = [
        [
            row["experiment"],
            row["precision"],
            *(f"{row[name]:.2f}" for name in ("eager_ms", "captured_ms")),
            f"{row['eager_ms'] / row['captured_ms']:.2f}",
            *(f"{100 * row[name]:.0f} %" for name in ("eager_busy", "captured_busy")),
            *(f"{100 * row[f'{floor}_floor_ms'] / row['captured_ms']:.0f} %" for floor in ("products", "weights")),
        ]
        for row in content["steps"]["rows"]
    ]
    columns = ["", "precision", "launched, ms", "captured, ms", "launched / captured", "busy, launched"]
    columns += ["busy, captured", "share of the products", "share of the weights' traffic"]
    about = (
        "*A step's time, as its kernels are launched one by one and as they are captured; the share of the time in "
        "which some kernel runs; and what share of a captured step the matrix products and the weights' traffic would "
        f"take at the device's best rates. {content['gpu']}, torch {content['torch']}.*"
    )
    return "\n\n".join([table(columns, rows), about, _commands([content])])
