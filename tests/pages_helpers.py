"""The pages that people read: their blocks, commands, links, and a place to run examples in."""

import contextlib
import functools
import importlib.util
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from absl import flags
from decoding_helpers import small_model
from make_helpers import calls_of_make, without_make
from ml_collections import ConfigDict, config_flags

from nrgpt_jax import __main__ as program
from nrgpt_jax import cli
from nrgpt_jax.configs import default_config
from nrgpt_jax.core.block import COMBINATIONS
from nrgpt_jax.core.energies import ENERGIES
from nrgpt_jax.core.metrics import METRICS
from nrgpt_jax.core.norms import NORMS
from nrgpt_jax.core.rules import RATES, RULES
from nrgpt_jax.datasets import DATASETS
from nrgpt_jax.datasets.tokenizers import FIXED, CharTokenizer
from nrgpt_jax.models.evaluators import EVALUATORS
from nrgpt_jax.registry import Registry
from nrgpt_jax.runs.pretrained import Pretrained, save_pretrained

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
OTHERS = ("README.md", "CONTRIBUTING.md", "results/README.md")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [*map(ROOT.joinpath, OTHERS), *sorted(DOCS.rglob("*.md"))]
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in a language, in order."""
    return [body for name, body in FENCE.findall(PAGES[page]) if name == language]


def prose(page: str) -> str:
    """The page without its code blocks."""
    return FENCE.sub("", PAGES[page])


def commands(page: str) -> list[str]:
    """Every line of the bash blocks of a page."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [line for line in lines if shlex.split(line, comments=True)]


# Commands -----------------------------------------------------------------------------------------

OWN = ("nrgpt_jax", "studies", "benchmarks")


@functools.cache
def mistake(command: str) -> str | None:
    """What is wrong with a line of a bash block, or None."""
    words = shlex.split(command, comments=True)
    if words[0] == "nrgpt":
        arguments = program.flags_of(words[1], words[2:])
        return _mistake_of_python(["-m", f"nrgpt_jax.{words[1]}", *with_values(arguments)])
    if words[0] == "make":
        return _mistake_of_make(command)
    if Path(words[0]).name == "python":
        return _mistake_of_python(words[1:])
    return None if (ROOT / words[0]).is_file() else f"there is no program {words[0]}"


def with_values(words: list[str]) -> list[str]:
    """`--name value` as `--name=value`."""
    result: list[str] = []
    for word in words:
        waits = bool(result) and result[-1].startswith("--") and "=" not in result[-1]
        if waits and not word.startswith("--"):
            result[-1] += f"={word}"
        else:
            result.append(word)
    return result


def _mistake_of_make(command: str) -> str | None:
    dry = command.replace("make", "make -n", 1)
    shell = ["/bin/sh", "-c", dry]
    options: Any = {"cwd": ROOT, "capture_output": True, "text": True, "env": without_make()}
    done = subprocess.run(shell, check=False, **options)
    if done.returncode:
        return done.stderr
    if "nrgpt_jax.from_make" not in done.stdout:
        return None
    with tempfile.TemporaryDirectory() as folder:
        calls, done = calls_of_make(command, Path(folder))
    mistakes = (_mistake_of_python(["-m", *words]) for words in calls)
    return done.stderr if done.returncode else next(filter(None, mistakes), None)


def _mistake_of_python(words: list[str]) -> str | None:
    if words[0] != "-m":
        return None if (ROOT / words[0]).is_file() else f"there is no file {words[0]}"
    module, arguments = words[1], words[2:]
    if module == "pip":
        return _mistake_of_pip(arguments)
    if module == "nrgpt_jax.harness":
        return _mistake_of_harness(arguments)
    path = ROOT / module.replace(".", "/")
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    if module.split(".")[0] not in OWN or not path.is_file():
        return f"there is no program {module}"
    known = program_flags(path)
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--").split(".")[0]
        if not argument.startswith("--") or name not in known:
            return f"{module} does not know {argument}"
    in_all_runs = "cli.define_changes_flag()" in path.read_text()
    return _mistake_of_config([a for a in arguments if a.startswith("--config")], in_all_runs)


