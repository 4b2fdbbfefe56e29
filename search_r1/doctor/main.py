"""Says what is wrong with this machine and this environment for a run, and how to mend it.

With overrides, the configuration is checked as well, and its retriever asked for its health. The
exit status is 1 if there is a problem.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence

from search_r1.doctor import machine, network, packages
from search_r1.doctor.finding import Finding, Status, fine, problem
from search_r1.program import program_name
from verl.utils.errors import ConfigError
from verl.utils.wording import counted

MARKS = {Status.OK: " ok ", Status.WARNING: "warn", Status.PROBLEM: "FAIL"}
COLORS = {Status.OK: "\033[32m", Status.WARNING: "\033[33m", Status.PROBLEM: "\033[31m"}
PLAIN = "\033[0m"


def main(argv: Sequence[str] | None = None) -> int:
    """Checks, reports, and returns the exit status."""
    args = make_parser().parse_args(argv)
    found: list[Finding] = []
    for finding in findings(args.overrides, args.config_name, args.fast):
        found.append(finding)
        if not args.json:  # each as it is found, because some checks take seconds
            sys.stdout.write(line_of(finding, sys.stdout.isatty()))
            sys.stdout.flush()
    problems = sum(finding.status is Status.PROBLEM for finding in found)
    if args.json:
        sys.stdout.write(json.dumps([finding._asdict() for finding in found], indent=1) + "\n")
    else:
        sys.stdout.write(verdict(found))
    return int(problems > 0)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog=program_name("search_r1.doctor.main"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key=value", help="as in training, such as experiment=...")
    add("--config-name", default="grpo", help="as in training: grpo (default) or ppo")
    add("--json", action="store_true", help="for programs: a list of name, status, says and cure")
    add("--fast", action="store_true", help="leave out what imports torch and vLLM")
    return parser


def findings(overrides: Sequence[str], config_name: str, fast: bool) -> Iterator[Finding]:
    """Yields what each check finds, those of the machine first."""
    slow = (packages.engine, packages.gpus) if fast else ()
    for check in (*machine.CHECKS, *packages.CHECKS, *network.CHECKS):
        if check not in slow:
            yield check()
    if overrides:
        yield from of_configuration(config_name, overrides)


def of_configuration(config_name: str, overrides: Sequence[str]) -> Iterator[Finding]:
    """Yields whether a configuration can work, and whether its retriever answers."""
    # what these need may be the very thing that is missing here
    from verl.trainer.compose import as_plain, composed
    from verl.trainer.config import validate

    try:
        plain = as_plain(composed(config_name, overrides))
        validate(plain)
    except ConfigError as error:
        yield problem("configuration", "; ".join(error.problems), "docs/configuration.md")
        return
    yield fine("configuration", " ".join(overrides))
    is_served_by_launcher = plain["setup"]["index_dir"] and not any(
        override.startswith("retriever.url=") for override in overrides
    )
    if plain["do_search"] and not is_served_by_launcher:
        urls = plain["retriever"]["url"]
        for url in [urls] if isinstance(urls, str) else urls:
            yield network.retriever(url)


def line_of(finding: Finding, colored: bool) -> str:
    """A finding as a line, and its cure as a second one."""
    mark = MARKS[finding.status]
    if colored:
        mark = f"{COLORS[finding.status]}{mark}{PLAIN}"
    cure = f"       -> {finding.cure}\n" if finding.cure else ""
    return f"[{mark}] {finding.name}: {finding.says}\n{cure}"


def verdict(found: Sequence[Finding]) -> str:
    """The last line: how many findings there are of each kind."""
    problems = sum(finding.status is Status.PROBLEM for finding in found)
    warnings = counted(sum(finding.status is Status.WARNING for finding in found), "warning")
    if problems:
        return f"{counted(problems, 'problem')}, {warnings}\n"
    return f"No problem found; {warnings}. Next: search-r1 train\n"


if __name__ == "__main__":
    sys.exit(main())
