"""How the `nfnet` command ends. With several processes all end with the code of the one that ended first."""

EXIT_DONE = 0
"""The run reached its last step."""
EXIT_BUG = 1
"""An error that nothing was prepared for; its traceback says where."""
EXIT_WRONG = 1
"""`nfnet doctor` found something wrong."""
EXIT_BAD_INPUT = 2
"""A recipe, an option or a folder is wrong; the message says what to change."""
EXIT_DIVERGED = 3
"""The loss is not finite; repeating the run would end alike."""
EXIT_INPUT_FAILED = 4
"""A worker process of the input died or is stuck, or a file cannot be read; the last checkpoint stands."""
EXIT_LOST = 5
"""A process did not come, died or is frozen, nothing moved in time, or another process took the folder over; the last
checkpoint stands: run again.

Where process 0 dies, JAX may abort the others first, with SIGABRT (134 to a shell) and its own message.
"""
EXIT_STORAGE_FAILED = 6
"""A file of the run's folder cannot be written or read (disk full, no permission); earlier checkpoints are good."""
EXIT_COPIES_DIFFER = 7
"""Devices or processes hold different copies of the state; nothing of that step was saved. Run on hosts of one kind."""
EXIT_STOPPED = 75
"""Told to stop by a signal: the state is saved; run the same command again to continue (sysexits.h: EX_TEMPFAIL)."""
