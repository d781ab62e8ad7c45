"""What a session puts into somebody else's model, and the promise that it comes out again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Hooks:
    """Hooks on modules and shadowed methods, all taken out by ``remove`` (in any state, any number of times).

    ``torch.compile`` leaves the hooks as they are and compiles what lies between them.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """``hook(module, args, kwargs)`` runs before ``module``; it may return new (args, kwargs)."""
        self._undo.append(module.register_forward_pre_hook(torch.compiler.disable(hook), with_kwargs=True).remove)

    def after(self, module: nn.Module, hook: Callable[..., Any], *, always: bool = False) -> None:
        """``hook(module, args, output)`` runs after ``module``; it may return a new output. ``always``: also when the
        module raised (the output is then None)."""
        self._undo.append(module.register_forward_hook(torch.compiler.disable(hook), always_call=always).remove)

    def watch(
        self, owner: Any, method: str, before: Callable[..., None], after: Callable[[], None] = lambda: None
    ) -> None:
        """Call ``before(*args, **kwargs)`` whenever ``owner.method(...)`` is called, and ``after()`` when it is left.

        For what no module sees, such as the picture sizes given to ``get_image_features``. The method is shadowed on
        the instance; class and code stay as they are.
        """
        call = getattr(owner, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            before(*args, **kwargs)
            try:
                return call(*args, **kwargs)
            finally:
                after()

        # generate() reads the signature of get_image_features to know which inputs it takes.
        watched.__wrapped__ = call  # type: ignore[attr-defined]
        self.shadow(owner, method, watched)

    def shadow(self, owner: Any, name: str, value: Any) -> None:
        """Put ``value`` in place of ``owner.name``, on the instance."""
        before = owner.__dict__.get(name)
        owner.__dict__[name] = value
        self.undo(lambda: owner.__dict__.pop(name, None) if before is None else owner.__dict__.update({name: before}))

    def undo(self, step: Callable[[], Any]) -> None:
        """Have ``step()`` called when all is taken out."""
        self._undo.append(step)

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()
