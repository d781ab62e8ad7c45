"""How a method gets into a vision transformer of timm or transformers, and out again.

    score -> budget -> combine -> restore over a TokenState(x, size, source, grid)

``state``: the tokens and which patches they stand for. ``reducer``: what a method is. ``models``: where the parts of a
supported model are. ``engine``: the hooks. ``intermediates``: timm's maps of what leaves the blocks. ``session``: what
``vistok.apply`` returns.
"""

from vistok.host.vit.reducer import KeepRate, Stage, ViTEvidence, ViTReducer
from vistok.host.vit.state import TokenState

__all__ = ["KeepRate", "Stage", "TokenState", "ViTEvidence", "ViTReducer"]
