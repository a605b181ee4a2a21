"""Numbers that our configs and the peers' have in common. Every environment imports it, so it imports nothing."""

LEARNING_RATE = 1e-6
NUM_GENERATIONS = 8
PPO_EPOCHS = 4
PPO_MINI_BATCHES = 4
MAX_STEPS = 1000
"""More steps than any run makes: the rate is constant."""
