"""`cocomix report`: runs compared, and measurements shown."""

from cocomix.core.errors import CocomixError

SUMMARY = "compare runs and show measurements: a table, and a page with figures"


def add_arguments(parser):
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of training runs")
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="FILE",
        help="show what `cocomix profile --json FILE` measured; may be given several times",
    )
    parser.add_argument("--bench", metavar="FILE", help="show the benchmarks of `make bench`")
    parser.add_argument(
        "--bench-before",
        metavar="FILE",
        help="compare them with an older file; what became slower beyond the noise is named",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the comparison of the runs to this file")
    parser.add_argument("--out", default="report", help="folder for report.html and its figures (default: report)")


def run(options):
    from cocomix.report.comparison_file import write_comparison
    from cocomix.report.measurement_page import measured_sections
    from cocomix.report.report import comparison_table, load_run, write_report

    if not (options.runs or options.profile or options.bench):
        raise CocomixError("nothing to report: name the folder of a run, or a file with --profile or --bench")
    if options.json and not options.runs:
        raise CocomixError("--json writes the comparison of runs: name their folders")
    runs = [load_run(folder) for folder in options.runs]
    sections, text = measured_sections(options.profile, options.bench, options.bench_before)
    page = write_report(runs, options.out, sections)  # files first: printing may fail, where nobody reads it to its end
    if options.json:
        write_comparison(options.json, runs)
    if runs:
        print(comparison_table(runs))
    if text:
        print(text)
    print(f"report: {page}")
    if options.json:
        print(f"figures: {options.json}")
