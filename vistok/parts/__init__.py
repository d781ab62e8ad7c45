"""Modules with weights or state that more than one family is built from. What needs neither is in ``vistok.core``.

``quantize``: the bottlenecks of tokenizers. ``dropper``: nested dropout. ``transformer``: plain blocks.
``adversary``: PatchGAN and its losses' state.
"""
