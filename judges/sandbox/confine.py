"""Gives up what a process may do, for good: before it runs what a model wrote. Standard library alone; Linux.

What holds afterwards, also for root, in containers and without privileges:
- files: reading only in the interpreter's, its libraries' and the system's folders (Landlock); writing only in one
  folder. Modes, owners, times and attributes of files cannot be changed at all (seccomp).
- network: no socket, but for pairs that are connected to each other for good (seccomp).
- processes: none is started, no program is run, nobody else gets a signal, is traced, read or moved to other cores;
  threads may be (seccomp).
- resources: CPU time, memory, size of a file, open files (rlimits), which cannot be raised again.
- privileges: no capability, none to be had.

It is not a virtual machine: it shares the kernel, so a hole in the kernel is a hole in it. It may fill its folder with
many files of the allowed size for as long as its CPU time lasts.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterable

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38

# -- Landlock (Linux 5.13): which files ------------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14
_FILE_RIGHTS = 1 | _WRITE_FILE | _READ_FILE | _TRUNCATE | 1 << 15
"""Rights that a rule for a single file may name: execute, write, read, truncate, ioctl."""
_OWN_FOLDER = _WRITE_FILE | _READ_FILE | _READ_DIR | _TRUNCATE | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 12 | 1 << 13
"""Also to remove and make files, folders and links, and to move them between folders."""
_HANDLED = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
"""Rights known to each version of the interface; later ones know 1 << 15 as well."""
_SYSTEM = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/proc/cpuinfo",
           "/proc/meminfo", "/sys/devices/system/cpu")  # fmt: skip

# -- seccomp: which system calls ---------------------------------------------------------------------

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Refused: name -> number on (x86_64, aarch64); None where there is no such call.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "socket": (41, 198),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "unshare": (272, 97), "setns": (308, 268),
    "io_uring_setup": (425, 425), "bpf": (321, 280), "userfaultfd": (323, 282), "perf_event_open": (298, 241),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "shmget": (29, 194), "shmat": (30, 196),
    "shmctl": (31, 195), "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192),
    "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180),
    "mq_unlink": (241, 181), "sched_setaffinity": (203, 122), "sched_setparam": (142, 118), "ioprio_set": (251, 30),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53),
    "fchmodat2": (452, 452), "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "removexattrat": (466, 466),
    "file_setattr": (469, 469), "truncate": (76, 45), "setrlimit": (160, 164),
    "setpriority": (141, 140), "sched_setscheduler": (144, 119), "sched_setattr": (314, 274), "mount": (165, 40),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "chroot": (161, 51), "pivot_root": (155, 41),
}  # fmt: skip
# Answered as by a kernel that has not got them, so that the C library takes the older call.
_UNKNOWN = {"clone3": (435, 435), "openat2": (437, 437)}
_CLONE, _OPEN, _OPENAT, _KILL, _TGKILL, _PRLIMIT = (56, 220), (2, None), (257, 56), (62, 129), (234, 131), (302, 261)
_CAPSET, _SOCKETPAIR = (126, 91), (53, 199)
# Calls that ask for a signal to whomever: number, argument that says what is asked, its values.
_OWNERS: list[tuple[tuple[int, int], int, tuple[int, ...]]] = [
    ((72, 25), 1, (8, 15)),  # fcntl: F_SETOWN, F_SETOWN_EX
    ((16, 29), 1, (0x8901, 0x8902)),  # ioctl: FIOSETOWN, SIOCSPGRP
]
_CLONE_THREAD = 0x10000
_LOAD, _AND, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_SET, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERROR, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_NO = _RETURN, 0, 0, _ERROR | errno.EPERM
_YES = _RETURN, 0, 0, _ALLOW

Instruction = tuple[int, int, int, int]
"""Of a BPF program: code, instructions to skip if true, if false, operand."""


def missing() -> str | None:
    """What this machine lacks for `confine`; None if nothing."""
    if platform.system() != "Linux" or platform.machine() not in _ARCHITECTURES:
        return f"it needs Linux on x86_64 or aarch64, not {platform.system()} on {platform.machine()}"
    if _landlock_version() < 1:
        return "it needs a Linux kernel with Landlock (5.13 or newer, lsm=...,landlock)"
    return None


def confine(folder: str, *, seconds: int, memory: int, file_size: int, readable: Iterable[str]) -> None:
    """For the calling process, which must have one thread. Raises OSError where the kernel does not play along.

    folder: the one where it may write; seconds: of CPU time, then it is killed; memory: bytes of address space on top
    of what it has; file_size: bytes of a file it writes; readable: further files and folders that it may read.
    """
    _limit(seconds, memory, file_size)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_DUMPABLE, 0)
    _restrict_files(folder, readable)
    header, nothing = struct.pack("=II", 0x20080522, 0), bytes(24)
    _syscall(_number(_CAPSET), header, nothing)
    _install(_program())


def end_with_parent() -> None:
    """Kills the calling process when its parent ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit(seconds: int, memory: int, file_size: int) -> None:
    with open("/proc/self/statm") as file:
        own = int(file.read().split()[0]) * resource.getpagesize()
    for limit, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, own + memory),
        (resource.RLIMIT_FSIZE, file_size),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        resource.setrlimit(limit, (value, value))


