"""Ray, imported only when --ray asks for it: connecting, what its nodes have, and whether they see the driver's files."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from errors import UserError

CONNECT_SECONDS = 10.0
SEEN_SECONDS = 5.0  # a network file system may show a new file a little later
STORE_BYTES = 100 * 2**20  # Ray's object store of --ray local; only names and counts go through it
ROOT = Path(__file__).resolve().parent.parent


class Driver(NamedTuple):
    """What a task has to know about the run that started it, which alone holds the workspace's lock.

    Attributes:
        folder: of this run's own small files, on storage that all nodes share; goes when the run is over.
        token: what the marker file in it says.
        directory: the driver's working directory, to which paths on its command line are relative.
    """

    folder: Path
    token: str
    directory: Path

    @property
    def marker(self) -> Path:
        return self.folder / "driver"

    def enter(self) -> None:
        """Work on a node as the driver would.

        Raises:
            UserError: this node does not see the driver's files, or another driver has taken over.
        """
        deadline = time.monotonic() + SEEN_SECONDS
        while not (self.marker.exists() and self.marker.read_text() == self.token and self.directory.is_dir()):
            if time.monotonic() > deadline:
                raise UserError(f"node {socket.gethostname()} cannot see {self.marker} as this run wrote it, or the folder "
                                f"{self.directory}; workspace, data set and code have to lie on storage that all nodes share, "
                                "under the same paths")
            time.sleep(0.1)
        os.chdir(self.directory)


@contextmanager
def connected(address: str, folder: Path) -> Iterator[tuple[ModuleType, Driver]]:
    """Ray, connected, and this run as its driver.

    Args:
        address: ``local`` (this machine, for as long as the run lasts), ``auto`` (the cluster that this machine belongs to), or
            host:port or ray://host:port.
        folder: see `Driver`; the caller holds the lock of what it lies in.

    Raises:
        UserError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ImportError as problem:
        raise UserError("--ray needs Ray; pip install -r requirements-cluster.txt") from problem
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a local cluster reports to nobody
    driver = Driver(folder.resolve(), uuid.uuid4().hex, Path.cwd())
    shutil.rmtree(driver.folder, ignore_errors=True)
    driver.folder.mkdir(parents=True)
    try:
        _connect(ray, address)
        driver.marker.write_text(driver.token)
        yield ray, driver
    finally:
        ray.shutdown()
        shutil.rmtree(driver.folder, ignore_errors=True)


def _connect(ray: ModuleType, address: str) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        ray.init(address="local", include_dashboard=False, object_store_memory=STORE_BYTES, **options)
        return
    if address != "auto":
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        except (OSError, ValueError, OverflowError) as problem:
            raise UserError(f"no Ray cluster answers at '{address}' ({problem}); --ray takes local, auto or HOST:PORT, as "
                            "ray start --head names it") from problem
    said = StringIO()
    try:
        with redirect_stderr(said):
            ray.init(address=address, **options)
    except Exception as problem:  # of many kinds
        raise UserError(f"no Ray cluster answers at '{address}' ({str(problem).splitlines()[0]}); start one with ray start "
                        "--head, or use --ray local") from problem


def environment(threads: int) -> dict[str, Any]:
    """Of a task or actor: this code, and as many threads as the driver computes with, which decides how sums round."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}}


def node_resources(ray: ModuleType) -> list[dict[str, float]]:
    """CPU, GPU and memory (bytes) of each node that works."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


def most(nodes: list[dict[str, float]], kind: str, wanted: float) -> float:
    """What to ask for: no more than the largest node has, or the task would wait for ever."""
    return min([wanted, max(node.get(kind, 0) for node in nodes)]) if nodes else wanted


def say(text: str) -> None:
    print(text, end="" if text.endswith("\n") else "\n", file=sys.stdout, flush=True)
