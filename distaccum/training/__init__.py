"""A training run around the accumulator.

`run.train` finds the run folder and the checkpoint, `build.build_trainer` puts the parts together, `Trainer` runs them.
The way of a window: `RunProgress.windows` takes it from the loader, which has loaded it as `planning.CutSchedule` cuts
it; `Updater.update` applies the learning-rate schedule and hands the window to `Accumulator.run`; then averages,
observers and `CutTuning` get the result. The module `supervision` says what happens on SIGTERM.
"""
