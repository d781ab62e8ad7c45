"""timm's ``forward_intermediates`` (and with it ``features_only=True``) while a method is in the model.

It makes maps of what leaves the blocks, which would fail on fewer tokens than patches, or give a wrong map without a
word where the numbers happen to fit. No module sees these tensors last, so that no hook reaches them: it is shadowed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

from vistok.host.vit.state import Fill, TokenState


def with_whole_maps(
    call: Callable[..., Any], depth: int, left: Callable[[], dict[int, TokenState]], fill: Fill | None
) -> Callable[..., Any]:
    """``call``, the ``forward_intermediates`` of a model of ``depth`` blocks, with a row for every patch again.

    ``left``: what left each block in the last pass; ``fill``: what a dropped patch gets, None to leave all outputs as
    short as they are. ValueError for ``output_fmt="NCHW"`` then, unless no token is gone.
    """
    parameters = inspect.signature(call)

    @wraps(call)
    def forward_intermediates(*args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(*args, **kwargs)
        given.apply_defaults()
        wanted = given.arguments["output_fmt"]
        if wanted == "NCHW":
            given.arguments["output_fmt"] = "NLC"
        out = call(*given.args, **given.kwargs)
        states = left()
        indices = given.arguments["indices"]
        if indices is None or isinstance(indices, int):
            layers = list(range(depth))[-(indices or depth) :]
        else:
            layers = sorted({layer % depth for layer in indices})

        def whole(rows: Tensor, state: TokenState) -> Tensor:
            if fill and not given.arguments["norm"]:  # the norm's hook has restored them already
                rows = state.unmerge(rows, fill)
            if wanted != "NCHW":
                return rows
            if not fill and not state.untouched:
                patches = state.source.shape[1]
                raise ValueError(
                    f"output_fmt: got 'NCHW', but {state.num_slots} tokens are left of {patches} patches; "
                    "ask for 'NLC', or apply the method with restore='zeros' or 'nearest' to get whole maps"
                )
            return rows.transpose(1, 2).unflatten(2, state.grid).contiguous()

        maps = out["image_intermediates"] if isinstance(out, dict) else out[1] if isinstance(out, tuple) else out
        for place, (layer, rows) in enumerate(zip(layers, maps, strict=True)):
            state = states[layer]
            maps[place] = (whole(rows[0], state), *rows[1:]) if isinstance(rows, tuple) else whole(rows, state)
        return out

    return forward_intermediates
