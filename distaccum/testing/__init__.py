"""Proves a training step of anybody's own: that its update does not depend on how the window of samples is cut.

Needs torch, and nothing else of distaccum:

    from distaccum.testing import assert_same_trainer, assert_same_update

    def test_my_step():
        assert_same_update(build, samples, step)

    def test_my_trainer():
        assert_same_trainer(make_trainer)

Under torchrun, or wherever a process group has been joined, the window is cut over the ranks too.
"""

from distaccum.testing.same_update import Loop, UpdateDiffersError, assert_same_update
from distaccum.testing.trainers import assert_same_trainer, loop_of

__all__ = ["Loop", "UpdateDiffersError", "assert_same_trainer", "assert_same_update", "loop_of"]
