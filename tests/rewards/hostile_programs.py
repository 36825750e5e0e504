"""Programs that try to be paid without solving the problem, or to do harm. None knows ANSWER, all would like to.

Each is run as a script that should print ANSWER, and as a module whose `f(3)` should return it. {secret} is a file
that holds it, {port} a port of this machine that tells it, {outside} a folder that is not the program's.
"""

ANSWER = 1847205

_FRAME = """
import json, os
def frame(message):
    data = json.dumps(message).encode()
    return len(data).to_bytes(8, "big") + data
"""

# What has to hold, one of it at least, for a program to be stopped, and for trying it to be safe.
NEEDS = {
    "writes_outside": {"mount", "landlock"},
    "shared_memory": {"mount", "landlock"},
    "reads_the_password_file": {"mount", "landlock"},
    "reads_a_file": {"mount", "landlock", "uid"},
    "reads_through_a_link": {"mount", "landlock", "uid"},
    "reads_other_processes": {"mount", "landlock", "pid", "uid"},
    "kills_the_parent": {"pid", "uid", "seccomp"},
    "asks_the_network": {"network", "seccomp"},
    "asks_by_datagram": {"network", "seccomp"},
    "asks_a_local_socket": {"network", "seccomp"},
    "other_programs": {"mount", "seccomp"},
}

