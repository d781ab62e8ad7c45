"""Visual tokenizers, trained and shipped: the studies in benchmarks.tokenize_studies, each a table.

python -m benchmarks.tokenize_trained [STUDY ...] [--quick] [--pictures 256] [--out docs/results]
"""

from __future__ import annotations

from benchmarks import tokenize_studies
from benchmarks.studies import Studies
from vistok.bench.tokenize_trial import TokenizeTrial

INTRO = """# Visual tokenizers

`python -m benchmarks.tokenize_trained` makes this page ({pictures} held-out pictures). SSIM is taken with a range of \
1 on pictures in [0, 1]; scripts of the LlamaGen lineage print it with 2, which is higher. They are trained for some
minutes on one core: what they show is what they are, small.

![Reconstructions by the shipped tokenizers](tokenize.png)

`python -m benchmarks.tokenize_pictures` draws them: held-out photographs and objects."""
STUDIES = Studies(tokenize_studies, "tokenize.md", INTRO, lambda pictures: TokenizeTrial(pictures=pictures), 256)

if __name__ == "__main__":
    STUDIES.main(__doc__)
