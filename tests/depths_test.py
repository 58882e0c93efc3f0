"""Training at many depths: which steps are made, and what is learned from."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_helpers import cached_logits, first_dynamics, small_model
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

pytestmark = pytest.mark.ci

TOKENS = np.random.default_rng(0).integers(0, 11, (3, 8)).astype(np.int32)
BATCH = Batch(TOKENS[:, :-1], TOKENS[:, 1:], np.ones((3, 7), np.float32))
SAME = Batch(TOKENS, TOKENS, np.ones(TOKENS.shape, np.float32))
ROWS, KEY = jnp.arange(3), jax.random.key(5)


def depth_of(**fields):
    config = default_config()
    config.model.num_steps = 4
    config.depth.update({"distribution": "uniform", **fields})
    found = depths.of_config(config)
    assert found is not None
    return found


def loss_by(model, depth, batch=SAME):
    """`(params, key) -> summed loss` of a training step."""
    more = 1.0, 0, depth
    return lambda p, key=KEY: losses.summed_loss(p, model, batch, ROWS, key, *more)[0]


def test_by_default_all_depths_are_that_of_the_model():
    assert depths.of_config(default_config()) is None


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
    fields = {"min_steps": 2, "max_steps": 12, "curriculum_steps": 100}
    depth = depth_of(distribution=distribution, **fields, sample_per="sequence")
    drawn = lambda n: depths.sample_num_steps(depth, KEY, jnp.arange(500), jnp.asarray(n))
    assert [int(drawn(n).max()) for n in (0, 49, 99)] == [2, half_way, 12]


@pytest.mark.parametrize("fields", [{}, {"rule": "momentum"}, {"name": "GPT_Rec_parallel"}])
def test_a_walk_makes_the_steps_of_a_model_of_that_depth(fields):
    model, variables = small_model(num_steps=4, **fields)
    counts = jnp.array([1, 4, 2])

    @jax.jit
    def walks(variables):
        """The plain states after 1, 4, 2 and 6 steps; then by walks of 4 steps."""
        plain = [
            model.clone(num_steps=n).apply(variables, TOKENS, method="forward")[0].x
            for n in (*counts.tolist(), 6)
        ]
        bound = model.bind(variables)
        late = partial_rollout(bound, TOKENS, RolloutOptions(num_skipped_steps=4 - counts))
        run = equal_steps(bound, TOKENS, counts)
        return plain, late.x, run.x, partial_rollout(bound, TOKENS, RolloutOptions(begin=run)).x

    plain, late, run, deeper = walks(variables)
    wanted = jnp.stack([states[i] for i, states in enumerate(plain[:3])])
    chex.assert_trees_all_close(late, wanted, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(run, wanted, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(deeper[2], plain[3][2], rtol=1e-4, atol=1e-5)


def test_gradient_goes_through_the_last_steps_alone():
    """Against a plain loop that holds parameters and states of the steps before."""
    model, variables = small_model(num_steps=4, energies=("injection",))
    depth = depth_of(min_steps=4, max_steps=4, backprop_steps=2, loss_steps=2)
    params = variables["params"]

    def plain(params: Any):
        held = jax.lax.stop_gradient(params)
        bound = lambda p: model.bind({"params": p})
        at = lambda p: first_dynamics(bound(p), bound(p).embed(BATCH.inputs))
        state = start(at(held))
        for p in (held, held):
            state = block(at(p), state)[0]
        state, total = jax.lax.stop_gradient(state), jnp.zeros(())
        for _ in range(2):
            state = block(at(params), state)[0]
            logits = bound(params).readout(state.x)
            total += jnp.sum(losses.cross_entropy(logits, jnp.asarray(BATCH.targets))) / 2
        return total

    ours = loss_by(model, depth, BATCH)
    both = (jax.jit(jax.value_and_grad(loss))(params) for loss in (ours, plain))
    chex.assert_trees_all_close(*both, rtol=1e-4, atol=1e-5)


def test_gain_is_that_of_each_tokens_own_block():
    model, variables = small_model(num_steps=3, mask="strict", rule="sphere", inference_rate="psd")
    state = model.apply(variables, TOKENS, RolloutOptions(), method=partial_rollout)
    plain = model.with_implementation("autodiff")
    bound = plain.bind(variables)
    function = convergence.own_step(first_dynamics(bound, bound.embed(TOKENS)), state)
    found = jax.jit(lambda x: convergence.token_jacobians(function, x))(state.x)
    v = jax.random.normal(KEY, state.x.shape)
    wanted = jnp.linalg.norm(jnp.einsum("bnij,bnj->bni", found, v), axis=-1)
    gain = jax.jit(lambda v: plain.apply(variables, TOKENS, state, v, method=step_gain))(v)
    chex.assert_trees_all_close(gain, wanted / jnp.linalg.norm(v, axis=-1), rtol=1e-3, atol=1e-5)


def test_a_penalty_is_of_what_exceeds_its_bound():
    model, variables = small_model(num_steps=3, mask="strict")

    def loss(size, bound):
        depth = depth_of(min_steps=3, max_steps=3, penalty=size, penalty_bound=bound)
        return float(jax.jit(loss_by(model, depth))(variables["params"]))

    logits = jax.jit(model.apply)(variables, TOKENS)
    without = float(jnp.sum(losses.cross_entropy(logits, jnp.asarray(TOKENS))))
    assert loss(1.0, 1e6) == pytest.approx(without, rel=1e-5)
    once, twice = (loss(size, 0.0) - without for size in (1.0, 2.0))
    assert once > 1.0
    assert twice == pytest.approx(2 * once, rel=1e-4)


STRICT: dict[str, Any] = {"mask": "strict"}
INCLUSIVE = {"mask": "inclusive"}
UNIFORM: dict[str, Any] = {"distribution": "uniform"}
DECODED: dict[str, Any] = {"train_on_decoded": True}
REFINED: dict[str, Any] = {"refine_passes": 1}
BURNT_IN = REFINED | {"max_burn_in_passes": 2}


@pytest.mark.parametrize(
    ("model", "depth", "message"),
    [
        ({}, {"distribution": "normal"}, "depth.distribution='normal'"),
        ({}, UNIFORM | {"min_steps": 9, "max_steps": 3}, "max_steps=3 .* depth.min_steps=9"),
        ({}, {"backprop_steps": 2, "loss_steps": 3}, "depth.loss_steps=3 .* the 2 steps"),
        ({}, {"max_steps": 20}, "depth.max_steps=20 .* depth.distribution=uniform"),
        ({}, UNIFORM | {"min_steps": 1, "loss_steps": 2}, "depth.loss_steps=2"),
        ({}, {"penalty": float("nan")}, "depth.penalty"),
        ({"name": "GPT"}, UNIFORM, "not all alike"),
        ({"per_step_scale": True}, UNIFORM, "not all alike"),
        ({"inference_rate_decay": 0.5}, UNIFORM, "not all alike"),
        ({"name": "GPT_Rec"}, {"penalty": 1.0}, "depth.penalty=1.0 .* an energy"),
        (INCLUSIVE, {"penalty": 1.0}, "depth.penalty=1.0 .* model.mask=strict"),
        ({"name": "GPT_Rec"}, REFINED, "depth.refine_passes=1 .* an energy"),
        (INCLUSIVE, DECODED, "depth.train_on_decoded=True .* model.mask=strict"),
        (STRICT, DECODED | {"backprop_steps": 2}, "steps=2 .* depth.train_on_decoded"),
        (STRICT, DECODED | UNIFORM, "'uniform' .*decoded"),
        (STRICT, DECODED | BURNT_IN, "depth.max_burn_in_passes=2 .* depth.train_on_decoded"),
        (STRICT, {"max_burn_in_passes": 2}, "depth.max_burn_in_passes=2 .* depth.refine_passes"),
        (STRICT, {"consistency": 1.0}, "depth.consistency=1.0 .* depth.refine_passes"),
        (STRICT, BURNT_IN | {"loss_steps": 2}, "loss_steps=2 .* depth.max_burn_in_passes"),
        (STRICT, REFINED | {"backprop_steps": 2}, "backprop_steps=2 .*depth.refine_passes"),
    ],
)
def test_mistakes_are_named(model, depth, message):
    config = default_config()
    config.model.update(model)
    config.depth.update(depth)
    with pytest.raises(UserError, match=message):
        check_config(config.to_dict(), 1)


MANY = {"min_steps": 2, "max_steps": 6, "sample_per": "sequence"}
MANY |= {"backprop_steps": 4, "loss_steps": 2, "penalty": 0.1}


@pytest.mark.parametrize(
    ("parts", "fields"),
    [
        slow(1, MANY),
        slow(2, MANY),
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


def test_a_second_descent_sees_the_others_where_the_first_has_ended():
    model, variables = small_model(num_steps=3, implementation="autodiff", mask="strict")

    @jax.jit
    def both(variables):
        bound = model.bind(variables)
        end = partial_rollout(bound, TOKENS, RolloutOptions())
        dynamics = first_dynamics(bound, bound.embed(TOKENS))
        in_place, x = block_in_context(dynamics, end), start(dynamics).x
        for _ in range(3):
            x = in_place(x)
        return partial_rollout(bound, TOKENS, RolloutOptions(context=end)).x, x

    chex.assert_trees_all_close(*both(variables), rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_held_descents_may_come_before_and_are_pulled_together():
    """Against plain descents, of any number before; the gradient where there are two."""
    model, variables = small_model(num_steps=2, mask="strict")
    passes = {"refine_passes": 2, "max_burn_in_passes": 2, "consistency": 0.5}
    depth = depth_of(min_steps=2, max_steps=2, **passes)

    @jax.jit
    def end(params, context):
        """Where a descent ends, and the loss there."""
        given = TOKENS, RolloutOptions(context=context)
        state = model.apply({"params": params}, *given, method=partial_rollout)
        logits = model.apply({"params": params}, state.x, method="readout")
        return state, losses.cross_entropy(logits, jnp.asarray(TOKENS))

    def plain(params: Any, before: int):
        context, ends, mean = None, list[Any](), jnp.zeros(())
        for _ in range(before):
            context, _ = end(jax.lax.stop_gradient(params), context)
        for _ in range(3):
            context, of_end = end(params, context)
            ends, mean = [*ends, context.x], mean + of_end / 3
        u, v, w = ((x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) for x in ends)
        square = lambda x: jnp.sum(x**2, axis=-1)
        apart = (square(v - u) / square(u) + square(w - v) / square(v)) / 2
        return jnp.sum(mean + 0.5 * apart)

    found = jax.jit(jax.value_and_grad(loss_by(model, depth)))
    params = variables["params"]
    wanted = [plain(params, number) for number in range(3)]
    seen = set()
    for number in range(12):
        loss, gradient = found(params, jax.random.key(number))
        which = int(np.argmin([abs(loss - value) for value in wanted]))
        chex.assert_trees_all_close(loss, wanted[which], rtol=2e-3)
        if which == 2 and which not in seen:
            expected = jax.grad(plain)(params, which)
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
        dynamics = first_dynamics(bound, bound.embed(tokens))
        end = partial_rollout(bound, tokens, RolloutOptions())

        def decode(last, at):
            in_place, x = block_in_context(dynamics, last), start(dynamics).x
            x = jnp.where(at < prompt, last.x, in_place(in_place(x)))
            return last._replace(x=last.x.at[:, at].set(x[:, at])), None

        last, _ = jax.lax.scan(decode, end, jnp.arange(1, tokens.shape[1]))
        each = lambda x: losses.cross_entropy(bound.readout(x), jnp.asarray(tokens))
        return jnp.sum(each(end.x) + each(last.x)) / 2

    found = jax.jit(jax.value_and_grad(loss_by(model, depth, batch)))
    params = variables["params"]
    of_prompt = jax.jit(jax.value_and_grad(plain))
    wanted, seen = {n: of_prompt(params, jnp.asarray(n)) for n in (1, 2, 3)}, set()
    for number in range(30):  # one of three lengths is not among so many once in 60,000 times
        given = found(params, jax.random.key(number))
        nearest = min(wanted, key=lambda n: abs(given[0] - wanted[n][0]))
        chex.assert_trees_all_close(given, wanted[nearest], rtol=2e-3, atol=1e-4)
        seen.add(nearest)
    assert seen == {1, 2, 3}
