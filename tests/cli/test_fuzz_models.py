"""Whatever a model folder's files hold, loading gives a model or a sentence, never a traceback.

The slow profile does the same with twenty-five times as many examples.
"""

import copy
import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshift.errors import InputError

FEW = settings(derandomize=True, max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
NUMBERS = (0, -1, 1, 2, 3, 64, 2**31, 2**63, 10**400, 0.5, 1e-9, 1e308, -0.0, float("nan"), float("inf"))
TEXTS = ("", "llama", "gelu", "silu", "sliding_attention", "float32", "Llama", "gpt2", "[UNK]", "\0", "\u2028")
VALUES = st.recursive(
    st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
# Keys that other families read, so that a folder of one family is met with those of another.
KEYS = (
    *("layer_types", "sliding_window", "rope_scaling", "rope_parameters", "head_dim", "partial_rotary_factor"),
    *("attention_bias", "mlp_bias", "final_logit_softcapping", "query_pre_attn_scalar", "n_inner", "id2label"),
    *("quantization_config", "num_labels", "dtype", "torch_dtype", "pad_token_id", "auto_map", "tokenizer_class"),
)


@st.composite
def spoiled(draw, document):
    """A JSON document with values, at any depth, replaced or gone, as bytes that may be spoiled too."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(0, 3))):
        put_in(draw, document)
    content = bytearray(json.dumps(document).encode("utf-8", errors="surrogatepass"))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        at = draw(st.integers(0, len(content)))
        content[at : at + draw(st.integers(0, 4))] = draw(
            st.binary(max_size=3) | st.sampled_from([b"{", b"]", b'"', b",", b"1"])
        )
    return bytes(content)


def put_in(draw, document):
    """One change somewhere below: a walk down, then another value, or none."""
    owner = document
    while True:
        places = list(owner) if isinstance(owner, dict) else list(range(len(owner)))
        if not places:
            return
        place = draw(st.sampled_from(places))
        inner = owner[place]
        if not (isinstance(inner, dict | list) and inner and draw(st.booleans())):
            break
        owner = inner
    if draw(st.booleans()):
        owner[place] = draw(VALUES)
    elif isinstance(owner, dict) and draw(st.booleans()):
        owner[draw(st.sampled_from(KEYS))] = draw(VALUES)
    else:
        del owner[place]


@pytest.fixture(scope="module", params=["tiny_model", "tiny_reward"])
def folder(request, tmp_path_factory):
    """A copy of a tiny model, of which each example spoils one file."""
    copied = tmp_path_factory.mktemp("spoiled") / "model"
    shutil.copytree(request.getfixturevalue(request.param), copied)
    return Folder(copied)


class Folder:
    """A model folder, and its files as they were."""

    def __init__(self, path):
        self.path = path
        self.before = {name: (path / name).read_bytes() for name in FILES if (path / name).is_file()}


def open_all(folder):
    """All that commands read of a folder."""
    from meshift.models.hf.load import check_weights, load_model
    from meshift.runtime.models import open_tokenizer, stop_token_ids

    for head in ("lm", "reward", "value"):
        check_weights(folder, head)
        load_model(folder, head=head)
    tokenizer = open_tokenizer(str(folder))
    tokenizer.encode("the film was good", add_special_tokens=False)
    stop_token_ids(str(folder), tokenizer)


def is_refused(data, folder, name):
    before = folder.before[name]
    content = data.draw(spoiled(json.loads(before)) if name.endswith(".json") else torn(before))
    (folder.path / name).write_bytes(content)
    try:
        sentence = fault_of(folder.path)
    finally:
        (folder.path / name).write_bytes(before)
    if sentence is not None:
        assert "\n" not in sentence, "one line"
        assert len(sentence) < 1000, "a sentence, not a dump"
        assert str(folder.path) in sentence or name in sentence, "where"


def fault_of(folder):
    try:
        open_all(folder)
    except InputError as error:
        return str(error)
    return None


@st.composite
def torn(draw, content):
    """Bytes that are cut off, or spoiled in their first part, where a header is."""
    content = bytearray(content)
    if draw(st.booleans()):
        return bytes(content[: draw(st.integers(0, len(content)))])
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, 1500))
        content[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(content)


@FEW
@given(data=st.data())
def test_no_model_folder_shows_a_traceback(folder, data):
    is_refused(data, folder, data.draw(st.sampled_from(sorted(folder.before))))


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@MANY
@given(data=st.data())
def test_no_model_folder_of_many_shows_a_traceback(folder, name, data):
    if name in folder.before:
        is_refused(data, folder, name)
