"""Open a page in your browser: condition a trained model on what you like, and see what it draws and infers.

Run it in an experiment's folder: cd mnist && python -m mvae.tools.explore CHECKPOINT. It needs Dash: pip install -r
requirements-explore.txt. The page is served to this machine only, unless --host is set.
"""

import base64
import logging
import re
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .. import cli
from ..data.pictures import picture
from ..errors import UsageError, UserError
from ..model import MVAE
from ..run.checkpoint import load_model
from ..run.device import Machine
from ..run.grids import COLUMNS, Sheet, as_bytes, png
from ..run.maps import COLOURS
from .beliefs import N_DRAWS, Beliefs, believe, strongest
from .controls import Attributes, Controls, Kind, Label, Picture
from .folder import Experiment, experiment

try:
    from dash import Dash, Input, Output, State, ctx, dcc, html, no_update
    from werkzeug.serving import make_server
except ImportError:  # reported by main
    Dash = None  # type: ignore[assignment, misc]

# Safety: uploads are bounded in size, decoded as pictures and nothing else, and kept in the page. Nothing is written to
# disk, no file that a visitor names is read, and the page loads nothing from other servers.
UPLOAD = 8 * 2**20  # bytes of a file; a request may have one and a half times as many
LOCAL = ["127.0.0.1", "localhost", "[::1]"]

N_SLIDERS = 8
BOARD = 280  # pixels, the drawing board's side
MOST_SHAPES = 500  # on the drawing board

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


@dataclass(kw_only=True)
class Exploring(Machine):
    """The flags of this tool."""

    model_path: Path  # checkpoint, such as trained_models/model_best.pth.tar

    # Page
    port: int = 8050  # port to serve the page at; 0: a free one
    host: str = "127.0.0.1"  # address to serve the page at; another one lets other machines in

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.port < 2**16 or not self.host:  # an empty host would let other machines in
            raise UsageError(f"port must be from 0 to 65535 and host not empty, got {self.port}, {self.host!r}")


