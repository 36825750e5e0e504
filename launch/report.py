"""tracerl report: the page of a run."""

import argparse
import webbrowser

from tracerl_jax.report.page import write_page

HELP = "write the report page of a run: curves, samples and a step-by-step trace viewer in one HTML file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", help="run folder, e.g. runs/demo; the run may still be going")
    parser.add_argument("--output", metavar="PAGE.html", help="where to write (default: RUN_DIR/report.html)")
    parser.add_argument("--open", action="store_true", help="also open the page in the default browser")


def run(args: argparse.Namespace) -> int:
    path = write_page(args.run_dir, args.output)
    print(path)
    if args.open:
        webbrowser.open(path.resolve().as_uri())
    return 0
