"""The models that a server holds, and what a request becomes for them. Knows nothing of HTTP."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistok import catalogue
from vistok.serve.batching import Batcher
from vistok.serve.budget import Share
from vistok.serve.cache import FeatureCache
from vistok.serve.errors import RequestError
from vistok.serve.limits import Limits
from vistok.serve.media import MediaPolicy, digest
from vistok.serve.media import load as load_picture
from vistok.serve.metrics import DENSE, Metrics
from vistok.serve.runner import Ask, Runner, Shown
from vistok.zoo import DEFAULT, load, load_processor

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedModel, ProcessorMixin

    from vistok.serve.schema import ChatRequest

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What is served and within which bounds. Raises ValueError for what cannot be meant.

    ``models``: shipped models, folders or names on the Hugging Face hub; a folder is served by its last name alone.
    ``method`` and ``keep``: for requests that do not say; "dense" is the model as it is. ``methods``: those that a
    request may name (None: every reducer); ``max_keep``: the largest share of a picture's tokens that a request may
    keep, 1.0 for no bound; below it dense requests are refused, and so are counts of tokens, which are no share.
    ``max_new_tokens``: where the request does not say. ``max_batch``, ``max_wait_ms``: see ``Batcher``.
    ``cache_bytes``: of the encoder cache, a model; 0 for none. ``device``, ``dtype``: see ``vistok.load``.
    """

    models: tuple[str, ...] = (DEFAULT,)
    method: str = DENSE
    keep: int | float | None = None
    methods: tuple[str, ...] | None = None
    max_keep: float = 1.0
    max_new_tokens: int = 512
    max_batch: int = 8
    max_wait_ms: float = 5.0
    cache_bytes: int = 2**30
    device: str | None = None
    dtype: str = "auto"
    media: MediaPolicy = field(default_factory=MediaPolicy)

    def __post_init__(self) -> None:
        if not self.models or len(self.names) < len(self.models):
            raise ValueError(f"models: got {self.models!r}, must be at least one, each of another name")
        known = (DENSE, *(card.slug for card in catalogue.methods("reduce")))
        for name, given in (("method", (self.method,)), ("methods", self.methods or ())):
            for slug in given:
                if slug not in known:
                    raise ValueError(f"{name}: got {slug!r}, must be of {', '.join(known)}")
        if not 0 < self.max_keep <= 1:
            raise ValueError(f"max_keep: got {self.max_keep}, must be above 0, at most 1")
        if not 1 <= self.max_new_tokens <= self.limits.new_tokens:
            raise ValueError(f"max_new_tokens: got {self.max_new_tokens}, must be from 1 to {self.limits.new_tokens}")
        try:
            self.choose(None, None)
        except RequestError as error:
            raise ValueError(f"method: got {self.method!r} with keep={self.keep}, but {error.message}") from error

    @property
    def limits(self) -> Limits:
        """Bounds on requests."""
        return self.media.limits

    @property
    def names(self) -> dict[str, str]:
        """The models by the names that clients call them by; where a folder lies is nobody's business."""
        return {Path(model).name if Path(model).is_dir() else model: model for model in self.models}

    def choose(self, method: str | None, keep: int | float | None) -> tuple[str | None, int | float | None]:
        """Method (None: dense) and tokens to keep of a request that named these. Raises RequestError (400)."""
        # A request that names another method than the server's keeps what that method keeps by default.
        if keep is None and method in (None, self.method):
            keep = self.keep
        method = self.method if method is None else method
        allowed = self.methods
        if allowed is None:
            allowed = (DENSE, *(card.slug for card in catalogue.methods("reduce")))
        if method not in allowed and method != self.method:
            # The name is the client's own word, and was held to be a short one.
            message = f"vistok.method: {method} is not served here; served are {', '.join(allowed)}."
            raise RequestError(400, "unknown_method", message, "vistok.method")
        if method == DENSE:
            keep = None
        if self.max_keep < 1:
            share = 1.0 if method == DENSE else 0.25 if keep is None else keep
            if isinstance(share, int) or share > self.max_keep:
                message = f"vistok.keep: must be a share of at most {self.max_keep} here, such as 0.1."
                raise RequestError(400, "limit_exceeded", message, "vistok.keep")
        return (None if method == DENSE else method), keep


