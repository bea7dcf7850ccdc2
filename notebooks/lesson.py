"""What the notebooks share: drawing, sound, the code of the stage files, and one small training run.

Every notebook begins with the same cell, which finds this file and imports it. After that the stage files
can be imported too. Nothing here is needed to understand the stage files.
"""

import base64
import inspect
import io
import json
import sys
from contextlib import redirect_stderr
from pathlib import Path

PROJECT = Path(__file__).absolute().parent.parent  # the folder of the stage files
sys.path.insert(0, str(PROJECT))

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import soundfile
import torch
from IPython import get_ipython
from IPython.display import HTML, Markdown, display

import train
from data import HOP, KEYS, N_MELS, SAMPLE_RATE, build_embedded_corpus

# -----------------------------------------------------------------------------------------------------------
# Style: colours that colour-blind people can tell apart (Okabe and Ito 2008), text of at least 10 points
# -----------------------------------------------------------------------------------------------------------

BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
SKY, BLACK, GREY, PALE = "#56B4E9", "#000000", "#888888", "#E6E6E6"
COLOUR = {"square": RED, "vertical": BLUE, "hybrid": PURPLE}  # of the patch shapes, in every notebook
WIDE, HALF = (10, 4), (7.5, 4)  # inches: a figure as wide as a slide, and one with a single plot
# No figure is wider than 10 inches: shrunk to the width of a slide, its text would be below 10 points.

plt.rcParams.update({
    "figure.dpi": 100,
    "figure.figsize": WIDE,
    "figure.constrained_layout.use": True,
    "font.size": 12,
    "axes.titlesize": 13,
    "figure.titlesize": 14,
    "axes.labelsize": 12,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": plt.cycler(color=[BLUE, RED, GREEN, ORANGE, PURPLE, SKY, BLACK]),
    "lines.linewidth": 2,
    "image.interpolation": "nearest",
})  # fmt: skip


def png(figure):
    """A figure as the bytes of a PNG without an alpha channel, which is a tenth smaller."""
    drawn, stored = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    PIL.Image.open(drawn).convert("RGB").save(stored, "png", optimize=True)
    return stored.getvalue()


if get_ipython() is not None:
    plt.switch_backend("module://matplotlib_inline.backend_inline")
    get_ipython().display_formatter.formatters["image/png"].for_type(plt.Figure, png)

# -----------------------------------------------------------------------------------------------------------
# Music
# -----------------------------------------------------------------------------------------------------------

SHARP_MINOR = {"Db": "C#", "Gb": "F#", "Ab": "G#"}  # minor keys that musicians write with a sharp


def key_name(key):
    """A key as musicians write it: an index in data.KEYS, or a name in it -> "Gb major", "F# minor"."""
    tonic, mode = (key if isinstance(key, str) else KEYS[int(key)]).split()
    return f"{SHARP_MINOR.get(tonic, tonic) if mode == 'minor' else tonic} {mode}"


KEY_NAMES = tuple(key_name(key) for key in KEYS)  # in the order of data.KEYS


def play(sound, rate=SAMPLE_RATE):
    """Display a player for a wave (samples,), or a row of labelled players for a dict {label: wave}.

    All sounds of one call are scaled by the same factor, so that the loudest sample is 0.9 of full scale.
    The sound is stored as MP3, a tenth of the bytes of a WAV file.
    """
    sounds = sound if isinstance(sound, dict) else {"": sound}
    loudest = max(float(np.abs(np.asarray(wave)).max()) for wave in sounds.values())
    players = []
    for label, wave in sounds.items():
        file = io.BytesIO()
        soundfile.write(file, 0.9 / max(loudest, 1e-9) * np.asarray(wave), rate, format="MP3")
        source = f"data:audio/mpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        player = f'<audio controls preload="none" style="width: 240px" src="{source}"></audio>'
        players.append(f'<span style="display: inline-block; margin-right: 1em">{label}<br>{player}</span>')
    display(HTML("".join(players)))


