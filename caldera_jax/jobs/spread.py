"""Who does what in a run of several processes and devices, and what they tell each other.

Every process runs the same program on its own part of the work.  The parts depend on how many there are; the results do
not: text is always divided into the same ``SHARDS``, whose sums are always added in the same tree, and a layer is
compressed by one device alone.  Results travel byte for byte, in the order of the processes.
"""

import concurrent.futures
import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

SHARDS = 8  # a power of two; windows of text are divided into so many parts, and at most so many share this work
WATCHED = "CALDERA_WORKER"  # set for the processes that ``launch`` starts
LOST = 3  # exit code of a process that ends because another one did

T = TypeVar("T")


class Lost(RuntimeError):
    """Another process of this run has ended."""


def rank() -> int:
    """Number of this process; process 0 writes what all share."""
    return jax.process_index()


def count() -> int:
    """Number of processes."""
    return jax.process_count()


def slots() -> int:
    """Number of devices of all processes: process p has the slots from p times its number of devices on."""
    return count() * jax.local_device_count()


# ---- messages; every process must call them, in the same order


def gather(array: np.ndarray) -> list[np.ndarray]:
    """This array of each process, in their order; of one shape and dtype everywhere."""
    if count() == 1:
        return [array]
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)  # bytes: no dtype is rounded
    try:
        rows = multihost_utils.process_allgather(content)
    except (RuntimeError, ValueError) as error:  # JAX raises both
        raise Lost(f"another process of this run has ended ({error})") from error
    return [np.ascontiguousarray(row).view(array.dtype).reshape(array.shape) for row in rows]


def barrier() -> None:
    """Wait until every process is here."""
    gather(np.zeros(1, np.uint8))


def exchange(rows: np.ndarray, owners: Sequence[int]) -> np.ndarray:
    """The rows, each as its owner has it."""
    gathered = gather(rows)
    return np.stack([gathered[owner][i] for i, owner in enumerate(owners)])


def first(value: T) -> T:
    """The value, made of what JSON can hold, that process 0 has: what is found on a disk is decided by one."""
    if count() == 1:
        return value
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(gather(np.asarray([content.size]))[0][0])
    return json.loads(gather(np.resize(content, size))[0].tobytes())


# ---- who does what


