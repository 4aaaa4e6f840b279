"""RUN/report.html: one self-contained page with samples, curves, accuracy and settings."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from safetensors import SafetensorError
from safetensors.torch import load_file

from vidit.data.encode import write_gif
from vidit.train.metrics import read_metrics
from vidit.train.rundir import read_config
from vidit.whole_file import full_disk_explained, write_whole

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ name }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1c2330; }
h1, h2 { font-weight: 600; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; } th, td { padding: .3rem .9rem; text-align: right; }
th, td { border-bottom: 1px solid #dde2ea; }
th:first-child, td:first-child { text-align: left; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figure img { width: 100%; border-radius: .3rem; image-rendering: auto; }
figcaption { font-size: .8rem; line-height: 1.3; } .tag { font-size: .72rem; color: #5b6577; }
.plots img { width: 100%; max-width: 34rem; }
pre { background: #f5f7fa; padding: 1rem; overflow: auto; font-size: .8rem; }
</style></head><body>
<h1>{{ name }}</h1>
<p>{{ facts }}</p>
{% if rows %}<h2>What the captions asked for, read back</h2>
<table><tr><th></th>{% for c in columns %}<th>{{ c }}</th>{% endfor %}</tr>
{% for label, values in rows %}<tr><td>{{ label }}</td>
{% for v in values %}<td>{{ v }}</td>{% endfor %}</tr>{% endfor %}
</table>{% endif %}
{% if reconstruction %}<h2>Reconstruction of clips that were not trained on</h2>
<table>{% for label, value in reconstruction %}<tr><td>{{ label }}</td><td>{{ value }}</td></tr>{% endfor %}</table>
<p>First, middle and last frame: clips left, reconstructions right.</p>
<img src="data:image/png;base64,{{ pairs }}" alt="pairs">{% endif %}
{% if samples %}<h2>Samples</h2>
<div class="grid">{% for s in samples %}<figure><img src="data:image/gif;base64,{{ s.gif }}" alt="{{ s.caption }}">
<figcaption>{{ s.caption }}<br><span class="tag">{{ s.tag }}</span></figcaption></figure>{% endfor %}</div>{% endif %}
<h2>Curves</h2><div class="plots">
{% for plot in plots %}<img src="data:image/png;base64,{{ plot }}" alt="">{% endfor %}</div>
<h2>Settings</h2><pre>{{ settings }}</pre>
</body></html>
"""


def write_report(run_dir: Path) -> Path:
    """Write the page from what the run directory holds; returns its path.

    ValueError where it is no run, or where what `vidit evaluate` wrote is damaged.
    """
    config = read_config(run_dir)
    try:
        summary = _json(run_dir / "summary.json", {})
        reconstruction = _json(run_dir / "reconstruction.json", {})
        facts, rows = _facts(summary, reconstruction), _accuracy_rows(summary)
        pairs = (run_dir / "reconstruction.png").read_bytes() if reconstruction else b""
        measures = list(_measures(reconstruction))
        samples = _samples(run_dir, config.data.shown_fps)
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError, SafetensorError) as error:
        raise ValueError(
            f"what {run_dir} holds of an evaluation is damaged or of another version ({type(error).__name__}: "
            f"{error}); run `vidit evaluate` again, or delete summary.json, evaluation.* and reconstruction.*"
        ) from error
    page = (
        Environment(autoescape=True)
        .from_string(PAGE)
        .render(
            name=config.name,
            facts=facts,
            columns=("colour", "direction", "shape", "count"),
            rows=rows,
            reconstruction=measures,
            pairs=base64.b64encode(pairs).decode(),
            samples=samples,
            plots=_plots(run_dir),
            settings=config.to_json(),
        )
    )
    path = run_dir / "report.html"
    with full_disk_explained(run_dir):
        write_whole(path, page)
    return path


