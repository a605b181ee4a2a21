"""A contestant's far side that does nothing: `python tests/benchmarks/fake_side.py [num_tokens]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.serve import serve


class Fake:
    def start(self, **options):
        sys.stdout.write("a library greets its user\n")  # must not reach the protocol
        if options.get("fail"):
            raise ValueError("there is no such model")
        return {"settings": "fake", "given": options}

    def round(self, *, number):
        if number == 99:
            raise SystemExit(3)
        return {"num_tokens": int(sys.argv[1]), "seconds": 0.5, "number": number}


if __name__ == "__main__":
    serve(Fake(), packages=("rich",))
