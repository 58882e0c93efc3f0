"""The recurrent dynamics: scan equals loop, no future leaks, a trajectory is what it says."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_helpers import SIZES, dynamics_of, energy_parameters, make_dynamics, parameters, term_of

from nrgpt_jax.core.block import bind, block, energy_and_grad, rollout, start, update_cache
from nrgpt_jax.core.context import Context
from nrgpt_jax.core.descent import energy_in_context
from nrgpt_jax.core.descent import trajectory as recorded
from nrgpt_jax.core.energies import ENERGIES
from nrgpt_jax.core.norms import NORMS
from nrgpt_jax.core.rules import RULES

X = jax.random.normal(jax.random.key(1), (2, 5, SIZES.D))
SCALES = jnp.array([0.3, 0.2, 0.1, 0.25])


def stepped(model, x, scale=1.0):
    """The states after one step from x, and its energies and gradient."""
    state, out = block(model, start(model._replace(first=x)), scale)
    return state.x, out


def rolled(model, x, scales=SCALES):
    """The states after all steps from x."""
    step = lambda state, inputs: (block(model, state, inputs["scale"])[0], None)
    return rollout(step, start(model._replace(first=x)), {"scale": scales})[0].x


def trajectory(model):
    return jax.jit(lambda inputs: recorded(lambda _: model, inputs))({"scale": SCALES})


def test_scan_equals_loop_in_values_and_gradients():
    model = make_dynamics(jax.random.key(0), X, rate="full")

    def scanned(x, scales):
        return jnp.sum(rolled(model, x, scales) ** 2)

    def looped(x, scales):
        for scale in scales:
            x, _ = stepped(model, x, scale)
        return jnp.sum(x**2)

    both = (jax.jit(jax.value_and_grad(f, (0, 1)))(X, SCALES) for f in (scanned, looped))
    chex.assert_trees_all_close(*both, rtol=1e-4, atol=1e-5)


def test_momentum_rolls_as_a_heavy_ball():
    """v <- mu v + eta dE/dg, x <- x - c_t v, as a plain loop."""
    eta = jax.random.normal(jax.random.key(3), (SIZES.D, SIZES.D))
    model = make_dynamics(jax.random.key(0), X, rule="momentum", change=lambda _: eta)
    gradient = jax.jit(lambda x: stepped(model, x)[1].grad_g)
    roll = jax.jit(lambda x, scales: rolled(model, x, scales))
    x, v = X, jnp.zeros_like(X)
    for scale in SCALES:
        before, v = v, 0.5 * v + jnp.einsum("bnd,ed->bne", gradient(x), eta, precision="highest")
        x = x - scale * v
    assert float(jnp.abs(before).max()) > 0.1, "there is a velocity that goes on"
    chex.assert_trees_all_close(roll(X, SCALES), x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "none"])
def test_projected_moves_by_the_projection_of_the_gradient(norm):
    """x <- x - eta P diag(gamma) dE/dg; P takes away what the norm does not see."""
    params = parameters(jax.random.key(4), NORMS[norm].specs)
    eta = jax.random.normal(jax.random.key(3), (SIZES.D, SIZES.D))
    energy = lambda params, g, context: jnp.vdot(g, params["a"])
    slope = jax.random.normal(jax.random.key(5), (SIZES.D,))
    terms = {"plane": term_of(energy, {"a": slope}, dtype="float32")}
    options = {"norm": norm, "norm_params": params, "rule": "projected"}
    moved, _ = jax.jit(lambda x: stepped(dynamics_of(terms, x, eta, **options), x, 0.1))(X)

    def expected(x):
        pulled = params["gain"] * slope if norm != "none" else slope
        if norm == "layer_norm":
            x, pulled = x - jnp.mean(x), pulled - jnp.mean(pulled)
        if norm != "none":
            pulled -= x * jnp.vdot(x, pulled) / jnp.vdot(x, x)
        return -0.1 * jnp.dot(eta, pulled, precision="highest")

    wanted = jax.jit(jax.vmap(jax.vmap(expected)))(X)
    chex.assert_trees_all_close(moved - X, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_on_the_sphere_states_stay_on_it(norm):
    """x <- n(n(x) - eta P dE/dg): lengths are those of g without its gain, whatever x was."""
    eta = jax.random.normal(jax.random.key(3), (SIZES.D, SIZES.D))
    model = make_dynamics(jax.random.key(0), X, norm=norm, rule="sphere", change=lambda _: eta)
    moved = jax.jit(lambda x: stepped(model, x)[0])
    projected = model._replace(rule=RULES["projected"].make({}, eta, model.norm))

    def onto(x):
        centred = x - jnp.mean(x, axis=-1, keepdims=True) * float(norm == "layer_norm")
        return centred / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True))

    along = jax.jit(lambda x: stepped(projected, x)[0] - x)
    far = 3.0 * X
    on_it = moved(far)
    chex.assert_trees_all_close(on_it, onto(on_it), rtol=1e-3, atol=1e-4)
    for x in (far, on_it):
        chex.assert_trees_all_close(moved(x), onto(onto(x) + along(x)), rtol=1e-3, atol=1e-3)


def own_energies(model, held, x):
    """Energies (B,N) by term of tokens at x, in a context that stays at `held`."""
    norm, state = model.norm, start(model)._replace(x=held)
    keys, _ = update_cache(model, state, norm.function(held))
    return energy_and_grad(model, x, norm.function(x), keys).energies


def test_trajectory_is_the_rollout_with_its_energies():
    model = make_dynamics(jax.random.key(0), X)
    path = trajectory(model)
    chex.assert_shape([path.states, path.grad_x, path.moves], (5, 2, 5, SIZES.D))
    chex.assert_trees_all_close(path.states[0], X)
    last = jax.jit(lambda x: rolled(model, x))(X)
    chex.assert_trees_all_close(path.states[-1], last, rtol=1e-5, atol=1e-6)
    moved = path.states[1:] - path.states[:-1]
    chex.assert_trees_all_close(path.moves[:-1], moved, rtol=1e-4, atol=1e-5)
    own = jax.jit(lambda x: own_energies(model, x, x))(path.states[2])
    for name, energies in own.items():
        chex.assert_trees_all_close(path.energies[name][2], energies, rtol=1e-5)
    total = path.energies["attention"] + path.energies["feedforward"]
    chex.assert_trees_all_close(path.energies["total"], total, rtol=1e-6)
    assert set(path.energies) == {*own, "total"}

    x = path.states[2]
    own_total = lambda x_own: sum(own_energies(model, x, x_own).values())
    slopes = jax.jit(jax.jacrev(own_total))(x)  # (B,N,B,N,D)
    for sequence, token in np.ndindex(2, 5):
        here = slopes[sequence, token]
        expected = here[sequence, token]  # its own state; none other counts
        gradient = path.grad_x[2, sequence, token]
        chex.assert_trees_all_close(gradient, expected, rtol=1e-4, atol=1e-5)
        assert not here.at[sequence, token].set(0.0).any()


def test_every_step_of_a_trajectory_has_a_landscape_of_its_own():
    """E = |g - c_t|^2 / 2; after the last step energies are those of the last landscape."""

    def dynamics_at(inputs):
        energy = lambda params, g, context: 0.5 * jnp.sum((g - params["c"]) ** 2)
        bowl = term_of(energy, {"c": inputs["centre"]}, dtype="float32")
        return dynamics_of({"bowl": bowl}, X, jnp.ones(()))

    centres = jnp.array([0.0, 1.0, -1.0, 2.0])
    inputs = {"scale": SCALES, "centre": centres}
    path = jax.jit(lambda inputs: recorded(dynamics_at, inputs))(inputs)
    x = np.asarray(X)
    scales = [*np.asarray(SCALES), SCALES[-1].item()]
    for t, (scale, centre) in enumerate(zip(scales, [0.0, 1.0, -1.0, 2.0, 2.0], strict=True)):
        expected = (x, 0.5 * np.sum((x - centre) ** 2, axis=-1), x - centre, scale * (centre - x))
        found = (path.states, path.energies["total"], path.grad_x, path.moves)
        chex.assert_trees_all_close([a[t] for a in found], list(expected), rtol=1e-4, atol=1e-5)
        x = x - scale * (x - centre)


GAINLESS = {"bare_layer_norm": {}, "none": {}, "rms_norm": {"gain": jnp.ones(SIZES.D)}}


@pytest.mark.parametrize("norm", [*GAINLESS, "layer_norm"])
def test_the_leak_is_a_legendre_dual(norm):
    """Its gradient in x, through g and x and L(x) alike, is the one through g alone.

    So it is of the whole energy, as a trajectory has it; not behind a norm with gain.
    """
    names = ("full_rank", "injection", "leak")
    params = {name: energy_parameters(jax.random.key(k), name) for k, name in enumerate(names)}
    norm_params = {**parameters(jax.random.key(4), NORMS[norm].specs), **GAINLESS.get(norm, {})}
    terms = {name: bind(ENERGIES[name], params[name]) for name in params}
    model = dynamics_of(terms, X, jnp.ones(()), norm=norm, norm_params=norm_params)

    def token_energy(x, first, position, keys):
        g = NORMS[norm].function(norm_params, x)
        lagrangian = NORMS[norm].lagrangian(norm_params, x)
        context = Context(keys, False, position, x, first, lagrangian, g)
        return sum(ENERGIES[name].function(params[name], g, context) for name in params)

    of_sequence = jax.vmap(jax.value_and_grad(token_energy), (0, 0, 0, None))
    of_batch = jax.jit(jax.vmap(of_sequence, (0, 0, None, 0)))
    path = trajectory(model)
    x = path.states[2]
    energies, gradients = of_batch(x, X, jnp.arange(5), model.norm.function(x))
    chex.assert_trees_all_close(path.energies["total"][2], energies, rtol=1e-4, atol=1e-5)
    if norm in GAINLESS:
        chex.assert_trees_all_close(path.grad_x[2], gradients, rtol=1e-3, atol=1e-4)
    else:
        assert float(jnp.abs(path.grad_x[2] - gradients).max()) > 1e-2
    energy_at = energy_in_context(model, start(model)._replace(x=x))
    in_context = jax.jit(jax.grad(lambda x: jnp.sum(energy_at(x))))(x)
    chex.assert_trees_all_close(in_context, gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strict", [True, False])
def test_the_future_does_not_leak(strict):
    """A new state depends on all old ones of the past, and on no other."""
    model = make_dynamics(jax.random.key(0), X, strict=strict)
    jacobian = jax.jit(jax.jacobian(lambda x: rolled(model, x)))(X)
    found = np.abs(np.asarray(jacobian)).max(axis=(2, 5)) > 0.0
    for sequence in range(2):
        own = found[sequence, :, sequence]
        assert not np.triu(own, 1).any()
        assert np.tril(own).sum() == 15  # and all of the past does
        assert not found[sequence, :, 1 - sequence].any(), "sequences do not meet"


@pytest.mark.parametrize("rule", RULES)
def test_step_keeps_the_dtype(rule):
    for dtype in (jnp.float32, jnp.bfloat16):
        change = lambda eta, dtype=dtype: eta.astype(dtype)
        model = make_dynamics(jax.random.key(0), X, rule=rule, change=change)
        begin = start(model)
        state, _ = jax.eval_shape(lambda state, model=model: block(model, state), begin)
        chex.assert_trees_all_equal_dtypes(state, begin)
        assert state.x.dtype == jnp.float32
