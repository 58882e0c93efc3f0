"""Command lines drawn at random, of every program, up to where it would begin to compute.

    from studies.reliability import commands
    commands.run(cases=1000, seed=0)

The programs run in this process; what they would do once all checks are passed is replaced. A case
must get there, or end in one line, `error: ...`, and an exit code that is not zero, before anything
is compiled.
"""

import contextlib
import io
import runpy
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
from absl import flags
from hypothesis import strategies as st

import nrgpt_jax
from nrgpt_jax import cli, configs
from nrgpt_jax.core.energies import ENERGIES
from nrgpt_jax.datasets import DATASETS
from nrgpt_jax.models import model_names
from studies.reliability import tally
from studies.reliability.contents import small
from studies.reliability.tally import judged

TITLE, CASES = "Command lines", 1000

PROGRAMS = ["train", "evaluate", "sample", "analyze", "export", "convert", "prepare", "launch"]
EXPERIMENTS = Path(nrgpt_jax.__file__).parents[1] / "experiments"
COMPILED = "/jax/core/compile/backend_compile_duration"

# What follows the checks of a program. Where it begins, a case has passed.
HEAVY = (
    "nrgpt_jax.training.loop.load_dataset",
    "nrgpt_jax.datasets.load_recorded",
    "nrgpt_jax.datasets.load_dataset",
    "nrgpt_jax.datasets.corpora.prepare_corpus",
    "nrgpt_jax.generation.generate.read",
    "nrgpt_jax.analysis.examination._run",
    "nrgpt_jax.runs.version1.Checkpoints",
    "jax.distributed.initialize",
    "jax.export.export",
)
SETTINGS = ("cache_compilations", "use_all_cores")  # of the process, which others use too

INTEGERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from((2**31, 2**32, 2**63, 10**12, -(10**12), 10**30)),
).map(str)
FLOATS = st.sampled_from(
    ["0", "1", "-1", "0.5", "0.01", "1e-300", "1e300", "nan", "inf", "-inf", "1e5"]
)
TEXTS = st.one_of(
    st.sampled_from(
        ("", "x", "abc", "a" * 5000, "../..", "-", "(", "1,2", "a b", "a\nb", "\udcff", "<i>")
    ),
    st.sampled_from(
        ("https://u:pass@h/x?token=secret", "gs://b/x", "/dev/null", ".", "run", "old")
    ),
    st.text(st.characters(exclude_characters="\0"), max_size=8),
)
KNOWN = st.sampled_from(
    (*model_names(), *ENERGIES, *DATASETS, "char", "byte", "bfloat16", "muon", "none", "strict")
)
WRONG = st.one_of(
    st.sampled_from(("", "x", "1e3", "1.5", "nan", "None", "[]", "{}", "true")), TEXTS
)


class Flag(NamedTuple):
    """A flag of a program, and values for it."""

    name: str
    values: st.SearchStrategy[str]


class Command(NamedTuple):
    """A command line."""

    program: str
    arguments: tuple[str, ...]


class Reached(Exception):
    """All checks are passed."""


def _reached(*arguments, **named):
    raise Reached


def _kind(flag: flags.Flag) -> st.SearchStrategy[str]:
    choices = getattr(flag.parser, "enum_values", None)
    if choices:
        return st.one_of(st.sampled_from(sorted(choices)), WRONG)
    own = {"int": INTEGERS, "float": FLOATS, "bool": st.sampled_from(("true", "false"))}
    likely = own.get(flag.parser.flag_type().split()[-1], TEXTS)
    return st.one_of(likely, likely, likely, WRONG)


def _fields() -> list[Flag]:
    """--config.field for every field."""
    found, default = [], configs.default_config()
    own = {bool: st.sampled_from(("true", "false")), int: INTEGERS, float: FLOATS}
    for name in configs.field_names(default):
        value: Any = default
        for part in name.split("."):
            value = value[part]
        likely = own.get(type(value), st.one_of(KNOWN, TEXTS))
        found.append(Flag(f"config.{name}", st.one_of(likely, likely, likely, WRONG)))
    return found


@contextlib.contextmanager
def _fresh_flags() -> Iterator[None]:
    """What a program defines and sets is gone afterwards, so that the next one can define it."""
    before, values = set(flags.FLAGS), {name: flags.FLAGS[name].value for name in flags.FLAGS}
    present = {name: flags.FLAGS[name].present for name in flags.FLAGS}
    try:
        yield
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        for name, value in values.items():
            flags.FLAGS[name].value, flags.FLAGS[name].present = value, present[name]
        flags.FLAGS.mark_as_parsed()


def flags_of(program: str) -> list[Flag]:
    """The flags that a program defines, but for --config."""
    with _fresh_flags(), mock.patch.object(cli, "run"):
        before = set(flags.FLAGS)
        _start(program, ())
        own = sorted(set(flags.FLAGS) - before)
        return [Flag(name, _kind(flags.FLAGS[name])) for name in own if name != "config"]


