"""Training that begins with the parameters of a trained model."""

import shutil

import chex
import pytest
from train_helpers import TEXT, config_in, save_untrained

from nrgpt_jax.errors import UserError
from nrgpt_jax.runs.pretrained import load_pretrained
from nrgpt_jax.training import loop

pytestmark = [pytest.mark.usefixtures("standard_promotion"), pytest.mark.ci]


@pytest.fixture
def config(tmp_path):
    config = config_in(tmp_path)
    config.seed = 3
    config.init_from = "{workdir}/../trained/{seed}"
    return config


def test_the_first_parameters_are_those_of_the_trained_model(config, tmp_path):
    """With steps too small to be seen; a run that goes on asks for that model no more."""
    trained = save_untrained(config, tmp_path / "trained/3", seed=8)
    config.train_steps, config.optimizer.weight_decay = 1, 0.0
    config.optimizer.schedule = "constant"  # for any number of steps
    config.optimizer.learning_rate = config.optimizer.final_learning_rate = 1e-9
    loop.train(config, tmp_path / "run")
    after = load_pretrained(tmp_path / "run", "latest").variables["params"]
    chex.assert_trees_all_close(after, trained, atol=1e-7)
    shutil.rmtree(tmp_path / "trained")
    config.train_steps = 2
    assert loop.train(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"init_from=.*trained/3 is no trained model"):
        loop.train(config, tmp_path / "other")
    assert not (tmp_path / "other/config.json").exists()


def test_a_model_that_does_not_fit_is_refused(config, tmp_path):
    folder = tmp_path / "trained/3"
    save_untrained(config, folder, seed=8)
    config.model.embed_dim = 32
    with pytest.raises(UserError, match=r"another model: its block/.* is \(.*16.*\), .* \(.*32"):
        loop.train(config, tmp_path / "run")
    (tmp_path / "text.txt").write_text(TEXT + "xyz!")
    with pytest.raises(UserError, match="knows other symbols"):
        loop.train(config, tmp_path / "run")