@dataclass(frozen=True)
class Served:
    """A model that answers: its runner, the queue before it, and what its encoder has seen.

    ``lock`` is held while a batch runs: who else uses the model must hold it too.
    """

    name: str
    runner: Runner
    batcher: Batcher[Ask]
    cache: FeatureCache
    lock: threading.Lock


class Service:
    """Loads the models of ``settings``, turns requests into jobs, and ends in good order."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.served: dict[str, Served] = {}
        self.failed: BaseException | None = None
        """Why the models could not be loaded, if they could not."""
        self.loaded = threading.Event()
        """Set when loading is over, one way or the other."""

    @property
    def ready(self) -> bool:
        """Whether all models can be asked."""
        return len(self.served) == len(self.settings.names)

    async def start(self) -> None:
        """Load the models, in a thread: the server answers meanwhile that it is alive and not ready."""
        try:
            for name, place in self.settings.names.items():
                model, processor = await asyncio.to_thread(self._load, place)
                self.serve(name, model, processor)
        except Exception as error:
            self.failed = error
            raise
        finally:
            self.loaded.set()

    def serve(self, name: str, model: PreTrainedModel, processor: ProcessorMixin) -> Served:
        """Take requests for ``model`` from now on. Raises UnsupportedModel."""
        settings = self.settings
        cache = FeatureCache(model, settings.cache_bytes)
        runner, lock = Runner(model, processor, around=cache.around), threading.Lock()

        def run(asks: Sequence[Ask], emit: Callable[[int, Any], None], cancelled: Callable[[int], bool]) -> None:
            with lock:
                runner(asks, emit, cancelled)

        batcher = Batcher(
            run,
            max_batch=settings.max_batch,
            max_wait_ms=settings.max_wait_ms,
            queue_length=settings.limits.queue_length,
            observer=self.metrics.observer(name),
        )
        self.metrics.watch(name, batcher, cache)
        self.served[name] = served = Served(name, runner, batcher, cache, lock)
        return served

    def _load(self, place: str) -> tuple[PreTrainedModel, ProcessorMixin]:
        _LOG.info("loading %s", place)
        return load(place, dtype=self.settings.dtype, device=self.settings.device), load_processor(place)

    async def close(self, grace_s: float) -> bool:
        """Take no more requests and finish what was taken; whether all of it was done in ``grace_s`` seconds."""
        done = await asyncio.gather(*(served.batcher.close(grace_s) for served in self.served.values()))
        return all(done)

    # A request ---------------------------------------------------------------------------------------------------

    def model(self, name: str) -> Served:
        """The model ``name``. Raises RequestError: 404 for one that is not served, 503 for one that is not loaded."""
        if name not in self.settings.names:
            served = ", ".join(self.settings.names)
            raise RequestError(404, "model_not_found", f"model: is not served here; served are {served}.", "model")
        if name not in self.served:
            raise RequestError(503, "not_ready", "The model is not loaded yet.", "model", retry_after_s=5)
        return self.served[name]

    async def ask(self, request: ChatRequest, share: Share) -> tuple[Served, Ask]:
        """What ``request`` asks of which model; its pictures are held in ``share``. Raises RequestError."""
        served = self.model(request.model)
        method, keep = self.settings.choose(request.vistok.method, request.vistok.keep)
        ask = Ask(
            _messages(request),
            await self._pictures(request.picture_urls, share),
            request.new_tokens or self.settings.max_new_tokens,
            method,
            keep,
            request.vistok.hyper,
            request.stops,
            request.sampling,
        )
        await asyncio.to_thread(served.runner.prompt, ask)  # what cannot be asked is refused before it waits
        return served, ask

    async def _pictures(self, urls: Sequence[str], share: Share) -> tuple[Shown, ...]:
        # One after the other: a request has a bounded part in decoding, however many pictures it brings.
        shown = []
        for url in urls:
            image = await load_picture(url, self.settings.media)
            share.take(image.width * image.height * len(image.getbands()))
            shown.append(await asyncio.to_thread(_shown, image))
        return tuple(shown)


def _shown(image: Image.Image) -> Shown:
    return Shown(image, digest(image))


def _messages(request: ChatRequest) -> list[Mapping[str, Any]]:
    return [
        {
            "role": "system" if message.role == "developer" else message.role,  # one is the other's newer name
            "content": [
                {"type": "text", "text": part.text} if part.type == "text" else {"type": "image"}
                for part in message.parts
            ],
        }
        for message in request.messages
    ]


__all__ = ["Served", "Service", "Settings"]
