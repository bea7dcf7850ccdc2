"""What does the encoder learn about the key as training goes on? Makes the numbers of notebook 04, section 8.

    python notebooks/key_over_training.py       writes notebooks/key_over_training.json

Three small models are trained on 2,048 clips of the embedded music, with vertical patches, for 600 steps of
256 pairs. Copies are kept on the way, and probed for the key with linear and MLP probes on all clips of the
task `synth-key`. A second run continues after the last model that is in the file. About 40 minutes on two
cores.
"""

import copy
import json
import os
from functools import partial

from lesson import PROJECT, small_corpus, train_tiny

import data
import model
import probe

STEPS = (0, 25, 75, 150, 300, 600)
OUT = PROJECT / "notebooks" / "key_over_training.json"
model.SIZES["wide"] = (256, 3, 4, 1024)  # twice the width of "tiny"
RUNS = {  # title -> whether instruments and octaves change within a clip, size
    "they change": (True, "tiny"),
    "they change, twice as wide": (True, "wide"),
    "they stay": (False, "tiny"),
}
PROBES = {
    words: [c for c in probe.QUICK_GRID if bool(c.hidden) == hidden and c.dropout == 0.25]
    for words, hidden in (("linear", False), ("MLP", True))
}


def clip_that_stays(number):
    """A clip of the embedded music in which every instrument and its octave stay: the reader of one clip."""
    yield 0.0, data.synthesize(1, 0, number, change=0)[0][0]


def corpus_that_stays(clips):
    """A corpus like `data.build_embedded_corpus`, of clips in which nothing changes."""
    readers = {f"clip {number}": partial(clip_that_stays, number) for number in range(clips)}
    settings = {"source": "embedded music, nothing changes within a clip", "files": clips}
    return data._build(PROJECT / "corpora" / f"embedded_{clips}_stays", settings, readers, None)


def key_scores(task, features):
    """{name of the probe: [test score, low, high, validation score]} of the best probe of each kind."""
    scores = {}
    for words, grid in PROBES.items():
        rows = features.concatenated()
        _, best = probe.fit_probes(task, features, rows, grid)
        results = probe.score_test(task, features, rows, best)
        scores[words] = [results["score"], *results["interval"], best.valid]
    return scores


def main():
    """Train, probe, and write the scores after each model."""
    task = probe.load_task("synth-key")
    found = json.loads(OUT.read_text()) if OUT.exists() else {"steps": STEPS, "scores": {}}
    for title, (changes, size) in RUNS.items():
        if title in found["scores"]:
            continue
        copies = []

        def keep_copy(network):
            copies.append(copy.deepcopy(network).eval())
            return {}

        corpus = small_corpus(2048) if changes else corpus_that_stays(2048)
        train_tiny(steps=STEPS[-1], corpus=corpus, check=keep_copy, every=25, batch=256, size=size)
        encoders = {step: copies[step // 25] for step in STEPS}
        if "chroma" not in found["scores"]:
            encoders["chroma"] = "chroma"
        scores = {name: key_scores(task, f) for name, f in probe.embed_task(task, encoders).items()}
        if "chroma" in scores:
            found["scores"]["chroma"] = scores.pop("chroma")
        found["scores"][title] = scores
        OUT.with_suffix(".part").write_text(json.dumps(found, indent=1))
        os.replace(OUT.with_suffix(".part"), OUT)
        for step, score in scores.items():
            print(title, step, {words: f"{100 * values[0]:.1f}" for words, values in score.items()})
    print(f"{OUT}\nnext: run notebooks/04_probe.ipynb, section 8 draws it")


if __name__ == "__main__":
    main()
