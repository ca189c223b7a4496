"""The state of optimizers whose slots differ from Keras's, out of Keras's files."""
