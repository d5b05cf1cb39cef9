"""Run by test_sharding.py in a process of its own, because it needs eight simulated devices."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import functools  # noqa: E402
import re  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from flax import nnx  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from test_attention import inputs  # noqa: E402
from tiny import loss, packed_rows, random_parameters, tiny  # noqa: E402

from mixlab.config import Config, EvaluationConfig, TrainingConfig  # noqa: E402
from mixlab.errors import UserError  # noqa: E402
from mixlab.evals.probing import Probing  # noqa: E402
from mixlab.model import attention, noise, sequence  # noqa: E402
from mixlab.model.transformer import Transformer  # noqa: E402
from mixlab.parallel import mesh as meshes  # noqa: E402
from mixlab.parallel import rules  # noqa: E402
from mixlab.training.loss import cross_entropy  # noqa: E402
from mixlab.training.optimizer import make_optimizer  # noqa: E402
from mixlab.training.state import create_state, plan_state  # noqa: E402
from mixlab.training.step import compile_train_step, make_train_step  # noqa: E402


def check_model(mesh):
    """The loss and gradients on a 2 x 2 x 2 mesh are those of one device, and keep the parameters'
    shardings."""
    config = tiny("olmo2", layer_loop="scan")
    parameters, rows = random_parameters(config, dtype=np.float32), packed_rows(config)
    rows = jax.tree.map(lambda a: np.concatenate([a, a[:, ::-1]]), rows)  # four rows for four shards
    run = jax.value_and_grad(loss, has_aux=True)
    expected = jax.jit(run, static_argnums=1)(parameters, config, rows)
    _, abstract = meshes.abstract_params(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    shardings = meshes.param_shardings(abstract, mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(parameters, shardings)
        rows = meshes.global_batch(mesh, rows, 4)
        got = jax.jit(run, static_argnums=1)(placed, config, rows)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    gradient = got[1]["blocks"]["mlp"]["up"]["kernel"]
    assert not gradient.sharding.is_fully_replicated


def check_kernels(mesh):
    """Pallas kernels run on each device's own rows and heads: nothing is gathered."""
    for heads, kv_heads in ((4, 2), (2, 1)):  # one key head cannot be divided: heads stay whole
        arguments = inputs(40, heads, kv_heads, documents=[[30, 10], [40], [5, 5, 20], [1, 39]])
        expected = attention.dense(*arguments[:4])
        for kernel in (attention.splash, attention.triton):
            run = jax.jit(functools.partial(kernel, interpret=True))
            with jax.set_mesh(mesh):
                spec = rules.spec(("batch", None, "heads" if kv_heads == 2 else None, None))
                place = functools.partial(jax.device_put, device=NamedSharding(mesh, spec))
                placed = [place(a) for a in arguments[:3]]
                segments = jax.device_put(arguments[3], meshes.batch_sharding(mesh, arguments[3].shape))
                for more, wanted in (((segments,), expected), ((), attention.dense(*arguments[:3]))):
                    compiled = run.lower(*placed, *more).compile()
                    out = compiled(*placed, *more)
                    np.testing.assert_allclose(out, wanted, atol=2e-5)
                    assert "all-gather" not in compiled.as_text()
                    assert out.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)


def stripes(length, size):
    """Which token stands where when rows are in stripes over this many devices."""
    pieces = np.arange(length).reshape(2 * size, -1)
    return np.concatenate([pieces[[r, 2 * size - 1 - r]] for r in range(size)]).ravel()


