"""Random command lines of every program, run up to the point where computation begins.

The programs run in this process; the functions that follow all checks are mocked.
"""

import contextlib
import io
import runpy
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from absl import flags
from absl.testing import flagsaver
from hypothesis import strategies as st

from nrgpt_jax import cli
from nrgpt_jax.configs import default_config, flattened
from nrgpt_jax.core.energies import ENERGIES
from nrgpt_jax.datasets import DATASETS
from nrgpt_jax.models import model_names
from studies.programs import ROOT
from studies.reliability.attempts import counted, drawn, judged
from studies.reliability.contents import small
from studies.reliability.report import Part

PROGRAMS = ("analyze", "convert", "evaluate", "export", "launch", "prepare", "sample", "train")
CONFIGURED = ("launch", "prepare", "train")  # programs with the flag --config
COMPILED = "/jax/core/compile/backend_compile_duration"

# Functions that follow the checks of a program: a case that reaches one has passed.
HEAVY = (
    "nrgpt_jax.training.loop.load_dataset",
    "nrgpt_jax.datasets.load_recorded",
    "nrgpt_jax.datasets.load_dataset",
    "nrgpt_jax.datasets.corpora.prepare_corpus",
    "nrgpt_jax.generation.generate.read",
    "nrgpt_jax.analysis.examination._run",
    "subprocess.run",
    "jax.distributed.initialize",
    "jax.export.export",
)
SETTINGS = ("nrgpt_jax.host.cache_compilations", "nrgpt_jax.host.use_all_cores")  # process-wide

ODD = ("", "x", "abc", "a" * 5000, "../..", "-", "(", "1,2", "a b", "a\nb", "\udcff", "<i>", ".")
PLACES = ("https://u:pass@h/x?token=secret", "gs://b/x", "/dev/null", "run", "old")
MISTAKES = ("", "x", "1e3", "1.5", "nan", "None", "[]", "{}", "true")
NAMES = (*model_names(), *ENERGIES, *DATASETS, "char", "byte", "bfloat16", "muon", "none", "strict")
ANY = st.text(st.characters(exclude_characters="\0"), max_size=8)
TEXTS = st.one_of(st.sampled_from(ODD), st.sampled_from(PLACES), ANY)
WRONG = st.one_of(st.sampled_from(MISTAKES), TEXTS)
LARGE = (2**31, 2**32, 2**63, 10**12, -(10**12), 10**30)
FLOATS = ("0", "1", "-1", "0.5", "0.01", "1e-300", "1e300", "nan", "inf", "-inf", "1e5")
LIKELY = {
    "int": st.one_of(st.integers(-3, 300), st.sampled_from(LARGE)).map(str),
    "float": st.sampled_from(FLOATS),
    "bool": st.sampled_from(("true", "false")),
    "name": st.one_of(st.sampled_from(NAMES), TEXTS),
}
STRAY = ("stray", "--nope", "--nope=1", "--config.nope=1", "--workdir", "--", "-x", "")
Words = st.SearchStrategy[str]  # of a command line
Command = tuple[str, list[str]]  # a program and its arguments


class Reached(Exception):
    """Raised when all checks have passed."""


def word(name: str, likely: Words) -> Words:
    """Return a strategy for a flag with a value, mostly of its type."""
    return st.one_of(likely, likely, likely, WRONG).map(lambda value: f"--{name}={value}")


def words_of(program: str) -> dict[str, Words]:
    """Return strategies for the flags that a program defines, except --config, with values."""
    with flagsaver.flagsaver(), mock.patch.object(cli, "run"):
        before = set(flags.FLAGS)
        start(program, [])
        words = {}
        for name in sorted(set(flags.FLAGS) - before - {"config"}):
            parser = flags.FLAGS[name].parser
            likely = LIKELY.get(parser.flag_type().split()[-1], TEXTS)
            choices = getattr(parser, "enum_values", None)
            words[name] = word(name, st.sampled_from(sorted(choices)) if choices else likely)
        return words


