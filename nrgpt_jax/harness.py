"""Evaluate a trained model with lm-evaluation-harness: its command, with one additional model.

    python -m nrgpt_jax.harness --model nrgpt_jax --model_args workdir=runs/openwebtext
        --tasks mmlu --batch_size auto

Arguments are those of `lm_eval`. `--model_args` takes `workdir` (a run directory or an exported
folder), `checkpoint` (best or latest) and `num_steps` (of the descent; as in training by default).
Likelihoods are computed by `nrgpt_jax.log_likelihood`. Needs the extra `harness`.
Source: github.com/EleutherAI/lm-evaluation-harness
"""

import itertools
import json
import sys
from collections.abc import Sequence, Sized
from typing import Any, NamedTuple

import numpy as np

from nrgpt_jax import cli
from nrgpt_jax.datasets.tokenizers import Tokenizer
from nrgpt_jax.errors import UserError, require
from nrgpt_jax.generation.generate import Settings, check_settings, stream
from nrgpt_jax.generation.sampling import Sampling
from nrgpt_jax.generation.scoring import log_likelihood
from nrgpt_jax.runs.pretrained import load_pretrained

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError:
    cure = "lm_eval is missing: .venv/bin/python -m pip install 'nrgpt-jax[harness]'"
    raise ImportError(cure) from None

NAME = "nrgpt_jax"
AT_ONCE = 32  # texts, with an automatic batch size
MOST_TOKENS = 256  # new tokens in a generation without a limit from its task
PIECE = 16  # tokens between two checks for stop strings
UNUSED = ("device", "max_batch_size")  # passed by the harness to every model
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
NUMBERS = (*LIMITS, *Sampling._fields)
OPTIONS = ("until", "do_sample", "num_beams", *NUMBERS)


