"""Average checkpoints from an S3 service on this machine, and count at the service what is read.

    python scripts/remote_bytes.py                    five checkpoints of 100 MB
    python scripts/remote_bytes.py --count 3 --megabytes 10

Each checkpoint is a `.keras` archive of which a third is averaged and the rest is optimizer state, as Adam
leaves it. Needs the extra `test` (moto's server and s3fs). Ends with an error if more is read than the
averaged tensors, the sample of them that tells whether they are related, and what is no tensor, of each, and
the template; or if the result differs from that of the
same files on disk.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import swa_avg
from swa_avg.formats import open_checkpoint

BUCKET = "bucket"


class Counting:
    """A WSGI application that counts what another answers to GET, by path: bytes and requests."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self.application = application
        self.read: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        body = b"".join(self.application(environ, start_response))
        with self.lock:
            self.requests[environ["REQUEST_METHOD"]] += 1
            if environ["REQUEST_METHOD"] == "GET":
                self.read[environ["PATH_INFO"]] += len(body)
        return [body]


def serve() -> tuple[Counting, str]:
    """Start moto's S3 in a thread, on a free port of the loopback interface; return counter and address."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept, as by a real service

        def log(self, *arguments: object) -> None:
            pass

    counting = Counting(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, counting, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return counting, f"http://127.0.0.1:{server.server_port}"


def write(path: Path, number: int, megabytes: int) -> None:
    rng = np.random.default_rng(number)
    layers = 30
    rows = megabytes * 10**6 // (3 * layers * 4 * 512)
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_group("vars")
        for layer in range(layers):
            file[f"layers/dense_{layer}/vars/0"] = 2 + rng.standard_normal((rows, 512), dtype=np.float32)
            file[f"layers/dense_{layer}/vars/1"] = rng.standard_normal(512, dtype=np.float32)
        file["optimizer/vars/0"] = np.int64(number)
        for slot in range(2 * layers):
            file[f"optimizer/vars/{slot + 1}"] = rng.standard_normal((rows, 512), dtype=np.float32)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("metadata.json"), json.dumps({"keras_version": "3.15.1"}))
        archive.writestr(
            zipfile.ZipInfo("config.json"), json.dumps({"class_name": "Functional", "config": {}})
        )
        archive.writestr(zipfile.ZipInfo("model.weights.h5"), buffer.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=100)
    options = parser.parse_args()
    counting, address = serve()
    os.environ.update(
        AWS_ENDPOINT_URL=address,
        AWS_ACCESS_KEY_ID="testing",
        AWS_SECRET_ACCESS_KEY="testing",
        AWS_DEFAULT_REGION="us-east-1",
    )
    import s3fs

    store = s3fs.S3FileSystem()
    store.mkdir(BUCKET)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(1, options.count + 1):
            write(folder / f"ckpt_{number}.keras", number, options.megabytes)
            store.put_file(str(folder / f"ckpt_{number}.keras"), f"{BUCKET}/run/ckpt_{number}.keras")
        counting.read.clear()
        counting.requests.clear()
        start = time.perf_counter()
        report = swa_avg.average([f"s3://{BUCKET}/run/ckpt_*.keras"], f"s3://{BUCKET}/swa.keras")
        seconds = time.perf_counter() - start
        read, requests = counting.read.copy(), counting.requests.copy()
        swa_avg.average([folder / "ckpt_*.keras"], folder / "swa.keras", verify=False)
        same = store.cat_file(f"{BUCKET}/swa.keras") == (folder / "swa.keras").read_bytes()
        template = folder / f"ckpt_{options.count}.keras"
        size = template.stat().st_size
        opened = open_checkpoint(template)
        averaged = sum(tensor.nbytes for tensor in report.plan.averaged)
        metadata = size - sum(tensor.nbytes for tensor in opened.tensors.values())
        opened.close()
    objects = {path: count for path, count in read.items() if path.endswith(".keras")}
    others = sum(read.values()) - sum(objects.values())
    sample = 2**17  # by which related checkpoints are told
    allowed = options.count * (averaged + metadata + sample) + size
    print(f"{options.count} checkpoints of {size:,} bytes: averaged {averaged:,}, no tensor {metadata:,}")
    for path, count in sorted(objects.items()):
        print(f"  read of {path}: {count:,}")
    print(f"read in all: {sum(objects.values()):,}, and {others:,} of listings; requests: {dict(requests)}")
    print(f"averaged, sample and no tensor, of each, and the template: {allowed:,}")
    print(f"the result equals the local one: {same}; {seconds:.1f} s")
    sys.exit(0 if same and sum(objects.values()) <= allowed else 1)


if __name__ == "__main__":
    main()
