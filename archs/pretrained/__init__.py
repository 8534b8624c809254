"""Published checkpoints: ours from their config.json, and any other model of transformers."""

from archs.pretrained.load import load_pretrained, pretrained_model

__all__ = ["load_pretrained", "pretrained_model"]
