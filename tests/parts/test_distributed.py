"""Two processes that train one table on pictures of their own: they hold the same one, as a single process would."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from vistok.parts.quantize import EMAQuantizer, VectorQuantizer

STEPS, SIZE, DIM = 4, 12, 3


def batches(rank, step):
    return torch.randn(2, 10, DIM, generator=torch.Generator().manual_seed(100 * rank + step))


def made(kind):
    torch.manual_seed(0)
    if kind == "ema":
        return EMAQuantizer(SIZE, DIM, restart_after=None)
    return VectorQuantizer(SIZE, DIM, restart_after=2)


def work(rank, folder):
    torch.set_num_threads(1)  # a forked process has none of its parent's
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    state = {}
    for kind in ("ema", "vq"):
        quantizer = made(kind)
        for step in range(STEPS):
            quantizer(batches(rank, step))
        state |= {f"{kind}.{key}": value for key, value in quantizer.state_dict().items()}
    save_file({key: value.detach().clone() for key, value in state.items()}, f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


def test_processes_agree(tmp_path):
    mp.start_processes(work, (str(tmp_path),), nprocs=2, start_method="fork")  # spawned ones would import torch anew
    one, two = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    for key in one:
        if not key.endswith(".counts"):  # the meters are each process's own
            assert torch.equal(one[key], two[key]), key
    alone = made("ema")
    for step in range(STEPS):
        alone(torch.cat([batches(0, step), batches(1, step)]))
    torch.testing.assert_close(one["ema.codebook"], alone.codebook)
    assert not torch.equal(one["vq.codebook"], made("vq").codebook)
