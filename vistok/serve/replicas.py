"""The same application as replicas on Ray Serve: on one machine or on a cluster, a fixed number or by load."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vistok.serve.app import create_app

if TYPE_CHECKING:
    from fastapi import FastAPI

    from vistok.serve.access import Access
    from vistok.serve.service import Settings

NAME = "vistok"


@dataclass(frozen=True)
class Replicas:
    """How many copies of the models there are: ``least`` always, up to ``most`` by load.

    One more is started where a replica has more than ``target`` requests on average, one less where it has less.
    ``cpus`` and ``gpus`` are set aside for each. Raises ValueError.
    """

    least: int = 1
    most: int = 1
    target: float = 16.0
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError(f"replicas: got {self.least}..{self.most}, must be a number from 1, or from..to")

    @classmethod
    def parse(cls, text: str, gpus: float = 0.0) -> Replicas:
        """``2``: two of them; ``1..4``: one to four, by load. Raises ValueError."""
        match = re.fullmatch(r"([0-9]{1,4})(?:\.\.([0-9]{1,4}))?", text.strip())
        if match is None:
            raise ValueError(f"replicas: got {text}, must be a number such as 2, or from..to such as 1..4")
        return cls(int(match[1]), int(match[2] or match[1]), gpus=gpus)

    @property
    def options(self) -> dict[str, Any]:
        """What Ray Serve calls it."""
        many: dict[str, Any] = {"num_replicas": self.least}
        if self.most > self.least:
            scaling = {"min_replicas": self.least, "max_replicas": self.most, "target_ongoing_requests": self.target}
            many = {"autoscaling_config": scaling}
        return many | {"ray_actor_options": {"num_cpus": self.cpus, "num_gpus": self.gpus}}


def deployment(settings: Settings, access: Access, replicas: Replicas, grace_s: float = 30.0) -> Any:
    """The application for ``ray.serve.run``. Every replica has its own models, queue and encoder cache.

    A replica is given more requests than its queue and a batch hold, so a full one answers 429 by itself; it is given
    none before its models are loaded.
    """
    from ray import serve

    def build() -> FastAPI:
        return create_app(settings, access, grace_s=grace_s, wait=True)

    made = serve.deployment(
        serve.ingress(build)(),
        name=NAME,
        max_ongoing_requests=settings.limits.queue_length + 2 * settings.max_batch,
        graceful_shutdown_timeout_s=grace_s,
        **replicas.options,
    )
    return made.bind()


def run_on_ray(settings: Settings, access: Access, host: str, port: int, replicas: Replicas, grace_s: float) -> None:
    """Start Ray here, or join the cluster that ``RAY_ADDRESS`` names, and serve until Ctrl-C."""
    from ray import serve

    serve.start(http_options={"host": host, "port": port, "request_timeout_s": settings.limits.deadline_seconds + 5})
    serve.run(deployment(settings, access, replicas, grace_s), name=NAME, route_prefix="/", blocking=True)
