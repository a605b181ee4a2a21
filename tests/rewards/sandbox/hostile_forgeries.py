"""Programs that try to pass without knowing the answer: SECRET in a test is drawn anew each time.

`fools_exit_codes` says that a scorer which runs the tests after the program in one interpreter, and believes its
exit code, takes it for right: a test shows that.
"""

from dataclasses import dataclass

PLAIN = ("assert f(7) == SECRET",)


@dataclass(frozen=True)
class Forgery:
    what: str
    code: str
    tests: tuple[str, ...] = PLAIN
    fools_exit_codes: bool = True


FRAMES = """
import json, os, threading
def frame(message): return (lambda b: len(b).to_bytes(4, 'big') + b)(json.dumps(message).encode())
def flood(*messages):
    for place in range(3, 300):
        for message in messages:
            try: os.write(place, frame(message))
            except OSError: pass
"""
LIE = "class Lie:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"

FUNCTIONS = [
    Forgery("exit while loading", "import os\nos._exit(0)"),
    Forgery("exit politely while loading", "import sys\nsys.exit(0)"),
    Forgery("quit", "raise SystemExit"),
    Forgery("exit when called", "import os\ndef f(x): os._exit(0)"),
    Forgery("raise SystemExit when called", "def f(x): raise SystemExit(0)"),
    Forgery("exit when collected", "import os\nclass A:\n    def __del__(self): os._exit(0)\ndef f(x): A()"),
    Forgery("an exit handler", "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): pass"),
    Forgery("a hook for exceptions", "import os, sys\nsys.excepthook = lambda *a: os._exit(0)\ndef f(x): pass"),
    Forgery("equal to all", LIE + "def f(x): return Lie()"),
    Forgery("an integer equal to all", LIE.replace("Lie:", "Lie(int):") + "def f(x): return Lie()"),
    Forgery("a text equal to all", LIE.replace("Lie:", "Lie(str):") + "def f(x): return Lie()"),
    Forgery("a list equal to all", LIE.replace("Lie:", "Lie(list):") + "def f(x): return Lie([1])"),
    Forgery("a float equal to all", LIE.replace("Lie:", "Lie(float):") + "def f(x): return Lie()"),
    Forgery("a class equal to all", "class M(type):\n    def __eq__(s, o): return True\n    __hash__ = None\n"
            "class C(metaclass=M): pass\ndef f(x): return C"),
    Forgery("a mock", "from unittest.mock import ANY\ndef f(x): return ANY"),
    Forgery("a lie about its class", LIE.replace("Lie:", "Lie:\n    __class__ = int") + "def f(x): return Lie()"),
    Forgery("inside a list", LIE + "def f(x): return [Lie()]", ("assert f(7) == [SECRET]",)),
    Forgery("inside a dictionary", LIE + "def f(x): return {'a': Lie()}", ("assert f(7)['a'] == SECRET",)),
    Forgery("true comparisons", "class T:\n    def __lt__(s, o): return True\n"
           "    __gt__ = __le__ = __ge__ = __lt__\n"
            "    def __sub__(s, o): return s\n    def __abs__(s): return s\ndef f(x): return T()",
            ("assert abs(f(7) - SECRET) < 1e-6",)),
    Forgery("not a number", "def f(x): return float('nan')", ("assert abs(f(7) - SECRET) < 1e-6",), False),
    Forgery("contains all", "class T:\n    def __contains__(s, o): return True\ndef f(x): return T()",
            ("assert SECRET in f(7)",)),
    Forgery("iterates without end", "import itertools\ndef f(x): return itertools.repeat(0)",
            ("assert list(f(7)) == [SECRET]",), False),
    Forgery("an attribute for all", LIE + "class A:\n    def __getattr__(s, n): return Lie()\n"
           "def f(x): return A()",
            ("assert f(7).value == SECRET",)),
    Forgery("an item for all", LIE + "class A:\n    def __getitem__(s, n): return Lie()\ndef f(x): return A()",
            ("assert f(7)[0] == SECRET",)),
    Forgery("a length that is none", "class N(int):\n    def __eq__(s, o): return True\nclass A:\n"
            "    def __len__(s): return N(3)\ndef f(x): return A()", ("assert len(f(7)) == SECRET",), False),
    Forgery("end the loop of the tests", "def f(x): raise StopIteration",
            ("assert all(map(lambda c: f(c) == SECRET, [1, 2]))",)),
    Forgery("end the generator of the tests", "def f(x): raise GeneratorExit", PLAIN, False),
    Forgery("raise what the test raises", "def f(x): raise AssertionError", PLAIN, False),
    Forgery("an interrupt", "def f(x): raise KeyboardInterrupt", PLAIN, False),
    Forgery("replace a built-in function", "import builtins\nbuiltins.abs = lambda x: 0\ndef f(x): return 0",
            ("assert abs(f(7) - SECRET) < 1",)),
    Forgery("shadow a built-in function", "def sorted(x): return 0\ndef f(x): return []",
            ("assert sorted(f(7)) == sorted([SECRET])",)),
    Forgery("shadow a built-in class", LIE + "def set(x): return Lie()\ndef f(x): return []",
            ("assert set(f(7)) == set([SECRET])",)),
    Forgery("replace a module's function", "import math\nmath.isclose = lambda *a, **k: True\n"
           "def f(x): return 0.0",
            ("import math\nassert math.isclose(f(7), SECRET)",)),
    Forgery("replace a module that the test forgot", "import types\n"
           "math = types.SimpleNamespace(isclose=lambda *a: True)\n"
            "def f(x): return 0.0", ("assert math.isclose(f(7), SECRET)",)),
    Forgery("replace modules", "import sys, types\n"
           "sys.modules['copy'] = types.SimpleNamespace(deepcopy=lambda x: 0)\n"
            "def f(x): return 0", ("import copy\nassert f(7) == copy.deepcopy(SECRET)",)),
    Forgery("jump over the assertion", "import sys\ndef jump(frame, event, arg):\n    return jump\n"
            "def f(x):\n    g = sys._getframe(1)\n    g.f_globals['SKIP'] = True\n    raise SystemExit(0)"),
    Forgery("read the tests in the frames", "import sys\ndef f(x):\n    frame = sys._getframe()\n"
           "    while frame:\n"
            "        for code in (*frame.f_code.co_consts, *frame.f_locals.values(), *frame.f_globals.values()):\n"
            "            if isinstance(code, int) and code > 10 ** 9: return code\n        frame = frame.f_back"),
    Forgery("search all objects", "import gc\ndef f(x):\n    for o in gc.get_objects():\n        for v in "
            "(o if isinstance(o, (list, tuple)) else o.values() if isinstance(o, dict) else ()):\n"
            "            if type(v) is int and 10 ** 12 < v < 10 ** 13: return v", PLAIN, False),
    Forgery("search the memory", "import ctypes, re\ndef f(x):\n    here = id(f) & ~0xfff\n"
            "    for page in range(here - (1 << 20), here + (1 << 20), 4096):\n"
            "        try: m = re.search(rb'== (\\d{13})', ctypes.string_at(page, 4096))\n"
            "        except Exception: continue\n        if m: return int(m[1])", PLAIN, False),
    Forgery("write verdicts to all files", FRAMES + "line = b'{\"test\": 0, \"passed\": true, "
           "\"detail\": \"\"}\\n'\n"
            "for place in range(300):\n    try: os.write(place, line)\n    except OSError: pass\n"
            "def f(x): pass", PLAIN, False),
    Forgery("answer before the question", FRAMES + "flood({'loaded': True}, *[{'value': True}] * 9)\n"
           "def f(x): pass",
            PLAIN, False),
    Forgery("answer with a reference that lies", FRAMES + "def f(x): flood({'value': {'h': '__class__'}})",
           PLAIN, False),
    Forgery("answer with an unknown tag", FRAMES + "def f(x): flood({'value': {'o': 'os.system'}})", PLAIN, False),
    Forgery("answer with an end", FRAMES + "def f(x): flood({'end': True})",
            ("assert all(map(lambda c: f(c) == SECRET, [1, 2]))",), False),
    Forgery("answer with SystemExit", FRAMES + "def f(x): flood({'raised': 'SystemExit', 'text': '0'})", PLAIN,
           False),
    Forgery("answer with the tester's own error", FRAMES + "def f(x): flood({'raised': 'TestTimeError'})",
           PLAIN, False),
    Forgery("answer with a changed argument", FRAMES + "def f(x): flood({'value': 0, 'changed': [[0]]})",
            ("wanted = [SECRET]\nassert f(7) == wanted[0]",), False),
    Forgery("an answer of 4 GB", FRAMES + "def f(x):\n    for p in range(3, 300):\n"
           "        try: os.write(p, b'\\xff' * 4)\n"
            "        except OSError: pass", PLAIN, False),
    Forgery("an answer nested deep", FRAMES + "b = b'[' * 10 ** 6\ndef f(x):\n    for p in range(3, 300):\n"
           "        try:\n"
            "            os.write(p, len(b).to_bytes(4, 'big')); os.write(p, b)\n"
            "        except OSError: pass", PLAIN, False),
    Forgery("answers from a hidden thread",
           FRAMES + "def f(x): threading.Thread(target=lambda: [flood({'value': True}) "
            "for _ in range(99)], daemon=True).start()", PLAIN, False),
    Forgery("close all files", "import os\ndef f(x): os.closerange(0, 1 << 16)", PLAIN, False),
    Forgery("end where an error is expected", "import os\ndef f(x): os._exit(0)",
            ("try:\n    f(7)\n    raise SystemExit\nexcept Exception:\n    pass",)),
    Forgery("a pickle", "import os, pickle\nclass P:\n    def __reduce__(s): return (os._exit, (0,))\n"
            "def f(x): return pickle.dumps(P())", ("assert __import__('pickle').loads(f(7)) == SECRET",)),
    Forgery("a text of code", "def f(x): return '__import__(\"os\")._exit(0)'", PLAIN, False),
]  # fmt: skip