def _landlock_version() -> int:
    return int(_LIBC.syscall(_CREATE_RULESET, None, 0, 1))


def _restrict_files(folder: str, readable: Iterable[str]) -> None:
    version = _landlock_version()
    handled = _HANDLED.get(version, (1 << 16) - 1)
    # Of version 6 on also: no signal and no abstract socket to anybody outside.
    attributes = struct.pack("=QQQ", handled, 0, 3 if version >= 6 else 0)[: 24 if version >= 6 else 8]
    ruleset = _syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    paths = dict.fromkeys((*_SYSTEM, sys.prefix, sys.base_prefix, *readable), _READ_FILE | _READ_DIR)
    paths |= {folder: _OWN_FOLDER, "/dev/null": _READ_FILE | _WRITE_FILE}
    for path, rights in paths.items():
        if os.path.exists(path):
            _allow(ruleset, path, rights & handled)
    _syscall(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", rights if os.path.isdir(path) else rights & _FILE_RIGHTS, opened)
        _syscall(_ADD_RULE, ruleset, 1, rule, 0)
    finally:
        os.close(opened)


def _program() -> list[Instruction]:
    """Looks at architecture, number and arguments of a system call; what no line refuses is allowed."""
    architecture = _ARCHITECTURES[platform.machine()]
    program: list[Instruction] = [
        (_LOAD, 0, 0, 4),
        (_JUMP_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, 0),
    ]
    if platform.machine() == "x86_64":
        program += [(_JUMP_AT_LEAST, 0, 1, 0x40000000), _NO]  # the x32 numbers of the same calls
    for numbers in _REFUSED.values():
        program += _case(numbers, [_NO])
    for numbers in _UNKNOWN.values():
        program += _case(numbers, [(_RETURN, 0, 0, _ERROR | errno.ENOSYS)])
    program += _case(_CLONE, [_argument(0), (_JUMP_SET, 0, 1, _CLONE_THREAD), _YES, _NO])
    # To itself alone, and not SIGKILL: that is how it is told that somebody else ended it.
    for numbers, sent in ((_KILL, 1), (_TGKILL, 2)):
        other = [_argument(sent), (_JUMP_EQUAL, 1, 0, signal.SIGKILL), _YES, _NO]
        program += _case(numbers, [_argument(0), (_JUMP_EQUAL, 0, 3, os.getpid()), *other])
    for numbers, index, values in _OWNERS:
        jumps = [(_JUMP_EQUAL, len(values) - place, 0, value) for place, value in enumerate(values)]
        program += _case(numbers, [_argument(index), *jumps, _YES, _NO])
    # Of AF_UNIX and SOCK_STREAM: other pairs can be pointed at sockets outside.
    stream = [_argument(1), (_AND, 0, 0, 0xF), (_JUMP_EQUAL, 0, 1, 1), _YES, _NO]
    program += _case(_SOCKETPAIR, [_argument(0), (_JUMP_EQUAL, 0, 4, 1), *stream])
    # To read limits, not to set them: no third argument, in both halves.
    no_third = [_argument(2), (_JUMP_EQUAL, 0, 3, 0), (_LOAD, 0, 0, 36), (_JUMP_EQUAL, 0, 1, 0), _YES, _NO]
    program += _case(_PRLIMIT, no_third)
    # Opened to read and truncated: older versions of Landlock take that for reading.
    emptied = os.O_TRUNC | os.O_ACCMODE
    for numbers, flags in ((_OPEN, 1), (_OPENAT, 2)):
        program += _case(numbers, [_argument(flags), (_AND, 0, 0, emptied), (_JUMP_EQUAL, 0, 1, os.O_TRUNC), _NO, _YES])
    return [*program, _YES]


def _case(numbers: tuple[int | None, int | None], then: list[Instruction]) -> list[Instruction]:
    """`then`, which must return, if the call has this number on this machine."""
    number = _number(numbers)
    return [] if number is None else [(_JUMP_EQUAL, 0, len(then), number), *then]


def _argument(index: int) -> Instruction:
    """Loads the lower half of a system call's argument."""
    return (_LOAD, 0, 0, 16 + 8 * index)


def _number(numbers: tuple[int | None, int | None]) -> int | None:
    return numbers[list(_ARCHITECTURES).index(platform.machine())]


def _install(program: list[Instruction]) -> None:
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in program))
    head = struct.pack("@HxxxxxxQ", len(program), ctypes.addressof(code))
    _prctl(_PR_SET_SECCOMP, 2, head)


def _prctl(option: int, *values: int | bytes) -> None:
    arguments = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in values]
    arguments += [ctypes.c_ulong(0)] * (4 - len(arguments))
    if _LIBC.prctl(option, *arguments) != 0:
        _fail()


def _syscall(*arguments: int | bytes | None) -> int:
    result = int(_LIBC.syscall(*[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]))
    if result < 0:
        _fail()
    return result


def _fail() -> None:
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code))
