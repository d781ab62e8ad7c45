"""What the server counts, for Prometheus. Labels are bounded: names of models that are served and of methods here."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vistok.serve.batching import Batcher, Observer, Outcome
from vistok.serve.cache import FeatureCache
from vistok.serve.runner import Finish

DENSE = "dense"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """The server's figures, in a registry of their own. All times are in seconds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        labels = ("model", "method")
        self.requests = counter("vistok_requests", "Requests for a completion, by HTTP status.", ("status",))
        self.jobs = counter("vistok_jobs", "Jobs, by how they ended.", (*labels, "outcome"))
        self.batches = histogram("vistok_batch_size", "Jobs of a batch.", labels, buckets=(1, 2, 4, 8, 16, 32, 64))
        self.queued = histogram("vistok_queue_seconds", "Time in the queue.", labels, buckets=_SECONDS)
        self.first = histogram(
            "vistok_time_to_first_token_seconds", "From arrival to the first text.", labels, buckets=_SECONDS
        )
        self.later = histogram(
            "vistok_time_per_output_token_seconds", "For each token after the first text.", labels, buckets=_FAST
        )
        self.whole = histogram("vistok_request_seconds", "From arrival to the end.", labels, buckets=_SECONDS)
        self.visual = counter("vistok_visual_tokens", "Visual tokens before the method.", labels)
        self.kept = counter("vistok_visual_tokens_kept", "Visual tokens that stayed.", labels)
        self.prompt = counter("vistok_prompt_tokens", "Tokens of prompts, those dropped left out.", labels)
        self.completion = counter("vistok_completion_tokens", "Tokens of answers.", labels)
        self._now = _Now()
        self.registry.register(self._now)

    def watch(self, model: str, batcher: Batcher[Any], cache: FeatureCache) -> None:
        """Show from now on how many jobs of ``model`` wait and run, and what its encoder cache does."""
        self._now.watched[model] = (batcher, cache)

    def observer(self, model: str) -> Observer:
        """What the batcher of ``model`` reports to."""
        return _Observer(self, model)

    def finished(self, model: str, method: str, finish: Finish, first_s: float, whole_s: float) -> None:
        """An answer was made: its first text came after ``first_s`` and its end after ``whole_s``."""
        labels = (model, method)
        self.first.labels(*labels).observe(first_s)
        self.whole.labels(*labels).observe(whole_s)
        if finish.completion_tokens > 1:
            self.later.labels(*labels).observe((whole_s - first_s) / (finish.completion_tokens - 1))
        self.visual.labels(*labels).inc(finish.visual_tokens)
        self.kept.labels(*labels).inc(finish.visual_tokens_kept)
        self.prompt.labels(*labels).inc(finish.prompt_tokens - finish.visual_tokens + finish.visual_tokens_kept)
        self.completion.labels(*labels).inc(finish.completion_tokens)


class _Observer(Observer):
    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics, self._model = metrics, model

    def batch(self, key: Hashable, size: int, seconds: float) -> None:
        self._metrics.batches.labels(self._model, _method(key)).observe(size)

    def over(self, key: Hashable, outcome: Outcome, waited_s: float, ran_s: float) -> None:
        self._metrics.jobs.labels(self._model, _method(key), outcome).inc()
        self._metrics.queued.labels(self._model, _method(key)).observe(waited_s)


def _method(key: Hashable) -> str:
    """The method of an ``Ask.key``."""
    assert isinstance(key, tuple)
    return str(key[0] or DENSE)


class _Now(Collector):
    """Figures that are read when somebody asks for them."""

    def __init__(self) -> None:
        self.watched: dict[str, tuple[Batcher[Any], FeatureCache]] = {}

    def collect(self) -> list[Metric]:
        """The present figures of all models."""
        waiting = GaugeMetricFamily("vistok_queue_length", "Jobs that wait.", labels=["model"])
        running = GaugeMetricFamily("vistok_running", "Places of the present batch that are taken.", labels=["model"])
        size = GaugeMetricFamily("vistok_encoder_cache_bytes", "Bytes in the encoder cache.", labels=["model"])
        entries = GaugeMetricFamily("vistok_encoder_cache_entries", "Pictures in it.", labels=["model"])
        hits = CounterMetricFamily("vistok_encoder_cache_hits", "Pictures not encoded again.", labels=["model"])
        misses = CounterMetricFamily("vistok_encoder_cache_misses", "Pictures encoded.", labels=["model"])
        evictions = CounterMetricFamily("vistok_encoder_cache_evictions", "Pictures that had to go.", labels=["model"])
        for model, (batcher, cache) in self.watched.items():
            stats = cache.stats()
            waiting.add_metric([model], batcher.waiting)
            running.add_metric([model], batcher.running)
            size.add_metric([model], stats.bytes)
            entries.add_metric([model], stats.entries)
            hits.add_metric([model], stats.hits)
            misses.add_metric([model], stats.misses)
            evictions.add_metric([model], stats.evictions)
        return [waiting, running, size, entries, hits, misses, evictions]