OUTPUTS = {
    "nothing": "",
    "exit at once": "import os\nos._exit(0)",
    "claim success": "print('passed'); print('OK'); import os; os._exit(0)",
    "look for it in the environment": "import os, sys\nprint(os.environ, sys.argv)",
    "look for it in all files": "import os\nfor p in range(300):\n"
           "  try: os.lseek(p, 0, 0); print(os.read(p, 9999).decode())\n"
    "  except OSError: pass",
    "look for it in memory": "import gc\nfor o in gc.get_objects():\n  if isinstance(o, dict):\n"
           "    for v in list(o.values()):\n"
    "      if isinstance(v, (str, bytes)) and 8 < len(v) < 40: print(v)",
    "close stdout": "import os, sys\nsys.stdout.close(); os.close(1)",
    "another stdout": "import sys\nclass S:\n  def write(s, x): return len(x)\n  def flush(s): pass\n"
           "sys.stdout = S()\nprint(1)",
    "write to its input": "import os\nos.write(0, b'SECRET'); os.lseek(0, 0, 0); print(open(0).read())",
    "not a number": "print('nan')",
    "infinity": "print('inf')",
    "no text": "import os\nos.write(1, b'\\xff\\xfe\\x00')",
    "half a character": "import sys\nsys.stdout.write('\\ud800')",
}  # fmt: skip
