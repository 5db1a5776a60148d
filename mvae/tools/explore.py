"""The page of an explore.py: an experiment's controls, the samples, and what the model believes.

It is served on this machine alone unless another host is named. Uploads are bounded in size, decoded as pictures and
nothing else, and kept in the page: nothing is written to disk. Nothing is loaded from elsewhere.
"""

import argparse
import base64
import logging
import re
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .. import checkpoint, maps, pictures
from ..datasets.picture_files import picture
from ..errors import UserError
from ..model import MVAE
from . import machine
from .beliefs import N_DRAWS, Beliefs, believe, strongest
from .kinds import Attributes, Controls, Label, Picture

try:
    from dash import Dash, Input, Output, State, ctx, dcc, html, no_update
    from werkzeug.serving import make_server
except ImportError:
    raise UserError("the page needs Dash: pip install -r requirements-explore.txt") from None

UPLOAD = 8 * 2**20
"""The largest file that is taken, in bytes; a request may have one and a half times as much."""

LOCAL = ["127.0.0.1", "localhost", "[::1]"]
N_SLIDERS = 8
BOARD = 280  # pixels: the drawing board's side
MOST_SHAPES = 500

STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 0; color: #222; background: #f6f6f4; }
h1 { font-size: 18px; margin: 0; } h2 { font-size: 14px; margin: 0 0 6px; }
header { padding: 10px 16px; background: #fff; border-bottom: 1px solid #ddd; }
main { display: grid; gap: 12px; padding: 12px 16px; align-items: start;
  grid-template-columns: auto minmax(0, 3fr) minmax(260px, 2fr); }
section { background: #fff; border: 1px solid #ddd; border-radius: 6px; padding: 10px 12px; margin-bottom: 12px; }
.samples img { image-rendering: pixelated; width: 100%; max-width: 620px; }
.seen { image-rendering: pixelated; width: 84px; height: 84px; background: #eee; vertical-align: middle; }
.loads { display: flex; gap: 8px; align-items: center; }
.load { border: 1px dashed #888; border-radius: 4px; padding: 3px 10px; cursor: pointer; }
.switch { display: grid; grid-template-columns: 145px auto; white-space: nowrap; }
.switch .dash-options-list { display: flex; flex-direction: row; gap: 6px; }
.slider { display: grid; grid-template-columns: 90px 1fr; align-items: center; }
.bar { display: grid; grid-template-columns: 150px 1fr 50px; gap: 6px; align-items: center; }
.bar i { display: block; height: 11px; background: #1f77b4; }
.said { color: #555; } .wrong { color: #b00; } button { margin-right: 6px; }
.key { display: inline-block; width: 10px; height: 10px; margin: 0 4px 0 10px; }
@media (max-width: 1000px) { main { grid-template-columns: 1fr; } }
"""


def explore(args: argparse.Namespace, experiment: str, build: Callable[[int], MVAE], controls: Controls) -> None:
    """Serves the page until it is interrupted. Raises UserError if the model or the port can't be had."""
    model, trained = checkpoint.load_model(args.model_path, experiment, build, machine.device(args))
    app = page(model, controls, f"{experiment}, epoch {trained.get('epoch', '?')}")
    if args.host in ("127.0.0.1", "localhost", "::1"):  # who names this address otherwise is another site's page
        app.server.config["TRUSTED_HOSTS"] = LOCAL
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with socket.socket(family) as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((args.host, args.port))
        except (OSError, UnicodeError) as error:  # of a host whose name is none, too
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"can't serve on {args.host}, port {args.port} ({reason}): name another `port`") from None
        taken.listen()
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else it has a line for each request
        port = taken.getsockname()[1]
        server = make_server(args.host, port, app.server, threaded=True, fd=taken.fileno())
        where = f"[{args.host}]" if ":" in args.host else args.host
        print(f"open http://{where}:{port}/ in a browser; Ctrl-C ends it", flush=True)
        server.serve_forever()


def page(model: MVAE, controls: Controls, title: str) -> Dash:
    """The page as an application: `page(...).server` is a WSGI one."""
    app = Dash("mvae", title=f"MVAE: {title}", update_title="", include_assets_files=False)
    app.index_string = app.index_string.replace("{%css%}", "{%css%}<style>" + STYLE + "</style>")
    app.server.config["MAX_CONTENT_LENGTH"] = UPLOAD * 3 // 2
    sliders = strongest(model, controls, N_SLIDERS)
    app.layout = _layout(controls, sliders, title)
    lock = threading.Lock()  # the model computes for one request at a time
    for name, kind in controls.items():
        if isinstance(kind, Picture):
            _take_pictures(app, name, kind)
    inputs = {
        "given": {name: _inputs(name, controls) for name in controls},
        "shifts": [Input(f"z{latent}", "value") for latent in sliders],
        "seed": Input("seed", "value"),
        "temperature": Input("temperature", "value"),
    }

    @app.callback(output=Output("found", "children"), inputs=inputs)
    def _update(given: dict[str, Any], shifts: list[float], seed: int | None, temperature: float) -> list[Any]:
        try:
            batch: dict[str, Tensor] = {}
            for name, value in given.items():
                batch |= _batch(name, value, controls)
            with lock:
                found = believe(
                    model,
                    controls,
                    batch,
                    n=pictures.COLUMNS,
                    seed=abs(int(seed or 0)),
                    temperature=max(float(temperature), 1e-3),
                    shifts={latent: float(shift) for latent, shift in zip(sliders, shifts, strict=True)},
                )
        except (argparse.ArgumentTypeError, ValueError) as error:
            return [html.Section(str(error), className="wrong")]
        return [_samples(found, controls), _expected(found), _experts(found, sliders), _bounds(found)]

    @app.callback(
        Output("seed", "value"), Input("resample", "n_clicks"), State("seed", "value"), prevent_initial_call=True
    )
    def _resample(_: int, seed: int | None) -> int:
        return abs(int(seed or 0)) + 1

    @app.callback(
        *(Output(f"z{latent}", "value") for latent in sliders), Input("level", "n_clicks"), prevent_initial_call=True
    )
    def _level(_: int) -> list[float]:
        return [0.0] * len(sliders)

    return app


# The controls.


def _layout(controls: Controls, sliders: Any, title: str) -> Any:
    given = [html.Section([html.H2(name), *_control(name, controls)]) for name in controls]
    noise = html.Section(
        [
            html.H2("Draws"),
            html.Div(["seed", dcc.Input(id="seed", type="number", min=0, step=1, value=0)], className="slider"),
            html.Div(["", html.Div(html.Button("resample", id="resample"))], className="slider"),
            html.Div(
                ["temperature", dcc.Slider(0, 2, 0.05, value=1, marks=None, id="temperature")], className="slider"
            ),
        ]
    )
    latents = html.Section(
        [
            html.H2("The strongest latents"),
            *(
                html.Div([f"z{i}", dcc.Slider(-3, 3, 0.1, value=0, marks=None, id=f"z{i}")], className="slider")
                for i in sliders
            ),
            html.Button("all to 0", id="level"),
            html.Div("what is added to this latent of every sample", className="said"),
        ]
    )
    columns = [html.Div(given), html.Div(id="found"), html.Div([noise, latents])]
    return html.Div([html.Header(html.H1(f"MVAE: {title}")), html.Main(columns)])


def _control(name: str, controls: Controls) -> list[Any]:
    """What gives a value of the control `name`."""
    kind = controls[name]
    if isinstance(kind, Picture):
        board = [
            dcc.Graph(
                id=f"{name}-board",
                figure=_board(kind),
                config={"displayModeBar": False},
                style={"width": BOARD, "height": BOARD},
            ),
            html.Div("draw above, or load a file:", className="said"),
        ]
        return [
            *(board if kind.pen else []),
            html.Div(
                [
                    dcc.Upload("load", id=f"{name}-file", accept="image/*", max_size=UPLOAD, className="load"),
                    html.Button("clear", id=f"{name}-clear"),
                ],
                className="loads",
            ),
            html.Div(id=f"{name}-said", className="said"),
            dcc.Store(id=f"{name}-picture"),
        ]
    if isinstance(kind, Label):
        options = [{"label": words, "value": i} for i, words in enumerate(kind.names)]
        return [dcc.Dropdown(options, id=f"{name}-value", placeholder="not given")]
    if isinstance(kind, Attributes):
        options = [{"label": words, "value": words} for words in ("there", "absent", "inferred")]
        rows = [
            html.Div(
                [words, dcc.RadioItems(options, "inferred", id=f"{name}-{words}", inline=True)], className="switch"
            )
            for words in kind.names
        ]
        if not kind.apart:
            rows.append(html.Div("one vector: when a switch is set, the others count as absent", className="said"))
        return rows
    return [
        dcc.Checklist([{"label": "given", "value": "given"}], id=f"{name}-given"),
        dcc.Input(id=f"{name}-value", type="text", placeholder=kind.metavar.split(",")[0], debounce=True, value=""),
    ]


def _inputs(name: str, controls: Controls) -> Any:
    """What `_batch` takes a control's value from."""
    kind = controls[name]
    if isinstance(kind, Picture):
        return Input(f"{name}-picture", "data")
    if isinstance(kind, Label):
        return Input(f"{name}-value", "value")
    if isinstance(kind, Attributes):
        return {words: Input(f"{name}-{words}", "value") for words in kind.names}
    return {"given": Input(f"{name}-given", "value"), "value": Input(f"{name}-value", "value")}


def _batch(name: str, value: Any, controls: Controls) -> dict[str, Tensor]:
    """The modalities that a control's value gives; none if it gives nothing.

    Raises ValueError, or argparse.ArgumentTypeError, for what is no value.
    """
    kind = controls[name]
    if isinstance(kind, Picture):
        return {name: _decoded(value, kind)} if value else {}
    if isinstance(kind, Label):
        return {} if value is None else kind.batch(name, kind.values(str(value))[0])
    if isinstance(kind, Attributes):
        there = {words: how == "there" for words, how in value.items() if how in ("there", "absent")}
        return kind.batch(name, there) if there else {}
    return kind.batch(name, kind.values(str(value["value"] or ""))[0]) if value["given"] else {}


def _take_pictures(app: Dash, name: str, kind: Picture) -> None:
    """Keeps in the page, as the model sees it, the picture that was loaded or drawn last."""
    outputs = [
        Output(f"{name}-picture", "data"),
        Output(f"{name}-said", "children"),
        Output(f"{name}-file", "contents"),
    ]
    inputs = [Input(f"{name}-clear", "n_clicks"), Input(f"{name}-file", "contents")]
    if kind.pen:
        outputs.append(Output(f"{name}-board", "figure"))
        inputs.append(Input(f"{name}-board", "relayoutData"))

    @app.callback(outputs, inputs, prevent_initial_call=True)
    def _take(_: int | None, contents: str | None, drawn: Any = None) -> Any:
        source, seen = ctx.triggered_id, None
        said: list[Any] = []
        if source == f"{name}-board" and "shapes" not in (drawn or {}):
            return [no_update] * len(outputs)
        try:
            if source == f"{name}-file" and contents:
                loaded = _decoded(contents, kind)
                seen = kind.on_its_ground(loaded, "the picture")
                said = ["what the model sees", "" if seen is loaded else ", inverted: its ground was light"]
            elif source == f"{name}-board":
                seen, said = _rasterised(drawn["shapes"], kind), ["what the model sees"]
        except ValueError as error:
            said = [html.Span(str(error), className="wrong")]
        url = None if seen is None else _url(pictures.png(pictures.as_bytes(seen[0])))
        shown = [] if url is None else [html.Img(src=url, className="seen"), " "]
        board = no_update if source == f"{name}-board" else _board(kind)
        return [url, [*shown, *said], None, board][: len(outputs)]


def _board(kind: Picture) -> dict[str, Any]:
    """An empty drawing board, as a figure of plotly."""
    axis = {"range": [0, BOARD], "visible": False, "fixedrange": True}
    return {
        "data": [],
        "layout": {
            "xaxis": axis,
            "yaxis": {**axis, "range": [BOARD, 0]},
            "margin": dict.fromkeys("lrtb", 0),
            "plot_bgcolor": "#000",
            "dragmode": "drawopenpath",
            "newshape": {"line": {"color": "#fff", "width": kind.pen * BOARD / kind.size}},
        },
    }


def _rasterised(shapes: list[dict[str, Any]], kind: Picture) -> Tensor:
    """The lines that were drawn on the board, as (1, 1, size, size) in [0, 1]. Raises ValueError for other shapes."""
    scale = 8  # it is drawn larger, and then reduced, so that its rims are soft
    image = Image.new("L", (kind.size * scale, kind.size * scale))
    pen, width = ImageDraw.Draw(image), kind.pen * scale
    for shape in shapes[:MOST_SHAPES]:
        numbers = [float(number) for number in re.findall(r"-?[\d.]+", str(shape.get("path", "")))]
        places = np.array(numbers[: len(numbers) // 2 * 2]).reshape(-1, 2) * (image.width / BOARD)
        line = [(x, y) for x, y in places.tolist()]
        if not line:
            continue
        pen.line(line, fill=255, width=round(width), joint="curve")
        for x, y in line[:1] + line[-1:]:
            pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=255)
    pixels = np.asarray(image.resize((kind.size, kind.size), Image.Resampling.BOX), dtype=np.float32) / 255
    return torch.from_numpy(pixels)[None, None]


def _decoded(url: str, kind: Picture) -> Tensor:
    """The picture of a data URL, (1, channels, size, size) in [0, 1]. Raises ValueError if it is none."""
    try:
        content = base64.b64decode(url.partition(",")[2], validate=True)
        if len(content) > UPLOAD:
            raise ValueError(f"more than {UPLOAD} bytes")
        return picture(content, kind.mode, kind.size)
    except Exception as error:  # PIL fails in many ways on a damaged file; each means the same to the user
        reason = f" ({error})" if type(error) is ValueError else ""
        raise ValueError(f"this is no picture, or a damaged one{reason}") from None


def _url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


# What was found.


def _samples(found: Beliefs, controls: Controls) -> Any:
    """A row of samples of each picture, and each sample's other values."""
    parts: list[Any] = []
    for name, kind in controls.items():
        values = found.samples[name]
        if isinstance(kind, Picture):
            sheet = pictures.Sheet(1, len(values), kind.size)
            for i, one in enumerate(values):
                sheet.put(0, i, one)
            parts.append(html.Img(src=_url(pictures.png(sheet.pixels)), id=f"{name}-samples", alt=f"samples of {name}"))
        else:
            lines = kind.lines(kind.likeliest(values))
            parts.append(html.Div(" | ".join(line or "–" for line in lines), id=f"{name}-samples", className="said"))
    return html.Section([html.H2("Samples"), *parts], className="samples")


def _expected(found: Beliefs) -> Any:
    """A bar for each value's probability, of each control that is no picture."""
    parts: list[Any] = []
    for name, values in found.expected.items():
        parts.append(html.H2(f"p({name} | what is given)"))
        for words, probability in values:
            bar = html.Span(html.I(style={"width": f"{100 * probability:.1f}%"}))
            parts.append(html.Div([words or "–", bar, f"{100 * probability:.1f} %"], className="bar"))
    return html.Section(parts, id="expected") if parts else ""


def _experts(found: Beliefs, sliders: Sequence[int]) -> Any:
    """A bar for each of the strongest latents: whose precision it is; and each expert's width."""
    colours = {name: "#bbb" if name == "prior" else maps.COLOURS[i % 10] for i, name in enumerate(found.shares)}
    keys = [html.Span([html.Span(className="key", style={"background": colours[name]}), name]) for name in found.shares]
    bars = []
    for latent in sliders:
        parts = [
            html.I(
                style={"width": f"{100 * share[latent]:.1f}%", "background": colours[name], "display": "inline-block"}
            )
            for name, share in found.shares.items()
        ]
        deciding = max(found.shares, key=lambda name: float(found.shares[name][latent]))
        bars.append(
            html.Div([f"z{latent}", html.Span(parts, style={"whiteSpace": "nowrap"}), deciding], className="bar")
        )
    widths = ", ".join(f"{name} {width:.2g}" for name, width in found.widths.items())
    return html.Section(
        [
            html.H2("Who decides: each expert's share of the precision of q(z | what is given)"),
            html.Div(keys),
            *bars,
            html.Div(f"standard deviations, geometric means over all latents: {widths}", className="said"),
        ],
        id="experts",
    )


def _bounds(found: Beliefs) -> Any:
    names = ", ".join(name for name in found.shares if name != "prior")
    if not names:
        return html.Section("nothing is given: these are draws from the prior", className="said", id="bounds")
    return html.Section(
        [
            html.H2(f"log p({names}), bounds in nats"),
            f"{found.log_p:.2f} by {N_DRAWS} importance samples, {found.elbo:.2f} by the ELBO",
        ],
        id="bounds",
    )