def program_flags(path: Path) -> set[str]:
    """The flags that a program defines, by its source."""
    source = path.read_text()
    flag_of = {"config": "config", "changes": "config", "workdir": "workdir"}
    shared = {flag for name, flag in flag_of.items() if f"cli.define_{name}_flag()" in source}
    if "from studies.runner import" in source:
        source += (ROOT / "studies/runner.py").read_text()
    return shared | set(re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', source))


def _mistake_of_config(arguments: list[str], in_all_runs: bool) -> str | None:
    """Whether experiment, variant, fields and the types of their values are there."""
    argv, values = ["program", *cli.readable(arguments)[0]], flags.FlagValues()
    parsed: Any = {"lock_config": True, "flag_values": values, "sys_argv": argv}
    with contextlib.chdir(ROOT):
        try:
            if in_all_runs:
                config_flags.DEFINE_config_dict("config", default_config(), **parsed)
            else:
                config_flags.DEFINE_config_file("config", **parsed)
            values(argv)
        except Exception as error:
            return f"{' '.join(arguments)}: {error}"
    return None


def _mistake_of_harness(arguments: list[str]) -> str | None:
    """By the parser of lm_eval, whose arguments they are."""
    if not importlib.util.find_spec("lm_eval"):
        return None
    from lm_eval.__main__ import HarnessCLI

    with mock.patch("sys.argv", ["lm_eval", *arguments]):
        try:
            HarnessCLI().parse_args()
        except SystemExit:
            return f"lm_eval does not understand {arguments}"
    return None


def _mistake_of_pip(arguments: list[str]) -> str | None:
    setup = (ROOT / "setup.cfg").read_text()
    declared = setup.partition("[options.extras_require]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) =", declared, re.MULTILINE))
    wanted = set(",".join(re.findall(r"\.\[([\w,]+)\]", " ".join(arguments))).split(",")) - {""}
    return f"there is no extra {wanted - extras}" if wanted - extras else None


def field_names(config: ConfigDict, prefix: str = "") -> set[str]:
    """Every field and group of a configuration, dotted."""
    names = set()
    for name, value in config.items():
        names.add(prefix + name)
        if isinstance(value, ConfigDict):
            names |= field_names(value, f"{prefix}{name}.")
    return names


# Links --------------------------------------------------------------------------------------------


def links(page: str) -> list[str]:
    """What a page links to and shows, but for addresses of the web."""
    return re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page))


def anchors(page: str) -> set[str]:
    """The anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# Examples -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def registered_here() -> Iterator[None]:
    """What is registered inside is forgotten afterwards."""
    registries: list[Registry] = [ENERGIES, COMBINATIONS, NORMS, RATES, RULES, METRICS]
    registries += [DATASETS, EVALUATORS, FIXED]
    before = [set(registry) for registry in registries]
    try:
        yield
    finally:
        for registry, names in zip(registries, before, strict=True):
            for name in set(registry) - names:
                registry.remove(name)


def run_examples(page: str, folder: Path) -> dict[str, Any]:
    """Runs the Python blocks of a page in a folder, one after another; returns their names.

    Every run directory that they name is there: a tiny model with random parameters.
    """
    examples, names = blocks(page, "python"), {"__name__": "example"}
    for run in set(re.findall(r'"(runs/[\w/]+)"', "".join(examples))):
        save_tiny(folder / run)
    with contextlib.chdir(folder):
        for example in examples:
            exec(compile(example, page, "exec"), names)
    return names


def save_tiny(folder: Path) -> None:
    """A model that knows letters, a space, a comma and a colon, as a run."""
    config = default_config()
    config.model.update({"vocab_size": 60, "context_length": 32, "embed_dim": 8, "num_steps": 2})
    model, variables = small_model(**config.model.to_dict())
    letters = map(chr, range(ord("A"), ord("A") + 57))
    tokenizer = CharTokenizer([*CharTokenizer(letters).vocabulary, " ", ",", ":"])
    save_pretrained(folder, Pretrained(model, variables, tokenizer, config))