def own_shards(windows: int) -> list[list[slice]]:
    """This process's shards of the windows, a list for each of its devices that has any."""
    processes = holders()
    per = SHARDS // processes
    devices = _power_of_two(min(jax.local_device_count(), per))
    if rank() >= processes:
        return []
    starts = range(rank() * per, (rank() + 1) * per, per // devices)
    return [[slice(*_edges(windows, i, i + 1)) for i in range(start, start + per // devices)] for start in starts]


def window_owners(windows: int) -> list[int]:
    """The process that has each window."""
    per = SHARDS // holders()
    return [p for p in range(holders()) for _ in range(*_edges(windows, p * per, (p + 1) * per))]


def holders() -> int:
    """The first so many processes have shards: a power of two, so that each has whole branches of the tree."""
    return _power_of_two(min(count(), SHARDS))


def _edges(windows, *shards):
    return tuple(windows * i // SHARDS for i in shards)


def _power_of_two(limit):
    return 1 << limit.bit_length() - 1


def fold(parts: Iterable[T], merge: Callable[[T, T], T]) -> T:
    """All parts merged in a balanced tree, in order; at most log₂ of their number + 1 are held at a time.

    The tree over all shards is the tree over the folded branches, whoever folded them.
    """
    stack: list[tuple[int, T]] = []
    for part in parts:
        size = 1
        while stack and stack[-1][0] == size:
            part, size = merge(stack.pop()[1], part), 2 * size
        stack.append((size, part))
    while len(stack) > 1:
        last = stack.pop()[1]
        stack.append((0, merge(stack.pop()[1], last)))
    return stack[0][1]


def assign(groups: Sequence[Sequence[float]], workers: int) -> list[list[int]]:
    """The worker of each item of each group, from their costs.

    Each group is divided evenly, the longest item first; its largest part goes to whoever has least so far.
    """
    load, chosen = [0.0] * workers, []
    for costs in groups:
        part_of, sums = [0] * len(costs), [0.0] * workers
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            part_of[i] = sums.index(min(sums))
            sums[part_of[i]] += costs[i]
        largest_first = sorted(range(workers), key=lambda part: -sums[part])
        least_first = sorted(range(workers), key=lambda worker: load[worker])
        worker_of = dict(zip(largest_first, least_first, strict=True))
        load = [load[worker] + sums[part] for part, worker in sorted(worker_of.items(), key=lambda pair: pair[1])]
        chosen.append([worker_of[part] for part in part_of])
    return chosen


class _Stopped(Exception):
    """Work elsewhere has failed."""


def _until(failed: threading.Event, items: Iterable[T]) -> Iterator[T]:
    for item in items:
        if failed.is_set():
            raise _Stopped
        yield item


def on_devices(function: Callable[[Iterator[Any]], T], work: Sequence[Iterable[Any]]) -> list[T]:
    """function(items) on local device i for the items of work[i], all at once; where one fails, the others stop."""
    if len(work) <= 1:
        return [function(iter(items)) for items in work]
    failed = threading.Event()

    def run(device, items):
        try:
            with jax.default_device(device):
                return function(_until(failed, items))
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(len(work)) as pool:
        futures = [pool.submit(run, device, items) for device, items in zip(jax.local_devices(), work, strict=False)]
        try:
            concurrent.futures.wait(futures)
        finally:
            failed.set()  # an interrupt, too, ends them
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, _Stopped)), errors[0])
    return [future.result() for future in futures]


# ---- starting and ending


def connect(coordinator: str, processes: int | None, process: int | None) -> None:
    """Join the other processes; ``auto`` where the cluster (TPU, SLURM, Open MPI) tells the rest.

    Must come before any array is made.  Raises ValueError where the numbers are missing or do not fit.
    """
    if coordinator != "auto" and not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(f"--coordinator is HOST:PORT of process 0, or auto; got {coordinator!r}")
    if coordinator != "auto" and (processes is None or process is None or not 0 <= process < processes):
        raise ValueError(f"--coordinator {coordinator} needs --processes N and --process-id from 0 to N - 1; got "
                         f"{processes} and {process}")
    proxies = {}
    if WATCHED in os.environ:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        proxies = {name: os.environ.pop(name) for name in list(os.environ) if "_proxy" in name.lower()}
    if coordinator == "auto":
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"--coordinator auto found no cluster ({error}): give HOST:PORT, --processes and "
                             "--process-id") from error
    else:
        jax.distributed.initialize(coordinator, processes, process, cluster_detection_method="deactivate")
    os.environ.update(proxies)  # they would be asked for the way to this very machine
    sys.stdout.flush()
    out = os.dup(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)  # the collectives of the CPU announce their first connection there
        barrier()
        os.dup2(out, 1)
    os.close(out)
    if WATCHED in os.environ:  # a program's place in the cache depends on its device, yet only process 0 would write
        distributed.global_state.process_id = 0


def _end_with_parent():
    """The other end of our standard input is closed when the process that started us is gone, however it ended."""
    while sys.stdin.buffer.raw.read(1):
        pass
    os._exit(LOST)


def leave(code: int) -> NoReturn:
    """End this process; among others at once, as a failed one must not wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.distributed.is_initialized():
        os._exit(code)
    sys.exit(code)


def accelerated() -> bool:
    """Whether JAX may find more than a CPU here, told without starting it."""
    if os.environ.get("JAX_PLATFORMS"):
        return os.environ["JAX_PLATFORMS"] != "cpu"
    return any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))


def available_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that could be used now, of the machine's and of what the control groups that this process is in
    (those of a container, say) may use: whichever has least.  All that the machine has, off Linux."""
    try:
        machine = 1024 * _numbers(proc / "meminfo")["MemAvailable:"]
    except (OSError, KeyError):
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        rows = [line.split(":", 2) for line in (proc / "self/cgroup").read_text().splitlines()]
    except OSError:
        return machine
    left = [machine]
    for _, controllers, name in (row for row in rows if len(row) == 3):
        version = 1 if "memory" in controllers.split(",") else 2 if not controllers else None
        if version is not None:
            own = Path(name.lstrip("/"))  # as the machine sees it: in a container the files may lie at the top
            left += [_left(groups / ("memory" if version == 1 else "") / place, version)
                     for place in (own, *own.parents)]
    return max(0, min(some for some in left if some is not None))


def _left(group, version):
    """Bytes that a control group may still use; None for one without a limit.  Cached files that were not read lately
    give way."""
    most, used, cache = (("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
                         ("memory.max", "memory.current", "inactive_file"))[version - 1]
    try:
        limit, current = (int((group / name).read_text()) for name in (most, used))
    except (OSError, ValueError):  # the limit of v2 may be "max"
        return None
    try:
        return limit - current + _numbers(group / "memory.stat").get(cache, 0)
    except OSError:
        return limit - current


def _numbers(path):
    """The first number of each line, by the word before it."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def launch(arguments: Sequence[str], processes: int) -> None:
    """Run ``caldera`` with these arguments in local processes, each on one core and with one thread.

    However this process ends, they end with it.  Where one fails, the others are ended: RuntimeError says which and
    why, or SystemExit(2) where process 0 has said so itself.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-P", "-m", "caldera_jax.jobs.cli", *arguments, "--coordinator", address,
               "--processes", str(processes), "--process-id"]
    environment = os.environ | {
        WATCHED: "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "JAX_PLATFORMS": "cpu", "NPROC": "1",
        "OPENBLAS_NUM_THREADS": "1", "JAX_COORDINATOR_BIND_ADDRESS": address}
    workers: list[subprocess.Popen] = []
    with contextlib.ExitStack() as stack:
        stack.callback(_end, workers)
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(processes)]
        for i in range(processes):
            output = {} if i == 0 else {"stdout": said[i], "stderr": said[i]}
            with _on_core(i):
                workers.append(subprocess.Popen([*command, str(i)], env=environment, stdin=subprocess.PIPE,
                                                start_new_session=True, **output))
        while None in (codes := [worker.poll() for worker in workers]) and not any(codes):
            time.sleep(0.05)
        if any(codes):
            time.sleep(0.3)  # until the others have noticed
            _explain([worker.poll() or 0 for worker in workers], said)


def _end(workers):
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.communicate()


@contextlib.contextmanager
def _on_core(i):
    """Processes started in here keep to core i: two thread pools on the same cores wait for each other."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cores()[i % len(before)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _explain(codes, said):
    """The error of the process that failed by itself, not of those that ended because of it."""
    blame = {2: 0, -signal.SIGABRT: 2, LOST: 3, 0: 4}
    failed = min(range(len(codes)), key=lambda i: blame.get(codes[i], 1))
    said[failed].seek(0)
    text = said[failed].read().decode(errors="replace").strip()[-2000:]
    if (code := codes[failed]) == 2:
        raise RuntimeError(text.splitlines()[-1].removeprefix("caldera: ")) if failed else SystemExit(2)
    how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
    memory = " (out of memory? then use fewer --processes)" if code == -signal.SIGKILL else ""
    raise RuntimeError(f"process {failed} {how}{memory}: run the same command again to go on from the last finished "
                       f"layer. {text}")