# -----------------------------------------------------------------------------------------------------------
# Pictures
# -----------------------------------------------------------------------------------------------------------


def to_db(power, floor=-50):
    """Decibels relative to the largest value, at least `floor`: an array of any shape, for pictures only."""
    power = np.asarray(power, dtype=np.float64)
    highest = max(power.max(), 1e-30)
    return np.maximum(10 * np.log10(np.maximum(power / highest, 1e-30)), floor)


def band_of(hertz):
    """The mel band, from 0 to 127 with fractions, whose centre is at a frequency (Slaney's scale)."""
    hertz = np.asarray(hertz, dtype=np.float64)
    mel = np.where(hertz < 1000, hertz * 3 / 200, 15 + 27 * np.log(np.maximum(hertz, 1) / 1000) / np.log(6.4))
    top = 15 + 27 * np.log(SAMPLE_RATE / 2 / 1000) / np.log(6.4)
    return mel / top * (N_MELS + 1) - 1


def draw_mel(
    ax, mel, title="", *, start=0.0, hidden=None, floor=-50, bar=True, hertz=(250, 500, 1000, 2000, 4000)
):
    """Draw mel power (128, T) in decibels over seconds and hertz, with a colour bar. Returns the image.

    `start` is the time of the first frame in seconds; `hidden` (128, T) bool marks cells to draw in pale
    grey, as those that masking drops; `bar=False` leaves room for one colour bar beside several plots:
    `fig.colorbar(image, ax=axes, label=DB)`. The time axis ends at start + T * 0.032 s.
    """
    mel = np.asarray(mel, dtype=np.float64)
    picture = np.ma.masked_array(to_db(mel, floor))
    if hidden is not None:
        picture[np.asarray(hidden)] = np.ma.masked
    end = start + mel.shape[1] * HOP / SAMPLE_RATE
    colours = plt.colormaps["magma"].with_extremes(bad=PALE)
    where = {"origin": "lower", "aspect": "auto", "extent": (start, end, 0, N_MELS)}
    image = ax.imshow(picture, cmap=colours, vmin=floor, vmax=0, **where)
    ax.set(title=title, xlabel="time (s)", ylabel="frequency (Hz)")
    ax.set_yticks(band_of(hertz) + 0.5, [f"{frequency:g}" for frequency in hertz])
    if bar:
        ax.figure.colorbar(image, ax=ax, label=DB, pad=0.01)
    return image


DB = "power (dB re. maximum)"  # the label of a colour bar


def draw_band(ax, x, middle, low, high, colour, label=None, line="o-"):
    """A line through `middle`, and a band from `low` to `high`: a range of seeds, or a 95% interval."""
    ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    ax.plot(x, middle, line, color=colour, label=label)


def draw_bars(ax, names, middle, low, high, colours, label=None, shift=0.0, width=0.7):
    """A bar for each name, with an interval from `low` to `high`; `shift` puts several rows side by side."""
    places = np.arange(len(names)) + shift
    middle, low, high = (np.asarray(values, dtype=np.float64) for values in (middle, low, high))
    arms = np.maximum(0, [middle - low, high - middle])
    ax.bar(places, middle, width, color=colours, label=label)
    ax.errorbar(places, middle, arms, fmt="none", color=BLACK, capsize=4, linewidth=1.5)
    ax.set_xticks(range(len(names)), names)


def legend_below(ax, columns=4):
    """One legend below the whole figure, with the labels of one plot."""
    ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=columns)

# -----------------------------------------------------------------------------------------------------------
# The code of the stage files
# -----------------------------------------------------------------------------------------------------------


def link(thing):
    """Markdown link from a notebook to the stage file with a function or class (not to a line: they move)."""
    file = Path(inspect.getsourcefile(inspect.unwrap(thing))).name
    return f"[{file}: {inspect.unwrap(thing).__qualname__}](../{file})"


