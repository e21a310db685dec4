"""The training run: state, step, loop, evaluation, checkpoints, metrics."""
