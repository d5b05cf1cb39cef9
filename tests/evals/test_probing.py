"""What the model answers to probes, against the model's definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlab.config import Config, EvaluationConfig
from mixlab.evals.padding import SHORTEST, Shapes
from mixlab.evals.probing import Probing
from mixlab.model.presets import llama
from mixlab.parallel.mesh import MeshConfig, make_mesh
from mixlab.training.optimizer import make_optimizer
from mixlab.training.state import create_state, plan_state

CONTEXT, VOCABULARY, BOS = 80, 61, 60


@pytest.fixture(scope="module")
def setting():
    config = Config(
        model=llama(layers=2, d_model=32, heads=2, vocab_size=VOCABULARY, context_length=CONTEXT),
        evaluation=EvaluationConfig(rows=4),
    )
    optimizer = make_optimizer(config.optimizer)
    layout = plan_state(config.model, optimizer, make_mesh(MeshConfig()))
    params = create_state(config.model, optimizer, layout, 0)["params"]
    params = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, params)  # far from uniform predictions
    return Probing(config, layout, BOS), layout, params


@pytest.fixture(scope="module")
def reference(setting):
    """tokens [n] -> log-probabilities of the next token after each of them, float64 [n, V]: no padding, no batch."""
    _, layout, params = setting

    @jax.jit
    def logits(row):
        model = layout.model(params)
        return model.logits(model(row[None], None, jnp.arange(len(row))[None]))[0]

    def answer(tokens):  # lengths in steps of ten, so that little is compiled; what follows does not count
        row = np.pad(np.asarray(tokens, np.int32), (0, -len(tokens) % 10))
        return np.asarray(jax.nn.log_softmax(logits(row)))[: len(tokens)]

    return answer


def rows_of(seed, lengths):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY - 1, n).astype(np.int32) for n in lengths]


@given(st.lists(st.integers(1, 1000), max_size=60), st.integers(1, 9))
def test_every_row_is_in_one_batch_that_holds_it(lengths, rows):
    shapes, seen, kinds = Shapes(rows, 1000), [], set()
    for numbers, count, length in shapes.batches(np.array(lengths, np.int64)):
        assert len(numbers) <= count and count * length <= rows * 1000
        assert all(lengths[i] <= length for i in numbers)
        seen += numbers.tolist()
        kinds.add((count, length))
    assert sorted(seen) == list(range(len(lengths)))
    assert len(kinds) <= 6 and all(length >= SHORTEST for _, length in kinds)


def test_log_probabilities_are_the_models(setting, reference):
    probing, _, params = setting
    contexts = rows_of(0, [3, 40, 1, 7, 70, 12, 2, 9, 30])
    targets = rows_of(1, [5, 33, 1, 1, 10, 20, 3, 4, 5])
    found = probing.at(params, 3).log_probabilities(contexts, targets)
    for context, target, values in zip(contexts, targets, found, strict=True):
        expected = reference(np.concatenate([context, target]))[len(context) - 1 : -1]
        np.testing.assert_allclose(values, expected[np.arange(len(target)), target], rtol=1e-4, atol=1e-5)
        assert values.dtype == np.float32 and len(values) == len(target)


def test_an_empty_context_is_bos_or_leaves_the_first_token_unscored(setting, reference):
    probing, layout, params = setting
    (target,) = rows_of(2, [6])
    empty = np.zeros(0, np.int32)
    (values,) = probing.at(params, 0).log_probabilities([empty], [target])
    expected = reference([BOS, *target])[:-1]
    np.testing.assert_allclose(values, expected[np.arange(6), target], rtol=1e-4, atol=1e-5)
    without = Probing(Config(model=probing.config, evaluation=EvaluationConfig(rows=4)), layout, None).at(params, 0)
    values, single = without.log_probabilities([empty, empty], [target, target[:1]])
    expected = reference(target)[:-1]
    assert np.isnan(values[0]) and np.isnan(single).all()
    np.testing.assert_allclose(values[1:], expected[np.arange(5), target[1:]], rtol=1e-4, atol=1e-5)


def test_of_what_is_too_long_the_end_is_read(setting, reference):
    probing, _, params = setting
    context, target = rows_of(4, [200, 30])
    model = probing.at(params, 0)
    (values,) = model.log_probabilities([context], [target])
    expected = reference(np.concatenate([context, target])[-CONTEXT - 1 : -1])[-30:]
    np.testing.assert_allclose(values, expected[np.arange(30), target], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="longer than the model's context"):
        model.log_probabilities([target], rows_of(5, [CONTEXT + 1]))
    with pytest.raises(ValueError, match="must fit"):
        model.greedy([target], CONTEXT)


def test_greedy_takes_the_likeliest_token_each_time(setting, reference):
    probing, _, params = setting
    prompts = rows_of(6, [1, 25, 9, 4, 40, 2])
    done = probing.at(params, 0).greedy(prompts, 12)
    assert done.shape == (6, 12) and done.dtype == np.int32
    for prompt, text in zip(prompts, done, strict=True):
        whole = np.concatenate([prompt, text])
        np.testing.assert_array_equal(reference(whole)[len(prompt) - 1 : -1].argmax(-1), text)


def test_samples_follow_the_model_and_do_not_depend_on_company(setting, reference):
    probing, _, params = setting
    model = probing.at(params, 0)
    prompts = rows_of(7, [5, 30, 11, 2, 2, 3])
    drawn = model.sample(prompts, 6, 1.0, seed=5, samples=3)
    assert drawn.shape == (6, 3, 6)
    np.testing.assert_array_equal(drawn[:2], model.sample(prompts[:2], 6, 1.0, seed=5, samples=3))
    assert (drawn != model.sample(prompts, 6, 1.0, seed=6, samples=3)).any()
    np.testing.assert_array_equal(model.sample(prompts, 6, 0.0, 0)[:, 0], model.greedy(prompts, 6))
    (prompt,), temperature, count = rows_of(8, [4]), 0.7, 1200
    first = model.sample([prompt], 1, temperature, seed=1, samples=count).ravel()
    p = np.exp(reference(prompt)[-1] / temperature)
    p /= p.sum()
    seen = np.bincount(first, minlength=VOCABULARY)
    expected = count * p
    big = expected > 5
    chi2 = ((seen - expected)[big] ** 2 / expected[big]).sum()
    assert big.sum() > 5 and chi2 < big.sum() + 5 * np.sqrt(2 * big.sum())


def test_input_gradients_are_differences_of_the_loss(setting, reference):
    probing, layout, params = setting
    rows = np.stack(rows_of(9, [10, 10, 10, 10, 10]))
    model = probing.at(params, 0)
    gradients = model.input_gradients(rows)
    assert gradients.shape == (5, 10, model.width) and gradients.dtype == np.float32

    @jax.jit
    def mean_loss(added):
        network = layout.model(params)
        logits = network.logits(network(rows[1:2], None, jnp.arange(10)[None], added[None]))[0]
        return -jax.nn.log_softmax(logits)[jnp.arange(9), rows[1, 1:]].mean()

    np.testing.assert_allclose(gradients[1], jax.grad(mean_loss)(jnp.zeros((10, 32))), rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(gradients[:2], model.input_gradients(rows[:2]))


def test_the_same_question_is_computed_once(setting, monkeypatch):
    probing, _, params = setting
    model = probing.at(params, 0)
    contexts, targets = rows_of(10, [3, 4]), rows_of(11, [2, 2])
    first = model.log_probabilities(contexts, targets)
    first[0][:] = 7  # whoever asks may change what he gets
    calls = []
    losses = probing.losses
    monkeypatch.setattr(probing, "losses", lambda *batch: calls.append(batch) or losses(*batch))
    again = model.log_probabilities(contexts, targets)
    assert not calls and not (again[0] == 7).any()
    model.log_probabilities(targets, contexts)
    assert calls


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 2**32 - 1))
def test_noise_is_normal_and_of_its_key(setting, seed):
    probing, _, params = setting
    model = probing.at(params, 0)
    keys = np.random.default_rng(seed).integers(0, 2**32, (9, 2), dtype=np.uint32)
    noise = model.noise(keys, 16)
    assert noise.shape == (9, 16, 32) and noise.dtype == np.float32
    np.testing.assert_array_equal(model.noise(keys[5:6], 16)[0], noise[5])
    assert abs(noise.mean()) < 5 / np.sqrt(noise.size) and abs(noise.std() - 1) < 5 / np.sqrt(2 * noise.size)
