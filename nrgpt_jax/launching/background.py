"""A training program in the background of a machine: start, stop, logs, status, as shell scripts.

It continues when the connection that has started it is closed. One run of a name at a time; its
process number is in launched/NAME.pid, its output in launched/NAME.log.
"""

import shlex

from nrgpt_jax.launching.plan import RECORDS, Job


def background(job: Job, action: str, folder: str, python: str) -> str:
    """The shell script of an action.

    Args:
      job: what is run.
      action: one of `plan.ACTIONS`.
      folder: where it runs, a word of the shell: the repository.
      python: the interpreter, seen from there.
    """
    body = {"start": _start(job, python), "stop": _stop(job), "logs": _logs(job)}
    enter = f"cd {folder}" if action == "start" else _enter_if_started(job, folder)
    return "\n".join([enter, _running(job), body.get(action, _status(job))])


def _enter_if_started(job: Job, folder: str) -> str:
    never = f"echo {job.name} was never started here; exit 0"
    return f"cd {folder} 2>/dev/null && test -e {_path(job, 'log')} || {{ {never}; }}"


def refuse_if_running(job: Job) -> str:
    """Lines that end a script if the job runs; the script is in its folder."""
    name = shlex.quote(job.name)
    return f"{_running(job)}\nif running; then echo {name} is running already >&2; exit 1; fi"


def _path(job: Job, kind: str) -> str:
    return f"{RECORDS}/{job.name}.{kind}"


def _running(job: Job) -> str:
    # The number may belong to another program by now, after a restart of the machine.
    pid = _path(job, "pid")
    return (
        f"running() {{ p=$(cat {pid} 2>/dev/null || echo 0); "
        r"{ tr '\0' ' ' < /proc/$p/cmdline || ps -ww -o args= -p $p; } 2>/dev/null | "
        "grep -q nrgpt_jax.train; }"
    )


def _start(job: Job, python: str) -> str:
    log, pid = _path(job, "log"), _path(job, "pid")
    return "\n".join(
        [
            f"if running; then echo {job.name} is running already >&2; exit 1; fi",
            f"mkdir -p {RECORDS}",
            f"nohup {job.shell(python)} >> {log} 2>&1 < /dev/null &",
            f"echo $! > {pid}",
            f'echo "$(hostname): {job.name} runs as process $!, its output is in $PWD/{log}"',
        ]
    )


def _stop(job: Job) -> str:
    return "\n".join(
        [
            f"if ! running; then echo {job.name} does not run; exit 0; fi",
            f'kill -TERM "$(cat {_path(job, "pid")})"',
            "while running; do sleep 1; done",
            f"tail -n 2 {_path(job, 'log')}",
        ]
    )


def _logs(job: Job) -> str:
    return f"tail -n 100 -F {_path(job, 'log')}"


def _status(job: Job) -> str:
    state = f"if running; then echo {job.name} runs; else echo {job.name} does not run; fi"
    return f"{state}\ntail -n 2 {_path(job, 'log')}"
