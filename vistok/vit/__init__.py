"""Fewer tokens inside vision transformers. One file a system.

    score -> budget -> combine -> restore over a TokenState(x, size, source, grid)

A system is a ``vistok.host.vit.ViTReducer``: how many tokens stay at which block is known before the first picture
comes; which, it reads off the block's queries and keys; the map from tokens to patches is carried along for it.
``topk`` is the one to read first, ``random_drop`` the control that every other system has to beat.
"""
