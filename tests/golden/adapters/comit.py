"""Adaptive projected guidance over the steps of a run, and the crops."""

import torch

from vistok.parts.guidance import APG
from vistok.tokenize._message import CELLS, crop_at


def run(case):
    return _guided(case) if "pred_cond" in case.inputs else _crops(case)


def _guided(case):
    given, hyper = case.inputs, case.hyper
    guide = APG(hyper["guidance_scale"], hyper["momentum"] or 0.0, hyper["eta"], hyper["norm_threshold"])
    steps = zip(given["pred_cond"], given["pred_uncond"], strict=True)
    return {"guided": torch.stack([guide(cond, uncond) for cond, uncond in steps])}


def _crops(case):
    hyper = case.hyper
    images = torch.arange(65536.0).view(1, 1, 256, 256) / 65536 + case.inputs["offset"]
    b, whole = len(images), int(hyper["global_crop"])
    order = list(range(CELLS + whole)) if hyper["order"] == "raster_scan" else hyper["order"]
    seen, places = [], []
    for step in order[: hyper["num_crops"]]:
        cell = torch.tensor(step).expand(b) - whole
        if bool((cell < 0).all()):
            crop, place = images, torch.zeros(b, 2)
        else:
            crop, place = crop_at(images, cell, hyper["crop"], hyper["stride"])
        seen.append(crop)
        places.append(place)
    return {
        "locations": torch.stack(places, 1),
        "first_pixel": torch.stack([crop[:, 0, 0, 0] for crop in seen], 1),
        "mean": torch.stack([crop.mean((1, 2, 3)) for crop in seen], 1),
        "size": torch.tensor([crop.shape[2:] for crop in seen]),
    }
