"""Training at many depths: which steps are made, and what is learned from."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_helpers import cached_logits, small_model
from marks import slow

from nrgpt_jax.array_types import Batch
from nrgpt_jax.configs import default_config
from nrgpt_jax.core import convergence
from nrgpt_jax.core.block import block, start
from nrgpt_jax.core.descent import RolloutOptions, block_in_context
from nrgpt_jax.errors import UserError
from nrgpt_jax.models import sharding
from nrgpt_jax.models.decoding import Decoding, decode_behind
from nrgpt_jax.models.rollouts import equal_steps, partial_rollout, step_gain
from nrgpt_jax.training import depths, losses
from nrgpt_jax.training import step as training
from nrgpt_jax.training.config_checks import check_config

TOKENS = np.random.default_rng(0).integers(0, 11, (3, 8)).astype(np.int32)
BATCH = Batch(TOKENS[:, :-1], TOKENS[:, 1:], np.ones((3, 7), np.float32))
ROWS, KEY = jnp.arange(3), jax.random.key(5)


def depth_of(**fields):
    config = default_config()
    config.model.num_steps = 4
    config.depth.update({"distribution": "uniform", **fields})
    found = depths.of_config(config)
    assert found is not None
    return found


@pytest.mark.parametrize("distribution", ["uniform", "log_uniform"])
def test_every_depth_of_the_range_is_drawn_and_no_other(distribution):
    depth = depth_of(distribution=distribution, min_steps=2, max_steps=9)
    draw = lambda i: depths.sample_num_steps(
        depth, jax.random.fold_in(KEY, i), ROWS, jnp.asarray(0)
    )
    seen = np.bincount(jax.vmap(draw)(jnp.arange(2000)), minlength=12)
    assert not seen[:2].any()
    assert not seen[10:].any()
    assert seen[2:10].min() > 50
    assert (seen[2] > 2 * seen[9]) == (distribution == "log_uniform")


def test_sequences_have_depths_of_their_own_whoever_works_on_them():
    depth = depth_of(sample_per="sequence", min_steps=1, max_steps=1000)
    together = depths.sample_num_steps(depth, KEY, jnp.arange(8), jnp.asarray(0))
    assert len(set(together.tolist())) == 8
    last = depths.sample_num_steps(depth, KEY, jnp.arange(4, 8), jnp.asarray(0))
    chex.assert_trees_all_equal(last, together[4:])


@pytest.mark.parametrize(("distribution", "half_way"), [("uniform", 7), ("log_uniform", 5)])
def test_depth_grows_by_numbers_or_by_factors(distribution, half_way):
    fields = {
        "distribution": distribution,
        "min_steps": 2,
        "max_steps": 12,
        "curriculum_steps": 100,
    }
    depth = depth_of(**fields, sample_per="sequence")
    drawn = lambda n: depths.sample_num_steps(depth, KEY, jnp.arange(500), jnp.asarray(n))
    assert [int(drawn(n).max()) for n in (0, 49, 99)] == [2, half_way, 12]


@pytest.mark.parametrize("fields", [{}, {"rule": "momentum"}, {"name": "GPT_Rec_parallel"}])
def test_a_walk_makes_the_steps_of_a_model_of_that_depth(fields):
    model, variables = small_model(num_steps=4, **fields)
    counts = jnp.array([1, 4, 2])
    states_of = lambda n: model.clone(num_steps=n).apply(variables, TOKENS, method="forward")[0].x
    wanted = jnp.stack([states_of(n)[i] for i, n in enumerate(counts.tolist())])
    late = model.apply(
        variables, TOKENS, RolloutOptions(num_skipped_steps=4 - counts), method=partial_rollout
    )
    chex.assert_trees_all_close(late.x, wanted, rtol=1e-5, atol=1e-6)
    run = model.apply(variables, TOKENS, counts, method=equal_steps)
    chex.assert_trees_all_close(run.x, wanted, rtol=1e-5, atol=1e-6)
    deeper = model.apply(variables, TOKENS, RolloutOptions(begin=run), method=partial_rollout).x
    chex.assert_trees_all_close(deeper[2], states_of(6)[2], rtol=1e-4, atol=1e-5)


def test_gradient_goes_through_the_last_steps_alone():
    """Against a plain loop that holds parameters and states of the steps before."""
    model, variables = small_model(num_steps=4, energies=("injection",))
    depth = depth_of(min_steps=4, max_steps=4, backprop_steps=2, loss_steps=2)
    params = variables["params"]

    def plain(params: Any):
        held = jax.lax.stop_gradient(params)
        make = lambda p: model.bind({"params": p}).dynamics(model.bind({"params": p}).embed(TOKENS))
        at = lambda p: make(p)[1](jax.tree.map(lambda leaf: leaf[0], make(p)[0]))
        state = start(at(held))
        for p in (held, held):
            state = block(at(p), state)[0]
        state, total = jax.lax.stop_gradient(state), jnp.zeros(())
        targets = jnp.asarray(BATCH.targets)
        for _ in range(2):
            state = block(at(params), state._replace(x=state.x))[0]
            logits = model.apply({"params": params}, state.x[:, :-1], method="readout")
            total += jnp.sum(losses.cross_entropy(logits, targets)) / 2
        return total

    def ours(params: Any):
        inputs = Batch(TOKENS, np.pad(BATCH.targets, ((0, 0), (0, 1))), _but_the_last())
        return losses.summed_loss(params, model, inputs, ROWS, KEY, 1.0, 0, depth)[0]

    both = (jax.jit(jax.value_and_grad(loss))(params) for loss in (ours, plain))
    chex.assert_trees_all_close(*both, rtol=1e-4, atol=1e-5)


def _but_the_last():
    weights = np.ones(TOKENS.shape, np.float32)
    weights[:, -1] = 0.0
    return weights


def test_gain_is_that_of_each_tokens_own_block():
    model, variables = small_model(num_steps=3, mask="strict", rule="sphere", inference_rate="psd")
    state = model.apply(variables, TOKENS, RolloutOptions(), method=partial_rollout)
    plain = model.with_implementation("autodiff")
    bound = plain.bind(variables)
    inputs, dynamics_at = bound.dynamics(bound.embed(TOKENS))
    dynamics = dynamics_at(jax.tree.map(lambda leaf: leaf[0], inputs))
    function = convergence.own_step(dynamics, state)
    found = jax.jit(lambda x: convergence.token_jacobians(function, x))(state.x)
    v = jax.random.normal(KEY, state.x.shape)
    wanted = jnp.linalg.norm(jnp.einsum("bnij,bnj->bni", found, v), axis=-1)
    gain = jax.jit(lambda v: plain.apply(variables, TOKENS, state, v, method=step_gain))(v)
    chex.assert_trees_all_close(gain, wanted / jnp.linalg.norm(v, axis=-1), rtol=1e-3, atol=1e-5)


def test_a_penalty_is_of_what_exceeds_its_bound():
    model, variables = small_model(num_steps=3, mask="strict")
    given = model, BATCH, ROWS, KEY, 1.0, 0

    def loss(**fields):
        depth = depth_of(min_steps=3, max_steps=3, **fields)
        summed = jax.jit(lambda p: losses.summed_loss(p, *given, depth)[0])
        return float(summed(variables["params"]))

    without = loss()
    assert loss(penalty=1.0, penalty_bound=1e6) == pytest.approx(without)
    assert loss(penalty=1.0, penalty_bound=0.0) > without + 1.0
    twice = loss(penalty=2.0, penalty_bound=0.0) - without
    assert twice == pytest.approx(2 * (loss(penalty=1.0, penalty_bound=0.0) - without), rel=1e-4)


@pytest.mark.parametrize(
    ("model", "depth", "message"),
    [
        ({}, {"distribution": "normal"}, "depth.distribution='normal'"),
        (
            {},
            {"distribution": "uniform", "min_steps": 9, "max_steps": 3},
            "depth.max_steps=3 .* depth.min_steps=9",
        ),
        ({}, {"backprop_steps": 2, "loss_steps": 3}, "depth.loss_steps=3 .* the 2 steps"),
        ({}, {"max_steps": 20}, "depth.max_steps=20 .* depth.distribution=uniform"),
        ({}, {"distribution": "uniform", "min_steps": 1, "loss_steps": 2}, "depth.loss_steps=2"),
        ({"name": "GPT"}, {"distribution": "uniform"}, "not all alike"),
        ({"per_step_scale": True}, {"distribution": "uniform"}, "not all alike"),
        ({"inference_rate_decay": 0.5}, {"distribution": "uniform"}, "not all alike"),
        ({"name": "GPT_Rec"}, {"penalty": 1.0}, "depth.penalty=1.0 .* an energy"),
        ({"mask": "inclusive"}, {"penalty": 1.0}, "depth.penalty=1.0 .* model.mask=strict"),
        ({"name": "GPT_Rec"}, {"refine_passes": 1}, "depth.refine_passes=1 .* an energy"),
        (
            {"mask": "inclusive"},
            {"train_on_decoded": True},
            "depth.train_on_decoded=True .* model.mask=strict",
        ),
        (
            {"mask": "strict"},
            {"train_on_decoded": True, "backprop_steps": 2},
            "steps=2 .* depth.train_on_decoded",
        ),
        (
            {"mask": "strict"},
            {"train_on_decoded": True, "distribution": "uniform"},
            "'uniform' .*decoded",
        ),
        (
            {"mask": "strict"},
            {"train_on_decoded": True, "refine_passes": 1, "max_burn_in_passes": 2},
            "depth.max_burn_in_passes=2 .* depth.train_on_decoded",
        ),
        ({}, {"penalty": float("nan")}, "depth.penalty"),
        (
            {"mask": "strict"},
            {"max_burn_in_passes": 2},
            "depth.max_burn_in_passes=2 .* depth.refine_passes",
        ),
        ({"mask": "strict"}, {"consistency": 1.0}, "depth.consistency=1.0 .* depth.refine_passes"),
        (
            {"mask": "strict"},
            {"refine_passes": 1, "max_burn_in_passes": 2, "loss_steps": 2},
            "depth.loss_steps=2 .* depth.max_burn_in_passes",
        ),
        (
            {"mask": "strict"},
            {"refine_passes": 1, "backprop_steps": 2},
            "depth.backprop_steps=2 .*depth.refine_passes",
        ),
    ],
)
def test_mistakes_are_named(model, depth, message):
    config = default_config()
    config.model.update(model)
    config.depth.update(depth)
    with pytest.raises(UserError, match=message):
        check_config(config.to_dict(), 1)


MANY = {
    "min_steps": 2,
    "max_steps": 6,
    "sample_per": "sequence",
    "backprop_steps": 4,
    "loss_steps": 2,
}


@pytest.mark.parametrize(
    ("parts", "fields"),
    [
        slow(1, {**MANY, "penalty": 0.1}),
        slow(2, {**MANY, "penalty": 0.1}),
        slow(2, {"distribution": "fixed", "train_on_decoded": True}),
    ],
)
def test_a_training_step_is_the_same_in_parts_and_on_two_devices(parts, fields, standard_promotion):
    """With dropout, computed again, unrolled, in sequences of depths of their own; and decoded."""
    del standard_promotion
    model, variables = small_model(
        num_steps=4, dropout=0.2, remat="step", mask="strict", rule="sphere"
    )
    depth = depth_of(**fields)
    tokens = np.concatenate([TOKENS, TOKENS[:1]])
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((4, 7), np.float32))
    found = []
    for count, of in ((1, 1), (2, parts)):
        devices, kinds = jax.devices()[:count], (jax.sharding.AxisType.Auto,) * 3
        mesh = jax.make_mesh((count, 1, 1), sharding.AXES, kinds, devices=devices)
        function = jax.jit(training.make_loss_and_grads(model, of, mesh, depth))
        found.append(jax.tree.map(np.asarray, function(variables["params"], batch, KEY, 0.1, 5)))
    chex.assert_trees_all_close(*found, rtol=1e-3, atol=1e-4)


def test_nothing_changes_by_default():
    assert depths.of_config(default_config()) is None


def test_a_second_descent_sees_the_others_where_the_first_has_ended():
    model, variables = small_model(num_steps=3, implementation="autodiff", mask="strict")
    end = model.apply(variables, TOKENS, RolloutOptions(), method=partial_rollout)
    bound = model.bind(variables)
    inputs, dynamics_at = bound.dynamics(bound.embed(TOKENS))
    dynamics = dynamics_at(jax.tree.map(lambda leaf: leaf[0], inputs))
    in_place, x = block_in_context(dynamics, end), start(dynamics).x
    for _ in range(3):
        x = in_place(x)
    again = model.apply(variables, TOKENS, RolloutOptions(context=end), method=partial_rollout)
    chex.assert_trees_all_close(again.x, x, rtol=1e-5, atol=1e-6)
    third = model.apply(variables, TOKENS, RolloutOptions(context=again), method=partial_rollout)
    batch = Batch(TOKENS, TOKENS, np.ones(TOKENS.shape, np.float32))
    depth = depth_of(min_steps=3, max_steps=3, refine_passes=2)
    loss, _ = losses.summed_loss(variables["params"], model, batch, ROWS, KEY, 1.0, 0, depth)
    at = lambda state: jnp.sum(losses.cross_entropy(bound.readout(state.x), jnp.asarray(TOKENS)))
    chex.assert_trees_all_close(loss, sum(map(at, (end, again, third))) / 3, rtol=1e-5)


def test_held_descents_may_come_before_and_are_pulled_together():
    """Against plain descents, of any number before; the gradient where there are two."""
    model, variables = small_model(num_steps=2, mask="strict")
    depth = depth_of(
        min_steps=2, max_steps=2, refine_passes=2, max_burn_in_passes=2, consistency=0.5
    )
    batch = Batch(TOKENS, TOKENS, np.ones(TOKENS.shape, np.float32))

    def plain(params: Any, before: int):
        given = lambda context: (TOKENS, RolloutOptions(context=context))
        end = lambda params, c: model.apply({"params": params}, *given(c), method=partial_rollout)
        context = None
        for _ in range(before):
            context = end(jax.lax.stop_gradient(params), context)
        ends = []
        for _ in range(3):
            context = end(params, context)
            ends.append(context.x)
        at = lambda x: model.apply({"params": params}, x, method="readout")
        mean = sum(losses.cross_entropy(at(x), jnp.asarray(TOKENS)) for x in ends) / 3
        u, v, w = ((x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) for x in ends)
        square = lambda x: jnp.sum(x**2, axis=-1)
        apart = (square(v - u) / square(u) + square(w - v) / square(v)) / 2
        return jnp.sum(mean + 0.5 * apart)

    ours = lambda p, key: losses.summed_loss(p, model, batch, ROWS, key, 1.0, 0, depth)[0]
    found = jax.jit(jax.value_and_grad(ours))
    params, of_number = variables["params"], jax.jit(plain, static_argnums=1)
    wanted = [of_number(params, number) for number in range(3)]
    seen = set()
    for number in range(12):
        loss, gradient = found(params, jax.random.key(number))
        which = int(np.argmin([abs(loss - value) for value in wanted]))
        chex.assert_trees_all_close(loss, wanted[which], rtol=2e-3)
        if which == 2 and which not in seen:
            expected = jax.jit(jax.grad(plain), static_argnums=1)(params, which)
            chex.assert_trees_all_close(gradient, expected, rtol=2e-3, atol=1e-4)
        seen.add(which)
    assert seen == {0, 1, 2}


def test_decoded_tokens_are_those_of_a_fixed_point_cache():
    model, variables = small_model(num_steps=3, mask="strict", rule="sphere", inference_rate="psd")
    end = model.apply(variables, TOKENS, RolloutOptions(), method=partial_rollout)
    decoded = jax.jit(partial(model.apply, variables, TOKENS, end, method=decode_behind))
    x = decoded(3)
    found = model.apply(variables, x, method="readout")
    wanted = cached_logits(model, variables, TOKENS, [3, 3, 3], Decoding("fixed_point"))
    wanted = jnp.stack([logits for logits, _, _ in wanted], axis=1)
    chex.assert_trees_all_close(found[:, 2:], wanted, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_equal(x[:, :3], end.x[:, :3])
    assert jnp.abs(x[:, 3:] - end.x[:, 3:]).max() > 1e-2, "is not the usual descent"


def test_loss_of_decoded_tokens_goes_back_through_all_of_them():
    """Against plain steps of single tokens, for every prompt that may be drawn."""
    model, variables = small_model(num_steps=2, mask="strict")
    depth = depth_of(min_steps=2, max_steps=2, train_on_decoded=True)
    tokens = TOKENS[:, :6]
    batch = Batch(tokens, tokens, np.ones(tokens.shape, np.float32))

    def plain(params: Any, prompt: jax.Array):
        bound = model.bind({"params": params})
        inputs, dynamics_at = bound.dynamics(bound.embed(tokens))
        dynamics = dynamics_at(jax.tree.map(lambda leaf: leaf[0], inputs))
        end = partial_rollout(bound, tokens, RolloutOptions())
        last = end
        for at in range(1, tokens.shape[1]):
            in_place, x = block_in_context(dynamics, last), start(dynamics).x
            for _ in range(2):
                x = in_place(x)
            x = jnp.where(at < prompt, last.x, x)
            last = last._replace(x=last.x.at[:, at].set(x[:, at]))
        each = lambda x: losses.cross_entropy(bound.readout(x), jnp.asarray(tokens))
        return jnp.sum(each(end.x) + each(last.x)) / 2

    ours = lambda p, key: losses.summed_loss(p, model, batch, ROWS, key, 1.0, 0, depth)[0]
    found, params = jax.jit(jax.value_and_grad(ours)), variables["params"]
    of_prompt = jax.jit(jax.value_and_grad(plain))
    wanted, seen = {n: of_prompt(params, jnp.asarray(n)) for n in (1, 2, 3)}, set()
    for number in range(30):  # one of three lengths is not among so many once in 60,000 times
        given = found(params, jax.random.key(number))
        nearest = min(wanted, key=lambda n: abs(given[0] - wanted[n][0]))
        chex.assert_trees_all_close(given, wanted[nearest], rtol=2e-3, atol=1e-4)
        seen.add(nearest)
    assert seen == {1, 2, 3}
