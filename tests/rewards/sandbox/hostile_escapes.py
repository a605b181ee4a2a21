"""Programs that try to get out of the sandbox: each prints ESCAPED where it has.

`works_outside` says that it does so as a plain process, which a test shows: such an attack is known to be a real
one.
"""

from dataclasses import dataclass

HEAD = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def escaped(works=True):
    if works:
        print("ESCAPED", flush=True)
def call(number, *arguments):
    return libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
"""


@dataclass(frozen=True)
class Escape:
    what: str
    code: str
    works_outside: bool = True
    needs_root: bool = False  # to work outside

    @property
    def program(self):
        return HEAD + self.code


ESCAPES = [
    Escape("fork", "pid = os.fork()\nif pid == 0: os._exit(0)\nescaped()"),
    Escape("vfork by libc", "pid = libc.vfork()\nif pid == 0: libc._exit(0)\n"
           "escaped(pid > 0)", works_outside=False),
    Escape("posix_spawn", "os.posix_spawn('/bin/true', ['true'], {})\nescaped()"),
    Escape("system", "escaped(os.system('true') == 0)"),
    Escape("subprocess", "import subprocess\nescaped(subprocess.run([sys.executable, '-c', '']).returncode == 0)"),
    Escape("multiprocessing", "import multiprocessing as m\np = m.get_context('fork').Process(target=print)\n"
           "p.start(); p.join(); escaped(p.exitcode == 0)"),
    Escape("exec another program", "os.execv('/bin/echo', ['echo', 'ESCAPED'])"),
    Escape("exec the interpreter", "os.execv(sys.executable, [sys.executable, '-c', 'print(\"ESCAPED\")'])"),
    Escape("exec from a memory file", "f = os.memfd_create('x')\nos.write(f, open('/bin/echo', 'rb').read())\n"
           "os.execve(f, ['echo', 'ESCAPED'], {})"),
    Escape("a memory file", "os.memfd_create('x'); escaped()"),
    Escape("a raw clone with namespaces", "pid = call(56 if os.uname().machine == 'x86_64' else 220, "
           "0x10000011, 0, 0, 0)\n"
           "if pid == 0: os._exit(0)\nescaped(pid > 0)"),
    Escape("an internet socket", "import socket; socket.socket(); escaped()"),
    Escape("a local socket", "import socket; socket.socket(socket.AF_UNIX); escaped()"),
    Escape("a pair of sockets", "import socket; socket.socketpair(); escaped()"),
    Escape("netlink", "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW); escaped()"),
    Escape("connect to the machine", "import socket; socket.create_connection(('127.0.0.1', PORT), 2); escaped()"),
    Escape("look up a name", "import socket; escaped(bool(socket.getaddrinfo('localhost', 80)))"),
    Escape("trace itself by its parent", "escaped(libc.ptrace(0, 0, 0, 0) == 0)"),
    Escape("read a process's memory", "b = ctypes.create_string_buffer(8)\nclass V(ctypes.Structure):\n"
           "    _fields_ = [('p', ctypes.c_void_p), ('n', ctypes.c_size_t)]\nv = V(ctypes.addressof(b), 8)\n"
           "escaped(libc.process_vm_readv(os.getpid(), ctypes.byref(v), 1, ctypes.byref(v), 1, 0) == 8)"),
    Escape("open its own memory", "open('/proc/self/mem', 'rb'); escaped()"),
    Escape("open its parent's memory", "open(f'/proc/{os.getppid()}/mem', 'rb'); escaped()", needs_root=True),
    Escape("list processes", "escaped(any(name.isdigit() for name in os.listdir('/proc')))"),
    Escape("read a command line", "escaped(bool(open(f'/proc/{os.getppid()}/cmdline').read()))"),
    Escape("read its mounts", "open('/proc/self/mountinfo'); escaped()"),
    Escape("reopen a file by /proc", "open('/proc/self/fd/0'); escaped()"),
    Escape("signal the run", "os.kill(RUN, 0); escaped(RUN != os.getpid() and RUN > 64)"),
    Escape("signal its parent", "escaped(os.getppid() > 0 and not os.kill(os.getppid(), 0))"),
    Escape("stop its process group", "escaped(os.getpgrp() != 0 and not os.killpg(os.getpgrp(), 0))"),
    Escape("a handle of a process", "os.pidfd_open(os.getpid()); escaped()"),
    Escape("read a file of the run", "escaped(open(CANARY).read() == 'secret')"),
    Escape("read the users", "open('/etc/passwd'); escaped()"),
    Escape("read the project", "open(PROJECT); escaped()"),
    Escape("list the root folder", "os.listdir('/'); escaped()"),
    Escape("list the temporary folder", "escaped(bool(os.listdir('/tmp')))"),
    Escape("write beside the run", "open(CANARY + '.left', 'w').write('x'); escaped()"),
    Escape("write to shared memory", "open('/dev/shm/meshift-escape', 'w').write('x'); escaped()"),
    Escape("write to Python's library", "open(os.__file__, 'ab'); escaped()", needs_root=True),
    Escape("a symbolic link", "os.symlink('/etc', f'/tmp/link-{os.getpid()}'); escaped()"),
    Escape("a hard link", "p = f'/tmp/hard-{os.getpid()}'; open(p, 'w'); os.link(p, p + 'b'); escaped()"),
    Escape("a named pipe", "os.mkfifo(f'/tmp/fifo-{os.getpid()}'); escaped()"),
    Escape("a file with the user's bit", "p = f'/tmp/suid-{os.getpid()}'; open(p, 'w'); os.chmod(p, 0o4755); "
           "escaped()"),
    Escape("climb out by dots", "escaped('root' in open('/tmp/' + '../' * 40 + 'etc/passwd').read())"),
    Escape("an open folder and openat", "d = os.open('/', os.O_RDONLY); os.open('etc/passwd', 0, dir_fd=d); "
           "escaped()"),
    Escape("a device", "os.mknod(f'/tmp/dev-{os.getpid()}', 0o20666, os.makedev(1, 3)); "
           "escaped()", needs_root=True),
    Escape("the kernel's memory", "os.open('/dev/mem', os.O_RDONLY); escaped()", works_outside=False),
    Escape("a disk", "os.open('/dev/vda', os.O_RDONLY) or os.open('/dev/sda', 0); escaped()", works_outside=False),
    Escape("a terminal's input", "import fcntl; fcntl.ioctl(0, 0x5412, b'x'); escaped()", works_outside=False),
    Escape("mount", "escaped(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0)", works_outside=False),
    Escape("a user namespace", "escaped(libc.unshare(0x10000000) == 0)"),
    Escape("enter a namespace", "escaped(libc.setns(os.open('/proc/self/ns/uts', 0), 0) == 0)", needs_root=True),
    Escape("change the root folder", "os.chroot('/tmp'); escaped()", needs_root=True),
    Escape("become root", "os.setuid(0); escaped()", needs_root=True),
    Escape("be root", "escaped(os.geteuid() == 0)", needs_root=True),
    Escape("hold a capability", "d = ctypes.create_string_buffer(24)\nh = bytes([0x22, 5, 8, 0x20]) + bytes(4)\n"
           "escaped(libc.capget(h, d) == 0 and any(d.raw[:4]))", needs_root=True),
    Escape("name the machine", "escaped(libc.sethostname(b'x', 1) == 0)", works_outside=False),
    Escape("set the clock", "import time; time.clock_settime(0, time.time()); escaped()", works_outside=False),
    Escape("load a kernel module", "escaped(call(313 if os.uname().machine == 'x86_64' else 273, 0, b'', 0) == 0)",
           works_outside=False),
    Escape("keys", "escaped(call(250 if os.uname().machine == 'x86_64' else 219, 0, -3, 1) >= 0)",
           works_outside=False),
    Escape("io_uring", "escaped(call(425, 1, ctypes.create_string_buffer(120)) >= 0)", works_outside=False),
    Escape("bpf", "escaped(call(321 if os.uname().machine == 'x86_64' else 280, 0, bytes(72), 72) >= 0)",
           works_outside=False),
    Escape("performance counters", "b = ctypes.create_string_buffer(bytes([1, 0, 0, 0, 120]) + bytes(115), 120)\n"
           "escaped(call(298 if os.uname().machine == 'x86_64' else 241, b, 0, -1, -1, 0) >= 0)",
           works_outside=False),
    Escape("page faults in user space", "escaped(call(323 if os.uname().machine == 'x86_64' else 282, 1) >= 0)",
           works_outside=False),
    Escape("shared memory of System V", "escaped(libc.shmget(0, 4096, 0o1600) >= 0)"),
    Escape("a message queue", "escaped(libc.msgget(0, 0o1600) >= 0)"),
    Escape("watch files", "escaped(libc.inotify_init() >= 0)"),
    Escape("raise its own limits", "import resource as r\nr.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY,) * 2)\n"
           "r.setrlimit(r.RLIMIT_NPROC, (1 << 16,) * 2); escaped()", needs_root=True),
    Escape("set the limits of another", "import resource as r\nr.prlimit(os.getppid(), r.RLIMIT_CPU)\n"
           "escaped(os.getppid() > 0)"),
    Escape("gain privileges by a program", "escaped(libc.prctl(39, 0, 0, 0, 0) == 0)"),  # no_new_privs is not set
    Escape("put up a filter of its own", "class P(ctypes.Structure):\n    _fields_ = [('n', ctypes.c_ushort), "
           "('f', ctypes.c_void_p)]\ni = ctypes.create_string_buffer(bytes([6, 0, 0, 0, 0, 0, 0xff, 0x7f]), 8)\n"
           "libc.prctl(38, 1, 0, 0, 0)\nescaped(libc.prctl(22, 2, ctypes.byref(P(1, ctypes.addressof(i)))) == 0)"),
    Escape("read the run's environment", "escaped('MESHIFT_SECRET' in os.environ)"),
    Escape("a higher priority", "os.nice(-5); escaped()", needs_root=True),
    Escape("system calls of 32 bits", "import mmap\nm = mmap.mmap(-1, 4096, prot=7)\n"
           "m.write(bytes.fromhex('b814000000cd80c3'))\n"  # mov eax, 20 (getpid); int 0x80; ret
           "f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\n"
           "escaped(f() > 0)", works_outside=False),
    Escape("system calls of x32", "escaped(call(0x40000000 + 39) != 0)", works_outside=False),
]  # fmt: skip
