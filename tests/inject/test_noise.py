"""Keys of noise: a function of the row's place and the experiment alone."""

import numpy as np

from mixlab.inject.noise import Noise


def test_keys_are_of_the_row_and_no_other():
    noise = Noise("marks", 3, 0.075, (5, 9))
    whole = noise.keys(5, np.arange(64))
    assert whole.dtype == np.uint32 and whole.shape == (64, 2)
    np.testing.assert_array_equal(noise.keys(5, np.arange(40, 50)), whole[40:50])
    others = [noise.keys(9, np.arange(64)), Noise("other", 3, 0.075, (5,)).keys(5, np.arange(64)),
              Noise("marks", 4, 0.075, (5,)).keys(5, np.arange(64))]  # fmt: skip
    assert len({key.tobytes() for keys in [whole, *others] for key in keys}) == 4 * 64