def _json(path: Path, absent: Any) -> Any:
    """The content of a file; ValueError, with its name, where it is no JSON."""
    try:
        return json.loads(path.read_text()) if path.is_file() else absent
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _measures(reconstruction: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What `vidit evaluate` says of a VAE, as rows; of the sharpness both numbers."""
    for name, value in reconstruction.items():
        if isinstance(value, dict):
            yield from ((f"{name}, {of}", f"{number:.4g}") for of, number in value.items())
        elif isinstance(value, float):
            yield name, f"{value:.4g}"


def _facts(summary: dict[str, Any], reconstruction: dict[str, Any]) -> str:
    if not isinstance(summary, dict):
        raise TypeError(f"summary.json holds a {type(summary).__name__}, no object")
    if reconstruction:
        return (
            f"{reconstruction['steps']} steps, evaluated on {reconstruction['clips']} clips ({reconstruction['of']})."
        )
    if not summary:
        return "Not evaluated yet: run `vidit evaluate`."
    return (
        f"{summary['steps']} steps in {summary['train_s']:.0f} s, evaluated in {summary['evaluate_s']:.0f} s on "
        f"{summary['captions']} captions, half of them with combinations that no training clip shows; peak memory "
        f"{summary['peak_rss_gib']:.2f} GiB."
    )


def _accuracy_rows(summary: dict[str, Any]) -> list[tuple[str, list[str]]]:
    if not summary:
        return []
    parts = {"all": summary, "seen combinations": summary["seen"], "unseen combinations": summary["unseen"],
             "ground truth through the same scorer": summary["ground_truth"]}  # fmt: skip
    columns = ("colour", "direction", "shape", "count")
    return [(label, ["-" if p[c] is None else f"{p[c]:.2f}" for c in columns]) for label, p in parts.items()]


def _samples(run_dir: Path, fps: float) -> list[dict[str, str]]:
    path = run_dir / "evaluation.safetensors"
    if not path.is_file():
        return []
    videos = load_file(path)
    judged = _json(run_dir / "evaluation.json", [])
    samples = []
    for (_, video), row in zip(sorted(videos.items()), judged, strict=True):
        marks = ", ".join(f"{n} {row[n]:.0%}" for n in ("colour", "direction", "shape") if row[n] is not None)
        tag = f"{'seen' if row['seen'] else 'unseen'}: {marks}"
        samples.append({"gif": _gif(video.numpy(), fps), "caption": row["caption"], "tag": tag})
    return samples


def _gif(video: np.ndarray, fps: float) -> str:
    buffer = io.BytesIO()
    write_gif(buffer, video, fps, scale=2)
    return base64.b64encode(buffer.getvalue()).decode()


def _plots(run_dir: Path) -> list[str]:
    """Training loss and validation loss by timestep band, as PNGs in base64."""
    rows = read_metrics(run_dir)
    train = [(r["step"], r["loss"], r["grad_norm"]) for r in rows if "loss" in r]
    validation = [(r["step"], r["validation"]) for r in rows if "validation" in r]
    plots = []
    if train:
        steps, losses, norms = np.array(train).T
        plots.append(_plot("training", "loss", {"each step": (steps, losses), "mean of 50": _smooth(steps, losses)}))
        plots.append(_plot("training", "gradient norm", {"each step": (steps, norms)}))
    if validation:
        names = sorted({name for _, values in validation for name in values})
        lines = {
            n: (np.array([s for s, _ in validation]), np.array([v.get(n, np.nan) for _, v in validation]))
            for n in names
        }
        plots.append(_plot("validation, averaged weights", "loss", lines))
    return plots


def _smooth(steps: np.ndarray, values: np.ndarray, width: int = 50) -> tuple[np.ndarray, np.ndarray]:
    width = min(width, len(values))
    return steps[width - 1 :], np.convolve(values, np.ones(width) / width, "valid")


def _plot(title: str, quantity: str, lines: dict[str, tuple[np.ndarray, np.ndarray]]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for index, (label, (x, y)) in enumerate(lines.items()):
        faint = label == "each step" and len(lines) > 1
        axes.plot(x, y, label=label, linewidth=0.6 if faint else 1.4, alpha=0.4 if faint else 1.0, color=f"C{index}")
    axes.set(title=title, xlabel="step", ylabel=quantity)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()
