"""Make a page about one or several runs.

    python launch/report.py RUN... -o FILE

RUN is a run directory, finished or not, or a folder of run directories. The page is one HTML file with its pictures in it:
losses of each head, the selection's curves, thresholds, enrichment of the sources, speed, memory, restarts, where the time
went, and the settings that differ. It needs no network, and neither does this command, nor a GPU. Exit code 2, with one
message, if there is nothing to show.
"""

import sys
from collections.abc import Sequence

from pipeline.failures import guarded
from pipeline.option_parser import OptionParser, OptionsError
from pipeline.options import output_problems, path_argument
from pipeline.report.errors import ReportError


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = OptionParser(prog="report.py", description=__doc__)
    parser.add_argument("runs", type=path_argument, nargs="+", metavar="RUN", help="run directories, or folders of them")
    parser.add_argument("-o", "--output", type=path_argument, required=True, metavar="FILE", help="the page to write, HTML")
    return guarded(f"{parser.prog}: error", lambda: _report(parser, arguments), (OptionsError, ReportError))


def _report(parser: OptionParser, arguments: Sequence[str]) -> int:
    options, unknown, problems = parser.read(arguments)
    problems += parser.unknown_options(unknown)
    problems += output_problems("-o/--output", options.output)
    if problems:
        raise OptionsError(problems)

    from pipeline.report.page import page
    from pipeline.report.run_files import read_runs, run_directories
    from pipeline.storage.whole_file import write_file

    write_file(options.output, page(read_runs(run_directories(options.runs))).encode())
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
