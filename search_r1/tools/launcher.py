"""Takes rights from its own process, then runs a program there: the child of `sandbox.py`.

It is run by its path, so it can import nothing of this package, and it imports little else: each
call waits for that. For the same reason it speaks in Python literals rather than in JSON. Its stdin
is a line with the setup, and the program. The first line that it writes says which parts of the
sandbox cannot be had, and why. All that follows is the program's own, which by then can no longer
write that line.
"""

import _ast  # ast itself takes longer to import than the rest
import ctypes
import errno
import os
import resource
import struct
import sys
from types import ModuleType

EXCEPTION, MEMORY, DISK = 1, 77, 78
"""Exit codes: the program raised, had no memory left, could write no more."""
FRAMES = 4
"""Frames of a traceback that are shown: the innermost."""
MOST_OF_TRACEBACK = 4000
"""Characters of a traceback: a message may be as long as the program likes."""
NAME = "<code>"
"""The file of the program in tracebacks."""

LANDLOCK_LEAST = 3
"""Version of Landlock that is asked for: the first that refuses to truncate files."""
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = (1 << bit for bit in range(4))
MAKE_SOCK_FIFO_BLOCK_CHAR = 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11
TRUNCATE, IOCTL_DEV = 1 << 14, 1 << 15
READ = EXECUTE | READ_FILE | READ_DIR
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV

CREATE_RULESET, ADD_RULE, RESTRICT_SELF, CLOSE_RANGE = 444, 445, 446, 436
"""Numbers of system calls, the same on all machines."""
SET_PDEATHSIG, SET_SECCOMP, CAPBSET_DROP, SET_NO_NEW_PRIVS = 1, 22, 24, 38
SIGKILL, MODE_FILTER, CAPABILITIES_3 = 9, 2, 0x20080522

Word = int | bytes | None
"""An argument of a system call: a number, bytes to point at, or nowhere."""


class Kernel:
    """System calls that the standard library does not have."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.syscall.restype = ctypes.c_long

    def call(self, number: int, *arguments: Word) -> int:
        """Result of a system call, -1 for an error."""
        return self.libc.syscall(ctypes.c_long(number), *map(word, arguments))

    def prctl(self, option: int, *arguments: Word) -> int:
        """Result of prctl(2), -1 for an error."""
        filled = [*arguments, 0, 0, 0, 0][:4]
        return self.libc.prctl(ctypes.c_int(option), *map(word, filled))

    @staticmethod
    def error() -> str:
        return os.strerror(ctypes.get_errno())


def word(value: Word) -> object:
    """An argument as ctypes passes it: a number fills a whole register."""
    return ctypes.c_long(value) if isinstance(value, int) else value


def main() -> int:
    """Confines the process, says what is missing, runs the program, returns the exit code."""
    setup: dict = eval(sys.stdin.buffer.readline())  # its parent's; the program comes after it
    source = sys.stdin.buffer.read().decode("utf-8")
    missing = confine(setup)
    sys.stdout.write(f"{missing!r}\n")
    if set(missing) - set(setup["allow_without"]):
        return EXCEPTION
    sys.path += setup["packages"]
    return run(source)


def confine(setup: dict) -> dict[str, str]:
    """Gives up all that a program needs not; what could not be given up, with the reason."""
    kernel = Kernel()
    if kernel.call(CLOSE_RANGE, 3, 0x7FFFFFFF, 0) < 0:
        os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    kernel.prctl(SET_PDEATHSIG, SIGKILL)
    if os.getppid() != setup["parent"]:  # it was gone before its death could be heard of
        sys.exit(EXCEPTION)
    set_limits(setup["limits"])
    drop_capabilities(kernel)
    kernel.prctl(SET_NO_NEW_PRIVS, 1)
    problems = {
        "landlock": restrict_files(kernel, setup["readable"], setup["devices"], setup["folder"]),
        "seccomp": restrict_calls(kernel, setup["filter"]),
    }
    return {part: problem for part, problem in problems.items() if problem}


def set_limits(limits: dict[str, int]) -> None:
    """Sets resource limits by their names, no higher than they may be."""
    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # At the first of two limits of time comes a signal that says why, at the second SIGKILL.
        soft = most - 1 if kind == resource.RLIMIT_CPU else most
        resource.setrlimit(kind, (soft, most))


def drop_capabilities(kernel: Kernel) -> None:
    """Makes root an ordinary user that owns root's files."""
    for capability in range(64):
        kernel.prctl(CAPBSET_DROP, capability)
    header = struct.pack("Ii", CAPABILITIES_3, 0)
    kernel.libc.capset(header, bytes(24))


