"""11: a trained model becomes a package to hand on: weights, what they mean, a model card, ONNX, BioImage.IO."""
