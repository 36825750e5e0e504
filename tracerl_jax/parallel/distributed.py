"""One job of several processes, each with devices of its own: `jax.distributed`, started before anything else of JAX.

    TRACERL_COORDINATOR=host:port  TRACERL_PROCESSES=4  TRACERL_PROCESS_ID=0..3        says it all
    nothing set                    SLURM, Open MPI, TPU pods and Kubernetes as JAX detects them, if there are several
    TRACERL_PROCESSES=1            one process, whatever surrounds it

Process 0, the lead, holds the coordinator: a small key-value store on the host's network, by which processes find each
other and the watchdog (parallel/watchdog.py) learns that one is gone. All arrays travel between the devices.

The programs of a job are the same in every process and start in the same order; whatever only one process does (files,
progress lines) must not start one.
"""

import logging
import os
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any, NoReturn

import jax

from tracerl_jax.errors import ConfigError, PeerError, first_line
from tracerl_jax.parallel import watchdog

log = logging.getLogger(__name__)

VARIABLES = ("TRACERL_COORDINATOR", "TRACERL_PROCESSES", "TRACERL_PROCESS_ID")
CONNECT_TIMEOUT = "TRACERL_CONNECT_TIMEOUT"  # seconds
STATUS_PEER_LOST = watchdog.STATUS_PEER_LOST
# JAX's own service ends the processes of a job, by SIGABRT, when one is silent for so long: our watchdog comes first.
JAX_HEARTBEAT_SECONDS = 24 * 3600
SHUTDOWN_SECONDS = 30
FOR_EVER_MS = 7 * 24 * 3600 * 1000  # the watchdog ends a process that waits for one that is gone or never comes


def is_job() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_lead() -> bool:
    """Whether this is process 0, which writes files and progress lines."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def process_index() -> int:
    return jax.process_index() if jax.distributed.is_initialized() else 0


def process_count() -> int:
    return jax.process_count() if jax.distributed.is_initialized() else 1


def start(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the job that the environment describes, and starts the watchdog; does nothing where it describes none.

    Raises ConfigError for variables that contradict each other or a time-out that is none, PeerError when the
    processes do not meet in time.
    """
    timeout = _number(environment, CONNECT_TIMEOUT, "300")
    given = _given(environment)
    if given is None:
        if environment.get("TRACERL_PROCESSES") == "1" or not _is_cluster(environment):
            return
        given = {}
    elif given["process_id"]:
        _reach(given["coordinator_address"], timeout)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # A handler of SIGTERM that we have ourselves (training/interrupt.py).
    jax.config.update("jax_enable_preemption_service", False)
    where = f"coordinator {given.get('coordinator_address', 'of the cluster')}"
    count = f"all {given['num_processes']} processes" if given else "all processes"
    with watchdog.instead_of_abort(
        f"{where}: {count} of the job did not meet within {timeout:g} s ({CONNECT_TIMEOUT}). Check that each of them "
        "was started, with the same number of processes, an id of its own and this address, and see their messages"
    ):
        try:
            jax.distributed.initialize(
                **given, initialization_timeout=max(1, round(timeout)), shutdown_timeout_seconds=SHUTDOWN_SECONDS,
                heartbeat_timeout_seconds=JAX_HEARTBEAT_SECONDS,
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            raise PeerError(f"{where}: the job cannot be joined ({first_line(error)}): is the port "
                            "free on the host of process 0, and does an older job run there?") from error
    if is_job():
        watchdog.start(client(), process_index(), process_count())
        if is_lead():
            log.info("job of %d processes, %d devices", process_count(), jax.device_count())


def client() -> Any:
    """The key-value store and barriers of the job."""
    from jax._src import distributed  # there is no public way to it; Orbax takes the same one

    return distributed.global_state.client


def end() -> None:
    """Leaves the job in good order: when all processes have come here."""
    if is_job():
        client().wait_at_barrier("tracerl/end", FOR_EVER_MS)
        watchdog.stop()
        jax.distributed.shutdown()


def give_up(status: int, reason: str) -> NoReturn:
    """Leaves a job that the others are still in, for `reason`: they end too, see `watchdog.fail`."""
    sys.stdout.flush()
    watchdog.give_up(status, reason)


def _given(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What the variables say, as arguments of `jax.distributed.initialize`; None when they describe no job."""
    present = [name for name in VARIABLES if environment.get(name)]
    if not present or environment.get("TRACERL_PROCESSES") == "1":
        return None
    if missing := [name for name in VARIABLES if name not in present]:
        raise ConfigError(f"{present[0]} is set, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} "
                          f"not: set all of {', '.join(VARIABLES)}, or none")  # fmt: skip
    address = environment["TRACERL_COORDINATOR"]
    count, index = (_number(environment, name, kind=int) for name in VARIABLES[1:])
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise ConfigError(f"TRACERL_COORDINATOR is {address!r}, must be HOST:PORT, an address of process 0")
    if not 0 <= index < count:
        raise ConfigError(f"TRACERL_PROCESS_ID is {index}, must be from 0 to TRACERL_PROCESSES - 1 = {count - 1}")
    # All devices of the process: without this, JAX takes one of them where it finds itself below SLURM.
    return {"coordinator_address": address, "num_processes": count, "process_id": index,
            "cluster_detection_method": "deactivate"}  # fmt: skip


def _number(environment: Mapping[str, str], name: str, default: str = "", kind: type = float) -> Any:
    try:
        return kind(environment.get(name) or default)
    except ValueError:
        whole = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{name} is {environment.get(name)!r}, must be {whole}") from None


def _is_cluster(environment: Mapping[str, str]) -> bool:
    """Whether JAX would find several processes around this one. Asks no network on a machine that is no TPU host."""
    try:
        from jax._src.clusters import ClusterEnv  # what `jax.distributed.initialize` asks

        known = ClusterEnv._cluster_types
    except (ImportError, AttributeError):  # not public: another version of JAX may keep it elsewhere
        known = []
        log.warning("this version of JAX (%s) does not say which clusters it knows: several processes form a job only "
                    "with %s", jax.__version__, ", ".join(VARIABLES))  # fmt: skip
    for cluster in known:
        name = cluster.__name__
        if (
            cluster.opt_in_only_method
            or (name == "K8sCluster" and "JOB_COMPLETION_INDEX" not in environment)  # a pod, but of no indexed job
            or (name == "SlurmCluster" and environment.get("SLURM_STEP_NUM_TASKS") == "1")  # the shell of a larger job
            or ("Tpu" in name and environment.get("JAX_PLATFORMS") == "cpu")
        ):
            continue
        try:
            if cluster.is_env_present():
                return cluster.get_process_count() > 1
        except Exception as error:  # a metadata server that does not answer, say
            log.warning("this may be one of several processes (%s), which cannot be found out (%r): it goes on alone; "
                        "%s would tell", name, error, ", ".join(VARIABLES))  # fmt: skip
    return False


def _reach(address: str, timeout: float) -> None:
    """Waits until the coordinator listens: JAX, which would wait too, ends in an abort."""
    host, _, port = address.rpartition(":")
    deadline, delay = time.monotonic() + timeout, 0.1
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=max(1.0, min(10.0, timeout))).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() + delay > deadline:
                raise PeerError(
                    f"coordinator {address}: cannot be reached within {timeout:g} s ({error}). Check that process 0 "
                    "was started and lives, that the address is one of its host which this host can reach, and that "
                    f"no firewall closes the port; {CONNECT_TIMEOUT} sets the seconds"
                ) from None
        time.sleep(delay)
        delay = min(2 * delay, 2.0)
