"""The adapter of Keras's `fit`: what `distribute.prepare` does."""
