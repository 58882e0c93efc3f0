"""What the pages say of the code is true: commands, examples, files, links, lines, names."""

import importlib
import re
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from decoding_helpers import cached_logits, small_model
from flax import traverse_util
from pages_helpers import (
    DOCS,
    FENCE,
    PAGES,
    ROOT,
    anchors,
    blocks,
    commands,
    field_names,
    links,
    mistake,
    prose,
    registered_here,
    run_examples,
)

from nrgpt_jax.configs import OPTIONS, default_config
from nrgpt_jax.core.block import COMBINATIONS
from nrgpt_jax.core.certificates import Parts, guarantee
from nrgpt_jax.core.energies import ENERGIES
from nrgpt_jax.core.metrics import METRICS
from nrgpt_jax.core.norms import NORMS
from nrgpt_jax.core.rules import RATES, RULES
from nrgpt_jax.datasets import load_dataset
from nrgpt_jax.datasets.tokenizers import create_tokenizer
from nrgpt_jax.models import create_model
from nrgpt_jax.models.evaluators import EVALUATORS

LINK = re.compile(r"\[(\w+)\]\((\.\./nrgpt_jax/[\w/]+\.py)#L(\d+)\)")


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_seen(page):
    """Those of bash and Python are checked below, those without a language are output."""
    seen = [name for name, _ in FENCE.findall(PAGES[page])]
    assert 2 * len(seen) == PAGES[page].count("```")
    assert set(seen) <= {"bash", "python", ""}


# Commands ---------------------------------------------------------------------------------------


@pytest.mark.ci
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_are_understood(page):
    wrong = {command: mistake(command) for command in commands(page)}
    assert not {command: why for command, why in wrong.items() if why}


def test_fields_that_pages_name_exist():
    known = field_names(default_config())
    for page, text in PAGES.items():
        named = re.findall(r"(?:--|`)config\.(?!json)(\w[\w.]*\w)", text)
        named += re.findall(r"^\| `((?:model|data|optimizer)\.\w+)`", text, re.MULTILINE)
        options = {name for name in named if name.rpartition(".")[0] in OPTIONS}
        assert not set(named) - known - options, page


# Examples ---------------------------------------------------------------------------------------


def models_hold(names, capsys):
    assert names["logits"].shape == (1, 12, 65)
    assert {e.shape for e in names["energies"].values()} == {(7, 1, 12)}


def samples_hold(names, capsys):
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert all(score.log_likelihood < 0 for score in names["scores"])


def an_experiment_holds(names, capsys):
    narrow, wide = names["get_config"](), names["get_config"]("wide")
    assert narrow.train_steps == wide.train_steps == 5000
    assert wide.model.embed_dim > narrow.model.embed_dim


def a_new_energy_is_decoded(names, capsys):
    model, variables = small_model(name="NRGPT_H_FF1", energies=("NEIGHBOURS",))
    tokens = jax.random.randint(jax.random.key(0), (2, 7), 0, 11)
    logits = jax.jit(model.apply)(variables, tokens)
    for at_end, position, _ in cached_logits(model, variables, tokens, [2, 5]):
        expected = logits[np.arange(2), position]
        np.testing.assert_allclose(at_end, expected, atol=1e-4)
    energies = model.apply(variables, tokens, method="energies")
    assert float(jnp.abs(energies["NEIGHBOURS"]).max()) > 0.0


def a_new_rate_and_data_set_hold(names, capsys):
    model, variables = small_model(inference_rate="fraction", num_steps=1)
    assert 0.0 < float(model.apply(variables, method="eta")) < 1.0
    config = default_config()
    config.data.name = "counting"
    found = load_dataset(config.data)
    assert len(found.train) > 8 * len(found.validation) > 0
    assert found.tokenizer.decode(found.train.tokens[:7]) == "0 1 2 3"


