"""Ray, imported only when --ray asks for it: connecting, what its nodes have, and whether they see the driver's files."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from csad import VARIABLES
from csad.data import files
from csad.errors import UserError

CONNECT_SECONDS = 10.0
SEEN_SECONDS = 5.0  # a network file system may show a new file a little later
STORE_BYTES = 100 * 2**20  # Ray's object store of --ray local; only names and counts go through it
ROOT = Path(__file__).resolve().parents[2]


class Driver(NamedTuple):
    """What a task has to know about the run that started it, which alone holds the workspace's lock.

    Attributes:
        folder: of this run's own small files, on storage that all nodes share; locks outlast the run.
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
        """Work on a node as the driver would; UserError if this node does not see the driver's files, or
        another driver has taken over."""
        deadline = time.monotonic() + SEEN_SECONDS
        while not (
            self.marker.exists() and self.marker.read_text() == self.token and self.directory.is_dir()
        ):
            if time.monotonic() > deadline:
                raise UserError(
                    f"node {socket.gethostname()} cannot see {self.marker} as this run wrote it, or the folder "
                    f"{self.directory}; workspace, data set and code have to lie on storage that all nodes share, "
                    "under the same paths"
                )
            time.sleep(0.1)
        os.chdir(self.directory)


@contextmanager
def connected(address: str, folder: Path) -> Iterator[tuple[ModuleType, Driver]]:
    """Ray, connected, and this run as its driver.

    Args:
        address: ``local`` (this machine, for as long as the run lasts), ``auto`` (the cluster that this machine belongs to), or
            HOST:PORT of a cluster's head.
        folder: see `Driver`; the caller holds the lock of what it lies in.

    Raises:
        UserError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ImportError as problem:
        raise UserError(
            "--ray needs Ray; in the repository's folder, pip install '.[cluster]' installs it"
        ) from problem
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a local cluster reports to nobody
    driver = Driver(folder.resolve(), uuid.uuid4().hex, Path.cwd())
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        options |= {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    else:
        _require_answer(address)
    _clear(driver.folder)  # a lost driver leaves its files
    try:
        try:
            ray.init(address=address, **options)
        except Exception as problem:  # of many kinds: another version of Ray, no room for its store
            raise UserError(
                f"Ray at '{address}' cannot be used ({str(problem).splitlines()[0]})"
            ) from problem
        files.write_text(driver.marker, driver.token)
        yield ray, driver
    finally:
        ray.shutdown()
        _clear(driver.folder)


def _clear(folder: Path) -> None:
    for path in folder.glob("*"):
        if ".lock" not in path.suffixes:  # which a job on a lost node may still hold
            path.unlink(missing_ok=True)
    with suppress(OSError):  # there are locks in it, or it is not there
        folder.rmdir()


def _require_answer(address: str) -> None:
    """Ask in a process of its own, because ray.init waits for minutes; UserError if no cluster answers within
    `CONNECT_SECONDS`."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "status"]
    command += ["--address", address] if address != "auto" else []
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=CONNECT_SECONDS)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as problem:
        raise UserError(
            f"no Ray cluster answers at '{address}'; --ray takes local, auto, or HOST:PORT as ray start --head "
            "names it"
        ) from problem


def environment(threads: int) -> dict[str, Any]:
    """The runtime environment of a task: this code, and the driver's number of threads, which decides how sums round."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    waiting = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)} | waiting}


def node_resources(ray: ModuleType) -> list[dict[str, float]]:
    """CPU, GPU and memory (bytes) of each node that works."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


def most(nodes: list[dict[str, float]], resource: str, amount: float) -> float:
    """What to ask for: no more than the largest node has, or the task would wait for ever."""
    return min([amount, max(node.get(resource, 0) for node in nodes)]) if nodes else amount
