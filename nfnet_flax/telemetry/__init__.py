"""What a run does and how long it takes, while it runs and afterwards; no update depends on it."""
