"""A trained model for other runtimes: plain `transformers`, one ONNX graph, or a chain of them that leaves early."""
