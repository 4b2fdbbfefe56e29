"""The filter of system calls (seccomp) in which programs of the tool `python` run.

It takes away the network, other processes, and what reaches outside without naming a path that
Landlock could refuse. A call that it does not know is answered as by a kernel that has it not.
"""

import errno
import struct
from collections.abc import Sequence
from dataclasses import dataclass

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""By `platform.machine()`: the column of the tables below, and the kernel's name for the machine
(AUDIT_ARCH)."""
LAST_KNOWN = 462
"""mseal of Linux 6.10. Calls up to it were looked through; further ones are refused."""

Numbers = tuple[int | None, int | None]

NETWORK: dict[str, Numbers] = {
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
}
PROCESSES: dict[str, Numbers] = {
    "fork": (57, None),
    "vfork": (58, None),
    "setsid": (112, 157),
    "setpgid": (109, 154),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "perf_event_open": (298, 241),
}
MEMORY_OUTSIDE: dict[str, Numbers] = {
    # What RLIMIT_AS does not count, and what outlives a process.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "semget": (64, 190),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "semctl": (66, 191),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
}
ADMINISTRATION: dict[str, Numbers] = {
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "keyctl": (250, 219),
    "request_key": (249, 218),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "fanotify_init": (300, 262),
    "inotify_init": (253, None),  # the names of files outside
    "inotify_init1": (294, 26),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "syslog": (103, 116),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "personality": (135, 92),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "vhangup": (153, 58),
}
FEIGNED: dict[str, Numbers] = {
    # Landlock does not refuse these to files outside. They succeed without effect, so that
    # `shutil.copy` and the unpacking of an archive go on working.
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
}
UNKNOWN: dict[str, Numbers] = {"clone3": (435, 435)}
"""Its flags cannot be looked at; without it, the C library takes `clone`."""

LOAD, AND, EQUAL, GREATER, RETURN = 0x20, 0x54, 0x15, 0x25, 0x06
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
NUMBER_AT, MACHINE_AT = 0, 4

Operation = tuple[int, int, int, int]


@dataclass(frozen=True)
class Check:
    """Looks at a word of the arguments."""

    at: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF


def argument(index: int) -> int:
    """Where the low word of an argument stands (both machines are little-endian)."""
    return 16 + 8 * index


def filter_program(machine: str, pid: int) -> bytes | None:
    """The filter for the process `pid`, as the kernel takes it; None for an unknown machine."""
    if machine not in MACHINES:
        return None
    column, name = MACHINES[machine]
    operations: list[Operation] = [
        (LOAD, 0, 0, MACHINE_AT),
        (EQUAL, 1, 0, name),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER_AT),
        (GREATER, 0, 1, LAST_KNOWN),
        (RETURN, 0, 0, ERRNO | errno.ENOSYS),
    ]
    refused = NETWORK | PROCESSES | MEMORY_OUTSIDE | ADMINISTRATION
    for table, answer in ((refused, errno.EPERM), (FEIGNED, 0), (UNKNOWN, errno.ENOSYS)):
        for numbers in table.values():
            if (number := numbers[column]) is not None:
                operations += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ERRNO | answer)]
    for numbers, checks in allowed_if(pid):
        operations += when(numbers[column], checks, ALLOW, ERRNO | errno.EPERM)
    for numbers, check in refused_if():
        operations += when(numbers[column], [check], ERRNO | errno.EPERM, ALLOW)
    operations.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("HBBI", *operation) for operation in operations)


def allowed_if(pid: int) -> list[tuple[Numbers, list[Check]]]:
    """Calls that are refused unless their arguments pass."""
    itself = Check(argument(0), (0, pid))
    thread, unix, stream = 0x10000, 1, 1
    return [
        ((56, 220), [Check(argument(0), (thread,), mask=thread)]),  # clone: no new process
        ((62, 129), [Check(argument(0), (pid,))]),  # kill
        ((234, 131), [Check(argument(0), (pid,))]),  # tgkill, by which a program aborts
        ((302, 261), [itself]),  # prlimit64
        ((203, 122), [itself]),  # sched_setaffinity
        ((142, 118), [itself]),  # sched_setparam
        ((144, 119), [itself]),  # sched_setscheduler
        ((314, 274), [itself]),  # sched_setattr
        # socketpair, which asyncio takes. Only of connected streams: a datagram could be sent to
        # another socket of the machine.
        ((53, 199), [Check(argument(0), (unix,)), Check(argument(1), (stream,), mask=0xF)]),
        # sendto without an address
        ((44, 206), [Check(argument(4), (0,)), Check(argument(4) + 4, (0,))]),
    ]


def refused_if() -> list[tuple[Numbers, Check]]:
    """Calls that are allowed unless their arguments ask for one of a few things."""
    set_owner, set_signal, set_owner_ex = 8, 10, 15
    death_signal, dumpable = 1, 4
    return [
        # fcntl, ioctl: who gets a signal when a file can be read; typing into a terminal
        ((72, 25), Check(argument(1), (set_owner, set_signal, set_owner_ex))),
        ((16, 29), Check(argument(1), (0x8901, 0x8902, 0x5412, 0x541C))),
        # prctl: outliving the parent, hiding from it
        ((157, 167), Check(argument(0), (death_signal, dumpable))),
    ]


def when(
    number: int | None, checks: Sequence[Check], passed: int, otherwise: int
) -> list[Operation]:
    """Answers a call by whether its arguments pass all checks."""
    if number is None:
        return []
    body: list[Operation] = []
    for check in checks:
        body += [(LOAD, 0, 0, check.at), (AND, 0, 0, check.mask)]
        left = len(check.values)
        for value in check.values:
            body.append((EQUAL, left, 0, value))
            left -= 1
        body.append((RETURN, 0, 0, otherwise))
    body.append((RETURN, 0, 0, passed))
    return [(LOAD, 0, 0, NUMBER_AT), (EQUAL, 0, len(body), number), *body]
