"""Types of the public names, which `__init__.py` imports on demand."""

from nrgpt_jax.array_types import Batch as Batch
from nrgpt_jax.configs import default_config as default_config
from nrgpt_jax.core.block import combination as combination
from nrgpt_jax.core.descent import Convergence as Convergence
from nrgpt_jax.core.energies import attention as attention
from nrgpt_jax.core.energies import energy as energy
from nrgpt_jax.core.energies import feedforward as feedforward
from nrgpt_jax.core.metrics import metric as metric
from nrgpt_jax.core.parameters import constant as constant
from nrgpt_jax.core.parameters import fixed as fixed
from nrgpt_jax.core.parameters import matrix as matrix
from nrgpt_jax.core.parameters import positive as positive
from nrgpt_jax.core.parameters import vector as vector
from nrgpt_jax.core.rules import rule as rule
from nrgpt_jax.datasets import dataset as dataset
from nrgpt_jax.datasets.tokenizers import tokenizer as tokenizer
from nrgpt_jax.generation.generate import Settings as Settings
from nrgpt_jax.generation.generate import generate as generate
from nrgpt_jax.generation.sampling import Sampling as Sampling
from nrgpt_jax.generation.scoring import log_likelihood as log_likelihood
from nrgpt_jax.models import create_model as create_model
from nrgpt_jax.models.evaluators import evaluator as evaluator
from nrgpt_jax.runs.pretrained import load_pretrained as load_pretrained
from nrgpt_jax.runs.pretrained import save_pretrained as save_pretrained
from nrgpt_jax.training.loop import train as train
from nrgpt_jax.training.losses import loss_fn as loss_fn

__version__: str
__all__: list[str]