def check_divided_rows():
    """Attention across devices is the dense one, forward and backward, with and without segments, and moves what it has to
    and nothing else."""
    gathered = {"gather": (2, 1), "ring": (0, 0), "all_to_all": (0, 1)}  # all-gathers: of keys and values, of segments
    passed = {"gather": (0, 0), "ring": (10, 3), "all_to_all": (0, 0)}  # 2 and 2 in a loop; 4 in a loop and 2 home
    between_two = {"gather": 0, "ring": 6, "all_to_all": 0}  # no loop, and what was passed forward is there
    exchanged = {"gather": 0, "ring": 0, "all_to_all": 8}
    cases = [
        (meshes.MeshConfig(data=2, sequence=4), (8, 2), [[32, 17], [64], [], [5, 7, 1, 40, 11]]),  # grouped queries
        (meshes.MeshConfig(data=1, fsdp=2, tensor=2, sequence=2), (8, 4), None),
    ]
    for sizes, (heads, kv_heads), documents in cases:
        mesh = meshes.make_mesh(sizes)
        rows = documents or [[64]] * 4
        q, k, v, segments, d_out = inputs(64, heads, kv_heads, rows)
        segments = None if documents is None else segments
        expected = (
            attention.dense(q, k, v, segments),
            *jax.vjp(functools.partial(attention.dense, segment_ids_BxL=segments), q, k, v)[1](d_out),
        )
        order = stripes(64, mesh.shape["sequence"])
        for how in ("gather", "ring", "all_to_all"):
            placed = [
                None if a is None else a if how == "all_to_all" else a[:, order] for a in (q, k, v, segments, d_out)
            ]

            def run(q, k, v, segments, d_out, how=how):
                out, pull = jax.vjp(lambda q, k, v: attention.attend(q, k, v, segments, "auto", how), q, k, v)
                return out, *pull(d_out)

            with jax.set_mesh(mesh):
                whole = rules.spec(("batch", "length", "heads"))
                spec = {4: NamedSharding(mesh, whole), 2: meshes.batch_sharding(mesh, (4, 64))}
                placed = [None if a is None else jax.device_put(a, spec[a.ndim]) for a in placed]
                compiled = jax.jit(run).lower(*placed).compile()
                got = compiled(*placed)
            for a, b in zip(got, expected, strict=True):
                np.testing.assert_allclose(a, b if how == "all_to_all" else np.asarray(b)[:, order], atol=1e-5)
            text, masked, two = compiled.as_text(), documents is not None, mesh.shape["sequence"] == 2
            counts = {
                name: len(re.findall(rf" {name}(?:-start)?\(", text))
                for name in ("all-gather", "collective-permute", "all-to-all", "reduce-scatter", "all-reduce")
            }
            assert counts == {
                "all-gather": gathered[how][0] + masked * gathered[how][1],
                "collective-permute": between_two[how] if two else passed[how][0] + masked * passed[how][1],
                "all-to-all": exchanged[how],
                "reduce-scatter": 2 * (how == "gather"),
                "all-reduce": 0,
            }, (sizes, how, counts)
        with jax.set_mesh(mesh):
            placed = jax.device_put(segments if documents else np.arange(256).reshape(4, 64), spec[2])
            striped = jax.jit(sequence.to_stripes)(placed)
            np.testing.assert_array_equal(striped, np.asarray(placed)[:, order])
            np.testing.assert_array_equal(jax.jit(sequence.from_stripes)(striped), placed)
            with pytest.raises(UserError, match=r"divides the heads that a device has, 3, over mesh\.sequence"):
                attention.attend(*(a[:, :, :3] for a in (q, k, v)), None, "auto", "all_to_all")


def check_noise(mesh):
    """A row's noise is the same bit for bit on any mesh, and a row without a scale gets exactly nothing."""
    keys = np.random.default_rng(0).integers(0, 2**32, (8, 2), dtype=np.uint32)
    scales = np.array([0.075, 0, 0.075, 0, 0, 2.0, 0, 0.075], np.float32)
    make = jax.jit(noise.scaled_noise, static_argnums=(2, 3))
    expected = np.asarray(make(keys, scales, 24, 32))
    with jax.set_mesh(mesh):
        placed = meshes.global_batch(mesh, {"keys": keys, "scales": scales}, 8)
        found = make(placed["keys"], placed["scales"], 24, 32)
    assert not found.sharding.is_fully_replicated
    np.testing.assert_array_equal(found, expected)
    assert (expected[scales == 0] == 0).all() and (expected[scales > 0] != 0).mean() > 0.999
    np.testing.assert_allclose(expected[scales > 0].std(axis=(1, 2)) / scales[scales > 0], 1, atol=5 / np.sqrt(2 * 768))


