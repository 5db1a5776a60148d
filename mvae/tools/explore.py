"""Open a page in your browser: condition a trained model on what you like, and see what it draws and infers.

Run it in an experiment's folder: cd mnist && python -m mvae.tools.explore CHECKPOINT. It needs Dash: pip install -r
requirements-explore.txt. The page is served to this machine only, unless --host is set.
"""

import base64
import logging
import re
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from ..run.grids import COLUMNS, as_bytes, grid, png
from ..run.maps import COLOURS
from .beliefs import N_DRAWS, bounds, probabilities, shares, strongest
from .controls import Attributes, Controls, Kind, Label, Picture
from .folder import Experiment, experiment
from .sampling import Row, draw

try:
    from dash import Dash, Input, Output, ctx, dcc, html, no_update
    from dash.exceptions import PreventUpdate
    from werkzeug.serving import make_server
except ImportError:  # reported by main
    Dash = None  # type: ignore[assignment, misc]

# Safety: uploads are bounded in size, decoded as pictures and nothing else, and kept in the page. Nothing is written to
# disk, no file that a visitor names is read, and the page loads nothing from other servers.
UPLOAD = 8 * 2**20  # bytes of a file; a request may have one and a half times as many
LOCAL = ["127.0.0.1", "localhost"]

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
.bar span { white-space: nowrap; } .bar i { display: inline-block; height: 11px; }
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
    if config.host in LOCAL:  # a request that names this address differently is another site's
        app.server.config["TRUSTED_HOSTS"] = LOCAL
    try:
        taken = socket.create_server((config.host, config.port))
    except (OSError, UnicodeError) as error:  # UnicodeError for an invalid host name
        raise UserError(f"can't serve on {config.host}, port {config.port}: {error}") from None
    with taken:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # below that it logs every request
        port = taken.getsockname()[1]
        server = make_server(config.host, port, app.server, threaded=True, fd=taken.fileno())
        print(f"open http://{config.host}:{port}/ in a browser; Ctrl-C ends it", flush=True)
        server.serve_forever()


def page(model: MVAE, controls: Controls, title: str) -> Dash:
    """Return the page as an application; `page(...).server` is its WSGI application."""
    app = Dash("mvae", title=f"MVAE: {title}", update_title="", include_assets_files=False)
    app.index_string = app.index_string.replace("{%css%}", "{%css%}<style>" + STYLE + "</style>")
    app.server.config["MAX_CONTENT_LENGTH"] = UPLOAD * 3 // 2
    latents = strongest(model, controls, N_SLIDERS)
    widgets = {name: widget(name, kind) for name, kind in controls.items()}
    sections = [html.Section([html.H2(name), *parts]) for name, (parts, _) in widgets.items()]
    columns = [html.Div(sections), html.Div(id="found"), html.Div(_sliders(latents))]
    app.layout = html.Div([html.Header(html.H1(f"MVAE: {title}")), html.Main(columns)])
    for name, kind in controls.items():
        if isinstance(kind, Picture):
            _take_pictures(app, name, kind)
    texts = {name: kind for name, kind in controls.items() if not kind.size}
    device = next(model.parameters()).device
    lock = threading.Lock()  # the model computes for one request at a time
    inputs = {
        "values": {name: some for name, (_, some) in widgets.items()},
        "shifts": {str(latent): Input(f"z{latent}", "value") for latent in latents},
        "seed": Input("seed", "value"),
        "temperature": Input("temperature", "value"),
    }

    @app.callback(output=Output("found", "children"), inputs=inputs)
    def _update(values: dict[str, Any], shifts: dict[str, float], seed: int | None, temperature: float) -> list[Any]:
        batch: dict[str, Tensor] = {}
        try:
            for name, kind in controls.items():
                batch |= given(name, kind, values[name])
        except (UsageError, ValueError) as error:
            return [html.Section(str(error), className="wrong")]
        batch = {name: batch[name].to(device) for name in model.modalities if name in batch}
        seed, temperature = abs(int(seed or 0)), max(float(temperature), 1e-3)
        with lock, torch.no_grad():
            mu, logvar = model.posterior(batch)
            shift = mu.new_tensor([float(shifts.get(str(latent), 0)) for latent in range(model.n_latents)])
            row = Row("", batch, mu + shift, logvar)
            samples = next(draw(model, controls, [row], n=COLUMNS, seed=seed, temperature=temperature))
            means = next(draw(model, texts, [row._replace(mu=mu)], n=N_DRAWS, seed=seed))
            parts = [_samples(samples, controls), _expected(means, controls)]
            return [*parts, _experts(*shares(model, batch), latents), _bounds(model, batch, seed)]

    @app.callback([Output(f"z{i}", "value") for i in latents], Input("level", "n_clicks"), prevent_initial_call=True)
    def _level(_: int) -> list[float]:
        return [0.0] * len(latents)

    return app


