"""SiT: slimming, recovery and the distillation loss, with the authors' weights."""

from __future__ import annotations

from vistok.vit.sit import FRDLoss, ReverseSlimming, TokenSlimming


def run(case):
    given, hyper = case.inputs, case.hyper
    weights = {name.removeprefix("param."): value for name, value in given.items() if name.startswith("param.")}
    if "layers" in hyper:
        student, teacher = ([given[f"{who}.{i}"] for i in range(hyper["layers"])] for who in ("student", "teacher"))
        loss = FRDLoss(hyper["lambda_token"], hyper["lambda_logits"], hyper["tau"])
        parts = loss(given["student_logits"], given["labels"], student, given["teacher_logits"], teacher)
        named = {"cls": parts.labels, "cnn": parts.hard, "logits": parts.logits, "token": parts.tokens}
        return {"loss": parts.total} | {f"loss_{name}": value for name, value in named.items()}
    if "n_in" in hyper:
        module = ReverseSlimming(hyper["dim"], hyper["n_in"], hyper["n_out"], hyper["ratio"])
        module.load_state_dict(weights)
        return {"tokens": module(given["x"])}
    module = TokenSlimming(hyper["dim"], hyper["n_out"])
    module.load_state_dict(weights)
    return {"tokens": module(given["x"]), "weights": module.weights(given["x"]).transpose(1, 2)}
