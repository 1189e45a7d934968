"""Models in the ONNX format, seen through the vocabulary; `graph.OnnxGraph` is the way in."""
