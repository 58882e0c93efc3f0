"""Prepare the data of an experiment, without training.

    python -m nrgpt_jax.prepare --config=experiments/NAME.py [--config.field=value ...]
        [--workers=N]

The same command resumes an interrupted or killed preparation.
"""

from absl import flags
from ml_collections import ConfigDict

from nrgpt_jax import cli
from nrgpt_jax.datasets import load_dataset
from nrgpt_jax.datasets.corpora import CORPORA, prepare_corpus
from nrgpt_jax.training.config_checks import check_config


def prepare(config: ConfigDict, workers: int = 0) -> None:
    """Download or generate the data set once, and print its sizes.

    Args:
      config: configuration of the experiment.
      workers: number of processes that prepare a corpus; 0: one per core.
    """
    check_config(config, num_devices=1)
    if config.data.name in CORPORA:
        print(f"prepared in {prepare_corpus(config.data, workers)}")
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
    cli.run(lambda: prepare(_config.value, _workers.value))
