"""Attention: rows of it for scores, patterns of it for operators, and the executors that mix by a pattern."""

from vistok.core.attention.attend import Choice, Executor, attend, attend_grid, choose, merge_lse
from vistok.core.attention.grid import GridWindow, Halo, Window
from vistok.core.attention.layout import TileOrder
from vistok.core.attention.pattern import BlockMask, CoarseKV, Dense, Pattern, TokenIndex
from vistok.core.attention.rows import attention_marginals, attention_pagerank, attention_rows, class_row
from vistok.core.attention.simulate import Simulated, best_stride, best_window, simulate
from vistok.core.attention.tiles import Runs, Tiles

__all__ = [
    "BlockMask",
    "Choice",
    "CoarseKV",
    "Dense",
    "Executor",
    "GridWindow",
    "Halo",
    "Pattern",
    "Runs",
    "Simulated",
    "TileOrder",
    "Tiles",
    "TokenIndex",
    "Window",
    "attend",
    "attend_grid",
    "attention_marginals",
    "attention_pagerank",
    "attention_rows",
    "best_stride",
    "best_window",
    "choose",
    "class_row",
    "merge_lse",
    "simulate",
]
