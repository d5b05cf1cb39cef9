"""What the training loop leaves to the devices, and what it holds: seen in one small run."""

import gc
import sys

import jax
import numpy as np
import pytest

from mixlab import errors, train
from mixlab.training import loop

STEPS, PAUSE = 310, 300  # after the first 300 and at the end, the run is evaluated and saved
EARLY, LATE = 190, 290  # steps between which nothing but training happens


class Returned:
    """An array of a step's; any look at it is noted."""

    def __init__(self, array, note):
        self._array, self._note = array, note

    def _looked_at(self):
        self._note()
        return self._array

    def __array__(self, *arguments, **more):
        return np.asarray(self._looked_at())

    def __float__(self):
        return float(self._looked_at())

    def __int__(self):
        return int(self._looked_at())

    def __bool__(self):
        return bool(self._looked_at())

    def __getattr__(self, name):  # block_until_ready, item, is_ready, ...
        return getattr(self._looked_at(), name)


def bare(tree):
    return jax.tree.map(lambda leaf: leaf._array if isinstance(leaf, Returned) else leaf, tree)


class Watch:
    """looked[a, b]: whether anything that step a returned was looked at when b was the newest step dispatched.
    arrays, array_bytes, blocks: what lived when a step was about to be dispatched."""

    def __init__(self):
        self.looked = np.zeros((STEPS, STEPS), bool)
        self.arrays, self.array_bytes, self.blocks = np.zeros((3, STEPS), int)
        self._newest = -1

    def compile_train_step(self, *arguments):
        compiled = COMPILE(*arguments)

        def dispatch(state, batch):
            step = self._newest + 1
            if step in (EARLY, LATE):
                gc.collect()
            alive = jax.live_arrays()
            self.arrays[step], self.array_bytes[step] = len(alive), sum(array.nbytes for array in alive)
            self.blocks[step] = sys.getallocatedblocks()
            returned = compiled(bare(state), batch)
            self._newest = step
            return jax.tree.map(lambda array: Returned(array, lambda: self._look_at(step)), returned)

        return dispatch

    def _look_at(self, step):
        self.looked[step, self._newest] = True


COMPILE, STEPS_OF, LOOK, SAVE = loop.compile_train_step, loop._Run._steps, loop._Run._look, loop.Checkpoints.save


@pytest.fixture(scope="module")
def watch(trunk, tmp_path_factory):
    watch = Watch()

    def steps(*arguments):
        with jax.transfer_guard("disallow"):
            return bare(STEPS_OF(*arguments))

    arguments = [f"--config={trunk.parent / 'config.py'}", f"--workdir={tmp_path_factory.mktemp('watched') / 'run'}"]
    arguments += [f"--config.stages.0.steps={STEPS}", f"--config.checkpoint.every_steps={PAUSE}"]
    arguments += [f"--config.evaluation.every_steps={PAUSE}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXLAB_CACHE", str(trunk.parent / "cache"))
        patch.setattr(loop, "compile_train_step", watch.compile_train_step)
        patch.setattr(loop._Run, "_steps", steps)
        patch.setattr(loop._Run, "_look", lambda run, params, *more, **named: LOOK(run, bare(params), *more, **named))
        patch.setattr(loop.Checkpoints, "save", lambda to, step, state, meta: SAVE(to, step, bare(state), meta))
        assert errors.run(train.main, arguments) == 0
    return watch


def test_no_step_is_waited_for_before_the_next_is_dispatched(watch):
    """What a step returns is first looked at when the next one has been dispatched: by the recorder, and every step's is.
    Only where the loop pauses, to evaluate and save, is the newest step looked at.

    The run was under jax.transfer_guard("disallow"). On CPU, where host and device share memory, that catches what goes to
    the device unasked (numpy arrays and Python numbers given to a program, indexing an array), and not what is read: hence
    the look that is noted."""
    steps = np.arange(STEPS)
    pauses = (steps + 1 == PAUSE) | (steps + 1 == STEPS)
    np.testing.assert_array_equal(np.argwhere(watch.looked), np.stack([steps, np.where(pauses, steps, steps + 1)], 1))


def test_nothing_is_held_for_longer_than_a_step(watch):
    """A batch that was kept would be five arrays and 2.5 KiB a step, a step's metrics seven arrays."""
    for held in (watch.arrays, watch.array_bytes):
        assert len(set(held[1:PAUSE])) == 1  # afterwards a checkpoint that is being written holds a copy of the state


def test_python_does_not_hold_more_from_step_to_step(watch):
    """A step's metrics, kept as Python numbers, would be eight blocks and more."""
    assert watch.blocks[LATE] - watch.blocks[EARLY] < 6 * (LATE - EARLY), watch.blocks
