"""Every setting there is, with its default: the one place a field is declared.

An experiment file starts from `default_config()`, changes what it needs and returns the result;
`--config.field=value` changes more from the command line. Fields are locked: a name that is not
here is an error. `training.config_checks` checks the values before anything runs.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from nrgpt_jax.errors import UserError

OPTIONS = ("model.options", "data.options", "optimizer.options", "optimizer.schedule_options")
"""Groups of fields of any names."""


def _model() -> ConfigDict:
    c = ConfigDict()
    c.name = "NRGPT_H_FF2W"  # NRGPT_H_<feed-forward energy>, NRGPT, GPT, GPT_Rec, GPT_Rec_parallel
    c.vocab_size = 0  # 0: the size of the tokenizer's vocabulary
    c.context_length = 128  # N: rows of the position table, and the training window
    c.embed_dim = 64  # D
    c.num_heads = 1  # H
    c.num_steps = 5  # T: recurrent steps (layers in GPT)
    c.mlp_ratio = 4.0  # M / D, M rounded
    c.dropout = 0.0  # of attention weights, attention outputs and (baselines) the MLP, as released
    c.tied_head = False  # logits from the transposed token embedding, without bias
    c.dtype = "float32"  # of the computation (float32 or bfloat16); parameters stay float32
    c.scan_unroll = 1  # steps compiled as one: faster on CPUs, longer to compile
    c.remat = "none"  # computed again for the gradient: none, step (all but states), full (most)
    c.num_distinct_layers = 0  # used in turn by the steps; 0: num_steps in GPT, else one
    # What follows is read by NRGPT models only (docs/model.md has the equations).
    c.attention = "full_rank"  # or low_rank: J = W_K^T W_Q; full_rank_rope, low_rank_rope
    c.energies = ()  # terms besides those of the name (of NRGPT: all): injection, leak, ...
    c.combination = "sum"  # of the energies of a token: sum, mixture
    c.head_dim = 0  # Y, for low_rank; 0: embed_dim / num_heads
    c.mask = "inclusive"  # context of token A: strict (B < A) or inclusive (B <= A)
    c.beta = 1.0  # inverse temperature of the attention energy (its initial value if learned)
    c.learn_beta = False
    c.learn_alpha = False  # one weight a head, initially 1
    c.norm = "bare_layer_norm"  # or layer_norm, rms_norm, none
    c.inference_rate = "full"  # inference rate: full, gamma, psd, diagonal, scalar, identity
    c.rule = "descent"  # how a gradient becomes a move: descent, momentum, projected, sphere
    c.line_search = (
        0  # a step that raises a token's energy is halved so often, then left out; 0: off
    )
    c.inference_rate_init = 1.0  # initial size of the rates gamma, psd, diagonal and scalar
    c.inference_rate_decay = 1.0  # the rate is multiplied by it in every step after the full_steps
    c.full_steps = 0
    c.per_step_scale = False  # a learned positive factor c_t for every step
    c.options = ConfigDict()  # of energies, rules, combinations (docs/library.md)
    c.implementation = "fused"  # of derivatives: fused, blocked or autodiff (see ops/__init__.py)
    return c


def _data() -> ConfigDict:
    c = ConfigDict()
    c.name = "listops"  # listops, shakespeare, text, openwebtext, wikitext, c4, tfds:NAME
    c.path = ""  # a file or folder, local or gs://, s3://, hf://, https:// (docs/data.md)
    c.field = "text"  # the text of a document in JSON lines and Parquet
    c.fingerprint = ""  # set when a run starts: names the content it is trained on
    c.tokenizer = "char"  # of text: char, byte, gpt2 (byte pairs), hf:NAME_OR_FILE
    c.validation_fraction = 0.1  # last part of a text or stream; share of documents
    c.train_fraction = 1.0  # of the training split, its first part: what is learned from
    c.options = ConfigDict()  # of a data set of one's own
    c.batch_size = 64  # windows a step, over all devices
    c.listops = _listops()
    return c


def _listops() -> ConfigDict:
    c = ConfigDict()
    c.operations = ("max", "median", "add")  # of min, max, median, add, prod, nadd
    c.modulus = 10  # digits are 0 .. modulus-1, results are taken modulo it
    c.depth = 2  # of nested operations
    c.min_arguments = 2
    c.max_arguments = 3
    c.function_probability = 0.25  # that an argument is itself an operation
    c.exclusion_rate = 0.05  # share of modulus^max_arguments tuples kept from training
    c.num_train = 50_000  # expressions in the stream
    c.num_test = 2_000  # held-out prompts, and as many single-operation prompts an operation
    c.seed = 42
    c.learn_questions = True  # also predict the (random) questions, or the solutions only
    return c


def _optimizer() -> ConfigDict:
    c = ConfigDict()
    c.name = "adamw"  # or muon: orthogonalized updates of matrices, AdamW for the rest; or of optax
    c.learning_rate = 1e-3
    c.final_learning_rate = 1e-4
    c.schedule = "cosine"  # after warm-up: cosine, exponential, constant; or one of optax
    c.warmup_steps = 100
    c.beta1 = 0.9
    c.beta2 = 0.99
    c.weight_decay = 0.1
    c.weight_decay_mask = (
        "matrices"  # what it acts on: matrices (of muon: those it moves), or all (as released)
    )
    c.options = ConfigDict()  # further arguments of an optimizer of optax
    c.schedule_options = ConfigDict()  # the same of a schedule of optax
    c.clip_norm = 1.0  # of the global gradient; 0: no clipping
    c.accumulation_steps = 1  # a batch is worked through in this many parts
    return c


def _depth() -> ConfigDict:
    """Recurrent steps in training; elsewhere `model.num_steps` (docs/results/rest.md)."""
    c = ConfigDict()
    c.distribution = "fixed"  # fixed: model.num_steps; uniform, log_uniform: a random number
    c.min_steps = 0  # 0: one
    c.max_steps = 0  # 0: twice model.num_steps
    c.sample_per = "batch"  # one number for the whole batch, or one per sequence
    c.curriculum_steps = 0  # training steps over which the maximum grows from min_steps
    c.backprop_steps = 0  # the gradient is truncated to this many last steps; 0: all
    c.loss_steps = 1  # the loss is the mean over the states after this many last steps
    c.refine_passes = 0  # further passes, each attending to the final states of the one before
    c.max_burn_in_passes = 0  # prepend k ~ U{0..n} of these passes without a gradient
    c.train_on_decoded = False  # also on suffixes decoded with a fixed-point cache
    c.consistency = 0.0  # times ||v - u||^2 / ||u||^2; v one pass after u, behind the norm
    c.penalty = 0.0  # times (||J v|| / ||v|| - penalty_bound)^2 where positive; J of one more step
    c.penalty_bound = 0.9
    return c


def _mesh() -> ConfigDict:
    c = ConfigDict()
    c.data = -1  # parts of a batch, on copies of the parameters; -1 in one of the three: the rest
    c.fsdp = 1  # parts of a batch, each on devices that keep a part of every parameter
    c.tensor = 1  # parts of heads, hidden widths and the vocabulary
    return c


def default_config() -> ConfigDict:
    """All fields with their defaults, locked."""
    c = ConfigDict()
    c.experiment = "default"  # for the records
    c.seed = 0
    c.plugins = ()  # modules that register energies, rules, data sets, ...: imported at start
    c.init_from = ""  # a run or folder to take the first parameters of; {seed} and {workdir} in it
    c.train_steps = 1000
    c.log_every = 20  # steps between lines of metrics.jsonl
    c.eval_every = 250  # steps between evaluations on the fixed validation windows
    c.eval_windows = 256  # how many validation windows those are
    c.eval_prompts = 200  # how many prompts are answered then, where the data set has prompts
    c.checkpoint_every = 500
    c.checkpoint_keep = 2  # the last ones, at least 2; the best one is kept besides
    c.checkpoint_keep_every = 0  # those of steps that this divides are kept for good; 0: none
    c.max_skipped_steps = 10  # updates that are not finite are left out; N in a row: the end
    c.spike_factor = 0.0  # a loss above this times its mean: back to the last checkpoint; 0: never
    c.step_metrics = ()  # logged of each recurrent step: energy, energy_change, attention_entropy
    c.evaluators = ()  # further measures of an evaluation, registered by @evaluator
    c.wandb = False  # also log to Weights & Biases (pip install wandb)
    c.model = _model()
    c.data = _data()
    c.optimizer = _optimizer()
    c.depth = _depth()
    c.mesh = _mesh()
    c.lock()
    for group in OPTIONS:
        part, _, name = group.partition(".")
        c[part][name].unlock()
    return c


def set_fields(config: ConfigDict, values: Mapping[str, Any]) -> None:
    """Sets fields by their dotted names, options of any names among them.

    Raises:
      UserError: there is no such field, or it is of another type.
    """
    for name, value in values.items():
        group, _, field = name.rpartition(".")
        part = functools.reduce(getattr, filter(None, group.split(".")), config)
        try:
            if group in OPTIONS:
                with part.unlocked(), part.ignore_type():
                    part[field] = value
            else:
                part[field] = value
        except (AttributeError, KeyError, TypeError) as error:
            reason = " ".join(str(error.args[0] if error.args else error).split())[:200]
            raise UserError(f"{name}={value!r} is not possible: {reason}") from None


def apply_variant(
    config: ConfigDict, variant: str, variants: Mapping[str, Callable[[ConfigDict], None]]
) -> ConfigDict:
    """The configuration changed by one of an experiment's variants; "" is its default."""
    if variant not in variants:
        known = ", ".join(repr(name) for name in variants if name)
        raise UserError(f"there is no variant {variant!r} of {config.experiment}; it has {known}")
    variants[variant](config)
    return config


def with_seeds(configs: Mapping[str, ConfigDict], seeds: int) -> dict[str, ConfigDict]:
    """Each configuration with the seeds 0, 1, ...: `NAME/0` and so on, seed by seed."""
    result: dict[str, ConfigDict] = {}
    for seed in range(seeds):
        for name, config in configs.items():
            version = config.copy_and_resolve_references()
            version.seed = seed
            result[f"{name}/{seed}"] = version
    return result


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of all fields by their dotted names, `model.embed_dim` and so on."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        inner = isinstance(value, (Mapping, ConfigDict))
        values |= flattened(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return values


def field_names(config: Mapping[str, Any]) -> list[str]:
    """All fields, `model.embed_dim` and so on."""
    return list(flattened(config))
