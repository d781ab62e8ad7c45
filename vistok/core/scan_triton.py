"""The forward pass of ``vistok.core.scan`` as one Triton kernel: the state never leaves the registers.

A program has one picture and ``BLOCK`` channels, and walks along the tokens. It leaves the state before every chunk, so
that the backward pass can start from there. Imported only where it is asked for: Triton comes with PyTorch for CUDA.
Without a GPU it runs under ``TRITON_INTERPRET=1``, which is how it is tested; it has not been timed on one.
"""

from __future__ import annotations

import os

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

BLOCK = 64
"""Channels of a program."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    decay_ptr,
    b_ptr,
    c_ptr,
    a_ptr,
    first_ptr,
    y_ptr,
    states_ptr,
    last_ptr,
    length,
    batch,
    channels,
    states,
    chunk,
    BLOCK: tl.constexpr,
    STATES: tl.constexpr,
):
    picture = tl.program_id(0).to(tl.int64)  # and so every offset that it enters
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    state = tl.arange(0, STATES)
    real = channel < channels
    both = real[:, None] & (state < states)[None, :]
    at = channel[:, None] * states + state[None, :]
    a = tl.load(a_ptr + at, both, 0.0)
    whole = channels * states
    h = tl.load(first_ptr + picture * whole + at, both, 0.0)
    for t in range(length):
        row = t * batch + picture
        if t % chunk == 0:
            tl.store(states_ptr + (t // chunk * batch + picture) * whole + at, h, both)
        x = tl.load(x_ptr + row * channels + channel, real, 0.0)
        decay = tl.load(decay_ptr + row * channels + channel, real, 0.0)
        b = tl.load(b_ptr + row * states + state, state < states, 0.0)
        c = tl.load(c_ptr + row * states + state, state < states, 0.0)
        h = tl.exp(decay[:, None] * a) * h + x[:, None] * b[None, :]
        tl.store(y_ptr + row * channels + channel, tl.sum(h * c[None, :], 1), real)
    tl.store(last_ptr + picture * whole + at, h, both)


def scan(
    x: Tensor, decay: Tensor, B: Tensor, C: Tensor, A: Tensor, first: Tensor, y: Tensor, states: Tensor, chunk: int
) -> Tensor:
    """The last state (B, D, N); fills ``y`` (L, B, D) and ``states`` (chunks, B, D, N), those before each chunk.

    ``x`` = delta u and ``decay`` (L, B, D), ``B`` and ``C`` (L, B, N), ``A`` (D, N), ``first`` (B, D, N). Raises
    ValueError for tensors on another device.
    """
    if x.device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        raise ValueError(f"backend: got 'triton' for tensors on {x.device}, must be 'torch' there")
    length, batch, channels = x.shape
    n = A.shape[1]
    last = first.clone(memory_format=torch.contiguous_format)
    given = [t.contiguous() for t in (x, decay, B, C, A, first)]
    grid = (batch, triton.cdiv(channels, BLOCK))
    power = triton.next_power_of_2(n)
    _kernel[grid](*given, y, states, last, length, batch, channels, n, chunk, BLOCK=BLOCK, STATES=power)
    return last
