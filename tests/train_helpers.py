"""A small run for the tests of training."""

import json
import os
import signal

import jax
import numpy as np

from nrgpt_jax.configs import default_config
from nrgpt_jax.models import create_model
from nrgpt_jax.runs.pretrained import Pretrained, save_pretrained
from nrgpt_jax.training import loop
from nrgpt_jax.training.step_log import StepLog

TEXT = "the tokens roll down the hill, and the hill rolls down the tokens. " * 40


def config_of(corpus):
    """Of 12 steps, evaluated twice and saved three times."""
    c = default_config()
    c.update({"train_steps": 12, "log_every": 3, "eval_every": 6, "eval_windows": 4})
    c.update({"checkpoint_every": 4})
    c.model.update({"context_length": 16, "embed_dim": 16, "num_steps": 2, "dropout": 0.1})
    c.data.update({"name": "text", "path": str(corpus), "batch_size": 8})
    c.optimizer.update({"learning_rate": 1e-2, "warmup_steps": 2})
    return c


def config_in(folder):
    """The same, with the corpus in a folder."""
    corpus = folder / "text.txt"
    corpus.write_text(TEXT)
    return config_of(corpus)


def save_untrained(config, folder, seed):
    """The model of a configuration with the parameters of a seed, as an exported folder."""
    own = config.copy_and_resolve_references()
    tokenizer = loop.resolve(own).tokenizer
    model = create_model(own)
    tokens = np.zeros((1, model.context_length), np.int32)
    params = model.init(jax.random.key(seed), tokens)["params"]
    save_pretrained(folder, Pretrained(model, {"params": params}, tokenizer, own))
    return params


def values(workdir):
    """metrics.jsonl without what a clock decides."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    clock = ("tokens_per_second", "mfu", "input_wait")
    return [{k: v for k, v in r.items() if k not in clock} for r in records]


def stop_at(monkeypatch, step, number=signal.SIGINT):
    """Sends a signal, as Ctrl-C does, to this process when a step's metrics are taken."""
    after = StepLog.after

    def after_and_stop(log, at, metrics):
        after(log, at, metrics)
        if at == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(StepLog, "after", after_and_stop)
