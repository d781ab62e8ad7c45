"""The module, its weights of tokens in hyperedges, its choice and its loss, as released."""

from __future__ import annotations

import torch

from vistok.attend.softhgnn import SoftHypergraph


def run(case):
    hyper, x = case.hyper, case.inputs["x"]
    sparse = bool(hyper["topk"])
    edges = hyper["fixed"] if sparse else hyper["edges"]
    dynamic = hyper["edges"] if sparse else 0
    net = SoftHypergraph(hyper["dim"], edges, hyper["heads"], dynamic=dynamic, topk=hyper["topk"], parity="authors")
    state = {n.removeprefix("param."): t for n, t in case.inputs.items() if n.startswith("param.")}
    net.eval().load_state_dict(state)
    with torch.no_grad():
        found = net.edge_generator(x)
        return {
            "out": net(x),
            "incidence": found.dense(edges + dynamic),
            "selected": torch.zeros(len(x), edges + dynamic, dtype=torch.int64).scatter(1, found.index, 1),
            "balance_loss": found.balance[None],
        }
