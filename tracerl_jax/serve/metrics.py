"""What Prometheus reads at /metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from tracerl_jax.serve.engine_loop import EngineLoop

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self):
        disable_created_metrics()
        self.registry = CollectorRegistry()
        common = {"registry": self.registry, "namespace": "tracerl"}
        # Status of a request whose client left: 499, as nginx writes it.
        self.requests = Counter("requests", "Requests answered", ["endpoint", "status"], **common)
        self.seconds = Histogram("request_seconds", "From request to the end of its answer", ["endpoint"],
                                 buckets=SECONDS, **common)  # fmt: skip
        self.first_seconds = Histogram("first_block_seconds", "From request to its first block, of streams",
                                       buckets=SECONDS, **common)  # fmt: skip
        self.step_seconds = Histogram("engine_step_seconds", "Steps of the engine: admit, decode, fetch",
                                      buckets=SECONDS, **common)  # fmt: skip
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of the prompts of accepted requests", **common)
        self.completion_tokens = Counter("completion_tokens", "Tokens sent", **common)
        self._common = common

    def watch(self, loop: EngineLoop, slots: int) -> None:
        """Gauges that are read from the engine when Prometheus asks."""
        engine = loop.engine
        for name, text, value in (
            ("samples_running", "Samples in slots", lambda: engine.running),
            ("samples_waiting", "Samples waiting for a slot", lambda: max(0, loop.held - engine.running)),
            ("slots", "Slots of the engine", lambda: slots),
            ("engine_failures", "Steps of the engine that failed since the start", lambda: loop.failures),
        ):
            Gauge(name, text, **self._common).set_function(value)