@register_model(NAME)
class HarnessModel(TemplateLM):
    """A trained model for tasks of lm-evaluation-harness.

    Args:
      workdir: a run directory or an exported folder.
      checkpoint: checkpoint of a run directory, `best` or `latest`.
      num_steps: number of descent steps; None: as in training.
      batch_size: number of texts per batch; `auto`: 32.

    Raises:
      UserError: the run does not exist, or an argument is out of range or unknown.
    """

    def __init__(
        self,
        workdir: str,
        checkpoint: str = "best",
        num_steps: Any = None,
        batch_size: int | str = AT_ONCE,
        **others: Any,
    ):
        super().__init__()
        for name in sorted(set(others) - set(UNUSED)):
            raise UserError(f"unknown argument {name!r} of --model {NAME}")
        complete = num_steps is None or isinstance(num_steps, int)
        require(complete, "num_steps", num_steps, "a whole number")
        auto = str(batch_size).startswith("auto")
        require(auto or int(batch_size) > 0, "batch_size", batch_size, "at least 1, or auto")
        trained = load_pretrained(str(workdir), checkpoint)
        check_settings(trained.model, Settings(num_steps=num_steps))
        steps = num_steps or trained.model.num_steps
        self.model, self.variables = trained.model.with_num_steps(trained.variables, steps)
        self.text: Tokenizer = trained.tokenizer
        self.batch_size = AT_ONCE if auto else int(batch_size)
        self.max_length = trained.model.context_length

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer in the caches of the harness."""
        return f"{NAME}_{self.text.kind}_{self.text.size}"

    @property
    def eot_token_id(self) -> int:
        """Token before a text without a context: the end token, a line break, or token 0."""
        if self.text.end is not None:
            return self.text.end
        try:
            return int(self.text.encode("\n")[-1])
        except (UserError, IndexError):
            return 0

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Encode a text. Raises UserError naming symbols outside the vocabulary."""
        del add_special_tokens  # the tokenizers have none
        return self.text.encode(string).tolist()

    # Likelihoods ----------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **others: Any
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, is greedy) of each (texts, context, continuation)."""
        del others
        result = self._scored([(context, ending) for _, context, ending in requests])
        for (texts, _, _), scores in zip(requests, result, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, scores)
        return result

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        contexts = [np.asarray(context, np.int32) for context, _ in pairs]
        endings = [np.asarray(ending, np.int32) for _, ending in pairs]
        complete = [[*context, *ending] for context, ending in pairs]
        self._report_lengths(complete, self.max_length + 1)  # the last token is not read
        options: dict[str, Any] = {"num_symbols": self.text.size, "batch_size": self.batch_size}
        result = log_likelihood(self.model, self.variables, contexts, endings, **options)
        return [(score.log_likelihood, score.is_greedy) for score in result]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Return log-likelihoods of whole texts in nats; windows score each token once."""
        del disable_tqdm
        windows = [list(self._windows(request.args[0])) for request in requests]
        scored = iter(self._scored(list(itertools.chain(*windows))))
        return [
            sum(score for score, _ in itertools.islice(scored, len(window))) for window in windows
        ]

    def _windows(self, text: str):
        parts = utils.get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return map(utils.make_disjoint_window, parts)

    # Texts ----------------------------------------------------------------------------------------

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Generate a continuation of each text, up to the first of its `until` strings.

        The text is not truncated to leave space for new tokens; as in `generate`, the oldest tokens
        are dropped when text and continuation exceed the context length.

        Raises:
          UserError: an option of a request is unknown or out of range; raised before generation.
        """
        del disable_tqdm
        options_of = lambda i: json.dumps(requests[i].args[1], sort_keys=True, default=str)
        order = sorted(range(len(requests)), key=options_of)
        alike = [list(numbers) for _, numbers in itertools.groupby(order, options_of)]
        options = [options_of_task(requests[numbers[0]].args[1]) for numbers in alike]
        for one in options:
            check_settings(self.model, Settings(one.sampling))
        prompts = [self._prompt(request.args[0]) for request in requests]
        self._report_lengths(prompts, self.max_length)
        generated: dict[int, str] = {}
        for numbers, one in zip(alike, options, strict=True):
            for start in range(0, len(numbers), self.batch_size):
                part = numbers[start : start + self.batch_size]
                chosen = [prompts[i] for i in part]
                generated |= zip(part, self._continued(chosen, one, seed=part[0]), strict=True)
                for i in part:
                    self.cache_hook.add_partial("generate_until", requests[i].args, generated[i])
        return [generated[i] for i in range(len(requests))]

    def _prompt(self, context: str) -> np.ndarray:
        return self.text.encode(context) if context else np.array([self.prefix_token_id])

    def _continued(self, prompts: list[np.ndarray], options: "Options", seed: int) -> list[str]:
        texts, tokens = [""] * len(prompts), [np.empty(0, np.int32) for _ in prompts]
        pieces = stream(
            self.model,
            self.variables,
            prompts,
            options.max_new_tokens,
            Settings(options.sampling),
            seed=seed,
            end_token=self.text.end,
            num_symbols=self.text.size,
            tokens_at_once=PIECE,
        )
        stops = options.stops
        for piece in pieces:
            tokens = [np.append(a, new.tokens) for a, new in zip(tokens, piece, strict=True)]
            texts = [self.text.decode(a) for a in tokens]
            if stops and all(any(stop in text for stop in stops) for text in texts):
                break
        return [_cut(text, stops) for text in texts]

    def _report_lengths(self, texts: Sequence[Sized], length: int) -> None:
        """Print a warning with the number of texts longer than the context length."""
        count = sum(len(text) > length for text in texts)
        if count:
            what = f"{count} of {len(texts)} texts are longer than the context length"
            print(f"{what} {self.max_length}: their oldest tokens are not read", file=sys.stderr)


class Options(NamedTuple):
    """Generation options of a task."""

    sampling: Sampling
    stops: list[str]  # a continuation ends before the first of these
    max_new_tokens: int


def options_of_task(arguments: dict[str, Any]) -> Options:
    """Parse the options of a request. Raises UserError naming an unknown or invalid option."""
    arguments = {name: value for name, value in arguments.items() if value is not None}
    for name in sorted(set(arguments) - set(OPTIONS)):
        raise UserError(f"--gen_kwargs {name} is not known; there are {', '.join(OPTIONS)}")
    beams = arguments.pop("num_beams", 1)
    require(_number("num_beams", beams) == 1, "num_beams", beams, "1: there is no beam search")
    draws = arguments.get("do_sample", False)
    require(isinstance(draws, bool), "do_sample", draws, "true or false")
    if draws:
        arguments.setdefault("temperature", 1.0)
    numbers = {name: _number(name, arguments[name]) for name in NUMBERS if name in arguments}
    stop_strings = arguments.pop("until", [])
    texts = [stop_strings] if isinstance(stop_strings, str) else stop_strings
    sound = isinstance(texts, list) and all(isinstance(stop, str | None) for stop in texts)
    require(sound, "until", stop_strings, "a text, or a list of texts")
    stops = [stop for stop in texts if stop]
    for name in set(numbers) & set(LIMITS):
        sound = isinstance(numbers[name], int) and numbers[name] > 0
        require(sound, name, arguments[name], "a whole number, at least 1")
    normal = normalize_gen_kwargs({**arguments, **numbers}, MOST_TOKENS)
    temperature = float(normal["temperature"]) if normal["do_sample"] else 0.0
    limits = {n: numbers[n] for n in Sampling._fields if n in numbers and n != "temperature"}
    return Options(Sampling(temperature, **limits), stops, normal["max_gen_toks"])


def _number(name: str, value: Any) -> Any:
    complete = name in LIMITS or name == "top_k"
    try:
        number = float(value)
        return int(number) if complete and number.is_integer() else number
    except (TypeError, ValueError):
        raise UserError(f"{name}={value!r} is not possible: a number is wanted") from None


def _cut(text: str, stops: list[str]) -> str:
    """Return the text before its first stop string."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def main() -> None:
    """Run the command line of `lm_eval`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    cli.call(main)
