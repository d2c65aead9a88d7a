"""Run a command as systemd would run it by the unit: its user, its files, its limits and its system calls.

This is a program of its own, started by root. It makes a root directory in a mount namespace of its own, where all is
read-only but what the unit names, gives up every privilege, and executes the command. What the unit says is read from
the unit. Left to systemd, and seen under it by ``scripts/deb-check``: cgroups (devices, IP addresses, memory), the user
namespace, and the sandboxing options that are no more than one more filter of system calls.

In one point it is harder than systemd: a system call that the unit does not allow is the end of the process, and does
not fail. So who gets through has made none.

Use: confine.py [--as-another] [--notify ADDRESS] --state DIR --config FILE -- COMMAND...
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import shutil
import socket
import sys
from pathlib import Path

from unit import ROOT, Unit

LIBC = ctypes.CDLL(None, use_errno=True)
NEW_ROOT = Path("/mnt")
"""A directory that every Debian has. What is mounted there is seen by nobody else."""
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
CLONE_NEWNS = 0x00020000
CLONE_NAMESPACES = (0x00000080, 0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)
PR_SET_NO_NEW_PRIVS, PR_CAPBSET_DROP = 38, 24
HIDDEN = ("tmp", "home", "root")
OTHER_USER = 65534


def check(result: int, what: str) -> int:
    """Raise where a call of the C library failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def mount(source: str | Path, target: Path, kind: str, flags: int, data: str = "") -> None:
    """Mount [mount(2)]."""
    arguments = [os.fsencode(word) for word in (source, target)]
    check(LIBC.mount(*arguments, kind.encode(), ctypes.c_ulong(flags), data.encode()), f"mount {target}")


def bind(source: Path, target: Path, *flags: int) -> None:
    """Show a directory or a file at another place, and everything in it with the same flags."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    mount(source, target, "none", MS_BIND | MS_REC)
    inside = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for path in sorted({path for path in inside if Path(path).is_relative_to(target)}):
        mount("none", Path(path), "none", MS_BIND | MS_REMOUNT | sum(flags))


def apart() -> None:
    """Into a mount namespace that gives nothing back.

    A chroot has no mount point where that could be said, so the way leads out of it and back in.
    """
    check(LIBC.unshare(CLONE_NEWNS), "unshare")
    here = os.open("/", os.O_PATH | os.O_DIRECTORY)
    namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    check(LIBC.setns(namespace, CLONE_NEWNS), "setns")  # its root is the one of the machine
    mount("none", Path("/"), "none", MS_REC | MS_PRIVATE)
    os.fchdir(here)
    os.chroot(".")
    os.close(here)
    os.close(namespace)


def free_id(text: str) -> int:
    """A number that no line of /etc/passwd or /etc/group has."""
    taken = {field for line in text.splitlines() for field in line.split(":")}
    return next(number for number in range(899, 100, -1) if str(number) not in taken)


def make_users(etc: Path, unit: Unit) -> tuple[int, int, list[int]]:
    """Add the unit's user and groups to the copy of /etc; uid, gid and supplementary groups."""
    passwd, group = etc / "passwd", etc / "group"
    number = free_id(passwd.read_text() + group.read_text())
    with passwd.open("a") as file:
        file.write(f"{unit.one('User')}:x:{number}:{number}::/var/lib/stationkey:/usr/sbin/nologin\n")
    numbers = {line.split(":")[0]: int(line.split(":")[2]) for line in group.read_text().splitlines()}
    with group.open("a") as file:
        for name in (unit.one("Group"), *unit.words("SupplementaryGroups")):
            if name not in numbers:
                numbers[name] = number if name == unit.one("Group") else free_id(group.read_text() + str(number))
                file.write(f"{name}:x:{numbers[name]}:\n")
                file.flush()
    return number, numbers[unit.one("Group")], [numbers[name] for name in unit.words("SupplementaryGroups")]


def show_system() -> None:
    """What the machine has, to be read only [ProtectSystem=strict], without homes and /tmp."""
    for entry in sorted(Path("/").iterdir()):
        target = NEW_ROOT / entry.name
        if entry.is_symlink():
            target.symlink_to(entry.readlink())
        elif entry.is_dir() and entry.name not in {*HIDDEN, "proc", "run", "etc", NEW_ROOT.name}:
            bind(entry, target, MS_RDONLY, MS_NOSUID)
        elif entry.is_dir():
            target.mkdir()
    shutil.copytree("/etc", NEW_ROOT / "etc", symlinks=True, dirs_exist_ok=True)