def show(thing, first=None, last=None):
    """Display the code of a function or class of a stage file, with a link to it.

    With `first` or `last`, only from the line that contains one text up to the line that contains the other.
    """
    lines = inspect.getsource(inspect.unwrap(thing)).rstrip().splitlines()
    begin = next(number for number, line in enumerate(lines) if first is None or first in line)
    after = (number for number, line in enumerate(lines) if last and number >= begin and last in line)
    end = next(after) + 1 if last else len(lines)
    code = inspect.cleandoc("\n" + "\n".join(lines[begin:end]))
    display(Markdown(f"{link(thing)}\n\n```python\n{code}\n```"))


def table(rows, header):
    """Display a table: rows of cells, and the list of column names."""
    lines = [header, ["---"] * len(header), *rows]
    display(Markdown("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)))


def links(*things):
    """Display a table of links to functions and classes, with the first sentence of what each does."""
    table([(link(thing), inspect.getdoc(inspect.unwrap(thing)).splitlines()[0]) for thing in things],
          ["in the code", "what it does"])  # fmt: skip


# -----------------------------------------------------------------------------------------------------------
# A small training run
# -----------------------------------------------------------------------------------------------------------

TINY = {"size": "tiny", "patch": "vertical", "batch": 128, "lr": 1e-3, "device": "cpu"}


def settings_of(objective="contrast", **settings):
    """The settings of a small run: those of `python train.py --help`, changed by TINY and by `settings`.

    Raises TypeError for a setting that train.py does not have, ValueError for a value that makes no sense.
    """
    args = train.command_line().parse_args(["--objective", objective])
    for name, value in {**TINY, **settings}.items():
        if not hasattr(args, name):
            raise TypeError(f"train.py has no setting {name!r}")
        setattr(args, name, value)
    train.check_settings(args)  # also sets the default of the mask ratio
    train.choose_device(args)  # sets the defaults that depend on the device
    return args


def small_corpus(clips=512, seed=0):
    """A corpus of the embedded music in corpora/: built by the first call (about 10 s), then only opened."""
    with redirect_stderr(io.StringIO()):  # the progress bar
        name = f"embedded_{clips}" if seed == 0 else f"embedded_{clips}_seed{seed}"
        return build_embedded_corpus(clips, seed, PROJECT / "corpora" / name)


def train_tiny(objective="contrast", steps=100, corpus=None, check=None, every=10, **settings):
    """Train a small model with the functions of train.py. Returns (model, log).

    `settings` are those of train.py, with _ for -: batch, lr, patch, size, mask, temperature, decoupled,
    seed, log_mel, ... Their defaults are TINY here. `corpus` is a data.Corpus (default: `small_corpus`).
    The log is a list with a dict for each step: step, loss, std, and retrieval if there are two views.
    If `check` is given, check(model) is called before the first step (step 0) and then after every `every`
    steps; the dict that it returns is added to that step's dict.
    """
    args = settings_of(objective, **settings)
    corpus = corpus or small_corpus()
    clips = train.choose_clips(corpus, args)
    learner, optimizer = train.build_objective(args, corpus, clips, torch.device("cpu"), None)
    log = [{"step": 0, **check(learner.model)}] if check else []
    for step in range(steps):
        views, kept = train.draw_batch(corpus, clips, step, args)
        figures = train.train_step(learner, optimizer, views, kept, (step + 1) / steps, args)
        loss, std, retrieval = figures.tolist()
        log.append({"step": step + 1, "loss": loss, "std": std})
        if not np.isnan(retrieval):
            log[-1]["retrieval"] = retrieval
        if check and (step + 1) % every == 0:
            log[-1].update(check(learner.model))
    return learner.model.eval(), log


def column(log, name):
    """The steps and the values of one column of a log, where it has a value: two arrays."""
    pairs = [(line["step"], line[name]) for line in log if line.get(name) is not None]
    return tuple(np.array(values) for values in zip(*pairs))


def read_log(path):
    """The lines of a run's log.jsonl after its settings, in the form of `train_tiny`'s log."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()[1:]]