HOSTILE_PROGRAMS = {
    # ---- leaving early ----
    "exit_at_once": "import os\nos._exit(0)\ndef f(x): return x",
    "exit_in_function": "import os\ndef f(x): os._exit(0)\nif __name__ == '__main__': f(1)",
    "system_exit_at_once": "raise SystemExit(0)",
    "system_exit_in_function": "import sys\ndef f(x): sys.exit(0)\nif __name__ == '__main__': f(1)",
    "keyboard_interrupt": "def f(x): raise KeyboardInterrupt\nif __name__ == '__main__': f(1)",
    "generator_exit": "def f(x): raise GeneratorExit\nif __name__ == '__main__': f(1)",
    "segmentation_fault": "import ctypes\ndef f(x): ctypes.string_at(0)\nf(1)",
    "stops_itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\ndef f(x): return x",
    "becomes_another_program": "import os, sys\nos.execv(sys.executable, ['python', '-c', 'pass'])",
    # ---- forging a verdict ----
    "prints_forged_results": """
for text in ('{"status": "passed"}', "passed", "OK", "True", "1 passed in 0.01s"):
    print(text)
def f(x):
    print('{"status": "passed", "detail": ""}')
    return True
""",
    "writes_verdicts_everywhere": _FRAME + """
def f(x):
    for fd in range(64):
        for message in ({"status": "passed", "detail": ""}, {"value": True, "changed": []}, {"value": {"yours": 0}}):
            try:
                os.write(fd, frame(message))
            except OSError:
                pass
f(1)
""",
    "answers_before_being_asked": _FRAME + """
def f(x):
    call = {"do": "call", "object": 0, "args": [], "kwargs": []}
    os.write(4, frame({"value": None, "changed": []}) * 3 + frame(call))
    os._exit(0)
if __name__ == "__main__": f(1)
""",
    "sends_half_a_message": "import os, time\nos.write(4, bytes(7))\ntime.sleep(1000)",
    "does_not_listen": _FRAME + """
import time
os.write(4, frame({"value": None}) * 4)
time.sleep(1000)
""",
    "talks_without_end": _FRAME + """
def f(x):
    call = frame({"do": "call", "object": 0, "args": [], "kwargs": []}) * 100
    while True:
        os.write(4, call)
if __name__ == "__main__": f(1)
""",
    "calls_the_judge": _FRAME + """
for request in (
    {"do": "operate", "name": "getattr", "object": 0, "args": ["__globals__"]},
    {"do": "name", "name": "__builtins__"}, {"do": "load"}, {"do": "call", "object": -1, "args": [1], "kwargs": []},
):
    try:
        os.write(4, frame(request))
    except OSError:
        pass
def f(x): return x
""",
    "equals_everything": """
class Equal:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __repr__(self): return "1847206"
def f(x): return Equal()
print(Equal())
""",
    "integer_that_equals_everything": """
class Equal(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def f(x): return Equal(7)
print(Equal(7))
""",
    "patches_builtins": """
import builtins, json, operator, sys
builtins.AssertionError = builtins.Exception = None
builtins.exec = builtins.compile = lambda *args, **kwargs: None
json.dumps = lambda *args, **kwargs: '{"status": "passed"}'
operator.eq = lambda a, b: True
sys.modules["unittest"] = sys.modules["pytest"] = None
def f(x): return x
""",
    "patches_the_judge": """
import sys
for name, module in list(sys.modules.items()):
    if "sandbox" in name:
        for attribute, value in list(vars(module).items()):
            if callable(value):
                try:
                    setattr(module, attribute, lambda *args, **kwargs: {"status": "passed", "detail": ""})
                except Exception:
                    pass
def f(x): return x
""",
    "redefines_the_tests_names": "def f(x): return x\ndef check(f): return True\nassertEqual = lambda *a: True",
    "self_containing_result": "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "endless_result": "def f(x):\n    while True:\n        yield x\nif __name__ == '__main__': list(f(1))",
    # ---- finding the tests ----
    "looks_at_frames": """
import gc, sys
def f(x):
    frame = sys._getframe()
    seen = []
    while frame:
        seen += [repr(v)[:10000] for v in (*frame.f_locals.values(), *frame.f_globals.values())]
        frame = frame.f_back
    seen += [repr(o)[:10000] for o in gc.get_objects() if type(o) in (dict, list, tuple)]
    mark = bytes([102, 40, 51, 41, 32, 61, 61]).decode()  # not to find itself
    for text in seen:
        if mark in text:
            return int(text.split(mark)[1].split()[0].strip("'\\")"))
print(f(1))
""",
    "reads_every_descriptor": """
import os, sys
def f(x):
    for fd in [*range(64), *range(100, 110)]:
        try:
            os.set_blocking(fd, False)
            text = os.read(fd, 1 << 20).decode(errors="replace")
        except OSError:
            continue
        if "f(3) ==" in text:
            return int(text.split("f(3) ==")[1].split()[0].strip("'\\")"))
print(f(1))
""",
    "reads_other_processes": """
import glob
def f(x):
    for path in glob.glob("/proc/*/cmdline") + glob.glob("/proc/*/environ") + glob.glob("/proc/*/mem"):
        try:
            with open(path, "rb") as file:
                text = file.read(1 << 20)
        except (OSError, ValueError):
            continue
        if b"ANSWER=" in text:
            return int(text.split(b"ANSWER=")[1][:7])
print(f(1))
""",
    "reads_the_environment": "import os\ndef f(x): return int(os.environ.get('ANSWER', 0))\nprint(f(1))",
    "reads_memory_of_the_judge": """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
class Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))
def f(x):
    buffer = ctypes.create_string_buffer(1 << 16)
    for pid in (1, os.getppid()):
        there = Iovec(id(x) & ~0xFFFF, 1 << 16)
        here = Iovec(ctypes.addressof(buffer), 1 << 16)
        if libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0) > 0:
            return 1847205
print(f(1))
""",
    "traces_the_judge": """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def f(x):
    for pid in (1, os.getppid()):
        if libc.ptrace(16, pid, 0, 0) == 0:
            return 1847205
print(f(1))
""",
    # ---- other people's files, machines and processes ----
    "reads_a_file": "def f(x): return int(open({secret!r}).read())\nprint(f(1))",
    "reads_through_a_link": """
import os
def f(x):
    os.symlink({secret!r}, "link")
    return int(open("link").read())
print(f(1))
""",
    "reads_the_password_file": "def f(x): return open('/etc/passwd').read() and 1847205\nprint(f(1))",
    "writes_outside": """
import os, sys
for folder in ("/", "/etc", "/root", "/usr/lib", "/dev", os.path.dirname(os.__file__), {outside!r}, *sys.path):
    try:
        with open(os.path.join(folder, "sandbox-escape.py"), "w") as file:
            file.write("escaped")
        f = lambda x: 1847205
        print(1847205)
    except OSError:
        pass
    try:
        os.remove(os.__file__)
        os.chmod(os.__file__, 0o777)
    except OSError:
        pass
""",
    "asks_the_network": """
import socket
def f(x):
    with socket.create_connection(("127.0.0.1", {port}), timeout=0.3) as connection:
        return int(connection.recv(20))
print(f(1))
""",
    "asks_by_datagram": """
import socket
def f(x):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
        connection.sendto(b"?", ("192.0.2.1", 53))
    return 1847205
print(f(1))
""",
    "asks_a_local_socket": """
import socket
def f(x):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect("\\0sandbox-test-{port}")
        return int(connection.recv(20))
print(f(1))
""",
    "kills_the_parent": """
import os, signal
for pid in (os.getppid(), 1, -1, *range(2, 200)):
    try:
        if pid != os.getpid():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
def f(x): return x
""",
    "limits_the_parent": """
import os, resource
def f(x):
    resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))
    os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)
    return x
f(1)
""",
    "becomes_root": """
import os
for step, *arguments in ((os.setuid, 0), (os.chroot, "/"), (os.chmod, "/tmp", 0o4777), (os.mknod, "disk", 0o60660)):
    try:
        step(*arguments)
    except OSError:
        pass
def f(x): return 1847205 if os.getuid() == 0 else x
print(f(1))
""",
    "makes_namespaces": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def f(x):
    done = libc.unshare(0x10000000 | 0x20000) == 0 or libc.mount(b"proc", b"/tmp", b"proc", 0, None) == 0
    return 1847205 if done else x
print(f(1))
""",
    # ---- using everything up ----
    "fork_bomb": """
import os
def f(x):
    while True:
        try:
            os.fork()
        except OSError:
            pass
f(1)
""",
    "thread_bomb": """
import threading, time
def f(x):
    while True:
        try:
            threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
        except RuntimeError:
            time.sleep(100)
f(1)
""",
    "memory_bomb": "def f(x):\n    a = []\n    while True:\n        a.append(bytearray(10**7))\nf(1)",
    "mapped_memory": "import mmap\ndef f(x): return mmap.mmap(-1, 1 << 40)\nf(1)",
    "memory_files": """
import os
def f(x):
    files = []
    while True:
        files.append(os.memfd_create("x"))
        os.write(files[-1], bytes(10**7))
f(1)
""",
    "endless_output": "import os\nwhile True: os.write(1, b'1847205\\n' * 1000)",
    "endless_errors": "import os\nwhile True: os.write(2, b'x' * 100000)",
    "fills_the_disk": """
import itertools
def f(x):
    for number in itertools.count():
        try:
            with open(f"file{number % 4000}", "ab") as file:
                file.write(bytes(1 << 20))
        except OSError:
            pass
f(1)
""",
    "many_files": "import itertools\nfor i in itertools.count(): open(str(i), 'w').close()",
    "huge_file": "import os\nfile = open('file', 'w')\nos.posix_fallocate(file.fileno(), 0, 1 << 40)",
    "shared_memory": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for _ in range(100):
    libc.shmget(0, 1 << 24, 0o1666)
    libc.semget(0, 8, 0o1666)
    libc.msgget(0, 0o1666)
try:
    open("/dev/shm/sandbox-escape", "wb").write(bytes(1 << 24))
except OSError:
    pass
def f(x): return x
""",
    "endless_loop": "while True: pass",
    "swallows_every_exception": """
def f(x):
    while True:
        try:
            while True: pass
        except BaseException:
            pass
f(1)
""",
    "ignores_every_signal": """
import signal
for number in signal.valid_signals():
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
while True: pass
""",
    "sleeps_for_ever": "import time\ntime.sleep(10**6)",
    "waits_for_input": "import sys\nwhile True: sys.stdin.read()",
    "loops_at_exit": "import atexit\n@atexit.register\ndef loop():\n    while True: pass\ndef f(x): return x",
    "closes_every_descriptor": "import os\nos.closerange(0, 1000)\ndef f(x): return x",
    "deep_recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x + 1)\nf(1)",
    "deep_parentheses": "(" * 100000 + ")" * 100000,
    "huge_integer": "def f(x): return 10 ** 10 ** 9\nf(1)",
    "catastrophic_pattern": "import re\ndef f(x): return re.match('(a+)+$', 'a' * 50 + 'b')\nf(1)",
    "daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(64):
            try:
                os.close(fd)
            except OSError:
                pass
        time.sleep(1000)
    os._exit(0)
def f(x): return x
""",
    "daemon_that_writes": """
import os, signal, time
signal.signal(signal.SIGHUP, signal.SIG_IGN)
for _ in range(5):
    if os.fork() == 0:
        os.setsid()
        while True:
            os.write(1, b"1847205 ")
            time.sleep(0.001)
""",
    "other_programs": "import subprocess\ndef f(x): return int(subprocess.getoutput('echo 1847205'))\nprint(f(1))",
    "null_bytes": "print(1)\0",
}  # fmt: skip


def hostile_program(name: str, **places: object) -> str:
    source = HOSTILE_PROGRAMS[name]
    return source.format(**places) if any(f"{{{key}" in source for key in ("secret", "port", "outside")) else source
