"""The scan of Mamba-2 as products of matrices: a state space model whose state decays by one number a head.

    h_t = exp(step_t A) h_(t-1) + step_t B_t x_t        y_t = C_t h_t

Source: Dao and Gu, arXiv 2405.21060 (state space duality). Within a chunk the scan is a causal matrix on the inputs,
(C_t B_s) times the decay from s to t; only states at the ends of chunks are carried on. Linear in the length, and
nothing but products of matrices. ``vistok.core.scan.selective_scan`` is the form with a decay for every channel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from vistok.core.tensors import upcast


def chunked_scan(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int = 64) -> Tensor:
    """y (B, L, H, P) in the dtype of ``x`` (B, L, H, P); inside it is float32 at least, also under autocast.

    ``step`` (B, L, H), 0 or more; ``A`` (H), negative; ``B``, ``C`` (B, L, N), the same for all heads. ``chunk`` tokens
    make one matrix. Memory O(L (chunk H + N P H / chunk)); the relative error is that of the dtype times the log of a
    chunk's whole decay. Raises ValueError for shapes that do not fit.
    """
    b, length, heads, _ = x.shape
    if A.shape != (heads,) or step.shape != (b, length, heads):
        raise ValueError(
            f"step, A: got {tuple(step.shape)} and {tuple(A.shape)}, must be {(b, length, heads)} and {(heads,)}"
        )
    if B.shape != C.shape or B.shape[:2] != (b, length):
        raise ValueError(f"B, C: got {tuple(B.shape)} and {tuple(C.shape)}, must both be ({b}, {length}, N)")
    if chunk < 1:
        raise ValueError(f"chunk: got {chunk}, must be 1 or more")
    if not length:
        return x.clone()
    chunk = min(chunk, length)
    with torch.autocast(x.device.type, enabled=False):
        wide = [upcast(t) for t in (x, step, B, C)]
        # A step of 0 at what fills up the last chunk leaves the state as it is.
        filled = [pad(t, (0, 0) * (t.dim() - 2) + (0, -length % chunk)) for t in wide]
        u, step, B, C = (t.view(b, -1, chunk, *t.shape[2:]) for t in filled)
        u = (u * step.unsqueeze(4)).transpose(2, 3)  # (B, c, H, chunk, P)
        passed = (step * upcast(A)).transpose(2, 3).cumsum(3)  # (B, c, H, chunk): log decay since the chunk began
        causal = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
        decay = (passed.unsqueeze(4) - passed.unsqueeze(3)).masked_fill(~causal, -torch.inf).exp()
        B, C = B.unsqueeze(2), C.unsqueeze(2)  # (B, c, 1, chunk, N)
        y = (C @ B.transpose(3, 4) * decay) @ u
        brought = B.transpose(3, 4) @ (u * decay[:, :, :, -1].unsqueeze(4))  # (B, c, H, N, P), at the chunk's end
        kept, state, before = passed[..., -1].exp()[..., None, None], torch.zeros_like(brought[:, 0]), []
        for i in range(brought.shape[1]):
            before.append(state)
            state = kept[:, i] * state + brought[:, i]
        y = y + passed.exp().unsqueeze(4) * (C @ torch.stack(before, 1))
        joined: Tensor = y.transpose(2, 3).flatten(1, 2)[:, :length]
    return joined.to(x.dtype)
