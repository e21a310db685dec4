"""What a run shows of its progress: drawn on a terminal, a line for each log step elsewhere."""

import contextlib
import time

from nfnet_flax import output
from nfnet_flax.progress import is_drawn, tracking
from nfnet_flax.units import metric_text
from nfnet_flax.verbosity import stamp


class Progress:
    """Step, loss, accuracy, images/s, remaining time and the last checkpoint of a run."""

    def __init__(self, *, num_steps: int, batch_size: int, start_step: int, is_shown: bool) -> None:
        """Starts the clock; if nothing is to be shown, as in all processes except the first, it only measures time.

        What is drawn is erased by `close`.
        """
        self._num_steps = num_steps
        self._batch_size = batch_size
        self._step = start_step
        self._time = time.perf_counter()
        self._is_shown = is_shown
        self._opened = contextlib.ExitStack()
        self._facts = {"state": "compiling"} if start_step < num_steps else {}
        self._facts |= {"checkpoint": f"checkpoint {start_step}"} if start_step else {}
        if is_shown:
            self._task = self._opened.enter_context(tracking("", num_steps, first_line_s=None, at_once=True))
            self._draw(start_step)

    def close(self) -> None:
        """Erases what is drawn."""
        self._opened.close()

    def restart_clock(self, step: int) -> None:
        """Restarts the clock of the rate, so that the time until now (compilation, evaluation) is not counted."""
        self._step, self._time = step, time.perf_counter()
        self._facts.pop("state", None)
        self._draw(step)

    def images_per_s(self, step: int) -> float:
        """Images per second since the last restart of the clock."""
        return (step - self._step) * self._batch_size / max(time.perf_counter() - self._time, 1e-9)

    def show(self, step: int, loss: float, images_per_s: float) -> None:
        """Shows the numbers of a log step."""
        if not self._is_shown:
            return
        left_s = (self._num_steps - step) * self._batch_size / max(images_per_s, 1e-9)
        minutes, seconds = divmod(round(left_s), 60)
        line = (
            f"{stamp()}step {self._of_all(step)}  loss {loss:7.4f}  "
            f"{images_per_s:8.1f} images/s  {minutes:3d}:{seconds:02d} left"
        )
        if is_drawn() and output.is_terminal():
            output.only_record(line)
        else:
            print(line, flush=True)
        self._facts |= {"loss": f"loss {loss:.4f}", "rate": f"{images_per_s:,.1f} images/s"}
        self._task.expect(left_s)
        self._draw(step)

    def evaluated(self, step: int, metrics: dict[str, float], best_metric: str) -> None:
        """Shows the metrics of an evaluation: top-1, if there is one, and the metric of the best checkpoint."""
        found = [name.removeprefix("eval_ema/") for name in metrics if name.startswith("eval_ema/")]
        best = best_metric.partition("/")[2]
        texts = []
        for name in dict.fromkeys(["top1", best]) if "top1" in found else found:
            (heading, raw), (_, ema) = (
                metric_text(name, metrics[f"{prefix}/{name}"]) for prefix in ("eval", "eval_ema")
            )
            texts.append(f"{heading} {raw} raw, {ema} EMA")
        self.say(f"step {step}: {'; '.join(texts)} on {metrics['eval/num_examples']:.0f} held-out examples")
        self._facts["accuracy"] = f"{texts[0]} at step {step}"

    def saved(self, step: int) -> None:
        """Shows from now on that there is a checkpoint of a step, even if it is still being written."""
        self._facts["checkpoint"] = f"checkpoint {step}"
        self._draw(step)

    def say(self, text: str) -> None:
        """Prints a text on a separate line."""
        if self._is_shown:
            print(f"{stamp()}{text}", flush=True)

    def _of_all(self, step: int) -> str:
        return f"{step:>{len(str(self._num_steps))}}/{self._num_steps}"

    def _draw(self, step: int) -> None:
        if self._is_shown:
            order = ("state", "loss", "accuracy", "rate", "checkpoint")
            self._task.text = f"step {self._of_all(step)}"
            self._task.done = step
            self._task.facts = tuple(self._facts[name] for name in order if name in self._facts)
