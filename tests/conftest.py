"""For every test: no time limit per example on a busy machine, and no look at the model hub."""

import os

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("meshift", deadline=None)
settings.load_profile("meshift")
