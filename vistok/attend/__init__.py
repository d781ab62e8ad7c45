"""Attention that is not dense: operators and backbones. One file a system; its parts are in core.attention."""
