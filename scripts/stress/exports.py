"""Do exported models and hosts work under other releases of transformers? A table, and exit code 1 where they do not.

`python -m scripts.stress.exports [5.0.0 5.24.0 newest ...] [--folder DIR]` runs the tests of exports and hosts once for
each release, in an environment of its own. That has the release and whatever else it asks for; all other packages are
those of the environment that runs this script. pip takes the release from where it is set up to take packages.

The environments are made in a temporary folder and deleted at the end, or kept in --folder and used again.
"""

import argparse
import logging
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from dataclasses import dataclass
from pathlib import Path

from nanochat.runtime import run_script
from nanochat.system.environment import UserError

logger = logging.getLogger("nanochat")

ROOT = Path(__file__).resolve().parents[2]
RELEASES = ("5.0.0", "5.12.1", "5.23.0", "5.24.0", "newest")
TESTS = (
    "tests/conversion/test_huggingface.py",
    "tests/conversion/test_hf_refresh.py",
    "tests/adapters/test_hosts.py",
    "tests/adapters/test_transformers_host.py",
)
VERSION = "import transformers; print(transformers.__version__)"


@dataclass(frozen=True)
class Outcome:
    """Of one release: its version (as asked for, where it could not be installed), tests passed, names that failed."""

    release: str
    passed: int = 0
    failed: tuple[str, ...] = ()
    reason: str = ""  # why there are no tests

    @property
    def verdict(self) -> str:
        if self.reason:
            return f"not run: {self.reason}"
        if self.failed:
            more = f" and {len(self.failed) - 2} more" if len(self.failed) > 2 else ""
            return f"WRONG: {', '.join(self.failed[:2])}{more}"
        return "right" if self.passed else "not run: no test ran"

    @property
    def right(self) -> bool:
        return self.verdict == "right"


def check_release(release: str, folder: Path, tests: tuple[str, ...]) -> Outcome:
    """Install a release into an environment in `folder` and run the tests with it."""
    python = make_environment(folder / release)
    wanted = "transformers" if release == "newest" else f"transformers=={release}"
    done = run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--upgrade", wanted])
    if done.returncode:
        return Outcome(release, reason=last_line(done.stderr) or "pip failed")
    version = run([python, "-c", VERSION])
    if version.returncode:
        return Outcome(release, reason=last_line(version.stderr))
    found = version.stdout.strip()
    if release not in (found, "newest"):
        return Outcome(release, reason=f"the environment has {found}")
    report = folder / f"{release}.xml"
    release = f"{found} (newest)" if release == "newest" else found
    report.unlink(missing_ok=True)
    done = run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests])
    if not report.is_file():
        return Outcome(release, reason=last_line(done.stdout + done.stderr) or f"pytest ended with {done.returncode}")
    return read_report(release, report.read_text(encoding="utf-8"))


def make_environment(place: Path) -> Path:
    """The interpreter of an environment at `place`, made if need be, that also sees our packages, after its own."""
    python = place / "bin" / "python"
    if not python.is_file():
        made = run([sys.executable, "-m", "venv", str(place)])
        if made.returncode:
            raise UserError(f"no environment can be made at {place}: {last_line(made.stdout + made.stderr)}")
    (packages,) = place.glob("lib/python3.*/site-packages")
    ours = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    (packages / "zz_borrowed.pth").write_text("".join(f"{entry}\n" for entry in (ROOT, *ours)), encoding="utf-8")
    return python


def run(command: list) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, errors="replace")


def last_line(text: str) -> str:
    """The last line that says what went wrong; warnings and notices of pip come after it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [""])[-1][:200]


def read_report(release: str, report: str) -> Outcome:
    """pytest's JUnit file: a test that fails, cannot be set up or is skipped has not passed."""
    cases = list(xml.etree.ElementTree.fromstring(report).iter("testcase"))
    failed = [case for case in cases if any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))]
    names = tuple(dict.fromkeys(case.get("name", "?") for case in failed))  # one may fail and then fail to be torn down
    passed = {(case.get("classname"), case.get("name")) for case in cases if case not in failed}
    return Outcome(release, len(passed - {(case.get("classname"), case.get("name")) for case in failed}), names)


def table(outcomes: list[Outcome]) -> list[str]:
    """A line for each release."""
    rows = [("transformers", "passed", "failed", "verdict")]
    rows += [(o.release, str(o.passed), str(len(o.failed)), o.verdict) for o in outcomes]
    first = max(len(row[0]) for row in rows)
    return [f"{row[0]:<{first}}  {row[1]:>6}  {row[2]:>6}  {row[3]}" for row in rows]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.stress.exports", description=__doc__.splitlines()[0])
    parser.add_argument("releases", nargs="*", metavar="RELEASE", help=f"(default: {' '.join(RELEASES)})")
    parser.add_argument("--folder", type=Path, help="keep the environments here, and use those that are there")
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="FILE", help=f"(default: {' '.join(TESTS)})")
    args = parser.parse_args(argv)
    for release in args.releases:
        if release != "newest" and not re.fullmatch(r"\d+(\.\w+)+", release):
            raise UserError(f"{release!r} is no release: write it as in 5.24.0, or newest")
    args.releases = list(dict.fromkeys(args.releases or RELEASES))
    return args


def main(argv: list[str] | None = None) -> list[Outcome]:
    """Check all releases and print the table; exit code 1 when one is not right."""
    args = parse(argv)
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="check-exports-") as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        outcomes = []
        for release in args.releases:
            logger.info(f"transformers {release} ...")
            outcomes.append(check_release(release, folder, tuple(args.tests)))
    for line in table(outcomes):
        logger.info(line)
    if not all(outcome.right for outcome in outcomes):
        sys.exit(1)
    return outcomes


if __name__ == "__main__":
    run_script(main)
