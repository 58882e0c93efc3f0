"""Evaluates a trained model by lm-evaluation-harness: its command, with one more model.

    python -m nrgpt_jax.harness --model nrgpt_jax --model_args workdir=runs/openwebtext --tasks mmlu

Arguments are those of `lm_eval`; of `--model_args` here: `workdir` (a run directory or an exported
folder), `checkpoint` (best or latest) and `num_steps` (of the descent; as in training by default).
Tasks are scored by likelihoods, `nrgpt_jax.log_likelihood`; texts that are longer than the context
length lose their oldest tokens. It needs the extra `harness`.
Source: github.com/EleutherAI/lm-evaluation-harness
"""

from typing import Any

import numpy as np

from nrgpt_jax import cli
from nrgpt_jax.datasets.tokenizers import Tokenizer
from nrgpt_jax.errors import UserError
from nrgpt_jax.generation.engine import Settings, check_settings, generate
from nrgpt_jax.generation.sampling import Sampling
from nrgpt_jax.generation.scoring import log_likelihood
from nrgpt_jax.runs.pretrained import load_pretrained

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError:
    raise UserError(
        "lm_eval is missing: .venv/bin/python -m pip install 'nrgpt-jax[harness]'"
    ) from None

NAME = "nrgpt_jax"
MOST_TOKENS = 256  # of a text that a task has made and does not limit
UNUSED = ("device", "max_batch_size")  # that the harness gives every model


@register_model(NAME)
class HarnessModel(TemplateLM):
    """A trained model for tasks of lm-evaluation-harness.

    Args:
      workdir: a run directory or an exported folder.
      checkpoint: of a run directory, `best` or `latest`.
      num_steps: of the descent; None: as in training.
      batch_size: texts at a time.

    Raises:
      UserError: there is no such run, or an argument is out of range or unknown.
    """

    def __init__(
        self,
        workdir: str,
        checkpoint: str = "best",
        num_steps: int | None = None,
        batch_size: int | str = 32,
        **others: Any,
    ):
        super().__init__()
        unknown = sorted(set(others) - set(UNUSED))
        if unknown:
            raise UserError(f"unknown argument {unknown[0]!r} of --model {NAME}")
        trained = load_pretrained(workdir, checkpoint)
        steps = num_steps or trained.model.num_steps
        check_settings(trained.model, Settings(num_steps=num_steps))
        self.model, self.variables = trained.model.with_num_steps(trained.variables, steps)
        self.text: Tokenizer = trained.tokenizer
        self.batch_size = 32 if str(batch_size).startswith("auto") else int(batch_size)
        self.max_length = trained.model.context_length

    @property
    def tokenizer_name(self) -> str:
        """Names it in caches."""
        return f"{NAME}_{self.text.kind}_{self.text.size}"

    @property
    def eot_token_id(self) -> int:
        """What stands in front of a text without a context: the end token, or else a line break,
        or else token 0."""
        if self.text.end is not None:
            return self.text.end
        try:
            return int(self.text.encode("\n")[-1])
        except (UserError, IndexError):
            return 0

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Tokens of a text. Raises UserError naming what is not in the vocabulary."""
        del add_special_tokens  # there are none
        return self.text.encode(string).tolist()

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_: Any):
        """(log-likelihood in nats, whether it is greedy) of each (texts, context, continuation)."""
        del disable_tqdm
        contexts = [np.asarray(context, np.int32) for _, context, _ in requests]
        endings = [np.asarray(ending, np.int32) for *_, ending in requests]
        return [
            (found.log_likelihood, found.is_greedy) for found in self._scored(contexts, endings)
        ]

    def _scored(self, contexts: list[np.ndarray], endings: list[np.ndarray]):
        options = {"num_symbols": self.text.size, "batch_size": self.batch_size}
        return log_likelihood(self.model, self.variables, contexts, endings, **options)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood in nats of whole texts, each token once, in windows."""
        del disable_tqdm
        found = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            windows = utils.get_rolling_token_windows(
                token_list=tokens,
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [utils.make_disjoint_window(window) for window in windows]
            arrays = [
                [np.asarray(part, np.int32) for part in side] for side in zip(*pairs, strict=True)
            ]
            found.append(sum(score.log_likelihood for score in self._scored(*arrays)))
        return found

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """What follows each text, up to the first of its `until` strings."""
        del disable_tqdm
        return [self._until(*request.args) for request in requests]

    def _until(self, context: str, options: dict[str, Any]) -> str:
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        temperature = options.get("temperature", 0.0) if options.get("do_sample") else 0.0
        sampling = Sampling(float(temperature), top_p=float(options.get("top_p", 1.0)))
        new = generate(
            self.model,
            self.variables,
            [self.text.encode(context)[-self.max_length :]],
            int(options.get("max_gen_toks", MOST_TOKENS)),
            Settings(sampling),
            end_token=self.text.end,
            num_symbols=self.text.size,
        )[0]
        made = self.text.decode(new.tokens)
        return made[: min((made.find(stop) for stop in stops if stop in made), default=len(made))]


def main() -> None:
    """`lm_eval` itself."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    cli.call(main)
