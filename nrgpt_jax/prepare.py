"""Prepares the data of an experiment, and trains nothing.

    python -m nrgpt_jax.prepare --config=experiments/NAME.py [--config.field=value ...]
        [--workers=N | --beam_options="--runner=..."]

Interrupted or killed, the same command resumes where it was.
"""

from absl import flags
from ml_collections import ConfigDict

from nrgpt_jax import cli
from nrgpt_jax.datasets import load_dataset
from nrgpt_jax.datasets.corpora import CORPORA, prepare_corpus
from nrgpt_jax.datasets.preparation import LOCAL, Engine
from nrgpt_jax.training.config_checks import check_config


def prepare(config: ConfigDict, engine: Engine = LOCAL) -> None:
    """Downloads or generates the data set once, and prints what it holds."""
    check_config(config, num_devices=1)
    if config.data.name in CORPORA:
        print(f"prepared in {prepare_corpus(config.data, engine)}")
    dataset = load_dataset(config.data)
    print(f"{config.data.name}: {len(dataset.train):,} training tokens")
    print(f"{len(dataset.validation):,} validation tokens")
    print(f"{dataset.tokenizer.size:,} symbols ({dataset.tokenizer.kind} tokenizer)")
    for name, prompts in dataset.prompts.items():
        print(f"{len(prompts.prompts):,} prompts {name}")


if __name__ == "__main__":
    _config = cli.define_config_flag()
    flags.mark_flag_as_required("config")
    _workers = flags.DEFINE_integer(
        "workers", 0, "Processes that prepare a corpus; 0: one a core.", lower_bound=0
    )
    _beam_options = flags.DEFINE_string(
        "beam_options", None, "Prepare on Apache Beam, with these options of its pipeline."
    )
    cli.run(lambda: prepare(_config.value, Engine(_workers.value, _beam_options.value)))
