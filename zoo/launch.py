"""How a benchmark starts a run: in one process, in several on this machine, or in one for each of a launcher's."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from zoo import ranks
from zoo.errors import ZooError

STEP = 1.0  # seconds between looks at the others
GRACE = 15.0  # seconds for a process to notice itself that another one of its run has failed


class Launcher:
    """Starts the processes of a run and waits for them.

    Under torchrun or srun there are several benchmarks in step, one for each of the launcher's processes. They meet
    once; for each run they agree on a port where the processes that they start will meet, and where one of these fails
    the others are ended, so that the next run can begin.

    Args:
        devices: processes on this machine that share a run; 1 under a launcher, which says how many there are.
    """

    def __init__(self, devices: int):
        self.devices, self.store, self.count = devices, None, 0
        self.rank, self.world, _ = ranks.launched()
        if self.world > 1:
            from torch.distributed import TCPStore

            ranks.connect()
            patience = timedelta(minutes=5)
            self.store = TCPStore(os.environ["MASTER_ADDR"], self._port(), self.world, self.rank == 0, patience)

    def agree(self, value: Any) -> Any:
        """The first process's value."""
        return self.gather(value)[0]

    def gather(self, value: Any) -> list[Any]:
        """The value of each process."""
        return ranks.gather(value) if self.world > 1 else [value]

    def first(self, work: Callable[[], Any]) -> Any:
        """Let the first process do something alone; all have what it returns.

        Raises:
            ZooError: in all processes, where it did so in the first one.
        """
        value = mistake = None
        if self.rank == 0:
            try:
                value = work()
            except ZooError as error:
                mistake = str(error)
        value, mistake = self.agree((value, mistake))
        if mistake:
            raise ZooError(mistake)
        return value

    def run(self, job: dict[str, Any], log: Path) -> tuple[int, bool]:
        """Run a job, what it says going into a log.

        Returns:
            The exit code of this process's child, and whether it was ended because another one's had failed.
        """
        command = [sys.executable, "-m", "zoo.trial", json.dumps(job)]
        if self.devices > 1:
            command[1:2] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.devices}", "-m"]
        apart = {}
        if self.world > 1:
            apart = {"MASTER_PORT": str(self._port()), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        self.count += 1
        log.parent.mkdir(parents=True, exist_ok=True)
        pipe = subprocess.PIPE  # open until the end: a child that finds it closed knows that its benchmark is gone
        with open(log, "wb") as said:
            child = subprocess.Popen(
                command,
                stdin=pipe,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=os.environ | apart,
                start_new_session=True,  # Ctrl-C ends this process alone, which asks the child to end
            )
        try:
            return self._wait(child)
        except BaseException:
            child.terminate()
            child.wait()
            raise
        finally:
            child.stdin.close()

    def _wait(self, child: subprocess.Popen) -> tuple[int, bool]:
        """The child's exit code, and whether it was ended."""
        if self.store is None:
            return child.wait(), False
        key, code, was_ended = f"failed-{self.count}", None, False
        while code is None:
            code = _ended(child, STEP)
            if code is None and self.store.check([key]):
                code = _ended(child, GRACE)
                if code is None:
                    was_ended = True
                    child.terminate()
                    code = _ended(child, GRACE)
                if code is None:
                    child.kill()
                    code = child.wait()
        if code:
            self.store.set(key, "")
        return code, was_ended

    def _port(self) -> int:
        """A port that is free on the first process's machine."""
        with socket.socket() as free:
            free.bind(("", 0))
            return self.agree(free.getsockname()[1])


def _ended(child: subprocess.Popen, seconds: float) -> int | None:
    """The exit code of a process that ends in time."""
    try:
        return child.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
