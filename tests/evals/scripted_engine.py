"""An engine that answers from a script, and problems for it."""

import numpy as np

from tracerl_jax.data.prompts import Problem
from tracerl_jax.diffusion.trace import Trace


class ScriptedEngine:
    """Answers request i with `answers[i]`: (text ids, denoise forwards, stop reason); a commit per further block. Every
    step finishes the last of the requests that are left."""

    def __init__(self, answers):
        self.answers = answers
        self.requests = []  # all that were submitted
        self.waiting = []

    def check(self, request, where):
        pass

    def submit(self, request):
        self.requests.append(request)
        self.waiting.append(len(self.requests) - 1)
        return self.waiting[-1]

    def cancel(self, number):
        self.waiting.remove(number)

    @property
    def busy(self):
        return bool(self.waiting)

    def step(self):
        number = self.waiting.pop()
        return {number: trace_of(self.requests[number], *self.answers[number])}


def trace_of(request, ids, forwards, stop):
    nothing = np.zeros(0, np.int32)
    return Trace(
        prompt_ids=np.asarray(request.prompt_ids, np.int32),
        ids=np.array(ids, np.int32),
        step_map=np.ones(len(ids), np.int32),
        logprobs=np.zeros(len(ids), np.float32),
        behaviour_logprobs=np.zeros(len(ids), np.float32),
        tail_ids=nothing,
        tail_step_map=nothing,
        block_size=4,
        temperature=request.options.temperature,
        denoise_forwards=forwards,
        stop_reason=stop,
        sample_index=request.sample_index,
        forwards=forwards + (len(ids) - 1) // 4,
    )


def problems(*golds):
    return [
        Problem(index, f"q{index}", np.array([1, 2, 3, 4 + index]), {"ground_truth_answer": gold})
        for index, gold in enumerate(golds)
    ]


def text_of(ids):
    return "".join(str(i) for i in ids)
