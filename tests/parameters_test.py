"""One table says all: shapes, initial values, forms, mesh axes of every parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_helpers import small_model
from jax.sharding import PartitionSpec as P

from nrgpt_jax.core import parameters
from nrgpt_jax.core.parameters import (
    ParameterSpec,
    Sizes,
    constant,
    fixed,
    fraction,
    matrix,
    positive,
    vector,
)
from nrgpt_jax.models import abstract_params, model_names, parameter_specs, sharding

SIZES = Sizes(D=6, H=2, M=12, L=3)
TABLE = {
    "part": {"W": matrix("H D M"), "b": vector("M"), "one": fixed(1.0, "H")},
    "beta": positive(0.7),
    "mu": fraction(0.9),
    "gain": constant(2.0, "D"),
}


def test_what_is_kept_and_what_functions_are_given():
    stored = parameters.init_params(jax.random.key(0), parameters.stored_specs(TABLE), SIZES)
    assert set(stored) == {"part", "log_beta", "logit_mu", "gain"}
    assert set(stored["part"]) == {"W", "b"}, "a constant is not stored"
    assert not np.any(stored["part"]["b"])
    params = parameters.constrain(stored, TABLE, SIZES)
    assert set(params["part"]) == {"W", "b", "one"}
    np.testing.assert_allclose(params["beta"], 0.7, rtol=1e-6)
    np.testing.assert_allclose(params["mu"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(params["gain"], 2.0 * np.ones(6))
    assert params["part"]["W"].shape == (2, 6, 12)
    assert float(jnp.std(params["part"]["W"])) == pytest.approx(0.02, rel=0.3)


def test_distinct_blocks_are_drawn_apart():
    specs = parameters.stored_specs(parameters.stacked(TABLE))
    stored = parameters.init_params(jax.random.key(0), specs, SIZES)
    assert stored["part"]["W"].shape == (3, 2, 6, 12)
    assert stored["log_beta"].shape == (3,)
    assert float(jnp.abs(stored["part"]["W"][0] - stored["part"]["W"][1]).max()) > 0.0
    params = parameters.constrain(stored, parameters.stacked(TABLE), SIZES)
    assert params["part"]["one"].shape == (3, 2)
    assert not parameters.stacked(TABLE)["part"]["b"].is_matrix, "blocks are no axis of their own"


@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("name", model_names())
def test_tables_describe_what_models_create(name, blocks):
    model, _ = small_model(
        name=name, num_distinct_layers=blocks, per_step_scale=True, learn_beta=True
    )
    tokens = jax.ShapeDtypeStruct((1, 4), "int32")
    created = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    assert jax.tree.map(lambda a: a.shape, created) == jax.tree.map(
        lambda a: a.shape, abstract_params(model)
    )


def test_a_mesh_splits_parameters_by_the_axes_they_carry():
    partition = sharding.parameter_partition
    assert partition(matrix("H D D")) == P("tensor", "fsdp", None)
    assert partition(matrix("D M")) == P("fsdp", "tensor")
    assert partition(vector("M")) == P("tensor")
    assert partition(positive(1.0)) == P()
    own = ParameterSpec(("D", "K"), matrix("D D").init)  # an axis of one's own is not split
    assert partition(own) == P("fsdp", None)
    model, _ = small_model()
    data_only = sharding.parameter_shardings(parameter_specs(model), sharding.make_mesh())
    assert all(s.is_fully_replicated for s in jax.tree.leaves(data_only))
