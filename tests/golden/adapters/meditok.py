"""Books side by side."""

import torch

from tests.golden.bottleneck import grads, projected
from vistok.core.quantize import count_ids, usage
from vistok.parts.quantize import Product, VectorQuantizer


def run(case):
    if "in_dim" in case.hyper:
        return projected(case)
    given, hyper = case.inputs, case.hyper
    books = []
    for table in given["codebooks"]:
        entropy = 1.0 if hyper["entropy"] else 0.0
        book = VectorQuantizer(
            *table.shape,
            norm="both",
            commitment=hyper["beta"],
            entropy=entropy,
            temperature=hyper["entropy_temperature"],
            restart_after=None,
        )
        with torch.no_grad():
            book.codebook.copy_(table)
        books.append(book)
    quantizer = Product(books, reduce="mean").eval()
    z = given["z"].requires_grad_()
    codes = quantizer(z)
    assert torch.equal(quantizer.ids_to_z(codes.ids), codes.z)
    used = [usage(count_ids(column, quantizer.sizes[0]), 0.01) for column in codes.ids.unbind(-1)]
    return {
        "indices": codes.ids.transpose(1, 2),
        "z_q": codes.z,
        "loss": codes.loss,
        "usage": 100 * torch.stack(used).mean(),
        "grad_z": grads((codes.z * given["cotangent"]).sum(), z)[0],
    }