def show_configuration(unit: Unit, config: Path, gid: int) -> None:
    """/etc/stationkey, with the rights that the package gives it."""
    directory = NEW_ROOT / "etc" / unit.one("ConfigurationDirectory")
    directory.mkdir(exist_ok=True)
    file = directory / "stationkey.toml"
    shutil.copy(config, file)
    for path, mode in ((directory, int(unit.one("ConfigurationDirectoryMode"), 8)), (file, 0o640)):
        os.chown(path, 0, gid)
        path.chmod(mode)


def show_writable(unit: Unit, state: Path, uid: int, gid: int) -> None:
    """Where the service may write, and may execute nothing [StateDirectory=, RuntimeDirectory=, NoExecPaths=]."""
    owned = {Path("/var/lib") / unit.one("StateDirectory"): state, Path("/run") / unit.one("RuntimeDirectory"): None}
    shared = {Path("/tmp"), Path("/var/tmp")}
    assert {Path(word) for word in unit.words("NoExecPaths")} == {*owned, *shared}
    mount("none", NEW_ROOT / "var/lib", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    for path, source in owned.items():
        inside = NEW_ROOT / path.relative_to("/")
        inside.mkdir(parents=True)
        mount(source or "none", inside, *(("none", MS_BIND) if source else ("tmpfs", 0)))
        mount("none", inside, "none", MS_BIND | MS_REMOUNT | MS_NOSUID | MS_NODEV | MS_NOEXEC)
        os.chown(inside, uid, gid)
        inside.chmod(int(unit.one("StateDirectoryMode" if source else "RuntimeDirectoryMode"), 8))
    for path in shared:
        mount("none", NEW_ROOT / path.relative_to("/"), "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=1777")
    mount("none", NEW_ROOT / "var/lib", "none", MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)


def show_program() -> None:
    """Python and the program, where they are in a directory that is hidden."""
    for path in {Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve(), Path(sys.prefix), ROOT / "src"}:
        if path.parts[1] in HIDDEN:
            bind(path, NEW_ROOT / path.relative_to("/"), MS_RDONLY, MS_NOSUID)


def make_root(unit: Unit, state: Path, config: Path) -> tuple[int, int, list[int]]:
    """The file system as the unit lets it be seen; uid, gid and supplementary groups of who will see it."""
    assert unit.one("ProtectSystem") == "strict"
    assert {unit.one(name) for name in ("ProtectHome", "PrivateTmp", "PrivateMounts")} == {"yes"}
    mount("none", NEW_ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    show_system()
    uid, gid, groups = make_users(NEW_ROOT / "etc", unit)
    show_configuration(unit, config, gid)
    show_writable(unit, state, uid, gid)
    show_program()
    for word in unit.words("InaccessiblePaths"):
        hidden = NEW_ROOT / word.removeprefix("-").lstrip("/")
        if hidden.exists():
            mount("none", hidden, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=000")
    processes = f"hidepid={unit.one('ProtectProc')},subset={unit.one('ProcSubset')}"
    mount("proc", NEW_ROOT / "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, processes)
    mount("none", NEW_ROOT, "none", MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chroot(NEW_ROOT)
    os.chdir("/")
    return uid, gid, groups


class Comparison(ctypes.Structure):
    """``struct scmp_arg_cmp`` of libseccomp."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


KILL, ALLOW = 0x80000000, 0x7FFF0000
EQUAL, MASKED_EQUAL, AT_LEAST = 4, 7, 5


def fail_with(number: int) -> int:
    """The action that lets a call fail."""
    return 0x00050000 | number


class Filter:
    """One filter of system calls [libseccomp]."""

    def __init__(self, otherwise: int) -> None:
        self._library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
        self._library.seccomp_init.restype = ctypes.c_void_p
        self._context = ctypes.c_void_p(self._library.seccomp_init(ctypes.c_uint32(otherwise)))

    def rule(self, action: int, name: str, *comparisons: tuple[int, int, int, int]) -> None:
        """What becomes of a call, where all comparisons hold. A call that this machine does not have is passed over."""
        number = self._library.seccomp_syscall_resolve_name(name.encode())
        if number < 0:
            return
        array = (Comparison * len(comparisons))(*(Comparison(*one) for one in comparisons))
        added = self._library.seccomp_rule_add_array(
            self._context, ctypes.c_uint32(action), number, len(comparisons), array
        )
        if added != 0:
            raise OSError(-added, f"no rule for {name}")

    def load(self) -> None:
        """From here on, for this process and all that come of it."""
        if (failed := self._library.seccomp_load(self._context)) != 0:
            raise OSError(-failed, "the filter cannot be loaded")


def filters(unit: Unit) -> list[Filter]:
    """The unit's, in the order in which they can be loaded."""
    assert {unit.one(name) for name in ("RestrictNamespaces", "MemoryDenyWriteExecute")} == {"yes"}
    memory = Filter(ALLOW)
    write, execute = 2, 4
    memory.rule(KILL, "mmap", (2, MASKED_EQUAL, write | execute, write | execute))
    for name in ("mprotect", "pkey_mprotect"):
        memory.rule(KILL, name, (2, MASKED_EQUAL, execute, execute))
    namespaces = Filter(ALLOW)
    for flag in CLONE_NAMESPACES:
        for name in ("clone", "unshare"):
            namespaces.rule(KILL, name, (0, MASKED_EQUAL, flag, flag))
    namespaces.rule(
        fail_with(38), "clone3"
    )  # its flags are in memory, where no filter sees them; clone takes its place
    families = Filter(ALLOW)
    known = {int(getattr(socket, name)) for name in unit.words("RestrictAddressFamilies")}
    for family in range(64):
        if family not in known:
            families.rule(fail_with(97), "socket", (0, EQUAL, family, 0))
    families.rule(fail_with(97), "socket", (0, AT_LEAST, 64, 0))
    calls = Filter(KILL)
    for name in sorted(unit.system_calls):
        calls.rule(ALLOW, name)
    return [memory, namespaces, families, calls]


def give_up(unit: Unit, uid: int, gid: int, groups: list[int], last_capability: int) -> None:
    """Every privilege, and become the user [CapabilityBoundingSet=, NoNewPrivileges=, User= and their kin]."""
    assert unit.all("CapabilityBoundingSet") == unit.all("AmbientCapabilities") == [""]
    assert unit.one("NoNewPrivileges") == "yes"
    for capability in range(last_capability + 1):
        check(LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0), "prctl")
    for name, limit in (("LimitCORE", resource.RLIMIT_CORE), ("LimitNOFILE", resource.RLIMIT_NOFILE)):
        resource.setrlimit(limit, (unit.size(name), unit.size(name)))
    os.umask(int(unit.one("UMask"), 8))
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")


def environment(unit: Unit, notify: str | None) -> dict[str, str]:
    """The environment of a service, and where the program is [systemd.exec(5), Environment variables]."""
    variables = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "PYTHONPATH": str(ROOT / "src")}
    if notify is not None:
        watchdog = int(unit.one("WatchdogSec")) * 1_000_000
        variables |= {"NOTIFY_SOCKET": notify, "WATCHDOG_USEC": str(watchdog), "WATCHDOG_PID": str(os.getpid())}
    return variables


def main(arguments: list[str]) -> None:
    """Never returns."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--as-another", action="store_true", help="as a user that is not the unit's")
    parser.add_argument("--notify", metavar="ADDRESS", help="where systemd would listen")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    unit = Unit()
    ready = filters(unit)  # systemd-analyze is asked while there is still a way to it
    apart()
    last_capability = int(Path("/proc/sys/kernel/cap_last_cap").read_text())  # not to be seen later
    uid, gid, groups = make_root(unit, options.state, options.config)
    if options.as_another:
        uid, gid, groups = OTHER_USER, OTHER_USER, []
    give_up(unit, uid, gid, groups, last_capability)
    for one in ready:
        one.load()
    os.execve(options.command[0], options.command, environment(unit, options.notify))


if __name__ == "__main__":
    main(sys.argv[1:])
