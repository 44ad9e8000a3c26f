"""Counters and histograms for Prometheus, under vLLM's names where it has the same."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fastllama.engine.any_engine import AnyEngine
from fastllama.engine.request import Request

LABEL = "model_name"
SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
LONG_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
TOKENS = tuple(float(2**power) for power in range(18))


class Metrics:
    """What a server counts. Each has its own registry, so that a process can have several."""

    def __init__(self, model: str, engine: AnyEngine) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"vllm:{name}", text, (LABEL, *labels), registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            found = Histogram(f"vllm:{name}", text, (LABEL,), buckets=buckets, registry=registry)
            return found.labels(model)

        self._model = model
        self._prompt = counter("prompt_tokens", "Tokens of prompts.").labels(model)
        self._generated = counter("generation_tokens", "Tokens of answers.").labels(model)
        self._queried = counter("prefix_cache_queries", "Tokens of prompts that were looked up in the cache.")
        self._hit = counter("prefix_cache_hits", "Tokens of prompts that were found in the cache.")
        self._ended = counter("request_success", "Answers by the reason of their end.", "finished_reason")
        self._first = histogram("time_to_first_token_seconds", "From arrival to the first token.", LONG_SECONDS)
        self._between = histogram("inter_token_latency_seconds", "Between two tokens of an answer.", SHORT_SECONDS)
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the end of all answers.", LONG_SECONDS)
        self._prompt_sizes = histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._answer_sizes = histogram("request_generation_tokens", "Tokens of a request's answers.", TOKENS)
        registry.register(_EngineCollector(model, engine))

    def note(self, request: Request) -> None:
        """Count a request that has ended or was cancelled."""
        result = request.partial
        n_prompt, times = len(result.prompt_tokens), result.times
        n_echoed = n_prompt if request.params.echo else 0
        n_generated = sum(max(0, len(answer.tokens) - n_echoed) for answer in result.answers)
        self._prompt.inc(n_prompt)
        self._generated.inc(n_generated)
        self._queried.labels(self._model).inc(n_prompt)
        self._hit.labels(self._model).inc(result.cached_tokens)
        for answer in result.answers:
            reason = {"cancelled": "abort"}.get(answer.finish_reason or "cancelled", answer.finish_reason)
            self._ended.labels(self._model, reason).inc()
        self._prompt_sizes.observe(n_prompt)
        self._answer_sizes.observe(n_generated)
        if times.first_token is not None:
            self._first.observe(times.first_token - times.arrival)
        for before, after in zip(times.tokens, times.tokens[1:], strict=False):
            self._between.observe(after - before)
        if times.end is not None:
            self._whole.observe(times.end - times.arrival)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector:
    """What the engine knows, read when it is asked for."""

    def __init__(self, model: str, engine: AnyEngine) -> None:
        self._model, self._engine = model, engine

    def collect(self) -> Iterator[Metric]:
        """The engine's gauges and counters."""
        stats = self._engine.stats
        gauges = {
            "num_requests_running": ("Answers that are being generated.", stats.running),
            "num_requests_waiting": ("Answers that wait for a row or for pages of the cache.", stats.waiting),
            "kv_cache_usage_perc": ("Share of the cache's pages in use, 0 to 1.", stats.used_pages / stats.pages),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=[LABEL])
            gauge.add_metric([self._model], value)
            yield gauge
        preemptions = CounterMetricFamily("vllm:num_preemptions", "Answers that were put back.", labels=[LABEL])
        preemptions.add_metric([self._model], stats.preemptions)
        yield preemptions
