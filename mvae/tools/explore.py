"""Open a page in your browser: condition a trained model on what you like, and see what it draws and infers.

Run it in an experiment's folder: cd mnist && python -m mvae.tools.explore CHECKPOINT. It needs Dash: pip install dash.
The page is served to this machine only, unless --host is set.
"""

import base64
import logging
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.distributions import Distribution

from .. import cli
from ..data.pictures import fault, picture
from ..errors import UsageError, UserError
from ..model import MVAE
from ..run.checkpoint import load_model
from ..run.device import Machine
from ..run.grids import COLUMNS, as_bytes, grid, png
from . import prior
from .beliefs import N_DRAWS, bounds, probabilities, shares, strongest
from .controls import Attributes, Controls, Kind, Picture
from .folder import Experiment, experiment
from .sampling import Row, draw

try:
    from dash import Dash, Input, Output, ctx, dcc, html, no_update
    from dash.exceptions import PreventUpdate
    from werkzeug.exceptions import HTTPException
    from werkzeug.serving import make_server
except ImportError:  # reported by main
    Dash = None  # type: ignore[assignment, misc]

log = logging.getLogger(__name__)

# Safety: uploads are bounded in size, decoded as pictures and nothing else, and kept in the page. Nothing is written to
# disk, no file that a visitor names is read, and the page loads nothing from other servers.
UPLOAD = 8 * 2**20  # bytes of a file; a request may have one and a half times as many, since base64 is longer

OWN_NAMES = ["127.0.0.1", "localhost"]

NORMAL, FITTED = "N(0, I)", "fitted (without sliders)"
N_SLIDERS = 8
BOARD = 280  # pixels, the drawing board's side
NUMBER = r"-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"

STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 12px 16px; color: #222; background: #f6f6f4; }
h1 { font-size: 18px; } h2 { font-size: 14px; margin: 0 0 6px; }
main { display: grid; gap: 12px; align-items: start; }
@media (min-width: 1000px) { main { grid-template-columns: 305px minmax(0, 3fr) minmax(260px, 2fr); } }
section { background: #fff; border: 1px solid #ddd; border-radius: 6px; padding: 10px 12px; margin-bottom: 12px; }
img { image-rendering: pixelated; width: 100%; max-width: 620px; } .seen { width: 84px; vertical-align: middle; }
.load { border: 1px dashed #888; border-radius: 4px; padding: 3px 10px; cursor: pointer; width: fit-content; }
.slider { display: grid; grid-template-columns: 90px 1fr; align-items: center; }
.said { color: #555; } .wrong { color: #b00; }
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
    """Serve the page until interrupted. Raises UserError if the model can't be loaded."""
    model, trained = load_model(config.model_path, folder.name, folder.build_model, config.device())
    fitted = None
    if (config.model_path.parent / prior.NAME).exists():
        try:
            fitted = prior.load(config.model_path, model)
        except UserError as error:
            log.warning("without the fitted prior: %s", error)
    app = page(model, folder.controls, f"{folder.name}, epoch {trained.get('epoch', '?')}", fitted)
    if config.host in OWN_NAMES:
        app.server.config["TRUSTED_HOSTS"] = OWN_NAMES  # another site's name may be made to lead here
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # below that it logs every request
    server = make_server(config.host, config.port, app.server, threaded=True)  # exits if it can't serve there
    host = f"[{config.host}]" if ":" in config.host else config.host
    print(f"open http://{host}:{server.port}/ in a browser; Ctrl-C ends it", flush=True)
    server.serve_forever()


def page(model: MVAE, controls: Controls, title: str, fitted: Distribution | None = None) -> Dash:
    """Return the page as an application; `page(...).server` is its WSGI application. fitted: a prior to switch to."""
    app = Dash("mvae", title=f"MVAE: {title}", update_title="", include_assets_files=False)
    app.index_string = app.index_string.replace("{%css%}", "{%css%}<style>" + STYLE + "</style>")
    app.server.config["MAX_CONTENT_LENGTH"] = UPLOAD * 3 // 2
    latents = strongest(model, controls, N_SLIDERS)
    widgets = {name: widget(name, kind) for name, kind in controls.items()}
    sections = [html.Section([html.H2(name), *parts]) for name, (parts, _) in widgets.items()]
    columns = [html.Div(sections), html.Div(id="found"), html.Div(_sliders(latents, fitted))]
    app.layout = html.Div([html.H1(f"MVAE: {title}"), html.Main(columns)])
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
        "which": Input("prior", "value"),
    }

    @app.server.errorhandler(Exception)
    def _refuse(error: Exception) -> Any:
        """Answer a malformed request, for which Dash and the callbacks raise errors of many kinds."""
        if isinstance(error, HTTPException):
            return error
        log.warning("a request failed: %.200a", error)
        return f"{error!a:.200}", 400

    @app.callback(output=Output("found", "children"), inputs=inputs)
    def _update(
        values: dict[str, Any], shifts: dict[str, float], seed: int | None, temperature: float, which: str
    ) -> list[Any]:
        batch: dict[str, Tensor] = {}
        seed = int(seed or 0) % 2**63
        added = [shifts.get(str(latent), 0) for latent in range(model.n_latents)]
        try:
            for name, kind in controls.items():
                batch |= given(name, kind, values[name])
        except (UsageError, ValueError) as error:
            return [html.Section(str(error), className="wrong")]
        batch = {name: batch[name].to(device) for name in model.modalities if name in batch}
        with lock, torch.no_grad():
            mu, logvar = model.posterior(batch)
            row = Row("", batch, mu + mu.new_tensor(added), logvar)
            model.prior = fitted if which == FITTED else None
            samples = draw(model, controls, [row], COLUMNS, seed, max(temperature, 1e-3))
            model.prior = None
            means = draw(model, texts, [row._replace(mu=mu)], N_DRAWS, seed)
            parts = [_samples(samples, controls), _expected(means, controls)]
            return [*parts, _experts(*shares(model, batch), latents), _bounds(model, batch, seed)]

    @app.callback([Output(f"z{i}", "value") for i in latents], Input("level", "n_clicks"), prevent_initial_call=True)
    def _level(_: int) -> list[float]:
        return [0.0] * len(latents)

    return app


# Controls


def widget(name: str, kind: Kind) -> tuple[list[Any], Any]:
    """Return a control's parts on the page, and the inputs whose value `given` reads."""
    value = f"{name}-value"
    if isinstance(kind, Picture):
        style = {} if kind.pen else {"display": "none"}
        hint = "draw above, or load a file" if kind.pen else "load a file"
        parts = [
            dcc.Graph(id=f"{name}-board", figure=_board(kind), config={"displayModeBar": False}, style=style),
            dcc.Upload(hint, id=f"{name}-file", accept="image/*", max_size=UPLOAD, className="load"),
            html.Button("clear", id=f"{name}-clear"),
            html.Div(id=f"{name}-said", className="said"),
            dcc.Store(value),
        ]
        return parts, Input(value, "data")
    if kind.names:
        several = isinstance(kind, Attributes)
        options = [sign + one for one in kind.names for sign in ("", "-")[: 1 + several]]
        parts = [dcc.Dropdown(options, id=value, multi=several, placeholder="not given")]
        if isinstance(kind, Attributes) and not kind.separate:
            parts.append(html.Div("one vector: once one is given, the others count as absent", className="said"))
        return parts, Input(value, "value")
    parts = [
        dcc.Checklist(["given"], id=f"{name}-given"),
        dcc.Input(id=value, type="text", placeholder=name, debounce=True, value=""),
    ]
    return parts, {"given": Input(f"{name}-given", "value"), "text": Input(value, "value")}


def given(name: str, kind: Kind, value: Any) -> dict[str, Tensor]:
    """Return the batch that a widget's value means, empty if nothing is given.

    Raises UsageError or ValueError for an invalid value.
    """
    if isinstance(value, dict):
        value = (value["text"] or "") if value["given"] else None
    if value is None or value == []:
        return {}
    if isinstance(kind, Picture):
        return {name: decoded(value, kind)}
    return kind.batch(name, kind.values(",".join(value) if isinstance(value, list) else value)[0].x)


def _sliders(latents: Sequence[int], fitted: Distribution | None) -> list[Any]:
    def labelled(name: str, part: Any) -> Any:
        return html.Div([name, part], className="slider")

    draws = [
        html.H2("Draws"),
        labelled("seed", dcc.Input(id="seed", type="number", min=0, step=1, value=0)),
        labelled("temperature", dcc.Slider(0, 2, 0.05, value=1, marks=None, id="temperature")),
        labelled("prior", dcc.RadioItems([NORMAL, *([FITTED] if fitted else [])], NORMAL, id="prior")),
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
    outputs = [(f"{name}-value", "data"), (f"{name}-said", "children"), (file, "contents"), (board, "figure")]
    inputs = [(f"{name}-clear", "n_clicks"), (file, "contents"), (board, "relayoutData")]

    @app.callback([Output(*one) for one in outputs], [Input(*one) for one in inputs], prevent_initial_call=True)
    def _take(_: int | None, contents: str | None, drawn: dict[str, Any] | None) -> Any:
        source, note, seen = ctx.triggered_id, "", None
        if source == board and "shapes" not in (drawn or {}):
            raise PreventUpdate
        try:
            if source == board and drawn:
                seen = rasterised(drawn["shapes"], kind)
            elif source == file and contents:
                loaded = decoded(contents, kind)
                seen = kind.on_dark(loaded, "the picture")
                note = ", inverted: its background was light" * (seen is not loaded)
        except ValueError as error:
            return None, html.Span(str(error), className="wrong"), None, _board(kind)
        if seen is None:
            return None, "", None, _board(kind)
        url = _url(png(as_bytes(seen[0])))
        shown = [html.Img(src=url, className="seen"), " what the model sees" + note]
        return url, shown, None, no_update if source == board else _board(kind)


def _board(kind: Picture) -> dict[str, Any]:
    """Return an empty drawing board, as a plotly figure."""
    axis = {"range": [0, BOARD], "visible": False, "fixedrange": True}
    return {
        "data": [],
        "layout": {
            "width": BOARD,  # without a size, Plotly fits it after it is shown, and a line drawn meanwhile is lost
            "height": BOARD,
            "xaxis": axis,
            "yaxis": {**axis, "range": [BOARD, 0]},
            "margin": dict.fromkeys("lrtb", 0),
            "plot_bgcolor": "#000",
            "dragmode": "drawopenpath",
            "newshape": {"line": {"color": "#fff", "width": kind.pen * BOARD / kind.size}},
        },
    }


def rasterised(shapes: list[dict[str, Any]], kind: Picture) -> Tensor:
    """Draw the board's lines as (1, 1, size, size) in [0, 1]."""
    paths = [shape["path"] for shape in shapes]
    points = [[float(found) for found in re.findall(NUMBER, path)] for path in paths]
    scale = 8  # drawn larger and then reduced, for soft edges
    image = Image.new("L", (kind.size * scale, kind.size * scale))
    pen, width = ImageDraw.Draw(image), kind.pen * scale
    for path in points:
        numbers = [x * image.width / BOARD for x in path]
        line = list(zip(numbers[::2], numbers[1::2], strict=False))
        pen.line(line, fill=255, width=round(width), joint="curve")
        for x, y in line[:1] + line[-1:]:
            pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=255)
    pixels = np.asarray(image.resize((kind.size, kind.size), Image.Resampling.BOX), dtype=np.float32) / 255
    return torch.from_numpy(pixels)[None, None]


def decoded(url: str, kind: Picture) -> Tensor:
    """Decode the picture in a data URL, (1, channels, size, size) in [0, 1]. Raises ValueError if there isn't one."""
    try:
        return picture(base64.b64decode(url.partition(",")[2], validate=True), kind.mode, kind.size)
    except Exception as error:
        raise ValueError(f"the file is {fault(error)}") from None


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
            parts.append(html.Div(" | ".join(line or "–" for line in kind.lines(values)), id=own, className="said"))
    return html.Section([html.H2("Samples"), *parts])


def _expected(means: dict[str, Tensor], controls: Controls) -> Any:
    """Show a bar for each value's probability."""
    parts: list[Any] = []
    for name, mean in means.items():
        words, found = zip(*probabilities(controls[name], mean), strict=True)
        parts += [html.H2(f"p({name} | given)"), _bars([word or "–" for word in words], {name: found}, "%{x:.1%}")]
    return html.Section(parts, id="expected") if parts else ""


def _experts(found: dict[str, Tensor], deviations: dict[str, float], latents: Sequence[int]) -> Any:
    """Show a bar for each of the strongest latents, divided between the experts by precision."""
    parts = {name: some[latents].tolist() for name, some in found.items()}
    widths = ", ".join(f"{name} {deviation:.2g}" for name, deviation in deviations.items())
    title = html.H2("Each expert's share of the precision of q(z | given)")
    said = html.Div(f"standard deviations, geometric means over all latents: {widths}", className="said")
    return html.Section([title, _bars([f"z{latent}" for latent in latents], parts), said], id="experts")


def _bars(names: Sequence[str], parts: Mapping[str, Sequence[float]], text: str = "") -> Any:
    """Draw a bar for each name, divided into parts by colour, each a fraction of the full width."""
    how = {"type": "bar", "orientation": "h", "y": names, "texttemplate": text}
    layout = {
        "barmode": "stack",
        "height": 22 * len(names) + 30,
        "margin": {"l": 0, "r": 0, "t": 0, "b": 30},
        "xaxis": {"range": [0, 1], "fixedrange": True},
        "yaxis": {"type": "category", "autorange": "reversed", "automargin": True, "dtick": 1, "fixedrange": True},
    }
    data = [{**how, "name": name, "x": x} for name, x in parts.items()]
    return dcc.Graph(figure={"data": data, "layout": layout}, config={"displayModeBar": False})


def _bounds(model: MVAE, batch: dict[str, Tensor], seed: int) -> Any:
    if not batch:
        return html.Section("nothing is given: these are draws from the prior", className="said", id="bounds")
    elbo, log_p = bounds(model, batch, seed)
    text = f"{log_p:.2f} by {N_DRAWS} importance samples, {elbo:.2f} by the ELBO"
    return html.Section([html.H2(f"log p({', '.join(batch)}), bounds in nats"), text], id="bounds")


def main() -> None:
    if Dash is None:
        raise UserError("the page needs Dash: pip install dash")
    folder = experiment()
    explore(cli.parse(__doc__, Exploring), folder)


if __name__ == "__main__":
    cli.run(main)
