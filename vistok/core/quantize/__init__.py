"""Vectors to codes and back, as pure functions: look-up, gradient rules, rounding, entropy, usage, renewal of tables.

The modules that hold tables are in ``vistok.parts.quantize``.
"""

from vistok.core.quantize.entropy import entropies
from vistok.core.quantize.gradient import (
    GradientRule,
    RuleName,
    index_backpropagation,
    pass_through,
    rotation,
    rule_of,
    straight_through,
)
from vistok.core.quantize.nearest import Metric, nearest_code
from vistok.core.quantize.renewal import ema_update, replacements
from vistok.core.quantize.scalar import (
    fsq_bound,
    fsq_digits,
    fsq_unbound,
    fsq_values,
    pack,
    signs,
    unpack,
)
from vistok.core.quantize.soft import soft_lookup
from vistok.core.quantize.usage import count_ids, entropy_bits, perplexity, usage

__all__ = [
    "GradientRule",
    "Metric",
    "RuleName",
    "count_ids",
    "ema_update",
    "entropies",
    "entropy_bits",
    "fsq_bound",
    "fsq_digits",
    "fsq_unbound",
    "fsq_values",
    "index_backpropagation",
    "nearest_code",
    "pack",
    "pass_through",
    "perplexity",
    "replacements",
    "rotation",
    "rule_of",
    "signs",
    "soft_lookup",
    "straight_through",
    "unpack",
    "usage",
]
