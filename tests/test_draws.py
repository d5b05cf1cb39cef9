import numpy as np

from mixlab.draws import draws


def test_is_splitmix64():
    # The first three outputs of the reference generator with the state 1234567.
    assert draws(1234567, np.arange(3)).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_any_place_any_shape_and_draws_as_seeds():
    whole = draws(7, np.arange(1000))
    assert draws(7, np.array([[999], [3]])).tolist() == [[whole[999]], [whole[3]]]
    nested = draws(whole[:5, None], np.arange(4))
    assert nested.shape == (5, 4) and len(np.unique(nested)) == 20
    assert nested[3].tolist() == draws(int(whole[3]), np.arange(4)).tolist()
