"""Which preset fits which chips: runs `tracerl plan` for every row below and writes docs/presets.md.

    python benchmarks/presets.py                      every row; some hours on two cores
    python benchmarks/presets.py rl_sdar_8b_math ..   only rows of these configs; the page keeps the others

What was found is kept in build/plans/, one JSON file a row, so the command goes on where it was interrupted; delete a
file to compile its row again. A row is compiled once, with the value model: without it a run compiles the same programs
less those of the value model, and less stays on the chips.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from tracerl_jax.config import RunConfig
from tracerl_jax.config_io import load_config

ROOT = Path(__file__).parents[1]
PLANS = ROOT / "build" / "plans"
PAGE = ROOT / "docs" / "presets.md"
GIB = 2**30
UTILISATION = 0.4  # of the chip's peak, as `tracerl plan` assumes

# (config, topology, overrides), the smallest topologies of a config first.
ROWS = [
    ("rl_sdar_1_7b_math", "h100:1", ("rollout.slots_per_device=32",)),
    ("rl_sdar_1_7b_math", "v5p:2x2x1", ()),
    ("rl_sdar_1_7b_math", "v6e:4x4", ("rollout.slots_per_device=32",)),
    ("rl_sdar_4b_math", "v5p:2x2x1", ()),
    ("rl_sdar_4b_math", "h100:8", ()),
    ("rl_sdar_4b_math", "v5p:2x4x4", ()),
    ("rl_sdar_8b_math", "v5p:2x2x2", ()),
    ("rl_sdar_8b_math", "h100:16", ()),
    ("rl_sdar_8b_math", "v5p:4x4x4", ()),
    ("rl_sdar_30b_a3b_math", "v5p:2x4x4", ()),
    ("rl_sdar_30b_a3b_math", "h100:64", ()),
    ("rl_dream_7b_math", "h100:8", ()),
    ("rl_dream_7b_math", "v5p:2x2x2", ()),
    ("rl_llada_8b_math", "h100:8", ()),
    ("rl_llada_8b_math", "v5p:2x2x2", ()),
    ("rl_mmada_8b_math", "h100:8", ()),
    ("rl_mmada_8b_math", "v5p:2x2x2", ()),
]

INTRODUCTION = """# What fits where

Written by `python benchmarks/presets.py` from the figures of the real TPU and CUDA compilers (`tracerl plan`); nothing
here has run on an accelerator. Memory is the peak of a chip over all programs of an RL step, everything that stays on
it included. A GPU's limit is JAX's default share of 75%: XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 in the environment, of
`tracerl plan` and of the run, gives more. Seconds are those of one RL step and lower bounds, at 100% of the chip's
peak: what its FLOPs, HBM and links allow if nothing else costs anything. The last column is the time of all RL steps
of the config (`rl.steps`) at 40% of the peak, an assumption; evaluations and checkpoints come on top. Prompts and
responses are the longest that the configs allow, and all responses are kept: a real step, with shorter responses, is
cheaper.

| configs | prompt, response | tokens per denoise step | shrink |
| --- | --- | --- | --- |
| SDAR | 784, 2000 | 2.6 | 1 |
| Dream | 512, 1024 | 1.03, the static schedule's | 8 |
| LLaDA, MMaDA | 512, 512 | 2.6 | 8 |

