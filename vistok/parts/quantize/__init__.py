"""The bottlenecks of tokenizers: vectors to codes and back. ``Bottleneck`` states the contract that all keep."""

from vistok.parts.quantize.base import Bottleneck
from vistok.parts.quantize.multiscale import MultiScale
from vistok.parts.quantize.scalar import FSQ, LFQ, Gaussian, Identity
from vistok.parts.quantize.stacks import Product, Residual, Stretches
from vistok.parts.quantize.vector import EMAQuantizer, IBQuantizer, SimVQuantizer, TableQuantizer, VectorQuantizer

__all__ = [
    "FSQ",
    "LFQ",
    "Bottleneck",
    "EMAQuantizer",
    "Gaussian",
    "IBQuantizer",
    "Identity",
    "MultiScale",
    "Product",
    "Residual",
    "SimVQuantizer",
    "Stretches",
    "TableQuantizer",
    "VectorQuantizer",
]
