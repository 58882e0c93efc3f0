"""Caches: exact ones change nothing, fixed-point ones and depth at inference do what they say."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_helpers import cached_logits, next_logits, small_model
from marks import slow, slow_but
from pages_helpers import registered_here

from nrgpt_jax.core import rules
from nrgpt_jax.core.context import Context
from nrgpt_jax.core.descent import CRITERIA, Convergence
from nrgpt_jax.core.energies import ENERGIES, energy
from nrgpt_jax.core.norms import NORMS
from nrgpt_jax.core.parameters import vector
from nrgpt_jax.errors import UserError
from nrgpt_jax.generation.generate import Settings, cache_bytes, generate
from nrgpt_jax.models import model_names
from nrgpt_jax.models.decoding import Decoding
from nrgpt_jax.ops import along_last_axis

TOKENS = np.random.default_rng(0).integers(0, 11, (3, 12)).astype(np.int32)
LENGTHS = [1, 4, 6]


def assert_same_logits(model, variables, found, atol=1e-4):
    whole = jax.jit(model.apply)(variables, TOKENS)
    for logits, position, _ in found:
        np.testing.assert_allclose(logits, whole[np.arange(3), position], atol=atol)


@pytest.mark.parametrize("attention", ["full_rank", "low_rank"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_holds_one_array_a_token_and_step(attention, dtype):
    sizes = {"embed_dim": 8, "num_heads": 2, "num_steps": 5, "dtype": dtype}
    model, variables = small_model(name="NRGPT_H_FF2W", attention=attention, **sizes)
    transformer, its_variables = small_model(name="GPT_Rec", **sizes)
    exact = cache_bytes(model, variables, 3, 12)
    assert exact == 5 * 3 * 12 * 8 * (4 if dtype == "float32" else 2)
    assert 2 * exact == cache_bytes(transformer, its_variables, 3, 12)
    assert exact == 5 * cache_bytes(model, variables, 3, 12, "fixed_point")
    cache = model.apply(variables, 3, 12, "exact", method="empty_cache")
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) == exact, "what is allocated"


@pytest.mark.ci
def test_depth_is_free_where_the_block_is_shared():
    model, variables = small_model(per_step_scale=True)
    scales = {"steps": {"log_scale": jnp.arange(3.0) / 9}}
    variables = {"params": {**variables["params"], **scales}}
    deeper, deep_variables = model.with_num_steps(variables, 5)
    path = jax.jit(lambda m, v: m.apply(v, TOKENS, method="trajectory"), static_argnums=0)
    states = lambda m, v: path(m, v).states
    longer = states(deeper, deep_variables)
    np.testing.assert_allclose(longer[:4], states(model, variables), rtol=1e-5)
    last = deep_variables["params"]["steps"]["log_scale"]
    np.testing.assert_allclose(last, [0, 1 / 9, 2 / 9, 2 / 9, 2 / 9])
    assert_same_logits(
        deeper, deep_variables, cached_logits(deeper, deep_variables, TOKENS, LENGTHS)
    )
    assert model.with_num_steps(variables, 3) == (model, variables)
    shallow, shallow_variables = model.with_num_steps(variables, 1)
    found = cached_logits(shallow, shallow_variables, TOKENS, LENGTHS)
    assert_same_logits(shallow, shallow_variables, found)


def test_depth_of_the_transformers():
    model, variables = small_model(name="GPT_Rec")
    deeper, variables = model.with_num_steps(variables, 6)
    assert_same_logits(deeper, variables, cached_logits(deeper, variables, TOKENS, LENGTHS))
    with pytest.raises(UserError, match="3 distinct layers"):
        small_model(name="GPT")[0].with_num_steps(variables, 6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "GPT_Rec"}, "no energy"),
        ({"num_distinct_layers": 2}, "2 layers have an energy and keys of their own"),
    ],
)
def test_what_has_no_common_rest_is_refused(fields, message):
    model, variables = small_model(**fields)
    for settings in (Settings(cache="fixed_point"), Settings(stopping=Convergence())):
        with pytest.raises(UserError, match=message):
            generate(model, variables, [np.array([1])], 3, settings)


def still_model(**fields):
    """A model with a small inference rate: its tokens come to rest."""
    fields = {"name": "NRGPT_H_FF2W", "norm": "layer_norm", "inference_rate": "gamma", **fields}
    model, variables = small_model(**fields)
    params = variables["params"]
    norm = params["block"]["norm"]
    norm = {name: jnp.abs(p) if name == "gain" else p for name, p in norm.items()}
    return model, {"params": {**params, "block": {**params["block"], "norm": norm}}}


@pytest.fixture
def counting_rule():
    """A rule whose state is not of tokens alone, as many of optax are."""
    count = lambda gradient, made, x: (-gradient / (1.0 + made), made + 1.0)

    @rules.rule("counting", {})
    def make(params, eta, norm):
        del params, eta, norm
        return rules.BoundRule(lambda x0: jnp.zeros(()), count)

    yield
    rules.RULES.remove("counting")


STOPPING = [Convergence(0.1 if kind == "state" else 0.02, kind) for kind in CRITERIA]
BY_RULE = {"num_steps": 20, "inference_rate": "scalar", "energies": ("injection",)}


@pytest.mark.parametrize(
    ("stopping", "fields"),
    [
        *((stopping, {}) for stopping in STOPPING),
        *(slow(stopping, {"mask": "inclusive"}) for stopping in STOPPING),
        (Convergence(0.05), {**BY_RULE, "rule": "counting"}),
        slow(Convergence(0.05), {**BY_RULE, "rule": "momentum"}),
        slow(Convergence(0.05), {**BY_RULE, "rule": "projected"}),
    ],
)
@pytest.mark.usefixtures("counting_rule")
def test_reading_at_once_or_one_by_one_stops_at_the_same_step(stopping, fields):
    model, variables = still_model(**{"mask": "strict", "num_steps": 40, **fields})
    decoding = Decoding(stopping=stopping)
    decode_scan = cached_logits(model, variables, TOKENS, LENGTHS, decoding)
    late, position, late_steps = decode_scan[-1]
    (logits, _, steps), *_ = cached_logits(model, variables, TOKENS, position + 1, decoding)
    np.testing.assert_allclose(late, logits, atol=1e-4)
    assert late_steps.tolist() == steps.tolist()
    taken = [int(s) for _, _, steps in decode_scan for s in steps]
    assert 0 < min(taken) < max(taken), "some tokens need more steps than others"


@pytest.mark.parametrize(("criterion", "tolerances"), [("energy", (0.1, 1e-3)), ("state", (0.1,))])
def test_until_converged_is_the_plain_path_up_to_there(criterion, tolerances):
    """The first token has no other in its context: its path is that of the model."""
    model, variables = still_model(num_steps=40)
    path = jax.jit(lambda v: model.apply(v, TOKENS[:, :1], method="trajectory"))(variables)
    energies = np.asarray(path.energies["total"])[:, :, 0]
    states, length = np.asarray(path.states)[:, :, 0], partial(np.linalg.norm, axis=-1)
    for tolerance in tolerances:
        decoding = Decoding(stopping=Convergence(tolerance, criterion))
        (_, _, steps), *_ = cached_logits(model, variables, TOKENS[:, :1], [1, 1, 1], decoding)
        rests = np.abs(np.diff(energies, axis=0)) <= tolerance
        if criterion == "state":
            rests = length(np.diff(states, axis=0)) <= tolerance * length(states[:-1])
        before = np.concatenate([rests, np.ones((1, 3), bool)]).argmax(axis=0)
        expected = before if criterion == "state" else np.minimum(1 + before, 40)
        assert steps.tolist() == expected.tolist()


def test_padding_and_ended_sequences_are_not_waited_for():
    model, variables = still_model(num_steps=40)
    decoding, lengths = Decoding(stopping=Convergence(0.02)), jnp.asarray(LENGTHS)
    empty = model.apply(variables, *TOKENS.shape, method="empty_cache")
    read = lambda v: model.apply(v, TOKENS, lengths, empty, decoding, method="prefill")
    _, cache, steps = jax.jit(read)(variables)
    padding = np.arange(TOKENS.shape[1])[None] >= np.asarray(LENGTHS)[:, None]
    assert padding.any()
    assert not np.asarray(steps)[padding].any()
    assert (np.asarray(steps)[~padding] > 0).all()
    active = jnp.array([True, False, True])
    one = jax.jit(
        lambda active: model.apply(
            variables, TOKENS[:, 0], lengths - 1, cache, decoding, active, method="decode"
        )[2]
    )
    every = one(None).tolist()
    assert one(active).tolist() == [s * a for s, a in zip(every, active.tolist(), strict=True)]
    assert every[1] > 0


@pytest.mark.parametrize("mask", slow_but(["strict"], ["strict", "inclusive"]))
def test_tokens_stop_with_a_fixed_point_cache_too(mask):
    """Near to where all steps lead; and there, where nothing is tolerated."""
    model, variables = still_model(num_steps=20, mask=mask, full_steps=2, inference_rate_decay=0.5)
    logits = {}
    for tolerance in (0.0, 1e-3):
        decoding = Decoding("fixed_point", Convergence(tolerance, "state"))
        logits[tolerance], _, steps = cached_logits(model, variables, TOKENS, LENGTHS, decoding)[-1]
        assert (max(steps.tolist()) < 20) == bool(tolerance)
    all_steps, *_ = cached_logits(model, variables, TOKENS, LENGTHS, Decoding("fixed_point"))[-1]
    np.testing.assert_allclose(logits[0.0], all_steps, atol=1e-4)
    np.testing.assert_allclose(logits[1e-3], all_steps, atol=0.1)


def test_no_tolerance_makes_all_steps():
    model, variables = small_model()
    found = cached_logits(model, variables, TOKENS, LENGTHS, Decoding(stopping=Convergence(0.0)))
    assert_same_logits(model, variables, found)
    assert all(steps.tolist() == [3, 3, 3] for _, _, steps in found)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("mask", "attention"),
    [
        ("strict", "full_rank"),
        slow("inclusive", "low_rank"),
        slow("strict", "low_rank"),
        slow("inclusive", "full_rank"),
    ],
)
def test_fixed_point_cache_shows_each_token_the_last_states_before_it(mask, attention):
    model, variables = small_model(name="NRGPT_H_FF2W", mask=mask, attention=attention)
    block = model.apply(variables, method=lambda m: m._block())
    table, positions = (
        variables["params"][f"{name}_embedding"]["embedding"] for name in ("token", "position")
    )
    norm = partial(NORMS[model.norm].function, block["norm"])
    attend: Any = ENERGIES[attention]
    feed = ENERGIES["FF2W"]

    def energy(g, x, first, past):
        """Of a token that sees the last states of those before it, and itself as it is."""
        states = jnp.concatenate([past, jax.lax.stop_gradient(g)[None]])
        count = jnp.arange(len(states))
        keys = attend.key(block["attention"], states, count)
        context = Context(keys, model.strict, count[-1], x, first, jnp.zeros(()), g)
        of_attention = attend.function(block["attention"], g, context)
        return of_attention + feed.function(block["feedforward"], g, context)

    @partial(jax.jit, static_argnums=1)
    def loop(tokens, prompt):
        last = model.apply(variables, tokens[None, :prompt], method="trajectory").states[-1, 0]
        for at in range(prompt, len(tokens)):
            x = first = table[tokens[at]] + positions[at]
            past = jax.vmap(norm)(last)
            for _ in range(model.num_steps):
                x = x - block["eta"] @ jax.grad(energy)(norm(x), x, first, past)
            last = jnp.concatenate([last, x[None]])
        return model.apply(variables, last[None], method="readout")[0, -1]

    found = cached_logits(model, variables, TOKENS, LENGTHS, Decoding("fixed_point"))
    whole = jax.jit(model.apply)(variables, TOKENS)
    np.testing.assert_allclose(found[0][0], whole[np.arange(3), found[0][1]], atol=1e-4)
    for row in (0, 2):
        at = found[3][1][row]
        expected = loop(TOKENS[row, : at + 1], LENGTHS[row])
        np.testing.assert_allclose(found[3][0][row], expected, atol=1e-4)
        assert np.abs(expected - whole[row, at]).max() > 1e-3, "is not the exact one"


@pytest.mark.parametrize("name", slow_but(["NRGPT_H_FF2W", "GPT"], model_names()))
def test_generation_by_any_model(name):
    model, variables = small_model(name=name, head_dim=2)  # which transformers do not have
    prompts = [TOKENS[row, :count] for row, count in enumerate(LENGTHS)]
    logits = next_logits(model, variables)
    for prompt, new in zip(prompts, generate(model, variables, prompts, 6), strict=True):
        text = list(prompt)
        for token in new.tokens:
            assert token == logits(text).argmax()
            text.append(token)


def test_a_narrow_energy_stops_too():
    """Energies are added up in float32, whatever type a registered one returns."""
    with registered_here():
        energy("BAT", {"w": vector("D")}, batched=True)(
            lambda params, g, context: -jnp.sum(along_last_axis(params["w"], g) * g * g, axis=-1)
        )
        fields = {"name": "NRGPT", "energies": ("BAT",), "dtype": "bfloat16", "num_steps": 5}
        model, variables = small_model(**fields)
        settings = Settings(stopping=Convergence(10.0))
        (text,) = generate(model, variables, [np.array([1, 2])], 3, settings)
    assert (text.steps < 5).all()
