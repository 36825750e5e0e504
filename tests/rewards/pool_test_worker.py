"""A worker that does what its items say, for test_worker_pool.py."""

import os
import time

from tracerl_jax.rewards.worker_pool import serve


def prepare() -> None:
    if os.environ.get("POOL_TEST_BROKEN"):
        raise RuntimeError("the backend is broken; mend it")
    print("a library that talks")


def obey(item):
    verb, *arguments = item
    if verb == "double":
        print("more talk")
        return 2 * arguments[0]
    if verb == "spin":
        while True:
            try:
                pass
            except BaseException:  # nothing that is raised ends this
                continue
    if verb == "work":  # CPU seconds
        end = time.process_time() + arguments[0]
        while time.process_time() < end:
            pass
        return arguments[0]
    if verb == "sleep":
        time.sleep(arguments[0])
        return "awake"
    if verb == "pid":
        return os.getpid()
    if verb == "die":
        os._exit(3)
    if verb == "die_once":  # the file says that it has been done
        path = arguments[0]
        if not os.path.exists(path):
            open(path, "w").close()
            os._exit(3)
        return "alive"
    if verb == "eat":
        return len(bytearray(1 << 40))
    raise ValueError(f"{verb}?")


if __name__ == "__main__":
    serve(prepare, obey)
