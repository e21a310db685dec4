"""Exit codes of the `nfnet` command. With several processes, all end with the code of the one that ended first."""

EXIT_DONE = 0
"""The run reached its last step."""
EXIT_BUG = 1
"""An unexpected error, that is, a bug; the message says where its traceback is."""
EXIT_WRONG = 1
"""`nfnet doctor` found something wrong, `nfnet plan --compare` found different arithmetic, `nfnet predict` met an image
that cannot be read or decoded, or `nfnet claim` has no result for a weight file, or for any network."""
EXIT_BAD_INPUT = 2
"""A recipe, an option or a folder is wrong; the message says what to change."""
EXIT_DIVERGED = 3
"""The loss is not finite; repeating the run would end in the same way."""
EXIT_INPUT_FAILED = 4
"""A worker process of the input died or is stuck, or a file cannot be read; the last checkpoint is still good."""
EXIT_LOST = 5
"""A process did not start, died or is frozen, the run made no progress in time, or another process took over the
folder; the last checkpoint is still good: run again.

If process 0 dies, JAX may abort the others first, with SIGABRT (exit code 134 in a shell) and its own message.
"""
EXIT_STORAGE_FAILED = 6
"""A file of the run's folder cannot be written or read (disk full, no permission); earlier checkpoints are good."""
EXIT_COPIES_DIFFER = 7
"""Devices or processes hold different copies of the state; nothing of that step was saved. Run on hosts of one kind."""
EXIT_STOPPED = 75
"""A signal stopped the run and the state is saved; run the same command again to continue (sysexits.h: EX_TEMPFAIL)."""
