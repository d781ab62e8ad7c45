"""A vision transformer and a method with parameters of its own, as one module."""

from __future__ import annotations

from typing import Any

from torch import nn

from vistok.host.vit.reducer import ViTReducer
from vistok.host.vit.session import apply_vit


class Joined(nn.Module):
    """``vit`` that never runs without ``method``: both are trained, moved, saved and put into evaluation mode together.

    Called as the model is, with the method inside for that call. What needs the session as well (a loss of what was
    kept) writes the ``with`` itself: ``vistok.apply(joined.vit, joined.method)``.
    """

    def __init__(self, vit: nn.Module, method: ViTReducer) -> None:
        super().__init__()
        if not isinstance(method, nn.Module):
            raise ValueError(f"method: got {method!r}, must be a torch module too; give others to vistok.apply")
        self.vit, self.method = vit, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with apply_vit(self.vit, [self.method]):
            return self.vit(*args, **kwargs)
