"""Generators of reasoning-gym as tasks `reasoning_gym:NAME`: questions and scorers of the library."""

from dataclasses import dataclass

from tracerl_jax.data.procedural import Counts, Split
from tracerl_jax.errors import ConfigError

ASK = "\nPut the final answer between <answer> and </answer>."


@dataclass(frozen=True)
class GymOptions(Counts):
    train_count: int = 1000  # the library's generators can be slow: 100 to 50,000 rows a second
    test_count: int = 100
    generator: str = ""  # from the task's name

    def rows(self, split: Split, count: int) -> list[dict]:
        """Rows `{question, ground_truth_answer, generator, entry}`; the reward `reasoning_gym` reads the last two.

        A test row whose question the training split holds as well is left out.
        """
        if split == "train":
            return self._make(self.seed, count)
        training = {row["question"] for row in self._make(self.seed, self.train_count)}
        # A seed of its own. The library draws row i from seed + i, so neighbouring seeds would share rows.
        rows = [row for row in self._make(self.seed + self.train_count, count) if row["question"] not in training]
        if not rows:
            raise ConfigError(
                f"reasoning_gym:{self.generator} has so few questions that the training rows hold all of them; lower "
                f"train_count ({self.train_count})"
            )
        return rows

    def _make(self, seed: int, count: int) -> list[dict]:
        library = import_gym()
        if self.generator not in library.factory.DATASETS:
            known = ", ".join(sorted(library.factory.DATASETS))
            raise ConfigError(f"reasoning-gym has no generator {self.generator!r}; it has {known}")
        try:
            entries = list(library.create_dataset(self.generator, size=count, seed=seed))
        except Exception as error:  # whatever a generator of the library raises
            raise ConfigError(f"reasoning-gym's generator {self.generator} cannot be used: {error}") from error
        return [
            {
                "question": entry["question"].rstrip() + ASK, "ground_truth_answer": entry["answer"],
                "generator": self.generator, "entry": entry,
            }
            for entry in entries
        ]  # fmt: skip


def import_gym():
    """The library. Raises `ConfigError` where it is not installed."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError(
            f"tasks reasoning_gym:NAME need the package reasoning-gym ({error}); install it with: "
            "pip install 'tracerl_jax[tasks]'"
        ) from error
    return reasoning_gym
