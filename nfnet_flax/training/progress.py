"""The progress line on the terminal."""

import sys
import time


class Progress:
    """Step, loss, images/s and remaining time; one line that is rewritten on a terminal, one per log step elsewhere."""

    def __init__(self, *, num_steps: int, batch_size: int, start_step: int, is_shown: bool) -> None:
        """Starts the clock; if nothing is to be shown, as in all processes except the first, it only measures time."""
        self._num_steps = num_steps
        self._batch_size = batch_size
        self._step = start_step
        self._time = time.perf_counter()
        self._live = sys.stdout.isatty()
        self._is_shown = is_shown

    def restart_clock(self, step: int) -> None:
        """Restarts the clock of the rate, so that the time until now (compilation, evaluation) is not counted."""
        self._step, self._time = step, time.perf_counter()

    def images_per_s(self, step: int) -> float:
        """Images per second since the last restart of the clock."""
        return (step - self._step) * self._batch_size / max(time.perf_counter() - self._time, 1e-9)

    def show(self, step: int, loss: float, images_per_s: float) -> None:
        """Prints the progress line of a step."""
        left = (self._num_steps - step) * self._batch_size / max(images_per_s, 1e-9)
        minutes, seconds = divmod(round(left), 60)
        text = (
            f"step {step:>{len(str(self._num_steps))}}/{self._num_steps}  loss {loss:7.4f}  "
            f"{images_per_s:8.1f} images/s  {minutes:3d}:{seconds:02d} left"
        )
        if self._is_shown:
            print(f"\r\033[K{text}" if self._live else text, end="" if self._live else "\n", flush=True)

    def say(self, text: str) -> None:
        """Prints a text on a separate line."""
        if self._is_shown:
            print(f"\r\033[K{text}" if self._live else text, flush=True)
