"""What the Linux kernel offers to lock a process in, by its own system calls: namespaces, a root file system of its
own, Landlock where that cannot be had, identity, resource limits, a filter of system calls.

Each step that works is in `Isolation.held`, each that does not in `Isolation.lacks`, with the reason.
"""

import ctypes
import os
import resource
import sys

NAMESPACES = {"user": 0x10000000, "mount": 0x20000, "pid": 0x20000000, "network": 0x40000000, "ipc": 0x8000000,
              "uts": 0x4000000}  # fmt: skip
FIRST_UID = 1 << 30  # of programs; beyond what anybody uses
SCRATCH = "/scratch"
SCRATCH_BYTES = 64 << 20
OPEN_FILES = 64
PROCESSES = 64  # threads count

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 0x20, 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
# A user namespace may not drop the flags that a mount already has; statvfs reports them by these bits.
KEPT_FLAGS = os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC | os.ST_NOATIME | os.ST_NODIRATIME | os.ST_RELATIME
MS_RELATIME = 1 << 21  # the one that mount() numbers otherwise
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_SECUREBITS = 1, 4, 22, 28
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
SIGKILL = 9

_libc = ctypes.CDLL(None, use_errno=True)


class Isolation:
    def __init__(self):
        self.held: list[str] = []
        self.lacks: dict[str, str] = {}

    def attempt(self, name: str, step, *args) -> bool:
        try:
            step(*args)
        except OSError as error:
            self.lacks[name] = os.strerror(error.errno) if error.errno else str(error)
            return False
        self.held.append(name)
        return True

    def missing(self, required: list[str]) -> str:
        """Says what of `required` does not hold; "" when all does."""
        return ", ".join(f"{name} ({self.lacks.get(name, 'not tried')})" for name in required if name not in self.held)


def call(name: str, *args) -> None:
    """A function of libc that returns -1 for an error; raises `OSError` then. Texts are paths."""
    ctypes.set_errno(0)
    if getattr(_libc, name)(*(os.fsencode(arg) if isinstance(arg, str) else arg for arg in args)) == -1:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def prctl(option: int, value: object) -> None:
    call("prctl", option, value if isinstance(value, ctypes._SimpleCData) else ctypes.c_ulong(value), 0, 0, 0)


def enter_namespaces(isolation: Isolation) -> None:
    """Root enters them as it is; everybody else is first made root of a user namespace. The PID namespace begins with
    the next fork."""
    if os.geteuid() != 0 or not _may_unshare():
        isolation.attempt("user", _enter_user_namespace)
    for name, flag in NAMESPACES.items():
        if name != "user":
            isolation.attempt(name, call, "unshare", flag)


def _may_unshare() -> bool:
    try:
        call("unshare", NAMESPACES["uts"])
    except OSError:
        return False
    return True


def _enter_user_namespace() -> None:
    uid, gid = os.geteuid(), os.getegid()
    call("unshare", NAMESPACES["user"])
    for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{file}", "w") as target:
            target.write(text)