# Controls


def widget(name: str, kind: Kind) -> tuple[list[Any], Any]:
    """Return a control's parts on the page, and the inputs whose value `given` reads."""
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
        return parts, Input(f"{name}-picture", "data")
    if isinstance(kind, Label):
        options = [{"label": words, "value": i} for i, words in enumerate(kind.names)]
        return [dcc.Dropdown(options, id=f"{name}-value", placeholder="not given")], Input(f"{name}-value", "value")
    if isinstance(kind, Attributes):
        how = [{"label": words, "value": words} for words in ("present", "absent", "inferred")]
        parts = [
            html.Div([words, dcc.RadioItems(how, "inferred", id=f"{name}-{words}", inline=True)], className="switch")
            for words in kind.names
        ]
        if not kind.separate:
            parts.append(html.Div("one vector: once a switch is set, the others count as absent", className="said"))
        return parts, {words: Input(f"{name}-{words}", "value") for words in kind.names}
    parts = [
        dcc.Checklist([{"label": "given", "value": "given"}], id=f"{name}-given"),
        dcc.Input(id=f"{name}-value", type="text", placeholder=name, debounce=True, value=""),
    ]
    return parts, {"given": Input(f"{name}-given", "value"), "text": Input(f"{name}-value", "value")}


def given(name: str, kind: Kind, value: Any) -> dict[str, Tensor]:
    """Return the batch that a widget's value means, empty if nothing is given.

    Raises UsageError or ValueError for an invalid value.
    """
    if isinstance(kind, Picture):
        return {name: decoded(value, kind)} if value else {}
    if isinstance(kind, Label):
        words = None if value is None else str(value)
    elif isinstance(kind, Attributes):
        signs = {"present": "", "absent": "-"}
        words = ",".join(signs[how] + one for one, how in value.items() if how in signs) or None
    else:
        words = (value["text"] or "") if value["given"] else None
    return {} if words is None else kind.batch(name, kind.values(words)[0].x)


def _sliders(latents: Sequence[int]) -> list[Any]:
    def labelled(name: str, part: Any) -> Any:
        return html.Div([name, part], className="slider")

    draws = [
        html.H2("Draws"),
        labelled("seed", dcc.Input(id="seed", type="number", min=0, step=1, value=0)),
        labelled("temperature", dcc.Slider(0, 2, 0.05, value=1, marks=None, id="temperature")),
    ]
    shifts = [
        html.H2("Strongest latents"),
        *(labelled(f"z{i}", dcc.Slider(-3, 3, 0.1, value=0, marks=None, id=f"z{i}")) for i in latents),
        html.Button("all to 0", id="level"),
        html.Div("added to this latent of every sample", className="said"),
    ]
    return [html.Section(draws), html.Section(shifts)]


