"""What docs/ says of the code is true: lines of equations, examples, names of everything."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decoding_helpers import cached_logits, small_model

from nrgpt_jax.core.energies import COMBINATIONS, ENERGIES
from nrgpt_jax.core.rates import RATES
from nrgpt_jax.core.rules import RULES

DOCS = Path(__file__).resolve().parents[1] / "docs"
LINK = re.compile(r"\[(\w+)\]\((\.\./nrgpt_jax/[\w/]+\.py)#L(\d+)\)")


def line_of(name: str, path: str) -> int:
    """Where a function, class or table is defined."""
    defined = re.compile(rf"(\s*def {name}\(|class {name}\b|{name}\b.*[:=])")
    lines = (DOCS / path).read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if defined.match(line))


def mended(page: str) -> str:
    """The page with every link at the line of its name."""
    return LINK.sub(lambda m: f"[{m[1]}]({m[2]}#L{line_of(m[1], m[2])})", page)


def test_equations_point_at_their_lines():
    page = (DOCS / "equations.md").read_text()
    assert len(LINK.findall(page)) > 20
    assert page == mended(page), "run: python tests/docs_test.py"


def test_every_registered_part_has_its_equation():
    page = (DOCS / "energies.md").read_text()
    for registry in (ENERGIES, COMBINATIONS, RATES, RULES):
        missing = [name for name in registry if f"`{name}`" not in page]
        assert not missing, registry.kind


def test_the_example_of_an_energy_is_decoded_too(standard_promotion):
    del standard_promotion
    page = (DOCS / "energies.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found: dict[str, Any] = {}
    exec(compile(example, "energies.md", "exec"), found)
    try:
        model, variables = small_model(name="NRGPT_H_FF1", energies=("NEIGHBOURS",))
        tokens = jax.random.randint(jax.random.key(0), (2, 7), 0, 11)
        logits = jax.jit(model.apply)(variables, tokens)
        for at_end, position, _ in cached_logits(model, variables, tokens, [2, 5]):
            expected = logits[np.arange(2), position]
            np.testing.assert_allclose(at_end, expected, atol=1e-4)
        energies = model.apply(variables, tokens, method="energies")
        assert float(jnp.abs(energies["NEIGHBOURS"]).max()) > 0.0
    finally:
        ENERGIES.remove("NEIGHBOURS")


if __name__ == "__main__":
    equations = DOCS / "equations.md"
    equations.write_text(mended(equations.read_text()))