def check_probing(mesh):
    """Probes get the same answers on a mesh as on one device."""
    config = Config(model=tiny("olmo2", compute_dtype="float32"), evaluation=EvaluationConfig(rows=4))
    optimizer = make_optimizer(config.optimizer)
    rng = np.random.default_rng(1)
    contexts, targets = ([rng.integers(0, 61, n) for n in sizes] for sizes in ((3, 9, 1, 5, 14), (4, 1, 9, 2, 10)))
    rows = rng.integers(0, 61, (5, 12))
    parameters, answers = random_parameters(config.model, dtype=np.float32), []
    for devices in (mesh, meshes.make_mesh(meshes.MeshConfig(), jax.devices()[:1])):
        layout = plan_state(config.model, optimizer, devices)
        with jax.set_mesh(devices):
            params = jax.device_put(parameters, layout.shardings["params"])
            model = Probing(config, layout, None).at(params, 0)
            answers.append((model.log_probabilities(contexts, targets), model.input_gradients(rows)))
            text, drawn = model.greedy(contexts, 7), model.sample(contexts, 7, 0.8, seed=3)
            assert text.shape == (5, 7) and drawn.shape == (5, 1, 7)
    for a, b in zip(*map(jax.tree.leaves, answers), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def check_loss():
    """Losses and gradients are those of one device; in the loop over chunks nothing goes between devices but a few numbers a
    token, and neither the head's columns nor logits are gathered. Tokens that do not divide over `sequence` as well are
    divided as rows are, and not gathered either; those that do not at all stay whole on every device."""
    T, D, V, vocab_size, chunk = 80, 16, 48, 43, 3
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(T, D)).astype(np.float32), rng.normal(size=(D, V)).astype(np.float32)
    targets, weights = rng.integers(0, vocab_size, T, dtype=np.int32), rng.uniform(size=T).astype(np.float32)

    def run(hidden, head, targets, weights):
        def total(hidden, head):
            told = cross_entropy(hidden, head, targets, weights, vocab_size=vocab_size, z_loss=0.1, chunk_tokens=chunk)
            return told.total / weights.sum(), told

        return jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, head)

    whole = (hidden, head, targets, weights)
    for sizes in (dict(data=8), dict(fsdp=8), dict(fsdp=4, tensor=2), dict(data=1, fsdp=2, sequence=2, tensor=2)):
        mesh = meshes.make_mesh(meshes.MeshConfig(**{"data": 1} | sizes))
        for count, divided in ((T - 3, None), (T - 2, "batch"), (T, "tokens")):
            if divided == "batch" and mesh.shape["sequence"] == 1:
                continue
            axes = (divided, None), ("embed", "vocab"), (divided,), (divided,)
            given = tuple(a if a is head else a[:count] for a in whole)
            expected = jax.jit(run)(*given)
            with jax.set_mesh(mesh):
                placed = [
                    jax.device_put(a, NamedSharding(mesh, rules.spec(names)))
                    for a, names in zip(given, axes, strict=True)
                ]
                compiled = jax.jit(run).lower(*placed).compile()
                got = compiled(*placed)
            assert divided is None or not re.search(rf"\[{count},{D}\]\S* all-gather", compiled.as_text())
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
        kinds, sums = "all-reduce|all-gather|reduce-scatter|all-to-all", []
        columns, embed = V // mesh.shape["tensor"], mesh.shape["fsdp"] * mesh.shape["sequence"]
        for line in compiled.as_text().splitlines():  # of tokens that divide
            found = re.search(rf" = (.*?) ({kinds})(?:-start)?\(", line)
            for dims in re.findall(r"\[([\d,]*)\]", found[1]) if found else ():
                shape = [int(n) for n in dims.split(",") if n]
                assert np.prod(shape) <= chunk or "while/body" not in line, line
                assert len(shape) < 2 or shape[-1] == D or shape[0] in (D, D // embed), line
                sums += [shape] if shape[-1:] == [columns] and found[2] != "all-gather" else []
        assert len(sums) == 1, (sizes, sums)


def check_accumulation():
    """Devices that have all parameters sum their gradients once a step and not once a part; the update is that of one device."""
    rows = {name: np.concatenate([a, a[::-1], a]) for name, a in packed_rows(tiny("llama"))._asdict().items()}
    count, length = rows["tokens"].shape
    rows["loss_weights"] = rows["loss_weights"] * np.linspace(0.5, 2, count, dtype=np.float32)[:, None]
    told = []
    for devices, parts in ((2, 3), (1, 1)):
        model = tiny("llama", compute_dtype="float32", layer_loop="scan")
        config = Config(model=model, training=TrainingConfig(accumulation_steps=parts))
        optimizer, mesh = (
            make_optimizer(config.optimizer),
            meshes.make_mesh(meshes.MeshConfig(), jax.devices()[:devices]),
        )
        layout = plan_state(model, optimizer, mesh)
        compiled = compile_train_step(make_train_step(config, optimizer, layout), layout, count, length)
        sums = [line for line in compiled.as_text().splitlines() if re.search(r" all-reduce(-start)?\(", line)]
        assert bool(sums) == (devices > 1) and not any("while/body" in line for line in sums), sums
        state, metrics = compiled(create_state(model, optimizer, layout, 0), meshes.global_batch(mesh, rows, count))
        told.append((state["opt_state"], metrics))
    for a, b in zip(*map(jax.tree.leaves, told), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


if __name__ == "__main__":
    mesh = meshes.make_mesh(meshes.MeshConfig(data=2, fsdp=2, tensor=2))
    check_model(mesh)
    check_kernels(mesh)
    check_divided_rows()
    check_noise(mesh)
    check_loss()
    check_probing(mesh)
    check_accumulation()
    print("sharded: ok")