def start(program: str, arguments: list[str]) -> None:
    """Run a program in this process."""
    with mock.patch.object(sys, "argv", [program, *arguments]), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of an already imported program
        runpy.run_module(f"nrgpt_jax.{program}", run_name="__main__", alter_sys=False)


def commands(folder: Path) -> st.SearchStrategy[Command]:
    """Return a strategy for command lines about the run in a folder; most can be valid."""
    own = {program: words_of(program) for program in PROGRAMS}
    fields = [
        word(f"config.{name}", LIKELY.get(type(value).__name__, LIKELY["name"]))
        for name, value in flattened(default_config()).items()
    ]
    run = str(folder / "run")
    needed = {"workdir": run, "run": run, "prompt": "abc", "out": "out"}
    needed |= {"target": "tpu", "bucket": "gs://bucket"}
    files = sorted(str(path) for path in (ROOT / "experiments").glob("*.py"))
    listops = str(ROOT / "experiments/listops.py")
    others = (*files, f"{listops}:nope", "nope.py", "/dev/null", ".", *[listops] * 5 * len(files))

    @st.composite
    def strategy(draw) -> Command:
        program = draw(st.sampled_from(PROGRAMS))
        rarely = lambda times: not draw(st.integers(0, times - 1))
        some = lambda words: [draw(w) for w in draw(st.lists(st.sampled_from(words), max_size=3))]
        given = [name for name in needed if name in own[program] and not rarely(10)]
        words = [f"--{name}={needed[name]}" for name in given] + some([*own[program].values()])
        if program in CONFIGURED and not rarely(20):
            words += [f"--config={draw(st.sampled_from(others))}", *some(fields)]
        words += ["--dry_run"] * (program == "launch")
        words += [draw(st.sampled_from(STRAY))] * rarely(10)
        return program, words

    return strategy()


@contextlib.contextmanager
def harness(folder: Path) -> Iterator[Callable[[Command], tuple[str, str]]]:
    """Yield a function that runs a command line in a folder and returns (outcome, message)."""
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **more: str | int) -> None:
        compiled.extend([event] * (event == COMPILED))

    def judge(command: Command) -> tuple[str, str]:
        said = io.StringIO()
        compiled.clear()

        def attempt() -> str:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                try:
                    start(*command)
                except Reached:
                    return "fine"
                except SystemExit as ended:
                    return outcome(ended.code, said.getvalue(), bool(compiled))
            return "fine"

        with flagsaver.flagsaver():
            found, reason = judged(attempt)
        return found, reason or said.getvalue()

    with contextlib.ExitStack() as held:
        for name in HEAVY:
            held.enter_context(mock.patch(name, side_effect=Reached))
        for name in SETTINGS:
            held.enter_context(mock.patch(name))
        held.callback(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT))
        held.enter_context(contextlib.chdir(folder))
        jax.monitoring.register_event_duration_secs_listener(listen)
        held.callback(jax.monitoring.unregister_event_duration_listener, listen)
        yield judge


def outcome(code: Any, said: str, compiled: bool) -> str:
    """Return the outcome of a program that has exited by itself."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if code in (0, None):
        return "silent" if errors else "fine"
    one = len(errors) == 1 and said.endswith(errors[0] + "\n") and "Traceback" not in said
    hidden = "pass@" not in said and "secret" not in said
    return "one line" if one and hidden and not compiled else "traceback"


def run(cases: int, seed: int, jobs: int = 1) -> dict[str, Any]:
    """Command lines.

    Random command lines are run. *Fine*: the program reaches the point where it would begin to
    compute. Otherwise it must end with one line and a non-zero exit code before anything is
    compiled.
    """
    del jobs
    with tempfile.TemporaryDirectory() as root:
        small(Path(root) / "run")
        lines = commands(Path(root))
        with harness(Path(root)) as judge:
            return counted(drawn(lines, judge, cases, seed))


PART = Part("program", 1000, run)
