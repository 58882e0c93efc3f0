"""Ways to train for more steps: changes to a configuration (docs/results/rest.md)."""

INJECTION = {"model.energies": ("injection",)}
PROJECTED = {**INJECTION, "model.rule": "projected", "model.inference_rate": "psd"}
SPHERE = {**INJECTION, "model.rule": "sphere", "model.inference_rate": "psd"}


def to(times, distribution):
    """Depths from T to `times` T, a maximum that grows until the end."""
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
    """On from the model of `sphere_decay_held`, until further held descents change nothing."""
    further = {"depth.max_burn_in_passes": 4, "depth.consistency": 2.0}
    return {**on_from(config, "sphere_decay_held", 1.5e-3, 7.5e-5), **further}


def decode(config):
    """On from the model of `sphere_decay_settled`, with the loss of tokens that are decoded."""
    steps = 4 * config.train_steps // 5
    return {**on_from(config, "sphere_decay_settled", 1e-3, 5e-5), **decoded(steps)}


def decode_on(config):
    """On from the model of `sphere_decay_decoded`, in the same way."""
    steps = config.train_steps // 5
    return {**on_from(config, "sphere_decay_decoded", 5e-4, 2.5e-5), **decoded(steps)}


def decoded(steps):
    """The settings of both: `scan_unroll` 1 is faster on a CPU, and takes less time to compile."""
    return {"depth.train_on_decoded": True, "train_steps": steps, "model.scan_unroll": 1}


def on_from(config, way, learning_rate, final_learning_rate):
    """With the model of another way of the same task and seed, and a new optimizer."""
    return {
        "init_from": f"{{workdir}}/../../{config.data.name}_{way}/{{seed}}",
        "optimizer.learning_rate": learning_rate,
        "optimizer.final_learning_rate": final_learning_rate,
        "optimizer.warmup_steps": 50,
    }


def penalty(config):
    return {"depth.penalty": 1.0}


def decay(config):
    """T steps as before, and as many whose rate halves each time."""
    steps = config.model.num_steps
    return {
        "model.num_steps": 2 * steps,
        "model.full_steps": steps,
        "model.inference_rate_decay": 0.5,
    }


def come_to_rest(config):
    """The way `sphere_decay`."""
    config.model.mask = "strict"
    apply_way(config, WAYS["sphere_decay"])


def apply_way(config, way):
    """Makes the changes of a way, in order."""
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
