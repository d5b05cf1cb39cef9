"""The model against NumPy and against itself: every preset, forward and backward."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_transformer
import pytest
from flax import nnx
from tiny import PRESETS, Z_LOSS, Rows, abstract, loss, packed_rows, random_parameters, tiny, with_parameters

from mixlab.batch import Kind
from mixlab.errors import UserError
from mixlab.model.layers import Linear
from mixlab.model.size import parameter_count
from mixlab.model.transformer import Transformer, scans_layers
from tests.test_metadata_stream import D1, D2, D3, documents_of, read

loss_and_gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)


@functools.partial(jax.jit, static_argnums=0)
def initialise(config, key):
    return nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(key))))


def initial_parameters(config, seed=0):
    """As training makes them: in one compiled call."""
    return initialise(config, jax.random.key(seed))


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(entry.key) for entry in path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module", params=PRESETS)
def case(request):
    """A preset in float64: config, parameters, rows, and our loss, nll and gradient."""
    config = tiny(request.param, compute_dtype="float64")
    parameters, rows = random_parameters(config), packed_rows(config)
    with jax.enable_x64(True):
        (total, nll), gradient = loss_and_gradient(parameters, config, rows)
    return config, parameters, rows, float(total), np.asarray(nll), flat(gradient)


def test_loss_equals_numpy(case):
    config, parameters, rows, total, nll, _ = case
    expected, expected_nll = numpy_transformer.loss(parameters, config, rows, Z_LOSS)
    np.testing.assert_allclose(nll, expected_nll, rtol=1e-10)
    assert total == pytest.approx(expected, rel=1e-10)


def test_gradient_of_every_parameter_equals_finite_differences_of_numpy(case):
    config, parameters, rows, _, _, gradient = case
    rng = np.random.default_rng(2)
    step = 1e-4

    def numpy_loss(name, direction, distance):
        moved = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf + distance * direction if "/".join(entry.key for entry in path) == name else leaf,
            parameters,
        )
        return numpy_transformer.loss(moved, config, rows, Z_LOSS)[0]

    for name, value in gradient.items():
        direction = rng.normal(size=value.shape)
        direction /= np.linalg.norm(direction)
        slope = (numpy_loss(name, direction, step) - numpy_loss(name, direction, -step)) / (2 * step)
        assert np.sum(value * direction) == pytest.approx(slope, rel=1e-5, abs=1e-6), name


def test_padding_and_unused_vocabulary_send_no_gradient(case):
    config, parameters, rows, *_ = case
    only_in_padding = 60
    tokens = np.where(rows.segment_ids > 0, rows.tokens % only_in_padding, only_in_padding)
    rows = rows._replace(tokens=tokens.astype(np.int32), targets=rows.targets % only_in_padding)
    with jax.enable_x64(True):
        (_, nll), gradient = loss_and_gradient(parameters, config, rows)
    gradient = flat(gradient)
    assert np.isfinite(nll).all()
    if not config.tied_head:
        assert not gradient["embedding"][only_in_padding:].any()  # seen in padding only, or never
    head = gradient["embedding"].T if config.tied_head else gradient["head"]
    assert not head[:, config.vocab_size :].any()  # padded columns have no probability


def test_a_document_does_not_see_its_neighbours(case):
    config, parameters, rows, _, nll, _ = case
    first = rows.segment_ids == 1
    changed = np.where(first, (rows.tokens + 1) % config.vocab_size, rows.tokens)
    with jax.enable_x64(True):
        (_, new_nll), _ = loss_and_gradient(parameters, config, rows._replace(tokens=changed))
    assert not np.equal(new_nll, nll)[first].any()
    np.testing.assert_array_equal(np.asarray(new_nll)[~first], nll[~first])  # bit for bit


def test_metadata_are_seen_by_their_own_document_and_no_other(case):
    config, parameters, *_ = case
    batch = read(documents_of([D1, D2, D3], [1, 2, 1]), 24)
    rows = Rows(batch.tokens, batch.targets, batch.loss_weights, batch.segment_ids, batch.positions)
    metadata = batch.spans[batch.spans["kind"] == Kind.METADATA][1]
    changed = rows.tokens.copy()
    changed[0, metadata["offset"] : metadata["offset"] + metadata["length"]] += 1
    with jax.enable_x64(True):
        (_, nll), (_, after) = (
            loss_and_gradient(parameters, config, r)[0] for r in (rows, rows._replace(tokens=changed))
        )
    behind = (rows.segment_ids == metadata["document"] + 1) & (np.arange(24) >= metadata["offset"])
    assert behind.sum() == 6 and not np.equal(nll, after)[behind].any()
    np.testing.assert_array_equal(np.asarray(after)[~behind], np.asarray(nll)[~behind])  # bit for bit


@pytest.mark.parametrize(
    "running",
    [
        dict(layer_loop="scan"),
        dict(layer_loop="scan", remat="full"),
        dict(layer_loop="unroll", remat="dots"),
        dict(layer_loop="unroll", attention="dense"),
    ],
    ids=str,
)
def test_how_it_is_run_does_not_change_what_it_computes(running):
    plain = tiny("olmo2", compute_dtype="float64", layer_loop="unroll")
    parameters, rows = random_parameters(plain), packed_rows(plain)
    with jax.enable_x64(True):
        (total, _), gradient = loss_and_gradient(parameters, plain, rows)
        (other_total, _), other = loss_and_gradient(parameters, dataclasses.replace(plain, **running), rows)
    assert float(other_total) == pytest.approx(float(total), rel=1e-12)
    gradient, other = flat(gradient), flat(other)
    for name in gradient:
        np.testing.assert_allclose(other[name], gradient[name], rtol=1e-9, atol=1e-11, err_msg=name)


def test_bfloat16_is_close_to_float64(case):
    config, parameters, rows, _, nll, gradient = case
    parameters = jax.tree.map(lambda a: a.astype(np.float32), parameters)
    config = dataclasses.replace(config, compute_dtype="bfloat16")
    (total, low_nll), low = loss_and_gradient(parameters, config, rows)
    assert total.dtype == low_nll.dtype == jnp.float32
    np.testing.assert_allclose(low_nll, nll, atol=0.02 * np.abs(nll).max())
    # A gradient that is zero by nature (GPT-2's key bias) is pure rounding: hence the floor.
    floor = 0.05 * np.sqrt(sum(np.sum(value**2) for value in gradient.values()))
    for name, value in flat(low).items():
        assert value.dtype == np.float32
        error = np.linalg.norm(value - gradient[name])
        assert error < 0.05 * max(np.linalg.norm(gradient[name]), floor), name


def test_gradients_of_a_linear_map_are_summed_over_tokens_in_float32():
    """What is summed is bfloat16, and no more is rounded."""
    linear = Linear(4, 8, ("embed", "mlp"), bias=True, init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    graph, weights = nnx.split(linear)
    x, g = (np.random.default_rng(n).normal(0.5, 1, (8, 512, n)).astype(jnp.bfloat16) for n in (4, 8))
    (found,) = jax.jit(lambda x, g: jax.vjp(lambda w: nnx.merge(graph, w)(x), weights)[1](g))(x, g)
    x, g = x.astype(np.float64), g.astype(np.float64)
    np.testing.assert_allclose(found["kernel"][...], np.einsum("bli,blo->io", x, g), rtol=1e-4)
    np.testing.assert_allclose(found["bias"][...], g.sum((0, 1)), rtol=1e-5)


@pytest.mark.parametrize(
    "change, backend, scans",
    [
        (dict(), "cpu", False),
        (dict(), "gpu", False),
        (dict(layers=24), "gpu", False),
        (dict(layers=25), "gpu", True),
        (dict(), "tpu", True),
        (dict(layers=24), "cpu", True),
        (dict(remat="full"), "cpu", True),
        (dict(remat="full"), "gpu", False),
        (dict(layer_loop="unroll"), "tpu", False),
        (dict(layer_loop="scan"), "cpu", True),
    ],
    ids=str,
)
def test_when_layers_are_scanned(change, backend, scans):
    assert scans_layers(tiny("llama", **change), backend) == scans


def test_remat_computes_again_what_it_promises():
    """A layer has seven projections and, in its attention, products of blocks; and one logistic function."""
    products, logistics = {}, {}
    for remat in ("none", "dots", "full"):
        config = tiny("llama", layer_loop="scan", remat=remat)
        rows = packed_rows(config)
        gradient = jax.grad(lambda p, config=config, rows=rows: loss(p, config, rows)[0])
        program = str(jax.make_jaxpr(gradient)(random_parameters(config)))
        products[remat], logistics[remat] = program.count(" dot_general["), program.count(" logistic")
    assert products["none"] == products["dots"] <= products["full"] - 9
    assert 0 < logistics["none"] < logistics["dots"] == logistics["full"]


def test_remat_trades_memory_in_the_order_it_promises():
    def temporary_bytes(remat):
        config = tiny("llama", layers=8, layer_loop="scan", remat=remat, context_length=256)
        parameters = abstract(config)[1]
        row = jax.ShapeDtypeStruct((4, 256), jnp.int32)
        rows = Rows(row, row, jax.ShapeDtypeStruct(row.shape, jnp.float32), row, row)
        lowered = loss_and_gradient.lower(nnx.to_pure_dict(parameters), config, rows)
        compiled = lowered.compile({"xla_backend_optimization_level": 0})  # quicker; buffers stay the same
        return compiled.memory_analysis().temp_size_in_bytes

    none, dots, full = (temporary_bytes(remat) for remat in ("none", "dots", "full"))
    assert full < 0.7 * dots and dots < 0.8 * none


@pytest.mark.parametrize("preset", PRESETS)
def test_logits_are_cut_to_the_vocabulary_and_agree_with_the_loss(preset):
    config = tiny(preset)
    parameters, rows = random_parameters(config, dtype=np.float32), packed_rows(config)
    hidden = output(config, parameters, rows)
    model = with_parameters(config, parameters)
    logits = model.logits(hidden)
    assert hidden.shape == (2, 17, 32) and logits.shape == (2, 17, 61) and logits.dtype == jnp.float32
    assert model.head_DxV().shape == (32, 64)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    nll = -np.take_along_axis(log_p, rows.targets[..., None], axis=-1)[..., 0]
    expected = numpy_transformer.loss(jax.tree.map(np.float64, parameters), config, rows)[1]
    np.testing.assert_allclose(nll, expected, rtol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_stacked_float32_and_every_axis_has_a_name(preset):
    config = tiny(preset)
    state = nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    names = {"vocab", "embed", "heads", "kv_heads", "mlp", "layers", "positions"}
    for path, variable in nnx.to_flat_state(state):
        value, axes = variable.get_value(), variable.get_metadata()["out_sharding"]
        assert value.dtype == jnp.float32
        assert len(axes) == value.ndim and set(axes) <= names, path
        assert (axes[0] == "layers") == (path[0] == "blocks"), path
        if path[0] == "blocks":
            assert value.shape[0] == config.layers
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == parameter_count(config)


def test_layers_start_different_and_repeatably():
    config = tiny("llama")
    one, two, other = (flat(initial_parameters(config, seed)) for seed in (3, 3, 4))
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])
        assert name.endswith("scale") or not np.array_equal(one[name], other[name])
    kernel = one["blocks/mlp/up/kernel"]
    assert not np.equal(kernel[0], kernel[1]).any()


@pytest.mark.parametrize("layer_loop", ["scan", "unroll"])
def test_without_segment_ids_every_row_is_one_document(layer_loop):
    config = tiny("llama", layer_loop=layer_loop)
    rows = packed_rows(config)._replace(segment_ids=np.ones((2, 17), np.int32))
    parameters = random_parameters(config, dtype=np.float32)
    masked, plain = (output(config, parameters, r) for r in (rows, rows._replace(segment_ids=None)))
    np.testing.assert_allclose(plain, masked, atol=1e-5)


def test_rows_longer_than_the_context_are_refused():
    config = tiny("gpt2", context_length=8)
    rows = packed_rows(config)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match=r"model\.context_length = 8 .* 17 tokens"):
        nnx.eval_shape(lambda m: m(rows.tokens, rows.segment_ids, rows.positions), model)


def test_unsound_settings_are_refused_all_at_once():
    config = dataclasses.replace(tiny("llama"), kv_heads=3, layers=0)
    with pytest.raises(UserError) as error:
        Transformer(config, rngs=nnx.Rngs(0))
    assert "model.kv_heads = 3" in str(error.value) and "model.layers = 0" in str(error.value)


# OLMo 2 specification


def test_initial_weights_are_normal_truncated_at_three_sigmas():
    config = tiny("olmo2", d_model=256, vocab_size=4096)
    parameters = initial_parameters(config)
    table = np.asarray(parameters["embedding"])  # a million values
    assert table.std() == pytest.approx(0.019732, rel=3e-3)
    assert 0.055 < np.abs(table).max() <= 0.06
    for name, leaf in flat(parameters).items():
        if name.endswith("scale"):
            assert (leaf == 1).all(), name
        else:
            assert 0.0185 < leaf.std() < 0.021, name


def test_gpt2_starts_residual_projections_smaller():
    config = tiny("gpt2", d_model=128, layers=8)
    blocks = flat(initial_parameters(config)["blocks"])
    assert blocks["mlp/up/kernel"].std() == pytest.approx(0.02, rel=0.03)
    for name in ("mlp/down/kernel", "attention/output/kernel"):
        assert blocks[name].std() == pytest.approx(0.02 / 4, rel=0.03)
    assert not blocks["mlp/up/bias"].any() and not blocks["attention/query/bias"].any()


@functools.partial(jax.jit, static_argnums=0)
def output(config, parameters, rows):
    return with_parameters(config, parameters)(rows.tokens, rows.segment_ids, rows.positions)


def test_a_block_whose_output_projections_are_zero_is_the_identity():
    config = tiny("olmo2")
    parameters, rows = random_parameters(config, dtype=np.float32), packed_rows(config)
    for projection in (("attention", "output"), ("mlp", "down")):
        parameters["blocks"][projection[0]][projection[1]]["kernel"] *= 0
    embedded = jnp.asarray(parameters["embedding"])[rows.tokens]
    only_norm = jax.jit(lambda x: with_parameters(config, parameters).final_norm(x))(embedded)
    np.testing.assert_array_equal(output(config, parameters, rows), only_norm)


def test_qk_norm_makes_the_scale_of_queries_and_keys_immaterial():
    config = tiny("olmo2")
    without = dataclasses.replace(config, qk_norm=False)
    parameters, rows = random_parameters(config, dtype=np.float32), packed_rows(config)
    plain = random_parameters(without, dtype=np.float32)
    before, plain_before = output(config, parameters, rows), output(without, plain, rows)
    for projection in ("query", "key"):
        for tree in (parameters, plain):
            attention = tree["blocks"]["attention"][projection]
            attention["kernel"] = attention["kernel"] * 7  # not in place: jax may still be reading the array
        np.testing.assert_allclose(output(config, parameters, rows), before, atol=1e-4)
        assert np.abs(output(without, plain, rows) - plain_before).max() > 0.1
