"""Tasks: lm-eval, its result files, and the tasks that headwise generates."""
