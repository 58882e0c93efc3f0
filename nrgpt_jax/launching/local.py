"""One machine: one process drives all of its devices."""

import sys

from nrgpt_jax.launching.background import background
from nrgpt_jax.launching.plan import Job, Plan


def plan(job: Job, action: str) -> Plan:
    """In the background of this machine, from this checkout."""
    return Plan([["bash", "-c", background(job, action, ".", sys.executable)]])