def _take_pictures(app: Dash, name: str, kind: Picture) -> None:
    """Keep in the page, as the model sees it, the picture that was loaded or drawn last."""
    file, board = f"{name}-file", f"{name}-board"
    outputs = [Output(f"{name}-picture", "data"), Output(f"{name}-said", "children"), Output(file, "contents")]
    inputs = [Input(f"{name}-clear", "n_clicks"), Input(file, "contents")]
    if kind.pen:
        outputs.append(Output(board, "figure"))
        inputs.append(Input(board, "relayoutData"))

    @app.callback(outputs, inputs, prevent_initial_call=True)
    def _take(_: int | None, contents: str | None, drawn: Any = None) -> Any:
        source, seen = ctx.triggered_id, None
        said: Any = ""
        if source == board and "shapes" not in (drawn or {}):
            raise PreventUpdate
        try:
            if source == board:
                seen, said = rasterised(drawn["shapes"], kind), "what the model sees"
            elif source == file and contents:
                loaded = decoded(contents, kind)
                seen = kind.on_dark(loaded, "the picture")
                said = "what the model sees" + ", inverted: its background was light" * (seen is not loaded)
        except ValueError as error:
            said = html.Span(str(error), className="wrong")
        url = None if seen is None else _url(png(as_bytes(seen[0])))
        shown = said if url is None else [html.Img(src=url, className="seen"), " ", said]
        empty = no_update if source == board else _board(kind)
        return [url, shown, None, empty][: len(outputs)]


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


def _samples(samples: dict[str, Tensor], controls: Controls) -> Any:
    """Show the samples of each control, as pictures or as text."""
    parts: list[Any] = []
    for name, values in samples.items():
        kind, own = controls[name], f"{name}-samples"
        if kind.size:
            url = _url(png(as_bytes(grid(kind.pictures(values), len(values)))))
            parts.append(html.Img(src=url, id=own, alt=f"samples of {name}"))
        else:
            lines = kind.lines(values)
            parts.append(html.Div(" | ".join(line or "–" for line in lines), id=own, className="said"))
    return html.Section([html.H2("Samples"), *parts], className="samples")


def _expected(means: dict[str, Tensor], controls: Controls) -> Any:
    """Show a bar for each value's probability."""
    parts: list[Any] = []
    for name, mean in means.items():
        parts.append(html.H2(f"p({name} | given)"))
        for words, probability in probabilities(controls[name], mean):
            parts.append(_bar(words or "–", {"#1f77b4": probability}, f"{100 * probability:.1f} %"))
    return html.Section(parts, id="expected") if parts else ""


def _experts(found: dict[str, Tensor], deviations: dict[str, float], latents: Sequence[int]) -> Any:
    """Show a bar for each of the strongest latents, divided between the experts by precision."""
    colours = dict(zip(found, ["#bbb", *COLOURS], strict=False))
    keys = [html.Span([html.Span(className="key", style={"background": colours[name]}), name]) for name in found]
    bars = []
    for latent in latents:
        share = {name: float(some[latent]) for name, some in found.items()}
        bars.append(
            _bar(f"z{latent}", {colours[name]: some for name, some in share.items()}, max(share, key=share.__getitem__))
        )
    widths = ", ".join(f"{name} {deviation:.2g}" for name, deviation in deviations.items())
    title = html.H2("Each expert's share of the precision of q(z | given)")
    said = html.Div(f"standard deviations, geometric means over all latents: {widths}", className="said")
    return html.Section([title, html.Div(keys), *bars, said], id="experts")


def _bar(name: str, parts: dict[str, float], said: str) -> Any:
    """Draw a bar of parts by colour, each a fraction of the full width."""
    bar = [html.I(style={"width": f"{100 * part:.1f}%", "background": colour}) for colour, part in parts.items()]
    return html.Div([name, html.Span(bar), said], className="bar")


def _bounds(model: MVAE, batch: dict[str, Tensor], seed: int) -> Any:
    if not batch:
        return html.Section("nothing is given: these are draws from the prior", className="said", id="bounds")
    elbo, log_p = bounds(model, batch, seed)
    text = f"{log_p:.2f} by {N_DRAWS} importance samples, {elbo:.2f} by the ELBO"
    return html.Section([html.H2(f"log p({', '.join(batch)}), bounds in nats"), text], id="bounds")


def main() -> None:
    if Dash is None:
        raise UserError("the page needs Dash: pip install -r requirements-explore.txt")
    folder = experiment()
    explore(cli.parse(__doc__, Exploring), folder)


if __name__ == "__main__":
    cli.run(main)
