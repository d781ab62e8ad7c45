"""vistok: make, spend and read the visual tokens of vision models, every published method under one roof.

    vistok.systems(family=None)            every system, as cards
    vistok.card(name)                      one card
    vistok.create(name, **hyper)           an instance of the system
    vistok.apply(model, method, keep=...)  context manager: the method is in the model inside the ``with``
    vistok.load(name_or_path)              a small model of the zoo

Importing vistok imports neither torch nor a system: each name above is fetched when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vistok.catalogue import card as card
    from vistok.catalogue import create as create
    from vistok.catalogue import systems as systems
    from vistok.host import apply as apply
    from vistok.zoo import load as load

__version__ = "0.1.0"

_HOME = {
    "systems": "vistok.catalogue",
    "card": "vistok.catalogue",
    "create": "vistok.catalogue",
    "apply": "vistok.host",
    "load": "vistok.zoo",
}

__all__ = ["__version__", "apply", "card", "create", "load", "systems"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vistok' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
