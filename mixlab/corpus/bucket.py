"""Objects in a bucket (gs:// or s3://), through tensorstore: read by ranges, copied to and from a local disk.

Credentials are found where the clouds' own tools keep them. AWS_ENDPOINT_URL names another server that speaks S3,
TENSORSTORE_GCS_HTTP_URL one that speaks Google's protocol. Failing requests are repeated for about a minute; then LostError.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tensorstore

from mixlab.errors import LostError, UserError

RETRIES = {"max_retries": 8, "initial_delay": "250ms", "max_delay": "16s"}
COPIED_BYTES = 64 * 2**20  # at a time
NEAR_BYTES = 1 << 16  # ranges no further apart are one request
DRIVERS = {"gs": "gcs", "s3": "s3"}


class Bucket:
    """The objects below a URL. Cheap to pickle: another process connects again. UserError for a URL that is none."""

    def __init__(self, url: str):
        found = re.fullmatch(r"(gs|s3)://([^/]+)/*(.*?)/*", url)
        if not found:
            raise UserError(
                f"{url}: not the place of objects in a bucket; write gs://BUCKET/FOLDER or s3://BUCKET/FOLDER"
            )
        scheme, bucket, folder = found.groups()
        self.url = f"{scheme}://{bucket}/{folder}"
        driver = DRIVERS[scheme]
        spec: dict = {"driver": driver, "bucket": bucket, "path": f"{folder}/" if folder else ""}
        spec["context"] = {f"{driver}_request_retries": RETRIES}
        if scheme == "s3" and "AWS_ENDPOINT_URL" in os.environ:
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
            spec |= {"endpoint": os.environ["AWS_ENDPOINT_URL"], "aws_region": region}
        self._spec = spec
        self._objects = self.answer(lambda: tensorstore.KvStore.open(spec))

    def spec(self, below: str) -> dict:
        """The tensorstore spec of the objects whose names begin with `below`."""
        return self._spec | {"path": self._spec["path"] + below}

    def __getstate__(self) -> str:
        return self.url

    def __setstate__(self, url: str) -> None:
        self.__init__(url)

    def names(self, below: str = "") -> list[str]:
        """Names of the objects that begin with `below`. UserError when the bucket is not there or may not be listed."""
        keys = tensorstore.KvStore.KeyRange(below, below + "\U0010ffff") if below else None
        found = self.answer(lambda: self._objects.list(keys) if keys else self._objects.list())
        return sorted(name for key in found if (name := key.decode()).startswith(below))  # some servers return more

    def read(self, name: str) -> bytes | None:
        """An object, whole; None when there is none."""
        found = self.answer(lambda: self._objects.read(name))
        return found.value if found.state == "value" else None

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[np.ndarray]:
        """Bytes first:last of the named objects, uint8 [last - first] each, asked for all at once; ranges that lie near each
        other are one request. UserError when an object is missing or shorter."""
        requests: list[list] = []  # [name, first, last, numbers of the ranges within]
        for number in sorted(range(len(ranges)), key=lambda i: ranges[i]):
            name, first, last = ranges[number]
            if requests and requests[-1][0] == name and first <= requests[-1][2] + NEAR_BYTES:
                requests[-1][2] = max(requests[-1][2], last)
                requests[-1][3].append(number)
            else:
                requests.append([name, first, last, [number]])
        asked = [self._objects.read(name, byte_range=slice(first, last)) for name, first, last, _ in requests]
        found: list = [None] * len(ranges)
        for (name, begin, end, within), future in zip(requests, asked, strict=True):
            answer = self.answer(lambda future=future: future, name)
            if answer.state != "value" or len(answer.value) != end - begin:
                raise self._cut_short(name)
            data = np.frombuffer(answer.value, np.uint8)
            for number in within:
                _, first, last = ranges[number]
                found[number] = data[first - begin : last - begin]
        return found

    def write(self, name: str, contents: bytes) -> None:
        self.answer(lambda: self._objects.write(name, contents))

    def delete(self, below: str) -> None:
        """All objects whose names begin with `below`."""
        for future in [self._objects.write(name, None) for name in self.names(below)]:
            self.answer(lambda future=future: future)

    def upload(self, path: Path, name: str) -> None:
        """Copies a file there. Objects are complete or absent."""
        self.write(name, path.read_bytes())

    def download(self, name: str, path: Path, size: int) -> None:
        """Copies an object of `size` bytes here, a part at a time; the file is complete or absent."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with open(partial, "wb") as file:
                for first in range(0, size, COPIED_BYTES):
                    file.write(self.read_ranges([(name, first, min(first + COPIED_BYTES, size))])[0])
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _cut_short(self, name: str) -> UserError:
        return UserError(f"{self.url}: {name} is missing or cut short; copy the store there again")

    def answer(self, ask: Callable, name: str = ""):
        """What the future comes to that `ask` returns. UserError or LostError when the bucket is to blame. name: of the object
        that was asked for."""
        try:
            return ask().result()
        except (ValueError, OSError, KeyError, RuntimeError, NotImplementedError) as error:  # tensorstore's
            raise self.explained(error, name) from None

    def explained(self, error: Exception, name: str = "") -> UserError | LostError:
        """What tensorstore's error means, by its code."""
        reason = str(error).splitlines()[0].partition(" [")[0][:300]
        if "OUT_OF_RANGE" in reason:
            return self._cut_short(name)
        if "retry attempts failed" in reason or "UNAVAILABLE" in reason:
            return LostError(f"{self.url}: the bucket does not answer ({reason})")
        if "NOT_FOUND" in reason:
            remedy = "there is no such bucket; correct its name, or make it"
        elif "PERMISSION_DENIED" in reason or "UNAUTHENTICATED" in reason:
            remedy = "access is refused; log in with the cloud's own tool, or ask for the right to read (and write) it"
        else:
            remedy = "the bucket cannot be used"
        return UserError(f"{self.url}: {remedy} ({reason})")
