"""Measurements of a trained model on a text: energies, motion, predictions and certificates.

found = examine(load_pretrained("runs/listops"), tokens, num_steps=20)
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nrgpt_jax.analysis.certificate import Certificate, certificate
from nrgpt_jax.analysis.landscape import Landscape, landscape
from nrgpt_jax.core import evidence
from nrgpt_jax.core.block import start
from nrgpt_jax.core.convergence import Attraction, attraction
from nrgpt_jax.core.descent import Trajectory, trajectory
from nrgpt_jax.datasets.tokenizers import Tokenizer
from nrgpt_jax.errors import UserError, require
from nrgpt_jax.generation.decode import as_tokens
from nrgpt_jax.generation.sampling import of_symbols
from nrgpt_jax.models import LanguageModel
from nrgpt_jax.runs.pretrained import Pretrained

LARGEST = 1e6  # multiple of the first energies beyond which energies have diverged
TOP = 5  # number of most probable next tokens in the results
MOST_STEPS = 2**12  # all states are stored
GRID_VALUES = 90_000  # approximate maximum for all landscapes together


class Predictions(NamedTuple):
    """Next-token predictions, by the head applied to the state of every step."""

    tokens: np.ndarray  # (T+1,N,k) most probable tokens
    probabilities: np.ndarray  # (T+1,N,k) of these tokens
    entropy: np.ndarray  # (T+1,N) nats
    surprise: np.ndarray  # (T+1,N-1) nats, of the actual next token
    agreement: np.ndarray  # (T+1,N) whether the most probable token is that of `Analysis.depth`


class Analysis(NamedTuple):
    """Results as numpy arrays over T steps and N tokens."""

    symbols: list[str]  # (N,) the text, token by token
    tokens: np.ndarray  # (N,)
    vocabulary: list[str]
    trained_steps: int
    tolerance: float
    diverged_at: int | None  # step at which energies diverged; T ends before it
    path: Trajectory
    step_norms: np.ndarray  # (T,N) ||x(t+1) - x(t)||
    speeds: np.ndarray  # (T,N) ||g(t+1) - g(t)|| / ||g(t)||
    settled: np.ndarray  # (N,) step from which the speed stays within tolerance; T: never
    predictions: Predictions
    certificate: Certificate
    attraction: Attraction | None  # (N,) after the last step; None if the step is not of x alone
    landscape: Landscape

    @property
    def num_steps(self) -> int:
        """T, the number of steps taken."""
        return len(self.speeds)

    @property
    def depth(self) -> int:
        """The trained number of steps, or T if it is smaller."""
        return min(self.trained_steps, self.num_steps)

    @property
    def depth_name(self) -> str:
        """The label of step `depth`."""
        complete = self.depth == self.trained_steps
        return (
            "trained depth"
            if complete
            else f"step {self.depth} of {self.trained_steps} in training"
        )


def examine(
    trained: Pretrained,
    tokens: np.ndarray,
    *,
    num_steps: int | None = None,
    tolerance: float = 1e-2,
) -> Analysis:
    """Run a model on a text and measure every step.

    Args:
      trained: a model with energies.
      tokens: (N,), at most the context length.
      num_steps: T; None: four times the number in training.
      tolerance: a token has converged if a step changes its g by no more, relative.

    Raises:
      UserError: the model has no energy, the text is empty or too long, or a number is out of
        range.
    """
    model, variables, tokens = _prepared(trained, tokens, num_steps, tolerance)
    with jax.default_matmul_precision("highest"):
        result = _run(model, variables, tokens, trained.tokenizer.size, tolerance)
    path, speeds, measured, predicted = jax.tree.map(np.asarray, result)
    end = _finite_steps(path.energies["total"])
    if end < 1:
        raise UserError("the energies of this text diverge in the first step; nothing to look at")
    at = min(trained.model.num_steps, end)
    path, predicted = jax.tree.map(lambda a: a[: end + 1], (path, predicted))
    guesses, probabilities, entropy, surprise = predicted
    speeds, measured = speeds[:end], jax.tree.map(lambda a: a[:end], measured)
    best, names = guesses[..., 0], symbols_of(trained.tokenizer)
    with jax.default_matmul_precision("highest"):
        view = _view(model, variables, path.states, at)
        attracted = _attraction(model, variables, path.states, end)
    return Analysis(
        symbols=[names[t] for t in tokens],
        tokens=tokens,
        vocabulary=names,
        trained_steps=trained.model.num_steps,
        tolerance=tolerance,
        diverged_at=None if end == model.num_steps else end + 1,
        path=path,
        step_norms=np.linalg.norm(np.diff(path.states, axis=0), axis=-1),
        speeds=speeds,
        settled=np.asarray(evidence.settling_steps(jnp.asarray(speeds)[:, None], tolerance))[0],
        predictions=Predictions(guesses, probabilities, entropy, surprise, best == best[at]),
        certificate=certificate(trained, path.states[:end], measured),
        attraction=jax.tree.map(lambda leaf: np.asarray(leaf)[0], attracted),
        landscape=jax.tree.map(np.asarray, view),
    )


def _prepared(trained: Pretrained, tokens: np.ndarray, num_steps: int | None, tolerance: float):
    """Return the model, variables and tokens of an examination. Raises UserError."""
    if not trained.model.has_energy:
        raise UserError(f"{trained.config.model.name} has no energy to look at; use an NRGPT run")
    require(0 < tolerance < math.inf, "tolerance", tolerance, "positive, and finite")
    steps = 4 * trained.model.num_steps if num_steps is None else num_steps
    require(steps <= MOST_STEPS, "num_steps", steps, f"at most {MOST_STEPS:,}")
    model, variables = trained.model.with_num_steps(trained.variables, steps)
    model = model.clone(dtype="float32")  # bfloat16 does not resolve small energy changes
    tokens = as_tokens(tokens, trained.tokenizer.size)
    fits = 2 <= len(tokens) <= model.context_length
    require(fits, "tokens", len(tokens), f"2 to the context length {model.context_length}")
    return model, variables, tokens


def symbols_of(tokenizer: Tokenizer) -> list[str]:
    """Return the text of every token of a vocabulary, or its name if the text is not printable."""
    texts = [(tokenizer.decode([t]), name) for t, name in enumerate(tokenizer.vocabulary)]
    return [text if text.isprintable() and "\ufffd" not in text else name for text, name in texts]


@partial(jax.jit, static_argnums=(0, 3, 4))
def _run(model: LanguageModel, variables, tokens, known: int, tolerance: float):
    """Compute the trajectory, its relative speeds, the evidence of descent, and the predictions."""
    bound: Any = model.bind(variables)
    inputs, dynamics_at = bound.dynamics(bound.embed(tokens[None]))
    path = trajectory(dynamics_at, inputs)
    measured = evidence.evidence(dynamics_at, inputs, path, tolerance=tolerance)
    norm = dynamics_at(jax.tree.map(lambda leaf: leaf[0], inputs)).norm.function
    speeds = evidence.relative_speeds(jax.vmap(norm)(path.states))
    path, measured, speeds = jax.tree.map(lambda leaf: leaf[:, 0], (path, measured, speeds))

    def predict(x):
        log_p = jax.nn.log_softmax(of_symbols(bound.readout(x[None])[0], known))
        p, best = jax.lax.top_k(jnp.exp(log_p), min(TOP, known))
        surprise = -jnp.take_along_axis(log_p[:-1], tokens[1:, None], axis=-1)[:, 0]
        return best, p, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1), surprise

    return path, speeds, measured, jax.lax.map(predict, path.states)


@partial(jax.jit, static_argnums=(0, 3))
def _view(model: LanguageModel, variables, states, held_at: int) -> Landscape:
    points = max(9, min(31, math.isqrt(GRID_VALUES // states.shape[1])))
    bound: Any = model.bind(variables)
    inputs, dynamics_at = bound.dynamics(states[:1])
    last = jax.tree.map(lambda leaf: leaf[held_at - 1], inputs)
    return landscape(dynamics_at(last), states, states[held_at], points)


@partial(jax.jit, static_argnums=(0, 3))
def _attraction(model: LanguageModel, variables, states, steps: int) -> Attraction | None:
    """Compute the attraction of the last states (N,D), if all further steps are like the last.

    None if the next step uses another block, or if the rule has a state.
    """
    bound: Any = model.with_implementation("autodiff").bind(variables)
    inputs, dynamics_at = bound.dynamics(states[:1])
    last = jax.tree.map(lambda leaf: leaf[steps - 1], inputs)
    dynamics = dynamics_at(last)
    state = start(dynamics)._replace(x=states[steps][None])
    if model.num_distinct_layers > 1 or jax.tree.leaves(state.rule):
        return None
    return attraction(dynamics, state, jax.random.key(0), scale=last["scale"])


def _finite_steps(energy: np.ndarray) -> int:
    """Return the number of steps before any energy (T+1,N) diverges."""
    bound = LARGEST * (1.0 + np.abs(energy[0]).max())
    with np.errstate(invalid="ignore"):
        sound = (np.abs(energy) <= bound).all(axis=1)
    return len(energy) - 1 if sound.all() else int(np.argmin(sound)) - 1


def as_numbers(result: Analysis) -> dict[str, Any]:
    """Return all results except states and gradients, for JSON; nan and infinity are null."""
    p = result.predictions
    named = {
        "text": result.symbols,
        "trained_steps": result.trained_steps,
        "num_steps": result.num_steps,
        "diverged_at": result.diverged_at,
        "tolerance": result.tolerance,
        "certificate": result.certificate._asdict(),
        "energies": dict(result.path.energies),
        "step_norm": result.step_norms,
        "speed": result.speeds,
        "gradient_norm": np.linalg.norm(result.path.grad_x, axis=-1),
        "spectral_radius": result.attraction and result.attraction.radius,
        "speed_after": result.attraction and result.attraction.speed,
        "settled_at_step": [int(s) if s < result.num_steps else None for s in result.settled],
        "top_tokens": [[[result.vocabulary[t] for t in r] for r in step] for step in p.tokens],
        "top_probabilities": p.probabilities,
        "entropy": p.entropy,
        "surprise": p.surprise,
        "agreement": p.agreement,
        "landscape": {
            name: getattr(result.landscape, name)
            for name in ("path", "axes", "energy", "explained")
        },
    }
    return plain(named)


def plain(value: Any) -> Any:
    """Convert to lists, dictionaries and numbers of six digits; nan and infinity are None."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
