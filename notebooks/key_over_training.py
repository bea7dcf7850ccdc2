"""What does the encoder learn about the key as training goes on? Makes the numbers of notebook 04, section 8.

    python notebooks/key_over_training.py       writes notebooks/key_over_training.json

Three small models are trained on 2,048 clips of the embedded music, with vertical patches, for 600 steps of
256 pairs. Copies are kept on the way, and probed for the key with linear and MLP probes on all clips of the
task `synth-key`, in which instruments and octaves change. A second run continues after the last model that
is in the file. About 40 minutes on two idle cores.
"""

import copy
import json
import os
from functools import partial

from lesson import PROJECT, small_corpus, train_tiny

import data
import model
import probe

OUT = PROJECT / "notebooks" / "key_over_training.json"
STEPS = (0, 25, 75, 150, 300, 600)  # at which a copy is probed
EVERY = 25  # steps between two copies
CLIPS = 2048
RUNS = {  # instruments and octaves within a clip -> whether they change, size of the model
    "they change": (True, "tiny"),
    "they change, twice as wide": (True, "wide"),
    "they stay": (False, "tiny"),
}
model.SIZES["wide"] = (256, 3, 4, 1024)  # a size of our own: twice the width of "tiny"
QUICK = [c for c in probe.QUICK_GRID if c.dropout == 0.25]  # 8 of 24, to save time
PROBES = {"linear": [c for c in QUICK if not c.hidden], "MLP": [c for c in QUICK if c.hidden]}


def clip_that_stays(number):
    """A clip of the embedded music in which every instrument and its octave stay: the reader of one clip."""
    yield 0.0, data.synthesize(1, 0, number, change=0)[0][0]


def corpus_that_stays():
    """A corpus like `data.build_embedded_corpus`, of clips in which nothing changes."""
    readers = {f"clip {number}": partial(clip_that_stays, number) for number in range(CLIPS)}
    settings = {"source": "embedded music, nothing changes within a clip", "files": CLIPS}
    return data._build(PROJECT / "corpora" / f"embedded_{CLIPS}_stays", settings, readers, None)


def train_with_copies(corpus, size):
    """{step: a copy of the model after it} for STEPS."""
    copies = []

    def keep_copy(network):
        copies.append(copy.deepcopy(network).eval())
        return {}  # nothing for the log

    settings = {"steps": STEPS[-1], "batch": 256, "size": size}
    train_tiny(corpus=corpus, check=keep_copy, every=EVERY, **settings)
    return {step: copies[step // EVERY] for step in STEPS}


def key_scores(task, encoders):
    """{encoder: {kind of probe: [test score, low, high, validation score]}}, of the best probe on valid."""
    scores = {}
    for name, features in probe.embed_task(task, encoders).items():
        rows, scores[name] = features.concatenated(), {}
        for kind, grid in PROBES.items():
            _, best = probe.fit_probes(task, features, rows, grid)
            results = probe.score_test(task, features, rows, best)
            scores[name][kind] = [results["score"], *results["interval"], best.valid]
    return scores


def main():
    """Train, probe, and write the scores after each model."""
    task = probe.load_task("synth-key")
    found = json.loads(OUT.read_text()) if OUT.exists() else {"steps": STEPS, "scores": {}}
    scores = found["scores"]
    if "chroma" not in scores:
        scores |= key_scores(task, {"chroma": "chroma"})
    for title, (changes, size) in RUNS.items():
        if title not in scores:
            corpus = small_corpus(CLIPS) if changes else corpus_that_stays()
            scores[title] = key_scores(task, train_with_copies(corpus, size))
            part = OUT.with_suffix(".part")  # renamed when it is whole
            part.write_text(json.dumps(found, indent=1))
            os.replace(part, OUT)
            print(title, {step: f"{100 * score['linear'][0]:.1f}" for step, score in scores[title].items()})
    print(f"{OUT}\nnext: run notebooks/04_probe.ipynb, section 8 draws it")


if __name__ == "__main__":
    main()
