"""What the server allows and how long it waits."""

from dataclasses import dataclass, field

from tracerl_jax.errors import ConfigError
from tracerl_jax.rollout.options import SamplingOptions


@dataclass(frozen=True)
class ServeConfig:
    """Raises ConfigError naming the field on construction."""

    model_name: str  # what clients call the model
    block_sizes: tuple[int, ...]  # that clients may ask for; each has programs of its own and waits for empty slots
    max_length: int  # tokens of prompt and completion, the engine's
    defaults: SamplingOptions = field(default_factory=SamplingOptions)  # where a request does not say
    whole_blocks: int | None = None  # of a full-attention model, whose completions are whole blocks: its block size
    api_key: str | None = None
    slots: int = 32  # the engine's
    max_queue: int = 256  # samples waiting for a slot; beyond, 429
    max_prompt_tokens: int | None = None  # None = what max_length leaves
    max_completion_tokens: int | None = None  # None = what max_length leaves
    max_samples: int = 32  # prompts times n of one request
    max_body_bytes: int = 2**20
    body_seconds: float = 30.0  # until the body of a request must be there
    request_seconds: float = 600.0  # of the whole request, from its first byte to the end of the answer
    drain_seconds: float = 30.0  # after SIGTERM, for the requests that run

    def __post_init__(self) -> None:
        for name in ("slots", "max_length", "max_prompt_tokens", "max_completion_tokens", "max_samples",
                     "max_body_bytes", "body_seconds", "request_seconds"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} is {value}; it must be above 0")
        for name in ("max_queue", "drain_seconds"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.max_samples > self.capacity:
            raise ConfigError(
                f"max_samples is {self.max_samples} but slots and max_queue together hold {self.capacity}; lower it or "
                "raise max_queue"
            )
        if self.api_key is not None and (not self.api_key or not self.api_key.isascii()):
            raise ConfigError("api_key must be a text of ASCII characters that is not empty")

    @property
    def capacity(self) -> int:
        """Samples that may be waiting or running at once."""
        return self.slots + self.max_queue