TraDo 4B and 8B have the shapes of SDAR 4B and 8B, `rl_diffucoder_7b_code` compiles the programs of `rl_dream_7b_math`,
and LLaDA 1.5 has the shapes of LLaDA. A v5p-64 slice of Google Cloud, which counts cores, has 32 chips. What a step
costs with other values of `rl.shrink`: the table that `tracerl plan` prints. Rows are not all of one commit: those of
SDAR 1.7B and 4B on TPUs, and of the other families on TPUs, are older than the conversion of the weights for decoding
layer by layer, which needs less memory (`sync`).
"""


def plan(config: str, topology: str, overrides: tuple[str, ...]) -> dict:
    """`tracerl plan --json` of a row with the value model, from build/plans/ if it is there."""
    kept = PLANS / f"{config}@{'_'.join([topology.replace(':', '-'), *overrides])}.json"
    if not kept.exists():
        command = [sys.executable, "-m", "tracerl_jax", "plan", "--json", f"--config={config}:value",
                   f"--topology={topology}", *(f"--config.{override}" for override in overrides)]  # fmt: skip
        print(*command[2:], flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode not in (0, 1):  # 1: it does not fit
            sys.exit(done.returncode)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(done.stdout)
    return json.loads(kept.read_text())


def without_value(found: dict) -> dict:
    """The plan of the same run without value model."""
    removed = sum(size for name, size in found["resident_bytes"].items() if name.startswith("value"))
    programs = [
        {**program, "peak_bytes": program["peak_bytes"] - removed}
        for program in found["programs"]
        if not program["name"].startswith("value")
    ]
    return {**found, "programs": programs}


def row(config: str, found: dict, overrides: tuple[str, ...]) -> str:
    programs = found["programs"]
    peak = max(programs, key=lambda program: program["peak_bytes"])
    fits = peak["peak_bytes"] <= found["hbm_bytes"] and not any(program["overflow"] for program in programs)
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1) or "one chip"
    cells = [
        _config_cell(config, overrides),
        f"{found['topology']} ({found['chips']})",
        mesh,
        f"{peak['peak_bytes'] / GIB:.0f} of {found['hbm_bytes'] / GIB:.0f} ({peak['name']})",
        "yes" if fits else "**no**",
    ]
    if any(program["overflow"] for program in programs):
        return _line([*cells, "-", "-", "-", "-"])
    seconds = {program["name"]: program["runs_per_step"] * program["seconds"] for program in programs}
    rollout = sum(seconds[name] for name in seconds if name in ("sync", "prefill", "decode"))
    total = sum(seconds.values())
    cells += [f"{rollout:.0f}", f"{total - rollout:.0f}", f"{found['response_tokens'] / total / found['chips']:,.0f}"]
    return _line([*cells, _run_cell(config, total)])


def _run_cell(config: str, step_seconds: float) -> str:
    """All RL steps of the config, each `step_seconds` at the peak."""
    steps = load_config(RunConfig, config).rl.steps
    hours = steps * step_seconds / UTILISATION / 3600
    return f"{steps} in {hours:.0f} h" if hours < 48 else f"{steps} in {hours / 24:.1f} days"


def _config_cell(config: str, overrides: tuple[str, ...]) -> str:
    return f"`{config}`" + "".join(f"<br>`--config.{override}`" for override in overrides)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def lines_of_page() -> dict[tuple[str, str], str]:
    """The lines of the page's table by their config cell and topology."""
    found = {}
    for line in PAGE.read_text().splitlines() if PAGE.exists() else []:
        if line.startswith("| `rl_"):
            config, topology, *_ = line.removeprefix("| ").split(" | ")
            found[config, topology.partition(" ")[0]] = line
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="default: all")
    only, known = parser.parse_args().configs, lines_of_page()
    if unknown := set(only) - {config for config, *_ in ROWS}:
        parser.error(f"no row has the config {', '.join(sorted(unknown))}")
    lines = [_line(["config", "topology (chips)", "mesh", "peak GiB per chip", "fits", "rollout s", "update s",
                    "tokens/s per chip", "steps at 40%"]), _line(["---"] * 9)]  # fmt: skip
    for config, topology, overrides in ROWS:
        if only and config not in only:
            keys = [(_config_cell(name, overrides), topology) for name in (config, f"{config}:value")]
            lines += [known[key] for key in keys if key in known]
            continue
        found = plan(config, topology, overrides)
        lines += [row(config, without_value(found), overrides), row(f"{config}:value", found, overrides)]
    PAGE.write_text(INTRODUCTION + "\n" + "\n".join(lines) + "\n")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