def restrict_files(
    kernel: Kernel, readable: list[str], devices: list[str], folder: str
) -> str | None:
    """Leaves reading in some places and writing in the folder; a problem, or None (Landlock)."""
    version = kernel.call(CREATE_RULESET, None, 0, 1)
    if version <= 0:
        return f"this kernel has no Landlock ({kernel.error()})"
    handled = (1 << 13) - 1
    handled |= (1 << 13) * (version >= 2) | TRUNCATE * (version >= 3) | IOCTL_DEV * (version >= 5)
    tcp, signals_and_sockets = 3 * (version >= 4), 3 * (version >= 6)
    attributes = struct.pack("QQQ", handled, tcp, signals_and_sockets)
    rules = kernel.call(CREATE_RULESET, attributes, len(attributes), 0)
    if rules < 0:
        return f"Landlock refuses a set of rules ({kernel.error()})"
    within = handled & ~EXECUTE & ~MAKE_SOCK_FIFO_BLOCK_CHAR & ~IOCTL_DEV
    for path in readable:
        add_rule(kernel, rules, path, READ)
    for path in devices:
        add_rule(kernel, rules, path, READ_FILE | WRITE_FILE)
    add_rule(kernel, rules, folder, within)
    if kernel.call(RESTRICT_SELF, rules, 0) < 0:
        return f"Landlock refuses to restrict the process ({kernel.error()})"
    os.close(rules)
    if version < LANDLOCK_LEAST:
        return f"this kernel has version {version} of Landlock, and {LANDLOCK_LEAST} is needed"
    return None


def add_rule(kernel: Kernel, rules: int, path: str, rights: int) -> None:
    """Allows something below a path, or nothing where there is none."""
    try:
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    if not os.path.isdir(path):
        rights &= OF_FILES
    kernel.call(ADD_RULE, rules, 1, struct.pack("=Qi", rights, beneath), 0)
    os.close(beneath)


def restrict_calls(kernel: Kernel, program: str | None) -> str | None:
    """Sets the filter of system calls; a problem, or None (seccomp)."""
    if program is None:
        return "there is no filter of system calls for this machine"
    operations = ctypes.create_string_buffer(bytes.fromhex(program))
    head = struct.pack("HP", len(program) // 16, ctypes.addressof(operations))
    if kernel.prctl(SET_SECCOMP, MODE_FILTER, head) < 0:
        return f"the kernel refuses a filter of system calls ({kernel.error()})"
    return None


def run(source: str) -> int:
    """Runs the program as a notebook would; the exit code."""
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = [NAME]
    sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    vars(module)["exit"] = vars(module)["quit"] = sys.exit
    try:
        execute(source, vars(module))
    except SystemExit as error:
        if error.code in (None, 0):
            return 0
        sys.stderr.write(f"SystemExit: {error.code}\n")
        return EXCEPTION
    except BaseException as error:
        return report(error, source)
    return 0


def execute(source: str, names: dict[str, object]) -> None:
    """Runs the program, and shows the value of an expression that it ends with."""
    tree = compile(source, NAME, "exec", flags=_ast.PyCF_ONLY_AST, dont_inherit=True)
    assert isinstance(tree, _ast.Module)
    ends_with_value = tree.body and isinstance(tree.body[-1], _ast.Expr)
    last = [tree.body.pop()] if ends_with_value else []
    exec(compile(tree, NAME, "exec", dont_inherit=True), names)
    exec(compile(_ast.Interactive(last), NAME, "single", dont_inherit=True), names)


def report(error: BaseException, source: str) -> int:
    """Writes the end of the traceback; the exit code."""
    if isinstance(error, MemoryError):
        # Its frames hold what filled the memory.
        error.__traceback__ = None
        sys.stderr.write("MemoryError\n")
        return MEMORY
    sys.stderr.write(explained(error, source))
    full = isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EFBIG,
        errno.EDQUOT,
    )
    return DISK if full else EXCEPTION


def explained(error: BaseException, source: str) -> str:
    """The end of the program's traceback, or its last word where not even that can be had."""
    try:
        import linecache
        import traceback

        linecache.cache[NAME] = (len(source), None, source.splitlines(True), NAME)
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        shown = traceback.TracebackException(type(error), error, trace, limit=-FRAMES)
        return "".join(shown.format(chain=False))[-MOST_OF_TRACEBACK:]
    except Exception:  # out of files, of memory, of stack, or an error that cannot be read
        return f"{type(error).__name__}\n"


if __name__ == "__main__":
    sys.exit(main())
