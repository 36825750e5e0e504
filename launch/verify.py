"""tracerl verify: grade answers that are already there, with the reward of a task."""

import argparse
import logging
import time

HELP = """Grade a file of answers. --task takes the reward by which answers to that task are judged right or wrong,
--reward any reward by its name.

Input rows: `prediction`, a whole completion or (math) its final answer alone, and the fields of the problem that the
reward needs (ground_truth_answer for math). Output rows: the same in the same order, with `reward` (null: no verdict)
and `detail`, how it was decided."""

EPILOG = """examples:
  tracerl verify --task math --input pairs.jsonl --output graded.jsonl
  tracerl verify --reward short --config my_run.py --input answers.jsonl --output graded.jsonl"""

BATCH = 1024  # rows graded together
LOG_SECONDS = 30

logger = logging.getLogger("tracerl_jax.launch.verify")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from tracerl_jax.launch.common import add_reward_settings

    flag = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", help="task whose reward is taken, e.g. math")
    what.add_argument("--reward", help="reward to take, also one that the file of --config registers")
    flag("--input", required=True, metavar="IN.jsonl", help="rows with prediction and what the reward needs")
    flag("--output", required=True, metavar="OUT.jsonl", help="appears when all rows are done")
    flag("--on_bad_row", choices=("fail", "skip"), default="fail", help="unusable rows (default: %(default)s)")
    add_reward_settings(parser)


def run(args: argparse.Namespace) -> int:
    from tracerl_jax.data.jsonl import write_jsonl
    from tracerl_jax.data.tasks import accuracy_reward
    from tracerl_jax.launch.common import apply_reward_settings
    from tracerl_jax.rewards import get_reward, start_rewards

    apply_reward_settings(args)
    reward = args.reward or accuracy_reward(args.task)
    get_reward(reward)
    rows = _read(args.input, reward, args.on_bad_row)
    start_rewards([reward])
    start = time.monotonic()
    graded = list(_grade(rows, reward))
    seconds = time.monotonic() - start
    write_jsonl(args.output, graded)
    print(_summary(reward, [row["reward"] for row in graded], seconds))
    return 0


def _read(path: str, reward: str, on_bad_row: str) -> list[dict]:
    """Raises DataError naming file, line and what is wrong."""
    from tracerl_jax.data.jsonl import read_jsonl
    from tracerl_jax.errors import DataError
    from tracerl_jax.rewards import check_row

    def check(row: dict) -> str:
        if not isinstance(row["prediction"], str):
            return f"field 'prediction' must be a text, not {row['prediction']!r}"
        return check_row(reward, row)

    rows = [row for _, row in read_jsonl(path, on_bad_row=on_bad_row, required=("prediction",), check=check)]
    if not rows:
        raise DataError(f"{path}: holds no usable row; each line must be a JSON object with a prediction")
    return rows


def _grade(rows: list[dict], reward: str):
    """The rows with their verdicts, and a line in the log now and then."""
    from tracerl_jax.rewards import score

    last = time.monotonic()
    for start in range(0, len(rows), BATCH):
        if time.monotonic() - last > LOG_SECONDS:
            last = time.monotonic()
            logger.info("%d of %d rows", start, len(rows))
        batch = rows[start : start + BATCH]
        prompts = [str(row.get("question") or row.get("prompt") or "") for row in batch]
        result = score({reward: 1.0}, prompts, [row["prediction"] for row in batch], batch)
        for row, value, detail in zip(batch, result.total.tolist(), result.details[reward], strict=True):
            yield {**row, "reward": None if value != value else value, "detail": detail}


def _summary(reward: str, values: list[float | None], seconds: float) -> str:
    known = [value for value in values if value is not None]
    mean = f"mean {sum(known) / len(known):.4f}" if known else "no mean"
    return f"{reward}: {mean} over {len(known)} answers, {len(values) - len(known)} without verdict, {seconds:.1f} s"
