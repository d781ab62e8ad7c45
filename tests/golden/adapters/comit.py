"""Adaptive projected guidance over the steps of a run."""

import torch

from vistok.parts.guidance import APG

WAITS = ("comit-crops",)


def run(case):
    given, hyper = case.inputs, case.hyper
    guide = APG(hyper["guidance_scale"], hyper["momentum"] or 0.0, hyper["eta"], hyper["norm_threshold"])
    steps = zip(given["pred_cond"], given["pred_uncond"], strict=True)
    return {"guided": torch.stack([guide(cond, uncond) for cond, uncond in steps])}
