"""What operators on grids share: heads last, keys that all see, any executor."""

from __future__ import annotations

from torch import Tensor

from vistok.core.attention import Executor, GridWindow, attend_grid


class GridAttention:
    """An operator that is told by its ``pattern``; it has no weights."""

    def pattern(self, shape: tuple[int, ...]) -> GridWindow:
        """Which keys each query of a grid of ``shape`` sees. Raises ValueError for a grid that is too small."""
        raise NotImplementedError

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        extra_kv: tuple[Tensor, Tensor] | None = None,
        return_lse: bool = False,
        executor: Executor = "auto",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, *grid, H, dv) of ``q``, ``k``, ``v`` (B, *grid, H or fewer, d), heads last; and with ``return_lse`` the
        log-sum-exp of each row (B, *grid, H). ``extra_kv``: keys and values (B, E, H or fewer, d) that every query sees
        too."""
        pattern = self.pattern(tuple(q.shape[1:-2]))
        return attend_grid(q, k, v, pattern, scale, extra_kv, return_lse, executor)
