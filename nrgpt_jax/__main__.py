"""Command-line entry point: `nrgpt COMMAND ...`, or `python -m nrgpt_jax COMMAND ...`."""

import difflib
import importlib.util
import os
import runpy
import sys
from pathlib import Path

from nrgpt_jax import bundled
from nrgpt_jax.errors import MISTAKE, UserError

USAGE = """\
NRGPT: energy-based language models.
  nrgpt train EXPERIMENT         train, or resume a run that was stopped
  nrgpt sample RUN               text from a run, or from a model that comes along
  nrgpt evaluate RUN             losses and accuracies on the validation split
  nrgpt analyze RUN              energies, their landscape, what is guaranteed of them
  nrgpt export | push RUN        as a folder for others; to the Hugging Face hub
  nrgpt pull USER/NAME           from the hub; convert: from the authors' PyTorch release
  nrgpt prepare | sweep | launch EXPERIMENT   its data only; many runs; on a cluster
  nrgpt bench                    speed and memory, in a checkout
--config.FIELD=VALUE changes a setting; nrgpt COMMAND --help lists the flags of one."""
COMMANDS = (
    *("train", "sample", "evaluate", "analyze", "export", "push", "pull", "convert"),
    *("prepare", "sweep", "launch", "bench"),
)
OF_EXPERIMENT = {"train": "config", "prepare": "config", "launch": "config", "sweep": "sweep"}
OF_RUN = ("sample", "evaluate", "analyze", "export", "push")
MODULES = {"bench": "benchmarks.bench"}


def main() -> None:
    """Run the command named by the first argument."""
    command, *words = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help", "help"):
        print(USAGE)
        return
    if command == "completion":
        print(_COMPLETION)
        return
    if command == "complete":  # called by the shell function that `completion` prints
        print("\n".join(completions(words)))
        return
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        _fail(f"unknown command {command!r}; {hint}")
    try:
        sys.argv = [f"nrgpt {command}", *flags_of(command, words)]
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}")
    except UserError as error:
        _fail(f"{error}")
    module = MODULES.get(command, f"nrgpt_jax.{command}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # for plugins in the current folder
    if not importlib.util.find_spec(module.partition(".")[0]):
        _fail(f"nrgpt {command} needs a checkout of the repository: run it in that folder")
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def flags_of(command: str, words: list[str]) -> list[str]:
    """Return the arguments of a command, with a leading experiment or run turned into flags."""
    if not words or words[0].startswith("-"):
        return words
    name, *rest = words
    if command in OF_RUN:
        return [f"--workdir={bundled.copied_run(name)}", *rest]
    if command == "pull":
        return [f"--source={name}", *rest]
    if command not in OF_EXPERIMENT:
        _fail(f"unexpected argument {name!r}; settings are given as --NAME=VALUE")
    file, colon, variant = name.partition(":")
    path = bundled.experiment(file)
    if not path.is_file():
        _fail(f"there is no experiment {file}; there are {', '.join(bundled.experiments())}")
    sys.path.insert(0, str(path.resolve().parent.parent))  # experiments import each other
    flags = [f"--{OF_EXPERIMENT[command]}={path}{colon}{variant}"]
    has_workdir = any(word.lstrip("-").startswith("workdir") for word in rest)
    if command in ("train", "launch") and not has_workdir:
        flags.append(f"--workdir=runs/{path.stem}{'-' * bool(variant)}{variant}")
    return [*flags, *rest]


# Completion ---------------------------------------------------------------------------------------

_COMPLETION = """\
# bash; in zsh after: autoload bashcompinit && bashcompinit
_nrgpt() { COMPREPLY=($(nrgpt complete "${COMP_WORDS[@]:1:COMP_CWORD}")); compopt -o nospace; }
complete -o default -F _nrgpt nrgpt
# to use it: eval "$(nrgpt completion)\""""


def completions(words: list[str]) -> list[str]:
    """Return the shell completions of the last word."""
    *before, last = words or [""]
    if not before:
        known = [f"{name} " for name in COMMANDS]
    elif last.startswith("--config."):
        from nrgpt_jax.configs import default_config, field_names

        known = [f"--config.{name}=" for name in field_names(default_config())]
    elif before[0] in OF_EXPERIMENT and len(before) == 1:
        known = bundled.experiments()
    elif before[0] in OF_RUN and len(before) == 1:
        here = (str(path.parent) for path in Path("runs").glob("*/config.json"))
        known = [*bundled.runs(), *here]
    else:
        known = []
    return [name for name in known if name.startswith(last)]


def _fail(message: str) -> None:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(MISTAKE)


if __name__ == "__main__":
    sys.argv[0] = os.path.basename(sys.argv[0])
    main()