def _start(program: str, arguments: tuple[str, ...]) -> None:
    with mock.patch.object(sys, "argv", [program, *arguments]), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a program that was imported before
        runpy.run_module(f"nrgpt_jax.{program}", run_name="__main__", alter_sys=False)


def commands(programs: dict[str, list[Flag]], folder: Path) -> st.SearchStrategy[Command]:
    """Command lines of these programs, about the run in a folder: most have a chance to pass."""
    fields, likely = (
        _fields(),
        {
            "workdir": st.just(str(folder / "run")),
            "prompt": st.just("abc"),
            "out": st.just("out"),
            "run": st.just(str(folder / "run")),
            "target": st.sampled_from(("tpu", "gpu", "multi_gpu", "slurm")),
            "bucket": st.just("gs://bucket"),
        },
    )
    experiments = sorted(str(path) for path in EXPERIMENTS.glob("*.py"))
    others = st.sampled_from((*experiments, f"{experiments[0]}:nope", "nope.py", "/dev/null", "."))

    @st.composite
    def strategy(draw) -> Command:
        program = draw(st.sampled_from(sorted(programs)))
        given = programs[program]
        needed = [flag for flag in given if flag.name in likely and draw(st.integers(0, 9))]
        words = [f"--{flag.name}={draw(likely[flag.name])}" for flag in needed]
        chosen = draw(st.lists(st.sampled_from(given), max_size=3)) if given else []
        if program in ("train", "prepare", "launch") and draw(st.integers(0, 19)):
            which = st.just(str(EXPERIMENTS / "listops.py")) if draw(st.integers(0, 5)) else others
            words.append(f"--config={draw(which)}")
            chosen += draw(st.lists(st.sampled_from(fields), max_size=3))
        words += [f"--{flag.name}={draw(flag.values)}" for flag in chosen]
        if program == "launch":
            words.append("--dry_run")
        if not draw(st.integers(0, 9)):
            stray = ("stray", "--nope", "--nope=1", "--config.nope=1", "--workdir", "--", "-x", "")
            words.append(draw(st.sampled_from(stray)))
        return Command(program, tuple(words))

    return strategy()


class Harness:
    """Runs command lines in a folder of their own. Use as a context manager."""

    def __init__(self, folder: Path):
        self._folder, self._held = folder, contextlib.ExitStack()
        self.compiled = 0

    def __enter__(self) -> "Harness":
        held = self._held
        for name in HEAVY:
            held.enter_context(mock.patch(name, _reached))
        for name in SETTINGS:
            held.enter_context(mock.patch(f"nrgpt_jax.host.{name}"))
        held.callback(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT))
        held.enter_context(contextlib.chdir(self._folder))
        jax.monitoring.register_event_duration_secs_listener(self._count)
        held.callback(jax.monitoring.unregister_event_duration_listener, self._count)
        return self

    def __exit__(self, *exception) -> None:
        self._held.close()

    def _count(self, event: str, duration_secs: float, **more: str | int) -> None:
        self.compiled += event == COMPILED

    def judge(self, command: Command) -> tuple[str, str]:
        """(outcome, what was said)."""
        said, before = io.StringIO(), self.compiled

        def attempt() -> str:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                try:
                    _start(*command)
                except Reached:
                    return "fine"
                except SystemExit as ended:
                    return _outcome(ended.code, said.getvalue(), self.compiled - before)
            return "fine"

        with _fresh_flags():
            outcome, reason = judged(attempt)
        return outcome, reason or said.getvalue()


def _outcome(code: Any, said: str, compiled: int) -> str:
    """Of a program that has ended by itself."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if code in (0, None):
        return "silent" if errors else "fine"
    one = len(errors) == 1 and said.endswith(errors[0] + "\n") and "Traceback" not in said
    hidden = "pass@" not in said and "secret" not in said
    return "one line" if one and hidden and not compiled else "traceback"


def run(cases: int = CASES, seed: int = 0, jobs: int = 1) -> dict[str, Any]:
    """Counts of outcomes by name, and the command lines that went wrong."""
    del jobs
    programs = {name: flags_of(name) for name in PROGRAMS}
    with tempfile.TemporaryDirectory() as root:
        small(Path(root) / "run")
        with Harness(Path(root)) as harness:
            return tally.tally(commands(programs, Path(root)), harness.judge, cases, seed)


def lines(found: dict[str, Any]) -> list[str]:
    """The table of the page."""
    names = ", ".join(f"`{name}`" for name in PROGRAMS)
    return [
        f"Command lines of {names} are drawn at random. *Fine*: the program gets to where it would "
        "begin to compute; else it must end in one line and an exit code that is not zero, before "
        "anything is compiled.",
        "",
        *tally.lines(found),
    ]
