"""Between the command line and the loop: the processes connect, train under a watchdog, and end together."""

import sys
from collections.abc import Callable

from nfnet_flax.exit_codes import EXIT_BUG, EXIT_LOST, EXIT_STORAGE_FAILED
from nfnet_flax.parallel.peers import Peers
from nfnet_flax.parallel.processes import DistributedConfig, current, start
from nfnet_flax.training.storage import silence_abandoned_writes
from nfnet_flax.training.watchdog import Watchdog, WatchdogConfig, watching
from nfnet_flax.verbosity import stamp


def run_together(
    distributed: DistributedConfig,
    watchdog: WatchdogConfig,
    run: Callable[[Watchdog], int],
    explain: Callable[[BaseException], tuple[int, str]],
) -> int:
    """Joins the other processes, calls `run`, and makes sure that all processes end.

    Args:
      distributed: how the processes connect to one another.
      watchdog: how long the run may make no progress.
      run: trains, and returns the exit code.
      explain: returns exit code and message of an error, see `cli.errors.explain`.

    Returns:
      The exit code of `run`, in a run of one process; with several, the process ends here.

    Raises:
      BaseException: an error of `run`, in a run of one process.
    """
    silence_abandoned_writes()
    start(distributed)
    processes = current()
    peers = Peers(processes, heartbeat_timeout_s=distributed.heartbeat_timeout_s)

    def on_stall(message: str) -> None:
        positions = [f"\n  {line}" for line in peers.positions()] if processes.count > 1 else []
        print(f"{stamp()}nfnet: {message}{''.join(positions)}", file=sys.stderr, flush=True)
        peers.fail(EXIT_LOST, message)

    try:
        with watching(watchdog, on_stall) as watch:
            peers.describe = watch.describe
            code = run(watch)
    except BaseException as error:
        if processes.count == 1:
            raise
        code, message = explain(error)
        if code in (EXIT_BUG, EXIT_STORAGE_FAILED):  # saving needs all processes, so a dead one may be the cause
            peers.fail_if_another_is_lost()
        print(f"{stamp()}nfnet: {message}", file=sys.stderr, flush=True)
        peers.fail(code, message)
    if processes.count > 1:
        peers.leave(code)
    return code
