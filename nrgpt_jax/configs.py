"""All configuration fields with their defaults, declared in this module only.

An experiment file starts from `default_config()`, changes fields and returns the result;
`--config.field=value` changes fields from the command line. Fields are locked: an undeclared name
is an error. `training.config_checks` checks the values before anything runs.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from nrgpt_jax.errors import UserError

OPTIONS = ("model.options", "data.options", "optimizer.options", "optimizer.schedule_options")
"""Groups whose fields may have any name."""


def _model() -> ConfigDict:
    c = ConfigDict()
    c.name = "NRGPT_H_FF2W"  # NRGPT_H_<feed-forward energy>, NRGPT, GPT, GPT_Rec, GPT_Rec_parallel
    c.vocab_size = 0  # 0: the size of the tokenizer's vocabulary
    c.context_length = 128  # N: rows of the position table, and the training window
    c.embed_dim = 64  # D
    c.num_heads = 1  # H
    c.num_steps = 5  # T: recurrent steps (layers in GPT)
    c.mlp_ratio = 4.0  # M / D, M rounded
    c.dropout = 0.0  # of attention weights and outputs, and of the MLP of baselines, as released
    c.tied_head = False  # logits from the transposed token embedding, without bias
    c.dtype = "float32"  # dtype of the computation (or bfloat16); parameters stay float32
    c.scan_unroll = 1  # steps compiled as one: faster on CPUs, longer to compile
    c.remat = "none"  # recomputed for the gradient: none, step (all but states), full (most)
    c.num_distinct_layers = 0  # blocks that the steps cycle through; 0: num_steps in GPT, else one
    # The other fields are for NRGPT models only (equations: docs/model.md).
    c.attention = "full_rank"  # or low_rank: J = W_K^T W_Q; full_rank_rope, low_rank_rope
    c.energies = ()  # terms added to those of the model name (NRGPT: all): injection, leak, ...
    c.combination = "sum"  # combination of the energies of a token: sum, mixture
    c.head_dim = 0  # Y, for low_rank; 0: embed_dim / num_heads
    c.mask = "inclusive"  # context of token A: strict (B < A) or inclusive (B <= A)
    c.beta = 1.0  # inverse temperature of the attention energy (its initial value if learned)
    c.learn_beta = False
    c.learn_alpha = False  # one weight per head, initially 1
    c.norm = "bare_layer_norm"  # or layer_norm, rms_norm, none
    c.inference_rate = "full"  # inference rate: full, gamma, psd, diagonal, scalar, identity
    c.rule = "descent"  # update rule: descent, momentum, projected, sphere
    c.line_search = 0  # most halvings of a step that raises a token's energy, then dropped; 0: off
    c.inference_rate_init = 1.0  # initial scale of the rates gamma, psd, diagonal and scalar
    c.inference_rate_decay = 1.0  # factor of the rate in every step after the first full_steps
    c.full_steps = 0
    c.per_step_scale = False  # a learned positive factor c_t for every step
    c.options = ConfigDict()  # options of energies, rules, combinations (docs/library.md)
    c.implementation = "fused"  # derivatives: fused, blocked or autodiff (see ops/__init__.py)
    return c


def _data() -> ConfigDict:
    c = ConfigDict()
    c.name = "listops"  # listops, shakespeare, text, openwebtext, wikitext, c4, tfds:NAME
    c.path = ""  # a file or folder, local or gs://, s3://, hf://, https:// (docs/data.md)
    c.field = "text"  # field with the text of a document, in JSON lines and Parquet
    c.fingerprint = ""  # identifies the training data; set when a run starts
    c.tokenizer = "char"  # tokenizer of text: char, byte, gpt2 (byte pairs), hf:NAME_OR_FILE
    c.validation_fraction = 0.1  # last part of a text or stream; share of documents
    c.train_fraction = 1.0  # first part of the training split that is used for training
    c.options = ConfigDict()  # options of a registered data set
    c.batch_size = 64  # windows per step, over all devices
    c.listops = _listops()
    return c


def _listops() -> ConfigDict:
    c = ConfigDict()
    c.operations = ("max", "median", "add")  # from min, max, median, add, prod, nadd
    c.modulus = 10  # digits are 0 .. modulus-1, results are modulo this
    c.depth = 2  # depth of nested operations
    c.min_arguments = 2
    c.max_arguments = 3
    c.function_probability = 0.25  # probability that an argument is itself an operation
    c.exclusion_rate = 0.05  # share of the modulus^max_arguments tuples held out of training
    c.num_train = 50_000  # expressions in the stream
    c.num_test = 2_000  # held-out prompts; also the single-operation prompts per operation
    c.seed = 42
    c.learn_questions = True  # whether to predict also the (random) questions, not only solutions
    return c


def _optimizer() -> ConfigDict:
    c = ConfigDict()
    c.name = "adamw"  # or muon: orthogonalized for matrices, AdamW for the rest; or an optax name
    c.learning_rate = 1e-3
    c.final_learning_rate = 1e-4
    c.schedule = "cosine"  # after warm-up: cosine, exponential, constant; or an optax schedule
    c.warmup_steps = 100
    c.beta1 = 0.9
    c.beta2 = 0.99
    c.weight_decay = 0.1
    c.weight_decay_mask = "matrices"  # or all, as released; with muon: the matrices it updates
    c.options = ConfigDict()  # further arguments of an optax optimizer
    c.schedule_options = ConfigDict()  # further arguments of an optax schedule
    c.clip_norm = 1.0  # largest norm of the global gradient; 0: no clipping
    c.accumulation_steps = 1  # number of parts of a batch, for gradient accumulation
    return c


def _depth() -> ConfigDict:
    """Recurrent steps in training; otherwise `model.num_steps` is used (docs/results/rest.md)."""
    c = ConfigDict()
    c.distribution = "fixed"  # fixed: model.num_steps; uniform, log_uniform: a random number
    c.min_steps = 0  # 0: one
    c.max_steps = 0  # 0: twice model.num_steps
    c.sample_per = "batch"  # one number per batch, or per sequence
    c.curriculum_steps = 0  # training steps over which the maximum grows from min_steps
    c.backprop_steps = 0  # number of last steps that have a gradient; 0: all
    c.loss_steps = 1  # number of last steps over whose states the loss is averaged
    c.refine_passes = 0  # further passes, each attending to the final states of the previous pass
    c.max_burn_in_passes = 0  # n: prepend k ~ U{0..n} such passes without a gradient
    c.train_on_decoded = False  # train also on suffixes decoded with a fixed-point cache
    c.consistency = 0.0  # times ||v - u||^2 / ||u||^2; u, v: normed states of consecutive passes
    c.penalty = 0.0  # times max(0, ||J v|| / ||v|| - penalty_bound)^2; J: Jacobian of one more step
    c.penalty_bound = 0.9
    return c


def _mesh() -> ConfigDict:
    c = ConfigDict()
    c.data = -1  # shards of a batch, parameters replicated; -1 for one axis: the remaining devices
    c.fsdp = 1  # shards of a batch, each on devices that hold a shard of every parameter
    c.tensor = 1  # shards of heads, hidden widths and the vocabulary
    return c


def default_config() -> ConfigDict:
    """Return the locked configuration with all fields at their defaults."""
    c = ConfigDict()
    c.experiment = "default"  # recorded name
    c.seed = 0
    c.plugins = ()  # modules that register energies, rules, data sets, ...: imported at start
    c.init_from = ""  # run or folder of the initial parameters; may contain {seed} and {workdir}
    c.train_steps = 1000
    c.log_every = 20  # steps between lines of metrics.jsonl
    c.eval_every = 250  # steps between evaluations on the fixed validation windows
    c.eval_windows = 256  # number of these windows
    c.eval_prompts = 200  # prompts answered in an evaluation, if the data set has prompts
    c.checkpoint_every = 500
    c.checkpoint_keep = 2  # number of latest checkpoints, at least 2, besides the best one
    c.checkpoint_keep_every = 0  # checkpoints of multiples of this step are permanent; 0: none
    c.max_skipped_steps = 10  # nonfinite updates are skipped; this many in a row end the training
    c.spike_factor = 0.0  # a loss above this times its mean reverts to a checkpoint; 0: never
    c.step_metrics = ()  # logged per recurrent step: energy, energy_change, attention_entropy
    c.evaluators = ()  # further metrics of an evaluation, registered by @evaluator
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
    """Set fields by dotted name, including options of any name.

    Raises:
      UserError: a field does not exist, or has another type.
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
    """Return the configuration changed by a variant of an experiment; "" is the default."""
    if variant not in variants:
        known = ", ".join(repr(name) for name in variants if name)
        raise UserError(f"there is no variant {variant!r} of {config.experiment}; it has {known}")
    variants[variant](config)
    return config


def with_seeds(configs: Mapping[str, ConfigDict], seeds: int) -> dict[str, ConfigDict]:
    """Return every configuration with seeds 0, 1, ..., named `NAME/SEED`, ordered by seed."""
    result: dict[str, ConfigDict] = {}
    for seed in range(seeds):
        for name, config in configs.items():
            version = config.copy_and_resolve_references()
            version.seed = seed
            result[f"{name}/{seed}"] = version
    return result


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of all fields by dotted name, such as `model.embed_dim`."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        inner = isinstance(value, (Mapping, ConfigDict))
        values |= flattened(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return values


def field_names(config: Mapping[str, Any]) -> list[str]:
    """Return the dotted names of all fields, such as `model.embed_dim`."""
    return list(flattened(config))
