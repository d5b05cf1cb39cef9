"""Shards made on a Ray cluster that is running already. The output must lie where every machine of it can write."""

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from mixlab.corpus import shards
from mixlab.corpus.records import Settings
from mixlab.corpus.tokenizer import Tokenizer
from mixlab.errors import UserError

RETRIES = 3  # of a shard whose worker, or whose machine, died


class RayPool:
    """An executor like `shards.start_pool`'s. workers: processors of the cluster.

    UserError: the package ray is missing, or there is no cluster (RAY_ADDRESS, or the one of this machine)."""

    def __init__(self, output: Path, tokenizer: Tokenizer, settings: Settings):
        try:
            import ray
        except ImportError as error:
            raise UserError("--engine=ray: the package ray is not installed; pip install 'mixlab[ray]'") from error
        self._ray = ray
        environment = {"env_vars": {"TOKENIZERS_PARALLELISM": "false"}}  # the workers are the parallelism
        try:
            ray.init("auto", runtime_env=environment, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"--engine=ray: no Ray cluster answers ({str(error).splitlines()[0]}); start one with `ray start --head`, "
                "or name it with RAY_ADDRESS"
            ) from None
        self.workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._state = ray.put((output.resolve(), tokenizer, settings))
        self._make = ray.remote(num_cpus=1, max_retries=RETRIES)(_make_shard)

    def submit(self, function: Callable, task: shards.Task) -> Future:
        """`function` is `shards.make_shard`, the one thing that this pool makes."""
        answer: Future = Future()

        def pass_on(done: Future) -> None:
            error = done.exception()
            if error is None:
                answer.set_result(done.result())
            elif isinstance(error, self._ray.exceptions.RayTaskError):  # the shard's own error
                answer.set_exception(error.cause if isinstance(error.cause, Exception) else error)
            else:
                answer.set_exception(BrokenProcessPool(str(error)))

        self._make.remote(self._state, task).future().add_done_callback(pass_on)
        return answer

    def shutdown(self, cancel_futures: bool) -> None:
        self._ray.shutdown()


def _make_shard(state: tuple, task: shards.Task) -> dict:
    shards._set_state(*state)
    return shards.make_shard(task)