def new_parts_hold(names, capsys):
    """Of docs/extend.md: they decode, what they declare is what a guarantee asks for."""
    assert names["energies"].shape == (6, 1, 12)
    names["config"].plugins = ()  # registered already
    assert create_model(names["config"], vocab_size=5).sizes.length("K") == 32
    a_new_energy_is_decoded(names, capsys)
    a_new_rate_and_data_set_hold(names, capsys)
    an_experiment_holds(names, capsys)
    parts: dict[str, Any] = {"norm": "soft_rms", "rule": "normalized", "combination": "weighted"}
    terms = ("SHARED", "CUBIC")
    model, variables = small_model(name="NRGPT", energies=terms, mask="strict", **parts)
    tokens = jax.random.randint(jax.random.key(0), (2, 7), 0, 11)
    energies = jax.jit(lambda v: model.apply(v, tokens, method="energies"))(variables)
    assert float(jnp.abs(energies["total"][-1] - energies["total"][0]).max()) > 1e-3
    x = jax.random.normal(jax.random.key(0), (8,))
    norm = NORMS["soft_rms"]
    np.testing.assert_allclose(
        jax.grad(norm.lagrangian, 1)({}, x), norm.function({}, x), rtol=1e-5, atol=1e-6
    )
    of_parts = Parts(gain=np.ones(8), eta=np.ones(()), energies={"feedforward": "RELU3"}, **parts)
    assert guarantee(of_parts).proposition == "2.1"
    dna = create_tokenizer("dna")
    assert dna.decode(dna.encode("GATTACA")) == "GATTACA"
    assert {"confidence"} <= set(EVALUATORS)
    assert {"rate_of_descent"} <= set(METRICS)


def energies_of_a_model_that_comes_along_hold(names, capsys):
    (energies,) = {energies.shape for energies in names["energies"].values()}
    assert energies[1:] == names["prompt"][None].shape


def a_prepared_folder_is_read(names, capsys):
    assert bytes(names["tokens"][:16].astype(np.uint8)) == b"Once upon a time"


def a_sweep_names_its_runs(names, capsys):
    found = names["get_sweep"]()
    assert len(found) == 6
    assert (found["width_32/1"].model.embed_dim, found["width_32/1"].seed) == (32, 1)


