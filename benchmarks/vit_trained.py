"""Trained methods for vision transformers: each against what its paper beats, by the studies in benchmarks.vit_studies.

A study trains both sides for equal steps on equal pictures, and yields the rows of one table; its file says what is
compared. The rows are kept beside the page, so that one study can be run again without the others.

python -m benchmarks.vit_trained [STUDY ...] [--quick] [--pictures 500] [--out docs/results]
"""

from __future__ import annotations

from benchmarks import vit_studies
from benchmarks.studies import Studies
from vistok.bench.vit_trial import ViTTrial

INTRO = """# Vision transformers with trained methods

`python -m benchmarks.vit_trained` makes this page ({pictures} held-out pictures; training by \
`vistok.bench.vit_trial.ViTTrial.fit`). Both sides of a comparison get the same pictures, steps and seeds."""
STUDIES = Studies(vit_studies, "vit-trained.md", INTRO, lambda pictures: ViTTrial(pictures=pictures))

if __name__ == "__main__":
    STUDIES.main(__doc__)