def explore(config: Exploring, folder: Experiment) -> None:
    """Serve the page until interrupted. Raises UserError if the model can't be loaded or the address can't be used."""
    model, trained = load_model(config.model_path, folder.name, folder.build_model, config.device())
    app = page(model, folder.controls, f"{folder.name}, epoch {trained.get('epoch', '?')}")
    host = config.host
    if host in ("127.0.0.1", "localhost", "::1"):  # a request that names this address differently is another site's
        app.server.config["TRUSTED_HOSTS"] = LOCAL
    try:
        taken = socket.create_server((host, config.port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:  # UnicodeError for an invalid host name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"can't serve on {host}, port {config.port} ({reason}): choose another --port") from None
    with taken:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # below that it logs every request
        port = taken.getsockname()[1]
        server = make_server(host, port, app.server, threaded=True, fd=taken.fileno())
        print(f"open http://{f'[{host}]' if ':' in host else host}:{port}/ in a browser; Ctrl-C ends it", flush=True)
        server.serve_forever()


def page(model: MVAE, controls: Controls, title: str) -> Dash:
    """Return the page as an application; `page(...).server` is its WSGI application."""
    app = Dash("mvae", title=f"MVAE: {title}", update_title="", include_assets_files=False)
    app.index_string = app.index_string.replace("{%css%}", "{%css%}<style>" + STYLE + "</style>")
    app.server.config["MAX_CONTENT_LENGTH"] = UPLOAD * 3 // 2
    sliders = strongest(model, controls, N_SLIDERS)
    widgets = {name: widget(name, kind) for name, kind in controls.items()}
    app.layout = _layout(widgets, sliders, title)
    lock = threading.Lock()  # the model computes for one request at a time
    for name, kind in controls.items():
        if isinstance(kind, Picture):
            _take_pictures(app, name, kind)
    inputs = {
        "given": {name: one.inputs for name, one in widgets.items()},
        "shifts": [Input(f"z{latent}", "value") for latent in sliders],
        "seed": Input("seed", "value"),
        "temperature": Input("temperature", "value"),
    }

    @app.callback(output=Output("found", "children"), inputs=inputs)
    def _update(given: dict[str, Any], shifts: list[float], seed: int | None, temperature: float) -> list[Any]:
        try:
            batch: dict[str, Tensor] = {}
            for name, value in given.items():
                batch |= widgets[name].batch(value)
            with lock:
                found = believe(
                    model,
                    controls,
                    batch,
                    n=COLUMNS,
                    seed=abs(int(seed or 0)),
                    temperature=max(float(temperature), 1e-3),
                    shifts={latent: float(shift) for latent, shift in zip(sliders, shifts, strict=True)},
                )
        except (UsageError, ValueError) as error:
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


# Controls


class Widget(NamedTuple):
    """A control on the page: its parts, the inputs that its value is made of, and the batch that a value means.

    The batch is empty if nothing is given; UsageError or ValueError is raised for an invalid value.
    """

    parts: list[Any]
    inputs: Any
    batch: Callable[[Any], dict[str, Tensor]]


def widget(name: str, kind: Kind) -> Widget:
    """Return the widget of a control."""
    if isinstance(kind, Picture):
        look: Any = {"config": {"displayModeBar": False}, "style": {"width": BOARD, "height": BOARD}}
        board = dcc.Graph(id=f"{name}-board", figure=_board(kind), **look)
        load = dcc.Upload("load", id=f"{name}-file", accept="image/*", max_size=UPLOAD, className="load")
        parts = [
            *([board, html.Div("draw above, or load a file:", className="said")] if kind.pen else []),
            html.Div([load, html.Button("clear", id=f"{name}-clear")], className="loads"),
            html.Div(id=f"{name}-said", className="said"),
            dcc.Store(id=f"{name}-picture"),
        ]
        url = Input(f"{name}-picture", "data")
        return Widget(parts, url, lambda url: {name: decoded(url, kind)} if url else {})
    if isinstance(kind, Label):
        options = [{"label": words, "value": i} for i, words in enumerate(kind.names)]
        parts = [dcc.Dropdown(options, id=f"{name}-value", placeholder="not given")]
        number = Input(f"{name}-value", "value")
        return Widget(parts, number, lambda i: {} if i is None else kind.batch(name, kind.values(str(i))[0]))
    if isinstance(kind, Attributes):
        how = [{"label": words, "value": words} for words in ("present", "absent", "inferred")]
        parts = [
            html.Div([words, dcc.RadioItems(how, "inferred", id=f"{name}-{words}", inline=True)], className="switch")
            for words in kind.names
        ]
        if not kind.separate:
            parts.append(html.Div("one vector: once a switch is set, the others count as absent", className="said"))

        def switched(values: dict[str, str]) -> dict[str, Tensor]:
            set_ = {words: how == "present" for words, how in values.items() if how in ("present", "absent")}
            return kind.batch(name, set_) if set_ else {}

        return Widget(parts, {words: Input(f"{name}-{words}", "value") for words in kind.names}, switched)
    parts = [
        dcc.Checklist([{"label": "given", "value": "given"}], id=f"{name}-given"),
        dcc.Input(id=f"{name}-value", type="text", placeholder=name, debounce=True, value=""),
    ]
    typed = {"given": Input(f"{name}-given", "value"), "value": Input(f"{name}-value", "value")}
    return Widget(parts, typed, lambda x: kind.batch(name, kind.values(str(x["value"] or ""))[0]) if x["given"] else {})


def _layout(widgets: dict[str, Widget], latents: Sequence[int], title: str) -> Any:
    def slider(name: str, part: Any) -> Any:
        return html.Div([name, part], className="slider")

    seed = dcc.Input(id="seed", type="number", min=0, step=1, value=0)
    temperature = dcc.Slider(0, 2, 0.05, value=1, marks=None, id="temperature")
    draws = [
        html.H2("Draws"),
        slider("seed", seed),
        slider("", html.Div(html.Button("resample", id="resample"))),
        slider("temperature", temperature),
    ]
    shifts = [
        html.H2("Strongest latents"),
        *(slider(f"z{i}", dcc.Slider(-3, 3, 0.1, value=0, marks=None, id=f"z{i}")) for i in latents),
        html.Button("all to 0", id="level"),
        html.Div("added to this latent of every sample", className="said"),
    ]
    given = [html.Section([html.H2(name), *one.parts]) for name, one in widgets.items()]
    columns = [html.Div(given), html.Div(id="found"), html.Div([html.Section(draws), html.Section(shifts)])]
    return html.Div([html.Header(html.H1(f"MVAE: {title}")), html.Main(columns)])


def _take_pictures(app: Dash, name: str, kind: Picture) -> None:
    """Keep in the page, as the model sees it, the picture that was loaded or drawn last."""
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
                loaded = decoded(contents, kind)
                seen = kind.on_dark(loaded, "the picture")
                said = ["what the model sees", "" if seen is loaded else ", inverted: its background was light"]
            elif source == f"{name}-board":
                seen, said = rasterised(drawn["shapes"], kind), ["what the model sees"]
        except ValueError as error:
            said = [html.Span(str(error), className="wrong")]
        url = None if seen is None else _url(png(as_bytes(seen[0])))
        shown = [] if url is None else [html.Img(src=url, className="seen"), " "]
        board = no_update if source == f"{name}-board" else _board(kind)
        return [url, [*shown, *said], None, board][: len(outputs)]


def _board(kind: Picture) -> dict[str, Any]:
    """Return an empty drawing board, as a plotly figure."""
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


def rasterised(shapes: list[dict[str, Any]], kind: Picture) -> Tensor:
    """Draw the board's lines as (1, 1, size, size) in [0, 1]. Raises ValueError for other shapes."""
    scale = 8  # drawn larger and then reduced, for soft edges
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


def decoded(url: str, kind: Picture) -> Tensor:
    """Decode the picture in a data URL, (1, channels, size, size) in [0, 1]. Raises ValueError if there isn't one."""
    try:
        content = base64.b64decode(url.partition(",")[2], validate=True)
        if len(content) > UPLOAD:
            raise ValueError(f"more than {UPLOAD} bytes")
        return picture(content, kind.mode, kind.size)
    except Exception as error:  # PIL raises errors of many kinds for a damaged file
        reason = f" ({error})" if type(error) is ValueError else ""
        raise ValueError(f"not a picture, or damaged{reason}") from None


def _url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


# Results


def _samples(found: Beliefs, controls: Controls) -> Any:
    """Show the samples of each control, as pictures or as text."""
    parts: list[Any] = []
    for name, kind in controls.items():
        values = found.samples[name]
        if kind.size:
            sheet = Sheet(1, len(values), kind.size)
            for i, one in enumerate(kind.pictures(values)):
                sheet.put(0, i, one)
            parts.append(html.Img(src=_url(png(sheet.pixels)), id=f"{name}-samples", alt=f"samples of {name}"))
        else:
            lines = kind.lines(kind.likeliest(values))
            parts.append(html.Div(" | ".join(line or "–" for line in lines), id=f"{name}-samples", className="said"))
    return html.Section([html.H2("Samples"), *parts], className="samples")


def _expected(found: Beliefs) -> Any:
    """Show a bar for each value's probability."""
    parts: list[Any] = []
    for name, values in found.expected.items():
        parts.append(html.H2(f"p({name} | given)"))
        for words, probability in values:
            bar = html.Span(html.I(style={"width": f"{100 * probability:.1f}%"}))
            parts.append(html.Div([words or "–", bar, f"{100 * probability:.1f} %"], className="bar"))
    return html.Section(parts, id="expected") if parts else ""


def _experts(found: Beliefs, latents: Sequence[int]) -> Any:
    """Show a bar for each of the strongest latents, divided between the experts by precision; and their widths."""
    colours = {name: "#bbb" if name == "prior" else COLOURS[i % len(COLOURS)] for i, name in enumerate(found.shares)}
    keys = [html.Span([html.Span(className="key", style={"background": colours[name]}), name]) for name in found.shares]
    bars = []
    for latent in latents:
        shares = {name: float(share[latent]) for name, share in found.shares.items()}
        parts = [
            html.I(style={"width": f"{100 * share:.1f}%", "background": colours[name], "display": "inline-block"})
            for name, share in shares.items()
        ]
        bar = html.Span(parts, style={"whiteSpace": "nowrap"})
        bars.append(html.Div([f"z{latent}", bar, max(shares, key=shares.__getitem__)], className="bar"))
    widths = ", ".join(f"{name} {width:.2g}" for name, width in found.widths.items())
    return html.Section(
        [
            html.H2("Each expert's share of the precision of q(z | given)"),
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
    text = f"{found.log_p:.2f} by {N_DRAWS} importance samples, {found.elbo:.2f} by the ELBO"
    return html.Section([html.H2(f"log p({names}), bounds in nats"), text], id="bounds")


def main() -> None:
    if Dash is None:
        raise UserError("the page needs Dash: pip install -r requirements-explore.txt")
    folder = experiment()
    explore(cli.parse(__doc__, Exploring), folder)


if __name__ == "__main__":
    cli.run(main)
