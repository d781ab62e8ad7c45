"""AIM: rounds of merging in the released order, importance from full logits, and the pruning of consecutive layers.

The released code prunes by masks of a padded sequence and takes the scores of a layer for the next one; the masks are
rebuilt here from the tokens that the system keeps.
"""

from __future__ import annotations

import torch

from vistok.core.score import pagerank
from vistok.host.reducer import Evidence
from vistok.reduce.aim import AIM, importance, linear_rates


def run(case):
    given, hyper = case.inputs, case.hyper
    if "features" in given:
        keep = hyper["N"] - sum(hyper["rounds"])
        return {"tokens": AIM(parity="authors").reduce(Evidence(features=given["features"]), keep).tokens}
    if "attention_logits" in given:
        weights = (given["attention_logits"] / hyper["tau"]).softmax(-1)
        return {"importance": importance(pagerank(weights, hyper["iters"], damping=1 - hyper["d"]))}
    return _schedule(given, hyper)


def _schedule(given, hyper):
    first, n = hyper["start"], hyper["N"]
    rates = [*linear_rates(28)[1:], 0.0]  # what a layer's scores leave to the next
    mask, masks = given["attention_mask"].clone(), []
    index = torch.arange(n).expand(len(mask), n)
    for layer, scores in zip(hyper["layers"], given["importance"], strict=True):
        seen = scores[:, first : first + n].gather(1, index)
        evidence = Evidence(features=index[..., None].float(), llm_importance=seen[:, None])
        index = index.gather(1, AIM().at_layer(evidence, int(n * rates[layer]), layer + 1).keep)
        mask[:, first : first + n] = 0
        mask.scatter_(1, first + index, 1)
        masks.append(mask.clone())
    return {"attention_mask": torch.stack(masks), "retain_rate": torch.tensor(rates)}
