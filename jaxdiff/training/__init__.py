"""Training: the state, the step, checkpoints and metrics. The loop itself is train.py, readable top to bottom."""

from jaxdiff.training.state import TrainState, ema_distance, init_state, jit_init, make_optimizer, make_step

__all__ = ["TrainState", "ema_distance", "init_state", "jit_init", "make_optimizer", "make_step"]
