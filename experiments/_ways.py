"""Ways to train for more steps, as configuration changes (docs/results/rest.md)."""

INJECTION = {"model.energies": ("injection",)}
PROJECTED = {**INJECTION, "model.rule": "projected", "model.inference_rate": "psd"}
SPHERE = {**INJECTION, "model.rule": "sphere", "model.inference_rate": "psd"}


def to(times, distribution):
    """Draw depths from T to at most `times` T; the maximum grows throughout training."""
    return lambda config: {
        "depth.distribution": distribution,
        "depth.min_steps": config.model.num_steps,
        "depth.max_steps": times * config.model.num_steps,
        "depth.curriculum_steps": config.train_steps,
        "depth.backprop_steps": 8,
    }


def held(descents):
    return lambda config: {"depth.refine_passes": descents}


def settle(config):
    """Train the model of `sphere_decay_held` further, until held descents no longer change it."""
    further = {"depth.max_burn_in_passes": 4, "depth.consistency": 2.0}
    return {**on_from(config, "sphere_decay_held", 1.5e-3, 7.5e-5), **further}


def decode(config):
    """Train the model of `sphere_decay_settled` further, on the loss of decoded tokens."""
    steps = 4 * config.train_steps // 5
    return {**on_from(config, "sphere_decay_settled", 1e-3, 5e-5), **decoded(steps)}


def decode_on(config):
    """Train the model of `sphere_decay_decoded` further, in the same way."""
    steps = config.train_steps // 5
    return {**on_from(config, "sphere_decay_decoded", 5e-4, 2.5e-5), **decoded(steps)}


def decoded(steps):
    """Return the settings of both; `scan_unroll` 1 is faster on a CPU, and compiles faster."""
    return {"depth.train_on_decoded": True, "train_steps": steps, "model.scan_unroll": 1}


def on_from(config, way, learning_rate, final_learning_rate):
    """Initialize from the model of another way (same task and seed), with a new optimizer."""
    return {
        "init_from": f"{{workdir}}/../../{config.data.name}_{way}/{{seed}}",
        "optimizer.learning_rate": learning_rate,
        "optimizer.final_learning_rate": final_learning_rate,
        "optimizer.warmup_steps": 50,
    }


def penalty(config):
    return {"depth.penalty": 1.0}


def decay(config):
    """Take T steps at the full rate, and T more, each at half the rate of the previous one."""
    steps = config.model.num_steps
    return {
        "model.num_steps": 2 * steps,
        "model.full_steps": steps,
        "model.inference_rate_decay": 0.5,
    }


def come_to_rest(config):
    """Apply the way `sphere_decay`, with the strict mask."""
    config.model.mask = "strict"
    apply_way(config, WAYS["sphere_decay"])


def apply_way(config, way):
    """Apply the changes of a way, in order."""
    for changes in way:
        config.update_from_flattened_dict(changes(config) if callable(changes) else changes)


def long(config):
    return {"train_steps": 2 * config.train_steps}


def short(config):
    return {"train_steps": 3 * config.train_steps // 10}


NEAR = to(4, "uniform")
FAR = to(20, "log_uniform")
WAYS = {
    "full": (),
    "full_long": (long,),
    "full_decay": (decay,),
    "full_held": (held(2),),
    "sphere": (SPHERE,),
    "sphere_decay": (SPHERE, decay),
    "sphere_decay_held": (SPHERE, decay, held(1)),
    "sphere_decay_settled": (SPHERE, decay, held(1), settle),
    "sphere_decay_settled_short": (SPHERE, decay, held(1), settle, short),
    "sphere_decay_decoded": (SPHERE, decay, decode),
    "sphere_decay_decoded_on": (SPHERE, decay, decode_on),
    "sphere_decay_held_2": (SPHERE, decay, held(2)),
    "injection_near_long": (INJECTION, long, NEAR),
    "injection_far_long": (INJECTION, long, FAR),
    "projected_near_long": (PROJECTED, long, NEAR),
    "sphere_near_long": (SPHERE, long, NEAR),
    "sphere_far_long": (SPHERE, long, FAR),
    "sphere_far_penalty_long": (SPHERE, long, FAR, penalty),
}
