"""A training run around the accumulator: build, resume, update, evaluate."""
