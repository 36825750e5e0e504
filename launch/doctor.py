"""`tracerl doctor`: prints what `tracerl_jax.doctor` finds."""

import argparse
import dataclasses
import json
from collections import Counter

from tracerl_jax.launch.common import CommandParser

HELP = """
Print the versions, the devices and the known-bad combinations of this installation, each with its fix.
Exits with status 1 when something is broken.
"""
EPILOG = """examples:
  tracerl doctor
  tracerl doctor --json > installation.json     # to attach to a bug report"""


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    from tracerl_jax.doctor import collect

    report = collect()
    print(json.dumps(dataclasses.asdict(report), indent=2) if args.json else format_report(report))
    return 1 if report.broken else 0


def format_report(report) -> str:
    """Text for people: versions, devices, then each finding and its fix."""
    from tracerl_jax.units import GIB

    facts = report.facts
    lines = [f"python {'.'.join(map(str, facts.python))}"]
    lines += [f"{name} {version}" for name, version in facts.versions.items()]
    lines.append("")
    for device, count in Counter(facts.devices).items():
        memory = device.memory or (facts.memory if device.platform == "cpu" else None)
        shown = f", {memory / GIB:.1f} GiB" if memory else ""
        lines.append(f"devices: {count} x {device.platform} ({device.kind}{shown})")
    lines.append(f"disk: {facts.disk_free / GIB:.1f} GiB free here")
    lines.append("")
    for finding in report.findings:
        lines += [f"{finding.level}: {finding.problem}", f"    fix: {finding.fix}"]
    if not report.findings:
        lines.append("no known problem")
    return "\n".join(lines)
