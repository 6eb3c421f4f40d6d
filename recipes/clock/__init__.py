"""Clock arithmetic with written steps: a task, a small model and its data, for examples and tests on a CPU."""
