"""Your own UTF-8 text by characters (or by bytes: --config.data.tokenizer=byte).

make train EXP=text ARGS="--config.data.path=book.txt"
"""

from nrgpt_jax.configs import default_config


def get_config():
    config = default_config()
    config.experiment = "text"
    config.train_steps = 2000
    config.eval_every = 250
    config.data.name = "text"
    config.data.batch_size = 16
    config.optimizer.accumulation_steps = 4
    config.model.context_length = 128
    config.model.embed_dim = 128
    config.model.attention = "low_rank_rope"
    config.model.num_heads = 4
    config.model.num_steps = 6
    config.model.scan_unroll = 6
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.final_learning_rate = 1e-4
    return config
