"""Programs that take too much, or never end. All of them must be over
soon, and have taken no more than they may.

Each is run after a line that prints what is expected: it passes where it does no harm and ends by itself."""

BOMBS = {
    "a loop": "while True: pass",
    "a loop in C": "import itertools, collections\ncollections.deque(itertools.count(), maxlen=0)",
    "a number without end": "print(len(str(9 ** 9 ** 9)))",
    "a power in C": "pow(3, 10 ** 9)",
    "a regular expression": "import re\nre.match(r'(a+)+$', 'a' * 64 + 'b')",
    "sleep": "import time\ntime.sleep(1000)",
    "wait for input that never comes": "import select\nselect.select([], [], [])",
    "wait for a lock": "import threading\nt = threading.Lock(); t.acquire(); t.acquire()",
    "catch everything": "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    "ignore signals": "import signal\nfor s in range(1, 65):\n  try: signal.signal(s, signal.SIG_IGN)\n"
    "  except (OSError, ValueError): pass\nwhile True: pass",
    "block signals": "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
    "a list": "x = []\nwhile True: x.append(bytes(1 << 20))",
    "one large block": "x = bytearray(1 << 40)",
    "memory mapped": "import mmap\nx = [mmap.mmap(-1, 1 << 28) for _ in range(64)]",
    "a text that doubles": "x = 'a'\nwhile True: x += x",
    "a zip bomb": "import zlib\n"
           "c = zlib.compressobj(9); z = b''.join(c.compress(bytes(1 << 20)) for _ in range(300))\n"
    "x = zlib.decompress(z + c.flush(), bufsize=1 << 30)\nprint(len(x * 4))",
    "deep recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(n): return f(n + 1) + 1\nf(0)",
    "deep recursion in C": "import sys\nsys.setrecursionlimit(10 ** 9)\nx = []\n"
           "for _ in range(10 ** 6): x = [x]\nrepr(x)",
    "deep source": "eval('(' * 10 ** 5 + ')' * 10 ** 5)",
    "a fork bomb": "import os\nwhile True: os.fork()",
    "a fork bomb that goes on": "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    "threads without end": "import threading, time\n"
           "while True: threading.Thread(target=time.sleep, args=(99,)).start()",
    "threads that compute": "import threading\ndef f():\n  while True: pass\n"
    "for _ in range(8): threading.Thread(target=f).start()",
    "a hidden thread": "import threading, os\ndef f():\n  while True: os.write(1, b'x')\n"
    "threading.Thread(target=f, daemon=True).start()\nos._exit(0)",
    "a thread after the end": "import threading, time\nthreading.Thread(target=time.sleep, args=(999,)).start()",
    "an exit handler without end": "import atexit, time\natexit.register(time.sleep, 999)",
    "a flood of output": "while True: print('x' * 1000)",
    "a flood of errors": "import sys\nwhile True: sys.stderr.write('x' * 1000)",
    "a flood by the raw call": "import os\nwhile True:\n  try: os.write(1, b'x' * 65536)\n  except OSError: pass",
    "a sparse output": "import os\nos.ftruncate(1, 1 << 40)",
    "a far seek": "import os\nos.lseek(1, 1 << 50, 0); os.write(1, b'x')",
    "a full disk": "n = 0\nwhile True:\n  n += 1\n  open(f'/tmp/{n}', 'wb').write(bytes(1 << 19))",
    "many files": "n = 0\nwhile True:\n  n += 1\n  open(f'/tmp/{n}', 'w').close()",
    "many folders": "import os\nwhile True: os.mkdir('d'); os.chdir('d')",
    "many open files": "import os\nwhile True: os.dup(0)",
    "many pipes": "import os\nwhile True: os.pipe()",
    "a crash": "import ctypes\nctypes.string_at(0)",
    "a crash by its own signal": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV); os.abort()",
    "machine code without end": "import ctypes, mmap, platform\nm = mmap.mmap(-1, 4096, prot=7)\n"
    "m.write(bytes.fromhex('ebfe' if platform.machine() == 'x86_64' else '00000014'))\n"
    "ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()",
    "close everything": "import os\nos.closerange(0, 1 << 16)\nprint('x')",
    "kill everything": "import os, signal\nos.kill(-1, signal.SIGKILL)\nos.kill(os.getpid(), signal.SIGSTOP)",
    "kill its process group": "import os, signal\nos.kill(0, signal.SIGKILL)\n"
    "while True: os.killpg(0, signal.SIGKILL)",
    "stop itself": "import os, signal, time\nos.kill(os.getpid(), signal.SIGSTOP); time.sleep(99)",
    "garbage that comes back": "class A:\n  def __del__(self): A()\nA()\nimport gc\ngc.collect()\nwhile True: A()",
    "a NUL in the source": "print(1)\0",
    "source that is no text": "\udcff\udcfe",
}  # fmt: skip
