import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from mixlab.errors import UserError
from mixlab.parallel import rules
from mixlab.parallel.mesh import (
    MeshConfig,
    abstract_params,
    global_batch,
    make_mesh,
    param_shardings,
)

STACKED = {nnx.PARTITION_NAME: "layers"}


def annotated(*names):
    return nnx.with_partitioning(nnx.initializers.normal(0.02), names)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(16, 32, use_bias=False, rngs=rngs, kernel_init=annotated("embed", "mlp"))
        self.down = nnx.Linear(32, 16, use_bias=False, rngs=rngs, kernel_init=annotated("mlp", "embed"))
        self.norm = nnx.RMSNorm(16, rngs=rngs)  # not annotated: replicated


class Model(nnx.Module):
    def __init__(self, rngs, vocab=64, vocab_name="vocab"):
        self.embed = nnx.Embed(vocab, 16, rngs=rngs, embedding_init=annotated(vocab_name, "embed"))
        self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(Block, in_axes=0, out_axes=0, transform_metadata=STACKED))(rngs)


def run_on_8_devices(body: str) -> str:
    """Runs the lines in a fresh process with 8 simulated CPU devices; returns what they print."""
    start = "import jax\njax.config.update('jax_platforms', 'cpu')\njax.config.update('jax_num_cpu_devices', 8)\n"
    done = subprocess.run(
        [sys.executable, "-c", start + textwrap.dedent(body)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_mesh_shardings_and_batches_on_8_devices():
    run_on_8_devices(
        """
        import sys
        sys.path.insert(0, "tests/parallel")
        import numpy as np, optax
        from flax import nnx
        from jax.sharding import PartitionSpec as P
        from mixlab.errors import UserError
        from mixlab.parallel.mesh import *
        from mixlab.training.optimizer import OptimizerConfig, make_optimizer, opt_state_shardings
        from test_mesh import Model

        def message(call):
            try:
                call()
            except UserError as error:
                return str(error)
            raise AssertionError("no UserError")

        assert dict(make_mesh(MeshConfig()).shape) == dict.fromkeys(AXES, 1) | {"data": 8}
        mesh = make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2))
        assert dict(mesh.shape) == dict.fromkeys(AXES, 1) | {"data": 2, "fsdp": 2, "tensor": 2}
        for config in MeshConfig(2, 2, 4), MeshConfig(1, 2, 2):  # too many, too few
            text = message(lambda: make_mesh(config))
            needed = config.data * config.fsdp * config.tensor
            assert f"needs {needed} devices, and there are 8" in text, text
            assert "data=2, fsdp=2, tensor=2" in text and "sequence" not in text, text
        assert "multiple of 3 devices" in message(lambda: make_mesh(MeshConfig(-1, 3, 1)))
        text = message(lambda: make_mesh(MeshConfig(sequence=3)))
        assert "data=4, sequence=2" in text, text

        graphdef, params = abstract_params(lambda: Model(nnx.Rngs(0)))
        shardings = param_shardings(params, mesh)
        embed = ("fsdp", "sequence")
        assert shardings["embed"]["embedding"].spec == P("tensor", embed)
        assert shardings["blocks"]["up"]["kernel"].spec == P(None, embed, "tensor")
        assert shardings["blocks"]["down"]["kernel"].spec == P(None, "tensor", embed)
        whole = shardings["blocks"]["norm"]["scale"]
        assert whole.is_fully_replicated
        odd = abstract_params(lambda: Model(nnx.Rngs(0), vocab=257))[1]
        text = message(lambda: param_shardings(odd, mesh))
        assert "embed/embedding: axis 'vocab' of 257 over tensor=2" in text

        # The state is created in its shards, the moments with it.
        create = lambda: nnx.to_pure_dict(nnx.state(Model(nnx.Rngs(0)), nnx.Param))
        with nnx.use_eager_sharding(False):
            state = jax.jit(create, out_shardings=shardings)()
        for config in OptimizerConfig(), OptimizerConfig(name="muon"):
            optimizer = make_optimizer(config)
            where = opt_state_shardings(optimizer, jax.eval_shape(lambda: state), shardings, mesh)
            opt_state = jax.jit(optimizer.init, out_shardings=where)(state)
            moments = 0
            for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
                keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
                parameter = [key for key in keys if key not in ("muon", "adam")]
                if not parameter:
                    assert leaf.sharding.is_fully_replicated
                    continue
                expected = shardings
                for key in parameter:
                    expected = expected[key]
                assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), path
                moments += 1
            assert moments == (8 if config.name == "adamw" else 6)  # Muon keeps one moment for up and down

        assert list(host_rows(mesh, 8)) == list(range(8))
        local = {"tokens": np.arange(24, dtype=np.int32).reshape(8, 3)}
        batch = global_batch(mesh, local, 8)
        assert batch["tokens"].sharding.spec == P(("data", "expert", "fsdp")) and batch["tokens"].shape == (8, 3)
        assert {s.data.shape for s in batch["tokens"].addressable_shards} == {(2, 3)}
        np.testing.assert_array_equal(batch["tokens"], local["tokens"])
        text = message(lambda: host_rows(mesh, 6))
        assert "data=2 x fsdp=2 = 4 shards" in text and "multiple of 4 rows" in text, text

        # Rows are cut where both halves of a device's part are whole; keys of noise never are. What moves from fsdp to
        # sequence leaves parameters where they are.
        long = make_mesh(MeshConfig(data=1, fsdp=2, sequence=2, tensor=2))
        local = {"tokens": np.arange(48).reshape(4, 12), "uneven": np.ones((4, 10)), "keys": np.ones((4, 2)), "n": np.ones(4)}
        batch = global_batch(long, local, 4)
        sizes = {name: array.addressable_shards[0].data.shape for name, array in batch.items()}
        assert sizes == {"tokens": (2, 6), "uneven": (2, 10), "keys": (2, 2), "n": (2,)}, sizes
        np.testing.assert_array_equal(batch["tokens"], local["tokens"])
        short = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
        for a, b, p in zip(*map(jax.tree.leaves, (param_shardings(params, long), param_shardings(params, short), params))):
            assert a.is_equivalent_to(b, p.ndim)
        """
    )


def test_one_device():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert mesh.axis_types == (AxisType.Auto,) * len(mesh.axis_names)
    _, params = abstract_params(lambda: Model(nnx.Rngs(0), vocab=257))
    assert all(s.is_fully_replicated for s in jax.tree.leaves(param_shardings(params, mesh)))
    rows = np.ones((3, 5), np.int32)
    np.testing.assert_array_equal(global_batch(mesh, rows, 3), rows)


@pytest.mark.parametrize("config", [MeshConfig(-1, -1, 1), MeshConfig(0, 1, 1), MeshConfig(1, -2, 1)])
def test_sizes_that_cannot_be(config):
    with pytest.raises(UserError, match="at most one may be -1"):
        make_mesh(config)


def test_every_logical_name_has_a_rule():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    _, params = abstract_params(lambda: Model(nnx.Rngs(0), vocab_name="vocabulary"))
    with pytest.raises(ValueError, match=r"'vocabulary' \(of embed/embedding\).*rules\.py"):
        param_shardings(params, mesh)


def test_spec():
    assert rules.spec(("layers", None, "mlp")) == PartitionSpec(None, None, "tensor")