def make_root(paths: list[str], hidden: list[str], shown: list[str]) -> None:
    """Replaces the root file system by a read-only one: `paths`, of which the folders `hidden` are empty but for
    `shown`; /dev/null and the like, and a scratch folder. Needs a mount namespace of its own. Raises `OSError`, before
    anything has changed, when it may not.
    """
    call("mount", None, "/", None, MS_REC | MS_PRIVATE, None)
    call("mount", "tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    os.mkdir("/tmp/.old")
    call("pivot_root", "/tmp", "/tmp/.old")
    os.chdir("/")
    try:
        os.mkdir(SCRATCH)
        options = f"size={SCRATCH_BYTES},nr_inodes=4096,mode=1777"
        call("mount", "tmpfs", SCRATCH, "tmpfs", MS_NOSUID | MS_NODEV, options)
        for path in paths:
            _show(path)
        for path in hidden:
            call("mount", "tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, "size=64k,mode=755")
        for path in shown:
            _show(path)
        for path in hidden:
            call("mount", None, path, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV, None)
        os.mkdir("/dev")
        for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
            os.close(os.open(device, os.O_CREAT))
            call("mount", f"/.old{device}", device, None, MS_BIND, None)
        call("umount2", "/.old", MNT_DETACH)
        os.rmdir("/.old")
        call("mount", None, "/", None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV, None)
    except OSError as error:  # there is no way back
        raise RuntimeError(f"cannot make a root file system: {error}") from error


def _show(path: str) -> None:
    old = f"/.old{path}"
    if os.path.islink(old):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.symlink(os.readlink(old), path)
    else:
        os.makedirs(path if os.path.isdir(old) else os.path.dirname(path), exist_ok=True)
        if not os.path.isdir(old):
            os.close(os.open(path, os.O_CREAT))
        call("mount", old, path, None, MS_BIND | MS_REC, None)
        kept = os.statvfs(path).f_flag & KEPT_FLAGS
        kept = kept & ~os.ST_RELATIME | (MS_RELATIME if kept & os.ST_RELATIME else 0)
        call("mount", None, path, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | kept, None)


# Landlock (linux/landlock.h): which rights each version of its interface knows.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on all processors
RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}  # version: number of rights on files
READING, LISTING, EXECUTING_AND_READING = 0b100, 0b1000, 0b1101
ON_A_FILE = 0b1100_0000_0000_0111  # execute, write, read, truncate, ioctl


def restrict_files(readable: list[str], listed: list[str], folder: str) -> None:
    """From now on this process can only read below `readable`, see names below `listed`, and do everything in `folder`;
    where the kernel knows how, it also has no TCP and can signal only itself. Raises `OSError` without Landlock (Linux
    5.13)."""

    def landlock(number: int, *args) -> int:
        ctypes.set_errno(0)
        result = _libc.syscall(ctypes.c_long(number), *args)
        if result < 0:
            raise OSError(ctypes.get_errno(), "Landlock")
        return result

    version = landlock(CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    everything = (1 << RIGHTS[max(known for known in RIGHTS if known <= version)]) - 1
    handled = (ctypes.c_uint64 * 3)(everything, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = landlock(CREATE_RULESET, handled, ctypes.c_size_t(size), 0)
    allowed = {path: LISTING for path in listed} | {path: EXECUTING_AND_READING for path in readable}
    allowed |= {"/dev/null": everything, "/dev/urandom": READING, folder: everything}
    for path, rights in allowed.items():
        try:
            fd = os.open(path, os.O_PATH)
        except FileNotFoundError:
            continue
        rights &= everything if os.path.isdir(path) else everything & ON_A_FILE
        rule = ctypes.create_string_buffer(rights.to_bytes(8, sys.byteorder) + fd.to_bytes(4, sys.byteorder), 12)
        landlock(ADD_RULE, rules, 1, rule, 0)
        os.close(fd)
    landlock(RESTRICT_SELF, rules, 0)
    os.close(rules)


def own_uid(uid: int, folder: str) -> None:
    """Root becomes a user that nobody else is, and gives it `folder`. Raises `OSError` when it may not, or could not
    read Python then."""
    os.setgroups([])
    os.seteuid(uid)
    try:
        os.close(os.open(os.__file__, os.O_RDONLY))
    except OSError as error:
        raise OSError(None, "other users cannot read the Python installation") from error
    finally:
        os.seteuid(0)
    os.chown(folder, uid, uid)
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def drop_privileges() -> None:
    """No capabilities, and none to be had again. Other processes of the same user cannot look into this one."""
    try:
        prctl(PR_SET_SECUREBITS, 0b11)  # user 0 is nobody special, from now on
    except OSError:
        pass  # nothing to give up
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    call("capset", header, nothing)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_DUMPABLE, 0)
    prctl(PR_SET_PDEATHSIG, SIGKILL)


def limit_resources(cpu_seconds: int, memory_bytes: int, processes: int | None = PROCESSES) -> None:
    """CPU seconds are the last resort: the judge's clock is finer."""
    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: SCRATCH_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if processes is not None:
        limits[resource.RLIMIT_NPROC] = processes
    for kind, wanted in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (value, value))


def filter_system_calls(program: bytes) -> None:
    """Installs a seccomp filter: the BPF instructions `program`, eight bytes each."""
    instructions = ctypes.create_string_buffer(program, len(program))

    class SockFprog(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    prog = SockFprog(len(program) // 8, ctypes.addressof(instructions))
    call("prctl", PR_SET_SECCOMP, 2, ctypes.byref(prog), 0, 0)
