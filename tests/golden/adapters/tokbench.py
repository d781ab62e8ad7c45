"""Words that match, by their edit distance; bins of relative size and the mean of their means."""

import torch

from vistok.core.buckets import bin_by_ratio, bin_of
from vistok.core.reading import similarity


def run(case):
    pairs, found = case.hyper["pairs"], {}
    found["raw_match"] = torch.tensor([a == b for a, b in pairs])
    found["caseless_match"] = torch.tensor([a.lower() == b.lower() for a, b in pairs])
    # theirs is the distance
    found["raw_ned"] = torch.tensor([1 - similarity(a, b) for a, b in pairs], dtype=torch.float64)
    for size, edges in case.hyper["edges"].items():
        found[f"group_{size}"] = bin_of(case.inputs["ratio"], edges)
        bins = bin_by_ratio(case.inputs["accuracy"], case.inputs["ratio"], edges)
        found[f"mean_acc_{size}"] = torch.tensor(bins.headline, dtype=torch.float64)
    return found
