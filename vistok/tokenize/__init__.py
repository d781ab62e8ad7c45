"""Visual tokenizers: pictures to few codes and back. One file a system.

    encoder -> resampler -> bottleneck -> dropper -> decoder -> losses

A system is a dataclass whose ``build()`` gives a ``vistok.parts.tokenizer.Tokenizer``: ``encode(images) -> Codes`` and
``decode(codes)``. Bottlenecks are in ``vistok.parts.quantize``; ``titok`` is the one to read first.
"""
