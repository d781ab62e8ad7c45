"""One block, its proxies and the mask of moved windows, as released; tokens come window after window there."""

from __future__ import annotations

import torch

from vistok.attend.qihoo_t2x import PTDiTBlock, half, proxy_tokens
from vistok.core.attention import Window


def rows(size, window):
    """(windows, tokens of one) int64: which tokens of a raster each window has."""
    (f, h, w), (cf, ch, cw) = size, window
    places = torch.arange(f * h * w).view(f // cf, cf, h // ch, ch, w // cw, cw)
    return places.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)


def run(case):
    hyper = case.hyper
    size, window, cell = tuple(hyper["grid"]), tuple(hyper["window"]), tuple(hyper["cell"][1:])
    parity = "authors" if hyper["parity"] else "paper"
    block = PTDiTBlock(hyper["dim"], hyper["heads"], window, cell, hyper["shift"], True, "mean", "interleaved", parity)
    names = {"to_out.0": "to_out", "ff.net.0.proj": "ff.fc1", "ff.net.2": "ff.fc2"}
    state = {}
    for name, value in case.inputs.items():
        if name.startswith("param."):
            for theirs, ours in names.items():
                name = name.replace(theirs, ours)
            state[name.removeprefix("param.")] = value
    block.load_state_dict(state)
    order = rows(size, window).flatten()
    samples = len(case.inputs["timestep"])
    x = case.inputs["x"].unflatten(0, (samples, -1)).flatten(1, 2)[:, order.argsort()]
    with torch.no_grad():
        out = block(x, size, case.inputs["timestep"], case.inputs["text"])
    proxies = proxy_tokens(x.unflatten(1, size), window, cell, layout="interleaved")
    few = (size[0] // window[0], *(n // c for n, c in zip(size[1:], cell, strict=True)))
    by_window = rows(few, (1, *(n // c for n, c in zip(window[1:], cell, strict=True)))).flatten()
    found = {"out": out[:, order].unflatten(1, (-1, case.inputs["x"].shape[1])).flatten(0, 1)}
    found["proxies"] = proxies[:, by_window]
    if hyper["shift"]:
        moved = torch.arange(len(order)).view(size).roll([-n for n in half(window)], (0, 1, 2)).flatten()
        inside = moved[rows(size, window)]
        seen = Window(size, window, half(window)).to_dense()[0, 0]
        found["shift_mask"] = seen[inside[:, :, None], inside[:, None]].to(torch.uint8)
    return found
