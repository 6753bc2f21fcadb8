"""A plain PyTorch implementation of the Pyramid Flow models, used to train the demo model and to check the runtime."""