def a_project_of_ones_own_holds(names, capsys):
    model, path = names["model"], names["path"]
    assert float(names["loss"]) < 2.0
    assert names["energies"].shape == (model.num_steps + 1, 16, 32)
    np.testing.assert_allclose(names["x"], path.states[-1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(names["gradients"], path.grad_g, rtol=1e-6)
    expected = model.apply(names["variables"], names["inputs"])
    np.testing.assert_allclose(names["logits"], expected, rtol=1e-3, atol=1e-3)
    names["config"].plugins = ()
    names["config"].model.vocab_size = 5
    assert create_model(names["config"]).sizes.length("K") == 32


def numpy_computes_the_logits(names, capsys):
    """Of this run, and of one with a strict mask and several heads."""
    for changes in ({}, {"mask": "strict", "num_heads": 2}):
        model, variables = small_model(**{**names["settings"], "options": {}, **changes})
        flat = traverse_util.flatten_dict(variables["params"], sep="/")
        names["weights"].clear()
        names["weights"].update({name: np.asarray(value) for name, value in flat.items()})
        names["settings"].update(changes)
        tokens = np.array([3, 1, 4, 1, 5, 9, 2, 6])
        expected = jax.jit(model.apply)(variables, tokens[None])[0]
        np.testing.assert_allclose(names["logits_of"](tokens), expected, rtol=1e-3, atol=1e-4)


CHECKS = {
    "docs/data.md": a_prepared_folder_is_read,
    "docs/extend.md": new_parts_hold,
    "docs/generate.md": samples_hold,
    "docs/index.md": energies_of_a_model_that_comes_along_hold,
    "docs/library.md": a_project_of_ones_own_holds,
    "docs/model.md": models_hold,
    "docs/sweeps.md": a_sweep_names_its_runs,
    "docs/train.md": an_experiment_holds,
    "docs/weights.md": numpy_computes_the_logits,
}


@pytest.mark.ci
@pytest.mark.long
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_examples_run(page, tmp_path, capsys, standard_promotion):
    del standard_promotion
    with registered_here():
        names = run_examples(page, tmp_path)
        if page != "README.md":  # tests/readme_test.py
            CHECKS[page](names, capsys)


# Files and links --------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_files_it_names_exist(page):
    """In backticks, those that begin with a folder of the repository."""
    folders = (
        "nrgpt_jax|experiments|launch|studies|benchmarks|results|tests|docs|data|[.]ci|[.]github"
    )
    names = re.findall(rf"`((?:{folders})/[^`\s]*)`", prose(page))
    assert not [name for name in names if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", [page for page in PAGES if links(page)])
def test_links_lead_somewhere(page):
    assert not [link for link in links(page) if not leads_somewhere(page, link)]


def leads_somewhere(page: str, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    target = target.resolve()
    if not target.is_file() or not anchor:
        return target.is_file()
    if line := re.fullmatch(r"L(\d+)", anchor):
        return int(line[1]) <= len(target.read_text().splitlines())
    name = str(target.relative_to(ROOT))
    return anchor in anchors(name) or is_in_reference(PAGES[name], anchor)


def is_in_reference(page: str, name: str) -> bool:
    """Whether an API page lists the module of this object, and the module has it."""
    module, _, last = name.rpartition(".")
    return f"::: {module}\n" in page and hasattr(importlib.import_module(module), last)


def test_every_page_is_in_the_navigation_or_linked_from_there():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = {f"docs/{page}" for page in re.findall(r"[\w/]+\.md", str(site["nav"]))}
    folder = lambda page: Path(page).parent
    linked = {
        (ROOT / folder(p) / link.partition("#")[0]).resolve() for p in pages for link in links(p)
    }
    rest = {page for page in PAGES if page.startswith("docs/")} - pages
    assert not {page for page in rest if ROOT / page not in linked}
    details = site["not_in_nav"].split()
    assert not {page for page in rest if not page.removeprefix("docs").startswith(tuple(details))}


def test_every_module_is_in_the_reference():
    listed = re.findall(r"^::: (\S+)$", "\n".join(PAGES.values()), re.MULTILINE)
    assert len(listed) == len(set(listed))
    for room in {Path(page).stem for page in PAGES if page.startswith("docs/api")}:
        files = (ROOT / "nrgpt_jax" / room).glob("[!_]*.py")
        missing = {f"nrgpt_jax.{room}.{file.stem}" for file in files} - set(listed)
        assert not missing


def test_the_site_shows_the_definition_of_an_equation():
    """There a line of the package is its entry in the reference, another file its name."""
    site = runpy.run_path(str(DOCS / "site_hooks.py"))
    for name, path, line in LINK.findall(PAGES["docs/model.md"]):
        assert site["name_at"](path.removeprefix("../"), int(line)).endswith(f".{name}")
    page = type("Page", (), {"file": type("File", (), {"src_uri": "api/core.md"})})
    shown = "[data](../../data/README.md), [a](../a.md), ![b](../../b.png)"
    expected = "data (`data/README.md`), [a](../a.md), ![b](../../b.png)"
    assert site["on_page_markdown"](shown, page) == expected


# Equations and energies -------------------------------------------------------------------------


def line_of(name: str, path: str) -> int:
    """Where a function, class or table is defined."""
    defined = re.compile(rf"(\s*def {name}\(|class {name}\b|{name}\b.*[:=])")
    lines = (DOCS / path).read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if defined.match(line))


def mended(page: str) -> str:
    """The page with every link at the line of its name."""
    return LINK.sub(lambda m: f"[{m[1]}]({m[2]}#L{line_of(m[1], m[2])})", page)


def test_equations_point_at_their_lines():
    page = PAGES["docs/model.md"]
    assert len(LINK.findall(page)) > 20
    assert page == mended(page), "run: python tests/docs_test.py"


def test_every_registered_part_has_its_equation():
    for registry in (ENERGIES, COMBINATIONS, RATES, RULES):
        missing = [name for name in registry if f"`{name}`" not in PAGES["docs/model.md"]]
        assert not missing, registry.kind


if __name__ == "__main__":
    equations = DOCS / "model.md"
    equations.write_text(mended(equations.read_text()))
