"""The compiled kernels with the types of their arguments. Knows nothing of tensors."""

import ctypes
from functools import cache

from meshift.kernels.build import Built, build

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, tuple[str, type | None]] = {
    "packed_size": ("ll", _LONG),
    "gradient_scratch": ("lll", _LONG),
    "pack": ("pllpi", None),
    "pack_columns": ("pllllpi", None),
    "product": ("pllplpippii", None),
    "gated_product": ("pllpplppipppi", None),
    "gradient": ("pllpllpppi", None),
    "rms_norm": ("pllpfippi", None),
    "rms_norm_backward": ("pppllpipppi", None),
    "gate_backward": ("pppllippi", None),
    "turn": ("plllllppi", None),
    "put": ("pllllppi", None),
    "decode_room": ("p", _LONG),
    "decode": ("pplppp", None),
    "attend": ("plllllpplplfpi", None),
    "packed_attention": ("pppppppfppi", None),
    "packed_attention_backward": ("pppppppfppppppi", None),
    "draw": ("pllfpplppppi", _LONG),
    "logprobs": ("pllfpppppi", None),
    "logprob_gradients": ("pllfppppi", None),
    "bit_sums": ("pllippi", _INT),
    "copy_rows": ("pli", None),
    "set_signal": ("pL", None),
    "await_signals": ("plLf", _LONG),
}
"""Arguments of each kernel: p a pointer, l a long, L 64 bits, i an int, f a float."""
_TYPES = {"p": _POINTER, "l": _LONG, "L": ctypes.c_int64, "i": _INT, "f": _FLOAT}


@cache
def built() -> Built:
    """The library of this process, or why there is none."""
    found = build()
    if found.library is not None:
        missing = [name for name in _SIGNATURES if not hasattr(found.library, name)]
        if missing:
            return Built(
                fault=f"the CPU kernels lack {', '.join(missing)}: is a C file of meshift/kernels missing?"
            )
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(found.library, name)
            function.argtypes, function.restype = [_TYPES[kind] for kind in arguments], result
    return found
